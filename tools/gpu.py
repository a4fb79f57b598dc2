"""Try all of this project on a GPU, in one command of under ten minutes.

Needs torch, mmdet and mmcv, with or without mmcv's operators for CUDA; no
network, data or weights. `--device cpu` rehearses it, small, without a GPU.

  parity     forward and backward, against the CPU in float64, also by AMP
  forms      what `optimize` gives in each precision: outputs, time, memory
  parts      each part of the fast form beside the module that it replaces
  detectors  what whole detectors find, plain and in fast form
  training   the loss of a detector, and AMP's steps
  latency    FasterNet beside ResNet-50, ConvNeXt-T and Swin-T, in turns
  graphs     CUDA graphs
  syncbn     SyncBN in two processes against BN in one
  memory     of a training step
  compile    torch.compile

Each case stands alone: where one fails, the report has its error, the rest
goes on, and the exit status is 1. The report is written anew after each.
"""

import argparse
import copy
import json
import math
import multiprocessing as mp
import os
import shlex
import socket
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from benchmark.experiments import profiled
from benchmark.models import (
    BACKBONES,
    CannotError,
    as_original,
    build_model,
    with_cp,
)
from benchmark.report import to_markdown
from get_flops import read_config
from measuring import (
    describe_machine,
    middle,
    name_machine,
    synchronize,
    time_rows,
)
from mmcv.ops import get_compiling_cuda_version
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from seeded import Model, agreement, fill
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from fasternet_det.deploy import fold, optimize
from fasternet_det.deploy.fuse import BUILDERS
from fasternet_det.deploy.precision import set_precision

Row = Dict[str, Any]
SECONDS = 570  # for all cases
CASE_SECONDS = 150  # for one, at most
SLOT = dict(type='SlotResNet', depth=18, stage_with_dcn=(True,) * 4)
DEFORM = 'resnet-18-saconv-deformable'
OURS = {
    **{k: v for k, v in BACKBONES.items() if k.startswith('fasternet')},
    **{k: v for k, v in BACKBONES.items() if k.startswith('g-ghost')},
    'ghostnet': BACKBONES['ghostnet'],
    'resnet-18-spconv': SLOT | dict(dcn=dict(type='SPConv')),
    'resnet-18-saconv': SLOT | dict(dcn=dict(type='SAConv')),
    DEFORM: SLOT | dict(dcn=dict(type='SAConv', use_deform=True)),
    'resnet-18-tshaped': SLOT | dict(dcn=dict(type='TShapedConv')),
    'fasternet-t0, with_cp': dict(
        type='FasterNet', with_cp=True, layer_scale_init_value=1.0
    ),
    'fasternet-t0, classifier': dict(type='FasterNet', fork_feat=False),
    'fasternet-tiny': dict(
        type='FasterNet',
        arch=dict(embed_dim=8, depths=(1, 1, 1, 1), act_cfg=dict(type='GELU')),
    ),
}
FASTERNETS = [name for name in BACKBONES if name.startswith('fasternet')]
CONVNEXT = {  # ConvNeXt-T by the package that has it
    'mmpretrain.models': lambda m: m.ConvNeXt('tiny', out_indices=range(4)),
    'torchvision.models': lambda m: m.convnext_tiny().features,
    'timm': lambda m: m.create_model('convnext_tiny', features_only=True),
}
FOLDER = Path(__file__).resolve().parents[1] / 'configs'
MINI = 'mini/mask-rcnn_fasternet-t0_fpn_nuclei.py'
MASK_RCNN = 'fasternet/mask-rcnn_fasternet-t0_fpn_1x_coco.py'
RETINANET = 'mini/retinanet_fasternet-t0_fpn_nuclei.py'
RTMDET = 'fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py'
# Of a vector's length, what rounding explains.
TOLERANCES = {
    torch.float32: 1e-4,
    torch.float16: 0.02,
    torch.bfloat16: 0.02,
}
LOW = (torch.float16, torch.bfloat16)
DEVICE = 'cuda'
ON_GPU = True


def set_device(device: str) -> None:
    """Choose where all is computed; float32 without TF32."""
    global DEVICE, ON_GPU
    DEVICE, ON_GPU = device, device == 'cuda'
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    init_default_scope('mmdet')


def need_gpu() -> None:
    if not ON_GPU:
        raise CannotError('needs a GPU')


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def listed(outputs: Any) -> List[Tensor]:
    """Maps, or the logits of a classifier."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def off(values: List[Tensor], expected: List[Tensor]) -> float:
    """The largest error of a tensor, of its length."""
    pairs = zip(values, expected, strict=True)
    pairs = [(a.cpu().double(), b.cpu().double()) for a, b in pairs]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    if not all(map(math.isfinite, errors)):
        raise ValueError(f'has values that are not finite: errors {errors}')
    return max(errors)


def dtypes() -> Tuple[torch.dtype, ...]:
    """In which the device computes well."""
    return (torch.float32, *LOW) if ON_GPU else (torch.float32,)


def attempt(side: Any, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows, the last one of their error, if they end by one."""
    try:
        yield from rows
    except CannotError as error:
        yield dict(side=str(side), why=str(error))
    except Exception as error:  # noqa: BLE001, it is a result
        traceback.print_exc()
        yield dict(side=str(side), why=reason(error), ok=False)


def reason(error: BaseException) -> str:
    """An error in a line."""
    text = str(error).strip().partition('\n')[0]
    return f'{type(error).__name__}: {text}'


def times(runs: Dict[str, Callable], rounds: int = 7) -> List[Row]:
    """Let functions take turns; quartiles of each."""
    rows = time_rows(runs, rounds if ON_GPU else 1)
    return [{k: v for k, v in row.items() if k != 'times'} for row in rows]


def peak(run: Callable) -> float:
    """MB that a run holds at most, beyond what was held before."""
    if not ON_GPU:
        return profiled(run)[0] / 1e6
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# ---- parity


@torch.no_grad()
def smooth(module: nn.Module) -> nn.Module:
    """Replace ReLUs: where a value rounds to the other side of 0, a whole
    gradient comes or goes, by 5 to 20% of all of them in 16 bits.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.ReLU:
                setattr(parent, name, nn.GELU())
    return module


def differentiate(
    module: nn.Module,
    images: Tensor,
    amp: Optional[torch.dtype] = None,
    change: Callable[[nn.Module], nn.Module] = nn.Identity(),
) -> Tuple[List[Tensor], Tensor]:
    """The outputs, and all gradients in a row, of a module in train mode."""
    module = change(copy.deepcopy(module).to(images.device, images.dtype))
    images = images.clone().requires_grad_()
    device = images.device.type
    with torch.autocast(device, amp) if amp else nullcontext():
        outs = listed(module(images))
    loss = 0
    for i, out in enumerate(outs):
        generator = torch.Generator().manual_seed(i)
        weight = torch.randn(out.shape, generator=generator).to(images)
        loss = loss + (out.to(images.dtype) * weight).sum() / len(weight)
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in (*gradients, images.grad)])
    return [out.detach() for out in outs], flat


def parity(name: str) -> Iterator[Row]:
    """Against float64 on the CPU. Where rounding to 16 bits, or an
    ill-conditioned norm, takes more than the tolerance, the CPU says how much.
    """
    with torch.no_grad():
        module = smooth(fill(MODELS.build(OURS[name])))
    module.train()  # returns nothing in mmdet
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    expected = differentiate(module, images.double())
    for dtype in (torch.float32, *(() if name == DEFORM else LOW)):
        amp = None if dtype == torch.float32 else dtype
        row: Row = dict(side=f'{name}, {short(dtype)}')

        def errors(device: str, amp: Any = amp) -> List[float]:
            outs, gradient = differentiate(module, images.to(device), amp)
            return [off(outs, expected[0]), off([gradient], [expected[1]])]

        row['maps'], row['gradients'] = found = errors(DEVICE)
        limits = [TOLERANCES[dtype]] * 2
        if ON_GPU and max(found) > TOLERANCES[dtype]:
            row["CPU's maps"], row["CPU's gradients"] = own = errors('cpu')
            limits = [max(2 * e, TOLERANCES[dtype]) for e in own]
        row['ok'] = all(a <= b for a, b in zip(found, limits))
        if not ON_GPU:  # where a CPU is held against itself
            row['ok'] = found[0] <= max(TOLERANCES[dtype], 0.1 * bool(amp))
        yield row


# ---- the fast form


def make_form(
    module: nn.Module,
    dtype: torch.dtype,
    layout: torch.memory_format,
    fast: bool,
) -> nn.Module:
    """A module on the device, plain or fast."""
    module = copy.deepcopy(module).to(DEVICE)
    if fast:
        return optimize(module, dtype, layout)
    return module.to(dtype=dtype, memory_format=layout)


def all_forms() -> Dict[str, tuple]:
    """Dtype, layout and whether it is fast, by name; the plain one first."""
    layouts = (torch.contiguous_format, torch.channels_last)
    return {
        f'{"fast " * fast}{short(dtype)}'
        f'{", channels_last" * (layout == layouts[1])}': (dtype, layout, fast)
        for dtype in dtypes()
        for fast in (False, True)
        for layout in layouts
    }


@torch.no_grad()
def forms(case: Tuple[str, int, List[int]]) -> Iterator[Row]:
    """All forms of a backbone: outputs against float32, time and memory."""
    name, batch, size = case
    with torch.no_grad():
        module = fill(MODELS.build(OURS[name]))
    module.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *size, generator=generator).to(DEVICE)
    runs, checks = {}, {}
    expected = None
    for label, (dtype, layout, fast) in all_forms().items():
        form = make_form(module, dtype, layout, fast)
        x = images.to(dtype=dtype, memory_format=layout)
        outs = listed(form(x))
        expected = expected or outs
        # as the maps go through as many roundings as there are layers
        error, limit = off(outs, expected), 5 * TOLERANCES[dtype]
        checks[label] = dict(difference=error, ok=error <= limit)
        runs[label] = lambda form=form, x=x: form(x)
    for row in times(runs):
        memory = peak(runs[row['side']])
        yield (
            dict(model=name, batch=batch, pixels=size[0])
            | row
            | checks[row['side']]
            | {'memory (MB)': memory}
        )


@torch.no_grad()
def parts(name: str) -> Iterator[Row]:
    """The largest module of each type that ``fuse`` replaces, both ways."""
    size = [512, 512] if ON_GPU else [128, 128]
    if name.endswith('.py'):
        model = build_model(str(FOLDER / name), size, 1)
    else:
        module = fill(MODELS.build(OURS[name]))
        module.eval()  # returns nothing in mmdet
        model = Model(name, module, torch.randn(2, 3, *size))
    model = place(model)
    folded = fold(model.module)
    seen: Dict[type, Tuple[int, nn.Module, tuple]] = {}

    def keep(module: nn.Module, args: tuple) -> None:
        size = sum(x.numel() for x in tensors(args))
        if size > seen.get(type(module), (0,))[0]:
            seen[type(module)] = size, module, args

    for module in folded.modules():
        if type(module) in BUILDERS:
            module.register_forward_pre_hook(keep)
    try:
        model.run_of(folded)()
    except (RuntimeError, NotImplementedError) as error:  # of mmcv, no CUDA
        yield dict(side=f'the rest of {name}', why=reason(error))
    for dtype in dtypes()[:2]:
        for kind, (_, module, args) in seen.items():
            label = f'{kind.__name__}, {short(dtype)}'
            module._forward_pre_hooks.clear()
            yield from attempt(label, part(label, module, args, dtype))


def part(
    label: str, module: nn.Module, args: tuple, dtype: torch.dtype
) -> Iterator[Row]:
    """A plain module and its fast form, with what it was given; the
    difference is to the plain one in float32.
    """
    kind, layout = type(module), torch.channels_last
    fast = BUILDERS[kind](copy.deepcopy(module))
    if fast is None:
        return
    # Some overwrite their input.
    expected = listed(module(*tree_map(clone, args)))
    set_precision(fast, dtype, layout)
    plain = copy.deepcopy(module).to(dtype=dtype, memory_format=layout)

    def cast(x: Any, layout: torch.memory_format = layout) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if x.dim() == 4:
            return x.to(dtype=dtype, memory_format=layout)
        return x.to(dtype) if kind is nn.Linear else x  # regions stay

    own = tree_map(cast, args)
    if kind is SingleRoIExtractor:  # mmcv reads any memory as (N, C, H, W)
        args = tree_map(partial(cast, layout=torch.contiguous_format), args)
    else:
        args = own
    error = off(listed(fast(*tree_map(clone, own))), expected)
    shape = 'x'.join(map(str, next(tensors(args)).shape))
    runs = {
        label: lambda: plain(*args),
        f'{label}, fast': lambda: fast(*own),
    }
    for row in times(runs):
        ok = error <= 5 * TOLERANCES[dtype]
        # A rehearsal without a GPU times once.
        ok = ok and (not ON_GPU or middle(row['times faster']) > 0.9)
        yield row | dict(input=shape, difference=error, ok=ok)


def clone(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested tuples and lists, of numbers with a fraction."""
    if isinstance(value, Tensor):
        yield from [value] * value.is_floating_point()
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


# ---- detectors


def place(model: Model) -> Model:
    """A model on the device; the given one stays."""
    module = copy.deepcopy(model.module).to(DEVICE)
    samples = model.samples
    samples = samples and [sample.to(DEVICE) for sample in samples]
    inputs = model.inputs.to(DEVICE)
    return replace(model, module=module, inputs=inputs, samples=samples)


@torch.no_grad()
def detectors(name: str) -> Iterator[Row]:
    """What is found, against the plain detector on the CPU."""
    size = [480, 640] if ON_GPU else [128, 160]
    model = build_model(str(FOLDER / name), size, 1)
    reference = model.found_by(model.module)
    placed = place(model)
    runs, found = {}, {}
    for dtype in (None, *dtypes()):
        module = optimize(placed.module, dtype) if dtype else placed.module
        results = [result.cpu() for result in placed.found_by(module)]
        label = f'fast {short(dtype)}' if dtype else 'plain'
        common = min(map(agreement, results, reference))
        # With seeded weights, scores lie so close that 16 bits change places.
        least = 0.95 if label in ('plain', 'fast float32') else 0
        found[label] = {'in common (%)': 100 * common, 'ok': common >= least}
        runs[label] = placed.run_of(module)
    for row in times(runs):
        yield dict(model=model.name) | row | found[row['side']]


def training(name: str) -> Iterator[Row]:
    """The loss against the CPU's, then three steps of mmengine's AMP."""
    size = [256, 256] if ON_GPU else [64, 64]
    model = build_model(str(FOLDER / name), size, 2)

    def loss_of(model: Model) -> Tensor:
        losses = model.module.loss(model.inputs, model.samples)
        return model.module.parse_losses(losses)[0]

    model.module.train()
    placed = place(model)
    expected = loss_of(model).item()
    loss = loss_of(placed).item()
    error = abs(loss / expected - 1)
    yield dict(side='float32', loss=loss, difference=error, ok=error <= 1e-4)
    recipe = read_config(str(FOLDER / name)).optim_wrapper
    if not ON_GPU:
        raise CannotError("mmengine's AMP needs a GPU")
    recipe = dict(recipe, type='AmpOptimWrapper')
    optimizer = build_optim_wrapper(placed.module, recipe)
    for step in range(3):
        with optimizer.optim_context(placed.module):
            loss = loss_of(placed)
        optimizer.update_params(loss)
        row = dict(side=f'AMP, step {step + 1}', loss=loss.item())
        error = abs(loss.item() / expected - 1)
        if step == 0:
            row |= dict(difference=error, ok=error <= 0.02)
        else:
            row['ok'] = math.isfinite(loss.item())
        yield row


# ---- latency, graphs, torch.compile


def make_convnext() -> nn.Module:
    why = []
    for package, make in CONVNEXT.items():
        try:
            return make(import_module(package))
        except Exception as error:  # noqa: BLE001, each is a reason
            why.append(f'{package}: {reason(error)}')
    raise CannotError('; '.join(why))


def build(name: str) -> nn.Module:
    """A seeded backbone by name."""
    with torch.no_grad():
        module = (
            make_convnext()
            if name == 'convnext-t'
            else MODELS.build((BACKBONES | OURS)[name])
        )
        fill(module).eval()
    return module


@torch.no_grad()
def latency(case: Tuple[int, List[int]]) -> Iterator[Row]:
    """All models in turns, in each form; TF32 is off."""
    batch, size = case
    names = [*FASTERNETS, 'resnet-50', 'convnext-t', 'swin-t']
    names = names if ON_GPU else ['fasternet-tiny', 'convnext-t']
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *size, generator=generator).to(DEVICE)
    modules, expected = {}, {}
    for name in names:
        try:
            modules[name] = build(name).to(DEVICE)
        except CannotError as error:
            yield dict(side=name, why=str(error))
        else:
            expected[name] = listed(modules[name](images))
    plain, last = torch.contiguous_format, torch.channels_last
    chosen = {'float32': (torch.float32, plain, False, False)}
    if ON_GPU:
        half = torch.float16
        chosen['AMP'] = (torch.float32, last, False, True)
        chosen['float16'] = (half, last, False, False)
        chosen['fast float16'] = (half, last, True, False)
    for label, (dtype, layout, fast, amp) in chosen.items():
        runs, errors = {}, {}
        x = images.to(dtype=dtype, memory_format=layout)
        for name, module in modules.items():
            try:
                run = partial(make_form(module, dtype, layout, fast), x)
                if amp:
                    run = torch.autocast('cuda', torch.float16)(run)
                errors[name] = off(listed(run()), expected[name])
                runs[name] = run
            except RuntimeError as error:  # Swin's mask is of float32
                yield dict(side=f'{name}, {label}', why=reason(error))
        limit = 5 * TOLERANCES[torch.float16 if amp else dtype]
        for row in times(runs):
            name = row['side']
            count = sum(p.numel() for p in modules[name].parameters())
            yield (
                dict(form=label, batch=batch, pixels=size[0])
                | row
                | {
                    'precision': label,
                    'images/s': 1e3 * batch / row['ms'][1],
                    'params (M)': count / 1e6,
                    'difference': errors[name],
                    'ok': errors[name] <= limit,
                }
            )


@torch.no_grad()
def graphs(name: str) -> Iterator[Row]:
    """A CUDA graph of the plain and the fast form: equal, and how fast."""
    need_gpu()
    x = torch.randn(1, 3, 224, 224, device=DEVICE)
    for fast in (False, True):
        form = make_form(build(name), torch.float16, torch.channels_last, fast)
        static = x.half().to(memory_format=torch.channels_last)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                form(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = listed(form(static))
        static.normal_()  # others than it was captured with
        graph.replay()
        error = off(outs, listed(form(static)))
        label = f'{name}, {"fast " * fast}float16'
        runs = {
            label: lambda form=form, x=static: form(x),
            f'{label}, graph': graph.replay,
        }
        for row in times(runs):
            yield row | dict(difference=error, ok=error <= 1e-2)


def compiled(case: str) -> Iterator[Row]:
    """``torch.compile`` of a FasterNet against what is run as it is."""
    backend = 'inductor' if ON_GPU else 'aot_eager'
    size = 224 if ON_GPU else 64
    module = build(f'fasternet-{"t0" if ON_GPU else "tiny"}').to(DEVICE)
    images = torch.randn(2, 3, size, size, device=DEVICE)
    if case == 'training':
        module.train()
        compiler = partial(torch.compile, backend=backend)
        outs, gradient = differentiate(module, images)
        found, other = differentiate(module, images, change=compiler)
        error = max(off(found, outs), off([other], [gradient]))
        yield dict(side=case, difference=error, ok=error <= 1e-4)
        return
    with torch.no_grad():
        expected = listed(module(images))
        dtype = torch.float32
        if case == 'optimize':
            need_gpu()
            dtype = torch.float16
            form = optimize(module, dtype, compile=True)
        elif case == 'reduce-overhead':
            need_gpu()
            form = torch.compile(module, mode=case)
        else:
            form = torch.compile(module, backend=backend)
        error = off(listed(form(images)), expected)
        runs = {'plain': lambda: module(images), case: lambda: form(images)}
        for row in times(runs):
            ok = error <= 5 * TOLERANCES[dtype]
            yield row | dict(difference=error, ok=ok)


# ---- SyncBN, memory


def member(rank: int, port: int, device: str, queue: Any = None) -> Tensor:
    """All gradients of one of two processes, averaged over both."""
    set_device(device)
    torch.distributed.init_process_group(
        'gloo',
        init_method=f'tcp://127.0.0.1:{port}',
        rank=rank,
        world_size=2,
    )
    # GN, which knows no other images, rehearses it.
    norm = dict(type='SyncBN') if ON_GPU else dict(type='GN', num_groups=4)
    module, images = sync_case(norm)
    parallel = DistributedDataParallel(module)
    outs = parallel(images[2 * rank : 2 * rank + 2])
    sum(out.square().mean() for out in outs).backward()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
    synchronize()
    del parallel  # before the group, whose threads drop its tensors
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return gradient


def sync_case(norm: dict) -> Tuple[nn.Module, Tensor]:
    with torch.no_grad():
        module = MODELS.build(dict(type='FasterNet', norm_cfg=norm))
        fill(smooth(module))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 64, generator=generator)
    return module.train().to(DEVICE), images.to(DEVICE)


def syncbn(case: str) -> Iterator[Row]:
    """Two processes share the device, and talk by gloo."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    other = mp.get_context('spawn').Process(
        target=member, args=(1, port, DEVICE), daemon=True
    )
    other.start()
    gradient = member(0, port, DEVICE)
    other.join()
    norm = dict(type='BN') if ON_GPU else dict(type='GN', num_groups=4)
    module, images = sync_case(norm)
    outs = module(images)
    sum(out.square().mean() for out in outs).backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters()])
    error = off([gradient], [expected])
    yield dict(side=case, difference=error, ok=error <= 1e-4)


def memory(name: str) -> Iterator[Row]:
    """Of a training step; what is computed again is not kept."""
    batch, size = (4, 512) if ON_GPU else (1, 64)
    kinds = {
        'original': as_original,
        'plain': nn.Identity(),
        'with_cp': with_cp,
    }
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    for amp in (None, torch.float16) if ON_GPU else (None,):
        runs = {}
        for kind, change in kinds.items():
            module = change(build(name)).to(DEVICE).train()

            def step(module: nn.Module = module, amp: Any = amp) -> None:
                module.zero_grad()
                with torch.autocast('cuda', amp) if amp else nullcontext():
                    outs = module(images)
                sum(out.float().mean() for out in outs).backward()

            runs[f'{name}, {kind}{", AMP" * bool(amp)}'] = step
        for row in times(runs):
            yield row | {'memory (MB)': peak(runs[row['side']])}


# ---- running


def machine(case: str) -> Iterator[Row]:
    """What it ran on."""
    found = dict(mmcv_cuda=get_compiling_cuda_version())
    if ON_GPU:
        gpu = torch.cuda.get_device_properties(0)
        found |= dict(
            side=gpu.name,
            memory=f'{gpu.total_memory / 2**30:.0f} GiB',
            capability=f'{gpu.major}.{gpu.minor}',
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
    yield dict(side=case) | found


def plan() -> Dict[str, Tuple[Callable, list]]:
    """The function and the cases of each section."""
    if not ON_GPU:
        tiny = ['fasternet-tiny']
        return dict(
            machine=(machine, ['cpu']),
            parity=(parity, [*tiny, 'fasternet-t0, with_cp']),
            forms=(forms, [(*tiny, 1, [64, 64])]),
            parts=(parts, [MINI]),
            detectors=(detectors, [RETINANET]),
            training=(training, [RETINANET]),
            latency=(latency, [(1, [64, 64])]),
            graphs=(graphs, tiny),
            syncbn=(syncbn, ['two processes']),
            memory=(memory, tiny),
            compile=(compiled, ['training', 'optimize']),
        )
    some = ['fasternet-t0', 'fasternet-s', 'g-ghost-032', 'ghostnet']
    some += ['resnet-18-tshaped']
    points = [(1, [224, 224]), (32, [224, 224]), (1, [800, 1216])]
    sizes = [(1, [224, 224]), (8, [512, 512])]
    modes = ['inference', 'training', 'optimize', 'reduce-overhead']
    return dict(
        machine=(machine, ['cuda']),
        parity=(parity, list(OURS)),
        forms=(forms, [(name, *size) for size in sizes for name in some]),
        parts=(parts, [MASK_RCNN, *some[2:]]),
        detectors=(detectors, [MASK_RCNN, RETINANET, RTMDET]),
        training=(training, [RETINANET]),
        latency=(latency, points),
        graphs=(graphs, [*FASTERNETS, 'resnet-50']),
        syncbn=(syncbn, ['two processes']),
        memory=(memory, ['fasternet-s', 'fasternet-l']),
        compile=(compiled, modes),
    )


def is_broken(rows: List[Row]) -> bool:
    """Whether the device takes nothing more from its process."""
    return any('CUDA error' in row.get('why', '') for row in rows)


def work(device: str, todo: List[Tuple[str, int]], connection: Any) -> None:
    """Run cases one after the other, and send what they give."""
    set_device(device)
    sections = plan()
    for section, i in todo:
        function, cases = sections[section]
        rows = list(attempt(cases[i], function(cases[i])))
        connection.send(rows)
        if is_broken(rows):
            return
        if ON_GPU:
            torch.cuda.empty_cache()


def run_apart(
    device: str, todo: List[Tuple[str, int]], seconds: float
) -> Iterator[Tuple[str, List[Row]]]:
    """Run cases in a process that is replaced where it dies or hangs."""
    end = time.monotonic() + seconds
    context, process = mp.get_context('spawn'), None
    while todo:
        section, i = todo[0]
        side = f'{section} {i + 1}'
        limit = min(CASE_SECONDS, end - time.monotonic())
        if limit <= 0:
            yield section, [dict(side=side, why='no time left', ok=False)]
            todo = todo[1:]
            continue
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(device, todo, theirs))
            process.start()
            theirs.close()
        try:
            if not ours.poll(limit):
                raise TimeoutError(f'took more than {limit:.0f} s')
            rows = ours.recv()
        except (EOFError, ConnectionError, TimeoutError) as error:
            process.kill()
            process.join()
            why = f'process ended: {process.exitcode}'
            why = str(error) if isinstance(error, TimeoutError) else why
            rows, process = [dict(side=side, why=why, ok=False)], None
        if process and is_broken(rows):
            process.join()
            process = None
        todo = todo[1:]
        yield section, rows
    if process:
        process.join()


def write(result: Dict[str, Any], out: Path) -> None:
    """Write the report as JSON and as Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / 'gpu.json').write_text(json.dumps(result, indent=1) + '\n')
    parts = ['# GPU', f'`{result["command"]}`, {result["date"]}']
    parts += [name_machine(result['machine'])]
    for section, rows in result['sections'].items():
        text = sys.modules[__name__].__doc__
        parts += [f'## {section}']
        about = [x for x in text.splitlines() if x.startswith(f'  {section} ')]
        parts += [line.split(maxsplit=1)[1] for line in about]
        parts.append(to_markdown(dict(settings={}, rows=rows)))
    parts.append(f'{result["seconds"]:.0f} s in all.')
    (out / 'gpu.md').write_text('\n\n'.join(parts) + '\n')


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--out', type=Path, required=True, metavar='DIR')
    parser.add_argument('--sections', nargs='+', metavar='SECTION')
    parser.add_argument('--seconds', type=float, default=SECONDS)
    args = parser.parse_args(argv)
    set_device(args.device)
    os.environ['KINETO_LOG_LEVEL'] = '99'  # torch's profiler says when it runs
    sections = plan()
    names = args.sections or list(sections)
    if not set(names) <= sections.keys():
        parser.error(f'expected sections of {", ".join(sections)}')
    start = time.monotonic()
    words = sys.argv[1:] if argv is None else argv
    words = ['DIR' if word == str(args.out) else word for word in words]
    result: Dict[str, Any] = dict(
        command=shlex.join(['python', 'tools/gpu.py', *words]),
        date=str(date.today()),
        machine=describe_machine(),
        sections={name: [] for name in names},
    )
    todo = [(name, i) for name in names for i in range(len(sections[name][1]))]
    failed = 0
    for section, rows in run_apart(args.device, todo, args.seconds):
        result['sections'][section] += rows
        result['seconds'] = time.monotonic() - start
        bad = [row for row in rows if not row.get('ok', True)]
        failed += len(bad)
        for row in bad:
            print(f'{section}: {row}', file=sys.stderr)
        print(f'{result["seconds"]:4.0f} s  {section}', flush=True)
        write(result, args.out)
    print(f'{failed} failures; see {args.out / "gpu.md"}')
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
