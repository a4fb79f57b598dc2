"""Packaging of fasternet_det; see README.md for how to install it."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


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
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE', 'fasternet_det/datasets/nuclei_data/LICENSE'],
    packages=find_packages(include=['fasternet_det*']),
    package_data={'fasternet_det.datasets': ['nuclei_data/*']},
    python_requires='>=3.10',
    install_requires=['safetensors'],
    extras_require={
        # Left out of the requirements proper: forks of these packages install
        # the same modules, and a requirement would overwrite them. torch is in
        # neither, as with mmdet: everyone has a build that suits the machine.
        'mmdet': [
            'mmengine>=0.10.7',
            'mmcv>=2.1.0,<2.2.0',
            'mmdet>=3.3.0,<4',
            'pycocotools',
            'setuptools<82',  # mmengine imports pkg_resources
        ],
        # export to ONNX and OpenVINO, and what runs it
        'deploy': ['onnx', 'onnxruntime', 'onnxscript', 'openvino'],
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
