"""What tools/predict.py finds is what mmdet finds, without mmdet."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace

import cv2
import numpy as np
import onnx
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.models.dense_heads import RTMDetInsHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from fasternet_det.deploy.evaluate import ExportedDetector
from fasternet_det.deploy.export import export
from fasternet_det.deploy.metadata import describe

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'predict.py'
CONFIGS = ROOT / 'configs'
MASK_RCNN = CONFIGS / 'mini' / 'mask-rcnn_fasternet-t0_fpn_nuclei.py'
tool = runpy.run_path(TOOL)
# With torch, and all that needs it, out of reach
ALONE = """
import runpy, sys
for name in ('torch', 'mmcv', 'mmdet', 'mmengine', 'fasternet_det'):
    sys.modules[name] = None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(scope='module')
def images(project, tmp_path_factory):
    """A folder with two tiles, one of which is not square, and a note."""
    folder = tmp_path_factory.mktemp('images')
    first, second = sorted((project.folder / 'data/nuclei/val').iterdir())[:2]
    cv2.imwrite(str(folder / 'a.png'), cv2.imread(str(first)))
    cv2.imwrite(str(folder / 'b.png'), cv2.imread(str(second))[:, 16:112])
    (folder / 'note.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def retinanet(config, trained, tmp_path_factory):
    """A trained detector, and its export in float32 for OpenVINO."""
    model = init_detector(config, str(trained / 'iter_40.pth'), device='cpu')
    path = tmp_path_factory.mktemp('retinanet') / 'a.xml'
    export(model, path, describe(model.cfg, model.dataset_meta['classes']))
    return model, path


@pytest.fixture(scope='module')
def mask_rcnn(filled, tmp_path_factory):
    """A detector with masks, and its export of pixels for ONNX Runtime."""
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(MASK_RCNN).model)
    weights = filled({k: v.shape for k, v in model.state_dict().items()})
    for name in weights:
        if name.endswith(('_cls.weight', '_reg.weight')):
            weights[name] *= 1e-2
    path = tmp_path_factory.mktemp('mask_rcnn') / 'a.onnx'
    checkpoint = path.with_suffix('.pth')
    meta = dict(dataset_meta=dict(classes=('nucleus',)))
    torch.save(dict(state_dict=weights, meta=meta), checkpoint)
    model = init_detector(str(MASK_RCNN), str(checkpoint), device='cpu')
    notes = describe(model.cfg, ('nucleus',), pixels=True)
    export(model, path, notes, preprocessor=model.data_preprocessor)
    return model, path


def compare(folder, model, images):
    """Compare pictures and results.json with what mmdet detects."""
    results = json.loads((folder / 'results.json').read_text())
    for i, path in enumerate(sorted(images.glob('*.png'))):
        expected = inference_detector(model, str(path)).pred_instances
        found = [r for r in results if r['image_id'] == i]
        assert len(found) == len(expected) > 5
        assert {r['file_name'] for r in found} == {path.name}
        assert {r['category'] for r in found} == {'nucleus'}
        assert [r['category_id'] for r in found] == expected.labels.tolist()
        boxes = np.array([r['bbox'] for r in found])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, expected.bboxes, rtol=0, atol=1e-3)
        scores = [r['score'] for r in found]
        np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=1e-4)
        assert ('masks' in expected) == ('segmentation' in found[0])
        for result, mask in zip(found, expected.get('masks', [])):
            code = result['segmentation']
            code = coco_mask.frPyObjects(code, *code['size'])
            assert (coco_mask.decode(code) != mask.numpy()).mean() < 1e-3
        picture = cv2.imread(str(folder / path.name))
        drawn = picture != cv2.imread(str(path))
        assert drawn.any() == (expected.scores >= 0.3).any()
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize('name', ['retinanet', 'mask_rcnn'])
def test_exported(name, request, images, tmp_path):
    model, path = request.getfixturevalue(name)
    done = subprocess.run(
        [sys.executable, '-c', ALONE, TOOL, path, images, '--out', 'found'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f'[{"#" * 30}] 2/2' in done.stderr
    assert 'detections in 2 images: found' in done.stdout
    compare(tmp_path / 'found', model, images)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, args)])
    tool['main']()


def test_config_and_checkpoint(mask_rcnn, images, tmp_path, monkeypatch):
    model, path = mask_rcnn
    run(
        monkeypatch,
        *(MASK_RCNN, images, '--checkpoint', path.with_suffix('.pth')),
        *('--out', tmp_path / 'a' / 'found', '--score-thr', '0.3'),
    )
    compare(tmp_path / 'a' / 'found', model, images)


def test_padded_images(mask_rcnn, images, tmp_path, monkeypatch):
    """A graph of pixels pads them, and knows where they end."""
    (tmp_path / 'images').mkdir()
    for path in images.glob('*.png'):
        image = cv2.imread(str(path))[:101, :90]
        cv2.imwrite(str(tmp_path / 'images' / path.name), image)
    model, path = mask_rcnn
    out = tmp_path / 'found'
    run(monkeypatch, path, tmp_path / 'images', '--out', out)
    compare(out, model, tmp_path / 'images')


def test_pictures_that_cannot_be_written(
    retinanet, images, tmp_path, monkeypatch
):
    """As on a full disk; what was found is kept."""
    out = tmp_path / 'found'
    monkeypatch.setattr(cv2, 'imwrite', lambda *_: False)
    with pytest.raises(
        SystemExit, match='2 images failed:.*(\n.*be written)+'
    ):
        run(monkeypatch, retinanet[1], images, '--out', out)
    assert len(json.loads((out / 'results.json').read_text())) > 10


def test_checkpoints_are_read_safely(images, tmp_path, monkeypatch):
    torch.save(dict(state_dict={}, harm=Path('harm')), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match='written: .* could execute code'):
        run(
            monkeypatch,
            *(MASK_RCNN, images, '--checkpoint', tmp_path / 'a.pth'),
            *('--out', tmp_path / 'found'),
        )
    assert not (tmp_path / 'found').exists()


@pytest.mark.parametrize('shape', [(60, 101), (233, 97)])
@pytest.mark.parametrize(
    'name, channels, dtype',
    [
        ('mini/retinanet_fasternet-t0_fpn_nuclei.py', 3, np.uint8),
        ('mini/retinanet_fasternet-t0_fpn_nuclei-16bit.py', 1, np.uint16),
        ('mini/retinanet_fasternet-t0_fpn_nuclei-4channel.py', 4, np.uint8),
        ('fasternet/mask-rcnn_fasternet-s_fpn_1x_coco.py', 3, np.uint8),
        ('fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py', 3, np.uint8),
    ],
)
def test_same_pixels_as_mmdet(name, channels, dtype, shape, tmp_path):
    config = Config.fromfile(CONFIGS / name)
    init_default_scope('mmdet')
    size = (*shape, channels) if channels > 1 else shape
    image = np.random.default_rng(0).integers(0, 256, size).astype(dtype)
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    data = dict(img_path=str(tmp_path / 'a.png'), img_id=0)
    data = Compose(get_test_pipeline_cfg(config))(data)
    resized, sample = data['inputs'], data['data_samples']
    preprocess = MODELS.build(config.model.data_preprocessor)
    expected = preprocess(dict(inputs=[resized], data_samples=[sample]))
    image = cv2.imread(str(tmp_path / 'a.png'), cv2.IMREAD_UNCHANGED)
    for pixels in (False, True)[: 1 + (resized.dtype == torch.uint8)]:
        notes = json.loads(json.dumps(describe(config, pixels=pixels)))
        found, factors, limits = tool['prepare'](image, notes)
        inputs = resized[None] if pixels else expected['inputs']
        assert found.dtype == inputs.numpy().dtype
        assert np.array_equal(found, inputs)
        assert factors == sample.scale_factor
        assert limits == sample.img_shape[::-1]


@pytest.fixture
def bare(tmp_path):
    """An .onnx that another wrote."""
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]>'
        'g (float[N] input) => (float[N] y) { y = Relu (input) }'
    )
    onnx.save(graph, tmp_path / 'bare.onnx')


@pytest.mark.parametrize(
    'args, message',
    [
        (('bare.onnx', 'a.png'), 'bare.onnx does not say how its images are'),
        (('no.onnx', 'a.png'), 'there is no file no.onnx'),
        (('text.onnx', 'a.png'), 'cannot open text.onnx: '),
        (('bare.onnx', 'no.png'), 'there is no file no.png'),
        (('bare.onnx', 'empty'), 'empty is no image, nor a folder of images'),
        (('bare.onnx', 'a.png', 'a.png'), 'two images are called a.png'),
        (('bare.onnx', 'a.png', '--out', 'empty'), 'empty exists: name'),
        (('a.py', 'a.png'), 'a config needs --checkpoint, other models'),
        (
            ('bare.onnx', 'a.png', '--checkpoint', 'a.pth'),
            'a config needs --checkpoint, other models take none',
        ),
        (('a.pt', 'a.png'), 'a.pt is no .onnx, .xml or config'),
    ],
)
def test_errors(args, message, bare, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    Path('text.onnx').write_text('no graph')
    cv2.imwrite('a.png', np.zeros((8, 8, 3), np.uint8))
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, *args)
    assert message in f'{raised.value.code} {capsys.readouterr().err}'
    assert set(tmp_path.iterdir()) == before


def test_errors_of_a_runtime_name_the_image(bare, tmp_path, monkeypatch):
    """And end nothing: ONNX Runtime's have no type in common."""
    proto = onnx.load(tmp_path / 'bare.onnx')  # it takes no images
    config = Config.fromfile(MASK_RCNN)
    notes = {k: json.dumps(v) for k, v in describe(config).items()}
    onnx.helper.set_model_props(proto, notes)
    onnx.save(proto, tmp_path / 'a.onnx')
    for name in ('a.png', 'b.png'):
        cv2.imwrite(str(tmp_path / name), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(SystemExit) as raised:
        run(
            monkeypatch,
            *(tmp_path / 'a.onnx', tmp_path, '--out', tmp_path / 'found'),
        )
    first, *lines = str(raised.value).splitlines()
    assert first == '2 images failed:'
    assert f'  {tmp_path}/a.png: ' in lines[0] and 'rank' in lines[0]
    assert json.loads((tmp_path / 'found/results.json').read_text()) == []


@pytest.mark.parametrize('ori_shape', [(60, 101), (427, 320), (90, 50)])
def test_masks_over_images(ori_shape):
    """As RTMDet-Ins: by the tool, by an ExportedDetector, and by mmdet."""
    height, width = ori_shape
    factor = min(160 / height, 160 / width)
    resized = int(height * factor + 0.5), int(width * factor + 0.5)
    factors = resized[1] / width, resized[0] / height
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 2, 20, 20)).astype(np.float32)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(160, 160), ori_shape=ori_shape, scale_factor=factors
        )
    )
    dets = np.float32([[[1, 2, 90, 80, 0.9], [0, 0, 0, 0, 0]]])
    outputs = [dets, np.array([[0, -1]]), logits]
    detector = ExportedDetector(
        lambda _: outputs, None, dict(mask_threshold=0.4, mask_grid='image')
    )
    (found,) = detector.predict(torch.zeros(1, 3, 160, 160), [sample])
    found = found.pred_instances
    alone = tool['unpad'](logits[0, 0], (160, 160), factors, ori_shape) > 0.4

    head = RTMDetInsHead.__new__(RTMDetInsHead)
    torch.nn.Module.__init__(head)
    head.prior_generator = Namespace(strides=[(8, 8)])
    head._mask_predict_by_feat_single = lambda *_: torch.from_numpy(
        logits[0, :1]
    )
    results = InstanceData(
        bboxes=torch.from_numpy(dets[0, :1, :4]),
        scores=torch.ones(1),
        labels=torch.zeros(1, dtype=torch.int64),
        kernels=torch.zeros(1),
        priors=torch.zeros(1),
    )
    cfg = ConfigDict(
        nms=dict(type='nms', iou_threshold=0.6),
        max_per_img=100,
        mask_thr_binary=0.4,
    )
    expected = head._bbox_mask_post_process(
        results, None, cfg, rescale=True, img_meta=sample.metainfo
    )
    assert torch.equal(found.masks, expected.masks)
    torch.testing.assert_close(found.bboxes, expected.bboxes)
    assert 0.2 < alone.mean() < 0.9
    assert (alone != expected.masks[0].numpy()).mean() < 1e-3


@pytest.mark.parametrize('clips', [True, False, None])
def test_boxes_beyond_the_image(clips, tmp_path, monkeypatch):
    """By the tool and by an ExportedDetector: YOLOX clips none, and files of
    before do not say.
    """
    told = {} if clips is None else dict(clip_border=clips)
    notes = dict(
        **told,
        scale=None,
        pad_size=None,
        dtype='uint8',
        color_type='color',
        to_float32=False,
        mask_grid=None,
        classes=['a'],
    )
    outputs = [np.float32([[[1, 2, 70, 45, 0.9]]]), np.array([[0]])]
    path = tmp_path / 'a.png'
    cv2.imwrite(str(path), np.zeros((40, 60, 3), np.uint8))
    load = tool['load_exported']
    texts = {key: json.dumps(value) for key, value in notes.items()}
    session = (lambda images: outputs, texts)
    monkeypatch.setitem(load.__globals__, 'open_onnx', lambda path: session)
    predict, *_ = load(tmp_path / 'a.onnx')
    expected = [[1, 2, 70, 45] if clips is False else [1, 2, 60, 40]]
    assert predict(path)[0].tolist() == expected
    detector = ExportedDetector(session[0], None, told)
    sample = DetDataSample(metainfo=dict(img_shape=(40, 60)))
    images = torch.zeros(1, 3, 64, 64)
    (found,) = detector.predict(images, [sample], rescale=False)
    assert found.pred_instances.bboxes.tolist() == expected


@pytest.mark.parametrize('first', [0, 1])
def test_run_lengths(first):
    mask = np.random.default_rng(0).random((7, 5)) > 0.5
    mask[0, 0] = first
    code = tool['run_lengths'](mask)
    decoded = coco_mask.decode(coco_mask.frPyObjects(code, 7, 5))
    assert np.array_equal(decoded, mask)
