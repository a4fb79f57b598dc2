"""What the README tells a stranger to do, done."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fasternet_det

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def sh(command, **kwargs):
    """Run a command of the README, with ``.venv`` active."""
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        command,
        shell=True,
        text=True,
        env=dict(os.environ, PATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **kwargs,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_every_command_is_run_somewhere():
    """The others of this file's tests run these, or CI itself does."""
    blocks = re.findall(r'```bash\n(.*?)```', README, re.S)
    assert [line for block in blocks for line in block.splitlines()] == [
        'make demo',  # test_demo
        'make test',  # CI
        "pip install ninja psutil wheel 'setuptools<80'",  # test_install
        'pip install --no-build-isolation mmcv==2.1.0',
        "pip install '.[mmdet]'",
        # test_mmdet.py and test_downstream.py
        'python -m fasternet_det.datasets.nuclei data/nuclei',
        'python tools/train.py my_config.py',
        # test_mmdet.py, with mmdet's own test.py
        'python tools/test.py my_fast_config.py '
        'work_dirs/my_config/epoch_12.pth',
        # test_benchmark, with smaller images
        'python tools/benchmark.py goals --out work_dirs/benchmark',
        "pip install '.[deploy]'",  # test_install
        # test_export_tool
        *(
            'python tools/export.py my_config.py '
            f'work_dirs/my_config/epoch_12.pth --format {format}'
            for format in ('onnx', 'openvino', 'onnx --int8 --evaluate')
        ),
        # test_convert_checkpoint, test_get_flops
        'python tools/convert_checkpoint.py fasternet_t0.pth '
        'fasternet_t0.safetensors --layout timm',
        'python tools/compare.py work_dirs/compare',  # test_compare
        'python tools/get_flops.py',
    ]


def test_demo(tmp_path):
    """``make demo``, shortened to 20 iterations."""
    said = sh(
        f'make demo WORK_DIR="{tmp_path}" '
        'OPTIONS="--cfg-options train_cfg.max_iters=20 '
        'param_scheduler.1.end=20"',
        cwd=ROOT,
    )
    trained, tested = (
        re.search(rf'│ {tool}.py *│(.*)│', said)[1]
        for tool in ('train', 'test')
    )
    assert trained == tested
    assert 0 < float(trained.split('│')[0]) < 1
    for name in ('curves.png', 'pictures/x384_y000.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
    assert len(list((tmp_path / 'pictures').iterdir())) == 4


def test_install_keeps_what_is_there():
    """With all of it installed, torch above all, pip adds but us."""
    commands = re.findall(r'^pip (install .*)$', README, re.M)
    commands.append('install .')
    assert len(commands) == 5
    for command in commands:
        said = sh(f'python -m pip {command} --dry-run', cwd=ROOT)
        added = re.findall(r'Would install (.*)', said)
        assert added in ([], [f'fasternet_det-{fasternet_det.__version__}'])


@pytest.mark.parametrize(
    'missing, named',
    [
        (('mmdet', 'mmcv'), 'fasternet_det needs mmcv, mmdet'),
        (('mmcv._ext',), 'fasternet_det needs the ops of mmcv'),
    ],
)
def test_import_without_the_stack(missing, named):
    code = f"""
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: (
    None if name in {missing!r} else find_spec(name))
import fasternet_det
"""
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f'ImportError: {named}' in done.stderr
    assert "pip install 'fasternet_det[mmdet]'" in done.stderr


def test_table_of_channels():
    row = re.search(r'`in_channels` \|(.*)\|', README)[1]
    for arch, cell in zip(
        fasternet_det.FasterNet.arch_settings, row.split('|'), strict=True
    ):
        with torch.device('meta'):
            channels = fasternet_det.FasterNet(arch).out_channels
        assert [int(c) for c in cell.split(',')] == channels


def test_links_lead_somewhere():
    for page in ROOT.glob('**/*.md'):
        if '.venv' in page.parts or 'data' in page.relative_to(ROOT).parts:
            continue
        for link in re.findall(r'\]\(([^)#:]+?)(?:#\w+)?\)', page.read_text()):
            assert (page.parent / link).exists(), f'{page}: {link}'
