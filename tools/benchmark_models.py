"""The sides that tools/benchmark.py compares: models, and forms of them."""

import copy
import re
import sys
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from mmdet.models.backbones import SwinTransformer
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_state_dict
from mmengine.structures import InstanceData
from mmengine.utils import get_installed_path
from torch import Tensor

from fasternet_det import ConvAWS2d, FasterNet, GGhostRegNet
from fasternet_det.backbones.fasternet import FasterNetBlock
from fasternet_det.checkpoint import fasternet_to_timm, read_checkpoint
from fasternet_det.deploy import fold, optimize

BACKBONES: Dict[str, dict] = {
    'resnet-18': dict(type='ResNet', depth=18),
    'resnet-50': dict(type='ResNet', depth=50),
    **{
        f'resnet-{depth}-{plug_in.lower()}': dict(
            type='SlotResNet',
            depth=depth,
            dcn=dict(type=plug_in),
            stage_with_dcn=(plug_in == 'SPConv', True, True, True),
        )
        for depth in (18, 50)
        for plug_in in ('SPConv', 'SAConv')
    },
    **{
        f'g-ghost-{arch}': dict(type='GGhostRegNet', arch=arch)
        for arch in GGhostRegNet.arch_settings
    },
    'mobilenet-v2': dict(type='MobileNetV2'),
    'swin-t': dict(type='SwinTransformer'),
    'pvt-v2-b0': dict(
        type='PyramidVisionTransformerV2',
        embed_dims=32,
        num_layers=[2, 2, 2, 2],
    ),
    'pvt-v2-b1': dict(
        type='PyramidVisionTransformerV2',
        embed_dims=64,
        num_layers=[2, 2, 2, 2],
    ),
    'pvt-v2-b2': dict(
        type='PyramidVisionTransformerV2',
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
    ),
}
ARCHS = tuple(FasterNet.arch_settings)
RUNTIMES = ('torch', 'onnxruntime', 'openvino')
OPTIONS = (
    'original',
    'fold',
    'channels_last',
    'optimize',
    'direct',
    'bf16',
    'int8',
    'compile',
)
# Largest difference to the first side's outputs, relative to their largest
# value, that rounding explains; other weights give about 1.
TOLERANCES = {'float32': 1e-4, 'bfloat16': 0.2, 'int8': 0.5}
# An image of 427x640 pixels is enlarged so much to fit 1333x800.
SCALE = 1.873
# The last layers of heads, on maps of standard deviation 30: boxes stay near
# their anchors, and scores do not saturate, so that no two are equal.
HEAD_GAINS = {'_reg': 0.01, '_cls': 0.1}
# Strides from a point to the sides of its box, for the heads that predict
# them: around 0, every other box would end before it starts.
DISTANCES = {'rtm_reg': 4}
CANDIDATES = 1000  # boxes and classes that pass the threshold into NMS


class OriginalBlock(FasterNetBlock):
    """A block with the forward of the original code, the yardstick."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        mixing = self.spatial_mixing
        x1, x2 = torch.split(
            x, [mixing.dim_conv3, mixing.dim_untouched], dim=1
        )
        out = self.mlp(torch.cat((mixing.partial_conv3(x1), x2), 1))
        if self.layer_scale is not None:
            out = self.layer_scale.unsqueeze(-1).unsqueeze(-1) * out
        return x + self.drop_path(out)


def as_original(model: nn.Module) -> nn.Module:
    """Copy a model, with the original's forward in every FasterNet block."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, FasterNetBlock):
            module.__class__ = OriginalBlock
    return model


# Where timm and torchvision lie: beside the environment, as mmengine and
# mmdet change what they do where they find a torchvision.
TIMM = Path(sys.prefix, 'timm')
TIMM_TORCH = '2.13.'  # that the torchvision is made for


def lacks_timm() -> Optional[str]:
    """Why there is no timm to compare with; None where there is."""
    if not torch.__version__.startswith(TIMM_TORCH):
        return (
            f"timm's torchvision is for torch {TIMM_TORCH}x, this is "
            f'{torch.__version__}'
        )
    if not TIMM.is_dir():
        return f'{TIMM} is missing: `make env` installs timm there'
    return None


@lru_cache(maxsize=None)
def import_timm() -> Tuple[Any, torch.library.Library]:
    """Import timm, after mmdet.

    timm's models use no operator of torchvision. PyPI's is for CUDA, whose
    operators do not load beside torch for CPUs: declared, it imports there.

    Returns:
        tuple: The module, and the declarations, to be kept alive.
    """
    library = torch.library.Library('torchvision', 'DEF')
    for name in ('nms', 'qnms'):
        library.define(
            f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> '
            'Tensor'
        )
    sys.path.insert(0, str(TIMM))
    return import_module('timm'), library


class TimmFasterNet(nn.Module):
    """timm's FasterNet with our weights, and our output norms after it."""

    def __init__(self, ours: FasterNet, arch: str) -> None:
        super().__init__()
        timm, _ = import_timm()
        self.body = timm.create_model(f'fasternet_{arch}', num_classes=0)
        problems = self.body.load_state_dict(
            fasternet_to_timm(ours.state_dict()), strict=False
        )
        if problems.unexpected_keys or set(problems.missing_keys) != {
            'conv_head.weight'
        }:
            raise ValueError(f'timm-fasternet-{arch}: {problems}')
        self.norms = nn.ModuleList(
            getattr(ours, f'norm{i}') for i in ours.out_indices
        )

    def forward(self, x: Tensor) -> List[Tensor]:
        """Map (N, 3, H, W) to the four maps of :class:`FasterNet`."""
        maps = self.body.forward_intermediates(x, intermediates_only=True)
        return [norm(x) for norm, x in zip(self.norms, maps)]


@dataclass(frozen=True)
class Spec:
    """What a SIDE of the command line says."""

    side: str
    name: str
    runtime: str
    options: Sequence[str]

    @property
    def is_timm(self) -> bool:
        """Whether it needs timm."""
        return self.name.startswith('timm-')

    @property
    def precision(self) -> str:
        """Of the arithmetic; a key of ``TOLERANCES``."""
        if 'int8' in self.options:
            return 'int8'
        return 'bfloat16' if 'bf16' in self.options else 'float32'


def parse(side: str) -> Spec:
    """Parse NAME[@RUNTIME][:option,...].

    Raises:
        ValueError: If it is not of that form, or names what there is not.
    """
    match = re.fullmatch(
        r'((?:mmdet::)?[^:@]+)(?:@([^:@]+))?(?::([^:@]+))?', side
    )
    if not match:
        raise ValueError(f'{side!r} is not NAME[@RUNTIME][:option,...]')
    name, runtime = match[1], match[2] or 'torch'
    options = tuple((match[3] or '').split(',')) if match[3] else ()
    if runtime not in RUNTIMES:
        raise ValueError(
            f'{side!r}: the runtime {runtime!r} is not one of '
            f'{", ".join(RUNTIMES)}'
        )
    for option in options:
        if option not in OPTIONS:
            raise ValueError(
                f'{side!r}: the option {option!r} is not one of '
                f'{", ".join(OPTIONS)}'
            )
    if runtime != 'torch' and not set(options) <= {'bf16', 'int8'}:
        raise ValueError(
            f'{side!r}: {runtime} runs what tools/export.py writes, the '
            'folded model; of the options only bf16 and int8 apply'
        )
    if runtime == 'onnxruntime' and 'bf16' in options:
        raise ValueError(f'{side!r}: ONNX Runtime has no bf16 on CPUs')
    if runtime == 'torch' and 'int8' in options:
        raise ValueError(
            f'{side!r}: int8 is of the runtimes onnxruntime and openvino'
        )
    if 'optimize' in options and {'original', 'fold'} & set(options):
        raise ValueError(f'{side!r}: optimize folds, and wants its own blocks')
    if 'direct' in options and 'optimize' not in options:
        raise ValueError(f'{side!r}: direct is an option of optimize')
    return Spec(side, name, runtime, options)


def fill(module: nn.Module) -> nn.Module:
    """Seed all weights and statistics by their names.

    No norm is then an identity, and all copies of a model agree.
    """
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        normal = torch.randn(tensor.shape, generator=generator)
        if name.endswith(('bias', 'running_mean')):
            offset = next(
                (v for k, v in DISTANCES.items() if f'{k}.' in name), 0
            )
            value = 0.1 * normal + offset
        elif tensor.dim() >= 2:
            gain = next(
                (v for k, v in HEAD_GAINS.items() if f'{k}.' in name), 1
            )
            value = gain * normal / tensor[0].numel() ** 0.5
        else:  # scales and variances
            value = torch.rand(tensor.shape, generator=generator) + 0.5
        tensor.copy_(value)
    for layer in module.modules():
        if isinstance(layer, ConvAWS2d):  # else its filters are enormous
            layer.weight_gamma.div_(layer.weight[0].numel() ** 0.5)
            layer.weight_beta.div_(layer.weight[0].numel())
    return module


@dataclass
class Model:
    """A plain module with its weights and its input, in one of two kinds.

    ``key`` is equal for models that compute the same outputs.
    """

    name: str
    key: str
    module: nn.Module
    inputs: Tensor
    samples: Optional[List[DetDataSample]] = None
    config: Optional[str] = None

    def run_of(self, module: nn.Module) -> Callable[[], Any]:
        """What is timed: inference of a form of the module."""
        if self.samples is None:
            return lambda: module(self.inputs)
        samples = copy.deepcopy(self.samples)
        return lambda: module.predict(self.inputs, samples, rescale=True)

    def maps_of(self, module: nn.Module) -> Sequence[Tensor]:
        """Feature maps, of the backbone or of a detector's neck."""
        if self.samples is None:
            return module(self.inputs)
        return module.extract_feat(self.inputs)


def read_config(path: str) -> Config:
    """Read the config of a detector.

    Raises:
        ValueError: If there is none.
    """
    mmdet = f'{get_installed_path("mmdet")}/.mim/configs/'
    file = path.replace('mmdet::', mmdet)
    if not Path(file).is_file():
        raise ValueError(
            f'{path!r} is neither a config of a detector nor one of '
            f'fasternet-ARCH, timm-fasternet-ARCH (ARCH: {", ".join(ARCHS)}), '
            f'{", ".join(BACKBONES)}'
        )
    config = Config.fromfile(file)
    if 'model' not in config:
        raise ValueError(f'{path} has no `model`')
    init_default_scope(config.get('default_scope', 'mmdet'))
    return config


def detector_samples(size: Sequence[int], batch: int) -> List[DetDataSample]:
    """Data samples as mmdet's test pipeline makes of COCO images."""
    height, width = size
    metainfo = dict(
        img_shape=(height, width),
        pad_shape=(height, width),
        batch_input_shape=(height, width),
        ori_shape=(round(height / SCALE), round(width / SCALE)),
        scale_factor=(SCALE, SCALE),
    )
    return [DetDataSample(metainfo=dict(metainfo)) for _ in range(batch)]


def build_detector(path: str, checkpoint: Optional[str]) -> nn.Module:
    """Build a detector, with seeded weights or a checkpoint's."""
    detector = MODELS.build(read_config(path).model)
    if checkpoint is None:
        return fill(detector)
    state_dict = read_checkpoint(checkpoint)
    load_state_dict(
        detector, state_dict.get('state_dict', state_dict), strict=True
    )
    return detector


def set_threshold(model: Model) -> None:
    """Set the score threshold so that ``CANDIDATES`` boxes per image pass.

    Seeded weights score boxes as they like; a trained detector passes some
    hundreds on to the NMS.
    """
    detector = model.module
    owner = getattr(detector, 'roi_head', None) or detector.bbox_head
    head = getattr(owner, 'bbox_head', owner)
    seen: List[Any] = []
    hook = head.register_forward_hook(
        lambda module, args, out: seen.append(out[0])
    )
    try:
        model.run_of(detector)()
    finally:
        hook.remove()
    if not seen:
        raise ValueError(
            f'{model.name}: the scores of a {type(head).__name__} are not '
            'understood; name a --checkpoint'
        )
    if isinstance(seen[0], Tensor):  # (rois, classes and background)
        scores = seen[0].softmax(-1)[:, :-1]
    else:  # per level
        scores = torch.cat([score.flatten() for score in seen[0]]).sigmoid()
    count = min(CANDIDATES * len(model.inputs), scores.numel())
    threshold = scores.flatten().topk(count).values[-1]
    owner.test_cfg.score_thr = float(threshold)


def build_model(
    name: str,
    size: Sequence[int],
    batch: int,
    checkpoint: Optional[str] = None,
) -> Model:
    """Build a plain model in eval mode.

    Args:
        name (str): A backbone's short name, or the config of a detector.
        size (Sequence[int]): Height and width of the images in pixels.
        batch (int): Number of images.
        checkpoint (str, optional): Weights of a detector; its own threshold
            is then kept. Defaults to None, seeded weights.

    Raises:
        ValueError: If there is no such model.
    """
    init_default_scope('mmdet')
    inputs = torch.randn(
        batch, 3, *size, generator=torch.Generator().manual_seed(0)
    )
    match = re.fullmatch(r'(timm-)?(fasternet-(\w+))', name)
    with torch.no_grad():
        if match and match[3] in ARCHS:
            module = fill(FasterNet(match[3])).eval()
            if match[1]:
                module = TimmFasterNet(module, match[3]).eval()
            return Model(name, match[2], module, inputs)
        if name in BACKBONES:
            module = fill(MODELS.build(BACKBONES[name]))
            module.eval()  # returns nothing in mmdet
            return Model(name, name, module, inputs)
        module = build_detector(name, checkpoint).eval()
        stem = Path(name).stem
        samples = detector_samples(size, batch)
        model = Model(stem, stem, module, inputs, samples, name)
        if checkpoint is None:
            set_threshold(model)
    return model


@dataclass
class Side:
    """A form of a model, ready to be compared and timed.

    ``maps`` gives feature maps, if it has any to show; ``found`` what a
    detector finds in each image.
    """

    spec: Spec
    model: Model
    run: Callable[[], Any]
    maps: Callable[[], Optional[Sequence[Tensor]]]
    found: Callable[[], List[InstanceData]]
    module: Optional[nn.Module]  # None outside torch


def exported_side(
    spec: Spec, model: Model, threads: int, folder: Path
) -> Side:
    """A model as another runtime runs it, with the folder for its file.

    ``int8`` is calibrated by the very images of the benchmark.
    """
    try:
        from fasternet_det.deploy.export import export, load
    except ImportError as error:
        raise ValueError(f'{spec.side}: {error}') from error
    path = folder / f'{len(list(folder.iterdir()))}.onnx'
    images = model.inputs.numpy()
    calibration = [images] if spec.precision == 'int8' else None
    if not isinstance(model.module, SwinTransformer):
        export(model.module, path, calibration=calibration)
    elif calibration:
        raise ValueError(f'{spec.side}: its windows fix the batch size')
    else:
        torch.onnx.export(
            model.module,
            (model.inputs,),
            path,
            input_names=['input'],
            dynamo=True,
            verbose=False,
        )
    precision = 'bf16' if spec.precision == 'bfloat16' else 'f32'
    session = load(path, spec.runtime, threads, precision)

    def maps() -> Optional[Sequence[Tensor]]:
        if model.samples:  # a detector's graph keeps them to itself
            return None
        return [torch.from_numpy(array) for array in session(images)]

    def found() -> List[InstanceData]:
        dets, labels = map(torch.from_numpy, session(images)[:2])
        kept = [scores > 0 for scores in dets[..., 4]]  # the others pad
        return [
            InstanceData(
                bboxes=det[keep, :4] / SCALE,
                scores=det[keep, 4],
                labels=label[keep],
            )
            for det, label, keep in zip(dets, labels, kept)
        ]

    return Side(spec, model, lambda: session(images), maps, found, None)


def plain_form(spec: Spec, model: Model) -> nn.Module:
    """The form of a side that ``optimize`` has no part in."""
    options = set(spec.options)
    if model.samples and options & {'bf16', 'compile'}:
        raise ValueError(
            f'{spec.side!r}: of a whole detector, bf16 and compile go with '
            'optimize, which keeps NMS and RoIAlign in float32'
        )
    module = copy.deepcopy(model.module)
    if 'original' in options:
        module = as_original(module)
    if 'fold' in options:
        module = fold(module)
    if 'bf16' in options:
        module = module.to(torch.bfloat16)
    if 'channels_last' in options:
        module = module.to(memory_format=torch.channels_last)
    if 'compile' in options:
        module = torch.compile(module, options=dict(freezing=True))
    return module


def build_side(spec: Spec, model: Model, threads: int, folder: Path) -> Side:
    """Bring a model into the form that a SIDE asks for.

    Args:
        spec (Spec): The form.
        model (Model): Left as it is.
        threads (int): For runtimes other than torch.
        folder (Path): For exported files.

    Raises:
        ValueError: If the model has no such form.
    """
    if spec.runtime != 'torch':
        return exported_side(spec, model, threads, folder)
    options = set(spec.options)
    bf16 = 'bf16' in options
    if 'optimize' in options:
        module = optimize(
            model.module,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            compile='compile' in options,
            winograd='direct' not in options,
        )
    else:
        module = plain_form(spec, model)
        inputs = model.inputs.bfloat16() if bf16 else model.inputs
        if 'channels_last' in options:
            inputs = inputs.to(memory_format=torch.channels_last)
        model = replace(model, inputs=inputs)
    return Side(
        spec,
        model,
        model.run_of(module),
        lambda: model.maps_of(module),
        lambda: [copy.copy(s.pred_instances) for s in model.run_of(module)()],
        module,
    )
