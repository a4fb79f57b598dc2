"""What tools/benchmark.py measures, and how."""

import math
import time
from itertools import accumulate
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], Any]

# (M, N, K) of the products whose fastest is called the peak.
MATMULS = ((2048, 2048, 2048), (4096, 1024, 1024), (1024, 1024, 1024))
TURN_SECONDS = 0.05  # least duration of a turn: short runs are repeated
PAUSE_SECONDS = 0.01  # lets the threads of the side before fall asleep
BANDWIDTH_BYTES = 256 * 2**20  # per array, beyond any cache


def seconds_of(run: Run) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def fastest(run: Run, calls: int = 5) -> float:
    """Least time in seconds of some calls, after an untimed one."""
    run()
    return min(seconds_of(run) for _ in range(calls))


def alternate(runs: Sequence[Run], rounds: int) -> List[List[float]]:
    """Time functions in turns, ABCABC..., so that drift meets all alike.

    Args:
        runs (Sequence[Callable]): The sides.
        rounds (int): Turns of each side. Two untimed calls go before.

    Returns:
        list[list[float]]: Seconds per call of each turn, by side.
    """
    for run in runs:
        run()
    calls = [max(1, math.ceil(TURN_SECONDS / seconds_of(run))) for run in runs]
    times: List[List[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, count, series in zip(runs, calls, times):
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            for _ in range(count):
                run()
            series.append((time.perf_counter() - start) / count)
    return times


def quartiles(values: Sequence[float]) -> List[float]:
    """First quartile, median and third quartile."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    series = torch.tensor(values, dtype=torch.float64)
    return torch.quantile(series, points).tolist()


def matmul_peak(dtype: torch.dtype) -> Tuple[str, Run, int]:
    """Find the fastest way to multiply matrices.

    Args:
        dtype (torch.dtype): Of the matrices.

    Returns:
        tuple: Its name, the function, and its floating-point operations: two
        per multiply-add.
    """
    ways: Dict[str, Tuple[Run, int]] = {}
    for m, n, k in MATMULS:
        a = torch.randn(m, k).to(dtype)
        b = torch.randn(n, k).to(dtype)
        # The same product by oneDNN, which torch takes for 1x1 convolutions
        # in one thread only from 16 images on.
        x = a.view(16, 1, m // 16, k).permute(0, 3, 1, 2)
        weight = b[:, :, None, None].to(memory_format=torch.channels_last)
        b_t = b.t().contiguous()
        for way, run in (
            ('torch.mm', lambda a=a, b_t=b_t: torch.mm(a, b_t)),
            ('F.linear', lambda a=a, b=b: F.linear(a, b)),
            ('1x1 F.conv2d', lambda x=x, w=weight: F.conv2d(x, w)),
        ):
            ways[f'{way}, {m}x{n}x{k}'] = run, 2 * m * n * k
    speeds = {
        name: operations / fastest(run)
        for name, (run, operations) in ways.items()
    }
    best = max(speeds, key=speeds.__getitem__)
    return best, *ways[best]


def memory_bandwidth() -> Tuple[str, float]:
    """Measure the memory's bandwidth.

    Returns:
        tuple[str, float]: The fastest way, and its bytes per second.
    """
    a, b, c = torch.zeros(3, BANDWIDTH_BYTES // 4).unbind()
    ways = {
        'copy': fastest(lambda: a.copy_(b)) / 2,
        'add': fastest(lambda: torch.add(a, b, out=c)) / 3,
    }
    best = min(ways, key=ways.__getitem__)
    return best, a.nbytes / ways[best]


class TrafficMode(TorchDispatchMode):
    """Add up the bytes that operators read and write, caches ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(  # noqa: D105
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(
                leaf.nbytes
                for leaf in tree_leaves((args, kwargs, out))
                if isinstance(leaf, Tensor)
            )
        return out


def count_flops(run: Run) -> Tuple[Any, int]:
    """Count multiply-adds as tools/get_flops.py does, in a real run.

    Args:
        run (Callable): Runs a plain module: fused operators go uncounted.

    Returns:
        tuple: What the run returns, and its multiply-adds.
    """
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops() // 2


def count_traffic(run: Run) -> int:
    """Bytes that the operators of a run read and write."""
    with TrafficMode() as mode:
        run()
    return mode.bytes


def peak_memory(run: Run) -> int:
    """Bytes that torch's allocator holds at most during a run, beyond what it
    held before: every allocation and release, as the profiler records them.
    """
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    del result
    changes = sorted(
        (event.start_ns(), i, event.nbytes())
        for i, event in enumerate(events)
        if event.name() == '[memory]'
    )
    return max(accumulate((nbytes for *_, nbytes in changes), initial=0))


def top_operators(run: Run, count: int = 12) -> List[Dict[str, Any]]:
    """Profile a run.

    Args:
        run (Callable): Run once untimed, then profiled.
        count (int): How many operators to return. Defaults to 12.

    Returns:
        list[dict]: ``name``, ``shapes`` of its inputs, ``calls``, ``seconds``
        by itself and ``share`` of the whole, the slowest first.
    """
    run()
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True
    ) as profiler:
        run()
    events = profiler.key_averages(group_by_input_shape=True)
    total = sum(event.self_cpu_time_total for event in events)
    events.sort(key=lambda event: -event.self_cpu_time_total)
    return [
        dict(
            name=event.key,
            shapes=[shape for shape in event.input_shapes if shape],
            calls=event.count,
            seconds=event.self_cpu_time_total / 1e6,
            share=event.self_cpu_time_total / total,
        )
        for event in events[:count]
    ]


def difference(
    outputs: Sequence[Tensor], reference: Sequence[Tensor]
) -> float:
    """Largest difference between maps, relative to the largest value.

    Raises:
        ValueError: If number or shapes differ, or a value is not finite.
    """
    shapes = [tuple(x.shape) for x in outputs]
    expected = [tuple(x.shape) for x in reference]
    if shapes != expected:
        raise ValueError(f'has the shapes {shapes}, expected {expected}')
    worst = max(
        float((x.float() - y.float()).abs().max() / y.float().abs().max())
        for x, y in zip(outputs, reference)
    )
    if not math.isfinite(worst):
        raise ValueError('has values that are not finite')
    return worst
