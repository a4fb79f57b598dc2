"""Let torch load the training history in mmengine's checkpoints, safely.

torch >= 2.6 loads with ``weights_only=True`` and refuses what mmengine's
Runner saves (mmengine issue 1655): HistoryBuffers of numpy arrays, and numpy
scalars. Allowing numpy's own functions would trust a file with them: they
take a forged dtype, which reads memory at any address. So what a file names is
bound to the stand-ins below, which build plain numbers and nothing else.
"""

import pickle
from typing import Any, Callable, Tuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version

STATISTICS = ('min', 'max', 'current', 'mean')


class _Dtype:
    """Stands for ``numpy.dtype``: a float or an integer of plain layout."""

    def __init__(self, name: str, *_: bool) -> None:
        if name not in ('f4', 'f8', 'i8'):
            raise pickle.UnpicklingError(f'numpy dtype {name!r} is refused')
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        if state != (3, '<', None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError(f'dtype state {state!r} is refused')


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray``."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, data = state
        if type(dtype) is not _Dtype or type(data) is not bytes:
            raise pickle.UnpicklingError('a numpy array of objects is refused')
        super().__setstate__(
            (version, shape, np.dtype(dtype.name), fortran, data)
        )

    def __reduce__(self) -> Tuple[Any, ...]:
        return self.view(np.ndarray).__reduce__()


def _reconstruct(kind: type, *_: Any) -> _Array:
    """Stands for numpy's function of that name."""
    if kind is not _Array:
        raise pickle.UnpicklingError(f'a numpy array as {kind!r} is refused')
    return _Array(0)


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    """Stands for numpy's function of that name."""
    if type(dtype) is not _Dtype or type(data) is not bytes:
        raise pickle.UnpicklingError('a numpy scalar of objects is refused')
    return np.frombuffer(data, dtype.name, count=1)[0]


class _History(HistoryBuffer):
    """Stands for HistoryBuffer until its state is known to be plain."""

    def __setstate__(self, state: dict) -> None:
        self.__class__ = HistoryBuffer
        HistoryBuffer.__init__(
            self,
            *(
                state[key].tolist()
                for key in ('_log_history', '_count_history')
            ),
            max_length=int(state['max_length']),
        )


def _getattr(owner: type, name: str) -> Callable:
    """Stands for ``getattr``, which yields a HistoryBuffer's methods."""
    if owner not in (HistoryBuffer, _History) or name not in STATISTICS:
        raise pickle.UnpicklingError(f'getattr({owner}, {name!r}) is refused')
    return getattr(HistoryBuffer, name)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` accept mmengine's checkpoints.

    With it, testing, resuming and inference work on torch >= 2.6; earlier
    versions load everything by default and are left alone.
    """
    if digit_version(torch.__version__) < digit_version('2.6'):
        return
    torch.serialization.add_safe_globals(
        [
            (_getattr, 'builtins.getattr'),
            (_History, 'mmengine.logging.history_buffer.HistoryBuffer'),
            (_Dtype, 'numpy.dtype'),
            (_Array, 'numpy.ndarray'),
            # as numpy 1 and numpy 2 spell them
            (_reconstruct, 'numpy.core.multiarray._reconstruct'),
            (_reconstruct, 'numpy._core.multiarray._reconstruct'),
            (_scalar, 'numpy.core.multiarray.scalar'),
            (_scalar, 'numpy._core.multiarray.scalar'),
        ]
    )
