import pytest
import torch

from fasternet_det import FasterNet
from fasternet_det.deploy import check_torch, fold, optimize


@pytest.mark.parametrize('version', ['2.1.2+cu121', '2.5.1', '2.5.0a0'])
def test_old_torch_is_named(version, monkeypatch):
    monkeypatch.setattr(torch, '__version__', version)
    model = FasterNet('t0').eval()
    message = f'optimize.* needs torch 2.6 or later, found {version[:5]}'
    with pytest.raises(RuntimeError, match=message):
        optimize(model)
    with pytest.raises(RuntimeError, match='export needs torch 2.6'):
        check_torch('export')
    fold(model)


@pytest.mark.parametrize('version', ['2.6.0+cpu', '2.6.0a0', '2.15.0'])
def test_later_torch(version, monkeypatch):
    monkeypatch.setattr(torch, '__version__', version)
    check_torch('optimize')
