"""What the README and the guides tell a stranger to do, done."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config

import fasternet_det
from fasternet_det.__main__ import COMMANDS as TOOLS
from fasternet_det.checkpoint import is_timm_fasternet, read_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
DOCS = sorted(ROOT.glob('docs/*.md'))
# These record what was run, in hours and in other environments; the last two
# have tests of their own.
RECORDS = (
    *('benchmark', 'compatibility', 'versions'),
    *('other-tasks', 'distributed'),
)
GUIDES = README + '\n'.join(
    page.read_text() for page in DOCS if page.stem not in RECORDS
)
COMMANDS = [
    line
    for block in re.findall(r'```bash\n(.*?)```', GUIDES, re.S)
    for line in block.splitlines()
]
BFLOAT16 = '_bf16' in Path('/proc/cpuinfo').read_text()
# Appended to my_config.py.
SMALLER_IMAGES = """
for loader, pipeline, place in (
    (train_dataloader, _base_.train_pipeline, 2),
    (val_dataloader, _base_.test_pipeline, 1),
):
    pipeline[place]['scale'] = (160, 160)
    loader['dataset']['pipeline'] = pipeline
del loader, pipeline, place
"""


def sh(command, cwd, site=None):
    """Run a command, with ``.venv`` active, or with what ``site`` holds."""
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    environment = dict(os.environ, PATH=path)
    if site:
        environment.update(PATH=f'{site}/bin:{path}', PYTHONPATH=str(site))
    done = subprocess.run(
        command,
        shell=True,
        text=True,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope='module')
def reader(project, site, imagenet):
    """Run commands in a reader's folder, with the package installed.

    It holds the files that the guides show, and ImageNet's.
    """
    folder = project.folder
    for name in ('my_config', 'my_fast_config', 'run_onnx'):
        (code,) = re.findall(
            rf'```python\n(# {name}.py\n.*?)```', GUIDES, re.S
        )
        (folder / f'{name}.py').write_text(code)
    path = folder / 'my_config.py'
    code, replaced = re.subn(
        r"'https://.*/fasternet_s-.*'", "'fasternet_s.pth'", path.read_text()
    )
    assert replaced == 1
    path.write_text(code + SMALLER_IMAGES)
    for arch in ('s', 't0'):
        torch.save(imagenet(arch), folder / f'fasternet_{arch}.pth')

    def run(command):
        return sh(command, folder, site)

    run.folder = folder
    return run


def run_demo(command, reader, tmp_path):
    """Shortened to 20 iterations of two images."""
    # else it would make .venv anew, by the Python of this environment
    version = re.sub(r'^\.venv(-torch)?', '', Path(sys.prefix).name)
    said = sh(
        f'{command} TORCH={version} WORK_DIR="{tmp_path}" '
        'OPTIONS="--cfg-options train_cfg.max_iters=20 '
        'param_scheduler.1.end=20 train_dataloader.batch_size=2"',
        ROOT,
    )
    trained, tested = (
        re.search(rf'│ {tool}.py *│(.*)│', said)[1]
        for tool in ('train', 'test')
    )
    assert trained == tested
    assert 0 < float(trained.split('│')[0]) < 1
    for name in ('curves.png', 'pictures/x384_y000.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
    assert len(list((tmp_path / 'pictures').iterdir())) == 4


def run_tests(command, reader, tmp_path):
    """It runs this, so what it would run is looked at."""
    said = sh(f'{command} --dry-run', ROOT)
    assert 'ruff check .' in said and '-m pytest' in said
    assert (ROOT / '.ci' / 'run').read_text().splitlines()[-1] == command


def run_install(command, reader, tmp_path):
    """With all of it installed, torch above all, pip adds but us."""
    said = sh(f'python -m {command} --dry-run', ROOT)
    added = re.findall(r'Would install (.*)', said)
    assert added in ([], [f'fasternet_det-{fasternet_det.__version__}'])


def run_install_mmcv(command, reader, tmp_path):
    """It has made the environment of these tests."""
    assert 'its ops fit this torch' in sh(command, ROOT)


def run_data(command, reader, tmp_path):
    reader(command)
    root = reader.folder / command.split()[-1]
    assert len(list((root / 'train').iterdir())) == 35


def run_train(command, reader, tmp_path):
    """One epoch, which mends what there is to mend in weights made up."""
    said = reader(
        f'{command} --cfg-options train_cfg.max_epochs=1 randomness.seed=0 '
        'param_scheduler.0.end=5 default_hooks.logger.interval=3 '
        'model.test_cfg.score_thr=0'  # after one epoch, all are low
    )
    assert '168 of 183 entries of FasterNet come from' in said
    work_dir = reader.folder / 'work_dirs' / 'my_config'
    saved = read_checkpoint(work_dir / 'epoch_1.pth')
    assert saved['meta']['dataset_meta']['classes'] == ('nucleus',)
    trained = saved['state_dict']
    assert trained['bbox_head.retina_cls.weight'].shape[0] == 9  # one class
    key = 'stages.4.blocks.12.mlp.0.weight'
    weights = read_checkpoint(reader.folder / 'fasternet_s.pth')[key]
    drift = trained[f'backbone.{key}'] - weights
    assert 0 < drift.abs().mean() < 0.5 * weights.abs().mean()

    path = max(work_dir.glob('*/vis_data/scalars.json'))
    *steps, evaluated = map(json.loads, path.read_text().splitlines())
    losses = [step['loss'] for step in steps]
    assert losses[-1] < 0.9 * losses[0], losses
    assert 0 <= evaluated['coco/bbox_mAP'] <= 1
    # the guides' is of all twelve
    (work_dir / 'epoch_1.pth').rename(work_dir / 'epoch_12.pth')


def run_test(command, reader, tmp_path):
    if not BFLOAT16:
        path = reader.folder / 'my_fast_config.py'
        path.write_text(path.read_text().replace('bfloat16', 'float32'))
    assert re.search(r'coco/bbox_mAP: [\d.]+ ', reader(command))


def run_export(command, reader, tmp_path):
    from fasternet_det.deploy.export import load

    said = reader(command)
    name, size = re.search(r'^(\S+): ([\d.]+) MB', said, re.M).groups()
    int8, openvino = '--int8' in command, 'openvino' in command
    ending = '_int8' * int8 + ('.xml' if openvino else '.onnx')
    assert name == 'my_config' + ending
    low, high = (35, 60) if int8 else (150, 170)
    assert low < float(size) < high  # of 40.2 million parameters
    for scored in ('PyTorch', 'INT8', name) * ('--max-drop' in command):
        assert re.search(rf'^{scored}: coco/bbox_mAP \d', said, re.M)
    session = load(
        reader.folder / name, 'openvino' if openvino else 'onnxruntime'
    )
    if openvino:
        from openvino import Core

        read = Core().read_model(reader.folder / name)
        notes = read.get_rt_info(['model_info', 'classes'])
        assert notes.value == '["nucleus"]'
    for height, width in ((128, 128), (256, 320)):
        images = np.random.rand(1, 3, height, width)
        dtype = np.uint8 if '--pixels' in command else np.float32
        dets, labels = session((images * 255).astype(dtype))
        assert dets.shape == (1, 100, 5) and labels.shape == (1, 100)


def run_predict(command, reader, tmp_path):
    said = reader(command)
    folder = reader.folder / command.split()[-1]
    results = json.loads((folder / 'results.json').read_text())
    assert f'{len(results)} detections in 4 images' in said
    assert len(list(folder.glob('*.png'))) == 4


def run_onnx(command, reader, tmp_path):
    """It finds what mmdet finds."""
    code = (reader.folder / 'run_onnx.py').read_text()
    assert len(code.splitlines()) <= 20
    # after one epoch, all scores are low
    shown = code.replace('score > 0.3', 'label >= 0')
    assert shown != code
    (reader.folder / 'run_onnx.py').write_text(shown)
    model, image = command.split()[-2:]
    found = [line.split() for line in reader(command).splitlines()]
    detector = init_detector(
        str(reader.folder / 'my_config.py'),
        str(reader.folder / 'work_dirs/my_config/epoch_12.pth'),
        device='cpu',
    )
    expected = inference_detector(detector, str(reader.folder / image))
    expected = expected.pred_instances
    assert len(found) == len(expected) > 0
    for (name, score, *box), b, s in zip(
        found, expected.bboxes.tolist(), expected.scores
    ):
        assert name == 'nucleus' and score == f'{s:.2f}'
        assert list(map(float, box)) == pytest.approx(b, abs=1e-2)


def run_convert(command, reader, tmp_path):
    reader(command)
    converted = read_checkpoint(reader.folder / command.split()[3])
    assert is_timm_fasternet(converted)


def run_copy(command, reader, tmp_path):
    reader(command)
    name = 'mask-rcnn_fasternet-s_fpn_1x_coco.py'
    copied, ours = (
        Config.fromfile(folder / 'fasternet' / name).to_dict()
        for folder in (reader.folder, ROOT / 'configs')
    )
    assert copied == ours


def run_flops(command, reader, tmp_path):
    """Of Mask R-CNN, what the configs' page prints."""
    said = reader(command)
    page = (ROOT / 'configs' / 'fasternet' / 'README.md').read_text()
    printed = re.findall(r'\[Mask R-CNN, [SML]\]\(.*?\) \| ([\d.]+) \|', page)
    assert len(printed) == 3
    assert all(f' {params} ' in said for params in printed)


def run_elsewhere(command, reader, tmp_path):
    """These take hours; a test of their own runs them on less."""
    tool = command.split()[1]
    test = (ROOT / 'tests' / 'test_tools' / f'test_{tool}.py').read_text()
    assert (ROOT / 'tools' / TOOLS[tool]).is_file()
    call = dict(
        benchmark=r"run\(\s*monkeypatch,\s*'goals'",
        compare=r"compare\.run\(\s*'out'",
    )[tool]
    assert re.search(call, test), f'no test of {tool} runs {command}'


def run_on_gpu(command, reader, tmp_path):
    """A test of its own runs it, also small and without a GPU."""
    test = (ROOT / 'tests' / 'test_gpu.py').read_text()
    assert command.split()[2] == '--out' and (ROOT / 'tools/gpu.py').is_file()
    assert "gpu.main(['--device', device, '--out'" in test


def run_download(command, reader, tmp_path):
    """A test of their own runs them, where there is a network."""
    name = command.split()[2].rpartition('.')[2]
    test = (ROOT / 'tests/test_datasets/test_packages.py').read_text()
    assert re.search(rf'import .*\b{name}\b', test)


RUNNERS = {
    'make demo': run_demo,
    'make test': run_tests,
    'pip install': run_install,
    'python tools/install_mmcv.py': run_install_mmcv,
    'python -m fasternet_det.datasets.nuclei': run_data,
    'python -m fasternet_det.datasets.craters': run_download,
    'python -m fasternet_det.datasets.hela': run_download,
    'fasternet-det train': run_train,
    'fasternet-det export': run_export,
    'fasternet-det predict': run_predict,
    'cp -r "$(fasternet-det configs)/': run_copy,
    'fasternet-det flops': run_flops,
    'python run_onnx.py': run_onnx,
    'fasternet-det test': run_test,
    'fasternet-det benchmark': run_elsewhere,
    'fasternet-det compare': run_elsewhere,
    'fasternet-det convert': run_convert,
    'python tools/gpu.py': run_on_gpu,
}


@pytest.mark.parametrize(
    'command',
    [
        pytest.param(command, marks=[pytest.mark.deploy] * needs_deploy)
        for command in COMMANDS
        for needs_deploy in [
            bool(
                re.search(
                    r'\[deploy\]|my_fast_config|export|predict|onnx',
                    command,
                )
            )
        ]
    ],
)
def test_command(command, reader, tmp_path):
    """In the order of the pages: some read what an earlier one wrote."""
    runners = [RUNNERS[k] for k in RUNNERS if command.startswith(k)]
    assert len(runners) == 1, f'no test runs {command}'
    runners[0](command, reader, tmp_path)


def test_all_runners_have_a_command():
    for start in RUNNERS:
        assert any(command.startswith(start) for command in COMMANDS), start


@pytest.mark.deploy
def test_snippet_of_the_fast_form(tamed):
    (code,) = re.findall(
        r'```python\n(import torch\n.*? optimize\n.*?)```', README, re.S
    )
    model = tamed(fasternet_det.FasterNet())
    names = dict(model=model)
    exec(code, names)
    images = torch.rand(1, 3, 64, 64)
    for fast, plain in zip(names['model'](images), model(images)):
        error = (fast - plain).abs().max() / plain.abs().max()
        assert 1e-5 < error < 0.05  # of bfloat16


def test_snippet_of_options():
    (code,) = re.findall(r'```python\n(backbone = dict\(.*?)```', GUIDES, re.S)
    names = {}
    exec(code, names)
    backbone = MODELS.build(names['backbone']).train()
    frozen = {
        '.'.join(name.split('.')[:2])
        for name, parameter in backbone.named_parameters()
        if not parameter.requires_grad
    }
    assert frozen == {
        *('patch_embed.proj', 'patch_embed.norm', 'stages.0'),
    }
    assert not any(
        module.training
        for module in backbone.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    )
    assert backbone.stages[0].blocks[0].with_cp


def test_a_newcomer_finds_every_guide():
    """In one click, on a page that greets."""
    assert len(README.splitlines()) < 200
    for page in (*DOCS, ROOT / 'docs' / 'tutorial.ipynb'):
        assert f'](docs/{page.name})' in README, page


@pytest.mark.parametrize(
    'missing, named',
    [
        (('mmdet', 'mmcv'), 'fasternet_det needs mmcv, mmdet'),
        (('mmcv._ext',), 'fasternet_det needs the ops of mmcv'),
    ],
)
def test_import_without_the_stack(missing, named):
    code = f"""
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: (
    None if name in {missing!r} else find_spec(name))
import fasternet_det
"""
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f'ImportError: {named}' in done.stderr
    assert "pip install 'fasternet_det[mmdet]'" in done.stderr


@pytest.mark.parametrize(
    'kind, out_indices',
    [('two-stage', (0, 2, 4, 6)), ('one-stage', (2, 4, 6))],
)
def test_table_of_channels(kind, out_indices):
    assert f'`out_indices={out_indices}`' in GUIDES or kind == 'two-stage'
    row = re.search(rf'^\| {kind} \|(.*)\|$', GUIDES, re.M)[1]
    for arch, cell in zip(
        fasternet_det.FasterNet.arch_settings, row.split('|'), strict=True
    ):
        with torch.device('meta'):
            backbone = fasternet_det.FasterNet(arch, out_indices=out_indices)
        assert [int(c) for c in cell.split(',')] == backbone.out_channels


def test_table_of_g_ghosts_channels():
    page = (ROOT / 'configs' / 'g_ghost_regnet' / 'README.md').read_text()
    assert {
        arch: tuple(map(int, channels.split(',')))
        for arch, channels in re.findall(r'^\| (\d+) \| (.*) \|$', page, re.M)
    } == {
        arch: widths
        for arch, (
            _,
            widths,
            _,
        ) in fasternet_det.GGhostRegNet.arch_settings.items()
    }


def test_one_stage_configs_say_what_the_table_says():
    """``start_level=0``, where the neck has one that is not."""
    for path in ROOT.glob('configs/fasternet/r*_coco.py'):
        neck = Config.fromfile(path).model.neck
        assert neck.get('start_level', 0) == 0
        assert f'| {", ".join(map(str, neck.in_channels))} |' in GUIDES


def slugs(page):
    """Anchors of a page's headings, as GitHub makes them."""
    found = []
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.S | re.M)
    for heading in re.findall(r'^#+ +(.*?) *#*$', text, re.M):
        heading = re.sub(r'!?\[(.*?)\]\(.*?\)', r'\1', heading)
        slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        count = sum(
            re.fullmatch(rf'{slug}(-\d+)?', s) is not None for s in found
        )
        found.append(f'{slug}-{count}' if count else slug)
    return found


def test_slugs(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(
        '# A `b_c`, and (D)!\n## [E](f.md)-1\n```\n# no\n```\n## X\n## X\n'
    )
    assert slugs(page) == ['a-b_c-and-d', 'e-1', 'x', 'x-1']


def test_links_lead_somewhere():
    pages = [
        page
        for page in ROOT.glob('**/*.md')
        if not any(part.startswith('.') for part in page.parts)
        and 'data' not in page.relative_to(ROOT).parts[:1]
        and 'work_dirs' not in page.parts
    ]
    assert ROOT / 'README.md' in pages and len(pages) >= 8
    anchors = 0
    for page in pages:
        for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
            path, _, anchor = link.partition('#')
            if ':' in path:  # another site's
                continue
            target = page.parent / path if path else page
            assert target.exists(), f'{page}: {link}'
            if anchor and target.suffix == '.md':
                assert anchor in slugs(target), f'{page}: {link}'
                anchors += 1
    assert anchors >= 5
