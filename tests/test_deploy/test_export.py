import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from fill import fill_input
from mmcv.cnn import ConvModule
from mmdet.apis import init_detector
from mmdet.models.necks import BFP
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor, BaseModule
from mmengine.registry import init_default_scope
from torch import nn

from fasternet_det import FasterNet, MultiChannelDataPreprocessor, SPConv
from fasternet_det.deploy import optimize
from fasternet_det.deploy.decode import EndToEnd
from fasternet_det.deploy.evaluate import (
    ExportedDetector,
    calibration_images,
    evaluate,
)
from fasternet_det.deploy.export import export, load, to_onnx
from fasternet_det.deploy.quantize import quantize

CONFIGS = Path(__file__).parents[2] / 'configs'
RETINANET = 'mini/retinanet_fasternet-t0_fpn_nuclei.py'
MASK_RCNN = 'mini/mask-rcnn_fasternet-t0_fpn_nuclei.py'
RUNTIMES = ('onnxruntime', 'openvino')


def nbytes(model):
    return sum(v.numel() * v.element_size() for v in model.parameters())


def samples(images):
    """What mmdet knows of a batch that is neither resized nor padded."""
    shape = tuple(images.shape[2:])
    metainfo = dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0))
    return [DetDataSample(metainfo=metainfo) for _ in images]


def compare(exported, model, images):
    """Compare detections; return how many there are, by image."""
    with torch.no_grad():
        expected = model.predict(images, samples(images))
    counts = []
    for a, b in zip(
        exported.predict(images, samples(images)), expected, strict=True
    ):
        a, b = a.pred_instances, b.pred_instances
        assert torch.equal(a.labels, b.labels)
        torch.testing.assert_close(a.bboxes, b.bboxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
        if 'masks' in b:
            assert (a.masks != b.masks).float().mean() < 1e-3
        counts.append(len(b))
    return counts


# ---- backbone


@pytest.fixture(scope='module', params=['t0', 't2'])
def backbone(request, filled, tmp_path_factory):
    """A backbone with randomised BatchNorms, and its export."""
    model = FasterNet(request.param, layer_scale_init_value=1)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    model.load_state_dict(filled(shapes))
    path = tmp_path_factory.mktemp(request.param) / 'a.onnx'
    export(model.eval(), path)
    return model, path


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize(
    'shape',
    [(1, 3, 64, 96), (2, 3, 128, 128), (1, 3, 70, 101), (3, 3, 33, 32)],
)
def test_maps(shape, runtime, backbone):
    model, path = backbone
    images = torch.from_numpy(fill_input(0, shape))
    found = load(path, runtime, threads=2)(images.numpy())
    with torch.no_grad():
        expected = model(images)
    for a, b in zip(found, expected, strict=True):
        b = b.numpy()
        assert a.shape == b.shape and a.dtype == np.float32
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


def test_relatives(relative, tmp_path):
    path = tmp_path / 'a.onnx'
    export(relative, path)
    assert path.stat().st_size <= 1.01 * nbytes(relative) + 1e6
    for runtime in RUNTIMES:
        session = load(path, runtime)
        for shape in ((1, 3, 64, 96), (2, 3, 128, 64), (3, 3, 70, 101)):
            images = torch.from_numpy(fill_input(0, shape))
            with torch.no_grad():
                expected = relative(images)
            for a, b in zip(session(images.numpy()), expected, strict=True):
                b = b.numpy()
                assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.parametrize(
    'conv_cfg, kind',
    [
        (dict(type='SAConv', use_deform=True), 'SAConv'),
        (dict(type='DCNv2'), 'ModulatedDeformConv2dPack'),
    ],
)
def test_deformable_layers_are_refused(conv_cfg, kind, tamed, tmp_path):
    model = nn.Sequential(
        ConvModule(
            *(8, 6, 3), padding=1, conv_cfg=conv_cfg, norm_cfg=dict(type='BN')
        )
    )
    with pytest.raises(
        ValueError, match=f'export 0.conv: .* its {kind}; train'
    ) as error:
        export(tamed(model), tmp_path / 'a.onnx')
    assert ('use_deform=False' in str(error.value)) == (kind == 'SAConv')


def test_the_fast_form_is_refused():
    with pytest.raises(ValueError, match='fast form: export the original'):
        to_onnx(optimize(FasterNet('t0').eval()))


def test_levels_pooled_to_one_size_are_refused(tmp_path):
    """As Libra R-CNN's are: torch records the sizes of its example."""
    neck = BFP(8, 3).eval()
    with pytest.raises(ValueError, match='for its BFP; train a detector wi'):
        export(neck, tmp_path / 'a.onnx')


def test_bare_layer(tamed, tmp_path):
    model = nn.Sequential(tamed(SPConv(8, 6, 3))).eval()
    export(model, tmp_path / 'a.onnx')
    x = torch.from_numpy(fill_input(0, (2, 8, 9, 7)))
    (found,) = load(tmp_path / 'a.onnx')(x.numpy())
    np.testing.assert_allclose(found, model(x).detach(), rtol=0, atol=1e-4)


class LikeMobileNetV2(BaseModule):
    """A backbone whose ``in_channels`` are those of its last stage."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(6, 4, 3)
        self.in_channels = 4

    def forward(self, x):
        return self.conv1(x)


def test_channels_are_the_first_layers(tmp_path):
    export(LikeMobileNetV2().eval(), tmp_path / 'a.onnx')
    (found,) = load(tmp_path / 'a.onnx')(fill_input(0, (1, 6, 9, 7)))
    assert found.shape == (1, 4, 7, 5)


def test_file(backbone):
    model, path = backbone
    # 1.01 times the weights and 1 MB are asked for: no metadata bloats it.
    assert path.stat().st_size <= 1.001 * nbytes(model) + 50e3
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [('', 20)]
    blocks = sum(len(model.stages[i].blocks) for i in (0, 2, 4, 6))
    act = 'Gelu' if 'Gelu' in str(proto.graph.node) else 'Relu'
    counts = Counter(node.op_type for node in proto.graph.node)
    # 8 nodes a block, layer scale included
    assert counts == dict(
        Conv=3 * blocks + 4,
        Split=blocks,
        Concat=blocks,
        Mul=blocks,
        Add=blocks,
        BatchNormalization=4,
        **{act: blocks},
    )
    assert str(Path.cwd()).encode() not in path.read_bytes()
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == [
        *('batch', 3, 'height', 'width')
    ]


def test_bf16(backbone):
    model, path = backbone
    images = torch.from_numpy(fill_input(0, (1, 3, 64, 96)))
    found = load(path, 'openvino', precision='bf16')
    with torch.no_grad():
        for a, b in zip(found(images.numpy()), model(images), strict=True):
            assert np.abs(a - b.numpy()).max() <= 0.05 * b.abs().max()


def test_classifier(randomise, tmp_path):
    model = randomise(FasterNet('t0', fork_feat=False)).eval()
    export(model, tmp_path / 'a.onnx')
    images = torch.from_numpy(fill_input(0, (2, 3, 64, 64)))
    (found,) = load(tmp_path / 'a.onnx')(images.numpy())
    expected = model(images).detach().numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# ---- detectors


@pytest.fixture(scope='module')
def retinanet(config, trained):
    """Config and trained model."""
    config = Config.fromfile(config)
    checkpoint = str(trained / 'iter_40.pth')
    return config, init_detector(config, checkpoint, device='cpu')


@pytest.fixture(scope='module')
def exported(retinanet, tmp_path_factory):
    """An export of the RetinaNet."""
    path = tmp_path_factory.mktemp('retinanet') / 'a.onnx'
    export(retinanet[1], path)
    assert list(path.parent.iterdir()) == [path]
    return path


@pytest.fixture
def tiles(retinanet, project, monkeypatch):
    """Two training tiles as the detector gets them, (2, 3, 256, 256)."""
    monkeypatch.chdir(project.folder)
    images = list(calibration_images(retinanet[0], 2))
    return torch.from_numpy(np.concatenate(images))


@pytest.fixture
def raw_tiles(retinanet, project, monkeypatch):
    """The same tiles as they are read and resized, in uint8."""
    monkeypatch.chdir(project.folder)
    images = list(calibration_images(retinanet[0], 2, pixels=True))
    return torch.from_numpy(np.concatenate(images))


@pytest.fixture(scope='module')
def pixels(retinanet, tmp_path_factory):
    """An export of the RetinaNet that takes images as they are read."""
    path = tmp_path_factory.mktemp('pixels') / 'a.onnx'
    export(retinanet[1], path, preprocessor=retinanet[1].data_preprocessor)
    return path


def test_calibration_images_of_nested_datasets(
    retinanet, project, monkeypatch
):
    monkeypatch.chdir(project.folder)
    config = copy.deepcopy(retinanet[0])
    plain = config.train_dataloader.dataset
    others = dict(plain, ann_file='annotations/val.json')
    others['data_prefix'] = dict(img='val/')
    found = []
    for count, dataset in (
        (35, plain),
        (4, others),
        (
            39,
            dict(
                type='RepeatDataset',
                times=2,
                dataset=dict(type='ConcatDataset', datasets=[plain, others]),
            ),
        ),
    ):
        config.train_dataloader.dataset = dataset
        found.append(np.concatenate(list(calibration_images(config, count))))
    assert np.array_equal(found[2], np.concatenate(found[:2]))


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_detections(runtime, retinanet, exported, tiles):
    model = retinanet[1]
    session = ExportedDetector(load(exported, runtime), None)
    assert min(compare(session, model, tiles)) > 5
    assert compare(session, model, tiles[:1, :, :160, :224])[0] > 5
    assert compare(session, model, tiles[1:, :, 20:221, 30:233])[0] > 5


def test_standard_operators_only(retinanet, exported):
    assert exported.stat().st_size <= 1.01 * nbytes(retinanet[1]) + 1e6
    proto = onnx.load(exported)
    assert {node.domain for node in proto.graph.node} == {''}
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds['NonMaxSuppression'] == 1
    assert not {'ScatterND', 'ScatterElements', 'Loop', 'If'} & kinds.keys()


def test_files_and_metadata(tamed, tmp_path):
    model = nn.Sequential(tamed(SPConv(8, 6, 3))).eval()
    images = fill_input(0, (2, 8, 9, 7))
    for name in ('a.onnx', 'b.xml', 'c.xml'):
        export(
            model,
            tmp_path / name,
            dict(mean=[1, 2.5], classes=('nucleus',)),
            [images] if name == 'c.xml' else None,
        )
    assert {path.name for path in tmp_path.iterdir()} == {
        *('a.onnx', 'b.xml', 'b.bin', 'c.xml', 'c.bin')
    }
    proto = onnx.load(tmp_path / 'a.onnx')
    notes = {p.key: p.value for p in proto.metadata_props}
    assert notes == dict(mean='[1, 2.5]', classes='["nucleus"]')
    expected = model(torch.from_numpy(images)).detach().numpy()
    for name, error in (('b.xml', 1e-5), ('c.xml', 0.05)):
        read = openvino.Core().read_model(tmp_path / name)
        assert read.get_rt_info(['model_info', 'mean']).value == '[1, 2.5]'
        kinds = {operator.get_type_name() for operator in read.get_ops()}
        assert ('FakeQuantize' in kinds) == (name == 'c.xml')
        (found,) = load(tmp_path / name, 'openvino')(images)
        assert np.abs(found - expected).max() <= error * np.abs(expected).max()


@pytest.mark.parametrize('shape', [(256, 256), (201, 203), (33, 250)])
def test_pixels(shape, retinanet, pixels, raw_tiles):
    """Two images in uint8, as a data loader gives them, padded or not."""
    height, width = shape
    images = raw_tiles[:, :, :height, :width].contiguous()
    assert images.dtype == torch.uint8
    exported = ExportedDetector(load(pixels), None, dict(dtype='uint8'))
    data = dict(inputs=list(images), data_samples=samples(images))
    with torch.no_grad():
        expected = retinanet[1].test_step(copy.deepcopy(data))
    for a, b in zip(exported.test_step(data), expected, strict=True):
        a, b = a.pred_instances, b.pred_instances
        assert len(b) > 2 and torch.equal(a.labels, b.labels)
        torch.testing.assert_close(a.bboxes, b.bboxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=0)


def test_pixels_of_many_channels(tamed, tmp_path):
    model = nn.Sequential(tamed(SPConv(8, 6, 3))).eval()
    preprocess = MultiChannelDataPreprocessor(
        mean=list(range(8)), std=list(range(8, 16)), pad_size_divisor=16
    )
    path = tmp_path / 'a.onnx'
    export(model, path, preprocessor=preprocess)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 17))
    (found,) = load(path)(images.astype(np.uint8))
    inputs = list(torch.from_numpy(images))
    inputs = preprocess(dict(inputs=inputs, data_samples=None))['inputs']
    assert inputs.shape == (2, 8, 16, 32)
    np.testing.assert_allclose(
        found, model(inputs).detach(), rtol=0, atol=1e-4
    )


def test_ap(retinanet, exported, project, monkeypatch):
    """COCO AP: the same by all runtimes, and near that in INT8."""
    monkeypatch.chdir(project.folder)
    config, model = retinanet
    scores = evaluate(config, model)
    assert scores['coco/bbox_mAP'] > 0.05

    def score(path, runtime):
        session = load(path, runtime)
        detector = ExportedDetector(session, config.model.data_preprocessor)
        return evaluate(config, detector)

    for runtime in RUNTIMES:
        for key, value in score(exported, runtime).items():
            assert abs(value - scores[key]) <= 1e-3, (runtime, key)

    int8 = exported.with_name('int8.onnx')
    images = calibration_images(config, 8)
    onnx.save(quantize(onnx.load(exported), images)[0], int8)
    assert int8.stat().st_size < 0.35 * exported.stat().st_size
    for runtime in RUNTIMES:
        found = score(int8, runtime)['coco/bbox_mAP_50']
        assert abs(found - scores['coco/bbox_mAP_50']) < 0.1
    floats = {
        weight.name.removeprefix('detector.')
        for weight in onnx.load(int8).graph.initializer
        if weight.data_type == onnx.TensorProto.FLOAT
        and weight.name.endswith('.weight')
    }
    last = ('retina_cls', 'retina_reg')
    assert floats == {f'bbox_head.head.{name}.weight' for name in last}


def test_boxes_are_clipped_to_the_image(retinanet, exported, tiles):
    """A padded batch: boxes end where the image does."""
    padded = torch.nn.functional.pad(tiles[:1, :, :, :200], (0, 56))
    (sample,) = samples(padded)
    sample.set_metainfo(dict(img_shape=(256, 200), scale_factor=(2.0, 0.5)))
    session = ExportedDetector(load(exported), None)
    (found,) = session.predict(padded, [sample])
    corners = found.pred_instances.bboxes.view(-1, 2, 2)
    assert corners[..., 0].max() == 100
    assert 400 < corners[..., 1].max() <= 512


def test_nothing_found(exported, tmp_path, tiles):
    proto = onnx.load(exported)
    (bias,) = (
        weight
        for weight in proto.graph.initializer
        if weight.name.endswith('retina_cls.bias')
    )
    value = onnx.numpy_helper.to_array(bias) - 100
    bias.CopyFrom(onnx.numpy_helper.from_array(value, bias.name))
    onnx.save(proto, tmp_path / 'a.onnx')
    for runtime in RUNTIMES:
        dets, labels = load(tmp_path / 'a.onnx', runtime)(tiles.numpy())
        assert (dets == np.zeros((2, 100, 5))).all()
        assert (labels == np.full((2, 100), -1)).all()


def test_seven_levels_at_any_size(randomise, tmp_path):
    """RetinaNet as on COCO, whose last level may be of one pixel, or more."""
    config = Config.fromfile(
        CONFIGS / 'fasternet/retinanet_fasternet-t0_fpn_1x_coco.py'
    )
    init_default_scope('mmdet')
    model = randomise(MODELS.build(config.model)).eval()
    model.bbox_head.retina_cls.weight.data /= 20
    model.bbox_head.retina_reg.weight.data /= 20
    export(model, tmp_path / 'a.onnx')
    session = ExportedDetector(load(tmp_path / 'a.onnx'), None)
    for shape in ((1, 3, 320, 480), (2, 3, 96, 128), (1, 3, 416, 640)):
        images = torch.from_numpy(fill_input(0, shape))
        assert min(compare(session, model, images)) > 20

    # calibrated where the last levels have a few pixels
    small = [fill_input(i, (1, 3, 256, 256)) for i in range(2)]
    onnx.save(
        quantize(onnx.load(tmp_path / 'a.onnx'), small)[0], tmp_path / 'b.onnx'
    )
    dets, labels = load(tmp_path / 'b.onnx')(images.numpy())
    assert (labels >= 0).sum() > 20


@pytest.mark.parametrize(
    'name, opset, layers',
    [
        (
            MASK_RCNN,
            17,
            (
                *('rpn_head.rpn_cls', 'rpn_head.rpn_reg'),
                *('roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg'),
            ),
        ),
        (
            'mini/rtmdet_fasternet-t0_nuclei.py',
            25,
            tuple(f'bbox_head.rtm_reg.{level}' for level in range(3)),
        ),
    ],
)
def test_other_detectors_and_opsets(name, opset, layers, randomise, tmp_path):
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(CONFIGS / name).model)
    randomise(model).eval()
    # Random ones are far too large: scores of 1 have no order, and distances
    # of 1e8 pixels, by exp, differ by more than 1e-3 from float64's anyway.
    for layer in layers:
        model.get_submodule(layer).weight.data *= 1e-2
    path = tmp_path / 'a.onnx'
    export(model, path, opset=opset)
    proto = onnx.load(path)
    assert [(o.domain, o.version) for o in proto.opset_import] == [('', opset)]
    kinds = {node.op_type for node in proto.graph.node}
    assert ('Gelu' in kinds) == ('Erf' not in kinds) == (opset >= 20)
    images = torch.from_numpy(fill_input(0, (2, 3, 128, 96)))
    for runtime in RUNTIMES:
        session = ExportedDetector(load(path, runtime), None)
        assert min(compare(session, model, images)) > 5

    if name == MASK_RCNN:
        # Two of the levels of images this small have no region.
        small = [fill_input(i, (1, 3, 64, 64)) for i in range(2)]
        onnx.save(quantize(proto, small)[0], path)
        dets, labels, masks = load(path)(images.numpy())
        assert (labels >= 0).sum() > 10 and (masks > 0.5).any()


# ---- errors


@pytest.mark.parametrize(
    'name, change, message',
    [
        (
            RETINANET,
            lambda c: c.test_cfg.nms.update(type='soft_nms'),
            'plain nms with iou_threshold, not .*soft_nms',
        ),
        (
            RETINANET,
            lambda c: c.test_cfg.update(max_per_img=-1),
            'limits detections by max_per_img',
        ),
        (
            RETINANET,
            lambda c: c.test_cfg.update(nms_pre=-1),
            'limits candidates by nms_pre',
        ),
        (
            RETINANET,
            lambda c: c.bbox_head.__setitem__(
                'loss_cls', dict(type='CrossEntropyLoss')
            ),
            'scores by sigmoid',
        ),
        (
            RETINANET,
            lambda c: c.bbox_head.update(
                type='PAAHead', reg_decoded_bbox=True
            ),
            'predicts as a BaseDenseHead does',
        ),
        (
            MASK_RCNN,
            lambda c: c.roi_head.update(
                type='DoubleHeadRoIHead', reg_roi_scale_factor=1.3
            ),
            'predicts as a StandardRoIHead does',
        ),
        (
            MASK_RCNN,
            lambda c: c.roi_head.bbox_head.update(
                loss_cls=dict(type='SeesawLoss', num_classes=1)
            ),
            'predicts boxes, and scores by softmax',
        ),
        (
            MASK_RCNN,
            lambda c: c.roi_head.bbox_roi_extractor.roi_layer.update(
                pool_mode='max'
            ),
            'averaging, aligned RoIAligns',
        ),
        (
            MASK_RCNN,
            lambda c: c.roi_head.bbox_roi_extractor.roi_layer.update(
                aligned=False
            ),
            'averaging, aligned RoIAligns',
        ),
        (
            MASK_RCNN,
            lambda c: c.roi_head.update(
                shared_head=dict(type='ResLayer', depth=18)
            ),
            'shares no head',
        ),
        (
            RETINANET,
            lambda c: c.test_cfg.pop('nms'),
            'a test_cfg with nms',
        ),
        (
            MASK_RCNN,
            lambda c: c.update(rpn_head=None),
            'a MaskRCNN that has a rpn_head',
        ),
    ],
)
def test_detectors_that_decode_otherwise(name, change, message):
    init_default_scope('mmdet')
    cfg = Config.fromfile(CONFIGS / name).model
    change(cfg)
    with pytest.raises(ValueError, match=f'{message}.* backbone alone can be'):
        EndToEnd(MODELS.build(cfg).eval())


def test_heads_of_other_kinds():
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(CONFIGS / RETINANET).model).eval()
    model.bbox_head = nn.Identity()
    with pytest.raises(ValueError, match='a Identity that derives from one'):
        EndToEnd(model)


@pytest.mark.parametrize(
    'target, message',
    [
        ('a.pt', 'neither .onnx nor .xml'),
        ('there.onnx', 'there.onnx exists'),
        ('there.xml', 'there.bin exists'),
        ('nowhere/a.onnx', 'there is no folder'),
    ],
)
def test_bad_targets(target, message, tmp_path):
    for name in ('there.onnx', 'there.bin'):
        (tmp_path / name).write_text('mine')
    with pytest.raises((OSError, ValueError), match=message):
        export(FasterNet('t0').eval(), tmp_path / target)
    assert (tmp_path / 'there.onnx').read_text() == 'mine'
    assert len(list(tmp_path.iterdir())) == 2


def test_models_that_cannot_be_exported(tmp_path):
    model = FasterNet('t0')
    with pytest.raises(ValueError, match='in train mode'):
        export(model, tmp_path / 'a.onnx')
    model.eval()
    for opset in (16, 26):
        with pytest.raises(
            ValueError, match=f'from 17 to 25 for this FasterNet, got {opset}'
        ):
            export(model, tmp_path / 'a.onnx', opset=opset)
    with pytest.raises(ValueError, match='export BaseDataPreprocessor: exp'):
        export(
            *(model, tmp_path / 'a.onnx'), preprocessor=BaseDataPreprocessor()
        )
    # fails far on, with the float file written
    images = iter([np.zeros((1, 4, 64, 64), np.float32)])
    with pytest.raises(Exception, match='Got: 4 Expected: 3'):
        export(model, tmp_path / 'a.onnx', calibration=images)
    assert not list(tmp_path.iterdir())


class Upsample(nn.Conv2d):
    """A layer with what opset 17 does not know."""

    def forward(self, x):
        x = super().forward(x)
        size = [2 * side for side in x.shape[2:]]
        return nn.functional.interpolate(
            x, size, mode='bilinear', antialias=True
        )


def test_attributes_that_opset_17_lacks(tmp_path):
    model = nn.Sequential(Upsample(3, 3, 1)).eval()
    export(model, tmp_path / 'a.onnx')
    with pytest.raises(ValueError, match='opset 17 has no antialias of Resiz'):
        export(model, tmp_path / 'b.onnx', opset=17)


class Halves(nn.Conv2d):
    """A layer that splits in a way that opset 18 spells anew."""

    def forward(self, x):
        first, second = super().forward(x).chunk(2, dim=1)
        return first - second


def test_attributes_that_opset_17_implies(tmp_path):
    model = nn.Sequential(Halves(3, 4, 1)).eval()
    export(model, tmp_path / 'a.onnx', opset=17)
    x = fill_input(0, (1, 3, 9, 7))
    (found,) = load(tmp_path / 'a.onnx')(x)
    expected = model(torch.from_numpy(x)).detach()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_opset_of_regions(tmp_path):
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(CONFIGS / MASK_RCNN).model).eval()
    with pytest.raises(ValueError, match='17 to 21 for this MaskRCNN, got 22'):
        export(model, tmp_path / 'a.onnx', opset=22)


def test_openvino_leaves_signals_be(tmp_path):
    """Sessions released in the order of their making; a child that ends."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    export(model, tmp_path / 'a.onnx')
    code = """
import faulthandler, signal, subprocess
from fasternet_det.deploy.export import load
faulthandler.enable()
signal.signal(signal.SIGCHLD, lambda *_: None)
sessions = [load('a.onnx', 'openvino') for _ in range(2)]
while sessions:
    sessions.pop(0)
subprocess.run('true')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path)
    assert done.returncode == 0


def test_unknown_runtimes(tmp_path):
    for runtime, precision in (('tensorrt', 'f32'), ('onnxruntime', 'bf16')):
        with pytest.raises(ValueError, match=f'got {runtime} in {precision}'):
            load(tmp_path / 'a.onnx', runtime, precision=precision)


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime', 'openvino'])
def test_without_a_package(package):
    code = f'import sys; sys.modules[{package!r}] = None\n'
    done = subprocess.run(
        [sys.executable, '-c', f'{code}import fasternet_det.deploy.export'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f'ImportError: export needs {package}, which' in done.stderr
    assert "pip install 'fasternet_det[deploy]'" in done.stderr
