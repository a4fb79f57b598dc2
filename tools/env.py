"""Make .venv: torch, mmcv with compiled ops, mmdet and fasternet_det.

Takes nothing but the standard library of the Python that runs it. `make env`
calls it; run again, it takes seconds, or repairs what was interrupted.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
INCOMPLETE = VENV / 'incomplete'  # there while an installation runs
READY = VENV / 'ready.json'  # what the last complete one was made from

PROOF = """
import mmcv._ext, torch
from mmcv.ops import nms
boxes = torch.tensor([[0., 0, 9, 9], [0, 0, 8, 9], [20, 20, 29, 29]])
assert nms(boxes, torch.tensor([.9, .8, .7]), .5)[1].tolist() == [0, 2]
"""
DETECTOR = """
from mmdet.utils import register_all_modules
register_all_modules()
from mmdet.registry import MODELS
from mmengine import Config
cfg = Config.fromfile('configs/mini/mask-rcnn_fasternet-t0_fpn_nuclei.py')
MODELS.build(cfg.model)
"""


def say(text: str) -> None:
    print(f'==> {text}', flush=True)


def check_machine() -> None:
    """Stop early, in one sentence, where the build could only fail late."""
    if sys.version_info < (3, 10):
        sys.exit(
            f'Python {sys.version.split()[0]} is too old: fasternet_det '
            'needs 3.10 or newer; name another one with '
            '`make env PYTHON=python3.11`.'
        )
    compiler = os.environ.get('CXX', 'c++').split()[0]
    if not shutil.which(compiler):
        sys.exit(
            f'There is no C++ compiler ({compiler}), which mmcv needs: '
            'install one (Debian, Ubuntu: apt install g++) or name yours in '
            'the environment variable CXX.'
        )
    if not Path(sysconfig.get_path('include'), 'Python.h').is_file():
        sys.exit(
            f'The headers of Python {sys.version.split()[0]} are missing '
            f'({sysconfig.get_path("include")}/Python.h), which mmcv needs: '
            'install them (Debian, Ubuntu: apt install python3-dev).'
        )


def pip(*args: str) -> None:
    command = [str(PYTHON), '-m', 'pip', '--disable-pip-version-check']
    constraints = str(ROOT / 'constraints.txt')
    subprocess.run(
        [*command, 'install', '-q', '-c', constraints, *args],
        cwd=ROOT,
        check=True,
    )


def build_mmcv(*args: str) -> None:
    """Install mmcv from source, showing the compiler's progress."""
    command = [
        *(str(PYTHON), '-m', 'pip', 'install', '-v', '--no-build-isolation'),
        *('-c', str(ROOT / 'constraints.txt'), *args, 'mmcv'),
    ]
    environment = dict(
        os.environ,
        MMCV_WITH_OPS='1',
        MAX_JOBS=os.environ.get('MAX_JOBS', str(os.cpu_count())),
        PATH=f'{PYTHON.parent}:{os.environ["PATH"]}',  # ninja
    )
    tail: List[str] = []
    build = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    )
    shown = -1
    for line in build.stdout:
        tail = [*tail[-30:], line]
        step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
        if step:
            percent = 100 * int(step[1]) // int(step[2])
            if percent // 5 > shown:
                shown = percent // 5
                say(f'    mmcv: {step[1]} of {step[2]} files compiled')
    if build.wait():
        sys.exit(''.join(tail) + 'mmcv did not build; its last words above.')


def runs(code: str) -> bool:
    """Whether the environment runs a piece of Python."""
    return not subprocess.run([PYTHON, '-c', code], cwd=ROOT).returncode


def install() -> None:
    if INCOMPLETE.exists():
        say('The last set-up was interrupted: starting .venv afresh')
        shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    INCOMPLETE.touch()
    if not PYTHON.exists():
        subprocess.run([sys.executable, '-m', 'venv', VENV], check=True)
    say('Installing torch (1 to 15 minutes, by the size of its build)')
    pip('torch', 'setuptools', 'wheel', 'ninja', 'psutil')
    say(
        f'Installing mmcv: {os.cpu_count()} cores compile its ops, 10 to 20 '
        'minutes on two; a minute where pip kept the wheel of an earlier time'
    )
    build_mmcv()
    if not runs(PROOF):
        say('The kept wheel of mmcv does not fit this torch: building anew')
        build_mmcv('--no-cache-dir', '--force-reinstall', '--no-deps')
    say('Installing mmdet and fasternet_det (1 minute)')
    pip('--no-build-isolation', '-e', '.[mmdet,tests]')
    # By its own requirements, openmim would bring setuptools 60.
    pip('--no-deps', 'openmim')
    say('Proving it: mmcv.ops.nms, and a Mask R-CNN with FasterNet-T0')
    if not (runs(PROOF) and runs(DETECTOR)):
        sys.exit('The environment is complete, but does not work; see above.')
    INCOMPLETE.unlink()


def wanted() -> Dict[str, str]:
    """What an environment is made from."""
    files = ('constraints.txt', 'setup.py', 'pyproject.toml')
    return {name: (ROOT / name).read_text() for name in files} | {
        'root': str(ROOT)
    }


def main() -> None:
    if READY.exists() and json.loads(READY.read_text()) == wanted():
        return
    check_machine()
    install()
    READY.write_text(json.dumps(wanted()))
    say('.venv is ready')


if __name__ == '__main__':
    main()
