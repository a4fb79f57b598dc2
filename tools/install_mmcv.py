"""Install mmcv with its ops compiled against the torch at hand.

What ``pip install --no-build-isolation mmcv==2.1.0`` does, but

- in a fifth of the time: nearly all of it goes into reading torch's headers
  and writing debug sections, 77 times. Here g++ reads the headers once, into
  a precompiled header, and writes no debug sections;
- for torch 2.14 and later too, whose headers want C++20, where mmcv's setup
  asks for C++17;
- never from pip's kept wheels, which may be those of another torch.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MMCV = 'mmcv==2.1.0'
NEEDED = ('torch', 'setuptools', 'wheel', 'ninja', 'psutil')
WORKS = """
import mmcv._ext, torch
from mmcv.ops import nms
boxes = torch.tensor([[0., 0, 9, 9], [0, 0, 8, 9], [20, 20, 29, 29]])
assert nms(boxes, torch.tensor([.9, .8, .7]), .5)[1].tolist() == [0, 2]
"""
# What runs in the compiler's place. Later flags win over mmcv's. The first
# file compiled makes the precompiled header, with all of its own flags.
WRAPPER = """#!{python}
import fcntl, os, subprocess, sys
compiler, extra, header = {compiler!r}, {extra!r}, {header!r}
args = sys.argv[1:]
if '-c' not in args:
    sys.exit(subprocess.call(compiler + args))
args += extra
if header:
    with open(header, 'a') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(header + '.gch'):
            # all but what names the file, twice -c among it
            flags = [
                flag
                for flag in args
                if flag not in ('-c', '-o', '-MMD', '-MF')
                and not flag.endswith(('.cpp', '.o', '.o.d'))
            ]
            subprocess.check_call(
                compiler
                + flags
                + ['-x', 'c++-header', header, '-o', header + '.gch']
            )
    args += ['-Winvalid-pch', '-include', header]
sys.exit(subprocess.call(compiler + args))
"""


def say(text: str) -> None:
    print(f'==> {text}', flush=True)


def check_machine() -> None:
    """Stop early, in one sentence, where the build could only fail late."""
    python = 'Python ' + '.'.join(map(str, sys.version_info[:2]))
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        sys.exit(
            f'{python} will not do: mmcv 2.1 builds on 3.10, 3.11 and 3.12; '
            'name one of them, as in `make env PYTHON=python3.11`.'
        )
    if not shutil.which(compiler()[0]):
        sys.exit(
            f'There is no C++ compiler ({compiler()[0]}), which mmcv needs: '
            'install one (Debian, Ubuntu: apt install g++) or name yours in '
            'the environment variable CXX.'
        )
    include = sysconfig.get_path('include')
    if not Path(include, 'Python.h').is_file():
        sys.exit(
            f'The headers of {python} are missing ({include}/Python.h), which '
            'mmcv needs: install them (Debian, Ubuntu: apt install '
            'python3-dev).'
        )


def compiler() -> list:
    """The compiler's words: two in ``CXX='ccache g++'``."""
    return shlex.split(os.environ.get('CXX', '')) or ['c++']


def is_gcc() -> bool:
    asked = subprocess.run(
        [*compiler(), '--version'], capture_output=True, text=True
    )
    return 'Free Software Foundation' in asked.stdout


def wrap_compiler(folder: str) -> str:
    """Write what takes the compiler's place; return its path."""
    torch = tuple(map(int, re.findall(r'\d+', version('torch'))[:2]))
    extra = ['-g0', '-O2'] + ['-std=c++20'] * (torch >= (2, 14))
    header = Path(folder, 'torch_pch.h') if is_gcc() else ''
    if header:
        header.write_text('#include <torch/types.h>\n')
    wrapper = Path(folder, 'g++' if header else 'clang++')
    wrapper.write_text(
        WRAPPER.format(
            python=sys.executable,
            compiler=compiler(),
            extra=extra,
            header=str(header),
        )
    )
    wrapper.chmod(0o755)
    return str(wrapper)


def build(pip_options: list) -> None:
    """Compile and install mmcv, showing how far it is."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [
                *(sys.executable, '-m', 'pip', 'install', '-v'),
                *('--disable-pip-version-check', '--no-input'),
                *('--no-cache-dir', '--no-build-isolation', *pip_options),
                *('--no-binary', 'mmcv', MMCV),
            ],
            env=dict(
                os.environ,
                CXX=wrap_compiler(folder),
                MMCV_WITH_OPS='1',
                MAX_JOBS=os.environ.get('MAX_JOBS', str(os.cpu_count())),
                # for ninja
                PATH=f'{sysconfig.get_path("scripts")}:{os.environ["PATH"]}',
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        )
        tail, shown = [], 0
        for line in process.stdout:
            tail = [*tail[-30:], line]
            step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if step and 10 * int(step[1]) // int(step[2]) > shown:
                shown = 10 * int(step[1]) // int(step[2])
                say(f'    {step[1]} of {step[2]} files compiled')
        if process.wait():
            sys.exit(''.join(tail) + f'{MMCV} failed to install, see above.')


def works() -> bool:
    """Whether mmcv is there, with ops that fit the torch at hand."""
    done = subprocess.run([sys.executable, '-c', WORKS], capture_output=True)
    return not done.returncode


def has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--check',
        action='store_true',
        help='just say whether this machine can compile it',
    )
    parser.add_argument(
        '-c', '--constraint', help="a constraints file for mmcv's requirements"
    )
    args = parser.parse_args()
    check_machine()
    if args.check:
        return
    missing = [name for name in NEEDED if not has(name)]
    if missing:
        sys.exit(
            f'{", ".join(missing)} must be there to compile mmcv: install '
            "torch as https://pytorch.org says, and `pip install 'setuptools"
            "<80' wheel ninja psutil`."
        )
    if works():
        say('mmcv is there, and its ops fit this torch')
        return
    if has('mmcv'):
        say('The installed mmcv does not fit this torch: replacing it')
        pip = [sys.executable, '-m', 'pip']
        subprocess.run([*pip, 'uninstall', '-qy', 'mmcv'], check=True)
    say(
        f'Compiling mmcv for torch {version("torch")}: 2 to 3 minutes on two '
        'cores with g++, 5 with other compilers'
    )
    build(['-c', args.constraint] if args.constraint else [])
    if not works():
        subprocess.run([sys.executable, '-c', WORKS])
        sys.exit('mmcv is installed, but its ops do not work: see above.')


if __name__ == '__main__':
    main()
