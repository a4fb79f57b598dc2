"""Timing in turns, the machine that it is on, and tables of it."""

import math
import os
import platform
import re
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import torch
from torch.utils import collect_env

Run = Callable[[], Any]
TURN_SECONDS = 0.05  # least duration of a turn: short runs are repeated
PAUSE_SECONDS = 0.01  # lets the threads of the side before fall asleep
# Where timm and torchvision lie: beside the environment, as mmengine and
# mmdet change what they do where they find a torchvision.
TIMM = Path(sys.prefix, 'timm')
PACKAGES = 'torch mmcv mmdet onnxruntime openvino timm numpy'.split()
INSTRUCTIONS = r'avx2|avx512f|\w*(vnni|bf16)|amx_\w+|asimd|i8mm|sve'


def use_threads(threads: int = 0) -> int:
    """Set the number of threads, where one is given, and tell it."""
    torch.set_num_threads(threads or torch.get_num_threads())
    return torch.get_num_threads()


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(run: Run, calls: int = 1) -> float:
    """Time calls, in seconds for one."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - start) / calls


def alternate(runs: Sequence[Run], rounds: int) -> List[List[float]]:
    """Time functions in turns, ABCABC..., so that drift meets all alike;
    ``torch.utils.benchmark`` times one after the other.

    Returns:
        list[list[float]]: Seconds per call of each turn, by function. Two
        untimed calls go before.
    """
    for run in runs:
        run()
    calls = [max(1, math.ceil(TURN_SECONDS / seconds_of(run))) for run in runs]
    times: List[List[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, count, series in zip(runs, calls, times):
            time.sleep(PAUSE_SECONDS)
            series.append(seconds_of(run, count))
    return times


def quartiles(values: Sequence[float]) -> List[float]:
    """First quartile, median and third quartile."""
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist()


def middle(value: Any) -> float:
    """The median, of quartiles."""
    return value[1] if isinstance(value, list) else value


def ratios(reference: Sequence[float], times: Sequence[float]) -> List[float]:
    """Quartiles of how often faster, round by round."""
    return quartiles([a / b for a, b in zip(reference, times)])


def time_rows(runs: Dict[str, Run], rounds: int) -> List[Dict[str, Any]]:
    """Let functions take turns; a row of each, against the first."""
    times = alternate(list(runs.values()), rounds)
    rows = []
    for name, series in zip(runs, times):
        ms = [1e3 * value for value in quartiles(series)]
        row = {'side': name, 'times': series, 'ms': ms}
        rows.append(row | {'times faster': ratios(times[0], series)})
    return rows


def describe_machine() -> Dict[str, Any]:
    """Describe the machine and what runs on it."""
    info = collect_env.get_cpu_info(collect_env.run)  # of lscpu
    lscpu = dict(re.findall(r'^\s*(.+?): +(.*)$', info, re.M))
    flags = lscpu.get('Flags', '').split()
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    installed = {
        found.metadata['Name']: found.version
        for found in distributions(path=[*sys.path, str(TIMM)])
    }
    return dict(
        cpu=lscpu.get('Model name', platform.processor()),
        family=lscpu.get('CPU family'),
        model=lscpu.get('Model'),
        cores=len(os.sched_getaffinity(0)),
        instructions=[f for f in flags if re.fullmatch(INSTRUCTIONS, f)],
        caches=[f'{k} {v}' for k, v in lscpu.items() if k.endswith(' cache')],
        memory=f'{memory / 2**30:.0f} GiB',
        system=f'{platform.system()} {platform.release()}',
        python=platform.python_version(),
        versions={k: installed[k] for k in PACKAGES if k in installed},
    )


def name_machine(machine: Dict[str, Any]) -> str:
    """Write a machine in one line."""
    return '; '.join(f'{key} {cell(value)}' for key, value in machine.items())


def cell(value: Any) -> str:
    """Write what a row holds."""
    if value is None:
        return '-'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, float):
        return f'{value:.0f}' if abs(value) >= 100 else f'{value:.3g}'
    if isinstance(value, dict):
        return ', '.join(f'{key} {cell(part)}' for key, part in value.items())
    if isinstance(value, (list, tuple)):
        parts = list(map(cell, value))
        if isinstance(value[0], float):  # quartiles
            return '{1} ({0} to {2})'.format(*parts)
        return ', '.join(parts)
    return str(value)


def by_x(values: Sequence[int]) -> str:
    """Write a size."""
    return 'x'.join(map(str, values))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
