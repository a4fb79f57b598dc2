"""Let mmengine load its own checkpoints on torch >= 2.6, safely.

torch >= 2.6 loads with ``weights_only=True`` and refuses what mmengine's
Runner saves (mmengine issue 1655): HistoryBuffers of numpy arrays, and numpy
scalars. Allowing numpy's own functions would trust a file with them: they
take a forged dtype, which reads memory at any address. So what a file names is
bound to the stand-ins below, which build plain numbers and nothing else, and
only while a checkpoint loads: no other ``torch.load`` is affected.
"""

import os.path as osp
import pickle
from contextlib import contextmanager
from typing import Any, Iterator, Tuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import digit_version

STATISTICS = ('min', 'max', 'current', 'mean')


class _Dtype:
    """Stands for ``numpy.dtype``: a float or an integer of plain layout."""

    def __init__(self, name: str, *_: bool) -> None:
        if type(name) is not str or name not in ('f4', 'f8', 'i8'):
            raise pickle.UnpicklingError(f'numpy dtype {name!r} is refused')
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        if state != (3, '<', None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError(f'dtype state {state!r} is refused')


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray``."""

    def __new__(cls, *args: Any) -> '_Array':
        if args:  # would be memory as it was left
            raise pickle.UnpicklingError('a call of numpy.ndarray is refused')
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        # A second state would free memory that a tensor may share by then.
        if 'is_set' in self.__dict__:
            raise pickle.UnpicklingError('a second array state is refused')
        self.is_set = True
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
    return _Array()


def _no_bytes(*args: Any) -> bytes:
    """Stands for ``bytes``, the data of an empty array."""
    if args:
        raise pickle.UnpicklingError('a call of bytes is refused')
    return b''


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


def _getattr(owner: type, name: str) -> str:
    """Stands for ``getattr``, which yields a HistoryBuffer's methods.

    ``_History`` has no use for them, so a file gets no function to call.
    """
    if owner is not _History or name not in STATISTICS:
        raise pickle.UnpicklingError(f'getattr({owner}, {name!r}) is refused')
    return name


STAND_INS = {
    'builtins.bytes': _no_bytes,
    'builtins.getattr': _getattr,
    'mmengine.logging.history_buffer.HistoryBuffer': _History,
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _Array,
    # as numpy 1 and numpy 2 spell them
    'numpy.core.multiarray._reconstruct': _reconstruct,
    'numpy._core.multiarray._reconstruct': _reconstruct,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy._core.multiarray.scalar': _scalar,
}


def _name(allowed: Any) -> str:
    """What torch calls a safe global."""
    if isinstance(allowed, tuple):
        return allowed[1]
    return f'{allowed.__module__}.{allowed.__qualname__}'


@contextmanager
def mmengine_history() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read mmengine's history.

    The stand-ins take precedence over what else is allowed by their names.
    torch < 2.6 cannot bind names; there, such files stay refused.
    """
    if digit_version(torch.__version__) < digit_version('2.6'):
        yield
        return
    serialization = torch.serialization
    allowed = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    serialization.add_safe_globals(
        [item for item in allowed if _name(item) not in STAND_INS]
        + [(stand_in, name) for name, stand_in in STAND_INS.items()]
    )
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(allowed)


def _load_from_local(filename: str, map_location: Any = None) -> dict:
    """What mmengine's loader of that name does, with its history allowed."""
    filename = osp.expanduser(filename)
    if not osp.isfile(filename):
        raise FileNotFoundError(f'{filename} can not be found.')
    with mmengine_history():
        return torch.load(
            filename, map_location=map_location, weights_only=True
        )


def allow_mmengine_checkpoints() -> None:
    """Make mmengine's testing, resuming and inference work on torch >= 2.6.

    Earlier versions load everything by default, and are left alone.
    """
    if digit_version(torch.__version__) >= digit_version('2.6'):
        CheckpointLoader.register_scheme('', _load_from_local, force=True)
