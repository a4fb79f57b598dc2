"""What the backbones of this package share."""

from typing import Dict, List, Sequence, Union

import torch.nn as nn
from mmengine.model import BaseModule
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import find_pretrained, read_state_dict


class Backbone(BaseModule):
    """A backbone that freezes stages and accounts for every pretrained key.

    Args:
        frozen_stages (int): See :meth:`frozen_modules`; checked here.
        norm_eval (bool): Whether to keep all BatchNorms in eval mode.
        init_cfg (dict | list[dict]): Initialisation.

    Raises:
        ValueError: If there are no such stages.
    """

    #: Settings of the named archs.
    arch_settings: Dict[str, tuple]
    #: Names of the classifier's parameters, which a backbone lacks.
    classifier_keys: set
    num_stages = 4

    def __init__(
        self,
        frozen_stages: int,
        norm_eval: bool,
        init_cfg: Union[dict, List[dict]],
    ) -> None:
        super().__init__(init_cfg)
        if frozen_stages not in range(-1, self.num_stages + 1):
            raise ValueError(
                f'frozen_stages={frozen_stages!r} is not one of -1 (none), 0 '
                f'(the stem), 1 to {self.num_stages} (the stem and that many '
                'stages)'
            )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    @classmethod
    def settings_of(cls, arch: Union[str, dict], keys: Sequence[str]) -> tuple:
        """Look up a named arch, or take a dict's values.

        Args:
            arch (str | dict): A key of ``arch_settings``, or a dict.
            keys (Sequence[str]): All keys that a dict must have.

        Returns:
            tuple: The settings, in the order of the keys.

        Raises:
            ValueError: If it is neither.
        """
        if isinstance(arch, str) and arch in cls.arch_settings:
            return cls.arch_settings[arch]
        if not isinstance(arch, dict) or arch.keys() != set(keys):
            names = ', '.join(map(repr, cls.arch_settings))
            raise ValueError(
                f'arch={arch!r} is neither one of {names} nor a dict of just '
                f'{", ".join(keys)}'
            )
        return tuple(arch[key] for key in keys)

    def frozen_modules(self) -> List[nn.Module]:
        """List what ``frozen_stages`` names: of -1 nothing, of 0 the stem, of
        k the stem and stages 1 to k.
        """
        raise NotImplementedError

    def load_pretrained(
        self, state_dict: Dict[str, Tensor], source: str
    ) -> None:
        """Load a state dict of which every key is accounted for.

        Args:
            state_dict (dict[str, Tensor]): Tensors by name.
            source (str): Where it is from, for messages.

        Raises:
            ValueError: If it does not fit; the model is then untouched.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> 'Backbone':
        """Set the mode, keeping frozen stages, and all BatchNorms under
        ``norm_eval``, in eval mode.

        Args:
            mode (bool): Whether to train. Defaults to True.

        Returns:
            Backbone: The module itself.
        """
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says.

        Raises:
            ValueError: If a ``Pretrained`` checkpoint cannot be read safely
                or does not fit; the model is then untouched.
            FileNotFoundError: If there is no such checkpoint.
        """
        pretrained = find_pretrained(self.init_cfg)
        if pretrained is None:
            super().init_weights()
            return
        checkpoint = pretrained['checkpoint']
        self.load_pretrained(
            read_state_dict(checkpoint, pretrained.get('prefix')), checkpoint
        )
        self._is_init = True
