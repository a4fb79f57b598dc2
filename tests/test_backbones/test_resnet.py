import pytest
import torch
from fill import fill_input
from mmdet.models.backbones import ResNet
from torch import nn

from fasternet_det import SAConv, SlotResNet, SPConv


def image(*shape):
    return torch.from_numpy(fill_input(0, shape))


@pytest.mark.parametrize('depth', [18, 34, 50])
def test_equals_mmdets_with_an_empty_slot(depth, randomise):
    ours, theirs = randomise(SlotResNet(depth)), randomise(ResNet(depth))
    ours.eval(), theirs.eval()  # mmdet's return None
    x = image(1, 3, 64, 64)
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize(
    'dcn, layer',
    [
        (dict(type='SPConv', alpha=0.25), SPConv),
        (dict(type='SAConv'), SAConv),
    ],
)
def test_slot_takes_just_the_3x3_of_its_stages(depth, dcn, layer):
    torch.manual_seed(0)
    model = SlotResNet(
        depth, dcn=dcn, stage_with_dcn=(False, True, True, True)
    )
    names = {n for n, m in model.named_modules() if isinstance(m, layer)}
    with torch.device('meta'):
        plain = ResNet(depth)
    assert names == {
        n
        for n, m in plain.named_modules()
        if isinstance(m, nn.Conv2d)
        and m.kernel_size == (3, 3)
        and not n.startswith('layer1.')
    }
    outs = model(image(1, 3, 70, 90))
    with torch.device('meta'):
        want = plain(torch.empty(1, 3, 70, 90))
    assert [out.shape for out in outs] == [out.shape for out in want]
    assert all(out.isfinite().all() and out.std() > 1e-3 for out in outs)


def test_dcn_as_mmdets():
    """The dict of mmdet's configs/dcn, at every depth."""
    for depth, fallback, count in (
        (18, False, 4),
        (50, False, 3),
        (18, True, 0),
    ):
        model = SlotResNet(
            depth,
            dcn=dict(type='SPConv', fallback_on_stride=fallback),
            stage_with_dcn=(False, False, False, True),
        )
        assert sum(isinstance(m, SPConv) for m in model.modules()) == count
    with pytest.raises(ValueError, match='conv_cfg=.*SAConv.*dcn=.*SPConv'):
        SlotResNet(
            18,
            conv_cfg=dict(type='SAConv'),
            dcn=dict(type='SPConv'),
            stage_with_dcn=(False, False, False, True),
        )


def test_given_initialisation():
    """It leaves no room for zero_init_residual, as in mmdet."""
    init_cfg = [dict(type='Constant', val=0.5, layer='BatchNorm2d')]
    for model in (
        SlotResNet(18, init_cfg=init_cfg),
        ResNet(18, init_cfg=init_cfg),
    ):
        model.init_weights()
        assert (model.layer2[0].norm2.weight == 0.5).all()


@pytest.mark.parametrize('zero_init', [False, True])
def test_initialisation(zero_init):
    torch.manual_seed(0)
    model = SlotResNet(
        18,
        dcn=dict(type='SPConv', alpha=0.5),
        stage_with_dcn=(True,) * 4,
        zero_init_residual=zero_init,
    )
    model.init_weights()
    block = model.layer2[0]
    assert (block.norm2.weight == (0 if zero_init else 1)).all()
    assert (block.norm1.weight == 1).all()
    std = (2 / (128 * 9)) ** 0.5  # Kaiming's, by fan-out
    assert block.conv1.gwc.weight.std().item() == pytest.approx(std, rel=0.1)
