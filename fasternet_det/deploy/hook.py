"""The fast form in mmengine's test loop."""

from typing import Dict, Optional

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseAveragedModel, BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .evaluate import calibration_batches
from .optimize import optimize


@HOOKS.register_module()
class OptimizeHook(Hook):
    """Test the fast form of the model, as :func:`optimize` makes it.

    Args:
        dtype (str): Name of a torch dtype, such as 'bfloat16'. 'int8' is
            calibrated on images of the config's training set, prepared as
            for validation. Defaults to 'float32'.
        compile (bool): Whether to use ``torch.compile``. Defaults to False.
        winograd (bool): Whether convolutions in float32 may be computed by
            Winograd's tiles. Defaults to True.
        calibration (int): How many images to calibrate int8 on. Defaults to
            32.

    Raises:
        ValueError: If there is no such dtype, or the model cannot be
            optimised.
    """

    priority = 'LOWEST'  # once EMAHook has put the averaged weights in

    def __init__(
        self,
        dtype: str = 'float32',
        compile: bool = False,
        winograd: bool = True,
        calibration: int = 32,
    ) -> None:
        self.dtype = getattr(torch, dtype, None)
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(
                f'dtype={dtype!r} is not the name of a torch dtype, such as '
                "'float32' or 'bfloat16'"
            )
        self.compile = compile
        self.winograd = winograd
        self.calibration = calibration

    def before_test_epoch(self, runner: Runner) -> None:
        """Replace the model of a runner, which has the weights to test."""
        batches = None
        if self.dtype == torch.int8:
            batches = calibration_batches(runner.cfg, self.calibration)
        owner, name, model = runner, 'model', runner.model
        # An averaged model is no wrapper in mmengine's registry, nor is the
        # one that merges the predictions of augmented images.
        while is_model_wrapper(model) or isinstance(
            model, (BaseAveragedModel, BaseTTAModel)
        ):
            owner, name, model = model, 'module', model.module
        self._original = owner, name, model
        fast = optimize(
            model.eval(),
            self.dtype,
            compile=self.compile,
            winograd=self.winograd,
            calibration=batches,
        )
        setattr(owner, name, fast)

    def after_test_epoch(
        self, runner: Runner, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        """Give the model back, to be trained, or tested again."""
        setattr(*self._original)
