"""mmdet's own tools and APIs with our configs, on today's torch.

A shortened RetinaNet run on real images, in a user's folder outside the
repository, with the wheel installed as users install it.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.utils import digit_version
from modelindex.load_model_index import load

from fasternet_det.checkpoint import read_checkpoint

GUIDE = Path(__file__).parents[1] / 'docs' / 'fast-form.md'


@pytest.fixture(scope='session')
def history(trained):
    """What the run logged."""
    path = max(trained.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_learns(history):
    losses = [entry['loss'] for entry in history if 'loss' in entry]
    assert len(losses) >= 4 and losses[-1] < 0.7 * losses[0]
    assert history[-1]['step'] == 40
    assert history[-1]['coco/bbox_mAP'] > 0.15


def score(project, config, checkpoint, work_dir, *options):
    """Run test.py; return what it reports."""
    project(
        *(project.tools / 'test.py', config, checkpoint),
        *('--work-dir', work_dir, *options),
    )
    path = max((project.folder / work_dir).glob('2*/2*.json'))
    return json.loads(path.read_text())


APS = ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/bbox_mAP_75')


def test_test_scores_as_train_did(trained, history, project, config):
    tested = score(project, config, trained / 'iter_40.pth', 'tested')
    for key in APS:
        assert tested[key] == history[-1][key]


DTYPES = [
    ('float32', 0.001),
    pytest.param(
        *('bfloat16', 0.03),
        marks=pytest.mark.skipif(
            '_bf16' not in Path('/proc/cpuinfo').read_text(),
            reason='this CPU does not compute in bfloat16',
        ),
    ),
]


@pytest.mark.deploy
@pytest.mark.parametrize('dtype, tolerance', DTYPES)
def test_test_of_the_fast_form(
    dtype, tolerance, trained, history, project, config
):
    """bfloat16 rounds, and one nucleus of the 27 is much to so few."""
    code = GUIDE.read_text().split('# my_fast_config.py\n')[1]
    code = code.split('```')[0].replace('./my_config.py', str(config))
    fast = project.folder / f'fast_{dtype}.py'
    fast.write_text(code.replace('bfloat16', dtype))
    tested = score(project, fast, trained / 'iter_40.pth', f'tested_{dtype}')
    for key in APS:
        assert abs(tested[key] - history[-1][key]) <= tolerance


TTA = """
tta_model = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)
_load, _resize, *_ = _base_.test_pipeline
tta_pipeline = [
    _load,
    _resize,
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        *('img_id', 'img_path', 'ori_shape', 'img_shape'),
                        *('scale_factor', 'flip', 'flip_direction'),
                    ),
                )
            ],
        ],
    ),
]
"""


@pytest.fixture(scope='session')
def augmented(trained, project, config):
    """Config, and what test.py --tta reports without the hook."""
    path = project.folder / 'tta.py'
    path.write_text(f'_base_ = {str(config)!r}\n{TTA}')
    checkpoint = trained / 'iter_40.pth'
    return path, score(project, path, checkpoint, 'tested_tta', '--tta')


@pytest.mark.deploy
@pytest.mark.parametrize('dtype, tolerance', [*DTYPES, ('int8', 0.03)])
def test_augmented_test_of_the_fast_form(
    dtype, tolerance, augmented, history, trained, project
):
    """``--tta`` calls the detector by keyword, through a wrapper."""
    path, expected = augmented
    assert expected != {key: history[-1][key] for key in expected}
    fast = project.folder / f'tta_{dtype}.py'
    fast.write_text(
        f'_base_ = {str(path)!r}\n'
        "custom_imports = dict(imports=['fasternet_det.deploy'])\n"
        f'custom_hooks = [dict(type="OptimizeHook", dtype={dtype!r})]\n'
    )
    tested = score(
        *(project, fast, trained / 'iter_40.pth', f'tested_tta_{dtype}'),
        '--tta',
    )
    for key in APS:
        assert expected[key] > 0.1
        assert abs(tested[key] - expected[key]) <= tolerance


def test_resume(trained, project, config):
    work_dir = trained.parent / 'resumed'
    shutil.copytree(trained, work_dir)
    project(
        *(project.tools / 'train.py', config, '--resume'),
        *('--work-dir', work_dir, '--cfg-options', 'train_cfg.max_iters=43'),
        'default_hooks.logger.interval=1',
    )
    log = max(work_dir.glob('2*/*.log')).read_text()
    iterations = re.findall(r'Iter\(train\) \[ *(\d+)/43\]', log)
    assert iterations == ['41', '42', '43']
    steps = {
        state['step'].item()
        for state in read_checkpoint(work_dir / 'iter_43.pth')['optimizer'][
            'state'
        ].values()
    }
    assert steps == {43}  # AdamW went on where it was


def test_inference(trained, project, config):
    checkpoint = str(trained / 'iter_40.pth')
    image = str(project.folder / 'data' / 'nuclei' / 'val' / 'x384_y256.png')
    model = init_detector(str(config), checkpoint, device='cpu')
    found = inference_detector(model, image).pred_instances
    assert found.scores.max() > 0.2
    inferencer = DetInferencer(str(config), checkpoint, device='cpu')
    again = inferencer(image, no_save_vis=True)['predictions'][0]
    np.testing.assert_allclose(again['bboxes'], found.bboxes, atol=1e-3)
    np.testing.assert_allclose(again['scores'], found.scores, atol=1e-5)


@pytest.mark.deploy
def test_inference_in_the_fast_form(trained, project, config):
    from fasternet_det.deploy import optimize

    checkpoint = str(trained / 'iter_40.pth')
    image = str(project.folder / 'data' / 'nuclei' / 'val' / 'x384_y256.png')
    model = init_detector(str(config), checkpoint, device='cpu')
    found = inference_detector(model, image).pred_instances
    inferencer = DetInferencer(str(config), checkpoint, device='cpu')
    fast = inference_detector(optimize(model), image).pred_instances
    np.testing.assert_allclose(fast.bboxes, found.bboxes, atol=1e-3)
    np.testing.assert_allclose(fast.scores, found.scores, atol=1e-5)
    inferencer.model = optimize(inferencer.model)
    again = inferencer(image, no_save_vis=True)['predictions'][0]
    np.testing.assert_allclose(again['bboxes'], fast.bboxes, atol=1e-3)
    np.testing.assert_allclose(again['scores'], fast.scores, atol=1e-5)


def test_importing_us_is_what_makes_checkpoints_load(trained, project):
    load_it = (
        'from mmengine.runner.checkpoint import _load_checkpoint as load;'
        f'load({str(trained / "iter_40.pth")!r})'
    )
    if digit_version(torch.__version__) >= digit_version('2.6'):
        # from there on, torch itself refuses mmengine's files
        with pytest.raises(AssertionError, match='Weights only load failed'):
            project('-c', load_it)
    project('-c', f'import fasternet_det; {load_it}')


def test_mim_train(project, config, tmp_path):
    said = project(
        *('-m', 'mim', 'train', 'mmdet', config, '--gpus', '0'),
        *('--work-dir', tmp_path, '--cfg-options', 'train_cfg.max_iters=1'),
    )
    assert 'Training finished successfully' in said
    assert (tmp_path / 'iter_1.pth').exists()


def test_mim_reads_the_model_index():
    index = load(str(Path(__file__).parents[1] / 'model-index.yml'))
    index.build_models_with_collections()
    collections = Counter(model.in_collection for model in index.models)
    others = {
        'FasterNet, semantic segmentation': 4,  # mmsegmentation's
        'FasterNet, ImageNet': 2,  # mmpretrain's
    }
    assert others.items() <= collections.items()
    assert Counter(
        Config.fromfile(model.config).model.backbone.type
        for model in index.models
        if model.in_collection not in others
    ) == dict(
        FasterNet=18, GhostNet=3, GGhostRegNet=8, DetectoRS_ResNet=1, ResNet=1
    )
