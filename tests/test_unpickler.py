"""Our reader gives what torch.load gives, and nothing that it should not."""

import copy
import io
import os
import pickle
import re
import sys
import types
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmdet.registry import MODELS
from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner import checkpoint
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint
from safetensors.torch import save_file

from fasternet_det import SlotResNet
from fasternet_det.unpickler import (
    ROOM,
    _rebuild_tensor,
    _Storage,
    _Unpickler,
    load,
)

BASE = torch.arange(24.0).reshape(4, 6)
RECONSTRUCT = np.empty(0).__reduce__()[0]


class Call:
    """Pickles to a call, and to a state set on its result."""

    def __init__(self, function, *args, state=None):
        self.reduced = function, args, state

    def __reduce__(self):
        return self.reduced[: 2 if self.reduced[2] is None else 3]


def saved(content, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    file.seek(0)
    return file


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    'tensor',
    [
        BASE,
        BASE.t(),
        BASE[1:3, ::2],
        BASE[0, 0],
        BASE[:0],
        torch.empty(0),
        BASE[:1].expand(5, 6),
        nn.Parameter(BASE),
        nn.Parameter(BASE, requires_grad=False),
        BASE.clone().requires_grad_(),
        BASE.bfloat16(),
        BASE.half(),
        BASE.to(torch.complex64) * 1j,
        BASE > 3,
        BASE.to(torch.uint8),
        BASE.long(),
    ],
    ids=lambda t: f'{t.dtype}-{tuple(t.shape)}-{t.stride()}',
)
def test_tensors_as_by_torch(tensor, legacy):
    file = saved(tensor, legacy)
    theirs = torch.load(file, weights_only=True)
    ours = load(file)
    assert type(ours) is type(theirs) and ours.dtype == theirs.dtype
    assert ours.requires_grad == theirs.requires_grad
    assert ours.stride() == theirs.stride()
    assert ours.storage_offset() == theirs.storage_offset()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('legacy', [False, True])
def test_containers(legacy, protocol):
    content = dict(
        a=[1, 2.5, None, True, -(1 << 40)],
        b=(b'x', 'y', (), (1, 2, 3, 4)),
        c=OrderedDict(z=1, y=2),
        d=Counter('aab'),
        e={1, 2},
        f=torch.float64,
        g=torch.Size([1, 2]),
        h=torch.device('cpu'),
        i=1 + 2j,
    )
    file = io.BytesIO()
    torch.save(
        content,
        file,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    back = load(file)
    assert back == content
    assert list(map(type, back.values())) == list(map(type, content.values()))


@pytest.mark.parametrize('legacy', [False, True])
def test_tied_tensors_stay_tied(legacy):
    back = load(saved(dict(a=BASE, b=BASE[1]), legacy))
    back['a'][1, 0] = 99
    assert back['b'][0] == 99


def test_metadata_of_a_state_dict():
    state_dict = nn.BatchNorm2d(2).state_dict()
    assert load(saved(state_dict))._metadata == state_dict._metadata


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    'map_location',
    [
        None,
        'cpu',
        'meta',
        torch.device('cpu'),
        {'cpu': 'meta'},
        lambda storage, location: storage,
    ],
)
def test_map_location(map_location, legacy):
    file = saved(BASE, legacy)
    file.seek(0)
    expected = torch.load(file, map_location, weights_only=True).device
    assert load(file, map_location).device == expected


def rebuild(*args):
    return Call(torch._utils._rebuild_tensor_v2, *args)


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    'layout',
    [
        (0, (25,), (1,)),
        (1, (24,), (1,)),
        (0, (2,), (24,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (1 << 62, 1 << 62), (0, 0)),
        (0.5, (2,), (1,)),
    ],
)
def test_a_tensor_stays_in_its_bytes(layout, legacy):
    forged = rebuild(BASE.storage(), *layout, False, OrderedDict())
    with pytest.raises(pickle.UnpicklingError, match='layout|reaches over'):
        load(saved(forged, legacy))


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    'forged',
    [
        Call(eval, '1'),
        Call(getattr, dict, 'fromkeys'),
        Call(torch.set_num_threads, 1),
        Call(torch.Tensor, 5),  # memory as it was left
        Call(OrderedDict, state=dict(items=1)),
        Call(Counter, state=dict(items=1)),
        Call(
            torch._utils._rebuild_parameter,
            BASE,
            True,
            OrderedDict(),
            state=(BASE,),
        ),
    ],
)
def test_refused(forged, legacy):
    with pytest.raises(pickle.UnpicklingError):
        load(saved(forged, legacy))


VIEW = torch.zeros(1, dtype=torch.uint8).expand(1 << 20)  # of a byte


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    'forged',
    [
        Call(set, VIEW),
        Call(frozenset, VIEW),
        Call(Counter, VIEW),
        Call(OrderedDict, VIEW),
        Call(OrderedDict, [VIEW]),
        Call(torch.Size, VIEW),
        rebuild(BASE.storage(), 0, VIEW, (1,), False, OrderedDict()),
        rebuild(BASE.storage(), 0, (1,), VIEW, False, OrderedDict()),
        Call(
            torch._tensor._rebuild_from_type_v2,
            *(torch._utils._rebuild_tensor_v2, torch.Tensor, VIEW, {}),
        ),
        Call(RECONSTRUCT, np.ndarray, (0,), b'b', state=VIEW),
    ],
)
def test_a_tensor_is_not_taken_apart(forged, legacy):
    """Each of its items would take 600 bytes, of the one that a file holds."""
    with pytest.raises(pickle.UnpicklingError, match='tuple is exp|array sta'):
        load(saved(forged, legacy))


def test_items_go_into_containers_alone():
    """A tensor or an array has setters too."""
    size = b'ctorch\nSize\n(K\x01tR'
    for raw in (b'K\x01K\x02s.', b'(K\x01K\x02u.', b'K\x01a.', b'(K\x01e.'):
        with pytest.raises(pickle.UnpicklingError, match='items of a'):
            _Unpickler(io.BytesIO(b'N' + raw), None).load()
    refuses('int is refused where a tuple is expected', size, b'.')
    refuses('dict is refused where a tuple is expected', b'}Q.')


@pytest.mark.parametrize(
    'raw',
    [
        b'\x82\x01.',  # EXT1: the extension registry
        b'(ios\nmkdir\n.',  # INST
        b'(cos\nmkdir\no.',  # OBJ
        b'Pa\n.',  # PERSID
        b'ccollections\nOrderedDict\n)}\x92.',  # NEWOBJ_EX
        b'\x80\x04\x8c\x05torch\x8c\x0aTensor.set_\x93.',  # dotted
        b'\x80\x04\x8c\x02os\x8c\x05mkdir\x93.',
    ],
)
def test_other_ways_to_get_at_code(raw):
    with pytest.raises(pickle.UnpicklingError, match='could execute code'):
        _Unpickler(io.BytesIO(raw), None).load()


def test_newer_dtypes():
    """They have no storage class: version 3 of a tensor's pickle."""
    if not hasattr(torch, 'float8_e4m3fn') or not hasattr(torch, 'uint16'):
        pytest.skip('this torch cannot save them')
    content = [BASE.to(torch.float8_e4m3fn), BASE.to(torch.uint16).t()]
    for ours, theirs in zip(load(saved(content)), content):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        assert torch.equal(ours.float(), theirs.float())


def test_a_tensor_with_attributes_comes_without_them():
    tensor = BASE.clone()
    tensor.note = 'mine'
    loaded = load(saved(tensor))
    assert torch.equal(loaded, BASE) and not hasattr(loaded, 'note')
    rebuild = torch._tensor._rebuild_from_type_v2
    forged = Call(rebuild, OrderedDict, torch.Tensor, (), {})
    with pytest.raises(pickle.UnpicklingError, match='a tensor subclass'):
        load(saved(forged))


def test_storages_that_overlap():
    """A small file could fill the memory with them."""
    tensors = [torch.full((4096,), float(i)) for i in range(9)]
    file = io.BytesIO()
    with zipfile.ZipFile(saved(tensors)) as old:
        with zipfile.ZipFile(file, 'w') as new:
            for name in ('archive/data.pkl', 'archive/data/0'):
                new.writestr(name, old.read(name))
            for i in range(1, 9):  # entries of the directory alone
                entry = copy.copy(new.getinfo('archive/data/0'))
                entry.filename = f'archive/data/{i}'
                new.filelist.append(entry)
    with pytest.raises(EOFError, match='its storages overlap'):
        load(file)


def rewritten(change, compress=zipfile.ZIP_STORED):
    """The file of a tensor, each entry passed through ``change``."""
    file = io.BytesIO()
    with zipfile.ZipFile(saved(BASE)) as old:
        with zipfile.ZipFile(file, 'w', compress) as new:
            for name in old.namelist():
                new.writestr(name, change(name, old.read(name)))
    return file


def test_rewritten_file_loads():
    assert torch.equal(load(rewritten(lambda name, raw: raw)), BASE)


@pytest.mark.parametrize(
    'file, message',
    [
        (
            lambda: rewritten(lambda n, raw: raw, zipfile.ZIP_DEFLATED),
            'compressed',
        ),
        (
            lambda: rewritten(
                lambda n, raw: raw[:-4] if n.endswith('data/0') else raw
            ),
            'of another size',
        ),
        (
            lambda: rewritten(
                lambda n, raw: b'big' if 'byteorder' in n else raw
            ),
            'big-endian',
        ),
        (lambda: io.BytesIO(b'ustar' * 300), 'neither'),
    ],
)
def test_other_files(file, message):
    with pytest.raises(EOFError, match=message):
        load(file())


def test_torchscript(tmp_path):
    path = tmp_path / 'a.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/constants.pkl', b'')
        archive.writestr('a/data.pkl', b'')
    with pytest.raises(pickle.UnpicklingError, match='TorchScript'):
        load(path)


@pytest.fixture
def addresses(server, tmp_path, monkeypatch):
    """An address by every scheme of mmengine's, all of one served file."""
    url, _ = server
    source = tmp_path / 'www' / 'a.pth'

    class Petrel(LocalBackend):
        def get(self, filepath):
            return source.read_bytes()

    class Model:
        name = 'a.pth'

        @staticmethod
        def download(path):
            with open(path, 'wb') as file:
                file.write(source.read_bytes())

    register_backend('petrel', Petrel, force=True)
    monkeypatch.setattr(
        checkpoint, 'get_file_backend', lambda *args, **kwargs: Petrel()
    )
    pavi = types.ModuleType('pavi')
    pavi.modelcloud = types.SimpleNamespace(get=lambda path: Model)
    monkeypatch.setitem(sys.modules, 'pavi', pavi)
    for name in ('torchvision', 'external', 'mmcls'):
        monkeypatch.setattr(
            checkpoint,
            f'get_{name}_models',
            lambda: dict(a=f'{url}/a.pth'),
        )
    monkeypatch.setattr(
        CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes)
    )
    CheckpointLoader.register_scheme(  # one that came after us
        'late://', lambda name, map_location: torch.load(source)
    )
    return {'': str(source), 'http://': f'{url}/a.pth'}


SCHEMES = [*CheckpointLoader._schemes, 'late://']


@pytest.mark.parametrize('scheme', SCHEMES)
def test_no_scheme_of_mmengine_runs_code(scheme, addresses, tmp_path):
    address = re.sub(r'\(.*\)\?', '', scheme) + 'a'
    if scheme == 'https://':  # the loader of http
        assert (
            CheckpointLoader._schemes[scheme]
            is CheckpointLoader._schemes['http://']
        )
        address = addresses['http://']
    address = addresses.get(scheme, address)
    path, trace = tmp_path / 'www' / 'a.pth', tmp_path / 'trace'
    content = {'backbone.a': BASE}
    torch.save(dict(content, b=Call(os.mkdir, str(trace))), path)
    with pytest.raises(pickle.UnpicklingError, match='mkdir'):
        _load_checkpoint(address)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # so the file was a working bomb
    for cached in (tmp_path / 'hub').rglob('*.pth'):
        cached.unlink()
    torch.save(content, path)
    back = _load_checkpoint(address)
    back = back.get('state_dict', back)
    assert torch.equal(next(iter(back.values())), BASE)


def test_no_model_runs_code_from_a_url(server, tmp_path):
    trace = tmp_path / 'trace'
    torch.save(dict(b=Call(os.mkdir, str(trace))), tmp_path / 'www' / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=f'{server[0]}/a.pth')
    for model in (
        SlotResNet(18, init_cfg=init_cfg),
        MODELS.build(dict(type='ResNet', depth=18, init_cfg=init_cfg)),
    ):
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            model.init_weights()
        assert not trace.exists()


def test_safetensors_by_mmengine(tmp_path):
    save_file(dict(a=BASE), tmp_path / 'a.safetensors')
    back = _load_checkpoint(str(tmp_path / 'a.safetensors'))
    assert torch.equal(back['a'], BASE)


def read(*ops, room=ROOM):
    return _Unpickler(io.BytesIO(b''.join(ops)), None, room).load()


def refuses(match, *ops, **room):
    with pytest.raises(pickle.UnpicklingError, match=match) as info:
        read(*ops, **room)
    assert len(str(info.value)) < 1000


@pytest.mark.parametrize('legacy', [False, True])
def test_a_small_file_cannot_declare_a_terabyte(legacy):
    """By strides of 0: whoever copied the tensor would need it all."""
    file = saved(torch.ones(1).expand(1 << 38), legacy)
    assert file.getbuffer().nbytes < 2000
    with pytest.raises(pickle.UnpicklingError, match='more than 256 MiB'):
        load(file)
    parts = [torch.ones(1).expand(1 << 24) for _ in range(5)]
    with pytest.raises(pickle.UnpicklingError, match='more than 256 MiB'):
        load(saved(parts, legacy))
    assert load(saved(parts[:3], legacy))[0].shape == (1 << 24,)


def test_a_large_file_may_unpack_to_more():
    """Tied weights count as often as they stand there."""
    base = torch.ones(1 << 22)  # 16 MiB, and 20 views of it
    views = load(saved([base[i:] for i in range(20)]))
    assert len(views) == 20 and views[19].numel() == (1 << 22) - 19


@pytest.mark.parametrize(
    'ops',
    [
        # bytes, again and again, of one text
        (
            *(b'](c_codecs\nencode\n', b'X\x00\x00\x01\x00', b'a' * (1 << 16)),
            *(b'X\x06\x00\x00\x00latin1\x86', b'\x94R'),
            b'c_codecs\nencode\nh\x00R' * 20,
        ),
        # sets, of one list
        (
            b'](cbuiltins\nset\n](',
            b''.join(b'M' + i.to_bytes(2, 'little') for i in range(999)),
            b'e\x85\x94R',
            b'cbuiltins\nset\nh\x00R' * 40,
        ),
        (b'](', b'\x8f' * (1 << 13)),  # empty sets
        (b'](', b'\x94'.join([b'N'] * (1 << 13))),  # the memo
    ],
)
def test_memory_is_bounded(ops):
    assert sum(map(len, ops)) < 1 << 17
    refuses('more than 1 MiB', *ops, b'e.', room=1 << 20)


@pytest.mark.parametrize(
    'ops',
    [
        b'}))\x85Ns.',
        b'}()\x85Nu.',
        b'\x8f()\x85\x90.',
        b'()\x85\x91.',
        b'cbuiltins\nset\n]()\x85e\x85R.',
        b'cbuiltins\nfrozenset\n]()\x85e\x85R.',
        b'ccollections\nCounter\n]()\x85e\x85R.',
        b'ccollections\nOrderedDict\n](](()t(tee\x85R.',
    ],
)
def test_tuples_are_no_keys(ops):
    """The hash of one nested a million times crashed Python."""
    if ops.startswith(b'}))'):
        ops = ops.replace(b'}))', b'})', 1)
    refuses('a tuple as a key', ops)


def test_ordered_dicts_of_python_2():
    made = read(
        b'ccollections\nOrderedDict\n](](K\x01K\x02e](K\x03K\x04ee\x85R.'
    )
    assert type(made) is OrderedDict and made == {1: 2, 3: 4}


def test_integers_are_short():
    """Python refuses to print those of 4300 digits, in a message too."""
    refuses('opcode', b'\x8b\x00\x00\x10\x00', bytes(1 << 20), b'.')
    file = saved(BASE)
    with zipfile.ZipFile(file) as old:
        raw = old.read('archive/data.pkl')
    at = raw.index(b'K\x00', 30)  # the offset
    forged = raw[:at] + b'I0x' + b'f' * 5000 + b'\n' + raw[at + 2 :]
    file = rewritten(lambda name, raw: forged if 'pkl' in name else raw)
    with pytest.raises(pickle.UnpicklingError, match="opcode b'f'"):
        load(file)


def test_what_is_made_is_not_called():
    """A device of torch 2.1 can be called, and makes functions."""
    refuses('a call of', b'ctorch\ndevice\nX\x03\x00\x00\x00cpu\x85R)R.')


def test_a_refused_value_is_not_shown():
    """By ``repr``, nested lists would take as long as the file likes."""
    deep = b')' + b'\x94' + b''.join(
        b'h%c' % i * 2 + b'\x86\x94' for i in range(60)
    )  # fmt: skip
    for raw in (
        deep + b')R.',
        b'(' + deep + b'NNNNtQ.',
        b'c_codecs\nencode\nX\x00\x00\x00\x00' + deep + b'\x86R.',
        b'cnumpy\ndtype\n' + deep + b'\x85R.',
        b'cbuiltins\ngetattr\nN' + deep + b'\x86R.',
    ):
        refuses('refused|more than tensors', raw)
    long = b'X\x00\x00\x10\x00' + b'a' * (1 << 20)
    refuses('aaa', long, long, b'\x93.')


def test_odd_tensors():
    size = (1,) * 65
    forged = rebuild(BASE.storage(), 0, size, size, False, OrderedDict())
    with pytest.raises(pickle.UnpicklingError, match='layout'):
        load(saved(forged))  # torch computes on no more than 64
    storage = _Storage(BASE.untyped_storage(), None)
    with pytest.raises(pickle.UnpicklingError, match='quantized'):
        _rebuild_tensor(storage, 0, (2,), (1,), dtype=torch.quint8)
    forged = rebuild(BASE, 0, (0,), (1,), False, OrderedDict())
    with pytest.raises(pickle.UnpicklingError, match='without a storage'):
        load(saved(forged))


@pytest.mark.parametrize('legacy', [False, True])
def test_every_error_is_one_of_two_and_names_the_file(legacy, tmp_path):
    path = tmp_path / 'a.pth'
    raw = saved(dict(a=BASE), legacy).getvalue()
    at = raw.index(b'ctorch._utils')
    path.write_bytes(raw[:at] + b'0' * 13 + raw[at + 13 :])
    with pytest.raises(EOFError, match='a.pth: it cannot be .*IndexError'):
        load(path)
    with pytest.raises(EOFError, match='^it cannot be read'):
        load(io.BytesIO(path.read_bytes()))
    torch.save(dict(a=Call(eval, '1')), path)
    with pytest.raises(pickle.UnpicklingError, match='a.pth: it holds more'):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / 'b.pth')
