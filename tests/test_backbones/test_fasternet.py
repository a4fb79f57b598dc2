import copy
import pickle

import numpy as np
import pytest
import torch
from fill import fill_input, sample
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet_det import FasterNet

ARCHS = ('t0', 't1', 't2', 's', 'm', 'l')
TINY = dict(embed_dim=8, depths=(1, 1, 2, 1), act_cfg=dict(type='ReLU'))


def image(*shape, seed=0):
    return torch.from_numpy(fill_input(seed, shape))


def statistics(model):
    return {k: v for k, v in model.state_dict().items() if 'running' in k}


@pytest.mark.parametrize('arch', ARCHS)
def test_equals_the_original_backbone(arch, golden, randomise):
    want = golden[arch]
    model = randomise(MODELS.build(dict(type='FasterNet', arch=arch))).eval()
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == want['backbone_state_dict']
    assert (
        sum(p.numel() for p in model.parameters()) == want['params_backbone']
    )
    case = want['detection']
    with torch.no_grad():
        outs = model(image(*case['input_shape'], seed=case['input_seed']))
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


@pytest.mark.parametrize('arch', ARCHS)
def test_equals_the_original_classifier(arch, golden, randomise):
    want = golden[arch]
    model = randomise(FasterNet(arch, fork_feat=False)).eval()
    own = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert (
        own
        == {
            k: v
            for k, v in want['backbone_state_dict'].items()
            if not k.startswith('norm')
        }
        | want['classifier_only_keys']
    )
    assert FasterNet.classifier_keys == set(want['classifier_only_keys'])
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == want['params_classifier']
    case = want['classification']
    with torch.no_grad():
        logits = model(image(*case['input_shape'], seed=case['input_seed']))
    ref = case['outputs'][0]
    assert list(logits.shape) == ref['shape']
    error = np.abs(np.array(sample(logits.numpy())) - ref['sample']).max()
    assert error / np.abs(ref['sample']).max() <= 1e-5


def test_forward_by_hand_in_train_mode(randomise):
    """The paper's formulas, written out, with batch statistics."""

    def norm(x, module):
        mean = x.mean((0, 2, 3), keepdim=True)
        var = x.var((0, 2, 3), unbiased=False, keepdim=True)
        weight, bias = (p[:, None, None] for p in (module.weight, module.bias))
        return (x - mean) / (var + module.eps).sqrt() * weight + bias

    model = randomise(FasterNet(TINY, layer_scale_init_value=0.5)).double()
    model.train()
    x = image(2, 3, 70, 45).double()
    outs = model(x)
    conv = torch.nn.functional.conv2d
    x = norm(
        conv(x, model.patch_embed.proj.weight, stride=4),
        model.patch_embed.norm,
    )
    for i, stage in enumerate(model.stages):
        if i % 2:
            x = norm(conv(x, stage.reduction.weight, stride=2), stage.norm)
            continue
        for block in stage.blocks:
            quarter = x.shape[1] // 4
            y = x.clone()
            y[:, :quarter] = conv(
                x[:, :quarter],
                block.spatial_mixing.partial_conv3.weight,
                padding=1,
            )
            y = norm(conv(y, block.mlp[0].weight), block.mlp[1])
            y = conv(y.clamp(min=0), block.mlp[3].weight)
            x = x + block.layer_scale[:, None, None] * y
        torch.testing.assert_close(
            outs[i // 2],
            norm(x, getattr(model, f'norm{i}')),
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.parametrize(
    'height, width, last',
    [(32, 32, (1, 1)), (33, 65, (1, 2)), (416, 95, (13, 2)), (63, 32, (1, 1))],
)
def test_sides_drop_their_remainders(height, width, last, randomise):
    model = randomise(FasterNet(TINY)).eval()
    x = image(1, 3, height, width)
    outs = model(x)
    assert outs[-1].shape == (1, 64, *last)
    assert outs[0].shape == (1, 8, height // 4, width // 4)
    # What the stem's stride leaves over has no influence.
    cut = model(x[..., : height // 4 * 4, : width // 4 * 4])
    torch.testing.assert_close(outs, cut)


@pytest.mark.parametrize('in_channels', [1, 6])
def test_other_images(in_channels, randomise):
    model = randomise(FasterNet(TINY, in_channels=in_channels)).eval()
    x = image(1, in_channels, 40, 40)
    alone = model(x)
    batch = model(torch.cat((image(1, in_channels, 40, 40, seed=1), x)))
    for a, b in zip(alone, batch):
        torch.testing.assert_close(a[0], b[1])
        assert a.std() > 0.1


@pytest.mark.parametrize(
    'kwargs, named',
    [
        (dict(arch='t9'), "'t9'.*'t0', 't1', 't2', 's', 'm', 'l'"),
        (dict(arch=dict(embed_dim=8)), 'embed_dim, depths, act_cfg'),
        (dict(arch=TINY | dict(depth=50)), 'embed_dim, depths, act_cfg'),
        (dict(arch=TINY | dict(depths=(1, 2))), 'four positive depths'),
        (dict(arch=TINY | dict(embed_dim=0)), 'positive embed_dim'),
        (dict(out_indices=(0, 1)), r'\(0, 1\).*\(0, 2, 4, 6\)'),
        (dict(out_indices=(2, 0)), r'\(2, 0\).*rising'),
        (dict(out_indices=()), 'rising'),
        (dict(out_indices=(0, 8)), r'\(0, 2, 4, 6\)'),
        (dict(frozen_stages=5), 'frozen_stages=5.*1 to 4'),
        (dict(frozen_stages=-2), 'frozen_stages=-2'),
        (dict(drop_path_rate=1.0), 'drop_path_rate=1.0'),
        (dict(n_div=0), 'n_div=0'),
    ],
)
def test_bad_arguments(kwargs, named):
    with pytest.raises(ValueError, match=named):
        FasterNet(**kwargs)


@pytest.mark.parametrize('leaked', ['depth', 'style', 'num_stages'])
def test_resnet_options_are_refused(leaked):
    with pytest.raises(TypeError, match=leaked):
        MODELS.build(dict(type='FasterNet', arch='t0', **{leaked: 4}))


@pytest.mark.parametrize(
    'shape', [(1, 3, 31, 64), (1, 3, 64, 31), (1, 1, 64, 64), (3, 64, 64)]
)
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match=r'\(N, 3, H, W\).* at least 32') as e:
        FasterNet(TINY)(torch.zeros(shape))
    assert str(shape) in str(e.value)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('layer_scale', [0, 1e-5])
def test_all_parameters_get_gradients(with_cp, layer_scale):
    model = FasterNet(
        't0', with_cp=with_cp, layer_scale_init_value=layer_scale
    )
    sum(out.square().sum() for out in model(image(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_mixed_precision(randomise):
    """Autocast to bfloat16 stays near float32, checkpointing included."""
    gradients = {}
    for autocast in (False, True):
        for with_cp in (False, True):
            model = randomise(FasterNet(TINY, with_cp=with_cp)).train()
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                outs = model(image(2, 3, 64, 64))
                sum(out.float().square().mean() for out in outs).backward()
            gradients[autocast, with_cp] = torch.cat(
                [p.grad.flatten() for p in model.parameters()]
            )
    for autocast in (False, True):
        assert torch.equal(*(gradients[autocast, cp] for cp in (False, True)))
    similarity = torch.cosine_similarity(
        gradients[False, False], gradients[True, False], dim=0
    )
    assert 0.98 < similarity < 1


def test_drop_path_rates_rise_to_the_last_block():
    model = FasterNet('t0', drop_path_rate=0.12)
    rates = [
        getattr(block.drop_path, 'drop_prob', 0)
        for stage in model.stages[::2]
        for block in stage.blocks
    ]
    np.testing.assert_allclose(rates, np.linspace(0, 0.12, 13), atol=1e-7)
    assert FasterNet('l').stages[6].blocks[-1].drop_path(1) == 1


def test_drop_path_drops_whole_residuals(randomise):
    model = randomise(FasterNet(TINY, drop_path_rate=0.9)).train()
    torch.manual_seed(0)
    block = model.stages[6].blocks[0]
    x = image(64, 64, 2, 2)
    kept = (block(x) != x).flatten(1)
    assert (kept.all(1) | ~kept.any(1)).all()
    assert 0 < kept.any(1).sum() < 20
    assert (block.eval()(x) != x).all()


def frozen_names(model):
    return {n for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3, 4])
def test_frozen_stages(frozen_stages, randomise):
    model = randomise(FasterNet(TINY, frozen_stages=frozen_stages))
    assert model.train() is model
    prefixes = ['patch_embed.'] * (frozen_stages >= 0)
    prefixes += [f'stages.{i}.' for i in range(2 * frozen_stages - 1)]
    prefixes = tuple(prefixes)
    frozen = frozen_names(model)
    for name, _ in model.named_parameters():
        assert (name in frozen) == name.startswith(prefixes), name

    before = copy.deepcopy(model.state_dict())
    optimizer = build_optim_wrapper(
        model,
        dict(optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.1)),
    )
    loss = sum(out.pow(3).sum() for out in model(image(2, 3, 64, 64)))
    optimizer.update_params(loss)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value) == name.startswith(prefixes)


def test_norm_eval(randomise):
    model = randomise(FasterNet(TINY, norm_eval=True, drop_path_rate=0.1))
    model.train()
    before = copy.deepcopy(statistics(model))
    model(image(2, 3, 64, 64))
    assert all(torch.equal(before[k], v) for k, v in statistics(model).items())
    assert model.stages[6].blocks[-1].drop_path.training
    assert not any(
        m.training for m in model.modules() if isinstance(m, _BatchNorm)
    )


def test_out_indices_leave_out_the_rest(randomise):
    model = randomise(FasterNet(TINY, out_indices=(2, 4)))
    full = randomise(FasterNet(TINY))
    x = image(2, 3, 64, 64)
    for a, b in zip(model.eval()(x), full.eval()(x)[1:3]):
        torch.testing.assert_close(a, b)
    assert model.out_channels == [16, 32]
    assert frozen_names(model) == {
        n
        for n, _ in model.named_parameters()
        if n[:9] in ('stages.5.', 'stages.6.')
    }
    sum(out.sum() for out in model.train()(x)).backward()
    waited_for = {n for n, p in model.named_parameters() if p.grad is None}
    assert waited_for == frozen_names(model)


def test_norms_and_activations_follow_their_configs():
    model = FasterNet(
        't0', norm_cfg=dict(type='SyncBN'), act_cfg=dict(type='SiLU')
    )
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    assert len(norms) == 1 + 13 + 3 + 4
    assert isinstance(model.stages[0].blocks[0].mlp[2], torch.nn.SiLU)
    assert isinstance(
        FasterNet('t1').stages[0].blocks[0].mlp[2], torch.nn.GELU
    )
    assert isinstance(
        FasterNet('t2').stages[0].blocks[0].mlp[2], torch.nn.ReLU
    )
    assert model.state_dict().keys() == FasterNet('t0').state_dict().keys()
    assert not any(
        isinstance(m, _BatchNorm)
        for m in FasterNet('t0', patch_norm=False).patch_embed.modules()
    )


def test_copies_are_equal(randomise):
    model = randomise(FasterNet(TINY, with_cp=True, drop_path_rate=0.1)).eval()
    x = image(1, 3, 64, 64)
    fresh = FasterNet(TINY).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        fresh,
    ):
        for a, b in zip(model(x), other(x)):
            assert torch.equal(a, b)


def test_default_initialisation():
    torch.manual_seed(0)
    model = FasterNet('t0', fork_feat=False)
    model.init_weights()
    for name, value in model.named_parameters():
        if value.dim() > 1:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert (
                value
                == float(
                    name.endswith('norm.weight')
                    or name.endswith('mlp.1.weight')
                )
            ).all(), name
