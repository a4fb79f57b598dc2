from types import SimpleNamespace

import pytest
import torch
from mmdet.models import DetTTAModel
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from mmengine.runner import get_priority
from torch import distributed, nn

from fasternet_det import FasterNet
from fasternet_det.deploy.hook import OptimizeHook
from fasternet_det.deploy.operators import FusedConv2d, InPlaceBlock


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def tta(model):
    model.test_step = None  # the wrapper asks for one
    return DetTTAModel(tta_cfg=None, module=model)


WRAPPERS = [
    MMDistributedDataParallel,
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    ExponentialMovingAverage,
    tta,
    lambda model: MMDistributedDataParallel(tta(model)),
]


def unwrapped(model):
    while not isinstance(model, FasterNet):
        model = model.module
    return model


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('wrap', WRAPPERS)
def test_wrapped_models(wrap, dtype, process_group):
    torch.manual_seed(0)
    wrapper = wrap(FasterNet('t0').eval())
    model = unwrapped(wrapper)
    runner = SimpleNamespace(model=wrapper)
    hook = OptimizeHook(dtype)
    hook.before_test_epoch(runner)
    assert runner.model is wrapper
    fast = unwrapped(wrapper)
    kinds = {type(module) for module in fast.modules()}
    assert {FusedConv2d, InPlaceBlock} <= kinds
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        maps = fast(x)
        by_name = fast(x=x)
    tolerance = 1e-5 if dtype == 'float32' else 0.05
    for a, b, c in zip(maps, by_name, expected, strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert torch.equal(a, b)
        assert (a - c).abs().max() <= tolerance * c.abs().max()
    hook.after_test_epoch(runner, {})
    assert runner.model is wrapper and unwrapped(wrapper) is model


@torch.no_grad()
def test_averaged_weights_are_tested():
    """EMAHook swaps them in before an epoch, and out after it."""
    model = FasterNet('t0').eval()
    runner = SimpleNamespace(model=model)
    x = torch.randn(1, 3, 64, 64)
    hooks = [OptimizeHook(), EMAHook()]
    hooks.sort(key=lambda hook: get_priority(hook.priority))  # as the runner
    average = hooks[0]
    average.before_run(runner)
    for parameter in average.ema_model.parameters():
        parameter.mul_(1.1)
    raw, averaged = model(x), average.ema_model(x)
    assert not torch.allclose(raw[0], averaged[0])
    for _ in range(2):
        for hook in hooks:
            hook.before_test_epoch(runner)
        torch.testing.assert_close(runner.model(x), averaged)
        for hook in hooks:
            hook.after_test_epoch(runner, {})
        assert torch.equal(runner.model(x)[0], raw[0])
    assert runner.model is model
