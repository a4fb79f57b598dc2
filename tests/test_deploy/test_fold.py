import copy
from pathlib import Path

import pytest
import torch
from fill import fill_input
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet_det import FasterNet
from fasternet_det.deploy import fold

CONFIGS = Path(__file__).parents[2] / 'configs'
init_default_scope('mmdet')


def image(*shape):
    return torch.from_numpy(fill_input(0, shape))


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]


def close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max()


def build(name):
    path = CONFIGS / name
    return MODELS.build(Config.fromfile(path).model).eval()


@pytest.mark.parametrize(
    'dtype, tolerance', [('double', 1e-12), ('float', 1e-5)]
)
@pytest.mark.parametrize('arch', ['t0', 't2', 's'])
def test_backbone(arch, dtype, tolerance, randomise):
    model = randomise(FasterNet(arch, layer_scale_init_value=1)).eval()
    model = getattr(model, dtype)()
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    x = getattr(image(2, 3, 70, 101), dtype)()
    close(folded(x), model(x), tolerance)
    assert norms(folded) == ['norm0', 'norm2', 'norm4', 'norm6']
    assert not any(p.requires_grad for p in folded.parameters())
    for key, value in model.state_dict().items():  # untouched
        assert torch.equal(value, before[key])


def test_classifier(randomise):
    model = randomise(FasterNet('t0', fork_feat=False)).eval().double()
    folded = fold(model)
    x = image(2, 3, 64, 64).double()
    close([folded(x)], [model(x)], 1e-12)
    assert norms(folded) == []


@pytest.mark.parametrize(
    'name, left',
    [
        ('fasternet/mask-rcnn_fasternet-t0_fpn_1x_coco.py', []),
        # Its extra level reads the last output through a padded convolution.
        (
            'fasternet/retinanet_fasternet-t0_fpn_1x_coco.py',
            ['backbone.norm6'],
        ),
        ('mini/mask-rcnn_fasternet-t0_fpn_nuclei.py', []),
        ('mini/retinanet_fasternet-t0_fpn_nuclei.py', []),
    ],
)
def test_detector(name, left, randomise):
    model = randomise(build(name)).double()
    folded = fold(model)
    assert norms(folded) == left
    x = image(2, 3, 128, 96).double()
    maps, folded_maps = model.extract_feat(x), folded.extract_feat(x)
    close(folded_maps, maps, 1e-12)
    head = 'rpn_head' if hasattr(model, 'rpn_head') else 'bbox_head'
    for a, b in zip(
        getattr(folded, head)(maps), getattr(model, head)(maps), strict=True
    ):
        close(a, b, 1e-12)


def test_output_that_the_neck_does_not_read(randomise):
    cfg = Config.fromfile(
        CONFIGS / 'fasternet/retinanet_fasternet-t0_fpn_1x_coco.py'
    ).model
    cfg.backbone.out_indices = (0, 2, 4, 6)
    cfg.neck.update(in_channels=[40, 80, 160, 320], start_level=1)
    model = randomise(MODELS.build(cfg)).eval().double()
    folded = fold(model)
    assert norms(folded) == ['backbone.norm6']
    x = image(1, 3, 64, 64).double()
    close(folded.extract_feat(x), model.extract_feat(x), 1e-12)


def test_what_cannot_be_folded():
    model = FasterNet('t0')
    with pytest.raises(ValueError, match='in train mode: call eval'):
        fold(model)
    folded = fold(model.eval())
    with pytest.raises(ValueError, match='folded already'):
        fold(folded)
    with pytest.raises(ValueError, match='backbone or layer .* got Conv2d'):
        fold(torch.nn.Conv2d(1, 1, 1))
    model.extra = torch.nn.BatchNorm2d(3).eval()
    with pytest.raises(ValueError, match='accounts for the norms extra'):
        fold(model)


@pytest.mark.parametrize('head', ['RetinaSepBNHead', 'RTMDetSepBNHead'])
def test_convolutions_that_levels_share(head, randomise):
    """Each level has own norms, so each needs a folded convolution."""
    if head == 'RTMDetSepBNHead':
        cfg = Config.fromfile(CONFIGS / 'mini/rtmdet_fasternet-t0_nuclei.py')
    else:
        cfg = Config.fromfile(
            CONFIGS / 'mini/retinanet_fasternet-t0_fpn_nuclei.py'
        )
        cfg.model.bbox_head.update(type=head, num_ins=3)
    model = randomise(MODELS.build(cfg.model)).eval().double()
    folded = fold(model)
    assert not any('head' in name for name in norms(folded))
    x = image(2, 3, 128, 96).double()
    maps = model.extract_feat(x)
    for a, b in zip(folded.bbox_head(maps), model.bbox_head(maps)):
        close(a, b, 1e-12)


@pytest.mark.parametrize(
    'norm_cfg, named', [(None, 'output 0'), (dict(type='BN'), 'neck.lateral')]
)
def test_other_convolutions_are_refused(norm_cfg, named):
    """ConvWS standardises its weight, so a folded one would be wrong."""
    cfg = Config.fromfile(
        CONFIGS / 'fasternet/mask-rcnn_fasternet-t0_fpn_1x_coco.py'
    ).model
    cfg.neck.update(conv_cfg=dict(type='ConvWS'), norm_cfg=norm_cfg)
    with pytest.raises(ValueError, match=f'{named}.* into a ConvWS2d'):
        fold(MODELS.build(cfg).eval())
