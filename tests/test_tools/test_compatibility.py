import copy
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData, PixelData

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))
import compatibility  # noqa: E402
import compatibility_models  # noqa: E402
import measuring  # noqa: E402
from seeded import Model  # noqa: E402

NECK = ['model.neck.in_channels']
ALL, LAST = [0, 2, 4, 6], [6]
UNREAD = ['backbone.norm0.weight', 'backbone.norm0.bias']  # by the FPN
# By family: the outputs of the backbone, what else changes, and parameters
# that the loss does not reach.
FAMILIES = {
    'retinanet': (ALL, NECK, UNREAD),
    'faster_rcnn': (ALL, NECK, []),
    'cascade_rcnn': (ALL, NECK, []),
    'double_heads': (ALL, NECK, []),
    'fcos': (ALL, NECK, UNREAD),
    'tood': (ALL, NECK, UNREAD),
    'dyhead': (ALL, ['model.neck.0.in_channels'], UNREAD),
    'yolof': (LAST, NECK, []),
    'detr': (LAST, NECK, []),
    'solo': (ALL, NECK, []),
}


@pytest.fixture
def quick(monkeypatch):
    """Small images, few proposals, and no export, which test_export tests."""
    monkeypatch.setattr(measuring, 'TURN_SECONDS', 0)
    monkeypatch.setattr(compatibility, 'ROUNDS', 1)
    monkeypatch.setattr(compatibility, 'SIZE', (96, 128))
    monkeypatch.setattr(compatibility, 'PROPOSALS', 20)
    monkeypatch.setattr(compatibility, 'STAGES', compatibility.STAGES[:5])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whatever else runs
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('family', FAMILIES)
def test_families(family, quick, tmp_path):
    path = tmp_path / 'row.json'
    row = compatibility.examine(compatibility.new_row(family), path)
    assert json.loads(path.read_text()) == row
    deformable = family == 'dyhead'  # offsets amplify rounding
    assert list(row['why']) == ['bfloat16'] * deformable
    outputs, changed, without = FAMILIES[family]
    assert row['build'] == dict(outputs=outputs, changed=changed)
    assert row['train'] == dict(without=without, frozen=0)
    assert row['predict']['detections'] >= 10
    fast = row['float32']
    assert fast['error'] < (2e-4 if deformable else 1e-5)
    assert fast['common'] == 1
    assert fast['faster'] > 0
    if deformable:
        assert 'its maps differ by' in row['why']['bfloat16']
    else:
        assert 1e-4 < row['bfloat16']['error'] < 0.03


@pytest.mark.parametrize(
    'family, outputs, changes',
    [
        # from its last map to its first
        ('yolo', [2, 4, 6], {'neck.in_channels': [320, 160, 80]}),
        # more maps than the backbone's
        (
            'ssd',
            [2, 4],
            {
                'neck.in_channels': [80, 160],
                'bbox_head.in_channels': [80, 160, 512, 256, 256, 256],
                'neck.out_channels': [80, 160, 512, 256, 256, 256],
            },
        ),
        # no neck, and a map twice
        (
            'cornernet',
            [0],
            {'bbox_head.in_channels': 40, 'bbox_head.num_feat_levels': 1},
        ),
        # several necks
        ('libra_rcnn', ALL, {'neck.0.in_channels': [40, 80, 160, 320]}),
        # a backbone of another package
        ('convnext', ALL, {'neck.in_channels': [40, 80, 160, 320]}),
        # another backbone, which stays
        ('lad', ALL, {'neck.in_channels': [40, 80, 160, 320]}),
        # a detector in another
        ('soft_teacher', ALL, {'neck.in_channels': [40, 80, 160, 320]}),
    ],
)
def test_adapt(family, outputs, changes):
    before = compatibility_models.read(family)
    config, changed = compatibility_models.adapt(family)
    assert set(changed) == {f'model.{name}' for name in changes}
    backbone = config.model.pop('backbone')
    assert backbone == dict(type='FasterNet', arch='t0', out_indices=outputs)
    before.model.pop('backbone')
    before.merge_from_dict({f'model.{k}': v for k, v in changes.items()})
    assert config.model == before.model


def test_choice():
    names = {
        'atss': 'atss_r50_fpn_1x_coco',
        'rtmdet': 'rtmdet_s_8xb32-300e_coco',
        'nas_fpn': 'retinanet_r50_nasfpn_crop640-50e_coco',
    }
    for family, name in names.items():
        assert compatibility_models.choose(family).stem == name


@pytest.mark.parametrize(
    'family, why, is_detector',
    [
        ('_base_', 'its config has no model', False),
        ('reid', 'BaseReID is none', False),
        ('qdtrack', 'QDTrack is none', False),
        (
            'misc',
            'ValueError: the backbone of Detectron2Wrapper is not of mmdet',
            True,
        ),
        (
            'tridentnet',
            "AttributeError: 'FasterNet' object has no attribute 'num_branch'",
            True,
        ),
    ],
)
def test_what_does_not_build(family, why, is_detector, tmp_path):
    row = compatibility.new_row(family)
    compatibility.examine(row, tmp_path / 'row.json')
    assert row['why'] == dict(build=why)
    assert row['detector'] == is_detector


def test_seed():
    """Constants, and what gives boxes their size, are not random."""
    config, _ = compatibility_models.adapt('gfl')
    config.model.bbox_head.num_classes = 8
    gfl = MODELS.build(config.model)
    gfl.bbox_head.gfl_reg.bias.data.fill_(4)
    with torch.no_grad():
        compatibility_models.seed(gfl)
    assert not gfl.training
    assert gfl.bbox_head.integral.project.tolist() == list(range(17))
    assert 3.8 < gfl.bbox_head.gfl_reg.bias.mean() < 4.2
    assert gfl.backbone.norm0.running_var.std() > 0.1


def make_sample(scores, **others):
    """Found: a row of boxes, one of each score."""
    left = 20.0 * torch.arange(len(scores))
    boxes = torch.stack([left, left * 0, left + 10, left * 0 + 10], 1)
    labels = torch.zeros(len(scores), dtype=torch.long)
    instances = InstanceData(
        bboxes=boxes, scores=torch.tensor(scores), labels=labels, **others
    )
    return DetDataSample(pred_instances=instances)


def test_found_by():
    found = make_sample([0.9, 0.8])
    found.pred_instances.bboxes[0, 2] = 0.01  # a line
    instances = compatibility_models.found_by(lambda: [found])
    assert instances.bboxes.tolist() == [[20, 0, 30, 10]]
    # masks alone
    masks = torch.zeros(1, 8, 9, dtype=torch.bool)
    masks[:, 2:5, 3:7] = True
    found = make_sample([0.9], masks=masks)
    found.pred_instances.bboxes.zero_()
    instances = compatibility_models.found_by(lambda: [found])
    assert instances.bboxes.tolist() == [[3, 2, 7, 5]]
    # a panoptic map
    segments = PixelData(sem_seg=masks * 1007)
    found = DetDataSample(pred_panoptic_seg=segments)
    instances = compatibility_models.found_by(lambda: [found])
    assert instances.labels.tolist() == [0, 1007]
    assert instances.bboxes.tolist() == [[0, 0, 9, 8], [3, 2, 7, 5]]


class Fake(torch.nn.Module):
    """A detector that finds what has a score above a threshold."""

    def __init__(self, scores):
        super().__init__()
        self.test_cfg = ConfigDict(score_thr=0.1, filter_thr=0.1)
        self.scores, self.map = scores, torch.ones(1, 1, 2, 2)

    def predict(self, *_, **__):
        above = [s for s in self.scores if s > self.test_cfg.score_thr]
        return [make_sample(above)]

    def extract_feat(self, _):
        return [self.map]


def fake_trial(scores):
    trial = compatibility.Trial('fake')
    trial.model = Model('fake', Fake(scores), torch.ones(1), [])
    trial.found = compatibility_models.set_threshold(trial.model)
    return trial


def test_set_threshold():
    """The highest at which there are twenty."""
    scores = torch.linspace(0.0105, 0.9905, 99).tolist()
    trial = fake_trial(scores)
    assert len(trial.found) == 20
    config = trial.model.module.test_cfg
    assert config.score_thr == pytest.approx(0.8, abs=0.002)
    assert config.filter_thr == 0
    assert len(fake_trial(scores[:5]).found) == 5
    with pytest.raises(ValueError, match='finds nothing'):
        fake_trial([])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_wrong_fast_form(dtype, quick, monkeypatch):
    trial = fake_trial([0.5, 0.6])
    fast = copy.deepcopy(trial.model.module)
    monkeypatch.setattr(compatibility, 'optimize', lambda *_: fast)
    right = trial._compare(dtype)
    assert (right['error'], right['common']) == (0, 1)
    fast.scores = [0.5, 0.7]
    if dtype == torch.float32:
        with pytest.raises(ValueError, match='by 0e[+]00, 50% of'):
            trial._compare(dtype)
    else:
        assert trial._compare(dtype)['common'] == 0.5
    fast.scores = [0.5, 0.6]
    fast.map[..., 0] = 1.04
    with pytest.raises(ValueError, match='by 4e-02, 100% of'):
        trial._compare(dtype)


def test_export(monkeypatch):
    trial = fake_trial([0.5, 0.6])

    def exported_side(spec, model, folder):
        assert (spec.name, spec.kind) == ('fake', 'onnxruntime')
        assert model is trial.model and folder.is_dir()
        return SimpleNamespace(
            found=lambda: [make_sample(scores).pred_instances]
        )

    monkeypatch.setattr(compatibility, 'exported_side', exported_side)
    scores = [0.5, 0.6]
    assert trial.export() == dict(common=1)
    scores = [0.5, 0.7]
    with pytest.raises(ValueError, match='50% of the detections'):
        trial.export()


def test_reason():
    def reason_of(kind, *args, **kwargs):
        try:
            raise kind(*args, **kwargs)
        except kind as error:
            return compatibility.reason(error)

    assert reason_of(ImportError, 'a b\nc') == 'ImportError: a b'
    lacking = reason_of(ModuleNotFoundError, 'No', name='torchvision')
    assert lacking == 'lacks the package torchvision'
    text = 'class `A` in mmdet/a/b.py: class `B` in mmdet/b.py: is wrong'
    assert reason_of(ValueError, text) == 'ValueError: is wrong'
    text = 'at "/usr/lib/site-packages/mmcv/ops/a.cpp":3 '
    assert reason_of(RuntimeError, text) == 'RuntimeError: at a.cpp":3'
    assert (
        reason_of(AssertionError)
        == 'AssertionError: raise kind(*args, **kwargs)'
    )
    assert len(reason_of(ValueError, 'word ' * 100)) <= 160


def test_process_that_hangs(tmp_path):
    compatibility.examine_apart('retinanet', tmp_path, 0.2)
    row = json.loads((tmp_path / 'retinanet.json').read_text())
    assert row['why'] == dict(build='not done in 0.2 s')


def test_process_that_dies(monkeypatch, tmp_path):
    monkeypatch.setattr(compatibility, 'examine', os._exit)  # a TypeError
    compatibility.examine_apart('retinanet', tmp_path, 60)
    path = tmp_path / 'retinanet.json'
    row = json.loads(path.read_text())
    assert row['why'] == dict(build='exit code 1')
    # What ended is not run again, what was cut off is.
    with monkeypatch.context() as nothing:
        nothing.setattr(compatibility, 'get_context', None)
        compatibility.examine_apart('retinanet', tmp_path, 60)
    assert json.loads(path.read_text()) == row
    path.write_text(json.dumps(compatibility.new_row('retinanet')))
    compatibility.examine_apart('retinanet', tmp_path, 60)
    assert json.loads(path.read_text()) == row


def test_page():
    rows = [compatibility.new_row(name) for name in ('atss', 'yolox', 'reid')]
    atss, yolox, reid = rows
    atss.update(
        build=dict(outputs=ALL, changed=NECK),
        train=dict(without=UNREAD, frozen=3),
        predict=dict(detections=21),
        float32=dict(error=2.6e-6, common=0.96, faster=1.234),
        bfloat16=dict(error=0.0123, common=0.81),
        why=dict(export='ValueError: a | b'),
    )
    yolox.update(why=dict(build='not done in 300 s'))
    reid.update(why=dict(build='BaseReID is none'), detector=False)
    text = compatibility.page(rows, 'python tools/compatibility.py --out x')
    assert '```bash\npython tools/compatibility.py --out x\n```' in text
    assert (
        '**Of 2 families, 1 build, 1 train, 1 predict; 1 have a fast form in '
        'float32, 1 in bfloat16, 0 are exported.**'
    ) in text
    lines = [line for line in text.splitlines() if line.startswith('| ')]
    assert lines[2:] == [
        '| atss | atss_r50_fpn_1x_coco | 0 2 4 6 | `model.neck.in_channels` '
        '| yes | 2 (`backbone.norm0.weight`), 3 frozen | 21 | 3e-06, 96%, '
        '1.23x | 1e-02, 81% | no | export: ValueError: a \\| b |',
        '| yolox | yolox_s_8xb8-300e_coco | no | no | - | - | - | - | - | - '
        '| build: not done in 300 s |',
    ]
    assert 'Folders without a detector: reid (BaseReID is none).' in text
    yolox['machine'] = dict(atss['machine'], cores=0)
    with pytest.raises(ValueError, match='of other machines'):
        compatibility.page(rows, '')


def test_command(monkeypatch, capsys, tmp_path):
    out = tmp_path / 'found'
    argv = ['compatibility.py', '--out', str(out), '--only', 'reid', 'atss']
    monkeypatch.setattr('sys.argv', argv)
    monkeypatch.chdir(tmp_path)

    def examine_apart(family, folder, limit):
        row = compatibility.new_row(family)
        (folder / f'{family}.json').write_text(json.dumps(row))

    monkeypatch.setattr(compatibility, 'examine_apart', examine_apart)
    page = compatibility.PAGE
    before = page.read_text() if page.exists() else None
    compatibility.main()
    text = capsys.readouterr().out
    command = 'python tools/compatibility.py --out found --only reid atss'
    assert command in text and '| atss |' in text
    # A part of the families makes no page.
    assert (page.read_text() if page.exists() else None) == before
    monkeypatch.setattr('sys.argv', [*argv[:4], 'nothing'])
    with pytest.raises(SystemExit):
        compatibility.main()
    assert (
        "'nothing' is none of _base_, albu_example" in capsys.readouterr().err
    )
