"""Reading weights safely, and translating their names."""

import os
import os.path as osp
import pickle
import re
from contextlib import contextmanager
from hashlib import sha256
from typing import AbstractSet, Dict, Iterator, List, Optional, Sequence, Union
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
import torch.nn as nn
from mmengine.dist import barrier, get_rank
from mmengine.fileio import get_file_backend
from mmengine.logging import MMLogger
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor

from .history import shown
from .unpickler import load

StateDict = Dict[str, Tensor]


def _listed(keys: AbstractSet[str], most: int = 6) -> str:
    """Name some keys, and say how many there are."""
    listed = ', '.join(shown(key, 160) for key in sorted(keys)[:most])
    return listed + f', ... ({len(keys)} in all)' * (len(keys) > most)


@contextmanager
def _local_file(filename: str) -> Iterator[str]:
    """Yield a local path to a file, fetched first where it is remote."""
    scheme = urlparse(filename).scheme if '://' in filename else ''
    if scheme in ('http', 'https'):
        with _downloaded(filename) as path:
            yield path
    elif scheme == 'file':
        yield url2pathname(urlparse(filename).path)
    elif scheme:
        try:
            backend = get_file_backend(filename)
        except KeyError as error:
            raise ValueError(
                f'{filename} names the file backend {error}, which mmengine '
                'does not know; see mmengine.fileio.register_backend'
            ) from error
        with backend.get_local_path(filename) as path:
            yield path
    else:
        yield osp.expanduser(filename)


@contextmanager
def _downloaded(url: str) -> Iterator[str]:
    """Yield a path to a download, kept where torch.hub keeps its own.

    The first process downloads for all that share its disk.
    """
    # By the whole address: many a file is called model.safetensors.
    digest = sha256(url.encode()).hexdigest()[:8]
    name = f'{digest}-{osp.basename(urlparse(url).path)}'
    path = osp.join(torch.hub.get_dir(), 'checkpoints', name)
    fresh = False
    try:
        if get_rank() == 0:
            fresh = _download(url, path)
    finally:
        barrier()
    fresh = fresh or _download(url, path)
    try:
        yield path
    except ValueError:  # what cannot be read is not kept
        if fresh and osp.exists(path):
            os.remove(path)
        raise


def _download(url: str, path: str) -> bool:
    """Download a file that is not there; say whether it was not."""
    if osp.exists(path):
        return False
    os.makedirs(osp.dirname(path), exist_ok=True)
    MMLogger.get_current_instance().info(f'Downloading {url} to {path}')
    try:
        torch.hub.download_url_to_file(url, path)
    except URLError as error:
        raise FileNotFoundError(
            f'{url} cannot be downloaded ({error}): name another address or '
            'a local file'
        ) from error
    return True


def read_checkpoint(filename: str) -> dict:
    """Read a checkpoint on the CPU without executing anything it contains.

    Args:
        filename (str): A ``.safetensors`` file or one of ``torch.save``, as a
            local path, a ``file://``, ``http://`` or ``https://`` URL, or a
            URI of any mmengine file backend.

    Returns:
        dict: What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint, is cut short, or would
            need code to be executed.
    """
    filename = str(filename)
    with _local_file(filename) as path:
        if not osp.isfile(path):
            raise FileNotFoundError(f'there is no checkpoint at {filename}')
        with open(path, 'rb') as file:
            head = file.read(64)
            if head.lstrip()[:1] == b'<' and head[8:9] != b'{':
                raise ValueError(
                    f'{filename} is a web page, not a checkpoint: download '
                    'the file that the page is about'
                )
            file.seek(0)
            try:
                checkpoint = load(file, map_location='cpu')
            except pickle.UnpicklingError as error:
                raise ValueError(f'{filename} is refused: {error}') from error
            except EOFError as error:
                raise ValueError(
                    f'{filename} is no readable checkpoint: it may be cut '
                    f'short, so fetch it again. The reader says: {error}'
                ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{filename} holds a {type(checkpoint).__name__}, '
            'expected a dict of tensors'
        )
    return checkpoint


def find_pretrained(init_cfg: Union[dict, List[dict]]) -> Optional[dict]:
    """Find the ``Pretrained`` entry of an init_cfg.

    Args:
        init_cfg (dict | list[dict]): An ``init_cfg`` of mmengine's.

    Returns:
        dict | None: The entry, or None where there is none.

    Raises:
        ValueError: If an entry has no ``type``, or the ``Pretrained`` one
            does not stand alone, holds other keys than ``type``,
            ``checkpoint``, ``prefix``, ``ema`` and ``stem``, or one of these
            has a value that it cannot have.
    """
    cfgs = init_cfg if isinstance(init_cfg, list) else [init_cfg]
    for cfg in cfgs:
        if not isinstance(cfg, dict) or 'type' not in cfg:
            raise ValueError(
                f'init_cfg={init_cfg!r}: expected a dict, or a list of dicts, '
                "with a `type`, such as type='Pretrained'"
            )
    # As mmengine's own `initialize` finds it, under all its names.
    if not any(
        cfg['type'] is PretrainedInit
        or isinstance(cfg['type'], str)
        and WEIGHT_INITIALIZERS.get(cfg['type']) is PretrainedInit
        for cfg in cfgs
    ):
        return None
    optional = {'prefix', 'ema', 'stem'}
    if len(cfgs) > 1 or cfgs[0].keys() - optional != {'type', 'checkpoint'}:
        raise ValueError(
            f'init_cfg={init_cfg!r}: expected a Pretrained init_cfg '
            'to stand alone, with `checkpoint` and, optionally, `prefix`, '
            '`ema` and `stem`'
        )
    if cfgs[0].get('ema', False) not in (True, False):
        raise ValueError(
            f'init_cfg={init_cfg!r}: expected `ema` to be True, for the '
            'moving average of the weights, or False'
        )
    if cfgs[0].get('stem') not in (None, 'adapt'):
        raise ValueError(
            f"init_cfg={init_cfg!r}: expected `stem` to be 'adapt', to fit "
            "RGB weights to the image's channels, or left out"
        )
    return cfgs[0]


# Under which keys state dicts stand; the first one is taken.
PLAIN_KEYS = ('state_dict', 'model')
EMA_KEYS = ('state_dict_ema', 'ema_state_dict', 'model_ema', 'ema')
EMA_COUNTS = ('steps', 'n_averaged')  # mmengine's and torch's, beside weights


def _choose(checkpoint: dict, ema: bool, filename: str) -> dict:
    """Find the state dict in a checkpoint, that of the average on request."""
    plain, averages = (
        {k: checkpoint[k] for k in keys if isinstance(checkpoint.get(k), dict)}
        for keys in (PLAIN_KEYS, EMA_KEYS)
    )
    if ema and not averages:
        raise ValueError(
            f'{filename} holds no moving average of the weights, expected one '
            f'under {", ".join(EMA_KEYS)}: leave out `ema=True`'
        )
    exchanged = 'state_dict' in plain and 'steps' in averages.get(
        'ema_state_dict', {}
    )
    if ema and not exchanged:
        key, what = next(iter(averages)), 'the average'
    else:
        key = next(iter(plain), None)
        # mmengine's EMAHook saves the average as state_dict, and the weights
        # that it is of as ema_state_dict.
        what = 'the average' if exchanged else 'the weights themselves'
    if averages:
        MMLogger.get_current_instance().info(
            f'{filename} holds weights and their moving average: taking '
            f'{what}, from {key or "its top"}'
        )
    chosen = checkpoint if key is None else checkpoint[key]
    return {k: v for k, v in chosen.items() if k not in EMA_COUNTS}


def read_state_dict(
    filename: str, prefix: Optional[str] = None, ema: bool = False
) -> StateDict:
    """Read the state dict of one model from a checkpoint.

    The state dict may be the file itself or stand under ``state_dict`` or
    ``model``; ``module.``, ``model.`` and ``backbone.`` before the keys are
    dropped, ``_orig_mod.``, of ``torch.compile``, anywhere, and of a detector
    just the backbone is kept.

    Args:
        filename (str): See :func:`read_checkpoint`.
        prefix (str, optional): The part to keep, such as ``'backbone.'``,
            where the layout is another one. Defaults to None.
        ema (bool): Whether to take the moving average of the weights that
            the file holds beside them, as timm, torchvision and mmengine
            save it. Defaults to False.

    Returns:
        dict[str, Tensor]: Tensors by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read safely, holds no such part, or
            holds NaN or infinite values.
    """
    state_dict = _choose(read_checkpoint(filename), ema, filename)
    strangers = {
        shown(key)
        for key, value in state_dict.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    }
    if strangers or not state_dict:
        raise ValueError(
            f'{filename} holds no state dict: expected tensors by name, at '
            'its top or under `state_dict` or `model`, found '
            f'{_listed(strangers) or "nothing"}'
        )
    state_dict = {
        key.replace('_orig_mod.', ''): value
        for key, value in state_dict.items()
    }
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        kept = _under(state_dict, prefix)
        if not kept:
            tops = {key.split('.')[0] + '.' for key in state_dict}
            raise ValueError(
                f'{filename} holds no key under {prefix!r}; its '
                f'keys begin with {_listed(tops)}'
            )
        state_dict = kept
    else:
        for wrapper in ('module.', 'model.'):
            if all(key.startswith(wrapper) for key in state_dict):
                state_dict = _under(state_dict, wrapper)
        state_dict = _under(state_dict, 'backbone.') or state_dict
    try:
        broken = {k for k, v in state_dict.items() if not _is_finite(v)}
    except RuntimeError as error:  # float4, and whatever comes next
        raise ValueError(
            f'{filename} holds numbers that torch cannot look at, expected '
            f'float32, float16 and the like: {error!s:.200}'
        ) from error
    if broken:
        raise ValueError(
            f'{filename} holds NaN or infinite values in {_listed(broken)}'
        )
    return state_dict


def _is_finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return True
    if value.element_size() == 1:  # torch has it for some types of 8 bits
        value = value.float()
    return bool(value.isfinite().all())


def _under(state_dict: StateDict, prefix: str) -> StateDict:
    """The entries under a prefix, without it."""
    return {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }


def load_exactly(
    module: nn.Module,
    state_dict: StateDict,
    optional: Sequence[AbstractSet[str]] = (),
    spare: AbstractSet[str] = frozenset(),
    source: str = 'the state dict',
) -> None:
    """Load a state dict of which every key is accounted for.

    Args:
        module (nn.Module): Takes the weights; untouched when they do not fit.
        state_dict (dict[str, Tensor]): Tensors by name.
        optional (list[set[str]]): Groups of the module's keys that may be
            missing, each as a whole. Defaults to none.
        spare (set[str]): Keys that may be left over. Defaults to none.
        source (str): What the messages call the state dict.

    Raises:
        ValueError: If other keys are missing or left over, or a shape
            differs, or a tensor is complex, or integer, where floats are
            expected.
    """
    own = module.state_dict()
    missing = own.keys() - state_dict.keys()
    for group in optional:
        if group <= missing:
            missing -= group
    # torch 0.4.1 brought these; older files lack them.
    missing = {k for k in missing if not k.endswith('.num_batches_tracked')}
    unexpected = state_dict.keys() - own.keys() - spare
    misshapen = {
        f'{key} {tuple(state_dict[key].shape)} for {tuple(own[key].shape)}'
        for key in own.keys() & state_dict.keys()
        if own[key].shape != state_dict[key].shape
    }
    # Of these, torch would take a part, or levels of a quantised weight.
    unlike = {
        f'{key} {state_dict[key].dtype} for {own[key].dtype}'
        for key in own.keys() & state_dict.keys()
        if state_dict[key].is_complex()
        or own[key].is_floating_point()
        and not state_dict[key].is_floating_point()
    }
    problems = [
        f'{what}: {_listed(keys)}'
        for what, keys in (
            ('missing', missing),
            ('unexpected', unexpected),
            ('of another shape', misshapen),
            ('of another type', unlike),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f'{source} does not fit {type(module).__name__}. '
            f'{"; ".join(problems)}. Nothing was loaded.'
        )
    module.load_state_dict(
        {k: v for k, v in state_dict.items() if k in own}, strict=False
    )
    MMLogger.get_current_instance().info(
        f'{len(own.keys() & state_dict.keys())} of {len(own)} entries of '
        f'{type(module).__name__} come from {source}'
    )


def adapt_stem(state_dict: StateDict, key: str, in_channels: int) -> StateDict:
    """Fit the weights of an RGB stem to images of other channels.

    One channel gets the sum over RGB, as if the grey image came three times.
    Of more, the first three keep the weights of RGB and the others get their
    mean; of two, both get the mean. The whole is scaled by
    3 / ``in_channels``, so that the response to equal channels stays.

    Args:
        state_dict (dict[str, Tensor]): Tensors by name.
        key (str): Name of the stem's weight, of shape (C, 3, kH, kW).
        in_channels (int): Channels of the image.

    Returns:
        dict[str, Tensor]: The state dict, with a weight of shape
        (C, in_channels, kH, kW) where it held RGB's.
    """
    weight = state_dict.get(key)
    if weight is None or weight.dim() != 4 or weight.shape[1] != 3:
        return state_dict
    if in_channels == 3:
        return state_dict
    mean = weight.mean(1, keepdim=True)
    kept = weight[:, :3] if in_channels > 3 else weight[:, :0]
    others = mean.expand(-1, in_channels - kept.shape[1], -1, -1)
    adapted = torch.cat((kept, others), dim=1) * (3 / in_channels)
    MMLogger.get_current_instance().info(
        f'{key}: weights of RGB fitted to {in_channels} channels'
    )
    return {**state_dict, key: adapted}


def fasternet_from_timm(state_dict: StateDict) -> StateDict:
    """Rename timm's FasterNet entries to the original's.

    timm keeps a stage's merging layer inside the stage, so its stages count
    0, 1, 2, 3 where the original's count 0, 2, 4, 6. A state dict in the
    original's layout comes back as it is.

    Args:
        state_dict (dict[str, Tensor]): Tensors by timm's or by the original's
            names.

    Returns:
        dict[str, Tensor]: The same tensors by the original's names.
    """
    if not is_timm_fasternet(state_dict):
        return state_dict

    def rename(key: str) -> str:
        key = re.sub(
            r'^stages\.(\d)\.blocks\.',
            lambda m: f'stages.{2 * int(m[1])}.blocks.',
            key,
        )
        key = re.sub(
            r'^stages\.(\d)\.downsample\.',
            lambda m: f'stages.{2 * int(m[1]) - 1}.',
            key,
        )
        key = re.sub(r'^conv_head\.', 'avgpool_pre_head.1.', key)
        return re.sub(r'^classifier\.', 'head.', key)

    return {rename(key): value for key, value in state_dict.items()}


def fasternet_to_timm(state_dict: StateDict) -> StateDict:
    """Rename the original's FasterNet entries to timm's.

    Args:
        state_dict (dict[str, Tensor]): Tensors by the original's names.

    Returns:
        dict[str, Tensor]: The same tensors by timm's names, without the
        output norms, for which timm has no place.
    """

    def rename(key: str) -> str:
        key = re.sub(
            r'^stages\.([0246])\.blocks\.',
            lambda m: f'stages.{int(m[1]) // 2}.blocks.',
            key,
        )
        key = re.sub(
            r'^stages\.([135])\.(?!blocks\.)',
            lambda m: f'stages.{int(m[1]) // 2 + 1}.downsample.',
            key,
        )
        key = re.sub(r'^avgpool_pre_head\.1\.', 'conv_head.', key)
        return re.sub(r'^head\.', 'classifier.', key)

    return {
        rename(key): value
        for key, value in state_dict.items()
        if not re.match(r'norm\d\.', key)
    }


def is_timm_fasternet(state_dict: StateDict) -> bool:
    """Whether a state dict is in timm's FasterNet layout."""
    return any('.downsample.' in key for key in state_dict)
