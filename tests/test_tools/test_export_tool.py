import json
import runpy
import subprocess
import sys
from pathlib import Path

import onnx
import openvino
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from fasternet_det.deploy.export import load

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs' / 'mini' / 'retinanet_fasternet-t0_fpn_nuclei.py'


@pytest.fixture(scope='module')
def checkpoint(filled, tmp_path_factory):
    """A detector with randomised BatchNorms, as mmengine saves it."""
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(CONFIG).model)
    state_dict = filled({k: v.shape for k, v in model.state_dict().items()})
    path = tmp_path_factory.mktemp('checkpoint') / 'iter_1.pth'
    meta = dict(dataset_meta=dict(classes=('nucleus',)))
    torch.save(dict(state_dict=state_dict, meta=meta), path)
    return path


main = runpy.run_path(ROOT / 'tools' / 'export.py')['main']


@pytest.fixture
def run(project, tmp_path):
    """Run the tool in a folder that holds the data."""
    (tmp_path / 'data').symlink_to(project.folder / 'data')

    def run(*args):
        return subprocess.run(
            [sys.executable, ROOT / 'tools' / 'export.py', *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def notes(path):
    return {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}


def test_backbone(run, checkpoint, tmp_path):
    done = run(CONFIG, checkpoint, '--what', 'backbone')
    assert done.returncode == 0, done.stderr
    path = tmp_path / f'{CONFIG.stem}_backbone.onnx'
    assert f'{path.name}: ' in done.stdout
    maps = load(path)(torch.zeros(1, 3, 64, 64).numpy())
    assert [m.shape for m in maps] == [
        *((1, 80, 8, 8), (1, 160, 4, 4), (1, 320, 2, 2))
    ]
    assert notes(path) == dict(
        mean=[33.0] * 3, std=[24.0] * 3, bgr_to_rgb=True, pad_size_divisor=32
    )


def test_int8_for_openvino_scored(run, checkpoint, tmp_path):
    done = run(
        *(CONFIG, checkpoint, '--format', 'openvino', '--int8', '--evaluate')
    )
    assert done.returncode == 0, done.stderr
    name = f'{CONFIG.stem}_int8.xml'
    for scored in ('PyTorch', name):
        assert f'\n{scored}: coco/bbox_mAP ' in done.stdout
    read = openvino.Core().read_model(tmp_path / name)
    assert read.get_rt_info(['model_info', 'classes']).value == '["nucleus"]'
    weights = (tmp_path / name).with_suffix('.bin')
    assert weights.stat().st_size < 0.35 * checkpoint.stat().st_size


@pytest.mark.parametrize(
    'config, args, message',
    [
        ('rtmdet_fasternet-t0_nuclei.py', (), 'does not fit RTMDet. missing'),
        ('nowhere.py', (), 'nowhere.py'),
        (CONFIG.name, ('--out', 'a.xml'), 'a.xml does not end in .onnx'),
        (CONFIG.name, ('--format', 'tflite'), "invalid choice: 'tflite'"),
        (
            CONFIG.name,
            ('--what', 'backbone', '--evaluate'),
            '--evaluate needs --what detector',
        ),
    ],
)
def test_errors(
    config, args, message, checkpoint, tmp_path, monkeypatch, capsys
):
    argv = ['export.py', CONFIG.parent / config, checkpoint, *args]
    monkeypatch.setattr(sys, 'argv', list(map(str, argv)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        main()
    assert message in f'{raised.value.code} {capsys.readouterr().err}'
    assert not list(tmp_path.iterdir())
