"""What is not finite, by real causes where there are some."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import nn

from fasternet_det import CheckFiniteHook
from fasternet_det.checkpoint import read_checkpoint
from fasternet_det.datasets.nuclei import convert

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/mini/retinanet_fasternet-t0_fpn_nuclei.py'
TINY = dict(embed_dim=8, depths=(1, 1, 1, 1), act_cfg=dict(type='ReLU'))
CONV = 'backbone.stages.4.blocks.0.mlp.0'


@pytest.fixture(scope='module')
def nuclei(tmp_path_factory):
    folder = tmp_path_factory.mktemp('nuclei')
    convert(str(folder))
    return folder


@pytest.fixture
def cfg(nuclei, tmp_path):
    """A small RetinaNet, trained for four iterations, each one saved."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.arch = TINY
    cfg.model.neck.update(in_channels=[16, 32, 64], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16)
    cfg.train_pipeline[2].scale = (64, 64)
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.dataset.update(
        data_root=str(nuclei), pipeline=cfg.train_pipeline
    )
    cfg.train_cfg.max_iters = 4
    for what in ('cfg', 'dataloader', 'evaluator'):
        cfg[f'val_{what}'] = cfg[f'test_{what}'] = None
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint.interval = 1
    cfg.custom_hooks = [
        dict(type='CheckFiniteHook'),
        dict(type='EMAHook', priority=49),  # as in mmdet's RTMDet
    ]
    cfg.work_dir, cfg.experiment_name = str(tmp_path), tmp_path.name
    return cfg


class At(Hook):
    """Do something in an iteration, counted as the log does."""

    def __init__(self, iteration, do, place='before_train_iter'):
        self.iteration, self.do = iteration, do
        setattr(self, place, self.act)

    def act(self, runner, data_batch, **_):
        if runner.iter + 1 == self.iteration:
            samples = data_batch['data_samples']
            self.files = ', '.join(sample.img_path for sample in samples)
            self.do(runner.model.get_submodule(CONV))


def stopped(cfg, hook=None, priority='NORMAL'):
    """Train until that stops, and return what it says."""
    runner = Runner.from_cfg(cfg)
    if hook:
        runner.register_hook(hook, priority)
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    return str(error.value)


def saved(cfg):
    """The iteration of the only checkpoint, which is finite."""
    folder = Path(cfg.work_dir)
    (path,) = folder.glob('*.pth')
    assert (folder / 'last_checkpoint').read_text() == str(path)
    checkpoint = read_checkpoint(path)
    for name in ('state_dict', 'ema_state_dict'):
        for key, tensor in checkpoint[name].items():
            assert tensor.isfinite().all(), key
    return checkpoint['meta']['iter']


def spoil(layer):
    layer.weight.data[0, 0] = torch.nan


def test_weight_in_training(cfg):
    hook = At(3, spoil)
    said = stopped(cfg, hook)
    assert said.startswith(
        f'not finite in iteration 3 ({hook.files}): loss, loss_cls, loss_bbox.'
        f' The first that is not: the output of {CONV} (Conv2d). '
    )
    assert saved(cfg) == 2


def test_gradient(cfg):
    """That of a root is not finite at 0, and its loss is."""

    def root(layer):
        layer.register_forward_hook(
            lambda _, x, y: (y * (y > 0)).square().sqrt()
        )

    hook = At(3, root)
    said = stopped(cfg, hook)
    assert f'not finite after iteration 3 ({hook.files}), though' in said
    # what comes behind it got a gradient, what lies before it none
    first = 'backbone.patch_embed.proj.weight'
    assert f'the loss was: {first} to {CONV}.weight (' in said
    assert saved(cfg) == 2


def test_learning_rate(cfg):
    """The maps' variance overflows, and no loss tells."""
    cfg.optim_wrapper.optimizer.lr = 1e6
    said = stopped(cfg)
    assert 'not finite after iteration 2 (' in said
    assert '.mlp.1.running_var' in said
    assert saved(cfg) == 1


@pytest.mark.parametrize(
    'kind, kept', [('CheckpointHook', -1), ('ExactCheckpointHook', 1)]
)
def test_weight_between_hooks(cfg, kind, kept):
    """ExactCheckpointHook removes no older checkpoint before."""
    cfg.default_hooks.checkpoint.update(type=kind, max_keep_ckpts=kept)
    said = stopped(cfg, At(2, spoil, 'after_train_iter'), 'LOW')
    assert said.startswith(
        f'not finite, but finite after the last step: {CONV}.weight. '
    )
    assert saved(cfg) == 1


@pytest.mark.parametrize('resume', [False, True])
def test_weight_of_a_checkpoint(cfg, resume):
    """The average's too, as which mmengine saves what was trained."""
    cfg.train_cfg.max_iters = 1
    Runner.from_cfg(cfg).train()
    assert saved(cfg) == 1
    path = Path(cfg.work_dir, 'iter_1.pth')
    checkpoint = read_checkpoint(path)
    checkpoint['state_dict'][f'{CONV}.weight'][0, 0] = -torch.inf
    torch.save(checkpoint, path)
    cfg.train_cfg.max_iters, cfg.experiment_name = 2, f'{path}'
    cfg.load_from, cfg.resume = str(path), resume
    said = stopped(cfg)
    average = 'the average of ' * resume
    assert f'not finite before training: {average}{CONV}.weight. ' in said


def test_files(cfg, tmp_path):
    """An image with a pixel, and another with a box, that are not finite."""
    source = Path(cfg.train_dataloader.dataset.data_root)
    truth = json.loads((source / 'annotations/train.json').read_text())
    images = {image['id']: image for image in truth['images'][:2]}
    (first, second), (dark, odd) = images, images.values()
    annotations = [a for a in truth['annotations'] if a['image_id'] in images]
    truth.update(images=[dark, odd], annotations=annotations)
    for image in (dark, odd):
        pixels = cv2.imread(str(source / 'train' / image['file_name']))
        image['file_name'] = f'{image["id"]}.tiff'
        path = str(tmp_path / image['file_name'])
        assert cv2.imwrite(path, pixels.astype(np.float32))
    next(a for a in annotations if a['image_id'] == second)['bbox'][2] = np.inf
    (tmp_path / 'train.json').write_text(json.dumps(truth))
    cfg.train_pipeline[0].color_type = 'unchanged'
    cfg.train_pipeline[2].clip_object_border = False
    cfg.train_dataloader.dataset.update(
        data_root=str(tmp_path),
        ann_file='train.json',
        data_prefix=dict(img=''),
        pipeline=cfg.train_pipeline,
    )
    said = stopped(cfg)
    assert f'not: the annotations of {tmp_path}/{second}.tiff. ' in said
    pixels = np.full((128, 128, 3), 33, np.float32)
    pixels[64, 64] = np.nan
    assert cv2.imwrite(str(tmp_path / f'{first}.tiff'), pixels)
    said = stopped(cfg)
    assert f'not: the image of {tmp_path}/{first}.tiff. ' in said
    assert not list(tmp_path.glob('*.pth'))


# ---- where it comes from, in a model that is easily spoilt


class Model(BaseModel):
    """Two layers and a loss, and what a test puts between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
        self.norm = nn.BatchNorm2d(4)
        self.spoilers = dict.fromkeys(('between', 'loss'), lambda x: x)

    def forward(self, inputs, data_samples, mode):
        x = self.norm(self.spoilers['between'](self.first(inputs)))
        loss = self.spoilers['loss'](x.square().mean())
        return dict(loss_square=loss, acc=x.max())


def data(spoilt=False):
    inputs = torch.ones(2, 3, 8, 8)
    if spoilt:
        inputs[1, 0, 0, 0] = torch.nan
    samples = [DetDataSample(metainfo=dict(img_path=f'{k}.png')) for k in 'ab']
    return dict(inputs=inputs, data_samples=samples)


def watch(model):
    runner = SimpleNamespace(model=model, hooks=[], iter=6)
    hook = CheckFiniteHook()
    hook.before_train(runner)
    return lambda: hook.after_train(runner)


def fails(model, **batch):
    with pytest.raises(FloatingPointError) as error:
        model(**batch, mode='loss')
    return str(error.value)


def to_nan(x):
    return x * torch.nan


def when_drawn():
    """NaN where the random number is the one that comes next."""
    state = torch.get_rng_state()
    number = torch.rand(())
    torch.set_rng_state(state)
    return lambda x: to_nan(x) if torch.rand(()) == number else x


def once():
    calls = []
    return lambda x: calls.append(x) or (to_nan(x) if len(calls) == 1 else x)


@pytest.mark.parametrize(
    'place, spoiler, cause',
    [
        ('between', lambda: to_nan, 'what norm (BatchNorm2d) is given'),
        ('between', when_drawn, 'what norm (BatchNorm2d) is given'),
        ('loss', lambda: to_nan, 'what is computed of the outputs of all'),
        ('loss', once, 'nothing, when the batch was run once more'),
    ],
    ids=['between', 'drawn', 'loss', 'once'],
)
def test_cause(place, spoiler, cause):
    model = Model()
    watch(model)
    model.spoilers[place] = spoiler()
    losses = dict(between=', acc', loss='')[place]
    assert fails(model, **data()).startswith(
        f'not finite in iteration 7 (a.png, b.png): loss, loss_square{losses}.'
        f' The first that is not: {cause}'
    )


def test_module():
    """The first, though what is around it ends in such numbers too."""
    model = Model()
    watch(model)
    spoil(model.first[0])
    assert 'not: the output of first.0 (Conv2d). ' in fails(model, **data())


def test_branches():
    """Of mmdet's semi-supervised detectors."""
    model = Model()
    forward = model.first.forward
    model.first.forward = lambda inputs: forward(inputs['unsup'])
    watch(model)
    batches = dict(sup=data(), unsup=data(spoilt=True))
    said = fails(
        model,
        **{
            key: {branch: batch[key] for branch, batch in batches.items()}
            for key in ('inputs', 'data_samples')
        },
    )
    assert 'iteration 7 (a.png, b.png, a.png, b.png): ' in said
    assert 'not: the image of b.png. ' in said


def test_only_training_is_watched():
    model = Model()
    stop_watching = watch(model)
    model(**data(spoilt=True), mode='predict')
    stop_watching()
    model(**data(spoilt=True), mode='loss')


def test_large_weights_are_finite():
    """Though their sum, which is looked at first, is not."""
    model = Model().half()
    model.first[0].weight.data.fill_(60000)
    watch(model)


def meet(x):
    torch.distributed.barrier()  # as SyncBN does, on GPUs
    return x


def train(rank, port, folder):
    """The second process has the batch, and its model waits for both."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    model = MMDistributedDataParallel(Model())
    model.module.spoilers['between'] = meet
    spoil(model.module.first[0])
    with pytest.raises(FloatingPointError, match='training: first.0.weight.'):
        watch(model)
    nn.init.ones_(model.module.first[0].weight)
    watch(model)
    Path(folder, f'{rank}').write_text(fails(model, **data(spoilt=rank == 1)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    # It imports nothing anew, and takes nothing backward.
    mp.start_processes(train, (port, str(tmp_path)), 2, start_method='fork')
    first, second = ((tmp_path / rank).read_text() for rank in '01')
    assert first.startswith('the loss of another process is not finite')
    assert 'not: the image of b.png. ' in second
