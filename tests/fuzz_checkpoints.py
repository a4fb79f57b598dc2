"""Fuzz the reading of checkpoints: no code, no crash, bounded memory.

The tests run a fixed number of random files, from a fixed seed. To search for
long, with the code's coverage as guide, atheris is needed beside (3.0.0 has
been tried), and an empty folder for what is found:

    pip install --no-deps --target ATHERIS atheris
    PYTHONPATH=ATHERIS python tests/fuzz_checkpoints.py --guided \
        FOUND tests/data/fuzz -max_total_time=1800 -max_len=65536 \
        -rss_limit_mb=4096

It stops at the first file that breaks a promise, and saves it; without
``--guided``, that file alone is read again. ``tests/data/fuzz`` keeps the
files of up to 4 KB that such a search found, each of which reached code, or
went round it as often, as none had before.
"""

import argparse
import io
import json
import pickle
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import types
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from mmengine.logging import HistoryBuffer, MMLogger
from safetensors.torch import save as save_safetensors
from torch import Tensor

import fasternet_det
from fasternet_det import checkpoint, history, unpickler
from fasternet_det.checkpoint import read_state_dict
from fasternet_det.unpickler import ADMITTED, load

CORPUS = Path(__file__).parent / 'data' / 'fuzz'
LONGEST_MESSAGE = 2000  # characters, with six keys
LONGEST = 10  # seconds
MEMORY = 512 << 20  # bytes, and 32 times the file: see docs/weights.md
ADDRESSES = 16 << 30  # bytes: to ask for more fails, and is a finding


# Files to begin with, as they are really written


def content():
    """All that a checkpoint of mmengine's, or another, may hold."""
    layers = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    base = torch.arange(24.0).reshape(4, 6)
    return dict(
        state_dict=layers.state_dict(),
        meta=dict(epoch=1, dataset_meta=dict(classes=('a',), ids=[[1, 2]])),
        message_hub=dict(
            log_scalars=OrderedDict(loss=HistoryBuffer([0.5, 1.5], [1, 3])),
            best=np.float64(0.25),
            array=np.arange(6.0).reshape(2, 3),
        ),
        optimizer=dict(
            state={0: dict(step=torch.tensor(3.0), exp_avg=base.t()[1:3])},
            param_groups=[dict(lr=1e-4, params=[0], betas=(0.9, 0.999))],
        ),
        plain=[None, True, b'x', -(1 << 40), 1 + 2j, {1, 2}, frozenset('a')],
        types=[torch.float64, torch.device('cpu'), torch.Size([1, 2])],
        counter=Counter('aab'),
        tensors=[
            *(nn.Parameter(base), base.half(), base[:1].expand(5, 6)),
            *(base > 3, base * 1j, base.to(torch.bfloat16)),
        ],
    )


def seeds():
    found = []
    for what in (content(), content()['state_dict'], dict(a=torch.ones(2))):
        for protocol in (2, 3, 4):
            for is_zip in (True, False):
                file = io.BytesIO()
                torch.save(
                    what,
                    file,
                    pickle_protocol=protocol,
                    _use_new_zipfile_serialization=is_zip,
                )
                found.append(file.getvalue())
    tensors = {str(i): t for i, t in enumerate(content()['tensors'][3:])}
    for what in (tensors, content()['state_dict'], dict(a=torch.ones(()))):
        found.append(save_safetensors(what))
    return found


# How they are spoilt

NAMES = [
    *ADMITTED,
    *('os.system', 'builtins.eval', 'builtins.object', 'torch.load'),
    *('torch._utils._rebuild_device_tensor_from_numpy', 'copyreg._reconst'),
]
BARE = b'().012NabdehloqRrstuQ}]\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94'
NUMBERS = (0, 1, 2, 3, 8, 255, 1 << 16, (1 << 31) - 1, -1, 1 << 40, 1 << 62)


def op_of_name(name):
    module, name = name.rsplit('.', 1)
    return f'c{module}\n{name}\n'.encode()


def op_of_text(text):
    raw = text.encode()
    return pickle.BINUNICODE + struct.pack('<I', len(raw)) + raw


def op_of_number(number):
    raw = pickle.encode_long(number)
    return pickle.LONG1 + bytes([len(raw)]) + raw


def random_op(rng):
    """One operation of a pickle, with its argument."""
    kind = rng.randrange(7)
    if kind == 0:
        return op_of_name(rng.choice(NAMES))
    if kind == 1:
        return op_of_number(rng.choice(NUMBERS))
    if kind == 2:
        return op_of_text(rng.choice(['a', '0', 'cpu', 'storage', 'f8', '']))
    if kind == 3:
        return rng.choice(
            (pickle.BINGET, pickle.BINPUT, pickle.BININT1)
        ) + bytes([rng.choice((0, 1, 2, 5, 9, 30))])
    if kind == 4:  # a length that the file does not have
        return rng.choice(
            (pickle.BINUNICODE, pickle.BINBYTES, pickle.LONG4, b'T')
        ) + struct.pack('<I', rng.choice((4, 1 << 16, 1 << 30, 0xFFFFFFFF)))
    return bytes([rng.choice(BARE)])


def random_value(rng, depth=4):
    """Operations that leave one value of any kind on the stack."""

    def several(most=4):
        return b''.join(
            random_value(rng, depth - 1) for _ in range(rng.randrange(most))
        )

    kind = rng.randrange(14) if depth else rng.randrange(6)
    if kind == 0:
        return rng.choice((b'N', b'\x88', b')', b']', b'}', b'\x8f'))
    if kind in (1, 2):
        return op_of_number(rng.choice(NUMBERS))
    if kind == 3:
        return op_of_text(rng.choice(('a', '0', 'cpu', 'f8', 'latin1', '<')))
    if kind == 4:
        return op_of_name(rng.choice(NAMES))
    if kind == 5:
        return b'h' + bytes([rng.randrange(4)])  # from the memo
    if kind == 6:
        return b'(' + several(8) + b't'
    if kind == 7:
        return b'](' + several() + b'e'
    if kind == 8:
        pairs = [
            random_value(rng, depth - 1) + random_value(rng, depth - 1)
            for _ in range(rng.randrange(3))
        ]
        return b'}(' + b''.join(pairs) + b'u'
    if kind == 9:
        return b'(' + several() + b'\x91'  # frozenset
    if kind == 10:  # a state
        return random_value(rng, depth - 1) + several(2) + b'b'
    if kind == 11:
        function = (
            op_of_name(rng.choice(NAMES))
            if rng.random() < 0.8
            else random_value(rng, depth - 1)
        )
        return function + b'(' + several(6) + b'tR'
    if kind == 12:  # a storage
        pid = [
            op_of_text('storage'),
            op_of_name(rng.choice(NAMES[:60])),
            op_of_text('0'),
            op_of_text('cpu'),
            op_of_number(rng.choice((16, 16, 8, 64))),
        ]
        if rng.random() < 0.3:
            pid[rng.randrange(5)] = random_value(rng, depth - 1)
        return b'(' + b''.join(pid) + b'tQ'
    storage = (
        b'(' + op_of_text('storage') + op_of_name('torch.FloatStorage')
        + op_of_text('0') + op_of_text('cpu') + op_of_number(16) + b'tQ'
    )  # fmt: skip
    dims = rng.randrange(4)
    numbers = [op_of_number(rng.choice(NUMBERS)) for _ in range(2 * dims + 1)]
    return (
        op_of_name('torch._utils._rebuild_tensor_v2') + b'(' + storage
        + numbers[0] + b'(' + b''.join(numbers[1 : 1 + dims]) + b't('
        + b''.join(numbers[1 + dims :]) + b't\x89' + random_value(rng, 0)
        + b'tR'
    )  # fmt: skip


def random_pickle(rng):
    values = b''.join(
        random_value(rng) + b'q' + bytes([i]) + b'0' for i in range(4)
    )
    key, value = op_of_text('a'), random_value(rng)
    return b'\x80\x02}q\x000' + values + b'}' + key + value + b's.'


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = data[at : at + size] * rng.choice((1, 2, 100))
        elif kind == 3:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 4:
            form = rng.choice(('<H', '<I', '<Q', '>I'))
            most = (1 << 8 * struct.calcsize(form)) - 1
            raw = struct.pack(form, abs(rng.choice(NUMBERS)) & most)
            data[at : at + len(raw)] = raw
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def mutate_pickle(data, rng):
    """Spoil a pickle by whole operations."""
    kind = rng.randrange(10)
    if kind == 0:
        return mutate_bytes(data, rng)
    if kind < 4:
        return random_pickle(rng)
    starts = []
    try:
        starts.extend(at for _, _, at in pickletools.genops(data))
    except Exception:  # noqa: BLE001, S110 - up to where it is sound
        pass
    starts = starts or [0]
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])]
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(ops) + 1), rng.choice((1, 1, 2, 5, 20))
        kind = rng.randrange(6)
        if kind == 0:
            del ops[at : at + size]
        elif kind == 1:
            ops[at:at] = ops[at : at + size] * rng.choice((1, 1, 2, 200))
        elif kind == 2:
            ops.insert(at, random_op(rng))
        elif kind == 3:
            ops[at : at + 1] = [random_op(rng)]
        elif kind == 4:
            other = rng.randrange(len(ops) + 1)
            ops[at:at] = ops[other : other + size]
        else:
            ops[at : at + 1] = [random_value(rng, 2)]
    return b''.join(ops)


def mutate_zip(data, rng):
    """Spoil an entry, the way it is stored, or the directory."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        parts = {
            entry.filename: data[
                (start := entry.header_offset + 30 + sum(
                    struct.unpack_from('<HH', data, entry.header_offset + 26)
                )) : start + min(entry.file_size, len(data))
            ]
            for entry in old.infolist()
        }  # fmt: skip
    names = list(parts)
    pickled = [n for n in names if n.endswith('data.pkl')] or names
    name = rng.choice(pickled if rng.random() < 0.8 else names)
    change = mutate_pickle if name in pickled else mutate_bytes
    parts[name] = change(parts[name], rng)
    file = io.BytesIO()
    odd = rng.randrange(20)
    with zipfile.ZipFile(file, 'w') as new, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for key, part in parts.items():
            if odd == 0 and rng.random() < 0.5:
                new.writestr(key, part, zipfile.ZIP_DEFLATED)
            elif odd == 1:
                new.writestr(key, part)
                new.writestr(key, part)
            elif odd == 2 and key == name:
                new.writestr(key, bytes(1 << 24), zipfile.ZIP_DEFLATED)
            else:
                new.writestr(key, part)
        if odd in (3, 4):
            entry = rng.choice(new.filelist)
            size = abs(rng.choice(NUMBERS))
            if odd == 3:
                entry.file_size = entry.compress_size = size
            else:
                entry.header_offset = size
    return file.getvalue()


def mutate_safetensors(data, rng):
    """Spoil the header."""
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + size])
    tail = data[8 + size :]
    name = rng.choice(list(header))
    entry = header[name]
    kind = rng.randrange(7)
    if kind == 0:
        entry['shape'] = [
            abs(rng.choice(NUMBERS)) for _ in range(rng.randrange(6))
        ]
    elif kind == 1:
        entry['data_offsets'] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
    elif kind == 2:
        entry['dtype'] = rng.choice(
            ('F64', 'F16', 'BF16', 'BOOL', 'F8_E4M3', 'U64', 'C64', 'F4', '')
        )
    elif kind == 3:
        header[rng.choice(('a' * 5000, '', '__metadata__', '\x1b[2J'))] = entry
    elif kind == 4:
        header['__metadata__'] = {'a': rng.choice(('b', 1, None, {}))}
    elif kind == 5:
        header.update({f'{name}{i}': entry for i in range(200)})
    else:
        header[name] = rng.choice(([], {}, None, 3))
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, 'little') + raw + tail


def mutate_legacy(data, rng):
    """Spoil one of the five pickles in a row."""
    file, parts = io.BytesIO(data), []
    for _ in range(5):
        start = file.tell()
        for _ in pickletools.genops(file):
            pass
        parts.append(data[start : file.tell()])
    at = rng.choice((0, 1, 2, 3, 3, 3, 3, 4))
    parts[at] = mutate_pickle(parts[at], rng)
    return b''.join(parts) + data[file.tell() :]


def mutate(data, rng):
    """Make another file of one; what is no file of a kind, by bytes."""
    if rng.random() < 0.8:
        for change in (mutate_zip, mutate_legacy, mutate_safetensors):
            try:
                return change(data, rng)
            except Exception:  # noqa: BLE001, S112 - not of this kind
                continue
    return mutate_bytes(data, rng)


# What is promised

watching, seen = False, []


def watch(event, args):
    """Note whatever is more than reading the file."""
    if not watching or event in ('sys._getframe', 'builtins.id'):
        return
    if event == 'object.__setattr__' and type(args[0]) is history.History:
        return
    if event == 'open' and (args[1] in ('r', 'rb') or args[2] == 524288):
        return
    seen.append(f'{event}{args!r:.200}')


PLAIN = (type(None), bool, int, float, complex, str, bytes)
OTHERS = (torch.dtype, torch.device, torch.UntypedStorage, history.Dtype)


def check_plain(value):
    """Look at all that was read: plain data, and tensors in their bytes."""
    left, known = [value], set()
    while left:
        value = left.pop()
        kind = type(value)
        if kind in PLAIN + OTHERS or id(value) in known:
            continue
        known.add(id(value))
        if kind in (Tensor, nn.Parameter):
            check_tensor(value)
        elif kind in (np.ndarray, history.Array):
            assert value.dtype.kind in 'fi'
            value.sum()  # touches all of it
        elif kind is HistoryBuffer:
            assert set(vars(value)) == {
                '_log_history', '_count_history', 'max_length'
            }  # fmt: skip
            left.extend(value.data)
            assert type(value.max_length) is int
        elif kind in (dict, OrderedDict, Counter):
            left.extend(value)
            left.extend(dict.values(value))
            left.extend(vars(value).values() if kind is OrderedDict else ())
        elif kind in (
            *(list, tuple, set, frozenset, torch.Size),
            *(unpickler._Storage, unpickler._StorageType),
        ):
            left.extend(value)
        else:
            assert any(value is known for known in ADMITTED.values()), kind


def check_tensor(value):
    if value.is_meta or not value.numel():
        return
    size = value.element_size()
    last = value.storage_offset() + sum(
        (n - 1) * step for n, step in zip(value.shape, value.stride())
    )
    assert (last + 1) * size <= value.untyped_storage().nbytes()
    assert value.numel() * size <= MEMORY
    value.detach()[tuple(n - 1 for n in value.shape)].item()


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def starved(error):
    """Whether it was the lack of memory that ended the reading."""
    while error:
        if isinstance(error, MemoryError) or 'alloc' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check(data, path):
    """Read a file in both ways; say whether its weights were taken."""
    global watching
    Path(path).write_bytes(data)
    before, start, taken = peak(), time.process_time(), False
    seen.clear()
    for name, read, errors in (
        ('load', load, (pickle.UnpicklingError, EOFError)),
        ('read_state_dict', read_state_dict, ValueError),
    ):
        result = None
        watching = True
        try:
            result = read(path)
            taken = True
        except errors as error:
            watching, taken = False, False
            message = str(error)
            assert str(path) in message, f'{name}: no name in {message:.300}'
            assert len(message) < LONGEST_MESSAGE, f'{name}: {message:.300}'
            assert not starved(error), f'{name}: {message:.300}'
        finally:
            watching = False
        assert not seen, f'{name}: it did {seen}'
        check_plain(result)
    took, grew = time.process_time() - start, peak() - before
    assert took < LONGEST, f'it took {took} s'
    assert grew < MEMORY + 32 * len(data), f'it took {grew >> 20} MiB'
    return taken


def prepare():
    """Let nothing be imported or logged for the first time later."""
    warnings.simplefilter('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    path = str(Path(tempfile.mkdtemp()) / 'a.pth')
    sys.addaudithook(watch)
    for data in [*seeds(), b'', b'<html>']:
        try:
            check(data, path)
        except AssertionError:
            check(data, path)
    return path


def guided(argv):
    """Let libFuzzer choose, by the code's coverage."""
    import atheris

    path = prepare()
    for owner in (
        *(unpickler, history, checkpoint, unpickler._Unpickler),
        *(unpickler._Bounded, history.History, history.Array),
        *(pickle._Unpickler, pickle._Unframer, zipfile, zipfile.ZipFile),
    ):
        for value in list(vars(owner).values()):
            module = getattr(value, '__module__', '')
            if isinstance(value, types.FunctionType) and (
                module in ('pickle', 'zipfile')
                or module.startswith(fasternet_det.__name__)
            ):
                atheris.instrument_func(value)

    def change(data, most, seed):
        rng = random.Random(seed)
        if rng.random() < 0.1:
            return atheris.Mutate(data, most)
        return mutate(data, rng)[:most]

    atheris.Setup(argv, lambda data: check(data, path), custom_mutator=change)
    atheris.Fuzz()


def main():
    if '--guided' in sys.argv:
        sys.argv.remove('--guided')
        return guided(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('files', type=Path, nargs='*', help='to be read')
    parser.add_argument('--count', type=int, default=0, help='random files')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    path = prepare()
    for file in args.files:
        check(file.read_bytes(), path)
    rng = random.Random(args.seed)
    pool = seeds() + [f.read_bytes() for f in sorted(CORPUS.glob('*'))]
    taken = 0
    broken = Counter()
    for i in range(args.count):
        data = mutate(rng.choice(pool), rng)
        try:
            taken += check(data, path)
        except Exception as error:  # noqa: BLE001 - to go on
            frames = traceback.extract_tb(error.__traceback__)
            where = [f'{Path(f.filename).name}:{f.lineno}' for f in frames]
            broken[f'{" ".join(where[-3:])} {error!r:.150}'] += 1
            Path(tempfile.gettempdir(), f'broken-{i}').write_bytes(data)
    for what, count in broken.most_common(40):
        sys.stdout.write(f'{count} {what}\n')
    sys.stdout.write(f'{args.count} files, {taken} with weights\n')
    sys.exit(bool(broken))


if __name__ == '__main__':
    main()
