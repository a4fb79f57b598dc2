"""Reading what torch.save wrote, without running any of it.

A pickle names functions, and reading it calls them. torch's own
``weights_only=True`` is unsafe before 2.6 (CVE-2025-32434), and what it admits
is one list for all threads. Here a file gets what :data:`ADMITTED` holds, on
every torch, and nothing else: tensors, containers, plain data, and mmengine's
training history. Nor can a small file fill the memory: see :data:`ROOM`.
"""

import io
import math
import pickle
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from contextvars import ContextVar
from functools import partial, wraps
from os import PathLike
from typing import (
    Any,
    BinaryIO,
    Callable,
    Dict,
    Iterable,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

import torch
import torch.nn as nn
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.serialization import default_restore_location

from .history import STAND_INS, Array, Dtype, History, shown

MapLocation = Union[
    None, str, torch.device, Dict[str, str], Callable[[Any, str], Any]
]
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

#: A file may unpack to GROWTH times its size and ROOM bytes, counting its
#: containers, and each tensor as if it shared no memory. Else one byte would
#: stand for a terabyte, by strides of 0, or by calls on what is there already.
ROOM = 256 << 20
GROWTH = 16
OBJECT = 256  # bytes that an empty container takes, with its place in another
LONGEST_LINE = 1000  # bytes of a name or of a number in digits
MOST_DIMS = 64  # torch computes on no more


def _refuse(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(
        'it holds more than tensors and plain data '
        f'({shown(what)}), and reading '
        'it could execute code. Where you trust it, save its state dict '
        'alone, or as .safetensors'
    )


def _sequence(items: Any) -> Union[list, tuple]:
    """Pass on what takes no memory to iterate: each item of a tensor does."""
    if not isinstance(items, (list, tuple)):
        raise pickle.UnpicklingError(
            f'{type(items).__name__} is refused where a tuple is expected'
        )
    return items


class _Storage(NamedTuple):
    """The bytes of a tensor, and its dtype where the storage tells it."""

    data: torch.UntypedStorage
    dtype: Optional[torch.dtype]


class _StorageType(NamedTuple):
    """Stands for a storage class of torch's."""

    dtype: Optional[torch.dtype]  # None: untyped


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool = False,
    hooks: Any = None,
    dtype: Optional[torch.dtype] = None,
    metadata: Any = None,
) -> Tensor:
    """Stands for ``torch._utils._rebuild_tensor_v3``."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError('a tensor without a storage is refused')
    data, dtype = storage.data, dtype or storage.dtype
    sizes = (offset, *_sequence(size), *_sequence(stride))
    # Else torch would grow the storage, by memory as it was left.
    if (
        metadata
        or len(size) != len(stride)
        or len(size) > MOST_DIMS
        or any(type(n) is not int or not 0 <= n < 1 << 63 for n in sizes)
        or math.prod(size) * dtype.itemsize >= 1 << 63
    ):
        layout = ', '.join(map(shown, sizes))
        raise pickle.UnpicklingError(
            f'a tensor of layout ({shown(layout)}) is refused'
        )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if 0 not in size and (last + 1) * dtype.itemsize > data.nbytes():
        raise pickle.UnpicklingError(
            f'a tensor of shape {tuple(size)} reaches over its '
            f'{data.nbytes()} bytes'
        )
    tensor = torch.empty(0, dtype=dtype, device=data.device)
    if tensor.is_quantized:  # torch aborts on one that knows no scale
        raise pickle.UnpicklingError('a quantized tensor is refused')
    tensor.set_(data, offset, tuple(size), tuple(stride))
    return tensor.requires_grad_(bool(requires_grad))


def _rebuild_tensor_v2(
    storage: _Storage,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    """Stands for ``torch._utils._rebuild_tensor_v2``, and the first one."""
    return _rebuild_tensor(
        storage, offset, size, stride, requires_grad, metadata=metadata
    )


def _rebuild_parameter(
    data: Tensor, requires_grad: bool, hooks: Any = None, state: Any = None
) -> nn.Parameter:
    """Stands for torch's; what else hung on the parameter is left out."""
    return nn.Parameter(data, bool(requires_grad))


def _rebuild_with_attributes(
    rebuild: Callable, kind: str, args: tuple, state: Any
) -> Tensor:
    """Stands for ``torch._tensor._rebuild_from_type_v2``."""
    if rebuild not in (_rebuild_tensor, _rebuild_tensor_v2):
        raise _refuse('a tensor subclass')
    return rebuild(*_sequence(args))


def _encode(text: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode``, by which protocol 2 writes bytes."""
    if encoding != 'latin1':
        raise _refuse(f'bytes as {shown(encoding)}')
    return text.encode(encoding)


def _check_keys(keys: Iterable) -> None:
    """Refuse tuples as keys: the hash of nested ones ends late, or never."""
    if any(isinstance(key, tuple) for key in keys):
        raise pickle.UnpicklingError('a tuple as a key is refused')


def _collect(kind: type, items: Iterable = ()) -> Any:
    """Stands for a container's class."""
    if not isinstance(items, dict):  # whose keys are checked
        keys = items = _sequence(items)
        if kind is OrderedDict:
            keys = [_sequence(pair)[0] for pair in items]
        _check_keys(keys)
    return kind(items)


def _size(items: Iterable = ()) -> torch.Size:
    """Stands for ``torch.Size``."""
    return torch.Size(_sequence(items))


def _admitted() -> Dict[str, Any]:
    dtypes = {
        str(value): value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
    }
    storages = dict(
        Double=torch.float64,
        Float=torch.float32,
        Half=torch.float16,
        BFloat16=torch.bfloat16,
        Long=torch.int64,
        Int=torch.int32,
        Short=torch.int16,
        Char=torch.int8,
        Byte=torch.uint8,
        Bool=torch.bool,
        ComplexDouble=torch.complex128,
        ComplexFloat=torch.complex64,
    )
    rebuilds = dict(
        _rebuild_tensor=_rebuild_tensor_v2,
        _rebuild_tensor_v2=_rebuild_tensor_v2,
        _rebuild_tensor_v3=_rebuild_tensor,
        _rebuild_parameter=_rebuild_parameter,
        _rebuild_parameter_with_state=_rebuild_parameter,
    )
    collections = (set, frozenset, Counter, OrderedDict)
    untyped = _StorageType(None)
    return {
        **dtypes,
        **{f'torch.{k}Storage': _StorageType(v) for k, v in storages.items()},
        **{f'torch._utils.{k}': v for k, v in rebuilds.items()},
        **{
            f'{kind.__module__}.{kind.__name__}': partial(_collect, kind)
            for kind in collections
        },
        **STAND_INS,
        '_codecs.encode': _encode,
        'builtins.complex': complex,
        'torch.Size': _size,
        'torch.Tensor': 'torch.Tensor',  # names of types, not to be called
        'torch.UntypedStorage': untyped,
        'torch._tensor._rebuild_from_type_v2': _rebuild_with_attributes,
        'torch.device': torch.device,
        'torch.nn.parameter.Parameter': 'torch.nn.Parameter',
        'torch.storage.UntypedStorage': untyped,
    }


#: What a file may name, and what stands for it.
ADMITTED = _admitted()
CALLED = {id(value) for value in ADMITTED.values() if callable(value)}


class _Opcodes(dict):
    """What the unpickler does, by opcode."""

    def __missing__(self, opcode: int) -> Callable:
        raise _refuse(f'pickle opcode {bytes([opcode])!r}')


def _counted(load: Callable) -> Callable:
    """Let an opcode pay for the object that it makes."""

    def counted(self: '_Unpickler') -> None:
        self.spend(OBJECT)
        load(self)

    return counted


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, with what it can do cut down to a list.

    The one written in Python, for ``BUILD`` and ``REDUCE`` are to be closed:
    the first would set attributes of functions and classes, the second call
    whatever is found in the file.
    """

    # What torch.save writes, by every protocol. Neither extension registries,
    # nor other ways to make objects, nor integers of any length.
    dispatch = _Opcodes(
        (opcode[0], pickle._Unpickler.dispatch[opcode[0]])
        for opcode in (
            *(pickle.PROTO, pickle.MARK, pickle.STOP),
            *(pickle.POP, pickle.POP_MARK, pickle.NONE, pickle.NEWTRUE),
            *(pickle.NEWFALSE, pickle.INT, pickle.BININT),
            *(pickle.BININT1, pickle.BININT2, pickle.LONG1),
            *(pickle.BINFLOAT, pickle.BINSTRING, pickle.SHORT_BINSTRING),
            *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
            *(pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES),
            *(pickle.BINBYTES8, pickle.EMPTY_TUPLE, pickle.TUPLE),
            *(pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
            *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
            *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
            *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
            *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT),
            *(pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL),
            *(pickle.STACK_GLOBAL, pickle.BINPERSID),
        )
    )

    def __init__(
        self, file: Any, find_storage: Callable, room: int = ROOM
    ) -> None:
        super().__init__(file)
        self.find_storage = find_storage
        self.room = self.left = room

    def spend(self, count: int) -> None:
        """Count bytes that the file unpacks to."""
        self.left -= count
        if self.left < 0:
            raise pickle.UnpicklingError(
                f'it unpacks to more than {self.room >> 20} MiB, too much for '
                'its size'
            )

    def find_class(self, module: str, name: str) -> Any:
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        if path not in ADMITTED:
            raise _refuse(path)
        return ADMITTED[path]

    def persistent_load(self, pid: tuple) -> _Storage:
        kind, storage, key, location, count, *view = _sequence(pid)
        if kind != 'storage' or not isinstance(storage, _StorageType):
            raise _refuse(f'persistent id {shown(kind)}')
        if type(key) is not str or type(location) is not str:
            raise _refuse('a storage of another name')
        if view not in ([], [None]):  # as torch wrote before 0.4
            raise pickle.UnpicklingError('a view of a storage is refused')
        itemsize = storage.dtype.itemsize if storage.dtype else 1
        data = self.find_storage(key, location, int(count), itemsize)
        return _Storage(data, storage.dtype)

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or id(function) not in CALLED:
            raise _refuse(f'a call of {shown(function)}')
        made = function(*args)
        is_view = type(made) is Tensor  # takes no memory until it is copied
        self.spend(OBJECT + sys.getsizeof(made))
        self.spend(made.numel() * made.element_size() if is_view else 0)
        self.append(made)

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if kind is not History or args != ():
            raise _refuse('a new object')
        self.spend(4 * OBJECT)  # with the arrays that it will hold
        self.append(History.__new__(History))

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) in (Array, Dtype, History):
            made.__setstate__(state)
        elif type(made) is OrderedDict and state.keys() == {'_metadata'}:
            made._metadata = state['_metadata']  # of a module's state dict
        else:
            raise _refuse(f'a state of a {type(made).__name__}')

    def load_frame(self) -> None:
        self.read(8)  # its length: what it frames is read as it comes

    def load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    def _into(
        opcode: bytes, kind: type, place: Callable, keys: Optional[Callable]
    ) -> Callable:
        """Let an opcode fill a container, not a tensor or an array."""
        fill = pickle._Unpickler.dispatch[opcode[0]]

        def load(self: '_Unpickler') -> None:
            if not isinstance(place(self), kind):
                raise _refuse(f'items of a {type(place(self)).__name__}')
            if keys:
                _check_keys(keys(self))
            fill(self)

        return load

    for _opcode, _kind, _place, _keys in (
        (pickle.APPEND, list, lambda self: self.stack[-2], None),
        (pickle.APPENDS, list, lambda self: self.metastack[-1][-1], None),
        (
            *(pickle.SETITEM, dict, lambda self: self.stack[-3]),
            lambda self: self.stack[-2:-1],
        ),
        (
            *(pickle.SETITEMS, dict, lambda self: self.metastack[-1][-1]),
            lambda self: self.stack[::2],
        ),
        (
            *(pickle.ADDITEMS, set, lambda self: self.metastack[-1][-1]),
            lambda self: self.stack,
        ),
    ):
        dispatch[_opcode[0]] = _into(_opcode, _kind, _place, _keys)
    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    for _opcode in (
        *(pickle.MARK, pickle.EMPTY_LIST, pickle.EMPTY_DICT),
        *(pickle.EMPTY_SET, pickle.FROZENSET, pickle.TUPLE1, pickle.TUPLE2),
        *(pickle.TUPLE3, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    ):
        dispatch[_opcode[0]] = _counted(dispatch[_opcode[0]])


class _Bounded:
    """A file that refuses to read more than it has."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = self.left = file.seek(0, io.SEEK_END)
        self.room = ROOM + GROWTH * self.size
        file.seek(0)

    def readline(self) -> bytes:
        return self.file.readline(LONGEST_LINE)

    def read(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise EOFError('the file is cut short')
        return self.file.read(count)

    def storage(self, start: int, count: int) -> torch.UntypedStorage:
        """Copy bytes of the file into a storage."""
        if not 0 <= count <= self.size - start:
            raise EOFError('the file is cut short')
        self.left -= count
        if self.left < 0:  # a small file would fill the memory
            raise EOFError('its storages overlap')
        data = torch.empty(count, dtype=torch.uint8)
        self.file.seek(start)
        if count:
            self.file.readinto(memoryview(data.numpy()))
        return data.untyped_storage()


def load(
    file: Union[str, 'PathLike[str]', BinaryIO],
    map_location: MapLocation = None,
) -> Any:
    """Load a file of ``torch.save``, or safetensors, without running code.

    Args:
        file (str | Path | BinaryIO): A local path, or a file that can be
            sought.
        map_location (Any): See ``torch.load``. Defaults to None, where each
            tensor was saved.

    Returns:
        Any: What the file holds.

    Raises:
        pickle.UnpicklingError: If it would need code to be executed, a
            tensor does not fit its bytes, or it would unpack to more than 16
            times its size and 256 MiB.
        EOFError: If it is cut short, or not a checkpoint.
    """
    if isinstance(file, (str, PathLike)):
        with open(file, 'rb') as opened:
            try:
                return load(opened, map_location)
            except (pickle.UnpicklingError, EOFError) as error:
                raise type(error)(f'{file}: {error}') from None
    try:
        return _load(file, map_location)
    except pickle.UnpicklingError:
        raise
    except EOFError as error:
        raise EOFError(str(error) or 'the file is cut short') from None
    except Exception as error:  # a broken file breaks it in many ways
        raise EOFError(f'it cannot be read: {error!r:.400}') from error


def _load(file: BinaryIO, map_location: MapLocation) -> Any:
    source = _Bounded(file)
    head = file.read(9)
    file.seek(0)
    if head[8:] == b'{':
        return _load_safetensors(file.read(), map_location)
    if zipfile.is_zipfile(file):
        return _load_zip(source, map_location)
    if head[:1] == pickle.PROTO:
        return _load_legacy(source, map_location)
    raise EOFError('neither safetensors nor of torch.save')


def _load_safetensors(
    content: bytes, map_location: MapLocation
) -> Dict[str, Tensor]:
    return {
        key: _rebuild_tensor_v2(
            _Storage(
                _placed(value.untyped_storage(), 'cpu', map_location),
                value.dtype,
            ),
            *(0, value.shape, value.stride()),
        )
        for key, value in load_safetensors(content).items()
    }


def _load_zip(source: _Bounded, map_location: MapLocation) -> Any:
    """Load the layout of torch >= 1.6: a pickle, and a file a storage."""
    source.file.seek(0)
    with zipfile.ZipFile(source.file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    folders = {name.split('/')[0] for name in entries}
    if len(folders) != 1 or len(entries) != len(archive.infolist()):
        raise EOFError('a zip file that torch.save did not write')
    (folder,) = folders
    if f'{folder}/constants.pkl' in entries:
        raise _refuse('a TorchScript archive')
    kept: Dict[str, torch.UntypedStorage] = {}

    def locate(name: str) -> Tuple[int, int]:
        """Start and size of an entry."""
        entry = entries.get(f'{folder}/{name}')
        if entry is None:
            raise EOFError(f'{shown(name)} is missing')
        if entry.compress_type != zipfile.ZIP_STORED:
            raise EOFError(f'{shown(name)} is compressed')
        # torch may leave the checksums out, so Python's reader will not do.
        source.file.seek(entry.header_offset)
        header = struct.unpack('<26xHH', source.read(30))
        return entry.header_offset + 30 + sum(header), entry.file_size

    def read(name: str) -> bytes:
        start, size = locate(name)
        source.file.seek(start)
        return source.read(size)

    def find(
        key: str, location: str, count: int, itemsize: int
    ) -> torch.UntypedStorage:
        if key not in kept:
            start, size = locate(f'data/{key}')
            if count * itemsize != size:
                raise EOFError(f'data/{shown(key)} is of another size')
            data = source.storage(start, size)
            kept[key] = _placed(data, location, map_location)
        return kept[key]

    if f'{folder}/byteorder' in entries and read('byteorder') != b'little':
        raise EOFError('written by a big-endian machine')
    pickled = _Bounded(io.BytesIO(read('data.pkl')))
    return _Unpickler(pickled, find, source.room).load()


def _load_legacy(source: _Bounded, map_location: MapLocation) -> Any:
    """Load the layout before: five pickles, then the storages."""

    def unpickle(find: Optional[Callable] = None) -> Any:
        return _Unpickler(source, find, source.room).load()

    source.file.seek(0)
    magic, protocol, system = unpickle(), unpickle(), unpickle()
    if magic != LEGACY_MAGIC or protocol != 1001:
        raise EOFError('not of torch.save')
    if not system['little_endian']:
        raise EOFError('written by a big-endian machine')
    start = source.file.tell()
    known: Dict[str, tuple] = {}

    def note(
        key: str, location: str, count: int, itemsize: int
    ) -> torch.UntypedStorage:
        size = count * itemsize
        if not 0 <= size <= source.size:
            raise EOFError('the file is cut short')
        known[key] = location, count, size
        return torch.UntypedStorage(size, device='meta')

    # The storages come last: a first reading finds out which there are.
    unpickle(note)
    kept = {}
    for key in unpickle():
        if type(key) is not str or key not in known:
            raise EOFError(f'storage {shown(key)} is of no tensor')
        location, count, size = known[key]
        if struct.unpack('<q', source.read(8)) != (count,):
            raise EOFError(f'storage {shown(key)} is of another size')
        at = source.file.tell()
        kept[key] = _placed(source.storage(at, size), location, map_location)
    source.file.seek(start)
    return unpickle(lambda key, *_: kept[key])


def _placed(
    data: torch.UntypedStorage, location: str, map_location: MapLocation
) -> torch.UntypedStorage:
    """Move a storage where ``map_location`` says, as ``torch.load`` does."""
    if isinstance(map_location, dict):
        location = map_location.get(location, location)
    elif isinstance(map_location, (str, torch.device)):
        location = str(map_location)
    elif map_location is not None:
        placed = map_location(data, location)
        if placed is not None:
            return placed
    return default_restore_location(data, location)


_reading_for_mmengine = ContextVar('reading_for_mmengine', default=False)


def guard_mmengine() -> None:
    """Make mmengine's ``CheckpointLoader`` read by :func:`load`.

    Whatever the address and whoever registered its scheme: the loaders
    fetch a file each in their own way, then call ``torch.load``. Elsewhere,
    ``torch.load`` is as it was.
    """
    torch_load, load_checkpoint = torch.load, CheckpointLoader.load_checkpoint

    @wraps(torch_load)
    def guarded_load(
        f: Any, map_location: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if _reading_for_mmengine.get():
            return load(f, map_location)
        return torch_load(f, map_location, *args, **kwargs)

    @wraps(load_checkpoint)
    def guarded_load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        token = _reading_for_mmengine.set(True)
        try:
            return load_checkpoint(*args, **kwargs)
        finally:
            _reading_for_mmengine.reset(token)

    torch.load = guarded_load
    CheckpointLoader.load_checkpoint = staticmethod(guarded_load_checkpoint)
