"""Random files, the same in each run: see ``fuzz_checkpoints.py``."""

import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / 'fuzz_checkpoints.py'
CORPUS = sorted((Path(__file__).parent / 'data' / 'fuzz').iterdir())


def test_no_code_no_crash_bounded_memory(tmp_path):
    """In a process of its own, which a crash would end."""
    assert len(CORPUS) > 50
    done = subprocess.run(
        [sys.executable, FUZZ, '--count', '2000', *CORPUS],
        env={**os.environ, 'TMPDIR': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = done.stdout.split()
    assert words[0] == '2000' and int(words[2]) > 20  # the weights of some
