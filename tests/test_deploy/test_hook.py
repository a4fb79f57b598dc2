from types import SimpleNamespace

import pytest
import torch
from mmdet.models import DetTTAModel
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
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


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('wrap', WRAPPERS)
def test_wrapped_models(wrap, dtype, process_group):
    torch.manual_seed(0)
    model = FasterNet('t0').eval()
    wrapper = wrap(model)
    runner = SimpleNamespace(model=wrapper)
    OptimizeHook(dtype).before_test(runner)
    assert runner.model is wrapper
    while not isinstance(wrapper, FasterNet):
        wrapper = wrapper.module
    kinds = {type(module) for module in wrapper.modules()}
    assert {FusedConv2d, InPlaceBlock} <= kinds
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        maps = wrapper(x)
        by_name = wrapper(x=x)
    tolerance = 1e-5 if dtype == 'float32' else 0.05
    for a, b, c in zip(maps, by_name, expected, strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert torch.equal(a, b)
        assert (a - c).abs().max() <= tolerance * c.abs().max()
