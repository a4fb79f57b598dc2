"""What an accelerator asks: that no tensor of a model's is left on the CPU.

On ``meta``, which computes shapes alone, as no other device is at hand.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasternet_det import FasterNet, GGhostRegNet, GhostNet, SlotResNet

CONFIGS = Path(__file__).parents[1] / 'configs'
DETECTORS = [
    'mini/mask-rcnn_fasternet-t0_fpn_nuclei.py',
    'mini/retinanet_fasternet-t0_fpn_nuclei.py',
    'fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py',
]
init_default_scope('mmdet')


class OnlyOn(TorchDispatchMode):
    """Refuses tensors on another device, but for single numbers.

    Alone, ``meta`` takes a weight or an index from the CPU, and a GPU copies
    what it takes from there, and waits.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.dim():
                assert value.device.type == self.device, (
                    f'{func} on {value.device}, expected {self.device}'
                )
        return out


def images(*shape):
    return torch.rand(*shape, device='meta', requires_grad=True)


def backbones():
    for arch in FasterNet.arch_settings:
        yield f'fasternet-{arch}', FasterNet, dict(arch=arch)
    for arch in ('002', '320'):  # with and without a stage of one block
        yield f'g-ghost-{arch}', GGhostRegNet, dict(arch=arch)
    yield 'ghostnet', GhostNet, {}
    options = dict(layer_scale_init_value=1, drop_path_rate=0.1)
    yield 'drop_path', FasterNet, options
    for conv in ('SPConv', 'TShapedConv', 'SAConv'):
        options = dict(dcn=dict(type=conv), stage_with_dcn=(True,) * 4)
        yield conv, SlotResNet, options | dict(depth=18)


@pytest.mark.parametrize('name, kind, options', backbones())
def test_backbone(name, kind, options):
    with torch.device('meta'):
        model = kind(**options)
    model.train()  # returns nothing in mmdet
    with OnlyOn('meta'):
        outs = model(images(2, 3, 64, 96))
        sum(out.sum() for out in outs).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(outs) == 4 and trained
    assert all(parameter.grad is not None for parameter in trained)
    model.eval()
    with OnlyOn('meta'), torch.no_grad():
        outs = model(images(1, 3, 70, 101))
    assert [out.shape[0] for out in outs] == [1] * 4


@pytest.mark.deploy  # before, `checkpoint` knows no meta
@pytest.mark.parametrize(
    'model',
    [
        lambda **kwargs: FasterNet(frozen_stages=1, **kwargs),
        lambda **kwargs: GGhostRegNet('002', **kwargs),
        lambda **kwargs: GhostNet(0.25, frozen_stages=1, **kwargs),
    ],
)
def test_recomputing_classifier(model):
    with torch.device('meta'):
        model = model(with_cp=True, fork_feat=False, num_classes=7).train()
    x = images(2, 3, 64, 96)
    with OnlyOn('meta'):
        out = model(x)
        out.sum().backward()
    assert out.shape == (2, 7)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


def heads_of(detector, maps):
    """What the heads compute of maps, before anything is decoded."""
    if hasattr(detector, 'bbox_head'):
        return [detector.bbox_head(maps)]
    heads, channels = detector.roi_head, maps[0].shape[1]
    regions = images(5, channels, 7, 7).to(maps[0].dtype)
    return [
        detector.rpn_head(maps),
        heads.bbox_head(regions),
        heads.mask_head(F.interpolate(regions, scale_factor=2)),
    ]


@torch.no_grad()
@pytest.mark.parametrize('config', DETECTORS)
def test_detector(config):
    with torch.device('meta'):
        detector = MODELS.build(Config.fromfile(CONFIGS / config).model)
    detector.to('meta').eval()  # as what is no parameter follows
    data = dict(inputs=[torch.zeros(3, 128, 160, dtype=torch.uint8)] * 2)
    x = detector.data_preprocessor(data)['inputs']
    assert x.is_meta and x.dtype == torch.float32
    with OnlyOn('meta'):
        maps = detector.extract_feat(x)
        heads = tree_leaves(heads_of(detector, maps))
    assert len(heads) > 2 and all(out.is_meta for out in heads)


def on_meta(optimize, module, dtype):
    """The fast form as off a CPU: optimised there, as it reads weights."""
    module.eval()  # returns nothing in mmdet
    return optimize(module, dtype).to('meta')


@pytest.mark.deploy
@torch.no_grad()
def test_fast_relatives(relative):
    from fasternet_det.deploy import optimize

    fast = on_meta(optimize, relative, torch.bfloat16)
    with OnlyOn('meta'):
        outs = fast(images(2, 3, 70, 101))
    expected = relative.to('meta')(images(2, 3, 70, 101))
    assert [out.shape for out in outs] == [out.shape for out in expected]
    assert {out.dtype for out in outs} == {torch.bfloat16}


@pytest.mark.deploy
@torch.no_grad()
@pytest.mark.parametrize('config', DETECTORS)
def test_fast_detectors(config):
    from fasternet_det.deploy import optimize

    detector = MODELS.build(Config.fromfile(CONFIGS / config).model).eval()
    fast = on_meta(optimize, detector, torch.bfloat16)
    with OnlyOn('meta'):
        maps = fast.extract_feat(images(2, 3, 128, 160))
        heads = tree_leaves(heads_of(fast, maps))
    assert len(heads) > 2 and all(out.is_meta for out in heads)


class Count(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.calls = operator, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.operator
        return func(*args, **(kwargs or {}))


@pytest.mark.deploy
@torch.no_grad()
def test_no_tiles_off_a_cpu(monkeypatch):
    """They suit a CPU's caches; a GPU would start kernel after kernel."""
    from fasternet_det.deploy import operators

    monkeypatch.setattr(operators, 'TILE', 1)
    predictor = operators.Predictor(operators.FusedConv2d(nn.Conv2d(4, 2, 1)))
    upsample = operators.FusedUpsample(nn.ConvTranspose2d(4, 3, 2, 2))
    logits, of = nn.Conv2d(3, 5, 1), torch.zeros(6, dtype=torch.long)
    for device, counts in (('cpu', (7, 6)), ('meta', (1, 1))):
        x = torch.zeros(6, 4, 7, 7, device=device)
        # Neither has a kernel of oneDNN: both call this.
        monkeypatch.setattr(operators, '_has_kernel', lambda x: False)
        for count, run in zip(
            counts,
            (
                lambda x: predictor.to(x.device)(x.bfloat16()),
                lambda x: upsample.to(x.device).logits(
                    x, logits.to(x.device), of.to(x.device)
                ),
            ),
        ):
            with Count(torch.ops.aten.convolution.default) as counter:
                assert run(x).device.type == device
            assert counter.calls == count


@pytest.mark.deploy
def test_roi_align_is_mmcvs_off_a_cpu():
    """Whose kernel for a GPU is faster than sums of rows."""
    from fasternet_det.deploy.operators import FastRoIAlign

    pool = FastRoIAlign((7, 7), 0.25, 0, aligned=True)
    x = torch.zeros(1, 8, 20, 30, device='meta', dtype=torch.bfloat16)
    message = r'roi_align_forward_impl: implementation for device meta'
    with pytest.raises(RuntimeError, match=message):
        pool(x, torch.zeros(3, 5, device='meta'))


@pytest.mark.deploy
def test_export_moves_to_the_cpu():
    from fasternet_det.deploy.export import to_onnx

    with torch.device('meta'):
        model = FasterNet('t0').eval()
    with pytest.raises(NotImplementedError, match='copy out of meta tensor'):
        to_onnx(model)


MISTAKES = [
    lambda x: x + torch.ones(x.shape[1], 1, 1),
    lambda x: torch.cat((x, torch.ones(x.shape)), 1)[:, : x.shape[1]],
    lambda x: F.conv2d(x, torch.ones(x.shape[1], 1, 1, 1), groups=x.shape[1]),
    lambda x: x.index_select(1, torch.arange(x.shape[1])),
    lambda x: F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1])),
    lambda x: (torch.ones(x.shape[1], x.shape[1]) @ x.flatten(2)).view_as(x),
    lambda x: x * torch.ones(x.shape[1]).to(x.device)[:, None, None],
]


@torch.no_grad()
@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_found(mistake):
    with torch.device('meta'):
        model = FasterNet('t0').eval()
    model.stages[2].register_forward_hook(lambda _, args, out: mistake(out))
    with pytest.raises((AssertionError, RuntimeError), match='expected'):
        with OnlyOn('meta'):
            model(images(1, 3, 64, 96))
