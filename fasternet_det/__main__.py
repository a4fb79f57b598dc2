"""The command ``fasternet-det``: it runs the tools, wherever they lie.

Usage:
    fasternet-det train my_config.py --work-dir work_dirs/mine
    python -m fasternet_det train my_config.py --work-dir work_dirs/mine
"""

import argparse
import ast
import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
MIM = PACKAGE / '.mim'
HOME = MIM if MIM.exists() else PACKAGE.parent  # of a wheel; of a clone
CONFIGS, TOOLS = HOME / 'configs', HOME / 'tools'
COMMANDS = dict(
    train='train.py',
    test='test.py',
    predict='predict.py',
    export='export.py',
    convert='convert_checkpoint.py',
    flops='get_flops.py',
    compare='compare.py',
    benchmark='benchmark/__main__.py',
)


def main() -> None:
    """Run the tool that the command line names, with all that follows.

    Raises:
        SystemExit: If there is no such tool, and as the tool says.
    """
    said = {'configs': 'Print the folder of the configs.'}
    for name, file in COMMANDS.items():
        docstring = ast.get_docstring(ast.parse((TOOLS / file).read_text()))
        said[name] = docstring.splitlines()[0]
    parser = argparse.ArgumentParser(
        prog='fasternet-det',
        description='Run a tool of fasternet_det.',
        epilog='\n'.join(f'  {name:9}  {what}' for name, what in said.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', choices=said, metavar='COMMAND')
    parser.add_argument(
        'options',
        nargs=argparse.REMAINDER,
        metavar='...',
        help="the tool's own; --help lists them",
    )
    args = parser.parse_args()
    if args.command == 'configs':
        if args.options:
            parser.error(f'configs takes no options, got {args.options}')
        print(CONFIGS)  # noqa: T201
        return
    tool = TOOLS / COMMANDS[args.command]
    sys.argv[1:] = args.options
    sys.path.insert(0, str(tool.parent))  # as Python does with a script
    runpy.run_path(str(tool), run_name='__main__')


if __name__ == '__main__':
    main()
