import subprocess
import sys

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


def test_import_on_old_torch():
    """torch has custom_op from 2.4 on."""
    code = (
        'import mmdet.models, torch.distributed.tensor; '  # these use it
        'import torch.library as t; vars(t).pop("custom_op", None); '
        'torch.__version__ = "2.1.2"; '
        'from fasternet_det.deploy import fold, optimize; '
        'import fasternet_det.deploy.decode'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True
    )
    message = 'RuntimeError: fasternet_det.deploy.decode needs torch 2.6 or'
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('version', ['2.6.0+cpu', '2.6.0a0', '2.15.0'])
def test_later_torch(version, monkeypatch):
    monkeypatch.setattr(torch, '__version__', version)
    check_torch('optimize')
