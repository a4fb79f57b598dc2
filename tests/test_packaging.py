import ast
import re
import sys
from email import message_from_string
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import fasternet_det
from fasternet_det.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]


def test_wheel_holds_all_and_nothing_else(site):
    name = f'fasternet_det-{fasternet_det.__version__}.dist-info'
    assert {p.name for p in site.iterdir()} == {'bin', 'fasternet_det', name}
    assert [p.name for p in (site / 'bin').iterdir()] == ['fasternet-det']
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
    assert (package / 'py.typed').is_file()
    data = {p.name for p in (package / 'datasets' / 'nuclei_data').iterdir()}
    assert data >= {'image.png', 'mask.png', 'LICENSE', 'README.md'}


@pytest.fixture
def metadata(site):
    (path,) = site.glob('*.dist-info/METADATA')
    return message_from_string(path.read_text())


def test_metadata(metadata):
    assert metadata['Metadata-Version'] == '2.4'
    assert metadata['Version'] == fasternet_det.__version__
    assert metadata['License-Expression'] == 'Apache-2.0 AND BSD-3-Clause'
    # mmcv 2.1 stops at 3.12, and so does what CI proves
    wanted = SpecifierSet(metadata['Requires-Python'])
    pythons = [f'3.{minor}' for minor in range(8, 16)]
    assert list(wanted.filter(pythons)) == ['3.10', '3.11', '3.12']
    for python in wanted.filter(pythons):
        assert f'Programming Language :: Python :: {python}' in (
            metadata.get_all('Classifier')
        )


def test_requirements(metadata):
    required = {
        extra: {
            r.name: str(r.specifier)
            for r in map(Requirement, metadata.get_all('Requires-Dist'))
            if (r.marker.evaluate(dict(extra=extra)) if r.marker else True)
            and bool(extra) == bool(r.marker)
        }
        for extra in ('', 'mmdet', 'deploy', 'tests')
    }
    # Forks install the same modules as these: only the extra names them.
    # And torch is the user's own build.
    assert required[''] == {'safetensors': ''}
    assert required['mmdet'] == {
        'mmengine': '>=0.10.7',
        'mmcv': '<2.2.0,>=2.1.0',
        'mmdet': '<4,>=3.3.0',
        'pycocotools': '>=2.0.11',
        'setuptools': '<82',
    }
    # from the oldest that CI proves
    proven = re.findall(
        r'^([\w-]+)==([\d.]+)',
        (ROOT / 'constraints.txt').read_text(),
        re.M,
    )
    assert required['deploy'] == {
        name: f'>={min((v for n, v in proven if n == name), key=Version)}'
        for name in ('onnx', 'onnxruntime', 'onnxscript', 'openvino')
    }
    assert {'pytest', 'ruff'} <= required['tests'].keys()


def test_index_shows_images_and_links(site, metadata):
    """As built with the address of a repository; see conftest.py."""
    readme = (ROOT / 'README.md').read_text()
    address = 'https://example.org/fasternet_det'
    shown = metadata.get_payload()
    assert f'Source, {address}' in metadata.get_all('Project-URL')
    assert f'found on the right]({address}/raw/HEAD/docs/nuclei.png)' in shown
    assert f'[weights]({address}/blob/HEAD/docs/weights.md)' in shown
    links = re.findall(r'\]\((.*?)\)', shown)
    assert len(links) == len(re.findall(r'\]\((.*?)\)', readme)) > 20
    assert all(link.startswith('https://') for link in links)


@pytest.mark.parametrize('name', COMMANDS)
def test_command_of_a_clone(name, monkeypatch, capsys):
    """Each runs its tool, with the options, and ends as that does.

    A wheel's are run by test_readme.py.
    """
    monkeypatch.setattr(sys, 'argv', ['fasternet-det', name, '--help'])
    monkeypatch.setattr(sys, 'path', sys.path.copy())
    with pytest.raises(SystemExit, match='0'):
        main()
    tool = Path(COMMANDS[name]).parts[0].removesuffix('.py')
    assert capsys.readouterr().out.startswith(f'usage: {tool}')


def test_configs_of_a_clone(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['fasternet-det', 'configs'])
    main()
    assert capsys.readouterr().out == f'{ROOT / "configs"}\n'


def test_configs_take_no_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['fasternet-det', 'configs', '--all'])
    with pytest.raises(SystemExit, match='2'):
        main()
    assert 'configs takes no options' in capsys.readouterr().err


def test_no_such_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['fasternet-det', 'trian', 'a.py'])
    with pytest.raises(SystemExit, match='2'):
        main()
    said = capsys.readouterr().err
    assert "invalid choice: 'trian'" in said
    assert all(name in said for name in ('configs', *COMMANDS))


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
