"""Every source of weights, loaded through a real config's ``init_cfg``."""

import os
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import KaimingInit, PretrainedInit
from safetensors.torch import save_file

from fasternet_det import FasterNet
from fasternet_det.checkpoint import (
    adapt_stem,
    fasternet_from_timm,
    fasternet_to_timm,
    find_pretrained,
    read_checkpoint,
    read_state_dict,
)

ARCHS = ('t0', 't1', 't2', 's', 'm', 'l')
FILES = [(arch, 'pth') for arch in ARCHS] + [('t0', 'safetensors')]
CONFIGS = Path(__file__).parent.parent / 'configs' / 'fasternet'


def backbone_from(checkpoint, arch='t0', detector='mask-rcnn', **init_cfg):
    """Build the backbone of a real config and load a checkpoint into it."""
    cfg = Config.fromfile(
        CONFIGS / f'{detector}_fasternet-{arch}_fpn_1x_coco.py'
    ).model.backbone
    cfg.init_cfg.update(checkpoint=str(checkpoint), **init_cfg)
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def check(model, state_dict):
    """All of the model but its output norms comes from the state dict."""
    own = model.state_dict()
    norms = {k for k in own if k.startswith('norm')}
    assert own.keys() - norms == state_dict.keys() - (
        FasterNet.classifier_keys | norms
    )
    for key in own.keys() - norms:
        assert torch.equal(own[key], state_dict[key]), key


@pytest.mark.parametrize('arch, suffix', FILES)
def test_original(arch, suffix, imagenet, tmp_path):
    state_dict = imagenet(arch)
    path = tmp_path / f'fasternet.{suffix}'
    (torch.save if suffix == 'pth' else save_file)(state_dict, path)
    check(backbone_from(path, arch), state_dict)


@pytest.mark.parametrize('arch, suffix', FILES)
def test_timm(arch, suffix, imagenet, timm_keys, tmp_path):
    state_dict = imagenet(arch)
    timm = fasternet_to_timm(state_dict)
    assert {k: list(v.shape) for k, v in timm.items()} == timm_keys[arch]
    back = fasternet_from_timm(timm)
    assert back.keys() == state_dict.keys()
    path = tmp_path / f'model.{suffix}'
    (torch.save if suffix == 'pth' else save_file)(timm, path)
    check(backbone_from(path, arch, 'retinanet'), state_dict)


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'model.', 'backbone.'])
def test_wrapped_and_prefixed(wrapper, prefix, imagenet, tmp_path):
    state_dict = imagenet('t0')
    content = {prefix + k: v for k, v in state_dict.items()}
    if wrapper:
        content = {wrapper: content, 'epoch': 299}
    torch.save(content, tmp_path / 'a.pth')
    check(backbone_from(tmp_path / 'a.pth'), state_dict)


def test_classifier(imagenet, tmp_path):
    state_dict = imagenet('t0')
    torch.save(state_dict, tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))
    model = FasterNet('t0', fork_feat=False, init_cfg=init_cfg)
    model.init_weights()
    assert model.state_dict().keys() == state_dict.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state_dict[key])
    headless = {k: v for k, v in state_dict.items() if 'head' not in k}
    torch.save(headless, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='missing: avgpool_pre_head.1.weight'):
        FasterNet('t0', fork_feat=False, init_cfg=init_cfg).init_weights()


@pytest.mark.parametrize('era', ['ours', 'mmdet 2.25'])
@pytest.mark.parametrize('prefix', [None, 'backbone', 'backbone.'])
def test_detector(era, prefix, golden, randomise, tmp_path):
    cfg = Config.fromfile(CONFIGS / 'mask-rcnn_fasternet-t0_fpn_1x_coco.py')
    detector = randomise(MODELS.build(cfg.model))
    content = dict(state_dict=detector.state_dict())
    backbone = {k for k in content['state_dict'] if k.startswith('backbone.')}
    assert backbone == {
        f'backbone.{k}' for k in golden['t0']['backbone_state_dict']
    }  # the names of the mmdet 2.25 runs, from the original code
    if era == 'ours':
        history = HistoryBuffer([0.5], [1])
        content |= dict(
            meta=dict(epoch=12, dataset_meta=dict(classes=('cat',))),
            message_hub=dict(log_scalars={'train/loss': history}),
        )
    else:
        content |= dict(
            meta=dict(mmdet_version='2.25.0', CLASSES=('cat',), epoch=12),
            optimizer=dict(state={}, param_groups=[dict(lr=1e-4)]),
        )
    torch.save(content, tmp_path / 'epoch_12.pth')
    model = backbone_from(tmp_path / 'epoch_12.pth', prefix=prefix)
    check(model, detector.backbone.state_dict())
    assert torch.equal(model.norm6.weight, detector.backbone.norm6.weight)
    fewer = backbone_from(tmp_path / 'epoch_12.pth', detector='retinanet')
    assert not hasattr(fewer, 'norm0')
    torch.save(fewer.state_dict(), tmp_path / 'three.pth')
    more = backbone_from(tmp_path / 'three.pth')
    assert torch.equal(more.norm2.weight, fewer.norm2.weight)
    assert (more.norm0.weight == 1).all()
    assert torch.equal(fewer.norm6.weight, detector.backbone.norm6.weight)
    assert model.norm6.running_var.std() > 0.1


def test_every_part_of_the_detector_gets_its_weights(imagenet, tmp_path):
    """As the Runner does it: ``init_weights`` of the whole detector."""
    state_dict = imagenet('t0')
    torch.save(state_dict, tmp_path / 'a.pth')
    cfg = Config.fromfile(CONFIGS / 'retinanet_fasternet-t0_fpn_1x_coco.py')
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / 'a.pth')
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    check(detector.backbone, state_dict)
    assert (detector.backbone.norm2.weight == 1).all()
    assert detector.bbox_head.retina_cls.bias.mean() < -4


def test_one_variable_redirects_the_imagenet_files(
    imagenet, tmp_path, monkeypatch
):
    name = 'fasternet_t0-epoch.281-val_acc1.71.9180.pth'
    path = CONFIGS / 'mask-rcnn_fasternet-t0_fpn_1x_coco.py'
    monkeypatch.delenv('FASTERNET_IMAGENET', raising=False)
    official = Config.fromfile(path).model.backbone.init_cfg.checkpoint
    assert official == (
        'https://github.com/JierunChen/FasterNet/releases/download/v1.0/'
        + name
    )
    monkeypatch.setenv('FASTERNET_IMAGENET', str(tmp_path))
    torch.save(imagenet('t0'), tmp_path / name)
    model = MODELS.build(Config.fromfile(path).model.backbone)
    model.init_weights()
    check(model, imagenet('t0'))


def test_http(server, imagenet, tmp_path):
    url, requests = server
    state_dict = imagenet('t0')
    torch.save(state_dict, tmp_path / 'www' / 'a.pth')
    for _ in range(2):
        check(backbone_from(f'{url}/a.pth?raw=1'), state_dict)
    assert requests == ['/a.pth?raw=1']  # the second time it is at hand


def test_http_files_of_one_name(server, imagenet, tmp_path):
    """As on model hubs, where every file is called model.safetensors."""
    url, _ = server
    for arch in ('t0', 't1'):
        (tmp_path / 'www' / arch).mkdir()
        save_file(
            fasternet_to_timm(imagenet(arch)),
            tmp_path / 'www' / arch / 'model.safetensors',
        )
        path = f'{url}/{arch}/model.safetensors?download=true'
        check(backbone_from(path, arch), imagenet(arch))


def test_http_error_page_is_not_kept(server, imagenet, tmp_path):
    url, requests = server
    (tmp_path / 'www' / 'a.pth').write_text('\n<!DOCTYPE html>Log in first')
    with pytest.raises(ValueError, match='a web page'):
        backbone_from(f'{url}/a.pth')
    torch.save(imagenet('t0'), tmp_path / 'www' / 'a.pth')
    check(backbone_from(f'{url}/a.pth'), imagenet('t0'))
    assert len(requests) == 2


def test_http_not_found(server):
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        backbone_from(f'{server[0]}/nowhere.pth')


def test_home(imagenet, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(imagenet('t0'), tmp_path / 'a.pth')
    check(backbone_from('~/a.pth'), imagenet('t0'))


def test_file_url(imagenet, tmp_path):
    path = tmp_path / 'a b.pth'
    torch.save(imagenet('t0'), path)
    check(backbone_from(path.as_uri()), imagenet('t0'))


def test_mmengine_backend(imagenet, tmp_path):
    class Vault(LocalBackend):
        def get(self, filepath):
            return super().get(tmp_path / filepath.removeprefix('vault://'))

        def get_local_path(self, filepath):
            return super().get_local_path(
                tmp_path / filepath.removeprefix('vault://')
            )

    register_backend('vault', Vault, prefixes='vault', force=True)
    torch.save(imagenet('t0'), tmp_path / 'a.pth')
    check(backbone_from('vault://a.pth'), imagenet('t0'))


def spoilt(key, value):
    def spoil(state_dict):
        state_dict[key] = value(state_dict[key])

    return spoil


@pytest.mark.parametrize(
    'spoil, message',
    [
        (
            lambda sd: [sd.pop(k) for k in list(sd) if 'stages.6.' in k],
            r'missing: stages.6.blocks.0.mlp.0.weight.*\(14 in all\)',
        ),
        (
            lambda sd: [
                sd.update({f'net.{k}': sd.pop(k)}) for k in list(sd)[::2]
            ],
            'missing: .*unexpected: .*net',
        ),
        (
            lambda sd: sd.update(fc=torch.zeros(1)),
            'unexpected: fc. Nothing was loaded',
        ),
        (
            lambda sd: sd.update({'norm0.weight': torch.ones(40)}),
            'missing: norm0.bias',
        ),
        (
            spoilt('stages.6.blocks.1.mlp.1.running_var', lambda v: v / 0),
            'NaN or infinite values in stages.6.blocks.1.mlp.1.running_var',
        ),
        (
            spoilt('patch_embed.proj.weight', lambda v: v[:, :1]),
            r'\(t0, 1 input channels\).* another shape: '
            r'patch_embed.proj.weight \(40, 1, 4, 4\) for \(40, 3, 4, 4\)',
        ),
        (lambda sd: sd.clear(), 'holds no state dict.*found nothing'),
        (lambda sd: sd.update({0: torch.zeros(1)}), 'found 0$'),
        (
            lambda sd: sd.update(lr=0.1),
            'holds no state dict.* found lr',
        ),
    ],
)
def test_what_does_not_fit_leaves_the_model_untouched(
    spoil, message, imagenet, tmp_path
):
    state_dict = imagenet('t0')
    spoil(state_dict)
    torch.save(state_dict, tmp_path / 'a.pth')
    refuses(tmp_path / 'a.pth', message)


def refuses(path, message, error=ValueError, arch='t0', **init_cfg):
    cfg = dict(dict(type='Pretrained', checkpoint=str(path)), **init_cfg)
    model = FasterNet(arch, init_cfg=cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message) as info:
        model.init_weights()
    assert str(path) in str(info.value)
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value), key


@pytest.mark.parametrize('arch', ['t1', 's'])
def test_wrong_arch_is_named(arch, imagenet, tmp_path):
    torch.save(imagenet(arch), tmp_path / 'a.pth')
    refuses(
        tmp_path / 'a.pth',
        rf'\({arch}, 3 input channels\) does not fit FasterNet',
    )


def save_legacy(state_dict, path):
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize('save', [torch.save, save_file, save_legacy])
def test_truncated(save, imagenet, tmp_path):
    whole, path = tmp_path / 'whole', tmp_path / 'a.pth'
    save(imagenet('t0'), whole)
    data = whole.read_bytes()
    cuts = [0, 1, 9, 100, 1000, 5000, len(data) // 2, len(data) - 1]
    for size in cuts:
        path.write_bytes(data[:size])
        refuses(path, 'is (no readable checkpoint|refused)')


def test_flipped_bytes(tmp_path):
    """Each flip gives a dict or one clear error, and both occur."""
    path = tmp_path / 'a.pth'
    torch.save({'patch_embed.proj.weight': torch.ones(2)}, path)
    data = path.read_bytes()
    whole = read_checkpoint(path)
    assert whole['patch_embed.proj.weight'].tolist() == [1, 1]
    loaded = refused = 0
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        try:
            assert type(read_checkpoint(path)) is dict
            loaded += 1
        except ValueError:
            refused += 1
    assert loaded > 10 and refused > 10


def test_html_page(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_text('<html><body>404 Not Found</body></html>')
    refuses(path, 'is a web page, not a checkpoint')


def test_safetensors_that_begin_like_a_page(imagenet, tmp_path):
    """Their first bytes are a length, and 80928 begins with ' <'."""
    path = tmp_path / 'a.safetensors'
    save_file(imagenet('t0'), path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], 'little')
    header = raw[8 : 8 + size].ljust(80928)
    path.write_bytes((80928).to_bytes(8, 'little') + header + raw[8 + size :])
    assert path.read_bytes().startswith(b' <')
    check(backbone_from(path), imagenet('t0'))


def test_no_such_file(tmp_path):
    refuses(tmp_path / 'a.pth', 'there is no checkpoint', FileNotFoundError)


def test_unknown_backend():
    refuses('ftp2://host/a.pth', 'ftp2')


def test_no_such_prefix(imagenet, tmp_path):
    torch.save(imagenet('t0'), tmp_path / 'a.pth')
    refuses(
        tmp_path / 'a.pth',
        r"no key under 'teacher.'; .* begin with avgpool_pre_head., head., ",
        prefix='teacher',
    )


def test_a_tensor_alone(tmp_path):
    torch.save(torch.zeros(3), tmp_path / 'a.pth')
    refuses(tmp_path / 'a.pth', 'holds a Tensor, expected a dict')


@pytest.mark.parametrize(
    'init_cfg',
    [
        dict(type='Pretrained'),
        dict(type='Pretrained', checkpoint='a.pth', strict=False),
        [
            dict(type='Pretrained', checkpoint='a.pth'),
            dict(type='Constant', layer='BatchNorm2d', val=1),
        ],
    ],
)
def test_bad_init_cfg(init_cfg):
    with pytest.raises(ValueError, match='to stand alone, with `checkpoint`'):
        FasterNet('t0', init_cfg=init_cfg).init_weights()


@pytest.mark.parametrize(
    'kind',
    [
        'Pretrained',
        'mmengine.Pretrained',
        'mmengine.model.PretrainedInit',
        'mmengine.model.weight_init.PretrainedInit',
        PretrainedInit,
    ],
)
def test_every_name_of_pretrained_accounts_for_each_key(
    kind, imagenet, tmp_path
):
    few = dict(list(imagenet('t0').items())[:20])
    torch.save(few, tmp_path / 'a.pth')
    refuses(tmp_path / 'a.pth', 'missing: ', type=kind)


@pytest.mark.parametrize(
    'init_cfg, message',
    [
        (dict(checkpoint='a.pth'), 'with a `type`'),
        ([dict(checkpoint='a.pth')], 'with a `type`'),
        (dict(type='Pretrained', checkpoint='a', ema='yes'), '`ema` to be'),
        (dict(type='Pretrained', checkpoint='a', stem='x'), '`stem` to be'),
    ],
)
def test_bad_values_of_init_cfg(init_cfg, message):
    with pytest.raises(ValueError, match=message):
        find_pretrained(init_cfg)


def test_other_initialisers_are_not_pretrained():
    assert find_pretrained(dict(type='Kaiming', layer='Conv2d')) is None
    # as a config in pure Python has it
    assert find_pretrained(dict(type=KaimingInit, layer='Conv2d')) is None


@pytest.mark.parametrize(
    'prefix', ['_orig_mod.', 'module._orig_mod.', 'backbone._orig_mod.']
)
def test_weights_of_compiled_training(prefix, imagenet, tmp_path):
    state_dict = imagenet('t0')
    content = {prefix + k: v for k, v in state_dict.items()}
    torch.save(content, tmp_path / 'a.pth')
    check(backbone_from(tmp_path / 'a.pth'), state_dict)


ONE, TWO = {'a': torch.ones(1)}, {'a': torch.full((1,), 2.0)}


@pytest.mark.parametrize(
    'content, plain, ema',
    [
        (dict(state_dict=ONE, state_dict_ema=TWO), 1, 2),  # timm
        (
            dict(model=ONE, model_ema={'module.a': TWO['a'], 'n_averaged': 3}),
            1,
            2,
        ),  # torchvision
        # mmengine's hook exchanges them
        (
            dict(
                state_dict=TWO,
                ema_state_dict={'module.a': ONE['a'], 'steps': 3},
            ),
            2,
            2,
        ),
    ],
)
def test_moving_average(content, plain, ema, tmp_path, monkeypatch):
    said = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'info', said.append)
    torch.save(content, tmp_path / 'a.pth')
    for wanted, value in ((False, plain), (True, ema)):
        read = read_state_dict(tmp_path / 'a.pth', ema=wanted)
        assert {k: v.item() for k, v in read.items()} == {'a': value}
        what = 'the average' if value == 2 else 'the weights themselves'
        assert f'taking {what}' in said.pop()


def test_no_moving_average(tmp_path):
    torch.save(dict(state_dict=ONE), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='holds no moving average'):
        read_state_dict(tmp_path / 'a.pth', ema=True)


def test_old_files_without_num_batches_tracked(imagenet, tmp_path):
    state_dict = imagenet('t0')
    old = {k: v for k, v in state_dict.items() if 'num_batches' not in k}
    assert len(old) < len(state_dict)
    torch.save(old, tmp_path / 'a.pth')
    own = backbone_from(tmp_path / 'a.pth').state_dict()
    kept = old.keys() - FasterNet.classifier_keys
    assert all(torch.equal(own[k], old[k]) for k in kept)


@pytest.mark.parametrize(
    'channels, expected',
    [
        (1, [6]),
        (2, [3, 3]),
        (4, [0.75, 1.5, 2.25, 1.5]),
        (6, [0.5, 1, 1.5, 1, 1, 1]),
    ],
)
def test_adapt_stem(channels, expected):
    rgb = torch.tensor([1.0, 2, 3]).reshape(1, 3, 1, 1)
    other = torch.ones(1)
    given = dict(stem=rgb, other=other)
    adapted = adapt_stem(given, 'stem', channels)
    assert adapted['stem'].flatten().tolist() == expected
    assert adapted['other'] is other and given['stem'] is rgb
    assert adapt_stem(given, 'stem', 3) is given
    assert adapt_stem(adapted, 'stem', channels) is adapted


class Bomb:
    """Pickles to a call that leaves a trace."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize('legacy', [False, True])
def test_code_is_refused_and_not_run(legacy, imagenet, tmp_path):
    trace = tmp_path / 'trace'
    content = dict(state_dict=imagenet('t0'), bomb=Bomb(os.mkdir, str(trace)))
    path = tmp_path / 'a.pth'
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refuses(path, r'is refused: .*\(posix.mkdir\).* could execute code')
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # so the file was a working bomb


def test_timm_layout_is_told_from_the_original(imagenet, tmp_path):
    state_dict = imagenet('t0')
    assert fasternet_from_timm(state_dict) is state_dict
    torch.save(fasternet_to_timm(state_dict), tmp_path / 'a.pth')
    assert 'classifier.bias' in read_state_dict(tmp_path / 'a.pth')


@pytest.mark.parametrize(
    'kind',
    [torch.complex64, torch.int8, torch.bool, torch.uint8],
)
def test_numbers_of_another_kind(kind, imagenet, tmp_path):
    """torch would take the real part, or the levels for the weights."""
    state_dict = imagenet('t0')
    key = 'patch_embed.proj.weight'
    state_dict[key] = state_dict[key].to(kind)
    torch.save(state_dict, tmp_path / 'a.pth')
    refuses(
        tmp_path / 'a.pth',
        f'of another type: {key} {kind} for torch.float32. Nothing was',
    )


def test_a_number_for_a_weight(imagenet, tmp_path):
    state_dict = imagenet('t0')
    state_dict['patch_embed.norm.weight'] = torch.tensor(1.0)
    torch.save(state_dict, tmp_path / 'a.pth')
    refuses(tmp_path / 'a.pth', r'norm.weight \(\) for \(40,\)')


@pytest.mark.parametrize('kind', [torch.float16, torch.float64])
def test_floats_of_other_widths(kind, imagenet, tmp_path):
    """Scripts that halve a state dict halve its counts too."""
    half = {k: v.to(kind) for k, v in imagenet('t0').items()}
    torch.save(half, tmp_path / 'a.pth')
    own = backbone_from(tmp_path / 'a.pth').state_dict()
    key = 'patch_embed.proj.weight'
    assert own[key].dtype == torch.float32
    assert torch.equal(own[key], half[key].float())


def test_numbers_that_are_none(tmp_path):
    path = tmp_path / 'a.pth'
    kinds = ['float32', 'bfloat16', 'complex64', 'float8_e4m3fn']
    for kind in kinds:
        if hasattr(torch, kind):
            tensor = torch.tensor([1, float('nan')]).to(getattr(torch, kind))
            torch.save(dict(a=tensor), path)
            with pytest.raises(ValueError, match='a.pth holds NaN .* in a'):
                read_state_dict(path)
    if hasattr(torch, 'float4_e2m1fn_x2'):
        tensor = torch.zeros(4, dtype=torch.uint8)
        tensor = tensor.view(torch.float4_e2m1fn_x2)
        torch.save(dict(a=tensor), path)
        with pytest.raises(ValueError, match='a.pth holds numbers that torch'):
            read_state_dict(path)


@pytest.mark.parametrize('save', [torch.save, save_file])
def test_a_key_of_a_megabyte(save, imagenet, tmp_path):
    path, key = tmp_path / 'a.pth', 'k\x1b[2J' + 'a' * (1 << 20)
    save({**imagenet('t0'), key: torch.ones(1)}, path)
    with pytest.raises(ValueError, match='unexpected: k.x1b.2Jaaaa') as info:
        backbone_from(path)
    assert len(str(info.value)) < 1000  # and no escape for the terminal
    save({key: torch.full((1,), float('inf'))}, path)
    with pytest.raises(ValueError, match='infinite values in k') as info:
        read_state_dict(path)
    assert len(str(info.value)) < 1000


def test_links_and_what_is_no_file(imagenet, tmp_path):
    path, link = tmp_path / 'a.pth', tmp_path / 'link.pth'
    torch.save(imagenet('t0'), path)
    link.symlink_to(path)
    check(backbone_from(link), imagenet('t0'))
    path.unlink()  # it leads nowhere
    loop, pipe = tmp_path / 'loop.pth', tmp_path / 'pipe.pth'
    loop.symlink_to(loop)
    os.mkfifo(pipe)  # to open it would wait for ever
    for other in (link, loop, pipe, tmp_path, '/dev/zero'):
        refuses(other, 'there is no checkpoint', FileNotFoundError)
