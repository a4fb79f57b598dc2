"""Random files, the same in each run: see ``fuzz_checkpoints.py``."""

import os
import resource
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / 'fuzz_checkpoints.py'
CORPUS = sorted((Path(__file__).parent / 'data' / 'fuzz').iterdir())
MOST = 8 << 30  # bytes of addresses: what asks for more, fails


def test_no_code_no_crash_bounded_memory(tmp_path):
    """In a process of its own, which a crash would end."""
    assert len(CORPUS) > 50
    assert sum(file.stat().st_size for file in CORPUS) < 200_000
    done = subprocess.run(
        [sys.executable, FUZZ, '--count', '2000', *CORPUS],
        env={**os.environ, 'TMPDIR': str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_AS, (MOST, MOST)
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count, taken = (int(word) for word in done.stdout.split()[0:3:2])
    assert count == 2000 and taken > 20  # of some, the weights are taken
