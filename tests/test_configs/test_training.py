"""Whatever a config or a page's snippet trains, it trains rightly.

Of every one: what starts at random is not frozen, norms without pretrained
statistics gather their own, the neck fits, and each parameter that requires
a gradient gets one, or DDP, which waits for all, stops with an error.
"""

import re
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet_det import FasterNet, GGhostRegNet, GhostNet

ROOT = Path(__file__).parents[2]


def has_twin(path):
    """Whether a model is another config's too, as test_compare.py asserts."""
    *stem, data = path.stem.split('_')
    twin = path.with_name('_'.join([*stem, 'nuclei.py']))
    return data == 'craters' or (data == 'hela' and twin.exists())


CONFIGS = sorted(
    path
    for path in ROOT.glob('configs/*/*.py')
    if path.stem not in ('fasternet', 'g_ghost_regnet', 'ghostnet', 'nuclei')
    and 'lr-decay' not in path.stem  # its base's model
    # other packages', which have tests of their own
    and path.parent.name not in ('segmentation', 'imagenet')
    and not has_twin(path)
)
SNIPPETS = {
    f'{page.relative_to(ROOT)} {model}': code
    for page in (
        ROOT / 'README.md',
        *sorted(ROOT.glob('docs/*.md')),
        *sorted(ROOT.glob('configs/*/*.md')),
    )
    for code in re.findall(r'```python\n(.*?)```', page.read_text(), re.S)
    for model in re.findall(r"_base_ = 'mmdet::.*/(.*)\.py'", code)
}
RTMDET = [  # of each neck
    path
    for path in CONFIGS
    if path.stem.startswith('rtmdet') and 'hela' not in path.stem
]
# Like smaller ones of their families, but slower: `pytest -m configs`.
LARGE = re.compile(r'fasternet-(t1|t2|s|m|l)_|regnetx-(4\.0|8\.0|16)GF')


def trials(paths, *sides):
    """Parameters, of which the large are left for later."""
    return [
        pytest.param(
            *(path, *sides),
            marks=[pytest.mark.configs] * bool(LARGE.search(path.stem)),
            id=path.stem,
        )
        for path in paths
    ]


def build(cfg, device='cpu'):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    with torch.device(device):
        return MODELS.build(cfg.model)


def imagenet_file(cfg, device='meta'):
    """What the ImageNet file that a backbone's config names must hold."""
    if not cfg.get('init_cfg'):
        return {}
    file = cfg.init_cfg.checkpoint
    with torch.device(device):
        if file == 'torchvision://resnet50':
            source = ResNet(50)
        elif re.search(r'/g_ghost_regnet_[\d.]+g_[\d.]+\.pth$', file):
            source = GGhostRegNet(cfg.arch, fork_feat=False)
        elif file.endswith('/ghostnet_1x.pth'):
            source = GhostNet(1.0, fork_feat=False)
        elif f'/fasternet_{cfg.arch}-epoch.' in file:
            source = FasterNet(cfg.arch, fork_feat=False)
        else:
            raise AssertionError(f'what does {file} hold?')
    return source.state_dict()


def assert_all_that_is_new_trains(model, file):
    """``file``: the pretrained backbone's state dict."""
    own = model.backbone.state_dict()
    loaded = {
        f'backbone.{key}'
        for key in own.keys() & file.keys()
        if own[key].shape == file[key].shape
    }
    assert bool(loaded) == bool(file)
    behind = ()  # the last output, so that it is not run
    if isinstance(model.backbone, GhostNet):
        last = model.backbone.out_indices[-1]
        behind = tuple(f'backbone.blocks.{i}.' for i in range(last + 1, 10))
    for name, parameter in model.named_parameters():
        if name.startswith(behind):
            continue
        assert parameter.requires_grad or name in loaded, (
            f'{name} starts at random and is frozen'
        )
    for name, module in model.train().named_modules():
        if isinstance(module, _BatchNorm):
            assert module.training or f'{name}.running_mean' in loaded, (
                f'{name} has no statistics and gathers none'
            )


def sample_inputs(model, sides, boxes=None):
    """Images, with boxes of the first class."""
    channels = model.data_preprocessor.mean.numel()
    inputs = demo_mm_inputs(
        len(sides),
        [(channels, *side) for side in sides],
        num_items=boxes,
        with_mask=model.with_mask,
    )
    for sample in inputs['data_samples']:
        sample.gt_instances.labels.zero_()
    return inputs


def step(model, sides, boxes=None):
    """Train a step, all of it."""
    data = model.data_preprocessor(sample_inputs(model, sides, boxes), True)
    model.train()
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert loss.isfinite()
    loss.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert (gradient is not None) == parameter.requires_grad, name
        assert gradient is None or gradient.isfinite().all(), name
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    torch.optim.SGD(trained, 1e-3).step()
    return sum((p != b).any().item() for p, b in zip(trained, before))


@pytest.mark.parametrize('path', trials(CONFIGS))
def test_config(path):
    cfg = Config.fromfile(path)
    model = build(cfg)
    assert_all_that_is_new_trains(model, imagenet_file(cfg.model.backbone))
    assert step(model, [(96, 64), (64, 96)]) > 50


@pytest.mark.parametrize('name', SNIPPETS)
def test_snippet(name, tmp_path):
    """With an ImageNet file of the right names and shapes, which it loads."""
    (tmp_path / 'my_config.py').write_text(SNIPPETS[name])
    cfg = Config.fromfile(tmp_path / 'my_config.py')
    file = imagenet_file(cfg.model.backbone, 'cpu')
    assert file  # a detector of more than a few images starts from ImageNet
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / 'imagenet.pth')
    torch.save(file, tmp_path / 'imagenet.pth')
    model = build(cfg)
    model.init_weights()
    own = model.backbone.state_dict()
    assert all(own[k].equal(file[k]) for k in own.keys() & file.keys())
    assert_all_that_is_new_trains(model, file)
    in_channels = [
        m.shape[1] for m in model.backbone(torch.rand(2, 3, 64, 64))
    ]
    assert in_channels == cfg.model.neck.in_channels
    assert step(model, [(96, 64), (64, 96)]) > 50


def test_there_are_snippets():
    """FasterNet's and each relative's."""
    assert len(CONFIGS) == 47
    backbones = [
        re.findall(r"type='(\w+Net|\w+Conv)'", code)[0]
        for code in SNIPPETS.values()
    ]
    assert sorted(backbones) == [
        'FasterNet',
        'GGhostRegNet',
        'GhostNet',
        'SAConv',
        'SPConv',
        'TShapedConv',
    ]


def test_frozen_noise_is_found():
    """What these tests are for: SPConv, and nothing else, in mmdet's."""
    cfg = Config.fromstring(
        "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'", '.py'
    )
    cfg.model.backbone.dcn = dict(type='SPConv', alpha=0.5)
    cfg.model.backbone.stage_with_dcn = (True,) * 4
    file = imagenet_file(cfg.model.backbone)
    with pytest.raises(AssertionError, match=r'layer1\.0\.conv2.* is frozen'):
        assert_all_that_is_new_trains(build(cfg, 'meta'), file)
    cfg.model.backbone.frozen_stages = 0
    with pytest.raises(AssertionError, match=r'conv2\.bn1 has no statistics'):
        assert_all_that_is_new_trains(build(cfg, 'meta'), file)


# 600 and 333x500 have these remainders by 32.
@pytest.mark.parametrize(
    'path, sides',
    trials(CONFIGS, [(120, 120), (77, 84)])
    + trials(RTMDET, [(600, 600), (333, 500)]),
)
@torch.no_grad()
def test_predicts_at_any_sides(path, sides):
    """By two and two, and one by one: no map may miss a pixel."""
    model = build(Config.fromfile(path)).eval()
    inputs = sample_inputs(model, sides)
    singles = [{k: v[i : i + 1] for k, v in inputs.items()} for i in (0, 1)]
    for batch in (inputs, *singles):
        for sample in model.test_step(batch):
            boxes = sample.pred_instances.bboxes
            assert boxes.isfinite().all()


MINI = [
    ROOT / 'configs' / 'mini' / f'{name}_nuclei.py'
    for name in (
        *('mask-rcnn_fasternet-t0_fpn', 'retinanet_fasternet-t0_fpn'),
        'rtmdet_fasternet-t0',
    )
]


@pytest.mark.parametrize(
    'boxes', [(3, 0), (0, 3), (0, 0)], ids=['one', 'first', 'all']
)
@pytest.mark.parametrize('path', MINI, ids=lambda p: p.stem)
def test_images_without_objects(path, boxes):
    """In a batch of two sizes, and in all of it."""
    step(build(Config.fromfile(path)), [(96, 64), (64, 128)], boxes)


@pytest.mark.parametrize('path', MINI, ids=lambda p: p.stem)
@torch.no_grad()
def test_a_batch_is_its_images(path):
    cfg = Config.fromfile(path)
    (cfg.model.test_cfg.get('rcnn') or cfg.model.test_cfg).score_thr = 0.0
    model = build(cfg).eval()
    inputs = sample_inputs(model, [(96, 64), (96, 64)])
    assert not inputs['inputs'][0].equal(inputs['inputs'][1])
    batch = [s.pred_instances for s in model.test_step(inputs)]
    for i, together in enumerate(batch):
        single = {k: v[i : i + 1] for k, v in inputs.items()}
        (alone,) = (s.pred_instances for s in model.test_step(single))
        assert len(alone) == len(together) > 10
        torch.testing.assert_close(
            alone.scores, together.scores, rtol=1e-4, atol=1e-5
        )
    assert not batch[0].scores.equal(batch[1].scores)
