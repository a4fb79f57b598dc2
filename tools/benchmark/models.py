"""What is compared: sides, each a form of a model."""

import copy
import re
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import yaml
from get_flops import config_path, read_config
from measuring import TIMM
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import load_state_dict
from mmengine.structures import InstanceData
from seeded import Model, detector_samples, fill, set_threshold
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fasternet_det import FasterNet, GGhostRegNet
from fasternet_det.backbones.fasternet import FasterNetBlock
from fasternet_det.checkpoint import read_checkpoint
from fasternet_det.deploy import fold, optimize
from fasternet_det.deploy.operators import kernel_dtypes

DATA = yaml.safe_load(Path(__file__).with_name('data.yml').read_text())
BACKBONES: Dict[str, dict] = DATA['backbones'] | {
    f'{name}-{arch}': dict(type=kind.__name__, arch=arch)
    for name, kind in (('fasternet', FasterNet), ('g-ghost', GGhostRegNet))
    for arch in kind.arch_settings
}
TIMM_TORCH = '2.13.'  # that the torchvision is made for


class CannotError(ValueError):
    """A side that this machine or its model does not have."""


class OriginalBlock(nn.Module):
    """A block with the forward of the original code, the yardstick."""

    def __init__(self, block: FasterNetBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        block, mixing = self.block, self.block.spatial_mixing
        x1, x2 = torch.split(
            x, [mixing.dim_conv3, mixing.dim_untouched], dim=1
        )
        out = block.mlp(torch.cat((mixing.partial_conv3(x1), x2), 1))
        if block.layer_scale is not None:
            out = block.layer_scale.unsqueeze(-1).unsqueeze(-1) * out
        return x + block.drop_path(out)


def as_original(model: nn.Module) -> nn.Module:
    """Give every FasterNet block the original's forward."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FasterNetBlock):
                setattr(parent, name, OriginalBlock(child))
    return model


def with_cp(model: nn.Module) -> nn.Module:
    """Let a model recompute activations where it can."""
    for module in model.modules():
        if hasattr(module, 'with_cp'):
            module.with_cp = True
    return model


PLAIN = {  # forms that ``optimize`` has no part in
    'original': as_original,
    'with_cp': with_cp,
    'fold': fold,
    'channels_last': partial(nn.Module.to, memory_format=torch.channels_last),
}
OPTIONS = {  # of the sides of each kind
    'plain': tuple(PLAIN),
    'optimize': ('optimize', 'direct', 'bf16', 'int8', 'compile'),
    'onnxruntime': ('bf16', 'int8'),
    'openvino': ('bf16', 'int8'),
}
EVERY = (  # what NAME:every stands for
    *(':original', ':optimize', ':optimize,bf16', ':optimize,int8'),
    *('@onnxruntime', '@onnxruntime:bf16', '@onnxruntime:int8'),
    *('@openvino', '@openvino:bf16', '@openvino:int8'),
)


@dataclass(frozen=True)
class Spec:
    """What a SIDE of the command line says; ``kind`` is of ``OPTIONS``."""

    name: str
    form: str
    kind: str
    options: Sequence[str]

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        if 'int8' in self.options:
            return torch.int8
        return torch.bfloat16 if 'bf16' in self.options else torch.float32


def parse(side: str) -> Spec:
    """Parse NAME[@RUNTIME][:option,...]."""
    match = re.fullmatch(
        r'((?:mmdet::)?[^:@]+)((?:@([^:@]+))?(?::([^:@]+))?)', side
    )
    if not match:
        raise ValueError(f'{side!r} is not NAME[@RUNTIME][:option,...]')
    name, form, runtime, options = match.groups()
    options = options.split(',') if options else []
    kind = runtime or ('optimize' if 'optimize' in options else 'plain')
    if kind not in OPTIONS:
        raise ValueError(f'{side!r}: expected onnxruntime or openvino')
    for option in options:
        if option not in OPTIONS[kind]:
            raise ValueError(
                f'{side!r}: {option} is not an option of {kind} sides, '
                f'expected {", ".join(OPTIONS[kind])}'
            )
    if len({'bf16', 'int8', 'direct'} & {*options}) > 1:
        raise ValueError(f'{side!r}: expected one of bf16, int8 and direct')
    return Spec(name, form, kind, options)


def expand(sides: Sequence[str]) -> List[Spec]:
    """Parse sides, of which NAME:every stands for several."""
    forms = [
        side.removesuffix(':every') + form
        for side in sides
        for form in (EVERY if side.endswith(':every') else ('',))
    ]
    return list(map(parse, dict.fromkeys(forms)))


@lru_cache(maxsize=None)
def import_timm() -> Tuple[Any, torch.library.Library]:
    """Import timm, after mmdet; its operators are to be kept alive.

    timm's models use no operator of torchvision. PyPI's is for CUDA, whose
    operators do not load beside torch for CPUs: declared, it imports there.
    """
    if not TIMM.is_dir() or not torch.__version__.startswith(TIMM_TORCH):
        raise CannotError(
            f'needs torch {TIMM_TORCH}x, this is {torch.__version__}, and '
            f'timm in {TIMM}, where `make env` installs it'
        )
    library = torch.library.Library('torchvision', 'DEF')
    arguments = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    for name in ('nms', 'qnms'):
        library.define(name + arguments)
    sys.path.insert(0, str(TIMM))
    return import_module('timm'), library


@torch.no_grad()
def build_model(
    name: str, size: Sequence[int], batch: int, checkpoint: str = ''
) -> Model:
    """Build a plain model in eval mode: seeded, with a threshold to match, but
    for a detector of which a checkpoint is named.
    """
    init_default_scope('mmdet')
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, 3, *size, generator=generator)
    if checkpoint and (name in BACKBONES or name.startswith('timm-')):
        raise ValueError(f'{name!r}: --checkpoint is for detectors')
    if name in BACKBONES:
        module = fill(MODELS.build(BACKBONES[name]))
        module.eval()  # returns nothing in mmdet
        return Model(name, module, inputs)
    if name.startswith('timm-'):
        timm, _ = import_timm()
        if name[5:] not in timm.list_models():
            raise ValueError(f'{name!r}: timm has no model of that name')
        module = fill(timm.create_model(name[5:], features_only=True))
        return Model(name, module.eval(), inputs)
    if not config_path(name).is_file():
        raise ValueError(
            f'{name!r} is neither a config of a detector nor timm-MODEL nor '
            f'one of {", ".join(BACKBONES)}'
        )
    detector = MODELS.build(read_config(name).model).eval()
    samples = detector_samples(size, batch)
    model = Model(Path(name).stem, detector, inputs, samples, name)
    if not checkpoint:
        fill(detector)
        set_threshold(model)
    else:
        weights = read_checkpoint(checkpoint)
        weights = weights.get('state_dict', weights)
        load_state_dict(detector, weights, strict=True)
    return model


@dataclass
class Side:
    """A form of a model, ready to be compared and timed."""

    spec: Spec
    model: Model
    run: Callable[[], Any]
    maps: Callable[[], Optional[Sequence[Tensor]]]  # None: hides them
    found: Callable[[], List[InstanceData]] = list  # in each image
    module: Optional[nn.Module] = None  # None outside torch
    held: Callable[[], int] = int  # bytes between steps of training

    @property
    def label(self) -> str:
        """The side, without the folder of a config."""
        return self.model.name + self.spec.form


def build_module(spec: Spec, model: Model) -> nn.Module:
    """A form of a model's module that torch runs; the module stays."""
    if spec.kind == 'plain':
        module = copy.deepcopy(model.module)
        for option in spec.options:
            module = PLAIN[option](module)
        return module
    settings: Dict[str, Any] = dict(compile='compile' in spec.options)
    settings['winograd'] = 'direct' not in spec.options
    if spec.dtype == torch.int8:
        settings['calibration'] = model.calibration()
    try:
        return optimize(model.module, spec.dtype, **settings)
    except ValueError as error:
        raise CannotError(str(error)) from error


def exported_side(spec: Spec, model: Model, folder: Path) -> Side:
    """A model as another runtime runs it, by a file in a folder.

    ``int8`` is calibrated by the very images of the benchmark.
    """
    images, dtype = model.inputs.numpy(), spec.dtype
    calibration = [images] if dtype == torch.int8 else None
    path = folder / f'{model.name}{"-int8" if calibration else ""}.onnx'
    try:
        from fasternet_det.deploy.evaluate import AS_READ, ExportedDetector
        from fasternet_det.deploy.export import export, load

        if dtype == torch.bfloat16 and dtype not in kernel_dtypes():
            raise ValueError('this CPU does not compute in bfloat16')
        if not path.exists():
            export(model.module, path, calibration=calibration)
        hint = 'bf16' if dtype == torch.bfloat16 else 'f32'
        session = load(path, spec.kind, torch.get_num_threads(), hint)
    except (ImportError, ValueError) as error:
        raise CannotError(str(error)) from error
    run = partial(session, images)
    if model.samples is None:
        return Side(spec, model, run, lambda: list(map(torch.tensor, run())))
    # A detector's graph keeps its maps to itself, and masks are not compared.
    detector = ExportedDetector(  # all of the input is image
        lambda images: session(images)[:2], AS_READ, dict(clip_border=False)
    )
    found = partial(model.found_by, detector)
    return Side(spec, model, run, lambda: None, found)


def build_side(spec: Spec, model: Model, folder: Path) -> Side:
    """Inference; another runtime's by a file in a folder."""
    if spec.kind not in ('plain', 'optimize'):
        return exported_side(spec, model, folder)
    module = build_module(spec, model)
    maps, found = (partial(f, module) for f in (model.maps_of, model.found_by))
    return Side(spec, model, model.run_of(module), maps, found, module)


def training_side(spec: Spec, model: Model) -> Side:
    """A training step of a detector: forward, backward and update.

    Its maps are the loss and all gradients before the first update.
    """
    if model.samples is None:
        raise CannotError('only detectors are trained')
    module = build_module(spec, model).train()
    recipe = read_config(model.config).optim_wrapper
    optimizer = build_optim_wrapper(module, recipe)

    def loss() -> Tensor:
        losses = module.loss(model.inputs, model.samples)
        return module.parse_losses(losses)[0]

    def gradients() -> List[Tensor]:
        torch.manual_seed(0)  # equal drop paths
        first = loss()
        first.backward()
        flat = torch.cat([p.grad.flatten() for p in module.parameters()])
        optimizer.zero_grad()
        return [first.detach(), flat]

    def held() -> int:
        state = tree_leaves((module.state_dict(), optimizer.state_dict()))
        return sum(x.nbytes for x in state if isinstance(x, Tensor))

    def step() -> None:
        optimizer.update_params(loss())

    return Side(spec, model, step, gradients, list, module, held)


def build_sides(
    sides: Sequence[str], make: Callable[[Spec, Model], Side], *image: Any
) -> Tuple[List[Side], List[Dict[str, str]]]:
    """Build what can be built, and rows that say why the others cannot."""
    models: Dict[str, Model] = {}
    built, missing = [], []
    for spec in expand(sides):
        try:
            if spec.name not in models:
                models[spec.name] = build_model(spec.name, *image)
            built.append(make(spec, models[spec.name]))
        except CannotError as error:
            side = Path(spec.name).stem + spec.form
            missing.append(dict(side=side, form=spec.form, why=str(error)))
            print(f'Without {side}: {error}', file=sys.stderr)
    if not built:
        raise ValueError('; '.join(row['why'] for row in missing))
    return built, missing
