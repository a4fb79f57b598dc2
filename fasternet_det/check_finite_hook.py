"""Training that stops at the first number that is not finite."""

from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from mmengine.dist import all_reduce
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states
from torch.utils.hooks import RemovableHandle

ADVICE = (
    'Nothing was saved. Look at these files; if they are sound, lower the '
    'learning rate or clip gradients (optim_wrapper.clip_grad). --resume goes '
    'on from the last checkpoint'
)


def _is_finite(value: Any) -> bool:
    """Whether all numbers are, of tensors in lists, dicts and samples."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, (dict, BaseDataElement)):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return True
    return all(map(_is_finite, value))


def _pairs(inputs: Any, data_samples: Any) -> List[Tuple[Tensor, Any]]:
    """Images and their samples, of all branches where there are some, as in
    mmdet's semi-supervised detectors.
    """
    if isinstance(inputs, dict):
        return sum((_pairs(inputs[k], data_samples[k]) for k in inputs), [])
    return list(zip(inputs, data_samples))


def _name_batch(runner: Runner, data: Dict[str, Any]) -> str:
    """The iteration, as the log counts, and the files of its batch."""
    pairs = _pairs(data['inputs'], data['data_samples'])
    files = ', '.join(str(sample.get('img_path')) for _, sample in pairs)
    return f'iteration {runner.iter + 1} ({files})'


def _find_cause(model: nn.Module, args: tuple, kwargs: Dict[str, Any]) -> str:
    """Run a model once more and say what is the first not to be finite."""
    first: Dict[bool, str] = {}  # by whether it was given finite numbers

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def look(_: nn.Module, *seen: Any) -> None:
            *given, output = seen
            if not _is_finite(output):
                said = f'{name} ({type(module).__name__})'
                first.setdefault(_is_finite(given), said)

        return module.register_forward_hook(look, with_kwargs=True)

    handles = [watch(*each) for each in model.named_modules() if each[0]]
    with torch.no_grad():
        # Not model(), whose hook has called this, nor what was compiled of it.
        losses = type(model).forward(model, *args, **kwargs)
    for handle in handles:
        handle.remove()
    for image, sample in _pairs(kwargs['inputs'], kwargs['data_samples']):
        for what, value in (('image', image), ('annotations', sample)):
            if not _is_finite(value):
                return f'the {what} of {sample.get("img_path")}'
    if True in first:
        return f'the output of {first[True]}'
    if False in first:
        return f'what {first[False]} is given'
    if _is_finite(losses):
        return 'nothing, when the batch was run once more'
    return 'what is computed of the outputs of all modules'


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _find_weights(runner: Runner) -> str:
    """Name the entries of state dicts that are not finite; '' if all are."""
    models = {'': _unwrap(runner.model)}
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            models['the average of '] = hook.ema_model.module
    for prefix, model in models.items():
        state = model.state_dict()
        # NaN and infinity go through a sum, which is fast. That of finite
        # numbers may overflow, so what is found is looked at once more.
        sums = torch.stack([tensor.sum() for tensor in state.values()])
        if sums.isfinite().all():
            continue
        names = [name for name, x in state.items() if not _is_finite(x)]
        if names:
            more = f' to {names[-1]} ({len(names)} in all)'
            return prefix + names[0] + more * (len(names) > 1)
    return ''


# The root registry: those of mmdet and all others fall back to it.
@HOOKS.register_module()
class CheckFiniteHook(Hook):
    """Stop training where the loss or a weight is NaN or infinite.

    The loss of every iteration is looked at before it changes a weight. Where
    it is not finite, the batch is run forward once more, with the same random
    numbers, to find the module that it comes from. Weights and statistics, and
    their averages (:class:`mmengine.hooks.EMAHook`), are looked at before
    training, after every step and before a checkpoint is written: none holds
    such a number. (Where another hook spoils them after the step, the oldest
    of ``max_keep_ckpts`` is gone by then with mmengine's CheckpointHook, which
    removes it first; ``ExactCheckpointHook`` removes it last.)

    This costs a pass over the weights an iteration and, on a GPU, two waits
    for it. Of several processes, all stop; the error of the one whose batch it
    was names the cause. (mmdet's ``CheckInvalidLossHook`` looks every 50
    iterations, when the weights are lost, and names nothing.)

    Raises:
        FloatingPointError: If a number is not finite. Says at which iteration,
            of which files (of an image mixed of several, as by Mosaic, the
            first), and what was the first: an image or its annotations, the
            output of a module, or a weight.

    Example:
        >>> custom_hooks = [dict(type='CheckFiniteHook')]
    """

    # Before averages, which mmdet's configs update at 49, and checkpoints.
    priority = 'ABOVE_NORMAL'

    def before_train(self, runner: Runner) -> None:
        """Check what training starts from, and from then on all losses."""
        weights = _find_weights(runner)
        if weights:
            raise FloatingPointError(
                f'not finite before training: {weights}. Expected a '
                'checkpoint, in load_from, resume or init_cfg, that is'
            )
        model = _unwrap(runner.model)
        place = next(model.parameters())
        random: Dict[str, Any] = {}  # states of the generators at the batch

        def remember(*_: Any) -> None:
            random['cpu'] = torch.get_rng_state()
            random['device'] = get_device_states(place)

        def check(
            model: nn.Module, args: tuple, kwargs: Dict[str, Any], losses: Any
        ) -> None:
            if kwargs.get('mode') != 'loss':
                return
            loss, values = model.parse_losses(losses)
            # Modules may wait for those of other processes, as SyncBN's do, so
            # all of them run once more, or none.
            everywhere = loss.detach().isfinite().float()
            all_reduce(everywhere, 'min')
            if everywhere:
                return
            torch.set_rng_state(random['cpu'])
            set_device_states(*random['device'])
            cause = _find_cause(model, args, kwargs)
            if loss.isfinite():
                raise FloatingPointError(
                    'the loss of another process is not finite: its error '
                    'names the cause'
                )
            names = ', '.join(k for k in values if not values[k].isfinite())
            raise FloatingPointError(
                f'not finite in {_name_batch(runner, kwargs)}: {names}. The '
                f'first that is not: {cause}. {ADVICE}'
            )

        self.handles = [
            model.register_forward_pre_hook(remember),
            model.register_forward_hook(check, with_kwargs=True),
        ]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Check what a step leaves."""
        weights = _find_weights(runner)
        if weights:
            raise FloatingPointError(
                f'not finite after {_name_batch(runner, data_batch)}, though '
                f'the loss was: {weights}. A gradient, which comes from the '
                'last of them, a step, or a map that a norm has seen is too '
                f'large. {ADVICE}'
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check what hooks between may have made of it."""
        weights = _find_weights(runner)
        if weights:
            raise FloatingPointError(
                f'not finite, but finite after the last step: {weights}. A '
                'hook has changed it since; this checkpoint is not saved'
            )

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
