"""Normalising images of any number of channels."""

from typing import Any, Sequence

import torch
from mmdet.models import DetDataPreprocessor
from mmdet.registry import MODELS


@MODELS.register_module()
class MultiChannelDataPreprocessor(DetDataPreprocessor):
    """mmdet's ``DetDataPreprocessor``, for images of any number of channels.

    mmdet's takes one or three means; this one takes as many as the images
    have channels. All else, padding and batch augmentations among it, is
    mmdet's.

    Args:
        mean (Sequence[float]): Mean of each channel.
        std (Sequence[float]): Standard deviation of each channel.
        bgr_to_rgb (bool): Whether to swap the first and the third of three
            channels. Defaults to False.
        rgb_to_bgr (bool): The same. Defaults to False.
        **kwargs: The other arguments of mmdet's, ``pad_size_divisor`` among
            them.

    Raises:
        ValueError: If the arguments, or an image, do not fit each other.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        bgr_to_rgb: bool = False,
        rgb_to_bgr: bool = False,
        **kwargs: Any,
    ) -> None:
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise ValueError(
                f'got mean={mean!r} and std={std!r}, expected one mean and '
                'one positive std for each channel of the images'
            )
        if (bgr_to_rgb or rgb_to_bgr) and len(mean) != 3:
            raise ValueError(
                f'images of {len(mean)} channels are neither BGR nor RGB: set '
                'bgr_to_rgb=False (many a base config sets True) and '
                'rgb_to_bgr=False'
            )
        super().__init__(
            bgr_to_rgb=bgr_to_rgb, rgb_to_bgr=rgb_to_bgr, **kwargs
        )
        # What mmengine's makes of one or three.
        self._enable_normalize = True
        for name, values in (('mean', mean), ('std', std)):
            values = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalise, pad and stack images.

        Args:
            data (dict): ``inputs``, images of shape (C, H, W), and
                ``data_samples``, as mmdet's takes them.
            training (bool): Whether to augment batches. Defaults to False.

        Returns:
            dict: ``inputs`` of shape (N, C, H', W'), float32, and
            ``data_samples``.

        Raises:
            ValueError: If an image has another number of channels.
        """
        for image in data['inputs']:
            if image.shape[0] != len(self.mean):
                raise ValueError(
                    f'got an image of shape {tuple(image.shape)} for '
                    f'{len(self.mean)} means: expected ({len(self.mean)}, H, '
                    "W). Does the pipeline's LoadImageFromFile keep the "
                    "channels, with color_type='unchanged'?"
                )
        return super().forward(data, training)
