"""Compare models, forms of them and runtimes, side by side on this machine.

models compares SIDEs, scaling does so as images and batches grow; operators
are those of the paper's Table 1, winograd 3x3 convolutions both ways, training
the steps of a detector, goals all that this project wants to reach; report
makes a page of such results.

A SIDE is NAME[@RUNTIME][:option,...]. NAME is fasternet-ARCH, g-ghost-ARCH,
ghostnet, resnet-18, resnet-50, either of these with -spconv or -saconv,
mobilenet-v2, swin-t, pvt-v2-b0, -b1, -b2, timm-MODEL, such as
timm-mobilevit_xxs or timm-cpubone_b0_bfrobust, or the config of a detector.
RUNTIME is onnxruntime or openvino. Without them, a side is the plain module
in float32; the options are

  original       the original's forward in every FasterNet block
  fold           BatchNorms folded
  channels_last  memory format
  optimize       fasternet_det.deploy.optimize
  direct         the same without Winograd's tiles
  bf16, int8     precision
  compile        torch.compile
  with_cp        activations recomputed, in training
  every          for all runtimes and precisions, the original first

Ratios are against the first side. In float32, sides of the same model must
agree with the first of them before anything is timed. What this machine cannot
compute is left out, and the table says why.
"""

import argparse
import os
import shlex
import sys
from argparse import SUPPRESS
from datetime import date
from pathlib import Path
from typing import List

if not __package__:  # as `python tools/benchmark` has it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = 'benchmark'

from measuring import describe_machine
from rich.console import Console
from rich.markdown import Markdown

from .experiments import COMMANDS
from .report import report, to_markdown, write


def size(text: str) -> List[int]:
    """Parse HxW."""
    height, width = map(int, text.split('x'))
    return [height, width]


ARGUMENTS = {
    'sides': dict(nargs='+', metavar='SIDE'),
    'config': dict(metavar='CONFIG'),
    '--size': dict(type=int, nargs=2, metavar=('H', 'W')),
    '--batch': dict(type=int),
    '--sizes': dict(type=size, nargs='+', metavar='HxW'),
    '--batches': dict(type=int, nargs='+'),
    '--checkpoint': dict(help='weights of the detectors; seeded by default'),
    '--shrink': dict(type=int, help='divide the sides of all images'),
    '--threads': dict(type=int, help="torch's by default"),
    '--rounds': dict(type=int, help='timed turns of each side'),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='benchmark',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, (_, arguments) in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument('--out', type=Path, required=True, metavar='DIR')
        command.add_argument('--name', default=name, help='of the files')
        for argument in (*arguments.split(), '--threads', '--rounds'):
            option = ARGUMENTS[argument]  # its default is the function's
            command.add_argument(argument, default=SUPPRESS, **option)
    command = commands.add_parser('report')
    command.add_argument('folders', type=Path, nargs='+', metavar='DIR')
    command.add_argument('--out', type=Path, required=True, metavar='FILE.md')
    return parser


def main() -> None:
    parser = make_parser()
    args = vars(parser.parse_args())
    command, out = args.pop('command'), args.pop('out')
    os.environ['KINETO_LOG_LEVEL'] = '99'  # torch's profiler says when it runs
    try:
        if command == 'report':
            return report(args['folders'], out)
        name = args.pop('name')
        result = COMMANDS[command][0](**args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # paths of this machine by their last part
    paths = {str(out), args.get('checkpoint')}
    words = [Path(w).name if w in paths else w for w in sys.argv[1:]]
    # what is set of glibc's malloc, as it matters
    malloc = [f'{k}={v}' for k, v in os.environ.items() if k[:7] == 'MALLOC_']
    result['command'] = shlex.join(
        [*sorted(malloc), 'python', 'tools/benchmark', *words]
    )
    result |= dict(kind=command, date=str(date.today()))
    result['machine'] = describe_machine()
    write(result, out / f'{name}.json')
    Console(width=200).print(Markdown(to_markdown(result)))


if __name__ == '__main__':
    main()
