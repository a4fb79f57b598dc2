"""Images of 16 bits and of four channels, from the file to the export."""

import copy
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.models import DetDataPreprocessor
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope

from fasternet_det.data_preprocessor import MultiChannelDataPreprocessor

ROOT = Path(__file__).parents[2]
CHANNELS = {'16bit': 1, '4channel': 4}


@pytest.fixture(scope='module', params=CHANNELS)
def kind(request):
    return request.param


@pytest.fixture(scope='module')
def config(kind, project):
    name = f'retinanet_fasternet-t0_fpn_nuclei-{kind}.py'
    return project.configs / 'mini' / name


@pytest.fixture(scope='module')
def trained(kind, config, project):
    """Convert, train for some iterations and test, by the users' commands."""
    folder = f'data/nuclei-{kind}'
    project('-m', 'fasternet_det.datasets.nuclei', folder, '--kind', kind)
    project(
        *(project.tools / 'train.py', config, '--cfg-options'),
        *('train_cfg.max_iters=12', 'train_cfg.val_interval=12'),
        *('param_scheduler.0.end=2', 'param_scheduler.1.begin=2'),
        *('param_scheduler.1.end=12', 'default_hooks.logger.interval=1'),
        *('train_dataloader.batch_size=4', 'model.test_cfg.score_thr=0.0'),
    )
    return project.folder / 'work_dirs' / config.stem


@pytest.fixture(scope='module')
def model(config, trained, project):
    """The trained detector, beside the data."""
    cfg = Config.fromfile(config)
    cfg.model.test_cfg.score_thr = 0.0
    return init_detector(cfg, str(trained / 'iter_12.pth'), device='cpu')


@pytest.fixture(scope='module')
def image(kind, trained, project):
    folder = project.folder / 'data' / f'nuclei-{kind}' / 'val'
    return str(folder / 'x384_y256.png')


def test_pipeline_keeps_bits_and_channels(kind, config, image, project):
    cfg = Config.fromfile(config)
    init_default_scope('mmdet')
    pixels = cv2.imread(image, cv2.IMREAD_UNCHANGED).reshape(128, 128, -1)
    assert pixels.shape[2] == CHANNELS[kind]
    assert (pixels.max() > 255) == (kind == '16bit')
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    dataset = cfg.val_dataloader.dataset
    dataset.data_root = str(project.folder / dataset.data_root)
    dataset.pipeline[1].scale = (128, 128)
    batch = pseudo_collate([DATASETS.build(dataset)[2]])
    assert batch['data_samples'][0].img_path == image
    inputs = preprocess(batch)['inputs']
    want = (pixels - np.array(preprocess.mean).ravel()) / np.array(
        preprocess.std
    ).ravel()
    np.testing.assert_allclose(
        inputs[0].permute(1, 2, 0), want, rtol=1e-5, atol=1e-5
    )
    # and the config's statistics are those of the training tiles
    tiles = np.stack(
        [
            cv2.imread(str(p), cv2.IMREAD_UNCHANGED)
            for p in (Path(image).parents[1] / 'train').iterdir()
        ]
    ).reshape(-1, CHANNELS[kind])
    np.testing.assert_allclose(
        preprocess.mean.ravel(), tiles.mean(0), rtol=0.02
    )
    np.testing.assert_allclose(preprocess.std.ravel(), tiles.std(0), rtol=0.03)


def test_trains_and_evaluates(trained, kind):
    path = max(trained.glob('*/vis_data/scalars.json'))
    *steps, scores = map(json.loads, path.read_text().splitlines())
    losses = [step['loss'] for step in steps]
    assert len(losses) == 12 and np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.8 * losses[0], losses
    assert 0 <= scores['coco/bbox_mAP'] <= 1
    saved = torch.load(trained / 'iter_12.pth', weights_only=False)
    stem = saved['state_dict']['backbone.patch_embed.proj.weight']
    assert stem.shape[1] == CHANNELS[kind]


def test_inference_and_pictures(model, config, image, trained, tmp_path):
    """Of files and of arrays; pictures show the file as OpenCV reads it."""
    found = inference_detector(model, image).pred_instances
    assert len(found) > 0
    pixels = cv2.imread(image, cv2.IMREAD_UNCHANGED)
    # mmdet leaves the config changed, for arrays only
    again = inference_detector(copy.deepcopy(model), pixels).pred_instances
    assert torch.equal(again.bboxes, found.bboxes)
    assert torch.equal(again.scores, found.scores)
    inferencer = DetInferencer(
        str(config), str(trained / 'iter_12.pth'), device='cpu'
    )
    inferencer.model.test_cfg.score_thr = 0.0
    inferencer.model.bbox_head.test_cfg.score_thr = 0.0
    (drawn,) = inferencer(image, out_dir=str(tmp_path))['predictions']
    np.testing.assert_allclose(drawn['bboxes'], found.bboxes, atol=1e-3)
    picture = cv2.imread(str(tmp_path / 'vis' / Path(image).name))
    assert picture.shape == (128, 128, 3)


@pytest.mark.deploy
def test_fast_form(model, image):
    from fasternet_det.deploy import optimize

    found = inference_detector(model, image).pred_instances
    fast = inference_detector(optimize(model), image).pred_instances
    np.testing.assert_allclose(fast.scores, found.scores, atol=1e-5)
    np.testing.assert_allclose(fast.bboxes[:20], found.bboxes[:20], atol=1e-2)


@pytest.mark.deploy
def test_export(model, image, kind, tmp_path):
    from fasternet_det.deploy.evaluate import ExportedDetector
    from fasternet_det.deploy.export import export, load

    export(model, tmp_path / 'model.onnx')
    exported = ExportedDetector(
        load(tmp_path / 'model.onnx'), model.cfg.model.data_preprocessor
    ).eval()
    exported.cfg = model.cfg
    found = inference_detector(model, image).pred_instances
    again = inference_detector(exported, image).pred_instances
    count = min(len(found), len(again), 20)
    assert count > 0
    np.testing.assert_allclose(
        again.scores[:count], found.scores[:count], atol=1e-5
    )


def preprocessor(**kwargs):
    cfg = dict(mean=[1.0, 2, 3, 4], std=[1.0, 2, 4, 8], pad_size_divisor=32)
    return MultiChannelDataPreprocessor(**(cfg | kwargs))


def test_preprocessor_equals_mmdets_on_three_channels():
    cfg = dict(mean=[1.0, 2, 3], std=[4.0, 5, 6], bgr_to_rgb=True)
    images = [torch.rand(3, 40, 30) * 255, torch.rand(3, 33, 64) * 255]
    ours, mmdets = (
        kind(pad_size_divisor=32, **cfg)(dict(inputs=list(images)))['inputs']
        for kind in (MultiChannelDataPreprocessor, DetDataPreprocessor)
    )
    assert ours.shape == (2, 3, 64, 64) and torch.equal(ours, mmdets)


def test_preprocessor_by_hand_and_its_copies():
    image = torch.rand(4, 33, 20) * 1000
    module = preprocessor()
    assert not module.state_dict()  # as mmdet's: no entry of checkpoints
    for made in (
        module,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
    ):
        inputs = made(dict(inputs=[image]), training=True)['inputs']
        assert inputs.shape == (1, 4, 64, 32)
        for i in range(4):
            assert torch.equal(
                inputs[0, i, :33, :20], (image[i] - (i + 1)) / 2**i
            )
        assert not inputs[..., 33:, :].any() and not inputs[..., 20:].any()
    stacked = module(dict(inputs=image[None].short()))['inputs']
    assert stacked.shape == (1, 4, 64, 32) and stacked.dtype == torch.float32


@pytest.mark.parametrize(
    'kwargs, named',
    [
        (dict(mean=[]), r'got mean=\[\] and std=.* one mean and one positive'),
        (dict(std=[1.0]), r'std=\[1.0\], expected one mean and one positive'),
        (dict(std=[1.0, 2, 0, 4]), 'one positive std for each channel'),
        (dict(bgr_to_rgb=True), '4 channels are neither BGR nor RGB'),
        (dict(rgb_to_bgr=True), '4 channels are neither BGR nor RGB'),
        (
            dict(mean=[1.0], std=[1.0], bgr_to_rgb=True),
            '1 channels are neither BGR nor RGB: set bgr_to_rgb=False',
        ),
    ],
)
def test_preprocessor_refuses(kwargs, named):
    with pytest.raises(ValueError, match=named):
        preprocessor(**kwargs)


@pytest.mark.parametrize('stacked', [False, True])
def test_preprocessor_refuses_other_images(stacked):
    """mmdet's would broadcast one channel to four, unasked."""
    image = torch.rand(1, 32, 32)
    inputs = image[None] if stacked else [torch.rand(4, 32, 32), image]
    with pytest.raises(ValueError, match=r'\(1, 32, 32\) for 4 means: expec'):
        preprocessor()(dict(inputs=inputs))
