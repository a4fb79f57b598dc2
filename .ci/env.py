"""Make .venv: torch, mmcv with compiled ops, mmdet and fasternet_det.

Takes nothing but the standard library of the Python that runs it. `make env`
calls it; run again, it takes seconds, or repairs what was interrupted. With
another version of torch, as in `make env TORCH=2.1.2`, it makes
.venv-torch2.1.2 beside it.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = os.environ.get('TORCH', '')  # '' for the constraints' own
VENV = ROOT / ('.venv' + f'-torch{TORCH}' * bool(TORCH))
# Exactly one of these lies in a .venv made here.
INCOMPLETE = 'incomplete'  # an installation runs, or was interrupted
READY = 'ready.json'  # what the complete one was made from

INSTALL_MMCV = 'tools/install_mmcv.py'
# The constraints' numpy and OpenCV want each other and torch 2.3 or later; so
# do the packages of export, which wants a later torch itself.
IS_OLD = bool(re.match(r'2\.[12]\.', TORCH))
OLD = {'numpy': '1.26.4', 'opencv-python': '4.11.0.86'}
# What tests of other tasks than detection need: see `make`.
OPENMMLAB = (
    *('mmsegmentation', 'mmpretrain', 'mmrotate-dev', 'einops', 'ftfy'),
    *('importlib_metadata', 'mat4py', 'modelindex', 'prettytable', 'regex'),
    *('wcwidth', 'zipp'),
)
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
    if not importlib.util.find_spec('ensurepip'):
        sys.exit(
            f'Python {sys.version.split()[0]} lacks venv: install it (Debian, '
            'Ubuntu: apt install python3-venv).'
        )
    check = [sys.executable, ROOT / INSTALL_MMCV, '--check']
    if subprocess.run(check).returncode:
        sys.exit(1)


def constraints():
    """The versions to install, by those of constraints.txt."""
    text = (ROOT / 'constraints.txt').read_text()
    versions = {'torch': TORCH} if TORCH else {}
    if IS_OLD:
        versions |= OLD
    for name, version in versions.items():
        lines = rf'(?m)^{name}==.*$'  # one for each Python, at times
        text = re.sub(lines, f'{name}=={version}', text)
    # Some versions of torch pin their own.
    return re.sub(r'(?m)^sympy==.*\n', '', text) if TORCH else text


def wanted():
    """What an environment is made from."""
    files = ('setup.py', 'pyproject.toml', INSTALL_MMCV)
    return {name: (ROOT / name).read_text() for name in files} | {
        'constraints.txt': constraints(),
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


def install(*args):
    """Run pip install in .venv, within the constraints."""
    run(
        *('-m', 'pip', 'install', '-q', '--disable-pip-version-check'),
        *('--no-input', '-c', VENV / 'constraints.txt', *args),
    )


def install_beside(folder, *packages):
    """Run pip install, of just these packages, into a folder of .venv."""
    install('--no-deps', '--upgrade', '--target', VENV / folder, *packages)


def run(*args):
    """Run the Python of .venv; stop with what it says where it fails."""
    if subprocess.run([VENV / 'bin' / 'python', *args], cwd=ROOT).returncode:
        sys.exit(f'{" ".join(map(str, args))} failed, see above.')


def make():
    begin()
    if not (VENV / 'bin' / 'pip').exists():
        subprocess.run([sys.executable, '-m', 'venv', VENV], check=True)
    (VENV / 'constraints.txt').write_text(constraints())
    say('Installing torch (1 to 15 minutes, by the size of its build)')
    install('torch', 'setuptools', 'wheel', 'ninja', 'psutil', 'numpy')
    run(INSTALL_MMCV, '-c', VENV / 'constraints.txt')
    say('Installing mmdet and fasternet_det (1 minute)')
    extras = 'mmdet,tests' if IS_OLD else 'mmdet,deploy,tests'
    install('--no-build-isolation', '-e', f'.[{extras}]')
    # By its own requirements, openmim would bring setuptools 60.
    install('--no-deps', 'openmim')
    # In folders of their own, where only their tests look: the environment
    # stays that of a user of mmdet.
    install_beside('openmmlab', *OPENMMLAB)
    if not TORCH:
        # A test compares with timm, which wants the torchvision of just this
        # torch; mmengine changes what it does where it finds one.
        install_beside('timm', 'timm', 'torchvision')
    say('Proving it: a Mask R-CNN with FasterNet-T0')
    run('-c', DETECTOR_BUILDS)
    (VENV / READY).write_text(json.dumps(wanted()))
    (VENV / INCOMPLETE).unlink()
    say(f'{VENV.name} is ready')


if __name__ == '__main__':
    if not is_ready():
        check_machine()
        try:
            make()
        except KeyboardInterrupt:
            sys.exit('Interrupted: the next `make env` will start afresh.')
