import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from fasternet_det.datasets import nuclei

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """The tool, in a folder of its own."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(
        'compare', ROOT / 'tools' / 'compare.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*argv):
        monkeypatch.setattr(sys, 'argv', ['compare.py', *map(str, argv)])
        module.main()

    module.run = run
    return module


def plain(cfg):
    """A detector's config without its plug-in convolutions."""
    if isinstance(cfg, dict):
        return {k: plain(v) for k, v in cfg.items() if k != 'conv_cfg'}
    if isinstance(cfg, (list, tuple)):
        return [plain(value) for value in cfg]
    return 'RPNHead' if cfg == 'SlotRPNHead' else cfg


def test_one_recipe_for_all_models(compare):
    configs = [Config.fromfile(path) for path in compare.CONFIGS.values()]
    assert len(configs) == 9
    for cfg in configs:
        assert cfg.keys() - {'conv_cfg'} == configs[0].keys()
        for key in configs[0]:
            if key != 'model':
                assert cfg[key] == configs[0][key], key
        assert cfg.model.keys() == configs[0].model.keys()
        for key in cfg.model:
            if key not in ('backbone', 'neck'):
                assert plain(cfg.model[key]) == plain(configs[0].model[key])
        assert cfg.train_pipeline[2].scale == (compare.SIDE, compare.SIDE)


def test_trains_and_measures(compare, monkeypatch, capsys, tmp_path):
    """One model, one iteration; the second time it is not trained again."""
    nuclei.convert('data/nuclei')
    name = 'G-Ghost RegNetX-200MF'
    monkeypatch.setattr(compare, 'CONFIGS', {name: compare.CONFIGS[name]})
    options = [
        *('--cfg-options', 'train_cfg.max_iters=1'),
        *('train_dataloader.batch_size=2', 'default_hooks.logger.interval=1'),
    ]
    for again in (False, True):  # the same again: nothing is trained
        compare.run(
            'out', '--seeds', 3, 4, '--jobs', 2, '--rounds', 1, *options
        )
        said = capsys.readouterr().out
        assert ('==> ' in said) != again
    (result,) = json.loads(Path('out/results.json').read_text()).values()
    assert 0 <= result['box AP'][0] <= 1 and len(result['mask AP']) == 2
    assert result['latency'] > 1 and result['step'] > 10
    assert result['iterations'] == 1
    assert result['params'] == 3_406_798
    seeds = set()
    for path in Path('out').glob('*/seed*/result.json'):
        text = json.loads(path.read_text())['config']
        seeds.add(Config.fromstring(text, '.py').randomness.seed)
    assert seeds == {3, 4}


def test_table(compare):
    result = {
        'box AP': [0.5, 0.7, 0.6],
        'mask AP': [0.25] * 3,
        'params': 4_170_000,
        'flops': 6_630_000_000,
        'latency': 163.4,
        'step': 750.0,
        'iterations': 120,
    }
    row = compare.make_table({'A': result}).splitlines()[-1]
    assert row == (
        '| A | 0.600 (0.500 to 0.700) | 0.250 (0.250 to 0.250) | 4.17 | 6.63 '
        '| 163 | 1.5 |'
    )


def test_one_clear_error(compare, capsys):
    with pytest.raises(SystemExit, match='2'):
        compare.run('out')
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search('no data/nuclei: run python -m fasternet_det', error)
    Path('data/nuclei').mkdir(parents=True)
    with pytest.raises(SystemExit, match='2'):
        compare.run('out', '--rounds', 0)
    assert 'expected at least 1' in capsys.readouterr().err
    assert not Path('out').exists()
