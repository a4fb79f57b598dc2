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
import threading
from contextlib import contextmanager
from typing import Any, Iterator, Tuple, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import digit_version

STATISTICS = ('min', 'max', 'current', 'mean')


class _Dtype:
    """Stands for ``numpy.dtype``: a float or an integer of plain layout."""

    def __init__(self, name: str, *_: bool) -> None:
        if type(name) is not str or name not in ('f4', 'f8', 'i4', 'i8'):
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


def _scalar(dtype: _Dtype, data: bytes) -> Union[float, int]:
    """Stands for numpy's function of that name."""
    if type(dtype) is not _Dtype or type(data) is not bytes:
        raise pickle.UnpicklingError('a numpy scalar of objects is refused')
    return np.frombuffer(data, dtype.name, count=1).item()


class _History(HistoryBuffer):
    """Stands for HistoryBuffer until its state is known to be plain."""

    def __init__(self, *args: Any) -> None:
        raise pickle.UnpicklingError('a call of HistoryBuffer is refused')

    def __setstate__(self, state: dict) -> None:
        logs, counts = state['_log_history'], state['_count_history']
        if type(logs) is not _Array or type(counts) is not _Array:
            raise pickle.UnpicklingError('a history of objects is refused')
        self.__class__ = HistoryBuffer
        HistoryBuffer.__init__(
            self, logs.tolist(), counts.tolist(), int(state['max_length'])
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


_LOCK = threading.RLock()  # what torch allows is one list for all threads


def _is_rival(allowed: Any) -> bool:
    """Whether what somebody else allowed has the name of a stand-in."""
    if isinstance(allowed, tuple):
        return allowed[1] in STAND_INS
    return f'{allowed.__module__}.{allowed.__qualname__}' in STAND_INS


def _replace(old: list, new: list) -> None:
    """Take entries from what torch allows, and add others."""
    kept = [
        item
        for item in torch.serialization.get_safe_globals()
        if item not in old
    ]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(kept + new)


@contextmanager
def mmengine_history() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read mmengine's history.

    The stand-ins take precedence over what else is allowed by their names.
    torch < 2.6 cannot bind names; there, such files stay refused.
    """
    if digit_version(torch.__version__) < digit_version('2.6'):
        yield
        return
    stand_ins = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    with _LOCK:
        rivals = [
            item
            for item in torch.serialization.get_safe_globals()
            if _is_rival(item)
        ]
        _replace(rivals, stand_ins)
        try:
            yield
        finally:
            _replace(stand_ins, rivals)


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """Load a file as mmengine's loader of that name does, its history too.

    Args:
        filename (str): Local path; ``~`` is the home folder.
        map_location (Any): See ``torch.load``. Defaults to None.

    Returns:
        dict: What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        pickle.UnpicklingError: If it would need code to be executed.
    """
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
        CheckpointLoader.register_scheme('', load_from_local, force=True)
