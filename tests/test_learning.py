"""Learning itself. An hour or so on a CPU core, so only by hand: pytest -m slow tests/test_learning.py"""

import pytest
from conftest import read_rows

pytestmark = pytest.mark.slow


def test_point_maze_is_solved(script, run, tmp_path):
    """With the default settings: the far end of the U is reached in most of the last five evaluations."""
    flags = ("--env", "PointMaze-U", "--eval-every", 10_000, "--threads", 1, "--device", "cpu")
    run(script, *flags, "--run-dir", tmp_path, timeout=4 * 3600)
    last = [float(row["eval/success_any"]) for row in read_rows(tmp_path)[-5:]]
    assert sum(last) / 5 > 0.6
