"""What docs/other-tasks.md tells a stranger to do, done."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from fasternet_det.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[1]
STEPS = ROOT / 'tests' / 'data' / 'train_steps.py'
PAGE = (ROOT / 'docs' / 'other-tasks.md').read_text()
COMMANDS = [
    line
    for block in re.findall(r'```bash\n(.*?)```', PAGE, re.S)
    for line in block.splitlines()
]


@pytest.fixture(scope='module')
def reader(openmmlab):
    """Run commands in a reader's folder, which holds what the page shows."""
    for code in re.findall(r'```python\n(.*?)```', PAGE, re.S):
        name = re.match(r'# (\w+\.py)\n', code)[1]
        (openmmlab.folder / name).write_text(code)

    def run(command, **options):
        start, *args = command.split()
        assert start in ('python', 'pip')
        return openmmlab(*['-m', 'pip'] * (start == 'pip'), *args, **options)

    run.folder = openmmlab.folder
    return run


def scalars(reader, name):
    """What a training logged."""
    folder = reader.folder / 'work_dirs' / name
    path = max(folder.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_install(command, reader):
    """It adds nothing to what these tests run with."""
    assert 'Would install' not in reader(
        f'{command} --dry-run', torchvision='torchvision' in command
    )


def run_data(command, reader):
    reader(command)
    assert len(list((reader.folder / 'data/nuclei/train').iterdir())) == 35


def run_segmentation(command, reader):
    """Shortened to six iterations of two images."""
    reader(
        f'{command} --cfg-options train_cfg.max_iters=6 '
        'train_cfg.val_interval=6 train_dataloader.batch_size=2 '
        'default_hooks.logger.interval=1'
    )
    *steps, evaluated = scalars(reader, 'fpn_fasternet-t0_nuclei')
    losses = [step['loss'] for step in steps]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    # that of background alone is below 50
    assert evaluated['mIoU'] > 55
    folder = reader.folder / 'work_dirs' / 'fpn_fasternet-t0_nuclei'
    # the page's is of all sixty
    (folder / 'iter_6.pth').rename(folder / 'iter_60.pth')


def run_test(command, reader):
    """It scores as training did."""
    reader(command)
    folder = reader.folder / 'work_dirs' / 'fpn_fasternet-t0_nuclei'
    tested = json.loads(max(folder.glob('2*/2*.json')).read_text())
    trained = scalars(reader, 'fpn_fasternet-t0_nuclei')[-1]
    for key in ('aAcc', 'mIoU', 'mAcc'):
        assert tested[key] == trained[key]


def run_pretraining(command, reader):
    """One epoch, whose checkpoint a detector then loads."""
    random = np.random.default_rng(0)
    for split, count in (('train', 2), ('val', 1)):
        for i, name in enumerate('abcdef'):
            folder = reader.folder / 'data' / 'my_images' / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                image = random.integers(40 * i, 40 * i + 40, (48, 64, 3))
                path = folder / f'{k}.png'
                assert cv2.imwrite(str(path), image.astype(np.uint8))
    workers = (
        f'{split}_dataloader.{option}'
        for split in ('train', 'val')
        for option in ('num_workers=0', 'persistent_workers=False')
    )
    reader(
        f'{command} --cfg-options train_cfg.max_epochs=1 '
        'param_scheduler.0.start_factor=1 default_hooks.logger.interval=1 '
        + ' '.join(workers),
        torchvision=True,
    )
    *steps, evaluated = scalars(reader, 'my_pretraining')
    assert len(steps) == 2 and steps[0]['lr'] == 0.004 * 8 / 4096
    assert 1 < steps[0]['loss'] < 3  # ln 6 = 1.8
    assert set(evaluated) >= {'accuracy/top1', 'accuracy/top5'}

    path = reader.folder / 'work_dirs' / 'my_pretraining' / 'epoch_1.pth'
    saved = read_checkpoint(path)
    assert saved['meta']['dataset_meta']['classes'] == tuple('abcdef')
    cfg = Config.fromfile(
        ROOT / 'configs/mini/mask-rcnn_fasternet-t0_fpn_nuclei.py'
    ).model
    cfg.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    backbone = MODELS.build(cfg).backbone
    backbone.init_weights()
    trained = {
        key.removeprefix('backbone.'): value
        for key, value in saved['state_dict'].items()
    }
    assert trained['head.weight'].shape == (6, 1280)
    own = backbone.state_dict()
    assert own.keys() - trained.keys() == {
        key for key in own if key.startswith('norm')
    }
    assert trained.keys() - own.keys() == backbone.classifier_keys
    for key in own.keys() & trained.keys():
        assert own[key].equal(trained[key]), key
    assert own['stages.6.blocks.1.mlp.1.running_mean'].any()


RUNNERS = {
    'pip install': run_install,
    'python -m fasternet_det.datasets.nuclei': run_data,
    'python tools/train.py configs/segmentation': run_segmentation,
    'python tools/test.py': run_test,
    'python tools/train.py my_pretraining.py': run_pretraining,
}


@pytest.mark.parametrize(
    'command',
    [
        pytest.param(
            command,
            marks=[pytest.mark.torchvision]
            * (re.search('torchvision|pretraining', command) is not None),
        )
        for command in COMMANDS
    ],
)
def test_command(command, reader):
    """In the page's order: some read what an earlier one wrote."""
    runners = [RUNNERS[k] for k in RUNNERS if command.startswith(k)]
    assert len(runners) == 1, f'no test runs {command}'
    runners[0](command, reader)


@pytest.mark.torchvision
def test_snippets(reader):
    """Each but the pretraining's, which is trained above."""
    names = ['my_segmentation', 'my_rotated']
    said = reader(
        f'python {STEPS} {" ".join(f"{name}.py" for name in names)}',
        torchvision=True,
    )
    segmentation, rotated = json.loads(said.splitlines()[-1])
    for result in (segmentation, rotated):
        assert result['type'] == 'fasternet_det.backbones.fasternet'
        assert result['without_gradient'] == []
    assert segmentation['in_channels'] == segmentation['out_channels']
    assert segmentation['classes'] == [19]
    losses = rotated['losses']
    assert losses[-1] < 0.9 * losses[0]
    boxes = torch.tensor(rotated['boxes'])
    assert boxes.shape[1] == 5 and len(boxes) > 10  # x, y, w, h and angle
    assert boxes.isfinite().all() and boxes[:, 4].unique().numel() > 5
