"""Make .venv: torch, mmcv with compiled ops, mmdet and fasternet_det.

Takes nothing but the standard library of the Python that runs it. `make env`
calls it; run again, it takes seconds, or repairs what was interrupted.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
# Exactly one of these lies in a .venv made here.
INCOMPLETE = 'incomplete'  # an installation runs, or was interrupted
READY = 'ready.json'  # what the complete one was made from

MMCV_WORKS = """
import mmcv._ext, torch
from mmcv.ops import nms
boxes = torch.tensor([[0., 0, 9, 9], [0, 0, 8, 9], [20, 20, 29, 29]])
assert nms(boxes, torch.tensor([.9, .8, .7]), .5)[1].tolist() == [0, 2]
"""
DETECTOR_BUILDS = """
from mmdet.utils import register_all_modules
register_all_modules()
from mmdet.registry import MODELS
from mmengine import Config
cfg = Config.fromfile('configs/mini/mask-rcnn_fasternet-t0_fpn_nuclei.py')
MODELS.build(cfg.model)
"""


def say(text):
    print(f'==> {text}', flush=True)


def check_machine():
    """Stop early, in one sentence, where the set-up could only fail late."""
    python = 'Python ' + '.'.join(map(str, sys.version_info[:2]))
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        sys.exit(
            f'{python} will not do: mmcv 2.1 builds on 3.10, 3.11 and 3.12; '
            'name one of them, as in `make env PYTHON=python3.11`.'
        )
    if not importlib.util.find_spec('ensurepip'):
        sys.exit(
            f'{python} lacks venv: install it (Debian, Ubuntu: apt install '
            'python3-venv).'
        )
    compiler = os.environ.get('CXX', 'c++').split()[0]
    if not shutil.which(compiler):
        sys.exit(
            f'There is no C++ compiler ({compiler}), which mmcv needs: '
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


def wanted():
    """What an environment is made from."""
    files = ('constraints.txt', 'setup.py', 'pyproject.toml')
    return {name: (ROOT / name).read_text() for name in files} | {
        'root': str(ROOT),
        'python': sys.version,
    }


def is_ready():
    ready = VENV / READY
    return ready.exists() and json.loads(ready.read_text()) == wanted()


def begin():
    """Leave a .venv marked as incomplete; keep one that can be updated."""
    if VENV.exists():
        if (VENV / READY).exists():
            made_from = json.loads((VENV / READY).read_text())
            keep = all(
                made_from[key] == wanted()[key] for key in ('root', 'python')
            )
        elif (VENV / INCOMPLETE).exists():
            say('The last set-up was interrupted: starting .venv afresh')
            keep = False
        else:
            sys.exit('There is a .venv that is not from here: move it away.')
        if not keep:
            shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    (VENV / INCOMPLETE).touch()
    (VENV / READY).unlink(missing_ok=True)


def pip(*args):
    """Start pip install in .venv, within the constraints."""
    return subprocess.Popen(
        [
            *(VENV / 'bin' / 'python', '-m', 'pip', 'install'),
            *('--disable-pip-version-check', '--no-input'),
            *('-c', ROOT / 'constraints.txt', *args),
        ],
        cwd=ROOT,
        env=dict(
            os.environ,
            MMCV_WITH_OPS='1',
            MAX_JOBS=os.environ.get('MAX_JOBS', str(os.cpu_count())),
            PATH=f'{VENV}/bin:{os.environ["PATH"]}',  # for ninja
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    )


def install(*args):
    """Run pip install, showing how far a compilation is."""
    process, tail, shown = pip(*args), [], 0
    for line in process.stdout:
        tail = [*tail[-30:], line]
        step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
        if step and 20 * int(step[1]) // int(step[2]) > shown:
            shown = 20 * int(step[1]) // int(step[2])
            say(f'    {step[1]} of {step[2]} files compiled')
    if process.wait():
        sys.exit(''.join(tail) + f'pip install {args} failed, see above.')


def works(code):
    """Whether .venv runs a piece of Python."""
    python = VENV / 'bin' / 'python'
    return not subprocess.run([python, '-c', code], cwd=ROOT).returncode


def make():
    begin()
    if not (VENV / 'bin' / 'pip').exists():
        subprocess.run([sys.executable, '-m', 'venv', VENV], check=True)
    say('Installing torch (1 to 15 minutes, by the size of its build)')
    install('torch', 'setuptools', 'wheel', 'ninja', 'psutil')
    say(
        f'Installing mmcv: {os.cpu_count()} cores compile its ops, 10 to 20 '
        'minutes on two; seconds where pip kept the wheel of an earlier time'
    )
    build = ('-v', '--no-build-isolation', 'mmcv')
    install(*build)
    if not works(MMCV_WORKS):
        say('The kept wheel of mmcv does not fit this torch: building anew')
        install('--no-cache-dir', '--force-reinstall', '--no-deps', *build)
    say('Installing mmdet and fasternet_det (1 minute)')
    install('--no-build-isolation', '-e', '.[mmdet,deploy,tests]')
    # By its own requirements, openmim would bring setuptools 60.
    install('--no-deps', 'openmim')
    say('Proving it: mmcv.ops.nms, and a Mask R-CNN with FasterNet-T0')
    if not (works(MMCV_WORKS) and works(DETECTOR_BUILDS)):
        sys.exit('All is installed, but does not work: see above.')
    (VENV / READY).write_text(json.dumps(wanted()))
    (VENV / INCOMPLETE).unlink()
    say('.venv is ready')


if __name__ == '__main__':
    if not is_ready():
        check_machine()
        try:
            make()
        except KeyboardInterrupt:
            sys.exit('Interrupted: the next `make env` will start afresh.')
