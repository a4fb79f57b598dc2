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


def only(compare, comparison, name, monkeypatch):
    """Leave one model of a comparison."""
    own = compare.COMPARISONS[comparison]
    monkeypatch.setitem(compare.COMPARISONS, comparison, {name: own[name]})


def test_one_recipe_for_all_models(compare):
    paths = compare.COMPARISONS['relatives'].values()
    configs = [Config.fromfile(path) for path in paths]
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
    only(compare, 'relatives', name, monkeypatch)
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


def test_evidence(compare):
    """Four backbones in the same detectors, by one recipe, on the same data.

    Models and recipes are those on the nuclei, but for the statistics and, of
    Mask R-CNN on craters, the anchors' scale and twice the iterations.
    """
    paths = compare.COMPARISONS['evidence']
    assert len(paths) == len(set(paths.values())) == 16
    groups = compare.by_group(
        {name: Config.fromfile(path) for name, path in paths.items()}
    )
    names = {'FasterNet-T0', 'ResNet-18', 'GhostNet', 'MobileNetV2'}
    metrics = {
        'craters, Mask R-CNN': 'bbox',  # its masks are but discs
        'craters, RTMDet': 'bbox',
        'HeLa, Mask R-CNN': ['bbox', 'segm'],
        'HeLa, RTMDet': 'bbox',
    }
    assert groups.keys() == metrics.keys()
    for group, own in groups.items():
        assert own.keys() == names
        first = own['FasterNet-T0']
        for cfg in own.values():
            assert cfg.model.backbone.get('init_cfg') is None  # from scratch
            for key in cfg.keys() | first.keys():
                if key != 'model':
                    assert cfg[key] == first[key], key
            for key in cfg.model:
                if key not in ('backbone', 'neck'):
                    assert cfg.model[key] == first.model[key]
        assert first.val_evaluator.metric == metrics[group]
        folder = group.split(',')[0].lower()
        for loader in (first.train_dataloader, first.test_dataloader):
            assert loader.dataset.data_root == f'data/{folder}/'
        assert first.test_evaluator == first.val_evaluator
        assert first.test_evaluator.ann_file.startswith(f'data/{folder}/')
    for cfg in groups['craters, Mask R-CNN'].values():
        anchors = cfg.model.rpn_head.anchor_generator
        scheduler = cfg.param_scheduler[1]
        assert anchors.scales == [4]
        assert cfg.train_cfg.max_iters == scheduler.end == 240
        anchors.scales = [6]
        cfg.train_cfg.max_iters = scheduler.end = 120
    for group in ('HeLa, Mask R-CNN', 'HeLa, RTMDet'):
        for name, cfg in groups[group].items():
            others = [groups[group.replace('HeLa', 'craters')][name]]
            stem = paths[f'{group}: {name}'].stem
            path = compare.MINI / f'{stem.replace("_hela", "_nuclei")}.py'
            if path.exists():
                others.append(Config.fromfile(path))
            for other in others:
                other.model.data_preprocessor = cfg.model.data_preprocessor
                assert cfg.model == other.model
                assert cfg.train_cfg.max_iters == other.train_cfg.max_iters
                for key in ('optim_wrapper', 'param_scheduler'):
                    assert cfg[key] == other[key]


def test_table_of_groups(compare, tmp_path):
    """Each has its own, of the metrics that it has, and its own panels."""
    result = dict(params=1e6, flops=1e9, latency=10, step=60, iterations=1000)
    results = {
        'a: X': result | {'box AP': [0.5]},
        'b: X': result | {'box AP': [0.25], 'mask AP': [0.75]},
        'b: Y, Z': result | {'box AP': [0.2], 'mask AP': [0.3]},
    }
    rest = '| 1.00 | 1.00 | 10 | 1.0 |'
    first, second = compare.make_table(results).split('\nb:\n\n')
    title, _, head, _, *rows = first.splitlines()
    assert title == 'a:' and 'mask AP' not in head
    assert rows == [f'| X | 0.500 (0.500 to 0.500) {rest}']
    head, _, *rows = second.splitlines()
    assert head.startswith('| backbone | box AP | mask AP | params')
    assert rows[1] == (
        '| Y, Z | 0.200 (0.200 to 0.200) | 0.300 (0.300 to 0.300) ' + rest
    )
    compare.plot(results, tmp_path / 'compare.png')
    shape = compare.plt.imread(tmp_path / 'compare.png').shape
    assert shape[:2] == (2 * 540, 1200)


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
