"""A batch of N images gives what N single images give, in every form."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fill import fill_input
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

from fasternet_det.deploy import optimize

CONFIGS = Path(__file__).parents[2] / 'configs' / 'mini'
SIDES = ((128, 96), (70, 128), (128, 128), (33, 40))
# Above all scores of the last image, and below some of each other one.
SCORE_THR = {
    'retinanet_fasternet-t0_fpn': 0.596,
    'mask-rcnn_fasternet-t0_fpn': 0.526,
}


@pytest.fixture(scope='module', params=SCORE_THR)
def detector(request, filled):
    """Seeded, with scores of all sizes and boxes near their anchors."""
    init_default_scope('mmdet')
    config = Config.fromfile(CONFIGS / f'{request.param}_nuclei.py')
    test_cfg = config.model.test_cfg
    test_cfg.get('rcnn', test_cfg).score_thr = SCORE_THR[request.param]
    model = MODELS.build(config.model).eval()
    model.load_state_dict(
        filled({k: v.shape for k, v in model.state_dict().items()})
    )
    for name, weight in model.named_parameters():
        if name.endswith(('_cls.weight', '_reg.weight')):
            weight.data *= 1e-2
    return model


@pytest.fixture(scope='module')
def exported(detector, tmp_path_factory):
    from fasternet_det.deploy.evaluate import ExportedDetector
    from fasternet_det.deploy.export import export, load

    path = tmp_path_factory.mktemp('export') / 'a.onnx'
    export(detector, path)
    return ExportedDetector(load(path), None)


@pytest.fixture(params=['eager', 'fast'])
def form(request, detector):
    if request.param == 'exported':
        return request.getfixturevalue('exported')
    return optimize(detector) if request.param == 'fast' else detector


@pytest.fixture
def batch():
    """Images of several sizes, padded by zeros, and their samples."""
    images = torch.zeros(len(SIDES), 3, 128, 128)
    samples = []
    for i, (height, width) in enumerate(SIDES):
        image = fill_input(i, (3, height, width))
        images[i, :, :height, :width] = torch.from_numpy(image)
        shape = dict(img_shape=(height, width), ori_shape=(height, width))
        samples.append(
            DetDataSample(metainfo=shape | dict(scale_factor=(1.0, 1.0)))
        )
    return images, samples


def predict(form, images, samples):
    samples = copy.deepcopy(samples)  # to which mmdet adds what it finds
    with torch.no_grad():
        return [s.pred_instances for s in form.predict(images, samples)]


def assert_equal(a, b):
    assert torch.equal(a.labels, b.labels)
    torch.testing.assert_close(a.bboxes, b.bboxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
    if 'masks' in a and len(a):
        assert (a.masks != b.masks).float().mean() < 1e-3


@pytest.mark.parametrize(
    'detector, form',
    [
        pytest.param(
            *(detector, form),
            # half a minute
            marks=[pytest.mark.configs]
            * (form == 'exported' and 'mask-rcnn' in detector),
        )
        for detector in SCORE_THR
        for form in ('eager', 'fast', 'exported')
    ],
    indirect=True,
)
def test_batch_is_its_images(form, detector, batch):
    """The last one's detections are none."""
    images, samples = batch
    is_exported = type(form).__name__ == 'ExportedDetector'
    together = predict(form, images, samples)
    for i, expected in enumerate(predict(detector, images, samples)):
        (alone,) = predict(form, images[i : i + 1], samples[i : i + 1])
        assert (len(alone) > 0) == (i < 3)
        assert_equal(alone, together[i])
        if i < 3:
            height, width = SIDES[i]
            assert together[i].bboxes[:, 0::2].max() <= width
            assert together[i].bboxes[:, 1::2].max() <= height
        # An exported graph suppresses boxes before they are clipped.
        if not is_exported or SIDES[i] == (128, 128):
            assert_equal(together[i], expected)


@pytest.mark.parametrize('form', ['fast'], indirect=True)
def test_threads(form, batch):
    """Requests of several sizes at once get what they get one by one."""
    images, samples = batch
    requests = [
        (images[i : i + 1, :, :height, :width], samples[i : i + 1])
        for height, width in ((128, 128), (96, 128), (64, 96), (128, 32))
        for i in (0, 1, 2)
    ]
    expected = [predict(form, *request)[0] for request in requests]
    assert sum(map(len, expected)) > 20
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda request: predict(form, *request), requests * 2)
        for (a,), b in zip(found, expected * 2, strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize(
    'detector', ['retinanet_fasternet-t0_fpn'], indirect=True
)
def test_broken_image_stays_by_itself(form, detector, batch):
    """mmdet's RoI extractor spreads NaN to other images: one stage alone."""
    images, samples = batch
    whole = predict(form, images, samples)
    images[1] = torch.nan
    found = predict(form, images, samples)
    for i in (0, 2, 3):
        assert_equal(found[i], whole[i])
    if form is detector:  # oneDNN's ReLU makes 0 of NaN
        assert len(found[1]) == 0 < len(whole[1])
