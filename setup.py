"""Packaging of fasternet_det; see README.md for how to install it."""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# Set it to publish: a package index shows the README alone, and wants links to
# its images and pages in full.
URL = os.environ.get('FASTERNET_DET_URL')


def readme() -> str:
    """The README, with full links where the repository's address is known."""
    text = (HERE / 'README.md').read_text()
    if not URL:
        return text
    return re.sub(
        r'(!?)(\[[^]]*\])\((?!https?:|#)([^)\s]+)\)',
        lambda m: '{0}{1}({4}/{3}/HEAD/{2})'.format(
            *m.groups(), 'raw' if m[1] else 'blob', URL
        ),
        text,
    )


class build_py_with_mim(build_py):
    """Add configs and tools as ``.mim``, where mim and mmdet look for them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib, 'fasternet_det', '.mim')
        for name in ('configs', 'tools'):
            shutil.copytree(
                HERE / name,
                mim / name,
                ignore=shutil.ignore_patterns('__pycache__'),
                dirs_exist_ok=True,
            )
        shutil.copy(HERE / 'model-index.yml', mim)


about = (HERE / 'fasternet_det' / '__init__.py').read_text()
setup(
    name='fasternet_det',
    version=about.split("__version__ = '")[1].split("'")[0],
    description='FasterNet and its relatives as backbones for MMDetection 3.x',
    long_description=readme(),
    long_description_content_type='text/markdown',
    project_urls={
        'Paper': 'https://arxiv.org/abs/2303.03667',
        **({'Source': URL} if URL else {}),
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    license_expression='Apache-2.0 AND BSD-3-Clause',  # us, and the nuclei
    license_files=['LICENSE', 'fasternet_det/datasets/nuclei_data/LICENSE'],
    packages=find_packages(include=['fasternet_det*']),
    package_data={
        'fasternet_det': ['py.typed'],
        'fasternet_det.datasets': ['nuclei_data/*'],
    },
    entry_points=dict(
        console_scripts=['fasternet-det = fasternet_det.__main__:main']
    ),
    python_requires='>=3.10,<3.13',  # mmcv 2.1's
    install_requires=['safetensors'],
    extras_require={
        # Left out of the requirements proper: forks of these packages install
        # the same modules, and a requirement would overwrite them. torch is in
        # neither, as with mmdet: everyone has a build that suits the machine.
        'mmdet': [
            'mmengine>=0.10.7',
            'mmcv>=2.1.0,<2.2.0',
            'mmdet>=3.3.0,<4',
            'pycocotools>=2.0.11',
            'setuptools<82',  # mmengine imports pkg_resources
        ],
        # export to ONNX and OpenVINO, and what runs it; from the oldest that
        # constraints.txt proves
        'deploy': [
            'onnx>=1.23.2',
            'onnxruntime>=1.23.2',
            'onnxscript>=0.7.2',
            'openvino>=2026.4.1',
        ],
        'tests': [
            'pytest',
            'pytest-xdist',
            'ruff',
            # what openmim imports of its requirements
            *('colorama', 'model-index', 'pandas', 'requests', 'tabulate'),
        ],
    },
    cmdclass=dict(build_py=build_py_with_mim),
)
