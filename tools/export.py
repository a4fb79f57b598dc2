"""Export a backbone or a whole detector to ONNX or OpenVINO.

Whole detectors decode boxes and run NMS by themselves. Their input is what
mmdet's data_preprocessor gives: normalised, padded images (N, 3, H, W).
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, Tuple

import torch.nn as nn
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from fasternet_det import FasterNet, GGhostRegNet
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
from fasternet_det.deploy.export import check_target, export, load

# by format: what runs it, and how its file ends
RUNTIMES = dict(onnx=('onnxruntime', '.onnx'), openvino=('openvino', '.xml'))
CALIBRATION_IMAGES = 32


def load_model(
    config: Config, checkpoint: str, what: str
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Build a config's model with a checkpoint's weights.

    Args:
        config (Config): Config of a detector with our backbone.
        checkpoint (str): See :func:`fasternet_det.checkpoint.read_checkpoint`.
        what (str): 'backbone' or 'detector'.

    Returns:
        tuple[nn.Module, dict]: The model, in eval mode, and what a user of
        its export must know.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint does not fit.
    """
    init_default_scope(config.get('default_scope', 'mmdet'))
    preprocessor = config.model.data_preprocessor
    metadata = dict(
        mean=preprocessor.get('mean'),
        std=preprocessor.get('std'),
        bgr_to_rgb=preprocessor.get('bgr_to_rgb', False),
        pad_size_divisor=preprocessor.get('pad_size_divisor', 1),
    )
    if what == 'backbone':
        model = MODELS.build(config.model.backbone)
        state_dict = read_state_dict(checkpoint)
        if isinstance(model, (FasterNet, GGhostRegNet)):
            model.load_pretrained(state_dict, checkpoint)
        else:
            load_exactly(model, state_dict, source=checkpoint)
    else:
        read = read_checkpoint(checkpoint)
        model = MODELS.build(config.model)
        load_exactly(model, read.get('state_dict', read), source=checkpoint)
        meta = read.get('meta', {}).get('dataset_meta', {})
        metadata['classes'] = meta.get('classes')
    return model.eval(), metadata


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
        '--int8',
        action='store_true',
        help='quantise, calibrated on the training split',
    )
    parser.add_argument(
        '--evaluate',
        action='store_true',
        help="score the detector and its export by the config's test set",
    )
    args = parser.parse_args()
    if args.evaluate and args.what == 'backbone':
        parser.error('--evaluate needs --what detector')
    runtime, suffix = RUNTIMES[args.format]
    path = args.out or Path(
        Path(args.config).stem
        + '_backbone' * (args.what == 'backbone')
        + '_int8' * args.int8
        + suffix
    )
    try:
        if path.suffix != suffix:
            raise ValueError(f'{path} does not end in {suffix}')
        check_target(path)
        config = Config.fromfile(args.config)
        model, metadata = load_model(config, args.checkpoint, args.what)
        images = None
        if args.int8:
            images = calibration_images(config, CALIBRATION_IMAGES)
        export(model, path, metadata, images)
    except (OSError, ValueError) as error:
        sys.exit(f'Nothing was written: {error}')
    weights = path if suffix == '.onnx' else path.with_suffix('.bin')
    print(f'{path}: {weights.stat().st_size / 1e6:.1f} MB of weights')
    if args.evaluate:
        rcnn = config.model.test_cfg.get('rcnn', {})
        exported = ExportedDetector(
            load(path, runtime),
            config.model.data_preprocessor,
            rcnn.get('mask_thr_binary', 0.5),
        )
        for name, detector in (('PyTorch', model), (str(path), exported)):
            scores = evaluate(config, detector)
            print(
                f'{name}:',
                *(f'{k} {v:.4f}' for k, v in scores.items() if 'mAP' in k),
            )


if __name__ == '__main__':
    main()
