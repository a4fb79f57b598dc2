import importlib.util
import json
import sys
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


def test_no_venv(env, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='lacks venv'):
        env.check_machine()


def test_what_mmcv_needs_is_asked_for_first(env, monkeypatch, capfd):
    monkeypatch.setenv('CXX', 'no-such-c++ -O2')
    with pytest.raises(SystemExit):
        env.check_machine()
    assert 'no C++ compiler (no-such-c++)' in capfd.readouterr().err


def pinned(text):
    """Versions by package, of the lines that hold for any Python."""
    lines = [line.partition(';') for line in text.splitlines()]
    return dict(
        line[0].strip().split('==') for line in lines if '==' in line[0]
    )


@pytest.mark.parametrize('version', ['', '2.15.0', '2.1.2'])
def test_versions_by_torch(env, monkeypatch, version):
    monkeypatch.setattr(env, 'TORCH', version)
    monkeypatch.setattr(env, 'IS_OLD', version == '2.1.2')
    changed = dict(
        set(pinned(env.constraints()).items())
        - set(pinned((ROOT / 'constraints.txt').read_text()).items())
    )
    assert (
        changed
        == {
            '': {},
            '2.15.0': {'torch': '2.15.0'},
            '2.1.2': {'torch': '2.1.2', **env.OLD},
        }[version]
    )
    assert env.constraints().count('torch==') == 1


def make(env, monkeypatch, fail=None):
    """Make an environment, but for what pip would download."""
    installed = []

    def install(*args):
        if args[0] == fail:
            raise KeyboardInterrupt
        installed.append(args)

    monkeypatch.setattr(env, 'install', install)
    monkeypatch.setattr(env, 'run', install)
    env.make()
    return installed


def test_second_call_does_nothing(env, monkeypatch):
    assert not env.is_ready()
    installed = make(env, monkeypatch)
    assert len(installed) == 7
    assert env.is_ready()
    beside = {
        str(args[args.index('--target') + 1]): args
        for args in installed
        if '--target' in args
    }
    assert set(beside) == {
        str(env.VENV / name) for name in ('openmmlab', 'timm')
    }
    versions = pinned((ROOT / 'constraints.txt').read_text())
    for args in beside.values():
        assert args[0] == '--no-deps'
        assert set(args[args.index('--target') + 2 :]) <= versions.keys()


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
        make(env, monkeypatch, fail=env.INSTALL_MMCV)
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


def test_failure_is_shown_and_stops(env, capfd):
    env.VENV.mkdir()
    (env.VENV / 'bin').mkdir()
    (env.VENV / 'bin' / 'python').symlink_to(sys.executable)
    env.run('-c', 'pass')
    with pytest.raises(SystemExit, match='-c 1 / 0 failed, see above'):
        env.run('-c', '1 / 0')
    assert 'ZeroDivisionError' in capfd.readouterr().err
