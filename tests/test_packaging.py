import ast
from itertools import chain
from pathlib import Path

import fasternet_det

ROOT = Path(__file__).parents[1]


def test_wheel_holds_all_and_nothing_else(site):
    name = f'fasternet_det-{fasternet_det.__version__}.dist-info'
    assert {p.name for p in site.iterdir()} == {'fasternet_det', name}
    wheel = (site / name / 'WHEEL').read_text()
    assert 'Tag: py3-none-any' in wheel
    licences = {p.name for p in (site / name / 'licenses').rglob('*')}
    assert 'LICENSE' in licences
    package = site / 'fasternet_det'
    for folder in ('configs', 'tools'):
        shipped = {
            p.relative_to(package / '.mim')
            for p in (package / '.mim' / folder).rglob('*.*')
            if p.suffix != '.pyc'
        }
        assert shipped == {
            p.relative_to(ROOT)
            for p in (ROOT / folder).rglob('*.*')
            if p.suffix != '.pyc'
        }
    assert (package / '.mim' / 'model-index.yml').is_file()
    data = {p.name for p in (package / 'datasets' / 'nuclei_data').iterdir()}
    assert data >= {'image.png', 'mask.png', 'LICENSE', 'README.md'}


def test_requirements(site):
    (metadata,) = site.glob('*.dist-info/METADATA')
    required = [
        line.removeprefix('Requires-Dist: ')
        for line in metadata.read_text().splitlines()
        if line.startswith('Requires-Dist')
    ]
    always = [r for r in required if 'extra ==' not in r]
    # Forks install the same modules as these: only the extra names them.
    # And torch is the user's own build.
    assert always == ['safetensors']
    extra = ' '.join(
        r for r in required if "extra == 'mmdet'" in r.replace('"', "'")
    )
    for package in ('mmengine', 'mmcv', 'mmdet', 'pycocotools', 'setuptools'):
        assert package in extra


def test_checkpoints_are_never_executed():
    """No torch.load without weights_only, no pickle.load, in what we ship."""
    shipped = [
        ROOT.glob(f'{name}/**/*.py') for name in ('fasternet_det', 'tools')
    ]
    for path in chain(*shipped):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ('pickle.load', 'pickle.loads'), path
            if called == 'torch.load':
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords['weights_only'] == 'True', path
