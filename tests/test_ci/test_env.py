import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def env(monkeypatch, tmp_path):
    """The set-up script, with a .venv of its own to make."""
    spec = importlib.util.spec_from_file_location('env', ROOT / '.ci/env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'VENV', tmp_path / 'a venv')
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


def test_no_venv(env, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='lacks venv'):
        env.check_machine()


@pytest.mark.parametrize('version', [(3, 9, 1), (3, 13, 0)])
def test_wrong_python(env, monkeypatch, version):
    monkeypatch.setattr(sys, 'version_info', version)
    with pytest.raises(SystemExit, match='builds on 3.10, 3.11 and 3.12'):
        env.check_machine()


def make(env, monkeypatch, fail=None):
    """Make an environment, but for what pip would download."""
    installed = []

    def install(*args):
        if args[0] == fail:
            raise KeyboardInterrupt
        installed.append(args)

    monkeypatch.setattr(env, 'install', install)
    monkeypatch.setattr(env, 'works', lambda code: True)
    env.make()
    return installed


def test_second_call_does_nothing(env, monkeypatch):
    assert not env.is_ready()
    assert len(make(env, monkeypatch)) == 4
    assert env.is_ready()


@pytest.mark.parametrize('change', ['root', 'python', 'constraints.txt'])
def test_change_is_followed(env, monkeypatch, change):
    make(env, monkeypatch)
    (env.VENV / 'kept').touch()
    ready = env.VENV / env.READY
    ready.write_text(json.dumps(env.wanted() | {change: 'another'}))
    assert not env.is_ready()
    make(env, monkeypatch)
    assert env.is_ready()
    assert (env.VENV / 'kept').exists() == (change == 'constraints.txt')


def test_interruption_is_repaired(env, monkeypatch, capsys):
    make(env, monkeypatch)
    (env.VENV / env.READY).write_text('{"root": "", "python": ""}')
    with pytest.raises(KeyboardInterrupt):
        make(env, monkeypatch, fail='-v')
    assert not env.is_ready()
    (env.VENV / 'bin' / 'pip').unlink()
    capsys.readouterr()
    make(env, monkeypatch)
    assert 'was interrupted: starting .venv afresh' in capsys.readouterr().out
    assert env.is_ready() and (env.VENV / 'bin' / 'pip').exists()


def test_other_peoples_venv_is_left_alone(env, monkeypatch):
    env.VENV.mkdir()
    (env.VENV / 'precious').touch()
    with pytest.raises(SystemExit, match='not from here: move it away'):
        make(env, monkeypatch)
    assert [p.name for p in env.VENV.iterdir()] == ['precious']


def test_progress_and_failure_of_pip(env, monkeypatch, capsys):
    """What pip prints, from a process that prints it."""

    def pip(*args):
        code = """
for i in range(1, 78): print(f'  [{i}/77] c++ file{i}.cpp')
raise SystemExit('error: no space left')
"""
        return subprocess.Popen(
            [sys.executable, '-c', code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    monkeypatch.setattr(env, 'pip', pip)
    with pytest.raises(SystemExit, match='(?s)no space left.*mmcv.*failed'):
        env.install('mmcv')
    said = capsys.readouterr().out.splitlines()
    assert said[0] == '==>     4 of 77 files compiled'
    assert said[-1] == '==>     77 of 77 files compiled' and len(said) == 20
