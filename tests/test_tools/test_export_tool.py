import json
import runpy
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from fasternet_det.deploy.export import load
from fasternet_det.deploy.metadata import describe

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


def test_imagenet_file_of_a_backbone(filled, tmp_path):
    """Its classifier may be left over, whichever backbone it is of."""
    load_model = runpy.run_path(ROOT / 'tools' / 'export.py')['load_model']
    for name in ('ghostnet-1.0x', 'g-ghost-regnetx-200MF', 'fasternet-t0'):
        cfg = Config.fromfile(
            CONFIG.with_name(f'mask-rcnn_{name}_fpn_nuclei.py')
        )
        init_default_scope('mmdet')
        with torch.device('meta'):
            whole = MODELS.build(dict(cfg.model.backbone, fork_feat=False))
        weights = filled({k: v.shape for k, v in whole.state_dict().items()})
        torch.save(weights, tmp_path / 'a.pth')
        model, _ = load_model(cfg, str(tmp_path / 'a.pth'), 'backbone')
        assert not model.training
        for key, value in model.state_dict().items():
            assert key not in weights or value.equal(weights[key])


def test_backbone(run, checkpoint, tmp_path):
    done = run(
        *(CONFIG, checkpoint, '--what', 'backbone'),
        *('--pixels', '--opset', '17'),
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / f'{CONFIG.stem}_backbone.onnx'
    assert f'{path.name}: ' in done.stdout
    maps = load(path)(torch.zeros(1, 3, 64, 50, dtype=torch.uint8).numpy())
    assert [m.shape for m in maps] == [
        *((1, 80, 8, 8), (1, 160, 4, 4), (1, 320, 2, 2))
    ]
    assert onnx.load(path).opset_import[0].version == 17
    expected = describe(Config.fromfile(CONFIG), pixels=True)
    assert notes(path) == json.loads(json.dumps(expected))


def test_max_drop(checkpoint, tmp_path, monkeypatch, capsys):
    """Forms are refused if one AP, of boxes or of masks, falls by more."""
    scores = iter(
        dict(zip(('coco/bbox_mAP', 'coco/segm_mAP', 'coco/bbox_mAP_50'), aps))
        for aps in (
            *((0.5, 0.6, 0.9), (0.47, 0.6, 0.9), (0.5, 0.575, 0.9)),
            *((0.485, 0.59, 0.5), (0.485, 0.59, 0.5)),
        )
    )
    judged = []

    def export(model, path, metadata, images, accept, *_):
        judged.extend(accept(f'{i}.onnx') for i in range(3))
        path.write_bytes(b'')
        return ['neck.conv.weight', 'node_add']

    monkeypatch.setitem(main.__globals__, 'export', export)
    monkeypatch.setitem(main.__globals__, 'load', lambda *_: None)
    monkeypatch.setitem(main.__globals__, 'evaluate', lambda *_: next(scores))
    argv = ['export.py', CONFIG, checkpoint, '--int8', '--max-drop', '2']
    monkeypatch.setattr(sys, 'argv', list(map(str, argv)))
    monkeypatch.chdir(tmp_path)
    main()
    assert judged == [False, False, True]
    said = capsys.readouterr().out
    assert 'PyTorch: coco/bbox_mAP 0.5000 coco/segm_mAP 0.6000 ' in said
    assert 'INT8: coco/bbox_mAP 0.4700' in said
    assert 'In float32, for --max-drop: neck.conv.weight, node_add\n' in said
    assert f'{CONFIG.stem}_int8.onnx: coco/bbox_mAP 0.4850' in said


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
            '--evaluate and --max-drop need --what detector',
        ),
        (CONFIG.name, ('--max-drop', '1'), '--max-drop needs --int8'),
        (CONFIG.name, ('--opset', '26'), 'from 17 to 25 for this RetinaNet'),
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
