"""Convert FasterNet weights between the original's layout and timm's.

Reads whatever a config's init_cfg reads: the original's ImageNet files,
timm's, detector checkpoints, .pth and .safetensors, local or remote.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fasternet_det import FasterNet
from fasternet_det.checkpoint import (
    fasternet_from_timm,
    fasternet_to_timm,
    is_timm_fasternet,
    read_state_dict,
)


def convert(
    source: str,
    target: Path,
    layout: str = 'original',
    classifier: bool = True,
) -> str:
    """Convert a checkpoint.

    Args:
        source (str): See :func:`fasternet_det.checkpoint.read_checkpoint`.
        target (Path): New file, ending in .pth or .safetensors.
        layout (str): 'original' or 'timm'. Defaults to 'original'.
        classifier (bool): Whether to keep the classifier, where the source
            has one. Defaults to True.

    Returns:
        str: What was done.

    Raises:
        FileNotFoundError: If the source or the target's folder is missing.
        FileExistsError: If the target exists.
        ValueError: If the source holds no FasterNet, or the target ends
            otherwise.
    """
    if target.suffix not in ('.pth', '.safetensors'):
        raise ValueError(f'{target} ends in neither .pth nor .safetensors')
    if target.exists():
        raise FileExistsError(f'{target} exists: remove it or name another')
    if not target.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {target.parent}')

    read = read_state_dict(source)
    state_dict = fasternet_from_timm(read)
    arch, in_channels = FasterNet.find_arch(state_dict)
    if arch not in FasterNet.arch_settings:
        raise ValueError(f'{source} holds no FasterNet of T0 to L: {arch}')
    # accounts for every key
    FasterNet(arch, in_channels).load_pretrained(state_dict, source)
    if not classifier:
        state_dict = {
            key: value
            for key, value in state_dict.items()
            if key not in FasterNet.classifier_keys
        }
    if layout == 'timm':
        state_dict = fasternet_to_timm(state_dict)

    state_dict = {k: v.contiguous() for k, v in state_dict.items()}
    if target.suffix == '.safetensors':
        save_file(state_dict, target)
    else:
        torch.save(state_dict, target)
    source_layout = 'timm' if is_timm_fasternet(read) else 'original'
    return (
        f'{source}: {arch}, {source_layout} layout, {len(read)} entries\n'
        f'{target}: {layout} layout, {len(state_dict)} entries, '
        f'{len(read) - len(state_dict)} left out'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('source', help='checkpoint to read: path or URL')
    parser.add_argument(
        'target', type=Path, help='file to write: .pth or .safetensors'
    )
    parser.add_argument(
        '--layout', choices=('original', 'timm'), default='original'
    )
    parser.add_argument(
        '--no-classifier',
        dest='classifier',
        action='store_false',
        help='leave the ImageNet classifier out',
    )
    try:
        print(convert(**vars(parser.parse_args())))
    except (OSError, ValueError) as error:
        sys.exit(f'Nothing was written: {error}')


if __name__ == '__main__':
    main()
