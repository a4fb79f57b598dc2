"""Export a backbone or a whole detector to ONNX or OpenVINO.

Whole detectors decode boxes and run NMS by themselves. Their input is what
mmdet's data_preprocessor gives: normalised, padded images (N, 3, H, W); with
--pixels, what it takes: images as they are read and resized, in uint8.
docs/export.md explains the metadata in the file.
"""

import argparse
import sys
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple

import torch.nn as nn
from mmdet.models import BaseDetector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from fasternet_det.backbones.base import Backbone
from fasternet_det.checkpoint import (
    load_exactly,
    read_checkpoint,
    read_state_dict,
)
from fasternet_det.deploy.evaluate import (
    ExportedDetector,
    calibration_images,
    evaluate,
)
from fasternet_det.deploy.export import OPSET, check_target, export, load
from fasternet_det.deploy.metadata import describe

# by format: what runs it, and how its file ends
RUNTIMES = dict(onnx=('onnxruntime', '.onnx'), openvino=('openvino', '.xml'))
CALIBRATION_IMAGES = 32


def load_model(
    config: Config, checkpoint: str, what: str
) -> Tuple[nn.Module, Optional[Sequence[str]]]:
    """Build a config's model with a checkpoint's weights.

    Args:
        config (Config): Config of a detector with our backbone.
        checkpoint (str): See :func:`fasternet_det.checkpoint.read_checkpoint`.
        what (str): 'backbone' or 'detector'.

    Returns:
        tuple[nn.Module, Sequence[str] | None]: The model, in eval mode, and
        its classes, if they are known.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint does not fit.
    """
    init_default_scope(config.get('default_scope', 'mmdet'))
    classes = None
    if what == 'backbone':
        model = MODELS.build(config.model.backbone)
        state_dict = read_state_dict(checkpoint)
        if isinstance(model, Backbone):
            model.load_pretrained(state_dict, checkpoint)
        else:
            load_exactly(model, state_dict, source=checkpoint)
    else:
        read = read_checkpoint(checkpoint)
        model = MODELS.build(config.model)
        load_exactly(model, read.get('state_dict', read), source=checkpoint)
        classes = read.get('meta', {}).get('dataset_meta', {}).get('classes')
    return model.eval(), classes


def score(config: Config, name: str, model: BaseDetector) -> Dict[str, float]:
    """Score a detector, print its AP, and return it by metric, 0 to 1."""
    scores = {k: v for k, v in evaluate(config, model).items() if 'mAP' in k}
    print(f'{name}:', *(f'{k} {v:.4f}' for k, v in scores.items()), flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', help='config of a detector')
    parser.add_argument('checkpoint', help='its weights: path or URL')
    parser.add_argument('--format', choices=RUNTIMES, default='onnx')
    parser.add_argument(
        '--what', choices=('backbone', 'detector'), default='detector'
    )
    parser.add_argument(
        '--out',
        type=Path,
        help='file to write, by default named after the config, here',
    )
    parser.add_argument(
        '--pixels',
        action='store_true',
        help='take images as they are read (uint8, BGR), and normalise and '
        'pad them in the graph',
    )
    parser.add_argument(
        '--opset',
        type=int,
        default=OPSET,
        help=f"version of ONNX's operators (default: {OPSET})",
    )
    parser.add_argument(
        '--int8',
        action='store_true',
        help='quantise, calibrated on the training split',
    )
    parser.add_argument(
        '--max-drop',
        type=float,
        metavar='AP',
        help='with --int8: points of AP, of 100, that it may lose on the '
        "config's test set; layers fall back to float32 until that holds",
    )
    parser.add_argument(
        '--evaluate',
        action='store_true',
        help="score the detector and its export by the config's test set",
    )
    args = parser.parse_args()
    if args.max_drop is not None and not args.int8:
        parser.error('--max-drop needs --int8')
    scores = args.evaluate or args.max_drop is not None
    if scores and args.what == 'backbone':
        parser.error('--evaluate and --max-drop need --what detector')
    runtime, suffix = RUNTIMES[args.format]
    path = args.out or Path(
        Path(args.config).stem
        + '_backbone' * (args.what == 'backbone')
        + '_int8' * args.int8
        + suffix
    )
    before = {}

    def score_export(name: str, file: str) -> Dict[str, float]:
        detector = ExportedDetector(
            load(file, runtime),
            config.model.data_preprocessor,
            metadata,
        )
        return score(config, name, detector)

    def accept(file: str) -> bool:
        """Whether no AP of an INT8 form falls by more than --max-drop."""
        after = score_export('INT8', file)
        return all(
            100 * (before[metric] - after[metric]) <= args.max_drop
            for metric in before
            if metric.endswith('mAP')
        )

    try:
        if path.suffix != suffix:
            raise ValueError(f'{path} does not end in {suffix}')
        check_target(path)
        config = Config.fromfile(args.config)
        model, classes = load_model(config, args.checkpoint, args.what)
        metadata = describe(config, classes, args.pixels)
        if scores:
            before = score(config, 'PyTorch', model)
        kept = export(
            model,
            path,
            metadata,
            calibration_images(config, CALIBRATION_IMAGES, args.pixels)
            if args.int8
            else None,
            accept if args.max_drop is not None else None,
            args.opset,
            MODELS.build(config.model.data_preprocessor)
            if args.pixels
            else None,
        )
    except (OSError, ValueError) as error:
        sys.exit(f'Nothing was written: {error}')
    weights = path if suffix == '.onnx' else path.with_suffix('.bin')
    print(f'{path}: {weights.stat().st_size / 1e6:.1f} MB of weights')
    if kept:
        print(f'In float32, for --max-drop: {", ".join(kept)}')
    if scores:
        score_export(str(path), str(path))


if __name__ == '__main__':
    main()
