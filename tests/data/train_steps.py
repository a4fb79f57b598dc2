"""Train configs a step where mmsegmentation and its like can be imported.

    python train_steps.py CONFIG...

prints, as a list of JSON, what the tests look at. A script, since the
tests' environment has none of these packages: see the fixture `openmmlab`.
"""

import json
import sys

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData


def segmentor(model):
    """A step on two images, and the sides of what is found in a third."""
    from mmseg.structures import SegDataSample

    classes = model.decode_head.num_classes
    samples = [
        SegDataSample(
            gt_sem_seg=PixelData(data=torch.randint(classes, (1, 32, 64)))
        )
        for _ in range(2)
    ]
    losses = model.loss(torch.rand(2, 3, 32, 64), samples)
    model.parse_losses(losses)[0].backward()
    reader = model.neck if model.with_neck else model.decode_head
    heads = [model.decode_head]
    if model.with_auxiliary_head:
        heads.append(model.auxiliary_head)
    with torch.no_grad():
        (found,) = model.eval().predict(torch.rand(1, 3, 77, 84))
    return dict(
        out_channels=model.backbone.out_channels,
        in_channels=reader.in_channels,
        classes=[head.num_classes for head in heads],
        found=list(found.pred_sem_seg.shape),
    )


def classifier(model):
    """The loss of two mixed images, by mmpretrain and by the formula."""
    from mmpretrain.structures import DataSample

    images = torch.rand(2, 3, 64, 96)
    scores = torch.zeros(2, 1000)
    scores[0, 3], scores[0, 5], scores[1, 7] = 0.3, 0.7, 1.0
    samples = [DataSample().set_gt_score(score) for score in scores]
    loss = model.loss(images, samples)['loss']
    loss.backward()
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='LearningRateDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    )
    model.eval()
    with torch.no_grad():
        logits = model(images)
        (found, _) = model.predict(images)
        # The original's: SoftTargetCrossEntropy of timm's smoothed labels.
        smoothed = 0.9 * scores + 0.1 / 1000
        expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
        return dict(
            logits_are_the_backbones=logits.equal(model.backbone(images)),
            found=found.pred_score.allclose(logits[0].softmax(0)),
            loss=model.loss(images, samples)['loss'].item(),
            expected=expected.item(),
            rates={
                group['param_name']: group['lr']
                for group in wrapper.optimizer.param_groups
            },
            keys=list(model.state_dict()),
        )


def rotated_detector(model):
    """Losses of some steps on one rotated box, and the boxes found then."""
    from mmdet.structures import DetDataSample
    from mmrotate.structures.bbox import RotatedBoxes

    shape = dict(img_shape=(128, 128), ori_shape=(128, 128), img_id=0)
    sample = DetDataSample(metainfo=dict(shape, scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(
        bboxes=RotatedBoxes([[64.0, 64.0, 40.0, 20.0, 0.5]]),
        labels=torch.tensor([0]),
    )
    sample.ignored_instances = InstanceData(
        bboxes=RotatedBoxes(torch.zeros(0, 5)), labels=torch.zeros(0).long()
    )
    image = torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    data = dict(inputs=[image] * 2, data_samples=[sample] * 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    losses = []
    for _ in range(4):
        inputs = model.data_preprocessor(data, True)
        loss, _ = model.parse_losses(model(**inputs, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.bbox_head.test_cfg.score_thr = 0.0
    with torch.no_grad():
        found, _ = model.eval().test_step(data)
    return dict(losses=losses, boxes=found.pred_instances.bboxes.tolist())


STEPS = dict(mmseg=segmentor, mmpretrain=classifier, mmrotate=rotated_detector)


def run(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    if not cfg.model.backbone.get('init_cfg'):  # else it would download
        model.init_weights()
    result = STEPS[cfg.default_scope](model.train())
    return result | dict(
        type=type(model.backbone).__module__,
        cfg=cfg.to_dict(),
        without_gradient=[
            name for name, p in model.named_parameters() if p.grad is None
        ],
        parameters=sum(p.numel() for p in model.parameters()),
    )


if __name__ == '__main__':
    print(json.dumps([run(path) for path in sys.argv[1:]]))
