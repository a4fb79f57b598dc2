"""The torch that the fast form and the exports need."""

import torch
from mmengine.utils import digit_version

MINIMUM_TORCH = '2.6'


def check_torch(what: str) -> None:
    """Refuse a torch older than what deployment was made and tested on.

    Args:
        what (str): Name of the function that needs it.

    Raises:
        RuntimeError: If torch is older than 2.6.
    """
    # 2.6.0+cpu and 2.6.0a0 of a vendor are 2.6 alike.
    found = torch.__version__.split('+')[0]
    if digit_version(found)[:2] < digit_version(MINIMUM_TORCH)[:2]:
        raise RuntimeError(
            f'{what} needs torch {MINIMUM_TORCH} or later, found {found}; '
            'fold() works on all'
        )
