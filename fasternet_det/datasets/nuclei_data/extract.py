"""Take the nuclei image and mask out of the stardist wheel, without loss.

Usage:
    pip download --no-deps --only-binary=:all: --python-version 311 \
        --platform manylinux_2_28_x86_64 stardist==0.9.2
    python extract.py stardist-0.9.2-*.whl
"""

import argparse
import zipfile
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('wheel', help='the wheel of stardist 0.9.2')
    wheel = zipfile.ZipFile(parser.parse_args().wheel)
    # The image's 16 bits hold values up to 235, so 8 bits keep them all.
    for source, target, dtype in (
        ('img2d', 'image', np.uint8),
        ('mask2d', 'mask', np.uint16),
    ):
        tiff = wheel.read(f'stardist/data/images/{source}.tif')
        array = cv2.imdecode(
            np.frombuffer(tiff, np.uint8), cv2.IMREAD_UNCHANGED
        )
        assert array.max() <= np.iinfo(dtype).max
        cv2.imwrite(
            str(HERE / f'{target}.png'),
            array.astype(dtype),
            [cv2.IMWRITE_PNG_COMPRESSION, 9],
        )
    licence = wheel.read('stardist-0.9.2.dist-info/licenses/LICENSE.txt')
    (HERE / 'LICENSE').write_bytes(licence)


if __name__ == '__main__':
    main()
