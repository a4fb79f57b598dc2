import json
import sys
import sysconfig
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def env():
    spec = util.spec_from_file_location('env', ROOT / 'tools' / 'env.py')
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_machine_of_the_tests_is_good(env):
    env.check_machine()


def test_no_compiler(env, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-c++ -O2')
    with pytest.raises(SystemExit, match=r'no C\+\+ compiler \(no-such-c\+\+'):
        env.check_machine()


def test_no_headers(env, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match='headers of Python .* missing'):
        env.check_machine()


def test_old_python(env, monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 9, 1))
    with pytest.raises(SystemExit, match='too old: .* 3.10 or newer'):
        env.check_machine()


def test_second_call_does_nothing(env, monkeypatch, tmp_path):
    monkeypatch.setattr(env, 'READY', tmp_path / 'ready.json')
    monkeypatch.setattr(env, 'install', lambda: pytest.fail('installs again'))
    env.READY.write_text(json.dumps(env.wanted()))
    env.main()
    env.READY.write_text(json.dumps(env.wanted() | dict(root='elsewhere')))
    with pytest.raises(pytest.fail.Exception, match='installs again'):
        env.main()
