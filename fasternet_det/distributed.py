"""Training and testing in several processes where there is no GPU."""

import os
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner


def serve_cpus() -> None:
    """Let mmengine's ``Runner`` run several processes without a GPU.

    mmengine gives each process a GPU, which fails where there is none. There,
    processes then talk by gloo, whatever backend the config names, and
    ``MMDistributedDataParallel`` leaves the model where it is. With a GPU, or
    in one process, nothing changes.
    """
    if get_device() != 'cpu':
        return
    setup_env, wrap = Runner.setup_env, MMDistributedDataParallel.__init__

    @wraps(setup_env)
    def setup_env_of_cpus(self: Runner, env_cfg: dict) -> None:
        dist_cfg = dict(env_cfg.get('dist_cfg', {}), backend='gloo')
        if self.launcher == 'slurm':  # else mmengine divides by the GPUs
            os.environ.setdefault('SLURM_LOCALID', '0')
        with patch.object(torch.cuda, 'set_device'):
            setup_env(self, dict(env_cfg, dist_cfg=dist_cfg))

    @wraps(wrap)
    def wrap_on_cpu(
        self: MMDistributedDataParallel,
        module: torch.nn.Module,
        *args: Any,
        device_ids: Any = None,
        **kwargs: Any,
    ) -> None:
        wrap(self, module, *args, **kwargs)

    Runner.setup_env = setup_env_of_cpus
    MMDistributedDataParallel.__init__ = wrap_on_cpu
