"""Put FasterNet into every detector of mmdet, and say what works.

Of each family, a folder of mmdet's configs, the ResNet-50 of one config (the
nearest, where there is none) gives way to FasterNet-T0. Then it is built,
trained for a step, asked for detections, brought into its fast form and
exported. Each family runs in a process of its own, so that what crashes or
hangs costs one row; what --out holds already is not run again.
"""

import argparse
import json
import os
import re
import shlex
import sys
import textwrap
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, List, Sequence
from unittest.mock import patch

import torch
from benchmark.models import exported_side, parse
from compatibility_models import (
    CONFIGS,
    ENOUGH,
    TRIAL_CHANGES,
    NoDetectorError,
    adapt,
    choose,
    found_by,
    make_batch,
    seed,
    set_threshold,
    with_area,
)
from measuring import alternate, describe_machine, name_machine, ratios, table
from mmdet.registry import MODELS
from mmengine.logging import MessageHub
from seeded import Model, agreement, difference

from fasternet_det.deploy import optimize
from fasternet_det.deploy.operators import kernel_dtypes

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'compatibility.md'
STAGES = ('build', 'train', 'predict', 'float32', 'bfloat16', 'export')
NEEDED = ('build', 'predict')  # by the stages after them
SIZE, LARGE = (160, 192), (320, 384)  # of the images
# In smaller ones, the last maps are less than the kernels of DDOD and SSD, and
# there are fewer places than DINO has queries.
WANT_LARGE = ('ddod', 'dino', 'ssd', 'v3det')
PROPOSALS = 100  # of two-stage detectors, in such small images
ROUNDS = 5  # of the timing
# Largest error of the maps, and least share of detections in common. The
# offsets of deformable layers amplify rounding, and so does libra_rcnn's neck:
# noise of 1e-7 in the image moves dyhead's maps by 5e-5.
LIMITS = {torch.float32: (2e-4, 0.95), torch.bfloat16: (0.03, 0)}
CRASHED = 'crashed'  # of a stage, until it ends
HEADER = (
    *('family', 'config', 'outputs', 'changed too', 'trains'),
    *('without gradient', 'finds', 'fast form, float32'),
    *('fast form, bfloat16', 'export', 'why not'),
)
LEGEND = f"""\
- outputs: `out_indices` of FasterNet. Changed too: what else of the config,
  mostly widths that it takes from the backbone.
- trains: one step of two images. Without gradient: parameters that the loss
  does not reach, with the first of them, for which DistributedDataParallel
  wants `find_unused_parameters=True`. Frozen: on purpose, such as FasterNet's
  stages after its last output.
- finds: objects in an image, by seeded weights, {PROPOSALS} proposals and a
  score threshold at which there are some {ENOUGH}.
- fast form: `optimize(model, dtype)`. The largest difference of the maps that
  go into the heads, relative to their largest value; the share of detections
  that are the model's (one label, IoU above 0.95, scores within 1 %, 99 % of
  the mask's pixels); how many times faster, the median of {ROUNDS} rounds. A
  CPU without bfloat16 computes in it by torch's plain operators, which round
  as much, and whose speed says nothing.
- export: to ONNX. The same share in ONNX Runtime, masks aside.
- `-`: not tried, as a stage before it failed.
- {', '.join(WANT_LARGE)}: images of {LARGE[0]}x{LARGE[1]} pixels. What else
  was changed to try a family is in `tools/compatibility_models.py`."""

# What the numbers do not say.
REMARKS = """\
libra_rcnn, nas_fpn and dyhead amplify rounding: mmdet's own maps in float32
are 1e-5, 3e-5 and 5e-5 from those in float64, nas_fpn's fast form 3e-6;
folding libra_rcnn and nas_fpn in float64 changes 4e-15 and 3e-14. In bfloat16,
yolox's and strongsort's maps (of a YOLOX too) differ by 3.4 % and 3.1 % at one
place, by 1.8 % and 1.5 % as roots of the means of squares. nas_fcos and
soft_teacher find one of some 20 more or less at the threshold. ssd does not
predict in mmdet 3.3, whatever the backbone."""


class Trial:
    """The detector of a family, from stage to stage.

    Each stage returns what the table says of it, or raises.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.size = LARGE if family in WANT_LARGE else SIZE

    def build(self) -> Dict[str, Any]:
        """Build the detector."""
        self.config, changed = adapt(self.family)
        self.config.merge_from_dict(TRIAL_CHANGES.get(self.family, {}))
        model = self.config.model
        # An exported graph of normalised images takes padding for pixels.
        divisor = model.data_preprocessor.get('pad_size_divisor', 1)
        self.size = [-(-side // divisor) * divisor for side in self.size]
        for key, rpn in (('train_cfg', 'rpn_proposal'), ('test_cfg', 'rpn')):
            if (model.get(key) or {}).get(rpn):
                model[key][rpn].max_per_img = PROPOSALS
        self.detector = MODELS.build(model)
        self.detector.init_weights()
        return dict(outputs=model.backbone.out_indices, changed=changed)

    def _batch(self) -> Dict[str, Any]:
        """The images as the model takes them, normalised and padded."""
        detector = self.detector
        batch = make_batch(self.config, detector, self.size)
        return detector.data_preprocessor(batch, detector.training)

    def train(self) -> Dict[str, Any]:
        """Make one training step, from the initial weights."""
        # what a runner would tell some heads
        hub = MessageHub.get_current_instance()
        hub.update_info_dict(dict(epoch=0, iter=0))
        detector = self.detector
        detector.train()
        batch = self._batch()
        loss, _ = detector.parse_losses(detector(**batch, mode='loss'))
        if not loss.isfinite():
            raise ValueError(f'the loss is {loss.item()}')
        loss.backward()
        parameters = list(detector.named_parameters())
        without = [
            name
            for name, parameter in parameters
            if parameter.requires_grad and parameter.grad is None
        ]
        frozen = sum(not p.requires_grad for _, p in parameters)
        return dict(without=without, frozen=frozen)

    @torch.no_grad()
    def predict(self) -> Dict[str, Any]:
        """Find something in an image, with seeded weights."""
        detector = seed(self.detector)
        batch = self._batch()
        image, samples = batch['inputs'][:1], batch['data_samples'][:1]
        self.model = Model(self.family, detector, image, samples)
        self.found = set_threshold(self.model)
        return dict(detections=len(self.found))

    def float32(self) -> Dict[str, Any]:
        """Compare the fast form in float32."""
        return self._compare(torch.float32)

    def bfloat16(self) -> Dict[str, Any]:
        """Compare the one in bfloat16.

        A CPU without it computes by torch's plain operators, which round as
        much, and whose speed says nothing.
        """
        if torch.bfloat16 in kernel_dtypes():
            return self._compare(torch.bfloat16)
        with patch.object(
            sys.modules[optimize.__module__],
            'kernel_dtypes',
            lambda: {torch.bfloat16},
        ):
            return self._compare(torch.bfloat16, timed=False)

    @torch.no_grad()
    def _compare(
        self, dtype: torch.dtype, timed: bool = True
    ) -> Dict[str, Any]:
        model = self.model
        fast = optimize(model.module, dtype)
        error = difference(model.maps_of(fast), model.maps_of(model.module))
        common = agreement(found_by(model.run_of(fast)), self.found)
        most, least = LIMITS[dtype]
        if error > most or common < least:
            raise ValueError(
                f'its maps differ by {error:.0e}, {common:.0%} of the '
                'detections are the same'
            )
        row = dict(error=error, common=common)
        if timed:
            runs = [model.run_of(form) for form in (model.module, fast)]
            row['faster'] = ratios(*alternate(runs, ROUNDS))[1]
        return row

    def export(self) -> Dict[str, Any]:
        """Export to ONNX, and find the same in ONNX Runtime."""
        spec = parse(f'{self.family}@onnxruntime')
        with TemporaryDirectory() as folder:
            side = exported_side(spec, self.model, Path(folder))
            (found,) = side.found()
        common = agreement(with_area(found), self.found)
        if common < LIMITS[torch.float32][1]:
            raise ValueError(f'{common:.0%} of the detections are the same')
        return dict(common=common)


def reason(error: Exception) -> str:
    """What was raised, in one line."""
    if isinstance(error, NoDetectorError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f'lacks the package {error.name}'
    line = str(error).strip().partition('\n')[0]
    if not line:  # a bare assertion
        line = traceback.extract_tb(error.__traceback__)[-1].line
    # what the registry puts before it, and where files lie here
    line = re.sub(r'class `\w+` in [\w/]+\.py: |"?/\S*/', '', line)
    return textwrap.shorten(f'{type(error).__name__}: {line}', 150)


def new_row(family: str) -> Dict[str, Any]:
    """The row of a family of which nothing is known yet."""
    return dict(
        family=family,
        config=choose(family).stem,
        machine=describe_machine(),
        detector=True,
        why={STAGES[0]: CRASHED},
    )


def examine(row: Dict[str, Any], path: Path) -> Dict[str, Any]:
    """Take a family through the stages.

    Args:
        row (dict): To be filled.
        path (Path): Where it is kept, also of a process that dies.

    Returns:
        dict: The row.
    """
    trial = Trial(row['family'])
    log = path.with_suffix('.log').open('w')
    with log, redirect_stdout(log), redirect_stderr(log):
        for stage in STAGES:
            row['why'][stage] = CRASHED
            path.write_text(json.dumps(row, indent=1))
            try:
                row[stage] = getattr(trial, stage)()
                del row['why'][stage]
            except Exception as error:  # noqa: BLE001, each is a result
                traceback.print_exc()
                row['why'][stage] = reason(error)
                row['detector'] = not isinstance(error, NoDetectorError)
                if stage in NEEDED:
                    break
    path.write_text(json.dumps(row, indent=1))
    return row


def examine_apart(family: str, folder: Path, limit: float) -> None:
    """Examine a family in a process of its own, unless that was done."""
    path = folder / f'{family}.json'
    if path.exists() and CRASHED not in path.read_text():
        return
    print(family, flush=True)
    path.write_text(json.dumps(new_row(family)))
    process = get_context('spawn').Process(
        target=examine, args=(new_row(family), path)
    )
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        fate = f'not done in {limit} s'
    else:
        fate = f'exit code {process.exitcode}'
    path.write_text(path.read_text().replace(CRASHED, fate))


def cells(row: Dict[str, Any]) -> List[str]:
    """A line of the table."""

    def cell(stage: str, form: Callable[..., str]) -> str:
        if stage in row['why']:
            return 'no'
        return form(**row[stage]) if row.get(stage) else '-'

    def names(values: Sequence[str]) -> str:
        return ', '.join(f'`{value}`' for value in values) or '-'

    def gradients(without: List[str], frozen: int) -> str:
        first = f' ({names(without[:1])})' * bool(without)
        return f'{len(without)}{first}' + f', {frozen} frozen' * bool(frozen)

    def fast(error: float, common: float, faster: float = 0) -> str:
        return f'{error:.0e}, {common:.0%}' + f', {faster:.2f}x' * bool(faster)

    why = '; '.join(f'{stage}: {line}' for stage, line in row['why'].items())
    return [
        row['family'],
        row['config'],
        cell('build', lambda outputs, changed: ' '.join(map(str, outputs))),
        cell('build', lambda outputs, changed: names(changed)),
        cell('train', lambda without, frozen: 'yes'),
        cell('train', gradients),
        cell('predict', '{detections}'.format),
        cell('float32', fast),
        cell('bfloat16', fast),
        cell('export', '{common:.0%}'.format),
        why.replace('|', '\\|') or '-',
    ]


def page(rows: Sequence[Dict[str, Any]], command: str) -> str:
    """The page of a sweep.

    Raises:
        ValueError: If the rows are of different machines.
    """
    machine = rows[0]['machine']
    if any(row['machine'] != machine for row in rows):
        raise ValueError(
            '--out holds rows of other machines or versions: name an empty '
            'folder'
        )
    others = [
        f'{row["family"]} ({row["why"]["build"]})'
        for row in rows
        if not row['detector']
    ]
    rows = [row for row in rows if row['detector']]
    done = {
        stage: sum(bool(row.get(stage)) for row in rows) for stage in STAGES
    }
    parts = [
        '# Compatibility',
        "Which of mmdet's detectors take FasterNet, and what must be changed: "
        'FasterNet-T0 in the place of the backbone of one config of each '
        f'family, {SIZE[0]}x{SIZE[1]} pixels. Made by',
        f'```bash\n{command}\n```',
        f'**Of {len(rows)} families, {done["build"]} build, {done["train"]} '
        f'train, {done["predict"]} predict; {done["float32"]} have a fast '
        f'form in float32, {done["bfloat16"]} in bfloat16, {done["export"]} '
        'are exported.**',
        LEGEND,
        REMARKS,
        f'{name_machine(machine)}.',
        table(HEADER, [cells(row) for row in rows]),
    ]
    if others:
        parts.append(f'Folders without a detector: {", ".join(others)}.')
    return '\n\n'.join(parts) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--out', type=Path, required=True, help='folder for the results'
    )
    parser.add_argument(
        '--only', nargs='+', metavar='FAMILY', help='and write no page'
    )
    parser.add_argument(
        '--jobs', type=int, default=1, help='families at a time'
    )
    parser.add_argument(
        '--limit', type=int, default=300, help='seconds for a family'
    )
    args = parser.parse_args()
    families = sorted(
        path.name for path in CONFIGS.iterdir() if any(path.glob('*.py'))
    )
    for family in args.only or ():
        if family not in families:
            parser.error(f'{family!r} is none of {", ".join(families)}')
    families = args.only or families
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.out.resolve()
    threads = max(torch.get_num_threads() // args.jobs, 1)
    os.environ['OMP_NUM_THREADS'] = str(threads)
    os.chdir(CONFIGS.parent)  # from where configs name each other
    with ThreadPoolExecutor(args.jobs) as pool:
        one = partial(examine_apart, folder=folder, limit=args.limit)
        list(pool.map(one, families))
    rows = [
        json.loads((folder / f'{family}.json').read_text())
        for family in families
    ]
    words = [Path(w).name if w == str(args.out) else w for w in sys.argv[1:]]
    command = shlex.join(['python', 'tools/compatibility.py', *words])
    text = page(rows, command)
    if args.only:
        print(text)
    else:
        PAGE.write_text(text)
        print(PAGE)


if __name__ == '__main__':
    main()
