"""The tables of docs/envs.md against SPECS and the spaces."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from common_envs import SPECS, Uniform, make_env

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEXT = (DOCS / "envs.md").read_text(encoding="utf-8")


def read_tables(text):
    """The rows of all tables whose first column is `id`: a list of {id: {column: cell}}."""
    tables, header = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif cells[0] == "id":
            header = cells
            tables.append({})
        elif header and set(line) - set("|-"):
            assert len(cells) == len(header), line
            tables[-1][cells[0].strip("`")] = dict(zip(header, cells))
    return tables


TABLES = read_tables(TEXT)


def numbers(cell):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", cell)]


def goals(cell):
    """'(10, 2) (4, 12)' -> ((10, 2), (4, 12))"""
    return tuple(tuple(numbers(group)) for group in re.findall(r"\(.*?\)", cell))


def test_every_environment_has_its_rows_and_its_picture():
    assert [list(table) for table in TABLES] == [list(SPECS)] * 2
    for env_id in SPECS:
        assert f"![](pictures/{env_id}.png)" in TEXT
        picture = (DOCS / "pictures" / f"{env_id}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 40 * 1024
        assert min(struct.unpack(">II", picture[16:24])) >= 200  # width, height


@pytest.mark.parametrize("env_id", SPECS)
def test_tables_have_the_numbers_of_the_code(env_id):
    task, env = SPECS[env_id], make_env(env_id)
    body, row = TABLES[0][env_id], TABLES[1][env_id]

    assert body["robot"] == ("point" if task.kind == "point" else "ant")
    assert body["maze, cell"] == f"{task.maze}, {task.cell:g}"
    entries = env.observation_space["observation"].shape[0]
    assert int(body["entries"]) == entries
    sizes = {"A": 29, "B": 36, "P": 6, "S": 20, "t": 1}
    assert all(f"| {letter}, {size} |" in TEXT for letter, size in sizes.items())
    assert sum(sizes[letter] for letter in body["observation"].split()) == entries
    assert body["action"] == f"±{env.action_space.high[0]:g}, {env.action_space.shape[0]}"
    assert float(body["dt"]) == pytest.approx(env.model.opt.timestep * env.substeps)
    if env.maze.walls:
        free = [env.maze.centre(i, j) for i, j, mark in env.maze.cells if mark != "#"]
        inside = np.ptp(free, axis=0) + task.cell
        assert numbers(body["inside"]) == list(inside)

    assert int(row["steps"]) == task.max_steps
    assert row["rewards"] == ", ".join(task.rewards)
    if task.kind == "gather":
        assert row["radius"] == row["evaluation goals"] == row["training goals"] == "-"
        return
    assert float(row["radius"]) == task.success_radius
    assert goals(row["evaluation goals"]) == task.eval_goals
    assert row["stops early in training"] == (task.early_stop or "no")
    train = task.train_goals
    if isinstance(train, Uniform):
        corners = (train.low, train.high, *((train.hole[:2], train.hole[2:]) if train.hole else ()))
        assert row["training goals"].startswith("box") and goals(row["training goals"]) == corners
        assert ("free cells" in row["training goals"]) == train.free_only
    else:
        assert goals(row["training goals"]) == train


def test_goal_boxes_of_the_multi_variants_are_in_the_text():
    for env_id, task in SPECS.items():
        if task.multi_goals:
            assert f"`{env_id}` {task.multi_goals.low} {task.multi_goals.high}" in TEXT


def test_sentence_about_manual_collision():
    sentence = TEXT[TEXT.index("*Manual collision*") :].split(":")[0]
    named = set(re.findall(r"[A-Z]\w*(?:-\w+)*", sentence)) - {"Manual"}
    expected = {env_id.removeprefix("AntMaze-") for env_id, task in SPECS.items() if task.manual_collision}
    assert named == expected
