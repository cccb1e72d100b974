"""Environments against numbers worked out by hand or measured with the papers' own models on MuJoCo 4.0."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import common_envs  # isort: skip  # before mujoco, because it chooses MUJOCO_GL
import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from common_envs import MAZES, SPECS, Maze, Uniform, make_env

ROOT = Path(__file__).resolve().parent.parent
IDS = ["AntMaze-U", "AntMaze-ULarge", "AntMaze-UStochastic", "AntMaze-W", "AntMaze-Bottleneck",
       "AntMaze-Complex", "AntPush", "AntPush-Small", "AntFall", "AntGather", "AntFourRooms",
       "PointMaze-U"]  # fmt: skip
BOTH = [name for name in IDS if name not in ("AntPush", "AntFall", "AntGather", "AntFourRooms")]


def at_rest(env, xy=None):
    """Put the robot at its reference pose without noise; the goal and the counters of a reset remain."""
    env.reset(seed=0)
    mujoco.mj_resetData(env.model, env.data)
    if xy is not None:
        env.data.qpos[:2] = xy
    mujoco.mj_forward(env.model, env.data)


def without_contacts(env):
    env.model.geom_contype[:], env.model.geom_conaffinity[:] = 0, 0


def scripted(env, positions):
    """Replace the physics: after step t the torso is at positions(t)."""

    def simulate(action):
        env.data.qpos[:2] = positions(env.steps + 1)

    env._simulate = simulate


def run_to_end(env):
    zero = np.zeros(env.action_space.shape, np.float32)
    while True:
        _, _, terminated, truncated, info = env.step(zero)
        assert info["dead"] is False  # a stop is no death
        if terminated or truncated:
            return env.steps, terminated, truncated


# --------------------------------------------------------------------------------------------- physics


@pytest.mark.parametrize(
    "env_id, sizes",
    [
        ("AntMaze-U", (15, 14, 32)),
        ("AntMaze-ULarge", (15, 14, 32)),
        ("AntMaze-UStochastic", (15, 14, 32)),
        ("AntPush", (17, 16, 34)),
        ("AntPush-Small", (17, 16, 34)),
        ("AntFall", (17, 16, 53)),
        ("AntMaze-W", (15, 14, 62)),
        ("AntMaze-Complex", (15, 14, 64)),
        ("AntFourRooms", (15, 14, 75)),
        ("AntMaze-Bottleneck", (15, 14, 34)),
        ("AntGather", (15, 14, 18)),  # 13 of the ant, floor, 4 walls
        ("PointMaze-U", (3, 3, 21)),  # 2 of the robot, floor, 18 walls
    ],
)
def test_model_sizes(env_id, sizes):
    model = make_env(env_id).model
    assert (model.nq, model.nv, model.ngeom) == sizes


def test_ant_is_the_papers_and_not_gymnasiums():
    model = make_env("AntMaze-U").model
    assert model.opt.timestep == 0.02
    np.testing.assert_array_equal(model.actuator_gear[:, 0], 1)
    np.testing.assert_array_equal(model.actuator_ctrlrange, [[-30, 30]] * 8)
    np.testing.assert_array_equal(model.geom_margin, 0.005)
    np.testing.assert_allclose(model.geom_solimp[:, :3], [[0.8, 0.8, 0.01]] * 32)
    assert model.body_mass.sum() == pytest.approx(0.91088, abs=1e-5)
    np.testing.assert_array_equal(model.dof_armature, [0] * 6 + [1] * 8)
    joints = [model.joint(model.actuator_trnid[i, 0]).name for i in range(8)]
    assert joints == ["hip_4", "ankle_4", "hip_1", "ankle_1", "hip_2", "ankle_2", "hip_3", "ankle_3"]


@pytest.mark.parametrize("env_id", ["AntPush", "AntPush-Small", "AntFall"])
def test_movable_block(env_id):
    model = make_env(env_id).model
    np.testing.assert_allclose(model.geom_solimp[:, :3], [[0.995, 0.995, 0.01]] * model.ngeom)
    np.testing.assert_array_equal(model.dof_armature[14:], 0)
    np.testing.assert_array_equal(model.dof_damping[14:], 0)
    np.testing.assert_array_equal(model.jnt_margin[-2:], 0.01)
    block, joints = model.body("block"), model.jnt_range[-2:].tolist()
    geom = model.geom_size[model.body_geomadr[block.id]]
    if env_id == "AntFall":
        assert block.mass[0] == pytest.approx(0.001) and block.pos.tolist() == [8, 8, 6]
        np.testing.assert_allclose(geom, (3.96, 3.96, 2))
        assert model.jnt_limited[-2:].all() and joints == [[-8, 8], [-4, 0]]
        assert model.jnt_axis[-2:].tolist() == [[0, 1, 0], [0, 0, 1]]
    else:
        s = 8 if env_id == "AntPush" else 4
        assert block.mass[0] == pytest.approx(0.0002) and block.pos.tolist() == [0, s, s / 4]
        np.testing.assert_allclose(geom, (s / 2, s / 2, s / 4))
        assert not model.jnt_limited[-2:].any() and model.jnt_axis[-2:].tolist() == [[1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("env_id, scale", [("AntMaze-U", 4), ("AntMaze-ULarge", 8), ("AntMaze-W", 2)])
def test_walls_are_half_a_cell_high(env_id, scale):
    model = make_env(env_id).model
    walls = (model.geom_bodyid == 0) & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
    np.testing.assert_allclose(model.geom_size[walls], [[scale / 2, scale / 2, scale / 4]] * walls.sum())
    np.testing.assert_allclose(model.geom_pos[walls][:, 2], scale / 4)


def test_contact_margin_of_foot_and_floor():
    env = make_env("AntMaze-U")
    at_rest(env)
    for _ in range(30):
        env.step(np.zeros(8))
    floor = env.model.geom("floor").id
    margins = [c.includemargin for c in env.data.contact if floor in (c.geom1, c.geom2)]
    assert margins and all(margin == pytest.approx(0.01) for margin in margins)


# z of the torso after 1, 2, 3, 5, 10, 20, 50, 100 steps without noise and torque
HEIGHTS = {
    "AntMaze-U": (0.7352, 0.6170, 0.6013, 0.8269, 0.5911, 0.5769, 0.5204, 0.3699),
    "AntMaze-Complex": (0.7352, 0.6170, 0.6013, 0.8269, 0.5911, 0.5769, 0.5204, 0.3699),
    "AntPush": (0.7352, 0.6170, 0.6274, 0.8710, 0.6038, 0.6048, 0.6041, 0.6029),
    "AntFall": (4.7352, 4.6170, 4.6161, 4.8163, 4.5948, 4.5950, 4.5942, 4.5927),
}


@pytest.mark.parametrize("env_id", HEIGHTS)
def test_rest_height(env_id):
    env = make_env(env_id)
    at_rest(env)
    heights = [env.step(np.zeros(8))[4]["torso_height"] for _ in range(100)]
    measured = [heights[step - 1] for step in (1, 2, 3, 5, 10, 20, 50, 100)]
    np.testing.assert_allclose(measured, HEIGHTS[env_id], atol=2e-3)


def test_one_step_from_a_known_state():
    env = make_env("AntMaze-U")
    at_rest(env)
    env.data.qpos[7:] = 0, 1, 0, -1, 0, -1, 0, 1
    obs = env.step(np.array([30, -30, 15, -15, 10, -10, 5, -5]))[0]["observation"]
    qpos = (-.00312, -.00325, .69916, .99973, .00089, .01231, -.01993,
            .07231, .92770, .04836, -1.04823, .02493, -1.02426, .14413, .85568)  # fmt: skip
    qvel = (-.05903, -.07137, -1.01933, .02011, .49250, -.80638,
            1.42302, -1.42283, .95169, -.94852, .49034, -.47736, 2.83415, -2.84022)  # fmt: skip
    np.testing.assert_allclose(obs[:15], qpos, atol=1e-4)
    np.testing.assert_allclose(obs[15:29], qvel, atol=1e-4)
    assert obs[29] == 0.001


def test_torques_beyond_30_are_clamped():
    ends = []
    for torque in (30, 300):
        env = make_env("AntMaze-U")
        env.reset(seed=3)
        for _ in range(5):
            obs = env.step(np.full(8, torque, np.float32))[0]
        ends.append(obs["observation"])
    np.testing.assert_array_equal(*ends)


def test_fall_block_drops_into_the_chasm():
    env = make_env("AntFall")
    at_rest(env)
    env.data.qpos[15] = 8
    drops = []
    for _ in range(60):
        env.step(np.zeros(8))
        drops.append(env.data.qpos[16])
    assert drops[0] == pytest.approx(-0.049, abs=2e-3) and drops[4] == pytest.approx(-1.137, abs=5e-3)
    assert drops[-1] == pytest.approx(-3.99, abs=0.01)
    assert 6 + 2 + drops[-1] == pytest.approx(4.01, abs=0.01)  # its top: the height of the platforms


@pytest.mark.parametrize("force, distance, tolerance", [(0.5, 0.0, 0.02), (2.0, 0.83, 0.05)])
def test_push_block_slides_with_stiction(force, distance, tolerance):
    env = make_env("AntPush")
    at_rest(env, (-8, 0))
    env.data.xfrc_applied[env.model.body("block").id, 0] = force
    for _ in range(40):
        env.step(np.zeros(8))
    assert env.data.qpos[15] == pytest.approx(distance, abs=tolerance)


@pytest.mark.parametrize("evaluate", [False, True])
def test_manual_collision_restores_only_xy(evaluate):
    env = make_env("AntMaze-U", evaluate=evaluate)
    at_rest(env, (1.9, 1.9))
    without_contacts(env)  # the wall's own push would keep the torso out
    env.data.qvel[:2] = 0.5, 2
    free = mujoco.MjData(env.model)
    free.qpos[:], free.qvel[:] = env.data.qpos, env.data.qvel
    mujoco.mj_step(env.model, free, 5)
    assert free.qpos[1] > 2  # would be in the wall y >= 2
    obs = env.step(np.zeros(8))[0]["observation"]
    np.testing.assert_array_equal(obs[:2], (1.9, 1.9))
    np.testing.assert_array_equal(obs[2:15], free.qpos[2:])
    np.testing.assert_array_equal(obs[15:29], free.qvel)


def test_large_maze_has_no_manual_collision():
    env = make_env("AntMaze-ULarge")
    at_rest(env, (3.9, 3.9))
    without_contacts(env)
    env.data.qvel[1] = 2
    obs = env.step(np.zeros(8))[0]
    assert obs["achieved_goal"][1] > 4.05 and env.maze.in_wall(*obs["achieved_goal"])


@pytest.mark.parametrize("evaluate", [False, True])
def test_stochastic_maze_moves_xy_by_5_cm(evaluate):
    env, twin = (make_env(name, evaluate=evaluate) for name in ("AntMaze-UStochastic", "AntMaze-U"))
    offsets = []
    for seed in range(300):
        start = env.reset(seed=seed)[0]["observation"]
        np.testing.assert_array_equal(start, twin.reset(seed=seed)[0]["observation"])
        noisy, exact = env.step(np.zeros(8))[0]["observation"], twin.step(np.zeros(8))[0]["observation"]
        np.testing.assert_array_equal(noisy[2:], exact[2:])
        offsets.append(noisy[:2] - exact[:2])
    assert np.std(offsets) == pytest.approx(0.05, rel=0.12) and abs(np.mean(offsets)) < 0.01
    assert abs(np.corrcoef(np.transpose(offsets))[0, 1]) < 0.2  # of each its own


def test_point_moves_exactly():
    env = make_env("PointMaze-U")
    at_rest(env)
    action = np.array([1.0, 0.0], np.float32)
    for _ in range(10):
        obs = env.step(action)[0]["observation"]
    np.testing.assert_allclose(obs[:3], (2, 0, 0), atol=1e-9)
    np.testing.assert_array_equal(action, (1, 0))
    at_rest(env)
    obs = env.step(np.array([0.5, 1.0]))[0]["observation"]  # turns first, then moves along the new heading
    np.testing.assert_allclose(obs[:3], (0.1 * math.cos(1), 0.1 * math.sin(1), 1), atol=1e-9)


def test_point_keeps_its_spin():
    env = make_env("PointMaze-U")
    at_rest(env)
    env.data.qvel[2] = 0.2
    for _ in range(500):
        obs = env.step(np.zeros(2))[0]["observation"]
    # 500 * 0.02 s * 0.2 rad/s; envs.md's 2.16 is with a sideways slide, which the arrow turns into spin
    assert obs[2] == pytest.approx(1.9994, abs=2e-3) and obs[5] > 0.15


def test_point_is_gymnasiums():
    """Contacts and masses of its file, unlike the ant's; places within 100 m."""
    env = make_env("PointMaze-U")
    np.testing.assert_array_equal(env.model.geom_margin, 0)
    np.testing.assert_allclose(env.model.geom_solimp[:, :3], [[0.9, 0.95, 0.001]] * env.model.ngeom)
    assert env.model.body_mass.sum() == pytest.approx(56.36, abs=0.01)
    at_rest(env, (99.9, 0))
    assert env.step(np.array([1.0, 0.0]))[0]["achieved_goal"].tolist() == [100, 0]


@pytest.mark.parametrize("env_id", [name for name in IDS if name != "AntMaze-Bottleneck"])
def test_friction_is_the_default(env_id):
    model = make_env(env_id).model
    np.testing.assert_allclose(model.geom_friction, [[1, 0.5, 0.5]] * model.ngeom)


@pytest.mark.parametrize("env_id", IDS)
def test_only_w_and_bottleneck_start_exactly(env_id):
    env = make_env(env_id)
    xy = np.array([env.reset(seed=seed)[0]["observation"][:2] for seed in range(30)])
    off = np.abs(xy[:, None] - np.array(env.maze.starts)).max(-1).min(-1)
    assert off.max() <= 0.1 and (off.max() == 0) == (env_id in ("AntMaze-W", "AntMaze-Bottleneck"))


@pytest.mark.parametrize("env_id", ["AntMaze-U", "AntGather", "PointMaze-U"])
@pytest.mark.parametrize("before", [0, 3])
def test_a_simulation_that_diverges(env_id, before, tmp_path, monkeypatch):
    """MuJoCo would put the robot back to its start and go on."""
    monkeypatch.chdir(tmp_path)  # MUJOCO_LOG.TXT
    env = make_env(env_id)
    env.reset(seed=0)
    for _ in range(before):
        env.step(np.zeros(env.action_space.shape))
    env.data.qvel[:] = 1e12
    with pytest.raises(FloatingPointError, match=f"{env_id}: the simulation diverged in step {before + 1}"):
        env.step(np.zeros(env.action_space.shape))


# ------------------------------------------------------------------------------------ mazes of one's own


def maze_of(monkeypatch, rows, kind="ant", **columns):
    monkeypatch.setitem(MAZES, "Mine", rows)
    goals, columns = Uniform((-2, -2), (2, 2)), dict(kind=kind, **columns)
    columns |= {"action_limit": 1} if kind == "point" else {}
    monkeypatch.setitem(SPECS, "Mine", common_envs.EnvSpec("Mine", "Mine", 4, goals, ((0, 0),), 1, **columns))
    return make_env("Mine")


def test_several_starts(monkeypatch):
    env = maze_of(monkeypatch, ["#####", "#S.S#", "#####"])
    starts = [tuple(env.reset(seed=seed)[0]["observation"][:2].tolist()) for seed in range(40)]
    assert set(starts) == {(0, 0), (8, 0)} and 8 < starts.count((0, 0)) < 32


@pytest.mark.parametrize("kind, size", [("ant", 15), ("point", 3)])
def test_two_blocks(monkeypatch, kind, size):
    env = maze_of(monkeypatch, ["########", "#S.X..X#", "########"], kind)
    env.reset(seed=0)
    env.data.qpos[size : size + 4] = 0.5, 0, -0.5, 0
    env.step(np.zeros(env.action_space.shape))
    np.testing.assert_allclose(env.data.qpos[size : size + 4], (0.5, 0, -0.5, 0), atol=0.05)


def test_point_beside_a_chasm_stands_on_the_platform(monkeypatch):
    env = maze_of(monkeypatch, ["####", "#So#", "####"], "point")
    env.reset(seed=0)
    height = make_env("PointMaze-U").model.body("torso").pos[2]
    assert env.data.body("torso").xpos[2] == pytest.approx(2 + height)


@pytest.mark.parametrize(
    "rows", [["###", "#.#", "###"], ["####", "#Sx#", "####"], ["####", "S..#", "#..#", "#"]]
)
def test_maps_that_make_no_maze(rows):
    with pytest.raises(ValueError, match="needs an S, only the marks"):
        Maze(rows, 4)


# ----------------------------------------------------------------------------------------------- mazes


@pytest.mark.parametrize(
    "env_id, inside, outside",
    [
        ("AntMaze-ULarge", [(0, 8), (8, 8), (12, 8), (20, 20), (-4, 0), (0, 4)],
         [(0, 0), (12.01, 8), (16, 8), (0, 16), (19.99, 19.99), (0, 3.99), (0, 12.01)]),
        ("AntMaze-U", [(4, 4), (6, 4), (-2, 0), (0, 2)],
         [(0, 8), (6.01, 4), (8, 4), (0, 1.99), (9.99, 9.99)]),
        ("AntMaze-W", [(2, 9), (10, 4)], [(2, 7), (2, 8.99), (12, 4), (0, 6)]),
        ("AntPush", [(16, 8)], [(0, 19), (8, 8), (-8, 0), (0, 8)]),
        ("AntFall", [(-8, 0)], [(8, 0), (0, 16), (0, 27)]),
        ("AntFourRooms", [(10, 0), (12, 12)], [(20, 0), (0, 20), (20, 20), (10, 2), (10, 4)]),
        ("AntMaze-Complex", [(-1, 0), (0, 2), (6, 4)], [(10, 2), (4, 12), (10, 12), (4, 8)]),
    ],
)  # fmt: skip
def test_in_wall(env_id, inside, outside):
    maze = make_env(env_id).maze
    assert [point for point in inside if not maze.in_wall(*point)] == []
    assert [point for point in outside if maze.in_wall(*point)] == []


def test_noise_that_leads_into_a_wall():
    """The noise on x and y comes first, the collision rule after it: nobody ends inside a wall."""
    env = make_env("AntMaze-UStochastic")
    env.reset(seed=0)
    scripted(env, lambda step: (0.0, 1.99))  # the wall begins at y = 2, 0.2 standard deviations away
    positions = [env.step(np.zeros(8))[0]["achieved_goal"].tolist() for _ in range(50)]
    assert not any(env.maze.in_wall(*position) for position in positions)
    stayed = sum(a == b for a, b in zip(positions, positions[1:]))
    assert 5 < stayed < 40  # put back to where it was


def test_in_wall_equals_the_definition():
    maze, rng = Maze(MAZES["Complex"], 2), np.random.default_rng(0)
    points = np.concatenate((rng.uniform(-4, 16, (500, 2)), rng.integers(-4, 17, (500, 2))))
    for x, y in points.tolist():
        slow = any(mark == "#" and abs(x - 2 * (col - 1)) <= 1 and abs(y - 2 * (row - 1)) <= 1
                   for row, line in enumerate(MAZES["Complex"]) for col, mark in enumerate(line))  # fmt: skip
        assert maze.in_wall(x, y) == slow


def test_shape_of_the_maps():
    assert {name: (len(rows), len(rows[0])) for name, rows in MAZES.items()} == {
        "U": (5, 5), "Push": (5, 5), "Fall": (6, 4), "W": (10, 10), "Complex": (9, 9), "FourRooms": (13, 13),
        "Open": (1, 1)}  # fmt: skip
    count = {name: sum(row.count(mark) for row in MAZES[name] for mark in "S.") for name in MAZES}
    assert count["W"] == 52 and count["Complex"] == 31
    assert len(Maze(MAZES["W"], 2).starts) == 50


def test_complex_is_connected_with_the_known_distances():
    maze = Maze(MAZES["Complex"], 2)
    free = {maze.centre(row, col) for row, col, mark in maze.cells if mark != "#"}
    distance, frontier = {(0, 0): 0}, [(0, 0)]
    for x, y in frontier:
        for place in ((x + 2, y), (x - 2, y), (x, y + 2), (x, y - 2)):
            if place in free and place not in distance:
                distance[place] = distance[x, y] + 1
                frontier.append(place)
    assert distance.keys() == free
    assert [distance[goal] for goal in ((10, 2), (4, 12), (10, 12), (4, 8))] == [18, 12, 15, 12]


def test_bottleneck_gap():
    model = make_env("AntMaze-Bottleneck").model
    boxes = (model.geom_bodyid == 0) & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
    pos, half = model.geom_pos[boxes], model.geom_size[boxes]

    def blocked(x, y):
        return bool((np.abs(np.array([x, y]) - pos[:, :2]) <= half[:, :2]).all(1).any())

    assert len(pos) == 20  # 18 cells of 4 x 4 and the two slabs
    assert not blocked(7.16, 4) and not blocked(8.74, 4) and blocked(7.14, 4) and blocked(8.76, 4)
    assert blocked(7, 3.51) and not blocked(7, 3.49) and blocked(9.9, 4.49) and not blocked(9.9, 4.51)
    assert blocked(4, 4) and blocked(0, 2.01) and not blocked(0, 0) and not blocked(0, 8)
    np.testing.assert_array_equal(pos[:, 2], 0)
    np.testing.assert_array_equal(half[:, 2], 2)
    np.testing.assert_allclose(model.geom_friction[boxes], [[2, 0.1, 0.002]] * 20)


def test_gather_arena():
    model = make_env("AntGather").model
    walls = (model.geom_bodyid == 0) & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
    boxes = np.column_stack((model.geom_pos[walls], model.geom_size[walls]))
    expected = [
        (0, -11, 0, 11.5, 0.5, 1),
        (0, 11, 0, 11.5, 0.5, 1),
        (-11, 0, 0, 0.5, 11.5, 1),
        (11, 0, 0, 0.5, 11.5, 1),
    ]
    assert sorted(map(tuple, boxes.tolist())) == sorted(expected)


# ------------------------------------------------------------------------ starts, goals, rewards, ends


@pytest.mark.parametrize(
    "env_id, radius, steps, eval_goals",
    [
        ("AntMaze-U", 2.5, 500, [(0, 8)]),
        ("AntMaze-ULarge", 5, 500, [(0, 16)]),
        ("AntMaze-UStochastic", 2.5, 500, [(0, 8)]),
        ("AntMaze-W", 1, 500, [(2, 7)]),
        ("AntMaze-Bottleneck", 2.5, 600, [(0, 8)]),
        ("AntMaze-Complex", 1, 500, [(4, 8), (4, 12), (10, 2), (10, 12)]),
        ("AntPush", 5, 500, [(0, 19)]),
        ("AntPush-Small", 1.5, 500, [(0, 8, 0, 0)]),
        ("AntFall", 5, 500, [(0, 27, 4.5)]),
        ("AntFourRooms", 5, 500, [(0, 20), (20, 0), (20, 20)]),
        ("PointMaze-U", 2.5, 500, [(0, 8)]),
    ],
)
def test_table_and_evaluation_goals(env_id, radius, steps, eval_goals):
    env = make_env(env_id, evaluate=True)
    assert (env.task.success_radius, env.task.max_steps, env.task.id) == (radius, steps, env_id)
    assert env.task.goal_dim == len(eval_goals[0])
    drawn = {tuple(env.reset(seed=seed)[0]["desired_goal"].tolist()) for seed in range(30)}
    assert sorted(drawn) == eval_goals


def training_goals(env_id, n=600, **options):
    env = make_env(env_id, **options)
    return np.array([env.reset(seed=seed)[0]["desired_goal"] for seed in range(n)]), env


@pytest.mark.parametrize(
    "env_id, low, high", [("AntMaze-U", -2, 10), ("AntMaze-ULarge", -4, 20), ("PointMaze-U", -2, 10)]
)
def test_training_goals_fill_the_u_walls_included(env_id, low, high):
    goals, env = training_goals(env_id)
    assert low <= goals.min() < low + 0.3 and high - 0.3 < goals.max() <= high
    assert np.mean([env.maze.in_wall(*goal) for goal in goals]) == pytest.approx(2 / 9, abs=0.06)


def test_an_evaluation_goal_if_no_draw_is_permitted():
    box = Uniform((-3, -3), (-1.5, -1.5), free_only=True)  # all wall
    env = common_envs.AntEnv(dataclasses.replace(SPECS["AntMaze-Complex"], train_goals=box))
    drawn = {tuple(env.reset(seed=seed)[0]["desired_goal"].tolist()) for seed in range(30)}
    assert drawn == set(SPECS["AntMaze-Complex"].eval_goals)
    goals, env = training_goals("AntMaze-Complex", 2000)  # a few draws would not do
    assert not {tuple(goal) for goal in goals.tolist()} & set(env.task.eval_goals)


def test_bottleneck_rejects_goals_in_the_middle():
    goals, _ = training_goals("AntMaze-Bottleneck")
    assert not ((goals[:, 0] < 6) & (goals[:, 1] > 2) & (goals[:, 1] < 6)).any()
    assert ((goals[:, 0] > 6) & (goals[:, 1] > 2) & (goals[:, 1] < 6)).any() and goals.min() < -1.5


def test_complex_draws_goals_in_free_cells():
    goals, env = training_goals("AntMaze-Complex")
    assert not any(env.maze.in_wall(*goal) for goal in goals)
    assert len({(round(x / 2), round(y / 2)) for x, y in goals}) == 31  # every free cell


def test_fixed_and_multi_goals():
    for env_id, goal in (("AntPush", (0, 19)), ("AntFall", (0, 27, 4.5)), ("AntMaze-W", (2, 7))):
        goals, _ = training_goals(env_id, 5)
        np.testing.assert_array_equal(goals, [goal] * 5)
    rooms = {tuple(goal) for goal in training_goals("AntFourRooms", 30)[0].tolist()}
    assert rooms == {(20, 0), (0, 20), (20, 20)}
    single, _ = training_goals("AntPush", 5, multi_goal=True, evaluate=True)
    np.testing.assert_array_equal(single, [(0, 19)] * 5)
    push, _ = training_goals("AntPush", 100, multi_goal=True)
    assert (
        push[:, 0].min() < -12 and push[:, 0].max() > 12 and -4 <= push[:, 1].min() and push[:, 1].max() <= 20
    )
    fall, _ = training_goals("AntFall", 100, multi_goal=True)
    assert 0 <= fall[:, 2].min() and 4 < fall[:, 2].max() <= 5
    with pytest.raises(ValueError, match="multi_goal"):
        make_env("AntMaze-U", multi_goal=True)


def test_start_noise():
    env = make_env("AntPush")
    starts = np.array([env.reset(seed=seed)[0]["observation"] for seed in range(300)])
    offset = starts[:, [0, 1, 2, *range(7, 15)]] - [0, 0, 0.75, *[0] * 8]
    assert (-0.1 <= offset).all() and (offset.min(0) < -0.095).all()  # each entry, x and y too
    assert (offset <= 0.1).all() and (offset.max(0) > 0.095).all()
    assert starts[:, 15:29].std() == pytest.approx(0.1, rel=0.05)
    np.testing.assert_allclose(
        np.linalg.norm(starts[:, 3:7], axis=1), 1, atol=1e-12
    )  # normalised before reading
    assert starts[:, 4:7].std() > 0.04
    np.testing.assert_array_equal(env.data.qpos[15:], 0)
    np.testing.assert_array_equal(env.data.qvel[14:], 0)
    assert make_env("AntFall").reset(seed=0)[0]["observation"][2] == pytest.approx(4.75, abs=0.1)


@pytest.mark.parametrize("evaluate", [False, True])
def test_w_starts_anywhere_but_bottleneck_at_the_origin(evaluate):
    env = make_env("AntMaze-W", evaluate=evaluate)
    starts = {tuple(env.reset(seed=seed)[0]["achieved_goal"].tolist()) for seed in range(500)}
    assert len(starts) == 50 and not {(0, 6), (0, 8)} & starts
    assert {(2, 6), (2, 8), (0, 0), (14, 14)} <= starts
    obs = make_env("AntMaze-Bottleneck", evaluate=evaluate).reset(seed=1)[0]["observation"]
    assert obs[:2].tolist() == [0, 0] and obs[2] != 0.75


def test_goal_option():
    env = make_env("AntMaze-ULarge", evaluate=True)
    obs, _ = env.reset(seed=0, options={"goal": (16, 0)})
    assert obs["desired_goal"].tolist() == [16, 0]
    assert env.reset(seed=0)[0]["desired_goal"].tolist() == [0, 16]
    with pytest.raises(ValueError, match=r"shape \(3,\).*AntMaze-ULarge needs \(2,\)"):
        env.reset(options={"goal": (1, 2, 3)})


@pytest.mark.parametrize(
    "env_id, reward, achieved, goal, expected",
    [
        ("AntMaze-ULarge", "dense", (0, 0), (0, 16), -16),
        ("AntMaze-U", "dense", (0, 0), (0, 8), -8),
        ("AntMaze-U", "sparse", (0, 0), (0, 8), -1),
        ("AntPush", "dense", (0, 0), (0, 19), -19),
        ("AntPush-Small", "dense", (3, 4, 70, 80), (0, 8, 0, 0), -5),  # the block's place does not count
        ("AntFall", "dense", (0, 0, 4.75), (0, 27, 4.5), -27.0012),
        ("AntFourRooms", "dense", (0, 0), (20, 20), -28.2843),
        ("PointMaze-U", "dense", (0, 0), (0, 8), -8),
    ],
)
def test_reward_values(env_id, reward, achieved, goal, expected):
    env = make_env(env_id, reward=reward)
    assert env.compute_reward(np.array(achieved), np.array(goal)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("env_id", BOTH)
def test_threshold_is_a_success_for_sparse_only(env_id):
    radius, n = SPECS[env_id].success_radius, SPECS[env_id].goal_dim
    goal, at, beyond = np.zeros(n), np.zeros(n), np.zeros(n)
    at[0], beyond[0] = radius, radius + 1e-6
    sparse, dense = make_env(env_id, "sparse"), make_env(env_id)
    assert sparse.compute_reward(at, goal) == 0 and sparse.is_success(at, goal)
    assert sparse.compute_reward(beyond, goal) == -1 and not sparse.is_success(beyond, goal)
    assert dense.is_success(at, goal) == (env_id == "AntMaze-Bottleneck")
    assert dense.is_success(at * 0.999, goal) and not dense.is_success(beyond, goal)


@pytest.mark.parametrize("env_id", IDS)
def test_rewards_of_steps_equal_the_batched_pure_functions(env_id):
    for reward in SPECS[env_id].rewards:
        env = make_env(env_id, reward=reward)
        env.reset(seed=0, options=None if env_id == "AntGather" else {"goal": [0.5] * env.task.goal_dim})
        env.action_space.seed(0)
        achieved, desired, rewards, infos = [], [], [], []
        for _ in range(20):
            obs, value, _, _, info = env.step(env.action_space.sample())
            assert isinstance(value, float) and isinstance(info["is_success"], bool)
            np.testing.assert_array_equal(
                obs["achieved_goal"], obs["observation"][: len(obs["achieved_goal"])]
            )
            achieved.append(obs["achieved_goal"])
            desired.append(obs["desired_goal"])
            rewards.append(value)
            infos.append(info)
        achieved, desired = np.array(achieved), np.array(desired)
        before = achieved.copy()
        np.testing.assert_array_equal(env.compute_reward(achieved, desired, infos), rewards)
        assert env.is_success(achieved, desired).tolist() == [info["is_success"] for info in infos]
        assert env.compute_reward(achieved[3], desired[3], infos[3]) == rewards[3]
        np.testing.assert_array_equal(achieved, before)


def test_reward_names():
    assert make_env("AntMaze-U").reward == "dense" and make_env("AntGather").reward == "pickup"
    for env_id in BOTH:
        assert SPECS[env_id].rewards == ("dense", "sparse")
    for env_id, has in (
        ("AntPush", "dense"),
        ("AntFall", "dense"),
        ("AntFourRooms", "dense"),
        ("AntGather", "pickup"),
    ):
        with pytest.raises(ValueError, match=f"{env_id} has no reward 'sparse'; it has: {has}$"):
            make_env(env_id, reward="sparse")


@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_w_stops_at_the_step_of_ten_after_a_success(reward):
    near, far = (2.0, 7.5), (12.0, 4.0)
    env = make_env("AntMaze-W", reward=reward)
    env.reset(seed=0)
    scripted(env, lambda t: near if t == 20 else far)  # the step of the check counts, too
    assert run_to_end(env) == (20, True, False)
    for _ in range(2):  # the flag is cleared by reset
        env.reset(seed=0)
        scripted(env, lambda t: near if t == 13 else far)
        assert run_to_end(env) == (20, True, False)
    env = make_env("AntMaze-W", evaluate=True)
    env.reset(seed=0)
    scripted(env, lambda t: near if t == 13 else far)
    assert run_to_end(env) == (500, False, True)


def test_bottleneck_stops_when_inside_at_a_step_of_ten():
    near, far = (0.0, 8.0), (0.0, 0.0)
    env = make_env("AntMaze-Bottleneck")
    env.reset(seed=0, options={"goal": near})
    scripted(env, lambda t: near if t in (13, 29, 30) else far)
    assert run_to_end(env) == (30, True, False)
    env = make_env("AntMaze-Bottleneck", evaluate=True)
    env.reset(seed=0)
    scripted(env, lambda t: near)
    assert run_to_end(env) == (600, False, True)


@pytest.mark.parametrize("env_id", ["AntMaze-U", "AntPush", "PointMaze-U"])
def test_other_tasks_do_not_stop_at_a_success(env_id):
    env = make_env(env_id)
    obs, _ = env.reset(seed=0)
    scripted(env, lambda t: obs["desired_goal"][:2])
    env.maze.walls = frozenset()
    assert env.step(np.zeros(env.action_space.shape))[4]["is_success"]
    assert run_to_end(env) == (500, False, True)


def test_upside_down_and_height():
    env = make_env("AntMaze-U")
    at_rest(env)
    env.data.qpos[2:7] = 0.4, 0, 1, 0, 0  # half a turn about x
    info = env.step(np.zeros(8))[4]
    assert info["upside_down"] is True and info["torso_height"] == env.data.qpos[2] < 0.4
    for _ in range(60):
        info = env.step(np.zeros(8))[4]
    assert info["upside_down"] and info["torso_height"] == pytest.approx(0.257, abs=0.01)
    at_rest(env)
    assert env.step(np.zeros(8))[4]["upside_down"] is False


@pytest.mark.parametrize("axis", [(1, 0), (0, 1), (0.6, 0.8), (0.8, -0.6)])
@pytest.mark.parametrize("turn, answer", [(0, False), (80, False), (100, True), (180, True), (-100, True)])
def test_upside_down_about_any_axis(axis, turn, answer):
    env, half = make_env("AntMaze-U"), math.radians(turn) / 2
    at_rest(env)
    for heading in (0.0, 1.0):  # turned about z first, which changes nothing
        w, z = math.cos(heading / 2), math.sin(heading / 2)
        i, j = math.sin(half) * axis[0], math.sin(half) * axis[1]
        env.data.qpos[3:7] = w * math.cos(half), w * i + z * j, w * j - z * i, z * math.cos(half)
        assert env._info(False)["upside_down"] is answer


def test_gather_sensors_of_a_tilted_ant():
    """Ahead is where the body's x axis points, seen from above: rolled, pitched and turned."""
    env = make_env("AntGather")
    at_rest(env)
    for heading, pitch, roll in ((1.0, 0.6, 0.4), (-2.0, 0.5, -0.6), (0.3, -0.7, 0.5)):
        quaternion = np.array([1.0, 0, 0, 0])
        for angle, axis in ((heading, (0, 0, 1)), (pitch, (0, 1, 0)), (roll, (1, 0, 0))):
            turn, product = np.zeros(4), np.zeros(4)
            mujoco.mju_axisAngle2Quat(turn, np.array(axis, np.float64), angle)
            mujoco.mju_mulQuat(product, quaternion, turn)
            quaternion = product
        env.data.qpos[:2], env.data.qpos[3:7] = 0, quaternion
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, quaternion)
        ahead = math.atan2(matrix[3], matrix[0])  # of the first column, the body's x axis
        for side, index in ((0.01, 5), (-0.01, 4)):
            angle = ahead + side
            env.objects = np.array([[2 * math.cos(angle), 2 * math.sin(angle), 1]])
            assert env.sense()[index] == pytest.approx(0.6667, abs=1e-4)


# ----------------------------------------------------------------------------- observations and spaces


@pytest.mark.parametrize(
    "env_id, size",
    [(name, 30) for name in IDS if name.startswith("AntMaze") and name != "AntMaze-Bottleneck"]
    + [("AntMaze-Bottleneck", 29), ("AntPush", 30), ("AntPush-Small", 36), ("AntFall", 30),
       ("AntFourRooms", 30), ("AntGather", 50), ("PointMaze-U", 7)],
)  # fmt: skip
def test_observation_size_and_time(env_id, size):
    env = make_env(env_id, evaluate=True)
    obs, _ = env.reset(seed=0)
    assert obs["observation"].shape == (size,) and obs["observation"].dtype == np.float64
    assert (obs["observation"][-1] == 0) == (env_id not in ("AntMaze-Bottleneck", "AntPush-Small"))
    if obs["observation"][-1] == 0:
        env.steps = 499
        obs, _, _, truncated, _ = env.step(np.zeros(env.action_space.shape))
        assert obs["observation"][-1] == 0.5 and truncated


def test_push_small_observation():
    env = make_env("AntPush-Small")
    env.reset(seed=0)
    env.data.qpos[15:] = 0.5, -0.25
    obs, q, v = env._dict_observation(), env.data.qpos, env.data.qvel
    expected = [*q[:2], 0.5, 3.75, *q[:3], 0.5, 3.75, 1.0, *q[3:15], *v[:14]]
    np.testing.assert_array_equal(obs["observation"], expected)
    np.testing.assert_array_equal(obs["achieved_goal"], [*q[:2], 0.5, 3.75])
    assert env.action_space.high.tolist() == [16] * 8


def test_action_spaces():
    for env_id in IDS:
        space = make_env(env_id).action_space
        limit = {"PointMaze-U": 1, "AntPush-Small": 16}.get(env_id, 30)
        assert space.shape == ((2,) if env_id == "PointMaze-U" else (8,)) and space.dtype == np.float32
        np.testing.assert_array_equal(space.high, limit)
        np.testing.assert_array_equal(space.low, -limit)


# ---------------------------------------------------------------------------------------------- gather


def gather_with(objects, heading=0.0, xy=(0.0, 0.0)):
    env = make_env("AntGather")
    at_rest(env, xy)
    env.data.qpos[3:7] = math.cos(heading / 2), 0, 0, math.sin(heading / 2)
    env.objects = np.array(objects, np.float64).reshape(-1, 3)
    return env


@pytest.mark.parametrize(
    "place, index, value",
    [
        ((2, 0), 5, 0.6667),
        ((0, 2), 7, 0.6667),
        ((0, -2), 2, 0.6667),
        ((2, 2), 6, 0.5286),
        ((-2, 2), 8, 0.5286),
        ((-2, -2), 1, 0.5286),
        ((4, 0), 5, 0.3333),
        ((-4, 0), 9, 0.3333),  # an angle of exactly pi belongs to the last bin
        ((6, 0), 5, 0.0),
        ((6.1, 0), None, 0.0),
    ],
)
def test_gather_sensor(place, index, value):
    expected = np.zeros(10)
    if index is not None:
        expected[index] = value
    for sign, apples, bombs in ((1, expected, np.zeros(10)), (-1, np.zeros(10), expected)):
        readings = gather_with([(*place, sign)]).sense()
        np.testing.assert_allclose(readings, [*apples, *bombs], atol=1e-4)


def test_gather_sensor_turns_with_the_ant_and_shows_the_nearest():
    readings = gather_with([(4, 0, 1), (2, 0, 1), (5, 0.1, 1)]).sense()
    assert readings[5] == pytest.approx(0.6667, abs=1e-4) and readings.sum() == readings[5]
    readings = gather_with([(0, 2, 1)], heading=math.pi / 2 - 0.01).sense()
    assert readings[5] == pytest.approx(0.6667, abs=1e-4)
    readings = gather_with([(-2, -0.5, -1)], heading=3.0, xy=(0, -0.5)).sense()
    assert readings[15] == pytest.approx(0.6667, abs=1e-4)  # pi - 3 = 0.14 to the left of the heading


def test_gather_layout():
    env, seen = make_env("AntGather"), set()
    for seed in range(60):
        env.reset(seed=seed)
        places = [tuple(place) for place in env.objects[:, :2].tolist()]
        assert len(set(places)) == 16 and env.objects[:, 2].tolist() == [1] * 8 + [-1] * 8
        seen |= set(places)
    assert seen == {(x, y) for x in range(-10, 9, 2) for y in range(-10, 9, 2)} - {(0, 0)}  # 99 places


def test_gather_pickup_and_end():
    env = gather_with([(0.5, 0, 1), (0, -0.5, 1), (-0.6, 0, -1), (5, 5, 1), (1.5, 0, -1)])
    obs, reward, terminated, _, info = env.step(np.zeros(8))
    assert reward == info["pickup"] == 1.0 and not terminated and info["is_success"] is False
    assert env.objects.tolist() == [[5, 5, 1], [1.5, 0, -1]]
    assert obs["observation"][29:39].max() == 0 and obs["observation"][39:49].max() > 0.7
    env.objects = np.array([(0.1, 0, -1)])
    _, reward, terminated, truncated, info = env.step(np.zeros(8))
    assert reward == -1.0 and terminated and not truncated and len(env.objects) == 0
    assert info["dead"] is False  # all taken


def test_gather_pickup_radius_and_end_in_evaluation():
    env = gather_with([(0.99, 0, 1), (0, 1.01, -1), (5, 5, 1)])
    assert env.step(np.zeros(8))[1] == 1.0 and len(env.objects) == 2
    env.evaluate, env.objects = True, np.array([(0.1, 0, 1.0)])
    assert env.step(np.zeros(8))[2]


GATHER_HEIGHTS = [(0.29, True), (0.299, True), (0.301, False), (0.999, False), (1.001, True), (1.2, True)]


@pytest.mark.parametrize("z, dead", GATHER_HEIGHTS)
def test_gather_death_pays_nothing(z, dead):
    env = gather_with([(0.5, 0, 1), (5, 5, 1)])
    without_contacts(env)  # let it float at that height
    env.model.opt.gravity[:] = 0
    env.data.qpos[2] = z
    env.data.qpos[7:] = 0, 1, 0, -1, 0, -1, 0, 1  # joints within their limits
    _, reward, terminated, _, info = env.step(np.zeros(8))
    assert info["torso_height"] == pytest.approx(z, abs=0.02)
    assert (terminated, reward, info["dead"]) == ((True, 0.0, True) if dead else (False, 1.0, False))


def test_sparse_reward_of_one_pair_is_a_number():
    env = make_env("AntMaze-U", reward="sparse")
    reward = env.compute_reward(np.array([0.0, 8.0]), np.array([0.0, 7.0]), {})
    assert np.ndim(reward) == 0 and not isinstance(reward, np.ndarray) and float(reward) == 0.0


def test_gather_compute_reward():
    env = make_env("AntGather")
    infos = [{"pickup": 1.0}, {"pickup": -2.0}]
    assert env.compute_reward(np.zeros(2), np.zeros(0), infos[1]) == -2
    assert env.compute_reward(np.zeros((2, 2)), np.zeros((2, 0)), infos).tolist() == [1, -2]
    with pytest.raises(ValueError, match="info"):
        env.compute_reward(np.zeros(2), np.zeros(0))


# ------------------------------------------------------------------ interface, seeds, states, pictures


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore:.*(infinity|spec).*")
def test_gymnasium_checker(env_id):
    for evaluate in (False, True):
        check_env(make_env(env_id, evaluate=evaluate), skip_render_check=True)


@pytest.mark.parametrize("env_id", IDS)
def test_gym_make_and_make_env_agree(env_id):
    first, second = gym.make(f"{env_id}-v0"), make_env(env_id)
    assert first.unwrapped.task is SPECS[env_id] and type(first.unwrapped) is type(second)
    assert first.spec.max_episode_steps is None
    second.action_space.seed(0)
    for env in (first, second):
        assert isinstance(env.unwrapped.model, mujoco.MjModel) and isinstance(
            env.unwrapped.data, mujoco.MjData
        )
    a, b = first.reset(seed=7)[0], second.reset(seed=7)[0]
    for _ in range(15):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
        action = second.action_space.sample()
        (a, *rest_a), (b, *rest_b) = first.step(action), second.step(action)
        assert rest_a == rest_b
    other = second.reset(seed=8)[0]["observation"]
    assert not np.array_equal(other, second.reset(seed=7)[0]["observation"])


def test_unknown_id_names_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown environment 'AntMaze'; known: AntMaze-U, .*PointMaze-U"
    ) as error:
        make_env("AntMaze")
    assert "\n" not in str(error.value) and sorted(IDS) == sorted(SPECS)


def test_repeated_import_is_harmless():
    code = """import gymnasium, importlib, common_envs
before = dict(gymnasium.registry)
importlib.reload(common_envs)
assert gymnasium.registry == before and "AntMaze-U-v0" in before"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


def test_global_random_generators_are_left_alone():
    np.random.seed(0)
    expected = np.random.RandomState(0).rand()
    env = make_env("AntMaze-UStochastic")
    env.reset(seed=1)
    env.step(np.zeros(8))
    assert np.random.rand() == expected


def is_plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return type(value) in (int, float, str, bool, np.ndarray)


def rollout(env, steps, seed):
    env.action_space.seed(seed)
    trace = []
    for _ in range(steps):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        trace.append(
            (obs["observation"].tolist(), obs["desired_goal"].tolist(), reward, terminated, truncated, info)
        )
    return trace


@pytest.mark.parametrize("env_id", IDS)
def test_restored_state_continues_bit_for_bit(env_id):
    env = make_env(env_id)
    env.reset(seed=5)
    rollout(env, 12, seed=1)
    env.reached = True  # W: the early stop is pending
    state = env.get_state()
    assert is_plain(state)
    first_obs = env._dict_observation()

    def continuation(env):
        return rollout(env, 15, seed=2), env.reset()[0]["observation"].tolist(), rollout(env, 5, seed=3)

    expected = continuation(env)
    if env_id == "AntMaze-W":
        assert [step[3] for step in expected[0]].index(True) == 7  # 12 + 8 = 20
    fresh = make_env(env_id)
    used = make_env(env_id)
    used.reset(seed=99)
    rollout(used, 3, seed=0)
    for other in (fresh, used, env):
        obs = other.set_state(state)
        for key in obs:
            np.testing.assert_array_equal(obs[key], first_obs[key])
        assert continuation(other) == expected


def test_state_of_another_task_is_refused():
    env = make_env("AntMaze-U")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="AntMaze-U does not fit AntPush"):
        make_env("AntPush").set_state(env.get_state())


class Swimmer(common_envs.AntEnv):
    xml, robot_nq, robot_nv, is_gymnasium_ant = "swimmer.xml", 5, 5, False


@pytest.mark.parametrize(
    "robot, changes, reason",
    [
        (common_envs.AntEnv, dict(action_limit=31.0), "beyond ant.xml's ctrlrange"),
        (common_envs.PointEnv, dict(kind="point"), "action_limit 30.0 is beyond point.xml's ctrlrange"),
        (common_envs.AntEnv, dict(eval_goals=((0, 8), (0, 4))), "no way leads to the goal .0, 4."),
        (common_envs.AntEnv, dict(eval_goals=((120, 160),)), "no way leads to the goal .120, 160."),
        (common_envs.AntEnv, dict(train_goals=((8, 0), (4, 4))), "no way leads to the goal .4, 4."),
        (common_envs.AntEnv, dict(train_goals=Uniform((-2, -2), (10, 15))), "not all inside the map"),
        (Swimmer, dict(), "action_limit 30.0 is beyond swimmer.xml's ctrlrange"),
        (Swimmer, dict(action_limit=1.0), "swimmer.xml would walk through walls"),
        (type("Bare", (Swimmer,), dict(robot_nq=15)), dict(), "swimmer.xml has nq 5 and nv 5: set robot_nq"),
        (type("Bare", (Swimmer,), dict(robot_nv=14)), dict(), "swimmer.xml has nq 5 and nv 5: set robot_nq"),
    ],
)
def test_a_robot_or_row_that_would_fail_silently_is_refused(robot, changes, reason):
    with pytest.raises(ValueError, match=reason):
        robot(dataclasses.replace(SPECS["AntMaze-U"], **changes))


def test_what_a_way_leads_to():
    """Cells of 4 m, the start at (0, 0): a room behind a wall, and no map at all, are out of reach."""
    maze = Maze(["######", "#S.#.#", "######"], 4)
    assert [maze.reachable(x, 0) for x in (0, 5.9, 6, 8, 12, 100)] == [True, True, False, False, False, False]
    assert [list(corner) for corner in maze.corners()] == [[-6, -6], [18, 6]]


def test_the_ants_physics_do_not_hang_on_a_file_name(tmp_path):
    """A copy of ant.xml by another name is the same ant; a robot of one's own keeps its file's settings."""
    copy = type("Copy", (common_envs.AntEnv,), dict(xml=str(tmp_path / "long_ant.xml")))
    (tmp_path / "long_ant.xml").write_text((common_envs.ASSETS / "ant.xml").read_text())
    same, task = copy(SPECS["AntMaze-U"]), dataclasses.replace(SPECS["AntMaze-U"], action_limit=1.0)
    assert same.model.opt.timestep == 0.02 and same.model.actuator_ctrlrange[0, 1] == 30
    other = type("Other", (copy,), dict(is_gymnasium_ant=False))(task)
    assert other.model.opt.timestep == 0.01 and other.model.actuator_ctrlrange[0, 1] == 1


def test_what_check_robot_lets_pass(tmp_path):
    """A subclass of the point robot under a kind of its own; motors without a limit."""
    point = dataclasses.replace(SPECS["PointMaze-U"], kind="mine")
    type("Mine", (common_envs.PointEnv,), {})(point).reset(seed=0)
    text = (common_envs.ASSETS / "ant.xml").read_text()
    assert 'ctrllimited="true"' in text
    (tmp_path / "free.xml").write_text(text.replace('ctrllimited="true"', 'ctrllimited="false"'))
    free = type("Free", (common_envs.AntEnv,), dict(xml=str(tmp_path / "free.xml"), is_gymnasium_ant=False))
    free(dataclasses.replace(SPECS["AntMaze-U"], action_limit=5.0)).reset(seed=0)


def has_gl():
    """Of MuJoCo alone: a fault of ours must not look like a missing library."""
    code = """import common_envs, mujoco
mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16)"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_pictures():
    if not has_gl():
        pytest.skip("no OpenGL on this machine")
    for env_id in ("AntMaze-U", "AntGather", "AntFall"):
        env = make_env(env_id, render_mode="rgb_array", width=200, height=160)
        twin = make_env(env_id)
        env.reset(seed=0)
        twin.reset(seed=0)
        assert env._renderer is None  # made by the first render() only
        env.step(np.zeros(8))
        twin.step(np.zeros(8))
        picture = env.render()
        assert picture.shape == (160, 200, 3) and picture.dtype == np.uint8 and picture.std() > 10
        env.markers = [dict(pos=(0, 0, 3), size=1.5, rgba=(0, 0, 1, 1))]
        assert (env.render() != picture).any()
        for _ in range(5):  # looking does not disturb the physics
            a, b = env.step(np.ones(8))[0]["observation"], twin.step(np.ones(8))[0]["observation"]
            env.render()
            np.testing.assert_array_equal(a, b)
        env.close()
        env.close()


def test_gym_make_knows_the_render_modes():
    """Gymnasium's own "rgb_array_list" collects what "rgb_array" draws; nothing is drawn here."""
    env = gym.make("AntMaze-U-v0", render_mode="rgb_array_list")
    assert env.render_mode == "rgb_array_list" and env.unwrapped.render_mode == "rgb_array"


def test_no_renderer_without_render_mode():
    env = make_env("AntMaze-U")
    env.reset(seed=0)
    env.step(np.zeros(8))
    assert env.render() is None and env._renderer is None and env._viewer is None
    with pytest.raises(ValueError, match="render_mode 'rgb'"):
        make_env("AntMaze-U", render_mode="rgb")


@pytest.mark.skipif(sys.platform != "linux", reason="the rule is for Linux")
def test_human_mode_without_display_says_so(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(RuntimeError, match="needs a display"):
        make_env("AntMaze-U", render_mode="human").reset(seed=0)


@pytest.mark.skipif(sys.platform != "linux", reason="the rule is for Linux")
def test_gl_choice_respects_the_user():
    code = "import common_envs, os; print(os.environ.get('MUJOCO_GL'))"
    for given in ({"MUJOCO_GL": "off"}, {"DISPLAY": ":0", "MUJOCO_GL": ""}):
        env = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")} | given
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert out.stdout.strip() == given["MUJOCO_GL"], out.stderr


def test_script_prints_a_map_with_the_path():
    out = subprocess.run(
        [sys.executable, "common_envs.py", "PointMaze-U"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert "500 random steps" in out.stdout and "*" in out.stdout and "G" in out.stdout


def test_rows_are_data():
    """The table alone makes an environment: a new row works without touching any other code."""
    row = dataclasses.replace(
        SPECS["AntMaze-U"], id="Mine", train_goals=Uniform((1, 1), (1, 1)), success_radius=9.0
    )
    env = common_envs.ROBOTS[row.kind](row)
    obs, info = env.reset(seed=0)
    assert obs["desired_goal"].tolist() == [1, 1] and info["is_success"]
