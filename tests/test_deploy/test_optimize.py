import copy
import pickle
import platform
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from fill import fill_array, fill_input
from mmcv.cnn import ConvModule
from mmcv.ops import ModulatedDeformConv2dPack, RoIAlign
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from fasternet_det import FasterNet, SAConv, TShapedConv
from fasternet_det.backbones.g_ghost_regnet import Bottleneck
from fasternet_det.backbones.ghostnet import GhostBottleneck
from fasternet_det.deploy import fold, optimize
from fasternet_det.deploy.blocks import FastGhostBottleneck, FastTShapedConv
from fasternet_det.deploy.fold_layers import FoldedSAConv
from fasternet_det.deploy.operators import (
    KEPT_LAYOUTS,
    FastBottleneck,
    FastRoIAlign,
    FastRoIExtractor,
    FusedConv2d,
    FusedLinear,
    FusedUpsample,
    InPlaceBlock,
    kernel_dtypes,
)

CONFIGS = Path(__file__).parents[2] / 'configs'
init_default_scope('mmdet')
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def image(*shape):
    return torch.from_numpy(fill_input(0, shape))


def random(name, *shape):
    """Standard normal values."""
    return torch.from_numpy(fill_array(f'{name}.weight', shape)) * 10


def close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max()


def build(name):
    return MODELS.build(Config.fromfile(CONFIGS / name).model)


def predict(model, x):
    height, width = x.shape[2:]
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(height, width),
            ori_shape=(height, width),
            pad_shape=(height, width),
            batch_input_shape=(height, width),
            scale_factor=(1.0, 1.0),
        )
    )
    with torch.no_grad():
        samples = model.predict(x, [copy.deepcopy(sample) for _ in x])
    return [s.pred_instances for s in samples]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('arch', ['t0', 't2', 's'])
def test_backbone(arch, layout, randomise):
    model = randomise(FasterNet(arch, layer_scale_init_value=1)).eval()
    before = copy.deepcopy(model.state_dict())
    fast = optimize(model, memory_format=layout)
    # Odd sizes, a batch, and the first size again: weights are kept packed.
    for shape in ((2, 3, 70, 101), (1, 3, 64, 96), (2, 3, 70, 101)):
        close(fast(image(*shape)), model(image(*shape)), 1e-5)
    for key, value in model.state_dict().items():  # untouched
        assert torch.equal(value, before[key])


def test_backbone_in_bfloat16(randomise):
    model = randomise(FasterNet('t2')).eval()
    x = image(1, 3, 64, 96)
    maps = optimize(model, torch.bfloat16)(x)
    assert {m.dtype for m in maps} == {torch.bfloat16}
    close([m.float() for m in maps], model(x), 0.05)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_relatives(relative, layout):
    fast = optimize(relative, memory_format=layout)
    found = Counter(type(m) for m in fast.modules())
    before = Counter(type(m) for m in relative.modules())
    assert found[FastBottleneck] == before[Bottleneck]
    assert found[FastGhostBottleneck] == before[GhostBottleneck]
    assert found[FastTShapedConv] == before[TShapedConv]
    assert found[FoldedSAConv] == before[SAConv]
    assert repr(fast)
    assert found[SAConv] == found[Bottleneck] == found[nn.Conv2d] == 0
    for shape in ((2, 3, 70, 101), (1, 3, 64, 96), (2, 3, 70, 101)):
        close(fast(image(*shape)), relative(image(*shape)), 1e-5)


def test_relatives_in_bfloat16(relative):
    x = image(2, 3, 64, 96)
    maps = optimize(relative, torch.bfloat16)(x)
    assert {m.dtype for m in maps} == {torch.bfloat16}
    # torch's plain operators round more often than oneDNN's.
    close([m.float() for m in maps], relative(x), 0.1)


@torch.no_grad()
def test_deformable_layer_in_channels_last(tamed):
    """Which mmcv's op reads as (N, C, H, W)."""
    model = ConvModule(
        *(6, 8, 3),
        padding=1,
        conv_cfg=dict(type='SAConv', use_deform=True),
        norm_cfg=dict(type='BN'),
    )
    tamed(model)
    x = random('x', 2, 6, 9, 12)
    close([optimize(model)(x)], [model(x)], 1e-5)
    low = optimize(model, torch.bfloat16)(x)
    assert low.dtype == torch.bfloat16
    close([low.float()], [model(x.bfloat16().float())], 2**-8)


@torch.no_grad()
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_block_is_exact(layout, batch, randomise, monkeypatch):
    """In float64, and in tiles of one row: 1e-12.

    The first channels of a single image are a view of it.
    """
    monkeypatch.setattr('fasternet_det.deploy.operators.TILE', 1)
    for arch in ('t0', 's'):
        model = randomise(FasterNet(arch, layer_scale_init_value=1))
        model = fold(model.eval().double())
        stage = model.stages[2]
        x = random('x', batch, model.out_channels[1], 7, 5).double()
        expected = stage(x)
        for block in stage.blocks:
            x = x.contiguous(memory_format=layout)
            out = InPlaceBlock(block)(x)
            assert out.data_ptr() == x.data_ptr()
        close([x], [expected], 1e-12)


@torch.no_grad()
def test_small_maps_are_not_cut():
    block = InPlaceBlock(fold(FasterNet('t0').eval()).stages[0].blocks[0])
    x = random('x', 2, 40, 4, 4).to(memory_format=torch.channels_last)
    ((tile,),) = block._tiles(x)
    assert tile is x


def test_copies(randomise):
    """Packed weights are opaque to pickle; a copy packs its own."""
    model = randomise(FasterNet('t0')).eval()
    fast = optimize(model)
    x = image(1, 3, 64, 64)
    expected = fast(x)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        optimize(model).bfloat16().float(),
    ):
        close(other(x), expected, 1e-2)
    other = FasterNet('t0').eval()  # other weights, after the first forward
    fast.load_state_dict(optimize(other).state_dict())
    close(fast(x), other(x), 1e-5)


@pytest.mark.parametrize(
    'act', ['LeakyReLU', dict(type='GELU', approximate='tanh')]
)
def test_other_activations(act, randomise):
    act_cfg = act if isinstance(act, dict) else dict(type=act)
    model = randomise(FasterNet('t0', act_cfg=act_cfg)).eval()
    x = image(1, 3, 64, 64)
    close(optimize(model)(x), model(x), 1e-5)


@pytest.mark.parametrize(
    'config, head',
    [
        ('mini/mask-rcnn_fasternet-t0_fpn_nuclei.py', 'rpn_head'),
        ('mini/retinanet_fasternet-t0_fpn_nuclei.py', 'bbox_head'),  # of 3x3
    ],
)
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.01)]
)
def test_tiles(dtype, tolerance, config, head, randomise, monkeypatch):
    """Large maps are computed in tiles, unequal ones too."""
    fast = optimize(randomise(build(config)).eval(), dtype)
    head = getattr(fast, head)
    x = image(2, 3, 128, 96)
    maps = fast.extract_feat(x)
    outs = head(maps)
    monkeypatch.setattr('fasternet_det.deploy.operators.TILE', 2**14)
    close(
        *([m.float() for m in ms] for ms in (fast.extract_feat(x), maps)),
        tolerance,
    )
    for a, b in zip(head(maps), outs, strict=True):
        close(a, b, tolerance)


@pytest.fixture
def apart(monkeypatch):
    """Whatever the CPU, each size has a layout of its own."""
    shared = 'fasternet_det.deploy.operators._shared'
    monkeypatch.setattr(shared, lambda packed, kept: packed)


@torch.no_grad()
def test_packed_weights_are_few(apart):
    conv = FusedConv2d(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    for size in range(4, 4 + 2 * KEPT_LAYOUTS):
        x = random('x', 1, 3, size, size)
        expected = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
        close([conv(x)], [expected.relu()], 1e-5)
    assert len(conv._packed[2]) == KEPT_LAYOUTS
    assert conv(random('x', 0, 3, 5, 5)).shape == (0, 8, 5, 5)


@torch.no_grad()
@pytest.mark.parametrize('kernel', [1, 3])
def test_sizes_share_packed_weights(kernel, monkeypatch):
    """Where the CPU wants one layout: of 1x1 convolutions nearly always."""
    conv = FusedConv2d(nn.Conv2d(16, 32, kernel, padding=kernel // 2))
    images = [random('x', 1, 16, *s) for s in ((8, 8), (16, 8), (8, 9))]
    for x in images:
        expected = nn.functional.conv2d(
            x, conv.weight, conv.bias, padding=kernel // 2
        )
        close([conv(x)], [expected], 1e-5)
    layouts = {
        bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
        for packed in (conv._pack(x.shape) for x in images)
    }
    kept = conv._packed[2]
    assert len(kept) == 3
    assert len(set(map(id, kept.values()))) == len(layouts)
    monkeypatch.setattr(conv, '_pack', None)  # nor is any packed again
    for x in images:
        conv(x)


@torch.no_grad()
def test_shapes_are_few(monkeypatch):
    monkeypatch.setattr('fasternet_det.deploy.operators.KEPT_SHAPES', 3)
    conv = FusedConv2d(nn.Conv2d(16, 32, 1))
    for size in range(4, 9):
        conv(random('x', 1, 16, size, size))
    assert list(conv._packed[2]) == [(6, 6), (7, 7), (8, 8)]


def test_threads_share_packed_weights(monkeypatch):
    """They stay few, though all threads pack at once."""
    conv = FusedConv2d(nn.Conv2d(3, 8, 3)).requires_grad_(False)
    images = [random('x', 1, 3, size, size) for size in range(4, 12)]
    expected = [conv(x) for x in images]
    conv = pickle.loads(pickle.dumps(conv))  # without what is packed
    barrier, pack = Barrier(len(images), timeout=60), conv._pack

    def pack_at_once(shape):
        barrier.wait()
        return pack(shape)

    monkeypatch.setattr(conv, '_pack', pack_at_once)
    monkeypatch.setattr('fasternet_det.deploy.operators.KEPT_SHAPES', 3)
    with ThreadPoolExecutor(len(images)) as pool:
        assert all(map(torch.equal, pool.map(conv, images), expected))
    assert 0 < len(conv._packed[2]) <= 3


@pytest.mark.parametrize('bias', [True, False])
def test_upsample(bias):
    deconv = nn.ConvTranspose2d(6, 4, 2, stride=2, bias=bias)
    x = random('x', 2, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        close([FusedUpsample(deconv)(x)], [deconv(x)], 1e-5)


@pytest.mark.parametrize('size', [7, 14, (7, 5)])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('tile', [1, 3 * 4 * 6 * 49, 2**23])
def test_roi_align(tile, size, aligned, monkeypatch):
    """As mmcv's, also beyond the edges, for empty and for long regions.

    One region at a time, some, or all.
    """
    monkeypatch.setattr('fasternet_det.deploy.operators.TILE', tile)
    kwargs = dict(output_size=size, spatial_scale=0.25, aligned=aligned)
    x = random('x', 2, 6, 20, 30)
    boxes = [
        [8, 8, 40, 30],
        [-50, -30, 20, 20],
        [100, 60, 150, 120],
        [-90, -90, -80, -80],
        [30, 30, 30, 30],
        [0, 0, 119, 79],
        [3, 10, 118, 11],
        [20, 3, 21.5, 77],
    ]
    rois = torch.tensor([[i % 2, *b] for i, b in enumerate(boxes)]).float()
    expected = RoIAlign(**kwargs)(x, rois)
    fast = FastRoIAlign(**kwargs)
    for layout in LAYOUTS:
        close(
            [fast(x.contiguous(memory_format=layout), rois)], [expected], 1e-5
        )
    low = x.bfloat16()  # pooled in float32, rounded at the end
    expected = RoIAlign(**kwargs)(low.float(), rois).bfloat16()
    close([fast(low, rois).float()], [expected.float()], 2**-8)


@torch.no_grad()
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    'name',
    [
        'mini/mask-rcnn_fasternet-t0_fpn_nuclei.py',
        'mini/retinanet_fasternet-t0_fpn_nuclei.py',
        'mini/rtmdet_fasternet-t0_nuclei.py',
        'fasternet/retinanet_fasternet-t0_fpn_1x_coco.py',
    ],
)
def test_heads(name, layout, randomise):
    model = randomise(build(name)).eval()
    fast = optimize(model, memory_format=layout)
    x = image(2, 3, 128, 96)
    maps, fast_maps = model.extract_feat(x), fast.extract_feat(x)
    close(fast_maps, maps, 1e-5)
    if not hasattr(model, 'roi_head'):
        found, expected = fast.bbox_head(maps), model.bbox_head(maps)
    else:
        found, expected = fast.rpn_head(maps), model.rpn_head(maps)
        rois = torch.tensor([[0.0, 3, 5, 90, 70], [1, 10, 20, 30, 40]])
        for kind in ('bbox', 'mask'):
            a, b = (
                getattr(m.roi_head, f'_{kind}_forward')(maps, rois)
                for m in (fast, model)
            )
            for key, value in b.items():
                if value is not None:
                    close([a[key]], [value], 1e-5)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_precision_of_boxes(dtype, randomise):
    """What boxes are decoded from is float32, and normalisation too."""
    model = build('mini/mask-rcnn_fasternet-t0_fpn_nuclei.py')
    fast = optimize(randomise(model).eval(), dtype)
    assert fast.data_preprocessor.mean.dtype == torch.float32
    maps = fast.extract_feat(image(1, 3, 64, 64))
    assert {m.dtype for m in maps} == {dtype}
    rois = torch.tensor([[0.0, 3, 5, 60, 50]])
    regions = fast.roi_head.bbox_roi_extractor(maps, rois)
    assert regions.dtype == dtype
    for out in (*fast.rpn_head(maps), fast.roi_head.bbox_head(regions)):
        assert {o.dtype for o in out} == {torch.float32}
    (found,) = predict(fast, image(1, 3, 64, 64))
    assert len(found) > 0
    assert found.bboxes.dtype == torch.float32


@pytest.mark.parametrize(
    'changes',
    [
        dict(sampling_ratio=2),  # more than a pixel apart
        dict(pool_mode='max'),
        dict(type='SimpleRoIAlign', _delete_=True, output_size=7),
    ],
)
def test_other_pooling_reads_plain_memory(changes, randomise):
    """mmcv's RoIAlign takes channels_last maps for (N, C, H, W), silently."""
    config = Config.fromfile(
        CONFIGS / 'mini/mask-rcnn_fasternet-t0_fpn_nuclei.py'
    )
    config.merge_from_dict(
        {'model.roi_head.bbox_roi_extractor.roi_layer': changes}
    )
    model = randomise(MODELS.build(config.model)).eval()
    maps = model.extract_feat(image(1, 3, 128, 128))
    rois = torch.tensor([[0.0, 3, 5, 90, 70]])
    expected = model.roi_head.bbox_roi_extractor(maps, rois)
    maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    found = optimize(model).roi_head.bbox_roi_extractor(maps, rois)
    close([found], [expected], 1e-5)


def test_shared_layers_stay_shared():
    model = build('fasternet/retinanet_fasternet-t0_fpn_1x_coco.py').eval()
    model.bbox_head.twin = model.bbox_head.cls_convs[0]
    fast = optimize(model)
    assert fast.bbox_head.twin is fast.bbox_head.cls_convs[0]


def test_compiled(randomise):
    model = randomise(FasterNet('t0')).eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        close(optimize(model, compile=True)(x), model(x), 1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.int16, torch.float64])
def test_other_dtypes(dtype):
    with pytest.raises(ValueError, match=f'compute in {dtype} on cpu, .*bfl'):
        optimize(FasterNet('t0').eval(), dtype)


def test_one_unknown_head_leaves_all_as_they_are():
    model = build('mini/mask-rcnn_fasternet-t0_fpn_nuclei.py').eval()

    class OtherRoIHead(type(model.roi_head)):
        def predict_bbox(self, *args, **kwargs):
            return super().predict_bbox(*args, **kwargs)

    model.roi_head.__class__ = OtherRoIHead
    fast = optimize(model, torch.bfloat16)
    for part, dtype in (
        (fast.backbone, torch.bfloat16),
        (fast.neck, torch.bfloat16),
        (fast.rpn_head, torch.float32),
        (fast.roi_head, torch.float32),
    ):
        assert {p.dtype for p in part.parameters()} == {dtype}
        fused = any(isinstance(m, FusedConv2d) for m in part.modules())
        assert fused == (dtype == torch.bfloat16)
    maps = fast.extract_feat(image(1, 3, 64, 64))
    for x in maps:
        assert x.dtype == torch.float32 and x.is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('part', ['neck', 'bbox_head'])
def test_deformable_convolutions_stay_as_they_are(part, dtype, randomise):
    """mmcv's take channels_last maps for (N, C, H, W), silently."""
    model = build('mini/retinanet_fasternet-t0_fpn_nuclei.py').eval()
    parts = dict(
        neck=model.neck.fpn_convs[0], bbox_head=model.bbox_head.cls_convs[0]
    )
    owner = parts[part]
    owner.conv = ModulatedDeformConv2dPack(96, 96, 3, padding=1)
    owner._modules['bn'] = nn.Identity()
    randomise(model)
    # Large offsets amplify rounding.
    owner.conv.conv_offset.weight.data *= 0.01
    fast = optimize(model, dtype)
    deformable = [
        m for m in fast.modules() if isinstance(m, ModulatedDeformConv2dPack)
    ]
    assert [m.weight.dtype for m in deformable] == [torch.float32]
    x = image(1, 3, 128, 96)
    outs = (m.bbox_head(m.extract_feat(x)) for m in (fast, model))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(*outs, strict=True):
        close(a, b, tolerance)


def test_detectors_that_hold_detectors():
    model = build('mini/retinanet_fasternet-t0_fpn_nuclei.py').eval()
    outer = MODELS.get('SemiBaseDetector').__new__(
        MODELS.get('SemiBaseDetector')
    )
    nn.Module.__init__(outer)
    outer.student = model
    with pytest.raises(ValueError, match='optimise the one that predicts'):
        optimize(outer.eval())


class Shuffle(nn.Module):
    """Channels by an index, which is no number to be rounded."""

    def __init__(self):
        super().__init__()
        self.register_buffer('index', torch.tensor([2, 0, 1]))

    def forward(self, x):
        return x[:, self.index]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_bare_layers(dtype):
    conv = nn.Conv2d(3, 3, 3).eval()
    x = random('x', 1, 3, 6, 6)
    fast = optimize(conv, dtype)
    assert type(fast) is FusedConv2d
    expected = fast(x)
    shuffled = optimize(nn.Sequential(conv, Shuffle()).eval(), dtype)(x)
    assert torch.equal(shuffled, expected[:, [2, 0, 1]])


@torch.no_grad()
@pytest.mark.parametrize(
    'layout', [torch.channels_last, torch.contiguous_format]
)
def test_bare_stages_leave_their_input(layout, randomise):
    stage = randomise(FasterNet('t0').stages[0]).eval()
    x = random('x', 1, 40, 8, 8).to(memory_format=layout)
    before = x.clone()
    fast = optimize(stage, memory_format=layout)
    close(fast(x), stage(x), 1e-5)
    assert torch.equal(x, before)


def test_nothing_to_optimize():
    with pytest.raises(ValueError, match='a ReLU has no weights'):
        optimize(nn.ReLU().eval())
    with pytest.raises(ValueError, match="cannot compute in 'bfloat16' on"):
        optimize(nn.Conv2d(1, 1, 1).eval(), 'bfloat16')


@pytest.mark.parametrize('compile', [False, True])
def test_twice(compile):
    fast = optimize(FasterNet('t0').eval(), compile=compile)
    with pytest.raises(ValueError, match='in fast form already: optimise the'):
        optimize(fast)
    optimize(fold(FasterNet('t0').eval()))
    with pytest.raises(ValueError, match='in train mode'):
        optimize(FasterNet('t0'))


@torch.no_grad()
@pytest.mark.parametrize('count', [0, 1, 3])
def test_linear(count):
    linear = nn.Linear(5, 7)
    x = random('x', count, 5)
    out = FusedLinear(linear)(x)
    assert out.shape == (count, 7)
    torch.testing.assert_close(out, linear(x))


@torch.no_grad()
@pytest.mark.parametrize('levels', [1, 2])
def test_scaled_regions(levels):
    """As in mmdet, which scales regions if there are several levels."""
    config = dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=0),
        out_channels=4,
        featmap_strides=[4, 8][:levels],
    )
    extractor = MODELS.build(config)
    feats = [random(f'x{i}', 1, 4, 16, 16) for i in range(levels)]
    rois = torch.tensor([[0, 10.0, 12, 30, 36]])
    expected = extractor(feats, rois, roi_scale_factor=1.5)
    fast = FastRoIExtractor(extractor)
    out = fast(feats, rois, roi_scale_factor=1.5)
    torch.testing.assert_close(out, expected)
    plain = fast(feats, rois)
    assert torch.equal(out, plain) == (levels == 1)


class Without:
    """torch.ops.mkldnn of a build that lacks the operators."""


@pytest.mark.parametrize(
    'target, name, value, left',
    [
        (
            *(torch.ops.mkldnn, '_is_mkldnn_bf16_supported'),
            *(lambda: False, {torch.float32, torch.int8}),
        ),
        (torch.backends.mkldnn, 'is_available', lambda: False, set()),
        (torch.ops, 'mkldnn', Without(), set()),
    ],
)
def test_kernels_are_asked_for(
    target, name, value, left, monkeypatch, randomise
):
    """Without, plain operators compute, and bfloat16 is refused."""
    module = sys.modules['fasternet_det.deploy.optimize']
    monkeypatch.setattr(module, 'kernel_dtypes', kernel_dtypes)
    monkeypatch.setattr(target, name, value)
    kernel_dtypes.cache_clear()
    try:
        assert kernel_dtypes() == left
        with pytest.raises(ValueError, match='avx512_bf16 or amx_bf16'):
            optimize(FasterNet('t0').eval(), torch.bfloat16)
        model = randomise(FasterNet('t0')).eval()
        x = image(1, 3, 64, 64)
        close(optimize(model)(x), model(x), 1e-5)
    finally:
        monkeypatch.undo()
        kernel_dtypes.cache_clear()


@pytest.mark.parametrize(
    'machine, has, expected',
    [
        ('x86_64', False, False),  # torch says yes, by AVX-512 alone
        ('x86_64', True, True),
        ('x86_64', None, False),  # of a torch that cannot tell
        ('aarch64', False, True),
    ],
)
def test_bfloat16_is_the_cpus(machine, has, expected, monkeypatch):
    for target, name, value in (
        (torch.ops.mkldnn, '_is_mkldnn_bf16_supported', True),
        (torch.cpu, '_is_avx512_bf16_supported', has),
        (platform, 'machine', machine),
    ):
        monkeypatch.setattr(target, name, lambda value=value: value)
    if has is None:
        monkeypatch.delattr(torch.cpu, '_is_avx512_bf16_supported')
    found = kernel_dtypes.__wrapped__()
    assert (torch.bfloat16 in found) == expected


def test_gradients_are_refused():
    fast = optimize(FasterNet('t0').eval())
    x = image(1, 3, 64, 64).requires_grad_()
    with pytest.raises(RuntimeError, match='in place and gives no gradients'):
        fast(x)
    with pytest.raises(RuntimeError, match='in place and gives no gradients'):
        fast(x=x)
    with torch.no_grad():
        fast(x)


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_models_in_float64(dtype, randomise):
    """Predictors and deformable layers too come down to float32."""
    model = build('mini/retinanet_fasternet-t0_fpn_nuclei.py').eval()
    owner = model.neck.fpn_convs[0]
    owner.conv = ModulatedDeformConv2dPack(96, 96, 3, padding=1)
    owner._modules['bn'] = nn.Identity()
    randomise(model)
    x = image(1, 3, 128, 96)
    expected, found = (
        m.bbox_head(m.extract_feat(x))
        for m in (optimize(model, dtype), optimize(model.double(), dtype))
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-3 if dtype == torch.float32 else 0.1)


@torch.no_grad()
def test_packed_weights_follow_the_weight():
    """Also one that changes in place, and whatever the batch size."""
    x = random('x', 2, 3, 6, 6)
    conv = nn.Conv2d(3, 8, 3)
    fused = FusedConv2d(conv)
    for change in (
        lambda w: w.mul_(2),
        lambda w: w.copy_(torch.rand_like(w)),
        lambda w: setattr(w, 'data', torch.rand_like(w)),
    ):
        close([fused(x), fused(x[:1])], [conv(x), conv(x[:1])], 1e-5)
        assert len(fused._packed[2]) <= 1
        change(conv.weight)
    close([fused(x)], [conv(x)], 1e-5)


def test_predictors_keep_their_weights():
    """Cast to bfloat16 and back again, they would be rounded."""
    model = build('mini/retinanet_fasternet-t0_fpn_nuclei.py').eval()
    fast = optimize(model, torch.bfloat16)
    for name in ('retina_cls', 'retina_reg'):
        a, b = (getattr(m.bbox_head, name).weight for m in (fast, model))
        assert torch.equal(a, b)


@pytest.mark.parametrize('version', ['2.1.2', '2.5.1+cpu'])
def test_old_torch_is_refused(version, monkeypatch):
    monkeypatch.setattr(torch, '__version__', version)
    found = version.split('+')[0]
    said = f'optimize needs torch 2.6 or later, found {found}; fold'
    with pytest.raises(RuntimeError, match=re.escape(said)):
        optimize(FasterNet('t0').eval())
