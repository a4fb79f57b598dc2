import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mmcv_ops
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location(
        'install_mmcv', ROOT / 'tools' / 'install_mmcv.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_machine_of_the_tests_is_good(tool):
    tool.check_machine()


def test_no_compiler(tool, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-c++ -O2')
    with pytest.raises(SystemExit, match=r'no C\+\+ compiler \(no-such-c\+\+'):
        tool.check_machine()


def test_no_headers(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match='headers of Python .* missing'):
        tool.check_machine()


@pytest.mark.parametrize('version', [(3, 9, 1), (3, 13, 0)])
def test_wrong_python(tool, monkeypatch, version):
    monkeypatch.setattr(sys, 'version_info', version)
    with pytest.raises(SystemExit, match='builds on 3.10, 3.11 and 3.12'):
        tool.check_machine()


def test_what_is_missing_is_named(tool, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['install_mmcv.py'])
    monkeypatch.setattr(tool, 'has', lambda name: name != 'ninja')
    with pytest.raises(SystemExit, match='^ninja must be there'):
        tool.main()


def test_nothing_is_done_where_it_works(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['install_mmcv.py'])
    monkeypatch.setattr(tool, 'build', None)
    tool.main()
    assert 'its ops fit this torch' in capsys.readouterr().out


def compile_and_run(tool, folder, monkeypatch, torch_version):
    """Compile a file as torch's ninja does; return what it prints."""
    monkeypatch.setattr(tool, 'version', lambda name: torch_version)
    # torch's own headers take 20 seconds
    include = folder / 'include' / 'torch'
    include.mkdir(parents=True)
    (include / 'types.h').write_text('#define HEADER "read"\n')
    (folder / 'a.cpp').write_text(
        '#include <stdio.h>\n'
        'int main() { printf("%ld %s %d", __cplusplus, HEADER, NAME); }\n'
    )
    wrapper = tool.wrap_compiler(str(folder))
    command = (
        f'{wrapper} -MMD -MF a.o.d -DNAME=7 -g -I{include.parent} -c '
        '-c a.cpp -o a.o -std=c++17'
    )
    done = subprocess.run(
        command.split(), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    subprocess.run([wrapper, 'a.o', '-o', 'a'], cwd=folder, check=True)
    assert b'.debug_info' not in (folder / 'a.o').read_bytes()
    return subprocess.check_output(folder / 'a', text=True)


@pytest.mark.parametrize(
    'version, standard', [('2.1.2', 201703), ('2.14.1+cpu', 202002)]
)
def test_compiler_with_the_headers_read_once(
    version, standard, tool, monkeypatch, tmp_path
):
    assert tool.is_gcc()
    said = compile_and_run(tool, tmp_path, monkeypatch, version)
    # The file includes no header: it knows HEADER by the precompiled one.
    assert said == f'{standard} read 7'
    assert (tmp_path / 'torch_pch.h.gch').stat().st_size > 1000


def test_compiler_of_two_words(tool, monkeypatch, tmp_path):
    """torch's own build stops at ``CXX='ccache g++'``."""
    cache = tmp_path / 'cache'
    cache.write_text('#!/bin/sh\necho "$@" >> "$0.log"\nexec "$@"\n')
    cache.chmod(0o755)
    monkeypatch.setenv('CXX', f'{cache} g++')
    said = compile_and_run(tool, tmp_path / 'b', monkeypatch, '2.13.0')
    assert said == '201703 read 7'
    log = (tmp_path / 'cache.log').read_text()
    assert log.count('a.cpp') == 1 and 'torch_pch.h.gch' in log


def test_other_compilers_get_no_precompiled_header(
    tool, monkeypatch, tmp_path
):
    monkeypatch.setattr(tool, 'is_gcc', lambda: False)
    wrapper = tool.wrap_compiler(str(tmp_path))
    assert os.listdir(tmp_path) == ['clang++']
    assert shutil.which(wrapper)


def test_progress_and_failure_of_the_build(
    tool, monkeypatch, capsys, tmp_path
):
    """What pip prints, from a process that prints it."""
    pip = tmp_path / 'pip.py'
    pip.write_text(
        'import os, sys\n'
        'assert sys.argv[1:4] == ["install", "-v", '
        '"--disable-pip-version-check"]\n'
        'assert "--no-cache-dir" in sys.argv and "mmcv==2.1.0" in sys.argv\n'
        'assert os.path.exists(os.environ["CXX"])\n'
        'for i in range(1, 78): print(f"  [{i}/77] c++ file{i}.cpp")\n'
        'raise SystemExit("error: no space left")\n'
    )
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    with pytest.raises(SystemExit, match='(?s)no space left.*mmcv.*failed'):
        tool.build([])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == '==>     8 of 77 files compiled'
    assert said[-1] == '==>     77 of 77 files compiled' and len(said) == 10


def test_ops_equal_those_of_a_plain_build():
    """Compiled here, they give what pip's own way of building mmcv gave."""
    want = json.loads((ROOT / 'tests' / 'data' / 'mmcv_ops.json').read_text())
    got = mmcv_ops.run()
    assert got.keys() == want.keys()
    for name, values in want.items():
        scale = max(map(abs, values))
        assert scale > 0
        np.testing.assert_allclose(
            got[name], values, rtol=0, atol=1e-5 * scale, err_msg=name
        )
