"""Configs of mmsegmentation build, train a step and hold their recipes."""

import json
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / 'configs' / 'segmentation'
STEPS = Path(__file__).parents[1] / 'data' / 'train_steps.py'
RELEASE = 'https://github.com/JierunChen/FasterNet/releases/download/v1.0'
FILES = dict(
    t2=f'{RELEASE}/fasternet_t2-epoch.289-val_acc1.78.8860.pth',
    s=f'{RELEASE}/fasternet_s-epoch.299-val_acc1.81.2840.pth',
)
CHANNELS = dict(
    t0=[40, 80, 160, 320], t2=[96, 192, 384, 768], s=[128, 256, 512, 1024]
)
# by what the pages print
PARAMETERS = {
    'fpn_fasternet-t2_8xb4-40k_ade20k-512x512': 17.09,
    'fpn_fasternet-s_8xb4-40k_ade20k-512x512': 33.09,
    'upernet_fasternet-t2_8xb2-160k_ade20k-512x512': 45.14,
    'upernet_fasternet-s_8xb2-160k_ade20k-512x512': 63.13,
    'fpn_fasternet-t0_nuclei': 2.66,
}


@pytest.fixture(scope='module')
def results(openmmlab):
    """What a step of each config gave, by its name."""
    paths = [CONFIGS / f'{name}.py' for name in PARAMETERS]
    said = openmmlab(STEPS, *paths, FASTERNET_IMAGENET=RELEASE)
    return dict(zip(PARAMETERS, json.loads(said.splitlines()[-1])))


def test_there_are_all():
    assert {path.stem for path in CONFIGS.glob('*.py')} == set(PARAMETERS)


@pytest.mark.parametrize('name', PARAMETERS)
def test_step(name, results):
    result = results[name]
    arch = name.split('fasternet-')[1].split('_')[0]
    assert result['type'] == 'fasternet_det.backbones.fasternet'
    assert result['in_channels'] == CHANNELS[arch] == result['out_channels']
    assert result['without_gradient'] == []
    assert result['found'] == [77, 84]  # an image of these sides
    classes = 2 if 'nuclei' in name else 150
    assert set(result['classes']) == {classes}
    assert len(result['classes']) == 1 + ('upernet' in name)
    assert round(result['parameters'] / 1e6, 2) == PARAMETERS[name]
    page = (CONFIGS / 'README.md').read_text()
    assert f'{PARAMETERS[name]:.2f}' in page


@pytest.mark.parametrize('name', [n for n in PARAMETERS if 'ade' in n])
def test_recipe(name, results):
    cfg = results[name]['cfg']
    arch = name.split('fasternet-')[1].split('_')[0]
    assert cfg['model']['backbone'] == dict(
        type='mmdet.FasterNet',
        arch=arch,
        drop_path_rate=dict(t2=0.05, s=0.15)[arch],
        init_cfg=dict(type='Pretrained', checkpoint=FILES[arch]),
    )
    assert cfg['model']['pretrained'] is None
    preprocessor = cfg['model']['data_preprocessor']
    assert preprocessor['size'] == [512, 512]
    assert preprocessor['mean'] == [123.675, 116.28, 103.53]
    assert preprocessor['bgr_to_rgb']

    is_fpn = name.startswith('fpn')
    lr, decay = (2e-4, 1e-4) if is_fpn else (6e-5, 0.01)
    wrapper = cfg['optim_wrapper']
    assert wrapper['optimizer'] == dict(
        type='AdamW', lr=lr, weight_decay=decay
    )
    assert wrapper['clip_grad'] is None
    assert ('paramwise_cfg' in wrapper) != is_fpn
    iterations, images = (40000, 4) if is_fpn else (160000, 2)
    assert cfg['train_cfg']['max_iters'] == iterations
    assert cfg['train_dataloader']['batch_size'] == images
    assert cfg['auto_scale_lr']['base_batch_size'] == 8 * images
    *warm_up, decline = cfg['param_scheduler']
    assert (decline['power'], decline['eta_min']) == (0.9 if is_fpn else 1, 0)
    assert decline['end'] == iterations
    assert [(s['start_factor'], s['end']) for s in warm_up] == (
        [] if is_fpn else [(1e-6, 1500)]
    )
