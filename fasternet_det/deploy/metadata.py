"""What an exported file says of the images that it takes."""

from typing import Any, Dict, Optional, Sequence

from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config, ConfigDict

from .. import __version__

# The transforms of a test pipeline that can be told, by their options.
TOLD = dict(
    LoadImageFromFile={'color_type', 'to_float32', 'backend_args'},
    Resize={'scale', 'keep_ratio'},
    Pad={'size', 'pad_to_square', 'pad_val'},
    LoadAnnotations={'with_bbox', 'with_mask', 'with_label', 'poly2mask'},
    PackDetInputs={'meta_keys'},
)


def describe(
    config: Config,
    classes: Optional[Sequence[str]] = None,
    pixels: bool = False,
) -> Dict[str, Any]:
    """Make the metadata of an export, as docs/export.md explains them.

    Args:
        config (Config): The detector's config.
        classes (Sequence[str], optional): The names of its labels. Defaults
            to None.
        pixels (bool): Whether the graph takes images as they are read, and
            normalises and pads them by itself. Defaults to False.

    Returns:
        dict: By key. How images are read, resized and padded is missing if
        the test pipeline does more than that.

    Raises:
        ValueError: If the graph is to take images as they are read, and the
            pipeline makes them float32 before it resizes them.
    """
    cfg, test_cfg = config.model.data_preprocessor, config.model.test_cfg
    reading = _reading(config)
    if pixels and reading.get('to_float32'):
        raise ValueError(
            'only images of 8 bits can go into the graph as they are read; '
            "this config's pipeline says to_float32=True"
        )
    swaps = cfg.get('bgr_to_rgb') or cfg.get('rgb_to_bgr')
    channels = 'RGB' if swaps and not pixels else 'BGR'
    if not swaps and not reading.get('color_type', '').startswith('color'):
        channels = None
    in_boxes = 'rcnn' in test_cfg
    threshold = (test_cfg.rcnn if in_boxes else test_cfg).get(
        'mask_thr_binary'
    )
    return dict(
        fasternet_det=__version__,
        classes=classes,
        dtype='uint8' if pixels else 'float32',
        layout='NCHW',
        channels=channels,
        mean=None if pixels else cfg.get('mean'),
        std=None if pixels else cfg.get('std'),
        pad_divisor=1 if pixels else cfg.get('pad_size_divisor', 1),
        pad_value=cfg.get('pad_value', 0),
        mask_threshold=threshold,
        mask_grid=threshold and ('box' if in_boxes else 'image'),
        clip_border=_clips(config.model),
        **reading,
    )


def _clips(model: ConfigDict) -> bool:
    """Whether a detector clips boxes to the image."""
    owner = model.get('roi_head', model)
    head = owner.get('bbox_head', owner.get('rpn_head', {}))
    head = head[-1] if isinstance(head, list) else head  # Cascade R-CNN's
    if 'YOLOXHead' in str(head.get('type')):
        return False
    return head.get('bbox_coder', {}).get('clip_border', True)


def _reading(config: Config) -> Dict[str, Any]:
    """How images are read, resized and padded before they are normalised."""
    pipeline = get_test_pipeline_cfg(config)
    steps = {
        # LoadCheckedImageFromFile reads what it does not refuse likewise
        step.type.split('.')[-1].replace('Checked', ''): step
        for step in pipeline
    }
    order = ('LoadImageFromFile', 'Resize', 'Pad')
    places = [list(steps).index(name) for name in order if name in steps]
    if len(steps) < len(pipeline) or places != sorted(places):
        return {}  # a step twice, or in another order
    for name, step in steps.items():
        options = step.keys() - {'type', '_scope_'}
        if name not in TOLD or options - TOLD[name]:
            return {}
    load, resize, pad = (steps.get(name, {}) for name in order)
    scale, size = resize.get('scale'), pad.get('size')
    if isinstance(scale, int):
        scale = (scale, scale)
    if pad.get('pad_to_square'):
        if not scale or scale[0] != scale[1]:
            return {}  # each image is padded to another size
        size = scale
    value = pad.get('pad_val', 0)
    return dict(
        color_type=load.get('color_type', 'color'),
        to_float32=load.get('to_float32', False),
        scale=scale,
        keep_ratio=resize.get('keep_ratio', False),
        pad_size=size,
        pad_pixel=value.get('img', 0) if isinstance(value, dict) else value,
    )
