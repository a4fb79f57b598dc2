import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_input, sample
from mmdet.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet_det import GhostNet

GOLDEN = json.loads(
    (Path(__file__).parents[1] / 'data' / 'ghostnet.json').read_text()
)
WIDTHS = {'0.5': 0.5, '1.0': 1, '1.1': 1.1, '1.3': 1.3}
TINY = 0.25
BLOCKS = (0, 2, 4, 6, 8, 9)


def image(*shape, seed=0):
    return torch.from_numpy(fill_input(seed, shape))


def equals(out, reference):
    assert list(out.shape) == reference['shape']
    values = np.array(sample(out.numpy()))
    error = np.abs(values - reference['sample']).max()
    assert error <= 1e-5 * np.abs(reference['sample']).max()


@torch.no_grad()
@pytest.mark.parametrize('width', GOLDEN)
def test_equals_the_original(width, randomise):
    want = GOLDEN[width]
    case = want['eval']
    x = image(*case['input_shape'], seed=case['input_seed'])
    cfg = dict(type='GhostNet', width=WIDTHS[width])
    model = randomise(MODELS.build(dict(cfg, out_indices=BLOCKS)))
    maps = model.eval()(x)
    for i, out in zip(BLOCKS, maps, strict=True):
        equals(out, case['blocks'][str(i)])
    assert model.out_channels == [out.shape[1] for out in maps]
    classifier = randomise(MODELS.build(dict(cfg, fork_feat=False)))
    equals(classifier.eval()(x), case['logits'])
    shapes = {k: list(v.shape) for k, v in classifier.state_dict().items()}
    assert shapes == want['state_dict']
    assert shapes.keys() - model.state_dict().keys() == set(
        want['classifier_only_keys']
    )
    parameters = sum(p.numel() for p in classifier.parameters())
    assert parameters == want['params_classifier']


def test_default_outputs():
    """The last block of each stride, at odd sides too; not timm's."""
    with torch.device('meta'):
        model = GhostNet().eval()
        maps = model(torch.empty(1, 3, 97, 65))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (24, 25, 17),
        (40, 13, 9),
        (112, 7, 5),
        (160, 4, 3),
    ]
    with torch.device('meta'):
        timms = GhostNet(out_indices=(1, 3, 5, 7))
    unused = sum(p.numel() for p in timms.parameters() if not p.requires_grad)
    assert timms.out_channels == [24, 40, 80, 160]
    classifier = GOLDEN['1.0']['params_classifier']
    assert unused + (classifier - 2_671_428) > 0.62 * classifier


@pytest.mark.parametrize(
    'kwargs, named',
    [
        (dict(width=0), 'width=0 is no factor'),
        (dict(width='1.0'), "width='1.0' is no factor"),
        (dict(width=float('nan')), 'width=nan is no factor'),
        (dict(width=float('inf')), 'width=inf is no factor'),
        (dict(out_indices=(2, 10)), r'\(2, 10\).*rising'),
        (dict(out_indices=(4, 2)), r'\(4, 2\).*rising'),
        (dict(frozen_stages=5), 'frozen_stages=5.*1 to 4'),
    ],
)
def test_bad_arguments(kwargs, named):
    with pytest.raises(ValueError, match=named):
        GhostNet(**kwargs)


def test_resnet_options_are_refused():
    with pytest.raises(TypeError, match='depth'):
        MODELS.build(dict(type='GhostNet', depth=50))


@pytest.mark.parametrize('with_cp', [False, True])
def test_all_parameters_get_gradients(with_cp, randomise):
    model = randomise(
        GhostNet(TINY, with_cp=with_cp, out_indices=(2, 4, 6, 8, 9))
    )
    outs = model.train()(image(4, 3, 64, 64))
    sum(out.square().mean() for out in outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_recomputing_changes_nothing(randomise):
    plain = randomise(GhostNet(TINY)).train()
    lean = randomise(GhostNet(TINY, with_cp=True)).train()
    x = image(2, 3, 64, 64)
    for model in (plain, lean):
        sum(out.square().mean() for out in model(x)).backward()
    for a, b in zip(plain.parameters(), lean.parameters()):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    for a, b in zip(plain.buffers(), lean.buffers()):
        assert torch.equal(a, b)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3, 4])
def test_frozen_stages(frozen_stages, randomise):
    model = randomise(GhostNet(TINY, frozen_stages=frozen_stages)).train()
    frozen = ['conv_stem.', 'bn1.'] * (frozen_stages >= 0)
    frozen += [f'blocks.{i}.' for i in range(2 * frozen_stages + 1)][
        : 9 * (frozen_stages > 0)
    ]
    frozen = tuple(frozen)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            assert module.training != name.startswith(
                tuple(prefix.rstrip('.') for prefix in frozen)
            ), name
    unused = ('blocks.9.',)  # behind the last output
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen + unused)


def test_norm_eval_and_norm_cfg():
    model = GhostNet(TINY, norm_eval=True, norm_cfg=dict(type='SyncBN'))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    assert model.train() is model and not any(m.training for m in norms)
    assert model.state_dict().keys() == GhostNet(TINY).state_dict().keys()


@pytest.mark.parametrize(
    'wrap, kwargs',
    [
        (lambda s: s, {}),  # state_dict_73.98.pth, ghostnet_1x.pth
        (
            lambda s: dict(
                state_dict={f'backbone.{k}': v for k, v in s.items()}
            ),
            {},
        ),
        (lambda s: s, dict(out_indices=(1, 9))),
        (lambda s: s, dict(fork_feat=False)),
    ],
    ids=['bare', 'detector', 'other outputs', 'classifier'],
)
def test_loads_the_originals_names(wrap, kwargs, filled, tmp_path):
    weights = filled(GOLDEN['1.0']['state_dict'])
    path = tmp_path / 'ghostnet_1x.pth'
    torch.save(wrap(weights), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = GhostNet(init_cfg=init_cfg, **kwargs)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_files_that_do_not_fit(filled, tmp_path):
    weights = filled(GOLDEN['0.5']['state_dict'])
    path = tmp_path / 'a.pth'
    torch.save(weights, path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = GhostNet(init_cfg=init_cfg)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='width 0.5.*of another shape'):
        model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    torch.save({k: v for k, v in weights.items() if '9' not in k}, path)
    model = GhostNet(0.5, init_cfg=init_cfg)
    with pytest.raises(ValueError, match=r'no GhostNet.*missing: blocks\.9'):
        model.init_weights()


def test_copies_are_equal(randomise):
    model = randomise(GhostNet(TINY)).eval()
    x = image(1, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for a, b in zip(model(x), other(x), strict=True):
            assert torch.equal(a, b)
