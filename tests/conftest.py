import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / 'data'
sys.path.insert(0, str(DATA))

from fill import fill_array  # noqa: E402

import fasternet_det  # noqa: E402, F401


@pytest.fixture(scope='session')
def golden():
    """The original's names, shapes and outputs by arch."""
    return json.loads((DATA / 'fasternet.json').read_text())


@pytest.fixture(scope='session')
def timm_keys():
    """timm's names and shapes by arch."""
    return json.loads((DATA / 'timm_keys.json').read_text())


@pytest.fixture(scope='session')
def filled():
    """Make the reference weights of given names and shapes."""

    def fill(shapes, names=lambda name: name):
        return {
            name: torch.from_numpy(
                np.asarray(fill_array(names(name), tuple(shape)))
            )
            for name, shape in shapes.items()
        }

    return fill


@pytest.fixture
def randomise():
    """Randomise all parameters and BatchNorm statistics of a module."""

    def fill(module):
        module.load_state_dict(
            {
                name: torch.from_numpy(
                    np.asarray(fill_array(name, tuple(value.shape)))
                )
                for name, value in module.state_dict().items()
            }
        )
        return module

    return fill
