import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_input, sample
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet_det import FasterNet, GGhostRegNet
from fasternet_det.backbones.g_ghost_regnet import Bottleneck, GhostStage

GOLDEN = json.loads(
    (Path(__file__).parents[1] / 'data' / 'g_ghost_regnet.json').read_text()
)
# With the classifier
PARAMS = {
    '002': 1_825_440,
    '004': 2_884_456,
    '006': 4_029_776,
    '008': 5_248_328,
    '016': 7_109_660,
    '032': 10_511_000,
    '040': 15_726_268,
    '064': 17_993_748,
    '080': 24_586_928,
    '120': 30_627_208,
    '160': 32_381_704,
    '320': 62_815_448,
}
# Plain, ghost, ghost and plain stages; three blocks are the fewest for ghosts.
TINY = dict(depths=(2, 3, 4, 2), widths=(8, 16, 24, 32), group_width=8)


def image(*shape, seed=0):
    return torch.from_numpy(fill_input(seed, shape))


def statistics(model):
    return {k: v for k, v in model.state_dict().items() if 'running' in k}


def shapes(model):
    return {k: list(v.shape) for k, v in model.state_dict().items()}


@pytest.mark.parametrize('arch', GOLDEN)
def test_equals_the_original(arch, randomise):
    want = GOLDEN[arch]
    model = randomise(MODELS.build(dict(type='GGhostRegNet', arch=arch)))
    assert shapes(model) == {
        k: v
        for k, v in want['state_dict'].items()
        if k not in want['classifier_only_keys']
    }
    case = want['detection']
    with torch.no_grad():
        outs = model.eval()(
            image(*case['input_shape'], seed=case['input_seed'])
        )
    assert isinstance(outs, tuple) and len(outs) == 4
    for out, ref in zip(outs, case['outputs']):
        assert list(out.shape) == ref['shape']
        values, ref_values = np.array(sample(out.numpy())), ref['sample']
        error = np.abs(values - ref_values).max() / np.abs(ref_values).max()
        assert error <= 1e-5
        out = out.double()
        std = out.std().item()
        assert std == pytest.approx(ref['std'], rel=1e-5)
        assert abs(out.mean().item() - ref['mean']) <= 1e-5 * std
    assert model.out_channels == [out.shape[1] for out in outs]


@pytest.mark.parametrize('arch', PARAMS)
def test_parameter_counts(arch):
    with torch.device('meta'):
        model = GGhostRegNet(arch, fork_feat=False)
        logits = model.eval()(torch.empty(2, 3, 64, 64))
    assert sum(p.numel() for p in model.parameters()) == PARAMS[arch]
    assert logits.shape == (2, 1000)
    if arch in GOLDEN:
        assert shapes(model) == GOLDEN[arch]['state_dict']
    assert PARAMS.keys() == GGhostRegNet.arch_settings.keys()


def test_classifier(randomise):
    model = randomise(GGhostRegNet(TINY, fork_feat=False, num_classes=5))
    backbone = randomise(GGhostRegNet(TINY))
    x = image(2, 3, 64, 64)
    last = backbone.eval()(x)[3].mean((2, 3))
    want = last @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model.eval()(x), want)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(x), model(x))  # dropout


def norm_by_hand(x, module):
    """BatchNorm with batch statistics."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = x.var((0, 2, 3), unbiased=False, keepdim=True)
    weight, bias = (p[:, None, None] for p in (module.weight, module.bias))
    return (x - mean) / (var + module.eps).sqrt() * weight + bias


def block_by_hand(x, block, groups, stride=1):
    conv = torch.nn.functional.conv2d
    y = norm_by_hand(conv(x, block.conv1.weight), block.bn1).clamp(min=0)
    y = conv(y, block.conv2.weight, None, stride, 1, groups=groups)
    y = norm_by_hand(y, block.bn2).clamp(min=0)
    y = norm_by_hand(conv(y, block.conv3.weight), block.bn3)
    if isinstance(block.downsample, torch.nn.Sequential):
        shortcut, norm = block.downsample
        x = norm_by_hand(conv(x, shortcut.weight, stride=stride), norm)
    return (x + y).clamp(min=0)


def test_ghost_stage_by_hand_in_train_mode(randomise):
    """The paper's formulas, written out, with batch statistics."""
    arch = dict(depths=(1, 5, 1, 1), widths=(8, 40, 8, 8), group_width=8)
    model = randomise(GGhostRegNet(arch, norm_eval=False)).double().train()
    stage = model.layer2
    x = image(3, 8, 9, 14).double()
    out = stage(x)

    raw = 18  # int(0.5 * 40 / 6) * 6, where 6 is 3/4 of the group width
    conv = torch.nn.functional.conv2d
    x0 = block_by_hand(x, stage.base, 5, stride=2)
    e = x0[:, :raw]
    maps = [x0]
    assert len(stage.layers) == 3
    for block in stage.layers:
        assert block.conv1.weight.shape == (raw, raw, 1, 1)
        e = block_by_hand(e, block, 3)
        maps.append(e)
    m = torch.cat(maps, 1).mean((2, 3), keepdim=True)
    assert m.shape[1] == 40 + 3 * raw
    m = norm_by_hand(conv(m, stage.merge[1].weight), stage.merge[2])
    m = norm_by_hand(
        conv(m.clamp(min=0), stage.merge[4].weight), stage.merge[5]
    )
    c = norm_by_hand(conv(x0[:, raw:], stage.cheap[0].weight), stage.cheap[1])
    want = block_by_hand(torch.cat((e, (c + m).clamp(min=0)), 1), stage.end, 5)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)


def test_stages():
    """The first is plain, and so is one of less than three blocks."""
    arch = dict(depths=(4, 1, 2, 3), widths=(8, 8, 8, 8), group_width=8)
    model = GGhostRegNet(arch, cheap_ratio=0.2)
    for i, depth in enumerate((4, 1, 2), start=1):
        stage = getattr(model, f'layer{i}')
        assert [type(block) for block in stage] == [Bottleneck] * depth
    assert isinstance(model.layer4, GhostStage)
    assert model.layer4.split_sizes == (6, 2)
    # 1 - 0.9 is a little less than 0.1, but 12 channels are two groups of 6.
    arch = dict(depths=(1, 3, 1, 1), widths=(8, 120, 8, 8), group_width=8)
    model = GGhostRegNet(arch, cheap_ratio=0.9)
    assert model.layer2.split_sizes == (12, 108)


@pytest.mark.parametrize(
    'height, width, last', [(1, 1, (1, 1)), (33, 64, (2, 2)), (95, 31, (3, 1))]
)
def test_sides_are_rounded_up(height, width, last, randomise):
    model = randomise(GGhostRegNet(TINY)).eval()
    outs = model(image(1, 3, height, width))
    assert outs[-1].shape == (1, 32, *last)
    assert outs[0].shape == (1, 8, -(-height // 4), -(-width // 4))


@pytest.mark.parametrize('in_channels', [1, 6])
def test_other_images(in_channels, randomise):
    model = randomise(GGhostRegNet(TINY, in_channels=in_channels)).eval()
    x = image(1, in_channels, 40, 40)
    alone = model(x)
    batch = model(torch.cat((image(1, in_channels, 40, 40, seed=1), x)))
    for a, b in zip(alone, batch):
        torch.testing.assert_close(a[0], b[1])
        assert a.std() > 0.1


@pytest.mark.parametrize(
    'kwargs, named',
    [
        (dict(arch='032g'), "'032g'.*'002', '004'.*'320'"),
        (dict(arch=32), '32 is neither'),
        (dict(arch=dict(depths=(1, 1, 1, 1))), 'depths, widths, group_width'),
        (dict(arch=TINY | dict(depth=50)), 'depths, widths, group_width'),
        (dict(arch=TINY | dict(depths=(1, 2, 3))), 'needs four depths'),
        (dict(arch=TINY | dict(depths=(1, 0, 3, 1))), 'needs four depths'),
        (dict(arch=TINY | dict(widths=(8, 8))), 'four widths and'),
        (dict(arch=TINY | dict(group_width=0)), 'all positive ints'),
        (
            dict(arch=TINY | dict(widths=(8, 16, 20, 32))),
            'width 20 is no multiple of the group_width 8',
        ),
        (dict(arch=TINY | dict(group_width=1)), 'stage 2 no thin channels'),
        (
            dict(arch=TINY, cheap_ratio=0.7),
            r'cheap_ratio=0.7.*stage 2 no thin channels.*0.3 \* 16',
        ),
        (dict(cheap_ratio='0.5'), "cheap_ratio='0.5' is not between 0 and 1"),
        (
            dict(arch=dict(depths=3, widths=(8,) * 4, group_width=8)),
            'needs four depths',
        ),
        (
            dict(arch=dict(depths=(1.5,) * 4, widths=(8,) * 4, group_width=8)),
            'all positive ints',
        ),
        (dict(cheap_ratio=0), 'cheap_ratio=0 is not between 0 and 1'),
        (dict(cheap_ratio=1.0), 'cheap_ratio=1.0 is not between 0 and 1'),
        (dict(out_indices=(0, 4)), r'\(0, 4\).*\(0, 1, 2, 3\)'),
        (dict(out_indices=(2, 0)), r'\(2, 0\).*rising'),
        (dict(out_indices=()), 'rising'),
        (dict(frozen_stages=5), 'frozen_stages=5.*1 to 4'),
        (dict(frozen_stages=-2), 'frozen_stages=-2'),
    ],
)
def test_bad_arguments(kwargs, named):
    with pytest.raises(ValueError, match=named):
        GGhostRegNet(**kwargs)


@pytest.mark.parametrize('leaked', ['depth', 'style', 'num_stages'])
def test_resnet_options_are_refused(leaked):
    with pytest.raises(TypeError, match=leaked):
        MODELS.build(dict(type='GGhostRegNet', **{leaked: 4}))


@pytest.mark.parametrize('shape', [(1, 1, 64, 64), (3, 64, 64)])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match=r'expected \(N, 3, H, W\)') as e:
        GGhostRegNet(TINY)(torch.zeros(shape))
    assert str(shape) in str(e.value)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('norm_eval', [False, True])
def test_all_parameters_get_gradients(with_cp, norm_eval, randomise):
    model = randomise(GGhostRegNet(TINY, with_cp=with_cp, norm_eval=norm_eval))
    outs = model.train()(image(4, 3, 64, 64))
    sum(out.square().sum() for out in outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def frozen_names(model):
    return {n for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3, 4])
def test_frozen_stages(frozen_stages, randomise):
    model = randomise(
        GGhostRegNet(TINY, frozen_stages=frozen_stages, norm_eval=False)
    )
    assert model.train() is model
    prefixes = ['conv1.', 'bn1.'] * (frozen_stages >= 0)
    prefixes += [f'layer{i + 1}.' for i in range(frozen_stages)]
    prefixes = tuple(prefixes)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name
    if frozen_stages == 4:
        return  # nothing left to train

    before = copy.deepcopy(model.state_dict())
    optimizer = build_optim_wrapper(
        model,
        dict(optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.1)),
    )
    loss = sum(out.pow(3).sum() for out in model(image(4, 3, 64, 64)))
    optimizer.update_params(loss)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value) == name.startswith(prefixes)


def test_norm_eval_is_the_default(randomise):
    """One image a process would leave the mix nothing to normalise."""
    model = randomise(GGhostRegNet(TINY)).train()
    before = copy.deepcopy(statistics(model))
    model(image(1, 3, 64, 64))
    assert all(torch.equal(before[k], v) for k, v in statistics(model).items())
    assert not any(
        m.training for m in model.modules() if isinstance(m, _BatchNorm)
    )
    free = GGhostRegNet(TINY, norm_eval=False).train()
    with pytest.raises(ValueError, match='two images or more'):
        free(image(1, 3, 64, 64))


def test_out_indices_leave_out_the_rest(randomise):
    model = randomise(GGhostRegNet(TINY, out_indices=(1, 2)))
    full = randomise(GGhostRegNet(TINY))
    x = image(2, 3, 64, 64)
    for a, b in zip(model.eval()(x), full.eval()(x)[1:3]):
        torch.testing.assert_close(a, b)
    assert model.out_channels == [16, 24]
    assert frozen_names(model) == {
        n for n, _ in model.named_parameters() if n.startswith('layer4.')
    }
    sum(out.sum() for out in model.train()(x)).backward()
    waited_for = {n for n, p in model.named_parameters() if p.grad is None}
    assert waited_for == frozen_names(model)


def test_norms_follow_their_config():
    model = GGhostRegNet(TINY, norm_cfg=dict(type='SyncBN'))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    # stem; three a block; a shortcut's per stage; two in the mix, one cheap
    assert len(norms) == 1 + 3 * 11 + 4 + 2 * 3
    assert model.state_dict().keys() == GGhostRegNet(TINY).state_dict().keys()


def test_copies_are_equal(randomise):
    model = randomise(GGhostRegNet(TINY, with_cp=True)).eval()
    x = image(1, 3, 64, 64)
    fresh = GGhostRegNet(TINY).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        fresh,
    ):
        for a, b in zip(model(x), other(x)):
            assert torch.equal(a, b)


@pytest.mark.deploy
def test_exports(randomise):
    """No Python function in the way, at any batch and image size."""
    model = randomise(GGhostRegNet(TINY)).eval()
    dims = {i: torch.export.Dim.AUTO for i in (0, 2, 3)}
    program = torch.export.export(
        model, (image(2, 3, 64, 96),), dynamic_shapes=(dims,)
    )
    for shape in ((2, 3, 64, 96), (3, 3, 70, 61)):
        x = image(*shape, seed=1)
        for a, b in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(a, b)


def test_default_initialisation():
    torch.manual_seed(0)
    model = GGhostRegNet('032')
    model.init_weights()
    for name, value in model.named_parameters():
        if value.dim() > 1:
            fan_out = value[:, 0].numel()  # torch's, whatever the groups
            std = (2 / fan_out) ** 0.5
            assert value.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert (value == float(name.endswith('weight'))).all(), name


def pretrained(path, **kwargs):
    return dict(type='Pretrained', checkpoint=str(path), **kwargs)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda s: s,
        # torch's ImageNet example, which the authors trained with
        lambda s: dict(
            epoch=100,
            arch='g_ghost_regnetx_032',
            state_dict={f'module.{k}': v for k, v in s.items()},
            best_acc1=torch.tensor(77.8),
            optimizer=dict(state={}, param_groups=[]),
        ),
        lambda s: dict(
            state_dict={f'backbone.{k}': v for k, v in s.items()}
            | {'neck.weight': torch.zeros(1)}
        ),
    ],
    ids=['bare', 'original', 'detector'],
)
def test_loads_the_originals_names(wrap, filled, tmp_path):
    weights = filled(GOLDEN['032']['state_dict'])
    torch.save(wrap(weights), tmp_path / 'a.pth')
    model = GGhostRegNet('032', init_cfg=pretrained(tmp_path / 'a.pth'))
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert weights.keys() - model.state_dict().keys() == {
        'fc.weight',
        'fc.bias',
    }
    classifier = GGhostRegNet(
        '032', fork_feat=False, init_cfg=pretrained(tmp_path / 'a.pth')
    )
    classifier.init_weights()
    assert torch.equal(classifier.fc.weight, weights['fc.weight'])


def drop(key):
    return lambda weights: weights.pop(key)


def add(key):
    return lambda weights: weights.update({key: torch.zeros(1)})


@pytest.mark.parametrize(
    'change, kwargs, named',
    [
        (drop('layer3.merge.4.weight'), {}, 'missing: layer3.merge.4.weight'),
        (add('layer3.merge.0.weight'), {}, 'unexpected: layer3.merge.0'),
        (add('head.weight'), {}, 'unexpected: head.weight'),
        (drop('fc.bias'), dict(fork_feat=False), 'missing: fc.bias'),
        (lambda w: None, dict(arch='040'), r'\(032\) does not fit'),
        (lambda w: None, dict(cheap_ratio=0.4), 'shape: layer2.cheap.0'),
        (lambda w: None, dict(in_channels=1), r'conv1.weight \(32, 3, 3, 3\)'),
    ],
)
def test_every_key_is_accounted_for(change, kwargs, named, filled, tmp_path):
    weights = filled(GOLDEN['032']['state_dict'])
    change(weights)
    torch.save(weights, tmp_path / 'a.pth')
    model = GGhostRegNet(
        **dict(arch='032') | kwargs, init_cfg=pretrained(tmp_path / 'a.pth')
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=named):
        model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_pretrained_stands_alone(tmp_path):
    cfgs = [pretrained(tmp_path / 'a.pth'), dict(type='Kaiming')]
    with pytest.raises(ValueError, match='to stand alone'):
        GGhostRegNet(TINY, init_cfg=cfgs).init_weights()


def test_find_arch():
    for arch in PARAMS:
        with torch.device('meta'):
            weights = GGhostRegNet(arch).state_dict()
        assert GGhostRegNet.find_arch(weights) == arch
    assert (
        GGhostRegNet.find_arch(GGhostRegNet(TINY).state_dict())
        == 'depths (2, 3, 4, 2), widths (8, 16, 24, 32)'
    )
    with torch.device('meta'):
        other = FasterNet('t0').state_dict()
    assert GGhostRegNet.find_arch(other) == 'not a G-Ghost RegNet'
