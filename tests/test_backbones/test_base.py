"""What holds for each backbone."""

import copy
import pickle

import pytest
import torch
from fill import fill_input
from mmengine.logging import MMLogger

from fasternet_det import FasterNet, GGhostRegNet, GhostNet, SlotResNet

TINY = dict(embed_dim=8, depths=(1, 1, 2, 1), act_cfg=dict(type='ReLU'))
GHOST = dict(depths=(2, 3, 4, 2), widths=(8, 16, 24, 32), group_width=8)


def image(*shape, seed=0):
    return torch.from_numpy(fill_input(seed, shape))


@pytest.fixture(params=[FasterNet, GGhostRegNet, GhostNet])
def build(request):
    """Build a small backbone of each kind."""
    arch = {FasterNet: TINY, GGhostRegNet: GHOST, GhostNet: 0.25}

    def make(**kwargs):
        return request.param(arch[request.param], **kwargs)

    return make


@pytest.fixture
def log(monkeypatch):
    """The warnings that are logged."""
    messages = []
    monkeypatch.setattr(
        MMLogger, 'warning', lambda self, text: messages.append(text)
    )
    return messages


@pytest.fixture
def weights(build, filled):
    """An ImageNet file's weights."""
    shapes = {
        k: v.shape for k, v in build(fork_feat=False).state_dict().items()
    }
    return filled(shapes)


def pretrained(path, **kwargs):
    return dict(type='Pretrained', checkpoint=str(path), **kwargs)


def test_second_initialisation_keeps_what_was_trained(
    build, weights, tmp_path
):
    torch.save(weights, tmp_path / 'a.pth')
    for init_cfg in (pretrained(tmp_path / 'a.pth'), None):
        model = build(init_cfg=init_cfg)
        model.init_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        trained = copy.deepcopy(model.state_dict())
        model.init_weights()
        for name, value in model.state_dict().items():
            assert torch.equal(value, trained[name]), name


def test_average_on_request(build, weights, tmp_path):
    average = {k: v + 1 for k, v in weights.items()}
    both = dict(state_dict=weights, state_dict_ema=average)
    torch.save(both, tmp_path / 'a.pth')
    for ema, want in ((False, weights), (True, average)):
        model = build(init_cfg=pretrained(tmp_path / 'a.pth', ema=ema))
        model.init_weights()
        for name, value in model.state_dict().items():
            if name in want:
                assert torch.equal(value, want[name]), name


@pytest.mark.parametrize('in_channels', [1, 2, 4])
def test_adapted_stem(build, in_channels, weights, tmp_path, monkeypatch):
    """Outputs are those of the RGB model's own stem, fed by hand."""
    news = []
    monkeypatch.setattr(MMLogger, 'info', lambda self, text: news.append(text))
    torch.save(weights, tmp_path / 'a.pth')
    rgb = build(init_cfg=pretrained(tmp_path / 'a.pth'))
    rgb.init_weights()
    adapted = build(
        in_channels=in_channels,
        init_cfg=pretrained(tmp_path / 'a.pth', stem='adapt'),
    )
    adapted.init_weights()
    assert any(f'to {in_channels} channels' in line for line in news)
    x = image(2, in_channels, 64, 64)
    # What an extra channel adds to R, G and B alike is its part of the mean.
    if in_channels == 4:
        like = (x[:, :3] + x[:, 3:] / 3) * (3 / 4)
    else:
        like = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    for a, b in zip(adapted.eval()(x), rgb.eval()(like), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.std() > 0.1
    refused = build(
        in_channels=in_channels, init_cfg=pretrained(tmp_path / 'a.pth')
    )
    with pytest.raises(ValueError, match='of another shape'):
        refused.init_weights()


def train_forward(model, *shape):
    return model.train()(image(*(shape or (2, 3, 64, 64))))


@pytest.mark.parametrize(
    'kwargs, named',
    [
        (dict(norm_eval=True), 'norm_eval=True'),
        (dict(norm_eval=False, frozen_stages=1), 'frozen_stages=1'),
        (dict(norm_eval=True, frozen_stages=0), 'True and frozen_stages=0'),
    ],
)
def test_frozen_norms_without_weights(
    build, kwargs, named, weights, tmp_path, log
):
    model = build(**kwargs)
    model.init_weights()
    model.eval()(image(1, 3, 64, 64))
    with torch.no_grad():
        train_forward(model)
    assert not log
    train_forward(model)
    assert len(log) == 1
    assert named in log[0] and 'want of pretrained weights' in log[0]
    train_forward(model)
    train_forward(copy.deepcopy(model))
    assert len(log) == 1  # once

    # by init_cfg, by a detector's load_from, by statistics of some batches
    torch.save(weights, tmp_path / 'a.pth')
    own = build(**kwargs, init_cfg=pretrained(tmp_path / 'a.pth'))
    own.init_weights()
    loaded = build(**kwargs)
    loaded.load_state_dict(weights, strict=False)
    log.clear()
    for model in (own, loaded, pickle.loads(pickle.dumps(own))):
        train_forward(model)
    # Detectron's files: statistics are folded into the affine part
    folded = build(**kwargs)
    for name, value in folded.state_dict().items():
        if name.endswith('bias'):
            value.fill_(0.5)
    train_forward(folded)
    centred = build(**kwargs)
    for name, value in centred.state_dict().items():
        if name.endswith('running_var'):
            value.fill_(2)
    train_forward(centred)
    with torch.device('meta'):  # without values, nothing can be said
        build(**kwargs).train()(torch.empty(2, 3, 64, 64))
    train_forward(build(norm_eval=False))  # nothing is frozen
    train_forward(build(**kwargs, norm_cfg=dict(type='GN', num_groups=1)))
    assert not log


def test_frozen_norms_of_plugins(randomise, log):
    """Weights of a plain ResNet leave the new norms as they are."""
    model = SlotResNet(18, dcn=dict(type='SPConv'), stage_with_dcn=(True,) * 4)
    state = randomise(SlotResNet(18)).state_dict()
    model.load_state_dict(
        {k: v for k, v in state.items() if k in model.state_dict()},
        strict=False,
    )
    for _ in range(2):
        model.train()
        model(image(1, 3, 64, 64))
    assert len(log) == 1 and 'norm_eval=True' in log[0]
    log.clear()
    for silent in (
        randomise(copy.deepcopy(SlotResNet(18))),
        SlotResNet(18, norm_eval=False),
    ):
        silent.train()
        silent(image(1, 3, 64, 64))
    assert not log


def test_one_value_per_channel():
    """What torch says of a tensor is said of the input, with a way out."""
    named = r'\(1, 3, 32, 32\).*two images or more.*norm_eval=True'
    with pytest.raises(ValueError, match='FasterNet.*' + named):
        train_forward(FasterNet(TINY), 1, 3, 32, 32)
    named = r'\(1, 3, 64, 64\).*two images or more'
    with pytest.raises(ValueError, match='GGhostRegNet.*' + named):
        train_forward(GGhostRegNet(GHOST, norm_eval=False), 1, 3, 64, 64)
    group = dict(type='GN', num_groups=1)
    for model, side in (
        (FasterNet(TINY), 64),
        (FasterNet(TINY, norm_eval=True), 32),
        (FasterNet(TINY, norm_cfg=group), 32),
        (FasterNet(TINY, out_indices=(0, 2, 4)), 32),
        (GGhostRegNet(GHOST), 32),
    ):
        train_forward(model, 1, 3, side, side)
    assert FasterNet(TINY).eval()(image(1, 3, 32, 32))[3].shape[2:] == (1, 1)

    def broken(x):
        raise ValueError('another one')

    model = FasterNet(TINY)
    model._forward = broken
    with pytest.raises(ValueError, match='^another one$'):
        model(image(1, 3, 32, 32))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('with_cp', [False, True])
def test_symbolic_trace(build, training, with_cp, randomise):
    model = randomise(build(with_cp=with_cp)).train(training)
    traced = torch.fx.symbolic_trace(model)
    for shape in ((2, 3, 64, 64), (3, 3, 70, 95)):
        x = image(*shape)
        for a, b in zip(traced(x), copy.deepcopy(model)(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(
    not hasattr(torch.jit, 'trace'), reason='this torch has no torch.jit.trace'
)
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.filterwarnings('error::torch.jit.TracerWarning')
def test_jit_trace(build, with_cp, randomise):
    model = randomise(build(with_cp=with_cp)).eval()
    traced = torch.jit.trace(model, image(2, 3, 64, 64))
    x = image(3, 3, 70, 95)
    for a, b in zip(traced(x), model(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.deploy
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('with_cp', [False, True])
def test_export(build, training, with_cp, randomise):
    model = randomise(build(with_cp=with_cp)).train(training)
    x = image(2, 3, 64, 64)
    program = torch.export.export(copy.deepcopy(model), (x,))
    outs = program.module()(x)
    for a, b in zip(outs, model(x), strict=True):
        torch.testing.assert_close(a, b)
