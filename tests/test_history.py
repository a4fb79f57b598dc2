"""What mmengine saves loads; what a crafted file adds to it does not."""

import io
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import _load_checkpoint

from fasternet_det.checkpoint import read_checkpoint
from fasternet_det.unpickler import _Unpickler


class Call:
    """Pickles to a call, and to a state set on its result."""

    def __init__(self, function, *args, state=None):
        self.reduced = function, args, state

    def __reduce__(self):
        return self.reduced[: 2 if self.reduced[2] is None else 3]


def load(path, content):
    torch.save(content, path)
    return _load_checkpoint(str(path))  # mmengine's


def refused(path, content):
    with pytest.raises(pickle.UnpicklingError):
        load(path, content)
    with pytest.raises(ValueError, match='is refused'):
        read_checkpoint(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'a.pth'


RECONSTRUCT = np.empty(0).__reduce__()[0]
HISTORY = HistoryBuffer([0.5, 1.5], [1, 3], max_length=7)


def test_history(path):
    content = dict(
        loss=HISTORY,
        best=np.float64(0.25),
        last=np.float32(-2),
        step=np.int64(7),
        array=np.arange(6.0).reshape(2, 3),
        empty=HistoryBuffer(),
    )
    for _ in range(2):  # what was loaded can be saved and loaded again
        content = load(path, content)
        history = content['loss']
        assert type(history) is HistoryBuffer
        assert history.mean() == 0.5 and history.max() == 1.5
        assert history.statistics('current') == 1.5
        assert history.max_length == 7
        for array, dtype in zip(history.data, ('f8', 'i8')):
            assert type(array) is np.ndarray and array.dtype == dtype
        assert (content['best'], content['last']) == (0.25, -2)
        assert content['step'] == 7
        assert np.array_equal(content['array'], np.arange(6).reshape(2, 3))
        assert content['empty'].data[0].size == 0
    history.update(2.5)
    assert history.current() == 2.5


@pytest.mark.parametrize('core', ['core', '_core'])
def test_spelling_of_either_numpy(core, path):
    torch.save(
        dict(loss=HISTORY, best=np.float64(0.25)),
        path,
        _use_new_zipfile_serialization=False,
    )
    here = RECONSTRUCT.__module__.encode()
    assert here + b'\n' in path.read_bytes()
    other = f'numpy.{core}.multiarray\n'.encode()
    path.write_bytes(path.read_bytes().replace(here + b'\n', other))
    loaded = _load_checkpoint(str(path))
    assert loaded['loss'].mean() == 0.5 and loaded['best'] == 0.25


@pytest.mark.parametrize(
    'owner, name',
    [(HistoryBuffer, '__init__'), (HistoryBuffer, 'mro'), (dict, 'fromkeys')],
)
def test_getattr_stays_closed(owner, name, path):
    refused(path, dict(a=Call(getattr, owner, name)))


def test_methods_of_a_history_are_no_functions_to_call(path):
    """Else ``_rebuild_from_type_v2`` would run them on anything."""
    content = load(path, dict(a=Call(getattr, HistoryBuffer, 'current')))
    assert content['a'] == 'current'


def test_second_state_of_an_array():
    """A tensor may share the memory that it would free."""
    once = pickle.dumps(np.arange(4.0), 2)
    state = pickle.dumps(np.arange(9.0).__reduce__()[2], 2)
    twice = once[:-1] + state[2:-1] + b'b.'  # BUILD again, then STOP
    assert pickle.loads(twice).size == 9
    once, twice = (_Unpickler(io.BytesIO(raw), None) for raw in (once, twice))
    assert once.load().tolist() == [0, 1, 2, 3]
    with pytest.raises(pickle.UnpicklingError, match='second .* refused'):
        twice.load()


def test_nothing_else_is_affected(path):
    """Loading by torch alone is as it was."""
    load(path, dict(loss=HISTORY))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = torch.load(path, weights_only=False)
    assert type(loaded['loss']) is HistoryBuffer


FORGED = (3, '<', None, ('a',), {'a': (np.dtype('O'), 0)}, 8, 8, 0)


@pytest.mark.parametrize(
    'content',
    [
        # a float whose state makes it a record that holds pointers
        Call(np.dtype, 'f8', False, True, state=FORGED),
        Call(np.dtype, 'O', False, True),
        Call(np.dtype, 'V8', False, True),
        np.array([None]),
        np.array(['a']),
        np.array([(1, 2.0)], dtype='i8,f8'),
        Call(RECONSTRUCT, np.matrix, (0,), b'b'),
        Call(np.ndarray, (40,), 'u8'),  # memory as it was left
        Call(bytes, 9),
        Call(HistoryBuffer, (1.0,), (1,)),  # would turn objects into arrays
    ],
    ids=lambda content: repr(content)[:30],
)
def test_only_plain_numbers(content, path):
    refused(path, dict(a=content))


def test_a_history_of_objects(path):
    forged = HistoryBuffer()
    forged._log_history = [None]
    refused(path, dict(a=forged))


def test_a_history_cannot_change_the_class(path):
    forged = HistoryBuffer([0.5, 1.5], [1, 3])
    forged._statistics_methods = dict(mean='not a method', fake='neither')
    forged.update = 'not a method'
    history = load(path, dict(a=forged))['a']
    assert history.statistics('mean') == 0.5
    history.update(1)
    assert 'fake' not in HistoryBuffer._statistics_methods


def test_histories_do_not_copy_their_arrays(path):
    """A small file could ask for many copies of one array."""
    once, other = HistoryBuffer([0.5] * 1000, [1] * 1000), HistoryBuffer()
    other._log_history = once._log_history
    other._count_history = once._count_history
    content = load(path, dict(a=once, b=other))
    first, second = content['a'], content['b']
    assert np.shares_memory(first.data[0], second.data[0])
    first.update(2.5)  # which makes another array
    assert first.current() == 2.5 and second.current() == 0.5
    assert len(second.data[0]) == 1000


@pytest.mark.parametrize('logs, counts', [(np.ones(2), np.ones(3)),
                                          (np.ones((2, 2)),) * 2])  # fmt: skip
def test_a_history_of_odd_shape(logs, counts, path):
    forged = HistoryBuffer()
    forged._log_history, forged._count_history = logs, counts
    refused(path, dict(a=forged))
