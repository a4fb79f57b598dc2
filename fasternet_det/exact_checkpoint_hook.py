"""Checkpoints from which a killed training ends where an unkilled one does.

mmengine's CheckpointHook saves weights, optimizer, schedulers and averages.
What else decides a training's course, random numbers and the place in the
data, is here a function of the seed and the number of the iteration, so that
there is nothing to save: iteration 500 draws the same numbers whether or not
iterations 1 to 499 ran in the same process.
"""

import copy
import os
import random
import shutil
from bisect import bisect
from inspect import signature
from itertools import count, repeat
from types import FunctionType
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import DATA_SAMPLERS, HOOKS
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader, Dataset

KEY = 'exact_resume'  # of what this hook adds to a checkpoint
DATA, MODEL = range(2)  # two streams of random numbers
# Arguments of a DataLoader that a batch sampler takes the place of.
EXCLUSIVE = ('batch_sampler', 'batch_size', 'drop_last', 'sampler', 'shuffle')
PLAIN = (int, float, str, type(None))


def seed_all(*entropy: int) -> None:
    """Seed Python, NumPy and torch, on every device, from some integers."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


@register_backend('atomic')
class AtomicBackend(LocalBackend):
    """mmengine's backend of local files, which writes them whole or not."""

    def put(self, obj: bytes, filepath: str) -> None:
        """Write a file under another name, and rename it when it is there.

        Args:
            obj (bytes): What to write.
            filepath (str): Where.

        Raises:
            OSError: If it cannot be written; what was there is as it was.
        """
        folder = os.path.dirname(os.path.abspath(filepath))
        os.makedirs(folder, exist_ok=True)
        # Of the same name each time, so that a kill leaves one at most.
        part = f'{filepath}.part'
        try:
            with open(part, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if os.path.exists(part):
                os.remove(part)
            free = shutil.disk_usage(folder).free
            raise OSError(
                error.errno,
                f'{error.strerror}: {filepath} needs {len(obj):,} bytes, and '
                f'{folder} has {free:,} free. It was not written, and what '
                'was saved before it is intact: make room, and go on with '
                '--resume',
            ) from error
        os.replace(part, filepath)
        # The new name too is on the disk before anything older goes.
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def put_text(
        self, obj: str, filepath: str, encoding: str = 'utf-8'
    ) -> None:
        """Write a text, as :meth:`put` does."""
        self.put(obj.encode(encoding), filepath)


class _LateRemoval(AtomicBackend):
    """Removes files once it is told that what replaces them is there."""

    def __init__(self) -> None:
        self.outdated = []

    def remove(self, filepath: str) -> None:
        self.outdated.append(filepath)

    def remove_outdated(self) -> None:
        while self.outdated:
            super().remove(self.outdated.pop())


class _NumberedBatches:
    """Another batch sampler's batches, each after its number.

    A batch is ``[number, segment, *indices]``: how many batches the training
    had before it, and what changes where it may be resumed, and with each
    pass: then the worker whose turn it is may be another one than unresumed.
    """

    def __init__(
        self, batches: BatchSampler, is_saved: Callable[[int], bool]
    ) -> None:
        self.batches = batches
        self.sampler = batches.sampler  # where mmengine sets the epoch
        self.is_saved = is_saved  # after so many batches
        self.number = 0
        self.segment = 0
        self.skip = 0  # batches of the next pass that are done

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[List[int]]:
        self.segment += 1
        for indices in self.batches:
            if self.skip:
                self.skip -= 1
                continue
            self.segment += self.is_saved(self.number)
            yield [self.number, self.segment, *indices]
            self.number += 1


def _caches(part: Any) -> Iterator[list]:
    """Find the images that mmdet's CachedMosaic and CachedMixUp keep."""
    if isinstance(part, (list, tuple)):
        for item in part:
            yield from _caches(item)
    elif hasattr(part, 'results_cache'):
        yield part.results_cache
    else:
        for name in ('dataset', 'datasets', 'pipeline', 'transforms'):
            if hasattr(part, name):
                yield from _caches(getattr(part, name))


class _Fetch:
    """Takes a numbered batch from a dataset, in whichever process."""

    def __init__(self, dataset: Dataset, *entropy: int) -> None:
        self.dataset = dataset
        self.entropy = entropy
        self.segment = None

    def __call__(self, batch: List[int]) -> list:
        number, segment, *indices = batch
        if segment != self.segment:
            # A resumed training starts with empty caches, so all do there.
            for cache in _caches(self.dataset):
                cache.clear()
            self.segment = segment
        seed_all(*self.entropy, DATA, number)
        return [self.dataset[index] for index in indices]


def _passes(loader: DataLoader, done: int) -> Iterator[Any]:
    """Yield a loader's batches without end, as IterBasedTrainLoop wants.

    It asks for as many as are done, and drops them, before the first one: that
    these are passed over without being loaded is the batch sampler's part.
    """
    yield from repeat(None, done)
    batches = loader.batch_sampler
    for epoch in count():
        if hasattr(batches.sampler, 'set_epoch'):
            batches.sampler.set_epoch(epoch)
        left = batches.skip, batches.number
        yield from loader
        if left == (batches.skip, batches.number):
            raise ValueError(
                'the train_dataloader gives no batch: has it images, and, '
                'with drop_last=True, as many as batch_size in each process?'
            )


def _attributes(model: nn.Module) -> Dict[Tuple[str, str], Any]:
    """Find the numbers and texts that a model keeps outside its tensors.

    Such as YOLOX's present image size and Dynamic R-CNN's thresholds, which
    mmdet keeps in modules, and in their assigners and other parts.
    """
    found = {}
    for name, owner in _owners(model).items():
        for key, value in vars(owner).items():
            items = value if isinstance(value, (list, tuple)) else [value]
            if key != 'training' and all(isinstance(i, PLAIN) for i in items):
                found[name, key] = copy.copy(value)
    return found


def _owners(model: nn.Module) -> Dict[str, Any]:
    """Name the modules, and the parts of theirs that are none."""
    owners = {}
    for name, module in model.named_modules():
        owners[name] = module
        for key, part in vars(module).items():
            if hasattr(part, '__dict__') and not isinstance(
                part, (dict, type, nn.Module, FunctionType)
            ):
                owners[f'{name}.{key}'] = part
    return owners


class _SeedHook(Hook):
    """Seeds what the model, and other hooks, draw in an iteration."""

    priority = 'HIGHEST'
    entropy = ()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        seed_all(*self.entropy, MODEL, runner.iter)


@HOOKS.register_module()
class ExactCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, for trainings that go on exactly.

    Killed at any moment and restarted with ``--resume``, a training ends with
    the same weights, bit for bit, as one that ran through::

        default_hooks = dict(checkpoint=dict(type='ExactCheckpointHook'))

    It takes CheckpointHook's arguments and saves what that one saves, whole
    or not at all: what a kill or a full disk leaves is the checkpoint before.
    Besides:

    - Before each iteration, and before each batch is loaded, random numbers
      are seeded from the run's seed, the process and the iteration.
    - A resumed training takes up the data at the batch it had come to, in the
      middle of an epoch too, and loads nothing before it.
    - A validation that the kill prevented comes first.
    - The images which mmdet's CachedMosaic and CachedMixUp keep are dropped
      at each checkpoint and with each pass over the data.
    - Numbers that a model keeps outside its tensors, gradients not yet
      applied, and each process's own buffers are saved.

    Raises:
        TypeError: If the train_dataloader, or its sampler, is not a config.
        ValueError: If a training goes on with other batches, or by another
            number of processes, than it was saved by; or of
            ``file_client_args``, or a ``filename_tmpl`` without a step.
    """

    _resumed: Optional[dict] = None
    _states: Optional[list] = None  # of the processes, while this hook saves
    _seeds: Optional[_SeedHook] = None

    def before_run(self, runner: Runner) -> None:
        """Register what seeds an iteration before other hooks draw."""
        if self._seeds is None:  # else called again, for the list has grown
            self._seeds = _SeedHook()
            runner.register_hook(self._seeds)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what is to be restored until everything is built."""
        if not runner._resume:
            return
        self._resumed = checkpoint.get(KEY)
        if self._resumed is None:
            runner.logger.warning(
                'This checkpoint is not of ExactCheckpointHook: the training '
                'goes on, but does not end where it would have without the '
                'break'
            )

    def before_train(self, runner: Runner) -> None:
        """Take the data and the random numbers in hand."""
        if self.file_client_args is not None:
            raise ValueError(
                'ExactCheckpointHook takes backend_args, not the '
                f'file_client_args={self.file_client_args!r} of old'
            )
        if self.filename_tmpl.format(1) == self.filename_tmpl.format(2):
            raise ValueError(
                f'filename_tmpl={self.filename_tmpl!r} calls all checkpoints '
                "alike: expected a place for the step, as in 'iter_{}.pth'"
            )
        self._warn(runner)
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend:
            self.backend_args = dict(backend='atomic')
            self.file_backend = _LateRemoval()
        # Processes may have their own seeds, but share the order of the data.
        seed = [runner.seed]
        broadcast_object_list(seed)
        self._seeds.entropy = (*seed, get_rank())
        self._number_batches(runner)
        self._initial = _attributes(_module(runner))
        self._done, self._validated = 0, False
        if self._resumed is not None:
            self._restore(runner)

    def _warn(self, runner: Runner) -> None:
        """Tell what may keep a training from being exact."""
        if runner._resume and not runner._has_loaded:
            runner.logger.warning(
                'There is no checkpoint to resume from, so the training '
                'starts anew, and without the load_from that the config may '
                'have, as --resume drops it: start without --resume'
            )
        if get_world_size() > 2 and not getattr(
            runner.model, 'find_unused_parameters', True
        ):
            runner.logger.warning(
                'From its second step on, DistributedDataParallel sums '
                'gradients in another order, and more than two processes '
                'notice: a resumed training ends as an unresumed one with '
                'find_unused_parameters=True'
            )

    def _number_batches(self, runner: Runner) -> None:
        """Build the dataloader again, to tell the place of each batch."""
        loop, cfg = runner.train_loop, runner._train_dataloader
        if not isinstance(cfg, dict) or not isinstance(cfg['sampler'], dict):
            raise TypeError(
                'ExactCheckpointHook builds the sampler of the training '
                f'itself, but got {cfg!r}: give train_dataloader, and its '
                'sampler, as configs'
            )
        self._by_iter = hasattr(loop, 'dataloader_iterator')
        if self._by_iter:
            loop.dataloader_iterator = None  # whose workers load already
        old = loop.dataloader
        sampler = DATA_SAMPLERS.build(
            cfg['sampler'],
            default_args=dict(
                dataset=old.dataset, seed=self._seeds.entropy[0]
            ),
        )
        batches = DATA_SAMPLERS.build(
            cfg.get('batch_sampler')
            or dict(type=BatchSampler, drop_last=cfg.get('drop_last', False)),
            default_args=dict(sampler=sampler, batch_size=cfg['batch_size']),
        )

        def is_saved(number: int) -> bool:
            # What is saved by epoch is between two passes.
            saves = not self.by_epoch and self.interval > 0
            if saves and (number - self.save_begin) % self.interval == 0:
                return True
            # A validation may save anew.
            return (
                self.save_best is not None
                and self._by_iter
                and self._validates(runner, number)
            )

        old.dataset.__getitems__ = _Fetch(old.dataset, *self._seeds.entropy)
        options = {
            name: getattr(old, name)
            for name in signature(DataLoader).parameters
            if name not in EXCLUSIVE and hasattr(old, name)
        }
        loop.dataloader = DataLoader(
            batch_sampler=_NumberedBatches(batches, is_saved), **options
        )
        if self._by_iter:
            loop.dataloader_iterator = _passes(loop.dataloader, loop.iter)

        self._layout = dict(
            processes=get_world_size(), batch_size=cfg['batch_size']
        )
        if any(True for _ in _caches(old.dataset)):
            self._layout.update(num_workers=old.num_workers)

    def _state(self, runner: Runner) -> Dict[str, Any]:
        """Collect what one process holds that the checkpoint does not."""
        model = _module(runner)
        buffers = {}
        if not is_main_process():  # whose are in the checkpoint
            buffers = {
                name: [buffer.cpu() for buffer in module.buffers()]
                for name, module in _stateful(runner).items()
            }
        return dict(
            buffers=buffers,
            attributes=[
                (name, key, value)
                for (name, key), value in _attributes(model).items()
                if self._initial.get((name, key), KEY) != value
            ],
            gradients={
                name: parameter.grad.cpu()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            },
        )

    def _restore(self, runner: Runner) -> None:
        """Go on where the checkpoint was saved."""
        loop, model = runner.train_loop, _module(runner)
        saved = self._resumed
        if saved['layout'] != self._layout:
            raise ValueError(
                f'the checkpoint was saved with {saved["layout"]}, and the '
                f'training goes on with {self._layout}: give it the same, or '
                'set default_hooks.checkpoint.type=CheckpointHook, with which '
                'it goes on over other data'
            )
        state = saved['states'][get_rank()]
        modules = _stateful(runner)
        for name, buffers in state['buffers'].items():
            for buffer, value in zip(modules[name].buffers(), buffers):
                buffer.copy_(value)
        owners = _owners(model)
        for name, key, value in state['attributes']:
            setattr(owners[name], key, value)
        parameters = dict(model.named_parameters())
        for name, gradient in state['gradients'].items():
            parameters[name].grad = gradient.to(parameters[name].device)

        self.last_ckpt = runner.message_hub.get_info('last_ckpt')
        self._done = saved['done']
        batches = loop.dataloader.batch_sampler
        batches.skip = loop.iter if self._by_iter else self._done
        if (
            not saved['validated']
            and not self._done
            and self._validates(
                runner, loop.iter if self._by_iter else loop.epoch
            )
        ):
            runner.logger.info('The validation before the break comes first.')
            runner.val_loop.run()

    def _validates(self, runner: Runner, step: int) -> bool:
        """Tell whether the loop validates after an iteration, or epoch."""
        loop = runner.train_loop
        last = loop.max_iters if self._by_iter else loop.max_epochs
        stage = bisect(loop.dynamic_milestones, step + 1) - 1
        return (
            runner.val_loop is not None
            and step >= loop.val_begin
            and (step % loop.dynamic_intervals[stage] == 0 or step == last)
        )

    def before_train_epoch(self, runner: Runner) -> None:
        """Number the batches of an epoch."""
        self._start = runner.iter - self._done
        runner.train_dataloader.batch_sampler.number = runner.iter

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Save, as CheckpointHook does."""
        if not self._by_iter:
            self._done = runner.iter + 1 - self._start
        self._validated = False
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def after_train_epoch(self, runner: Runner) -> None:
        """Save, as CheckpointHook does."""
        self._done = 0
        super().after_train_epoch(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add what an exact resume needs, unless it is another who saves."""
        if self._states is None:
            return
        checkpoint[KEY] = dict(
            layout=self._layout,
            done=self._done,
            validated=self._validated,
            states=self._states,
        )

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        self._validated = True
        self._states = all_gather_object(self._state(runner))
        super()._save_best_checkpoint(runner, metrics)
        self._states = None
        self._remove_outdated()

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict
    ) -> None:
        """Save, let ``last_checkpoint`` name it, and then remove."""
        join, hub = self.file_backend.join_path, runner.message_hub
        name = self.filename_tmpl.format(step)
        self.last_ckpt = join(self.out_dir, name)
        hub.update_info('last_ckpt', self.last_ckpt)
        outdated = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            kept = [*self.keep_ckpt_ids, step]
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.append(step)
            # With the outdated one: a kill may leave it to the next start.
            hub.update_info('keep_ckpt_ids', kept)
        self._states = all_gather_object(self._state(runner))
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._states = None
        if is_main_process():
            AtomicBackend().put_text(
                self.last_ckpt,
                os.path.join(runner.work_dir, 'last_checkpoint'),
            )
            for step in outdated:
                path = join(self.out_dir, self.filename_tmpl.format(step))
                if self.file_backend.isfile(path):
                    self.file_backend.remove(path)
            self._remove_outdated()

    def _remove_outdated(self) -> None:
        if isinstance(self.file_backend, _LateRemoval):
            self.file_backend.remove_outdated()


def _module(runner: Runner) -> nn.Module:
    """Give the runner's model out of its wrapper."""
    model = runner.model
    return model.module if is_model_wrapper(model) else model


def _stateful(runner: Runner) -> Dict[str, nn.Module]:
    """Name the model and its averages, whose buffers differ by process."""
    averages = {
        f'{type(hook).__name__}{i}': hook.ema_model
        for i, hook in enumerate(runner.hooks)
        if hasattr(hook, 'ema_model')
    }
    return dict(model=_module(runner), **averages)
