import functools
import http.server
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from fill import fill_array
from mmengine.logging import MMLogger
from mmengine.utils import digit_version, get_installed_path
from torch.nn.modules.batchnorm import _BatchNorm

import fasternet_det
from fasternet_det.deploy.versions import MINIMUM_TORCH

ROOT = Path(__file__).parents[1]
DATA = ROOT / 'tests' / 'data'
IS_OLD = digit_version(torch.__version__) < digit_version(MINIMUM_TORCH)
CONSTRAINTS = (ROOT / 'constraints.txt').read_text()
PINNED_TORCH = re.search(r'^torch==(.*)$', CONSTRAINTS, re.M)[1]
IS_PINNED = torch.__version__.split('+')[0] == PINNED_TORCH
collect_ignore = [
    f'test_deploy/test_{name}.py'
    for name in (
        *('batches', 'decode', 'export', 'fuse', 'hook', 'large_maps'),
        *('optimize', 'precision', 'quantize'),
    )
] + [
    f'test_tools/test_{name}.py'
    for name in (
        *('benchmark', 'compatibility', 'export_tool', 'memory', 'predict'),
    )
]
if not IS_OLD:
    collect_ignore = []


def pytest_report_header(config):
    return [f'not run on this torch: {path}' for path in collect_ignore]


def pytest_configure(config):
    for marker in (
        f'deploy: needs torch {MINIMUM_TORCH} or later',
        f'torchvision: needs torch {PINNED_TORCH}',
        'gpu: needs a GPU',
    ):
        config.addinivalue_line('markers', marker)


def pytest_runtest_setup(item):
    if item.get_closest_marker('deploy') and IS_OLD:
        pytest.skip(f'deploy needs torch {MINIMUM_TORCH}')
    if item.get_closest_marker('gpu') and not torch.cuda.is_available():
        pytest.skip('there is no GPU')
    if item.get_closest_marker('torchvision') and not IS_PINNED:
        pytest.skip(f'the torchvision at hand is for torch {PINNED_TORCH}')


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Let ``optimize`` take bfloat16 on every CPU.

    One without instructions for it computes by torch's plain operators: that
    is slow, but rounds as much.
    """
    if not IS_OLD:
        # The package's attribute of that name is the function.
        optimize = sys.modules['fasternet_det.deploy.optimize']
        dtypes = {torch.float32, torch.bfloat16, torch.int8}
        monkeypatch.setattr(optimize, 'kernel_dtypes', lambda: dtypes)


@pytest.fixture
def log():
    """What mmengine's log has said since."""
    records = []
    handler = logging.Handler(logging.INFO)
    handler.emit = records.append
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lambda: [record.getMessage() for record in records]
    logger.removeHandler(handler)


@pytest.fixture(scope='session')
def golden():
    """The original's names, shapes and outputs by arch."""
    return json.loads((DATA / 'fasternet.json').read_text())


@pytest.fixture(scope='session')
def timm_keys():
    """timm's names and shapes by arch."""
    return json.loads((DATA / 'timm_keys.json').read_text())


@pytest.fixture(scope='session')
def filled():
    """Make the reference weights of given names and shapes."""

    def fill(shapes):
        return {
            name: torch.from_numpy(np.asarray(fill_array(name, tuple(shape))))
            for name, shape in shapes.items()
        }

    return fill


@pytest.fixture(scope='session')
def imagenet(golden, filled):
    """Make an original ImageNet state dict: classifier, no output norms."""

    def make(arch):
        shapes = {
            k: v
            for k, v in golden[arch]['backbone_state_dict'].items()
            if not k.startswith('norm')
        }
        return filled(shapes | golden[arch]['classifier_only_keys'])

    return make


@pytest.fixture
def randomise(filled):
    """Randomise all parameters and BatchNorm statistics of a module."""

    def fill(module):
        shapes = {k: v.shape for k, v in module.state_dict().items()}
        module.load_state_dict(filled(shapes))
        return module

    return fill


@pytest.fixture
def tamed(randomise):
    """Randomise a module, with scales that keep its outputs near 1."""

    def fill(module):
        randomise(module).eval()
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.weight.data[::2].neg_()
            if isinstance(layer, fasternet_det.ConvAWS2d):
                fan_in = layer.weight[0].numel()
                layer.weight_gamma.copy_(layer.weight_gamma.abs() + 0.5)
                layer.weight_gamma /= fan_in**0.5
                layer.weight_beta /= fan_in
            if isinstance(layer, fasternet_det.SAConv):
                # in a deep net, products explode
                for side in (layer.switch, layer.post_context):
                    side.weight.data *= 0.02
        return module

    return fill


@pytest.fixture(
    params=['GGhostRegNet', 'GhostNet', 'SPConv', 'TShapedConv', 'SAConv']
)
def relative(request, tamed):
    """A small backbone of each kind but FasterNet's."""
    if request.param == 'GGhostRegNet':
        arch = dict(depths=(2, 3, 4, 2), widths=(8, 16, 24, 32), group_width=8)
        return tamed(fasternet_det.GGhostRegNet(arch))
    if request.param == 'GhostNet':
        return tamed(fasternet_det.GhostNet(0.25))
    return tamed(
        fasternet_det.SlotResNet(
            depth=18,
            base_channels=16,
            dcn=dict(type=request.param),
            stage_with_dcn=(False, True, True, True),
        )
    )


@pytest.fixture(scope='session')
def registry(tmp_path_factory):
    """Skip where pip reaches no package index."""
    folder = tmp_path_factory.mktemp('registry')
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'pip', '-q', 'download', '--no-deps'),
            *('--dest', folder, 'colorama==0.4.6'),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f'pip reaches no package index: {done.stderr[-500:]}')


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    """A folder with our wheel installed, made by way of an sdist."""
    source = tmp_path_factory.mktemp('source') / 'fasternet_det'
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns('.*', 'build', 'data', 'work_dirs'),
    )
    wheels = tmp_path_factory.mktemp('wheels')
    subprocess.run(
        [
            *(sys.executable, '-c'),
            'import sys; from setuptools import build_meta;'
            'build_meta.build_sdist(sys.argv[1])',
            wheels,
        ],
        cwd=source,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (sdist,) = wheels.iterdir()
    address = dict(FASTERNET_DET_URL='https://example.org/fasternet_det')
    pip = [sys.executable, '-m', 'pip', '-q', '--no-input']
    options = ['--no-deps', '--no-build-isolation']
    subprocess.run(
        [*pip, 'wheel', *options, '-w', wheels, sdist],
        env=os.environ | address,
        check=True,
    )
    (wheel,) = wheels.glob('*.whl')
    target = tmp_path_factory.mktemp('site')
    subprocess.run(
        [*pip, 'install', *options, '--target', target, wheel], check=True
    )
    return target


@pytest.fixture(scope='session')
def project(site, tmp_path_factory):
    """Run Python in a user's folder, with our wheel installed."""
    folder = tmp_path_factory.mktemp('project')
    environment = dict(os.environ, PYTHONPATH=str(site))

    def run(*args):
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    run.folder = folder
    run.tools = Path(get_installed_path('mmdet'), '.mim', 'tools')
    run.configs = site / 'fasternet_det' / '.mim' / 'configs'
    where = run('-c', 'import fasternet_det; print(fasternet_det.__file__)')
    assert where.strip() == str(site / 'fasternet_det' / '__init__.py')
    run('-m', 'fasternet_det.datasets.nuclei', 'data/nuclei')
    return run


@pytest.fixture(scope='session')
def openmmlab(tmp_path_factory):
    """Run Python in a folder like a clone, with OpenMMLab's other packages.

    ``make env`` puts them, and torchvision, beside the environment.
    """
    beside = {name: Path(sys.prefix, name) for name in ('openmmlab', 'timm')}
    folder = tmp_path_factory.mktemp('openmmlab')
    for name in ('configs', 'tools'):
        (folder / name).symlink_to(ROOT / name)

    def run(*args, torchvision=False, **environment):
        wanted = ['openmmlab'] + ['timm'] * torchvision
        for name in wanted:
            assert beside[name].is_dir(), f'no {beside[name]}: run `make env`'
        path = ':'.join(map(str, (ROOT, *(beside[name] for name in wanted))))
        is_script = args[0] != '-m'
        driver = [DATA / 'with_torchvision.py'] * (torchvision and is_script)
        done = subprocess.run(
            [sys.executable, *driver, *map(str, args)],
            cwd=folder,
            env=dict(os.environ, PYTHONPATH=path, **environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stdout

    run.folder = folder
    return run


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve ``tmp_path/www`` over http; count the requests."""
    (tmp_path / 'www').mkdir()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    httpd = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0),
        functools.partial(Handler, directory=tmp_path / 'www'),
    )
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}', requests
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(scope='session')
def config(project):
    """The mini RetinaNet's config, as installed."""
    return project.configs / 'mini' / 'retinanet_fasternet-t0_fpn_nuclei.py'


@pytest.fixture(scope='session')
def trained(project, config, tmp_path_factory):
    """Train RetinaNet with mmdet's train.py; return the work directory.

    The workers of a run share it.
    """
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    work_dir = folder / 'trained' / config.stem
    with FileLock(f'{folder / "trained"}.lock'):
        if not (work_dir / 'iter_40.pth').exists():
            project(
                *(project.tools / 'train.py', config),
                *('--work-dir', work_dir, '--cfg-options'),
                *('train_cfg.max_iters=40', 'train_cfg.val_interval=40'),
                'param_scheduler.1.end=40',
            )
    return work_dir
