"""The FasterNet backbone."""

import re
from typing import List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmdet.registry import MODELS
from mmengine.model import BaseModule, ModuleList
from torch import Tensor

from ..checkpoint import StateDict, fasternet_from_timm, load_exactly
from .base import Backbone, parse_arch
from .recompute import is_traced, lean_mlp, recomputed


class PartialConv(nn.Module):
    """Partial convolution (PConv): 3x3 on the first ``dim // n_div`` channels.

    The other channels pass on untouched. Paper, Sec. 3.2.

    Args:
        dim (int): Number of channels C.
        n_div (int): Inverse of the partial ratio, C / C_p. Defaults to 4.
    """

    def __init__(self, dim: int, n_div: int = 4) -> None:
        super().__init__()
        self.dim_conv3 = dim // n_div
        self.dim_untouched = dim - self.dim_conv3
        self.partial_conv3 = nn.Conv2d(
            self.dim_conv3, self.dim_conv3, 3, padding=1, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix space in the first channels.

        Args:
            x (Tensor): Feature map of shape (N, C, H, W).

        Returns:
            Tensor: A new map of shape (N, C, H, W); ``x`` keeps its values.
        """
        x1, x2 = x.split((self.dim_conv3, self.dim_untouched), dim=1)
        if not is_traced(x) and x.requires_grad:
            x1 = x1.clone()  # a view would keep all of x for the backward pass
        return torch.cat((self.partial_conv3(x1), x2), dim=1)


class FasterNetBlock(BaseModule):
    """A PConv and two 1x1 convolutions inside a residual. Paper, Fig. 4.

    Args:
        dim (int): Number of channels C.
        mlp_ratio (float): Hidden channels of the 1x1 convolutions over C.
        n_div (int): Inverse of the partial ratio of the PConv.
        drop_path (float): Probability of dropping the residual branch.
        layer_scale_init_value (float): Initial scale per channel of the
            residual branch; 0 means no layer scale.
        norm_cfg (dict): Config of the norm between the 1x1 convolutions.
        act_cfg (dict): Config of the activation after that norm.
        with_cp (bool): Whether to recompute activations in the backward pass
            instead of storing them.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        n_div: int,
        drop_path: float,
        layer_scale_init_value: float,
        norm_cfg: dict,
        act_cfg: dict,
        with_cp: bool,
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        self.spatial_mixing = PartialConv(dim, n_div)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden_dim, 1, bias=False),
            build_norm_layer(norm_cfg, hidden_dim)[1],
            build_activation_layer(act_cfg),
            nn.Conv2d(hidden_dim, dim, 1, bias=False),
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.layer_scale = None
        if layer_scale_init_value:
            scale = layer_scale_init_value * torch.ones(dim)
            self.layer_scale = nn.Parameter(scale)
        self.with_cp = with_cp

    def _residual(self, x: Tensor) -> Tensor:
        out = self.spatial_mixing(x)
        # With `with_cp`, all of the block is recomputed anyway.
        out = self.mlp(out) if self.with_cp else lean_mlp(self.mlp, out)
        if self.layer_scale is not None:
            out = self.layer_scale[:, None, None] * out
        return x + self.drop_path(out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        if self.with_cp:
            return recomputed(self._residual, self, x)
        return self._residual(x)


class PatchEmbed(nn.Module):
    """Stem: a 4x4 convolution of stride 4, then a norm. Paper, Fig. 4.

    Args:
        in_channels (int): Channels of the image.
        embed_dim (int): Channels C of the first stage.
        norm_cfg (dict, optional): Config of the norm; None for no norm.
    """

    def __init__(
        self, in_channels: int, embed_dim: int, norm_cfg: Optional[dict]
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, 4, stride=4, bias=False)
        self.norm = (
            build_norm_layer(norm_cfg, embed_dim)[1]
            if norm_cfg
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, C, H // 4, W // 4)."""
        return self.norm(self.proj(x))


class PatchMerging(nn.Module):
    """Merging: a 2x2 convolution of stride 2, then a norm. Paper, Fig. 4.

    Args:
        dim (int): Input channels C.
        norm_cfg (dict): Config of the norm.
    """

    def __init__(self, dim: int, norm_cfg: dict) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 2, stride=2, bias=False)
        self.norm = build_norm_layer(norm_cfg, 2 * dim)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, 2C, H // 2, W // 2)."""
        return self.norm(self.reduction(x))


class BasicStage(BaseModule):
    """A stage: FasterNet blocks of one width, at ``blocks``.

    Args:
        dim (int): Number of channels C.
        drop_path_rates (Sequence[float]): Drop path rate of each block.
        block_cfg (dict): The other arguments of :class:`FasterNetBlock`.
    """

    def __init__(
        self, dim: int, drop_path_rates: Sequence[float], block_cfg: dict
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                FasterNetBlock(dim, drop_path=rate, **block_cfg)
                for rate in drop_path_rates
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        return self.blocks(x)


@MODELS.register_module()
class FasterNet(Backbone):
    """FasterNet backbone.

    A PyTorch implementation of `Run, Don't Walk: Chasing Higher FLOPS for
    Faster Neural Networks <https://arxiv.org/abs/2303.03667>`_ (CVPR 2023),
    with the parameter names and the outputs of the `official code
    <https://github.com/JierunChen/FasterNet>`_.

    Args:
        arch (str | dict): One of 't0', 't1', 't2', 's', 'm', 'l' (paper,
            Sec. 3.4), or a dict with ``embed_dim`` (int), ``depths`` (four
            ints) and ``act_cfg`` (dict). Defaults to 't0'.
        in_channels (int): Channels of the image. Defaults to 3.
        mlp_ratio (float): Hidden channels of the 1x1 convolutions over the
            block's. Defaults to 2.
        n_div (int): Inverse of the partial ratio of the PConv. Defaults to 4.
        patch_norm (bool): Whether the stem has a norm. Defaults to True.
        drop_path_rate (float): Drop path rate of the last block; that of the
            others falls linearly to 0 at the first. Defaults to 0.
        layer_scale_init_value (float): Initial scale of the residual
            branches; 0 means no layer scale. Defaults to 0.
        norm_cfg (dict): Config of all norms, such as ``dict(type='SyncBN')``.
            Defaults to ``dict(type='BN')``.
        act_cfg (dict, optional): Config of all activations. Defaults to None,
            the arch's own: GELU for t0 and t1, ReLU for the others.
        out_indices (Sequence[int]): Positions in ``stages`` to output, a
            rising selection of 0, 2, 4, 6; the odd positions are merging
            layers. What lies behind the last one is not run and does not
            require gradients. Select no output that the neck does not read:
            DDP would wait for its norm's gradients. Defaults to (0, 2, 4, 6).
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and
            stages 1 to k with their merging layers: parameters and BatchNorm
            statistics. The output norms, which no ImageNet file holds, stay
            trainable. Defaults to -1.
        norm_eval (bool): Whether to keep all BatchNorms in eval mode while
            training. Defaults to False.
        with_cp (bool): Whether to trade time for memory by recomputing each
            block's activations in the backward pass; values, gradients and
            BatchNorm statistics stay the same. Defaults to False.
        fork_feat (bool): True for a backbone that returns normalised feature
            maps, False for the ImageNet classifier. Defaults to True.
        num_classes (int): Classes of the classifier. Defaults to 1000.
        feature_dim (int): Its hidden channels. Defaults to 1280.
        init_cfg (dict | list[dict], optional): Initialisation, such as what
            :meth:`init_weights` says of ImageNet files. Defaults to None:
            the official truncated normal.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument, the input or a checkpoint does not fit.

    The map at position 2i of ``stages`` has shape (N, C * 2**i, H', W'),
    where H' is H // 4 halved i times with the remainders dropped; H and W are
    at least 32.

    Example:
        >>> import torch
        >>> from fasternet_det import FasterNet
        >>> maps = FasterNet('t0').eval()(torch.rand(1, 3, 224, 224))
        >>> [tuple(m.shape) for m in maps]
        [(1, 40, 56, 56), (1, 80, 28, 28), (1, 160, 14, 14), (1, 320, 7, 7)]
    """

    # (embed_dim, depths, act_cfg), paper, Sec. 3.4 and appendix
    arch_settings = {
        't0': (40, (1, 2, 8, 2), dict(type='GELU')),
        't1': (64, (1, 2, 8, 2), dict(type='GELU')),
        't2': (96, (1, 2, 8, 2), dict(type='ReLU', inplace=True)),
        's': (128, (1, 2, 13, 2), dict(type='ReLU', inplace=True)),
        'm': (144, (3, 4, 18, 3), dict(type='ReLU', inplace=True)),
        'l': (192, (3, 4, 18, 3), dict(type='ReLU', inplace=True)),
    }
    positions = stage_ends = (0, 2, 4, 6)
    layer_types = (FasterNetBlock,)
    stem_weight = 'patch_embed.proj.weight'
    classifier_keys = {'avgpool_pre_head.1.weight', 'head.weight', 'head.bias'}
    min_size = 32  # below, the last stage would have no pixel

    def __init__(
        self,
        arch: Union[str, dict] = 't0',
        in_channels: int = 3,
        mlp_ratio: float = 2.0,
        n_div: int = 4,
        patch_norm: bool = True,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: Optional[dict] = None,
        out_indices: Sequence[int] = (0, 2, 4, 6),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        fork_feat: bool = True,
        num_classes: int = 1000,
        feature_dim: int = 1280,
        init_cfg: Union[dict, List[dict], None] = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_indices,
            frozen_stages,
            norm_eval,
            fork_feat,
            init_cfg
            or dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02),
        )
        embed_dim, depths, arch_act_cfg = parse_arch(
            arch, self.arch_settings, ('embed_dim', 'depths', 'act_cfg')
        )
        act_cfg = act_cfg or arch_act_cfg
        if len(depths) != 4 or min(*depths, embed_dim) < 1:
            raise ValueError(
                f'arch={arch!r} needs a positive embed_dim and four positive '
                'depths'
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(
                f'drop_path_rate={drop_path_rate!r} is not in [0, 1)'
            )
        if not 1 <= n_div <= embed_dim:
            raise ValueError(
                f'n_div={n_div!r} is not in 1 to {embed_dim}, the channels '
                'of the first stage'
            )

        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.patch_embed = PatchEmbed(
            in_channels, embed_dim, norm_cfg if patch_norm else None
        )
        block_cfg = dict(
            mlp_ratio=mlp_ratio,
            n_div=n_div,
            layer_scale_init_value=layer_scale_init_value,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            with_cp=with_cp,
        )
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths)):
            if i > 0:
                self.stages.append(PatchMerging(dims[i - 1], norm_cfg))
            drop_path_rates = [next(rates) for _ in range(depth)]
            self.stages.append(BasicStage(dim, drop_path_rates, block_cfg))

        if fork_feat:
            #: Channels of the outputs, what a neck takes as ``in_channels``.
            self.out_channels = [dims[i // 2] for i in self.out_indices]
            for i, dim in zip(self.out_indices, self.out_channels):
                self.add_module(f'norm{i}', build_norm_layer(norm_cfg, dim)[1])
        else:
            self.avgpool_pre_head = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(dims[-1], feature_dim, 1, bias=False),
                build_activation_layer(act_cfg),
            )
            self.head = nn.Linear(feature_dim, num_classes)

        self._freeze()

    def _forward(self, x: Tensor) -> Union[Tuple[Tensor, ...], Tensor]:
        x = self.patch_embed(x)  # (N, C, H // 4, W // 4)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.fork_feat and i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x))
                if i == self.out_indices[-1]:
                    return tuple(outs)
        return self.head(self.avgpool_pre_head(x).flatten(1))

    def _stem(self) -> List[nn.Module]:
        return [self.patch_embed]

    def _stages(self) -> List[nn.Module]:
        return list(self.stages)

    def load_pretrained(self, state_dict: StateDict, source: str) -> None:
        """Load as the base does, by timm's names too. The output norms may be
        missing, and those of other outputs left over.
        """
        state_dict = fasternet_from_timm(state_dict)
        arch, in_channels = self.find_arch(state_dict)
        norms = [
            {k for k in self.state_dict() if k.startswith(f'norm{i}.')}
            for i in self.out_indices
        ]
        others = {k for k in state_dict if re.match(r'norm[0246]\.', k)}
        load_exactly(
            self,
            state_dict,
            optional=norms,
            spare=self.classifier_keys | others if self.fork_feat else set(),
            source=f'{source} ({arch}, {in_channels} input channels)',
        )

    @classmethod
    def find_arch(cls, state_dict: StateDict) -> Tuple[str, int]:
        """Find out which FasterNet a state dict holds, by its stem and blocks.

        Args:
            state_dict (dict[str, Tensor]): Tensors by the original's names.

        Returns:
            tuple[str, int]: A key of ``arch_settings``, or what describes
            another model; and the number of input channels, 0 without a stem.
        """
        stem = state_dict.get(cls.stem_weight)
        if stem is None or stem.dim() != 4:
            return 'not a FasterNet', 0
        embed_dim, in_channels = stem.shape[:2]
        blocks = {k.split('.mlp.')[0] for k in state_dict if '.mlp.' in k}
        depths = tuple(
            sum(block.startswith(f'stages.{i}.') for block in blocks)
            for i in (0, 2, 4, 6)
        )
        for arch, settings in cls.arch_settings.items():
            if settings[:2] == (embed_dim, depths):
                return arch, in_channels
        return f'embed_dim {embed_dim}, depths {depths}', in_channels
