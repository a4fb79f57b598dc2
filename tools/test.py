"""Run mmdet's own tools/test.py, which mmdet's wheel ships."""

import os.path as osp
import runpy

from mmengine.utils import get_installed_path

if __name__ == '__main__':
    runpy.run_path(
        osp.join(get_installed_path('mmdet'), '.mim', 'tools', 'test.py'),
        run_name='__main__',
    )
