"""What mmcv's compiled ops make of a real image, for `test_install_mmcv.py`.

Run as a script, it prints ``mmcv_ops.json``, as an mmcv gives it that was
installed by `pip install --no-build-isolation --no-cache-dir mmcv==2.1.0`.
"""

import json
from pathlib import Path

import cv2
import torch
from fill import sample
from mmcv import ops

ROOT = Path(__file__).parents[2]


def noise(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator)


def run():
    """Call the ops; return their results by name."""
    path = ROOT / 'fasternet_det' / 'datasets' / 'nuclei_data' / 'image.png'
    picture = torch.from_numpy(cv2.imread(str(path))[:64, :80])
    x = picture.permute(2, 0, 1)[None].float().div(255).contiguous()
    x.requires_grad_()
    corner, size = 40 * noise(40, 2), 4 + 20 * noise(41, 2)[:40]
    boxes, scores = torch.cat((corner, corner + size), 1), noise(40)
    rotated = torch.cat((corner, size, 3 * noise(40, 1)), 1)
    rois = torch.cat((torch.zeros(40, 1), boxes), 1)
    offset = 4 * noise(1, 18, 64, 80) - 2
    weight = noise(5, 3, 3, 3).requires_grad_()
    results = dict(
        nms=ops.nms(boxes, scores, 0.3)[1],
        soft_nms=ops.soft_nms(boxes, scores, 0.3)[0],
        batched_nms=ops.batched_nms(
            boxes, scores, (9 * scores).long() % 2, dict(iou_threshold=0.3)
        )[1],
        nms_rotated=ops.nms_rotated(rotated, scores, 0.3)[1],
        box_iou_rotated=ops.box_iou_rotated(rotated, rotated.flip(0)),
        roi_align=ops.roi_align(x, rois, (7, 7), 0.5, 0, 'avg', True),
        roi_align_max=ops.roi_align(x, rois, (7, 7), 0.5, 2, 'max', True),
        roi_align_rotated=ops.roi_align_rotated(
            x, torch.cat((rois[:, :1], rotated), 1), (7, 7), 0.5, 2
        ),
        deform_conv2d=ops.deform_conv2d(x, offset, weight, 1, 1),
        modulated_deform_conv2d=ops.modulated_deform_conv2d(
            x, offset, noise(1, 9, 64, 80), weight, None, 1, 1
        ),
        points_in_boxes=ops.points_in_boxes_cpu(
            noise(1, 50, 3), torch.tensor([[[0.5, 0.5, 0, 0.6, 0.7, 1, 0.3]]])
        ),
        voxels=ops.Voxelization([0.1] * 3, [0, 0, 0, 1, 1, 1], 3, 99)(
            noise(50, 4)
        )[0],
    )
    for name in list(results):
        if results[name].requires_grad:
            inputs = (x, weight) if 'conv' in name else (x,)
            loss = results[name].square().sum()
            gradients = torch.autograd.grad(loss, inputs)
            results[f'gradients of {name}'] = torch.cat(
                [gradient.flatten() for gradient in gradients]
            )
    return {name: sample(value.detach().numpy()) for name, value in results.items()}


if __name__ == '__main__':
    print(json.dumps(run(), indent=1))
