import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasternet_det import FasterNet

TOOL = Path(__file__).parents[2] / 'tools' / 'convert_checkpoint.py'
convert = runpy.run_path(TOOL)['convert']


def save(state_dict, path):
    (save_file if path.suffix == '.safetensors' else torch.save)(
        state_dict, path
    )


def load(path):
    return (
        load_file(path)
        if path.suffix == '.safetensors'
        else torch.load(path, weights_only=True)
    )


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('classifier', [True, False])
@pytest.mark.parametrize('layout', ['original', 'timm'])
def test_there_and_back(
    layout, classifier, suffix, imagenet, timm_keys, tmp_path
):
    first, second, third = (
        tmp_path / f'{name}{suffix}' for name in ('a', 'b', 'c')
    )
    original = imagenet('t0')
    save(original, first)
    said = convert(str(first), second, layout, classifier)
    assert ': t0, original layout, 131 entries' in said
    left_out = 0 if classifier else 3
    assert f'{layout} layout, {131 - left_out} entries' in said
    assert f'{left_out} left out' in said
    if layout == 'timm' and classifier:
        shapes = {k: list(v.shape) for k, v in load(second).items()}
        assert shapes == timm_keys['t0']
    convert(str(second), third)
    back = load(third)
    assert original.keys() - back.keys() == (
        set() if classifier else FasterNet.classifier_keys
    )
    for key, value in back.items():
        assert torch.equal(original[key], value), key


def test_detector_keeps_its_norms_but_for_timm(randomise, tmp_path):
    backbone = randomise(FasterNet('t1')).state_dict()
    detector = {f'backbone.{k}': v for k, v in backbone.items()}
    detector['neck.lateral_convs.0.conv.weight'] = torch.ones(1)
    torch.save(dict(state_dict=detector), tmp_path / 'epoch_12.pth')
    source = str(tmp_path / 'epoch_12.pth')
    convert(source, tmp_path / 'a.safetensors')
    assert load(tmp_path / 'a.safetensors').keys() == backbone.keys()
    said = convert(source, tmp_path / 'timm.pth', 'timm')
    assert ': t1, ' in said and '20 left out' in said
    assert not any(k.startswith('norm') for k in load(tmp_path / 'timm.pth'))


@pytest.mark.parametrize(
    'target, message',
    [
        ('a.onnx', 'neither .pth nor .safetensors'),
        ('source.pth', 'exists'),
        ('nowhere/a.pth', 'there is no folder'),
    ],
)
def test_bad_targets(target, message, tmp_path):
    torch.save({'fc.weight': torch.zeros(1)}, tmp_path / 'source.pth')
    before = (tmp_path / 'source.pth').read_bytes()
    with pytest.raises((OSError, ValueError), match=message):
        convert(str(tmp_path / 'source.pth'), tmp_path / target)
    assert (tmp_path / 'source.pth').read_bytes() == before


def test_half_a_checkpoint_is_refused(imagenet, tmp_path):
    state_dict = imagenet('t0')
    del state_dict['stages.4.blocks.3.mlp.1.bias']
    state_dict['extra'] = torch.zeros(1)
    torch.save(state_dict, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='missing: stages.4.* unexpected: ex'):
        convert(str(tmp_path / 'a.pth'), tmp_path / 'b.pth')
    assert not (tmp_path / 'b.pth').exists()


def test_command_line(imagenet, tmp_path):
    torch.save({'fc.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    torch.save(imagenet('t0'), tmp_path / 'a.pth')
    run = [sys.executable, TOOL]
    bad = subprocess.run(
        [*run, tmp_path / 'other.pth', tmp_path / 'b.pth'],
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 1
    assert 'Nothing was written' in bad.stderr
    assert 'holds no FasterNet' in bad.stderr
    assert not (tmp_path / 'b.pth').exists()
    options = ['--layout', 'timm', '--no-classifier']
    good = subprocess.run(
        [*run, tmp_path / 'a.pth', tmp_path / 'b.safetensors', *options],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'timm layout, 128 entries, 3 left out' in good.stdout
    assert 'stages.1.downsample.norm.bias' in load(tmp_path / 'b.safetensors')
