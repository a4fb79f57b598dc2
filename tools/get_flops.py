"""Count parameters and FLOPs; needs no weights, data, network or memory."""

import argparse
from pathlib import Path
from typing import Callable, Dict, Iterable, Sequence, Tuple, Union

import torch
import torch.nn as nn
from mmdet.models import SingleStageDetector, StandardRoIHead, TwoStageDetector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from fasternet_det import FasterNet

# Parameters in M and FLOPs in G that the paper, arXiv 2303.03667, reports: of
# its ImageNet classifiers, and of Mask R-CNN on COCO with these backbones.
PAPER_CLASSIFIERS = dict(
    t0=(3.9, 0.34),
    t1=(7.6, 0.85),
    t2=(15.0, 1.91),
    s=(31.1, 4.56),
    m=(53.5, 8.74),
    l=(93.5, 15.52),
)
FASTERNET = Path(__file__).resolve().parents[1] / 'configs' / 'fasternet'
PAPER_DETECTORS = {
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': (44.2, 253),
    FASTERNET / 'mask-rcnn_fasternet-s_fpn_1x_coco.py': (49.0, 258),
    FASTERNET / 'mask-rcnn_fasternet-m_fpn_1x_coco.py': (71.2, 344),
    FASTERNET / 'mask-rcnn_fasternet-l_fpn_1x_coco.py': (110.9, 484),
}
PAPER_NOTE = (
    "The paper's detectors: by convention about 6 G fewer FLOPs; "
    'R50 without its 0.2 M frozen parameters.'
)
NOTE = (
    'FLOPs: multiply-adds of convolutions, deconvolutions and linear '
    'layers; 1000 proposals, 100 masks.'
)


def count_flops(run: Callable[[], object]) -> int:
    """Count the multiply-adds of a run; fused operators go uncounted."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2  # it counts x * y + z as two


def _count(
    build: Callable[[], nn.Module], run: Callable[[nn.Module], object]
) -> Tuple[int, int]:
    """Count the parameters of what is built and the FLOPs of running it."""
    with torch.device('meta'), torch.no_grad():
        model = build().eval()
        flops = count_flops(lambda: run(model))
    return sum(param.numel() for param in model.parameters()), flops


def config_path(name: Union[str, Path]) -> Path:
    """The file of a config, 'mmdet::' and the name of one of mmdet's too."""
    mmdet = f'{get_installed_path("mmdet")}/.mim/configs/'
    return Path(str(name).replace('mmdet::', mmdet))


def read_config(name: Union[str, Path]) -> Config:
    """Read the config of a detector.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no ``model``.
    """
    config = Config.fromfile(config_path(name))
    if 'model' not in config:
        raise ValueError(f'{name} has no `model`')
    return config


def count_classifier(arch: Union[str, dict]) -> Tuple[int, int]:
    """Count the ImageNet classifier of an arch, on a 224x224 image.

    Args:
        arch (str | dict): The ``arch`` of :class:`~fasternet_det.FasterNet`.

    Returns:
        tuple[int, int]: Number of parameters, and FLOPs in multiply-adds.
    """
    return _count(
        lambda: FasterNet(arch, fork_feat=False),
        lambda model: model(torch.empty(1, 3, 224, 224)),
    )


def count_detector(
    config: Union[str, Path, Config], shape: Sequence[int] = (800, 1280)
) -> Tuple[int, int]:
    """Count a one-stage detector, or a two-stage one with the standard RoI
    head, with masks or without.

    Args:
        config (str | Path | Config): A config, its file, or 'mmdet::' and the
            name of one of mmdet's.
        shape (Sequence[int]): Height and width of the image in pixels.
            Defaults to (800, 1280), the paper's.

    Returns:
        tuple[int, int]: Number of parameters, frozen ones included, and FLOPs
        in multiply-adds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the config has no detector that can be counted.
    """
    if not isinstance(config, Config):
        config = read_config(config)
    in_channels = config.model.get('backbone', {}).get('in_channels', 3)

    def run(model: nn.Module) -> None:
        roi_head = getattr(model, 'roi_head', None)
        dense_head = None
        if isinstance(model, SingleStageDetector):
            dense_head = getattr(model, 'bbox_head', None)
        elif (
            isinstance(model, TwoStageDetector)
            and type(roi_head) is StandardRoIHead
            and not roi_head.with_shared_head
        ):
            dense_head = getattr(model, 'rpn_head', None)
        if dense_head is None:
            raise ValueError(
                f'{type(model).__name__} is neither a one-stage detector with '
                'a bbox_head nor a two-stage one with an rpn_head and a '
                'StandardRoIHead without shared_head'
            )
        dense_head(model.extract_feat(torch.empty(1, in_channels, *shape)))
        # RoIAlign has no kernel for meta, but the shape it gives is known.
        for kind, num_rois in (('bbox', 1000), ('mask', 100)):
            if getattr(roi_head, f'with_{kind}', False):
                align = getattr(roi_head, f'{kind}_roi_extractor')
                getattr(roi_head, f'{kind}_head')(
                    torch.empty(
                        num_rois,
                        align.out_channels,
                        *align.roi_layers[0].output_size,
                    )
                )

    init_default_scope(config.get('default_scope', 'mmdet'))
    try:
        return _count(lambda: MODELS.build(config.model), run)
    except RuntimeError as error:  # such as an operator without meta kernel
        raise ValueError(
            f'{config.filename} cannot be counted: {error}'
        ) from error


def _table(
    title: str,
    counts: Dict[str, Tuple[int, int]],
    reported: Iterable[Tuple[float, float]],
) -> Table:
    """Put counts beside the paper's figures."""
    table = Table('', title=title)
    for column in ('params (M)', 'paper', 'FLOPs (G)', 'paper'):
        table.add_column(column, justify='right')
    for (name, (params, flops)), paper in zip(counts.items(), reported):
        table.add_row(
            name,
            f'{params / 1e6:.2f}',
            str(paper[0]),
            f'{flops / 1e9:.2f}',
            str(paper[1]),
        )
    return table


def main() -> None:
    """Print the counts that the command line asks for."""
    parser = argparse.ArgumentParser(
        description='Count the parameters and FLOPs of a detector; without a '
        "config, those of the paper's models."
    )
    parser.add_argument('config', nargs='?', help='config of a detector')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help="size of that detector's image, 800 1280 by default",
    )
    args = parser.parse_args()
    if args.shape and not args.config:
        parser.error('--shape needs a config')

    console = Console(highlight=False, soft_wrap=True)
    if args.config:
        try:
            shape = args.shape or (800, 1280)
            params, flops = count_detector(args.config, shape)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        console.print(
            f'{params / 1e6:.2f} M parameters, {flops / 1e9:.2f} G '
            'FLOPs for {1}x{0} pixels'.format(*shape)
        )
    else:
        classifiers = {
            arch: count_classifier(arch) for arch in PAPER_CLASSIFIERS
        }
        detectors = {
            Path(config).stem: count_detector(config)
            for config in PAPER_DETECTORS
        }
        console.print(
            _table(
                'FasterNet on ImageNet, 224x224',
                classifiers,
                PAPER_CLASSIFIERS.values(),
            )
        )
        console.print(
            _table(
                'Mask R-CNN on COCO, 1280x800',
                detectors,
                PAPER_DETECTORS.values(),
            )
        )
        console.print(PAPER_NOTE)
    console.print(NOTE)


if __name__ == '__main__':
    main()
