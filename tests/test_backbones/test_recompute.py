"""That saving memory changes nothing but memory."""

import copy

import pytest
import torch
from fill import fill_input
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fasternet_det import FasterNet, GGhostRegNet
from fasternet_det.backbones.fasternet import FasterNetBlock, PartialConv
from fasternet_det.backbones.recompute import ACTIVATIONS, lean_mlp

RELU = dict(type='ReLU', inplace=True)
TINY = dict(embed_dim=8, depths=(1, 1, 2, 1), act_cfg=RELU)
GHOST = dict(depths=(2, 3, 4, 2), widths=(8, 16, 24, 32), group_width=8)
ACT_CFGS = [
    RELU,
    dict(type='ReLU', inplace=False),
    dict(type='GELU'),
    dict(type='SiLU', inplace=True),
    dict(type='LeakyReLU', inplace=True),
    dict(type='HSwish', inplace=True),
]


def image(*shape, seed=0):
    return torch.from_numpy(fill_input(seed, shape))


class PlainBlock(FasterNetBlock):
    """The block as it is published, all of it stored for the gradients."""

    def forward(self, x):
        mixing = self.spatial_mixing
        x1, x2 = x.split((mixing.dim_conv3, mixing.dim_untouched), dim=1)
        mixed = torch.cat((mixing.partial_conv3(x1), x2), dim=1)
        return x + self.drop_path(self.mlp(mixed))


def plain(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, FasterNetBlock):
            module.__class__ = PlainBlock
        elif hasattr(module, 'with_cp'):
            module.with_cp = False
    return model


@pytest.fixture(params=['default', 'fasternet with_cp', 'ghost with_cp'])
def saving(request, randomise):
    """A backbone that recomputes, in train mode, by each of our ways."""
    if 'ghost' in request.param:
        model = GGhostRegNet(GHOST, norm_eval=False, with_cp=True)
    else:
        with_cp = 'with_cp' in request.param
        model = FasterNet(TINY, drop_path_rate=0.3, with_cp=with_cp)
    return randomise(model).train()


def same_twins(model, use, x=None):
    """Use a model and its plain twin alike; all that comes out is equal."""
    results = []
    for twin in (model, plain(model)):
        torch.manual_seed(0)
        result = use(twin, image(4, 3, 64, 64) if x is None else x)
        gradients = [p.grad for p in twin.parameters()]
        results.append((result, gradients, twin.state_dict()))
    (a, grads, state), (b, plain_grads, plain_state) = results
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)
    assert any(g is not None and g.any() for g in grads)
    for name, value in state.items():
        assert torch.equal(value, plain_state[name]), name


def loss(model, x):
    return sum(out.pow(3).mean() for out in model(x))


def test_one_backward(saving):
    same_twins(saving, lambda model, x: loss(model, x).backward())


def test_two_backwards_through_one_graph(saving):
    def use(model, x):
        value = loss(model, x)
        value.backward(retain_graph=True)
        value.backward()

    same_twins(saving, use)


def test_gradients_task_by_task(saving):
    """As GradNorm and PCGrad take them, also of just some parameters."""

    def use(model, x):
        outs = model(x)
        parameters = [p for p in model.parameters() if p.dim() == 4]
        last = [p for n, p in model.named_parameters() if 'mlp.3' in n]
        tasks = [out.pow(2).mean() for out in outs]
        grads = [
            torch.autograd.grad(
                task, some, retain_graph=True, allow_unused=True
            )
            for task in tasks
            for some in (last or parameters, parameters)
        ]
        sum(tasks).backward()
        return grads

    same_twins(saving, use)


def test_gradient_of_a_gradient(saving):
    """The norm of the gradients is in the loss, as in gradient penalties."""

    def use(model, x):
        value = loss(model, x)
        grads = torch.autograd.grad(
            value, list(model.parameters()), create_graph=True
        )
        (value + sum(g.square().sum() for g in grads)).backward()

    same_twins(saving.double(), use, image(4, 3, 64, 64).double())


@pytest.mark.parametrize('act_cfg', ACT_CFGS, ids=lambda cfg: cfg['type'])
@pytest.mark.parametrize('training', [True, False])
def test_second_derivatives(act_cfg, training, randomise):
    block = FasterNetBlock(4, 2, 2, 0, 0, dict(type='BN'), act_cfg, False)
    randomise(block).double().train(training)
    x = image(2, 4, 2, 2).double().requires_grad_()
    weights = [p for p in block.parameters() if p.dim() == 4]

    def run(x, *weights):
        return block(x)

    assert torch.autograd.gradgradcheck(run, (x, *weights), fast_mode=True)


@pytest.mark.parametrize('act_cfg', ACT_CFGS, ids=lambda cfg: cfg['type'])
@pytest.mark.parametrize('norm_eval', [False, True])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_activations(act_cfg, norm_eval, layout, randomise):
    model = FasterNet(TINY, act_cfg=act_cfg, norm_eval=norm_eval)
    randomise(model).train()
    formats = dict(
        contiguous=torch.contiguous_format, channels_last=torch.channels_last
    )
    x = image(4, 3, 64, 64).contiguous(memory_format=formats[layout])
    same_twins(model, lambda m, x: loss(m, x).backward(), x)


def test_norms_without_running_statistics(randomise):
    """Even in eval mode, they take those of the batch."""
    norm_cfg = dict(type='BN', track_running_stats=False)
    model = randomise(FasterNet(TINY, norm_cfg=norm_cfg)).eval()
    same_twins(model, lambda m, x: loss(m, x).backward())


@pytest.mark.parametrize('before', [True, False])
def test_mode_between_forward_and_backward(saving, before):
    """Gradients are those of the mode in which the outputs were made."""

    def use(model, x):
        model.train(before)
        value = loss(model, x)
        model.train(not before)
        value.backward()
        return [m.training for m in model.modules()]

    same_twins(saving, use)


@pytest.mark.parametrize('train_last', [True, False])
def test_step_between_backwards(train_last, randomise):
    """Of the convolution behind, gradients need no weights that change."""
    model = randomise(FasterNet(TINY)).train(train_last)

    def use(model, x):
        value = loss(model, x)
        block = model.stages[6].blocks[0]
        with torch.no_grad():
            for tensor in (
                *block.mlp[1].parameters(),
                *block.mlp[1].buffers(),
            ):
                tensor.add_(1)
        return torch.autograd.grad(value, block.mlp[3].weight)

    same = []
    for twin in (model, plain(model)):
        same += use(twin, image(4, 3, 64, 64))
    assert same[0].any() and torch.equal(*same)


@pytest.mark.parametrize('twin', [lambda model: model, plain])
@pytest.mark.parametrize(
    'change',
    [
        lambda block: block.mlp[1].weight,
        lambda block: block.mlp[3].weight,
        lambda block: block.maps[0],
    ],
    ids=['norm', 'weight', 'map'],
)
def test_changes_in_place_are_refused(twin, change, randomise):
    """As without saving memory, and with the words of torch."""
    model = twin(randomise(FasterNet(TINY)).train())
    block = model.stages[4].blocks[0]
    block.maps = []
    block.mlp[0].register_forward_hook(lambda m, x, y: block.maps.append(y))
    value = loss(model, image(4, 3, 64, 64))
    with torch.no_grad():
        change(block).add_(1)
    message = 'modified by an inplace operation.*expected version'
    with pytest.raises(RuntimeError, match=message):
        value.backward()


def test_map_changed_in_place_is_not_recomputed_from(randomise):
    """Though the norm, which would notice, is not asked for a gradient."""
    block = FasterNetBlock(8, 2, 4, 0, 0, dict(type='BN'), RELU, False)
    maps = []
    block.mlp[0].register_forward_hook(lambda m, x, y: maps.append(y))
    out = randomise(block)(image(2, 8, 4, 4))
    with torch.no_grad():
        maps[0].add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace'):
        torch.autograd.grad(out.sum(), block.mlp[3].weight)


def test_hooks_fire_once_and_may_replace(randomise):
    """Hooks of each kind on each module, the activations' doubled."""
    calls, counts = [], []

    def use(model, x):
        handles = []
        calls.clear()
        for name, module in model.named_modules():
            if name.endswith(('mlp', 'mlp.1', 'mlp.2', 'mlp.3')):
                handles += [
                    module.register_forward_pre_hook(
                        lambda m, x, n=name: calls.append((n, 'pre'))
                    ),
                    module.register_forward_hook(
                        lambda m, x, y, n=name: (
                            calls.append((n, 'post'))
                            or (2 * y if n.endswith('2') else None)
                        )
                    ),
                    module.register_full_backward_hook(
                        lambda m, x, y, n=name: calls.append((n, 'back'))
                    ),
                ]
        loss(model, x).backward()
        counts.append(sorted(calls))

    # Not in place: full backward hooks do not go with that.
    model = randomise(FasterNet(TINY, act_cfg=dict(type='GELU'))).train()
    same_twins(model, use)
    assert counts[0] == counts[1]
    assert len(calls) == len(set(calls)) == 3 * 4 * 5


@pytest.mark.parametrize(
    'position, in_place',  # GELU's own input must not change
    [(1, False), (2, False), (3, False), (2, True), (3, True)],
)
def test_hook_that_changes_a_map(position, in_place, randomise):
    """It is seen by the convolution behind, so that is what counts."""
    model = randomise(FasterNet(TINY, act_cfg=dict(type='GELU'))).train()

    def change(module, inputs, output=None):
        map = inputs[0] if output is None else output
        return map.mul_(2) if in_place else map * 2

    def use(model, x):
        for module in model.modules():
            if isinstance(module, FasterNetBlock):
                hooked = module.mlp[position]
                if position == 3:
                    hooked.register_forward_pre_hook(change)
                else:
                    hooked.register_forward_hook(change)
        loss(model, x).backward()

    same_twins(model, use)


def test_hook_on_all_modules(randomise):
    model = randomise(FasterNet(TINY)).train()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, x, y: 2 * y if isinstance(m, torch.nn.BatchNorm2d) else None
    )
    try:
        same_twins(model, lambda m, x: loss(m, x).backward())
    finally:
        handle.remove()


def test_autocast(saving):
    """In bfloat16, with backward passes outside and inside."""
    for inside in (False, True):

        def use(model, x, inside=inside):
            with torch.autocast('cpu', torch.bfloat16):
                value = sum(out.float().pow(2).mean() for out in model(x))
                if inside:
                    value.backward()
            if not inside:
                value.backward()

        same_twins(copy.deepcopy(saving), use)


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_inside_other_checkpoints(saving, use_reentrant):
    """As Runner's activation_checkpointing wraps them."""

    def use(model, x):
        for stage in model._stages():
            stage.forward = lambda x, f=stage.forward: checkpoint(
                f, x, use_reentrant=use_reentrant
            )
        loss(model.train(), x.clone().requires_grad_()).backward()
        return [p.grad for p in model.parameters()]

    grads = []
    for twin in (saving, plain(saving)):
        torch.manual_seed(0)
        grads.append(use(twin, image(4, 3, 64, 64)))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_others_save_tensors(saving):
    """Such as ``save_on_cpu``, which then gets all that there is."""
    counts = []

    def use(model, x):
        counts.append(0)

        def pack(tensor):
            counts[-1] += 1
            return tensor.detach().clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = loss(model, x)
        value.backward()

    same_twins(saving, use)
    is_checkpoint = any(getattr(m, 'with_cp', False) for m in saving.modules())
    if hasattr(torch._C._autograd, '_top_saved_tensors_default_hooks'):
        assert counts[0] == counts[1] or is_checkpoint


def test_torch_func(saving):
    """Gradients of each image by vmap, as a loop over images takes them."""
    saving.double().eval()
    parameters = dict(saving.named_parameters())

    def value(parameters, x):
        return loss(
            lambda x: torch.func.functional_call(saving, parameters, x),
            x[None],
        )

    x = image(2, 3, 64, 64).double()
    each = torch.func.vmap(torch.func.grad(value), (None, 0))(parameters, x)
    one = torch.func.grad(value)(parameters, x[1])
    loss(saving, x[1:]).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(one[name], parameter.grad)
        torch.testing.assert_close(each[name][1], parameter.grad)
        assert parameter.grad.any()
    outs = torch.func.vmap(lambda x: saving(x[None]))(x)
    for a, b in zip(outs, saving(x), strict=True):
        torch.testing.assert_close(a[:, 0], b)


def test_compiled_training(saving):
    """A step of training is that of eager mode, each batch counted once."""
    if not hasattr(torch.compiler, 'is_compiling'):
        pytest.skip('torch.compile is supported from torch 2.3 on')
    eager = copy.deepcopy(saving)
    for module in (saving, eager):
        for layer in module.modules():
            if hasattr(layer, 'drop_prob'):
                layer.drop_prob = 0.0  # compilers draw other random numbers
    compiled = torch.compile(saving, backend='aot_eager', fullgraph=True)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.01) for m in (saving, eager)
    ]
    for step in range(2):
        x = image(4, 3, 64, 64, seed=step)
        for model, optimizer in zip((compiled, eager), optimizers):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
    state = eager.state_dict()
    for name, value in saving.state_dict().items():
        torch.testing.assert_close(
            value, state[name], rtol=1e-4, atol=1e-5, msg=name
        )
    for a, b in zip(saving.parameters(), eager.parameters()):
        assert b.grad.any()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


class Allocations(TorchDispatchMode):
    """Keep book of the memory that operators hand out."""

    def __init__(self, *others):
        super().__init__()
        self.others = {t.untyped_storage()._cdata for t in others}
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.others:
                    reference = StorageWeakRef(storage), storage.nbytes()
                    self.storages[storage._cdata] = reference
        return out

    def alive(self):
        return sum(n for ref, n in self.storages.values() if not ref.expired())


def kept(model):
    """Bytes that are alive between a forward and a backward pass."""
    with Allocations(*model.state_dict().values()) as allocations:
        outs = model.train()(image(1, 3, 128, 128))
        sizes = allocations.alive()
    assert len(outs) == 4
    value = sum(out.sum() for out in outs)
    del outs
    value.backward()
    del value
    after = allocations.alive()
    assert after == 0  # nothing waits for the garbage collector
    return sizes


@pytest.mark.parametrize('arch, most', [('t0', 0.6), ('s', 0.75)])
def test_memory_of_fasternet(arch, most, randomise):
    model = randomise(FasterNet(arch))
    everything = kept(plain(model))
    assert kept(model) < most * everything
    assert kept(randomise(FasterNet(arch, with_cp=True))) < 0.5 * everything


def test_memory_of_ghosts(randomise):
    model = randomise(GGhostRegNet('002', with_cp=True))
    assert kept(model) < 0.6 * kept(plain(model))


def test_what_is_recomputed_is_not_kept(randomise):
    model = randomise(FasterNet(TINY, act_cfg=dict(type='GELU'))).train()
    with Allocations(*model.state_dict().values()) as allocations:
        value = loss(model, image(4, 3, 64, 64))
        before = allocations.alive()
        value.backward(retain_graph=True)
        model.zero_grad()
        assert allocations.alive() == before


def test_partial_convolution_keeps_a_quarter():
    conv = PartialConv(16)
    with Allocations(*conv.parameters()) as allocations:
        x = torch.rand(1, 16, 32, 32, requires_grad=True) * 1
        out = conv(x)
        del x
        assert allocations.alive() < 2.5 * out.nbytes  # with the leaf


def test_what_is_recomputed():
    """Norms and activations that are known, and no relatives of them."""

    class Norm(torch.nn.BatchNorm2d):
        pass

    def is_recomputed(norm, act):
        conv = torch.nn.Conv2d(8, 8, 1)
        mlp = torch.nn.Sequential(conv, norm, act, torch.nn.Conv2d(8, 8, 1))
        own = [*mlp.parameters(), *mlp.buffers()]
        with Allocations(*own) as allocations:
            out = lean_mlp(mlp, image(2, 8, 32, 32))
            alive = allocations.alive()
        return alive < 3.5 * out.nbytes  # image, map and output, or more

    for act in ACTIVATIONS:
        assert is_recomputed(torch.nn.BatchNorm2d(8), act())
        assert not is_recomputed(torch.nn.SyncBatchNorm(8).eval(), act())
        assert not is_recomputed(Norm(8), act())
    for act in (torch.nn.RReLU(), torch.nn.PReLU(), torch.nn.Dropout()):
        assert not is_recomputed(torch.nn.BatchNorm2d(8), act)
