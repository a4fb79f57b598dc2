import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / 'docs' / 'tutorial.ipynb'
# What is shown is right, of a detector that has hardly begun to learn.
CHECKS = """
assert [s['step'] for s in scalars] == [5, 10, 20, 20]
assert len(there) == len(axes[0].patches) > 0
assert len(surer) == len(axes[1].patches)
assert len(found) == len(fast) > 10
assert (fast.scores - found.scores).abs().max() < 1e-5
for best in (fast.bboxes[0].numpy(), dets[0, 0, :4] / 2):
    assert abs(best - found.bboxes[0].numpy()).max() < 1e-2
"""


@pytest.mark.deploy
def test_tutorial(project):
    """It runs from top to bottom."""
    cells = json.loads(NOTEBOOK.read_text())['cells']
    sources = [
        ''.join(cell['source'])
        for cell in cells
        if cell['cell_type'] == 'code'
    ]
    assert sources[0].startswith('ITERATIONS = 100\nLOWEST_SCORE = 0.05')
    sources[0] = 'ITERATIONS, LOWEST_SCORE = 20, 0'
    project('-c', '\n'.join([*sources, CHECKS]))


def test_outputs_are_those_of_a_whole_run():
    cells = json.loads(NOTEBOOK.read_text())['cells']
    ran = [cell for cell in cells if cell['cell_type'] == 'code']
    assert [c['execution_count'] for c in ran] == [*range(1, len(ran) + 1)]
    outputs = json.dumps([cell['outputs'] for cell in ran])
    assert outputs.count('image/png') == 2 and '"error"' not in outputs
    assert NOTEBOOK.stat().st_size < 150_000
