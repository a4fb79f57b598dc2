"""The training history in mmengine's checkpoints, read safely.

Its Runner saves HistoryBuffers of numpy arrays, and numpy scalars, which
torch >= 2.6 refuses (mmengine issue 1655). Admitting numpy's own functions
would trust a file with them: they take a forged dtype, which reads memory at
any address. So what a file names is bound to the stand-ins below, which build
plain numbers and nothing else.
"""

import pickle
from typing import Any, Tuple, Union

import numpy as np
from mmengine.logging import HistoryBuffer

STATISTICS = ('min', 'max', 'current', 'mean')


def shown(value: Any, most: int = 100) -> str:
    """Show what a file holds in a message.

    Args:
        value (Any): Of which texts and numbers are shown; a container may
            nest so that its ``repr`` never ends.
        most (int): Characters before it is cut. Defaults to 100.

    Returns:
        str: One line, without quotes.
    """
    if not isinstance(value, (str, int)):
        return f'a {type(value).__name__}'
    text = repr(value)[1:-1] if isinstance(value, str) else str(value)
    return text if len(text) <= most else f'{text[:most]}...'


class Dtype:
    """Stands for ``numpy.dtype``: a float or an integer of plain layout."""

    def __init__(self, name: str, *_: bool) -> None:
        if type(name) is not str or name not in ('f4', 'f8', 'i4', 'i8'):
            raise pickle.UnpicklingError(
                f'numpy dtype {shown(name)} is refused'
            )
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        if state != (3, '<', None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError('another dtype state is refused')


class Array(np.ndarray):
    """Stands for ``numpy.ndarray``."""

    def __new__(cls, *args: Any) -> 'Array':
        """Make an empty array; ``args`` would be memory as it was left."""
        if args:
            raise pickle.UnpicklingError('a call of numpy.ndarray is refused')
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        # A second state would free memory that a tensor may share by then.
        if 'is_set' in self.__dict__:
            raise pickle.UnpicklingError('a second array state is refused')
        self.is_set = True
        # Each item of a tensor would take memory.
        if not isinstance(state, tuple):
            raise pickle.UnpicklingError('another array state is refused')
        version, shape, dtype, fortran, data = state
        if type(dtype) is not Dtype or type(data) is not bytes:
            raise pickle.UnpicklingError('a numpy array of objects is refused')
        super().__setstate__(
            (version, shape, np.dtype(dtype.name), fortran, data)
        )

    def __reduce__(self) -> Tuple[Any, ...]:
        return self.view(np.ndarray).__reduce__()


def _reconstruct(kind: type, *_: Any) -> Array:
    """Stands for numpy's function of that name."""
    if kind is not Array:
        raise pickle.UnpicklingError('a numpy array of that kind is refused')
    return Array()


def _no_bytes(*args: Any) -> bytes:
    """Stands for ``bytes``, the data of an empty array."""
    if args:
        raise pickle.UnpicklingError('a call of bytes is refused')
    return b''


def _scalar(dtype: Dtype, data: bytes) -> Union[float, int]:
    """Stands for numpy's function of that name."""
    if type(dtype) is not Dtype or type(data) is not bytes:
        raise pickle.UnpicklingError('a numpy scalar of objects is refused')
    return np.frombuffer(data, dtype.name, count=1).item()


class History(HistoryBuffer):
    """Stands for HistoryBuffer until its state is known to be plain."""

    def __init__(self, *args: Any) -> None:
        raise pickle.UnpicklingError('a call of HistoryBuffer is refused')

    def __setstate__(self, state: dict) -> None:
        logs, counts = state['_log_history'], state['_count_history']
        if type(logs) is not Array or type(counts) is not Array:
            raise pickle.UnpicklingError('a history of objects is refused')
        if logs.ndim != 1 or logs.shape != counts.shape:
            raise pickle.UnpicklingError('a history of odd shape is refused')
        self.__class__ = HistoryBuffer
        HistoryBuffer.__init__(self, max_length=int(state['max_length']))
        # No copies: a small file could ask for many of one large array.
        self._log_history = logs.view(np.ndarray)
        self._count_history = counts.view(np.ndarray)


def _getattr(owner: type, name: str) -> str:
    """Stands for ``getattr``, which yields a HistoryBuffer's methods.

    ``History`` has no use for them, so a file gets no function to call.
    """
    if owner is not History or name not in STATISTICS:
        raise pickle.UnpicklingError(f'getattr of {shown(name)} is refused')
    return name


STAND_INS = {
    'builtins.bytes': _no_bytes,
    'builtins.getattr': _getattr,
    'mmengine.logging.history_buffer.HistoryBuffer': History,
    'numpy.dtype': Dtype,
    'numpy.ndarray': Array,
    # as numpy 1 and numpy 2 spell them
    'numpy.core.multiarray._reconstruct': _reconstruct,
    'numpy._core.multiarray._reconstruct': _reconstruct,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy._core.multiarray.scalar': _scalar,
}
