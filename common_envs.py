"""The environments of HIRO, CHER, HRAC, HIGL and ACLG+GCMR on current MuJoCo and Gymnasium.

    env = make_env("AntMaze-U")            # or, after `import common_envs`, gymnasium.make("AntMaze-U-v0")
    obs, info = env.reset(seed=0)          # obs: dict of observation, achieved_goal, desired_goal
    obs, reward, terminated, truncated, info = env.step(action)     # info["is_success"] at each step

An environment is one row of SPECS; a maze is a text map in MAZES. Cell side and success radius r in metres.

id                   maze, cell   training goals  evaluation goals             r    steps  reward  source
-------------------  -----------  --------------  ---------------------------  ---  -----  ------  ----------
AntMaze-U            U 4          [-2,10]^2       (0,8)                        2.5  500    d, s    HIGL, GCMR
AntMaze-ULarge       U 8          [-4,20]^2       (0,16)                       5    500    d, s    HIRO, CHER
AntMaze-UStochastic  U 4          [-2,10]^2       (0,8)                        2.5  500    d, s    HIGL, GCMR
AntMaze-W            W 2          (2,7)           (2,7)                        1    500    d, s    HIGL, GCMR
AntMaze-Bottleneck   U 4, slabs   [-2,10]^2 part  (0,8)                        2.5  600    d, s    GCMR
AntMaze-Complex      Complex 2    [-1,13]^2 free  (10,2) (4,12) (10,12) (4,8)  1    500    d, s    GCMR
AntPush              Push 8       (0,19)          (0,19)                       5    500    d       HIRO
AntPush-Small        Push 4       (0,8)           (0,8)                        1.5  500    d, s    GCMR
AntFall              Fall 8       (0,27,4.5)      (0,27,4.5)                   5    500    d       HIRO
AntGather            arena 21x21  -               -                            -    500    pickup  HIRO, CHER
AntFourRooms         FourRooms 2  as evaluation   (20,0) (0,20) (20,20)        5    500    d       CHER
PointMaze-U          U 4          [-2,10]^2       (0,8)                        2.5  500    d, s    HIGL, GCMR

Rewards are those of the state after the step. d, "dense": minus the distance to the goal, success below r; s,
"sparse": 0 up to r, success, and -1 beyond (the sources' comparisons); "pickup": apples minus bombs. Boxes of
training goals include the walls, as in the papers, unless "free".

evaluate=True draws evaluation goals and never stops at a success, so that one can measure it at the last step
(HIRO, CHER) and at any step (HRAC, HIGL, GCMR). In training W and Bottleneck stop early (EnvSpec.early_stop).

    python common_envs.py AntMaze-U        # a random episode: shapes, and the path on the text map
"""

import ctypes
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("MUJOCO_GL") and not os.environ.get("DISPLAY"):
    try:  # MuJoCo reads MUJOCO_GL at import; its default, glfw, cannot render on a machine without a display
        ctypes.CDLL("libEGL.so.1")
        os.environ["MUJOCO_GL"] = "egl"
    except OSError:
        pass  # no EGL library: training works all the same, render() will say what is missing

import gymnasium as gym  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402

# ----------------------------------------------------------------------------------------------------- mazes
# '#' wall, 'S' start cell, '.' free, 'o' chasm, 'X' block that slides in x and y, 'Z' in y and may fall. The
# first S in reading order is the origin of the world; x grows rightward, y DOWN the page. Walls and blocks
# are half a cell high. A new maze is a new column.
MAPS = """
U      Push   Fall  W           Complex    FourRooms      Open
#####  #####  ####  ##########  #########  #############  S
#S..#  #.S##  #S.#  #SSSSSSSS#  #S..#...#  #S....#.....#
###.#  #.X.#  #.Z#  #SSSSSSSS#  ###.#...#  #...........#
#...#  ##.##  #oo#  #######SS#  #...##.##  #...........#
#####  #####  #..#  #.SSSSSSS#  #.###..##  #.....#.....#
              ####  #.SSSSSSS#  #.#.#.###  #.....#.....#
                    #######SS#  #.....#.#  ##..###.....#
                    #SSSSSSSS#  #.#.#...#  #.....###..##
                    #SSSSSSSS#  #########  #.....#.....#
                    ##########             #...........#
                                           #...........#
                                           #.....#.....#
                                           #############
"""


def read_mazes(text):
    header, *rows = text.strip("\n").split("\n")
    columns = [(match.group(), match.start()) for match in re.finditer(r"\S+", header)]
    ends = [start for _, start in columns[1:]] + [None]
    cut = {name: [row[start:end].strip() for row in rows] for (name, start), end in zip(columns, ends)}
    return {name: [row for row in maze if row] for name, maze in cut.items()}


MAZES = read_mazes(MAPS)


class Maze:
    """Where the cells of a text map lie in the world."""

    def __init__(self, rows, cell_size):
        self.rows, self.size = rows, cell_size
        self.cells = [(row, col, mark) for row, line in enumerate(rows) for col, mark in enumerate(line)]
        marks = {mark for _, _, mark in self.cells}
        if "S" not in marks or marks - set("#S.oXZ") or len({len(line) for line in rows}) > 1:
            raise ValueError(f"a maze needs an S, only the marks # S . o X Z, rows of one length: {rows}")
        self.origin = next((row, col) for row, col, mark in self.cells if mark == "S")
        self.starts = [self.centre(row, col) for row, col, mark in self.cells if mark == "S"]
        self.walls = frozenset((row, col) for row, col, mark in self.cells if mark == "#")
        has_chasm = any(mark == "o" for _, _, mark in self.cells)
        self.floor_z = cell_size / 2 if has_chasm else 0.0  # beside a chasm everything stands on platforms

    def centre(self, row, col):
        return (col - self.origin[1]) * self.size, (row - self.origin[0]) * self.size

    def corners(self):
        """Least x, y and largest x, y of the map."""
        half = np.array(self.size / 2)
        return self.centre(0, 0) - half, self.centre(len(self.rows) - 1, len(self.rows[0]) - 1) + half

    def in_wall(self, x, y):
        """Is the point in a wall cell, boundaries included? Blocks, chasms and platforms do not count."""
        u = y / self.size + self.origin[0] + 0.5
        v = x / self.size + self.origin[1] + 0.5
        rows, cols = {math.floor(u), math.ceil(u) - 1}, {math.floor(v), math.ceil(v) - 1}  # two on a boundary
        return any((row, col) in self.walls for row in rows for col in cols)

    def reachable(self, x, y):
        """Does a way lead there from a start? Over all cells but walls; blocks and chasms do not count."""
        free = {(row, col) for row, col, _ in self.cells} - self.walls
        found = [(row, col) for row, col, mark in self.cells if mark == "S"]
        for row, col in found:  # which grows
            beside = ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1))
            found += [cell for cell in beside if cell in free and cell not in found]
        row = math.floor(y / self.size + self.origin[0] + 0.5)
        col = math.floor(x / self.size + self.origin[1] + 0.5)
        return (row, col) in found and not self.in_wall(x, y)

    def draw(self, path=(), goal=()):
        """The text map, 4 x 2 characters per cell, with the visited places '*' and the goal 'G'."""
        canvas = [[mark for mark in line for _ in range(4)] for line in self.rows for _ in range(2)]
        for mark, points in (("*", path), ("G", [goal] if len(goal) else [])):
            for x, y, *_ in points:
                row = math.floor((y / self.size + self.origin[0] + 0.5) * 2)
                col = math.floor((x / self.size + self.origin[1] + 0.5) * 4)
                if 0 <= row < len(canvas) and 0 <= col < len(canvas[0]):
                    canvas[row][col] = mark
        return "\n".join("".join(line) for line in canvas)


# -------------------------------------------------------------------------------------- table of environments
@dataclass(frozen=True)
class Uniform:
    """Goals uniform in the box [low, high], outside `hole` (x0, y0, x1, y1), in free cells only if asked."""

    low: tuple
    high: tuple
    hole: tuple | None = None
    free_only: bool = False


@dataclass(frozen=True)
class EnvSpec:
    id: str
    maze: str  # key of MAZES
    cell: float  # side of a cell, m
    train_goals: Uniform | tuple  # a box, or a tuple of goals drawn with equal chance
    eval_goals: tuple  # drawn with equal chance when evaluate=True
    success_radius: float  # m
    manual_collision: bool = False  # put x, y back when the torso's centre has entered a wall (HIGL, GCMR)
    rewards: tuple = ("dense", "sparse")  # the first is the default
    max_steps: int = 500
    multi_goals: Uniform | None = None  # the training goals of HIRO's "multi" variant, for multi_goal=True
    kind: str = "ant"  # key of ROBOTS
    reward_dims: int = 2  # leading goal entries that count for reward and success
    success_on_radius: bool = False  # distance == radius is a success with the dense reward, too
    early_stop: str = ""  # training ends at a step 10, 20, ..: "reached" after, "inside" during a success
    exact_start: bool = False  # start at the centre of a start cell, no noise on x, y; so with several S
    xy_noise: float = 0.0  # standard deviation of the noise on x, y after each step, m
    observe_time: bool = True
    observe_block: bool = False
    action_limit: float = 30.0  # torque; the motors themselves clamp at 30
    slabs: tuple = ()  # further boxes (x, y, half size in x, half size in y)
    wall_span: tuple | None = None  # (centre z, half height) of walls and slabs, if not the usual
    wall_friction: tuple = (1.0, 0.5, 0.5)

    @property
    def goal_dim(self):
        return len(self.eval_goals[0])


ROOMS = ((20, 0), (0, 20), (20, 20))
U_GOALS, U_LARGE_GOALS = Uniform((-2, -2), (10, 10)), Uniform((-4, -4), (20, 20))
# W: GCMR's goal in a corridor; (2,9) of HIGL and HRAC lies on the face of a wall.
# Bottleneck: the slabs leave a gap of 1.6, x = 7.15 .. 8.75; an ant's feet span about 1.65.
# Gather: four walls, 1 thick, at distance 11 from the origin.
SPECS = {task.id: task for task in (
    EnvSpec("AntMaze-U", "U", 4, U_GOALS, ((0, 8),), 2.5, manual_collision=True),
    EnvSpec("AntMaze-ULarge", "U", 8, U_LARGE_GOALS, ((0, 16),), 5),
    EnvSpec("AntMaze-UStochastic", "U", 4, U_GOALS, ((0, 8),), 2.5, manual_collision=True, xy_noise=0.05),
    EnvSpec("AntMaze-W", "W", 2, ((2, 7),), ((2, 7),), 1, manual_collision=True, exact_start=True,
            early_stop="reached"),
    EnvSpec("AntMaze-Bottleneck", "U", 4, Uniform((-2, -2), (10, 10), hole=(-2, 2, 6, 6)), ((0, 8),), 2.5,
            max_steps=600, exact_start=True, early_stop="inside", success_on_radius=True, observe_time=False,
            wall_span=(0, 2), wall_friction=(2, 0.1, 0.002),
            slabs=((5.25, 4, 1.9, 0.5), (10.25, 4, 1.5, 0.5))),
    EnvSpec("AntMaze-Complex", "Complex", 2, Uniform((-1, -1), (13, 13), free_only=True),
            ((10, 2), (4, 12), (10, 12), (4, 8)), 1, manual_collision=True),
    EnvSpec("AntPush", "Push", 8, ((0, 19),), ((0, 19),), 5, rewards=("dense",),
            multi_goals=Uniform((-16, -4), (16, 20))),
    EnvSpec("AntPush-Small", "Push", 4, ((0, 8, 0, 0),), ((0, 8, 0, 0),), 1.5, manual_collision=True,
            observe_block=True, observe_time=False, action_limit=16),
    EnvSpec("AntFall", "Fall", 8, ((0, 27, 4.5),), ((0, 27, 4.5),), 5, rewards=("dense",), reward_dims=3,
            multi_goals=Uniform((-4, -4, 0), (12, 28, 5))),
    EnvSpec("AntGather", "Open", 20, ((),), ((),), 0, rewards=("pickup",), kind="gather", wall_span=(0, 1),
            slabs=((0, -11, 11.5, 0.5), (0, 11, 11.5, 0.5), (-11, 0, 0.5, 11.5), (11, 0, 0.5, 11.5))),
    EnvSpec("AntFourRooms", "FourRooms", 2, ROOMS, ROOMS, 5, rewards=("dense",)),
    EnvSpec("PointMaze-U", "U", 4, U_GOALS, ((0, 8),), 2.5, manual_collision=True, kind="point",
            action_limit=1),
)}  # fmt: skip

# ---------------------------------------------------------------------------------------------------- physics
STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # qpos, qvel, time, ctrl, the solver's warm start, ...
ASSETS = Path(gym.__file__).parent / "envs" / "mujoco" / "assets"  # Gymnasium's own ant.xml and point.xml
# Movable blocks: mass, scale of the horizontal size, slide axes with their ranges in cells (None: unlimited).
BLOCKS = {
    "X": (0.0002, 1.0, (((1, 0, 0), None), ((0, 1, 0), None))),
    "Z": (0.001, 0.99, (((0, 1, 0), (-1, 1)), ((0, 0, 1), (-0.5, 0)))),
}


NOT_FINITE = tuple(getattr(mujoco.mjtWarning, f"mjWARN_BAD{name}") for name in ("QPOS", "QVEL", "QACC"))


def build_model(task, xml, is_gymnasium_ant):
    """Put the maze around the robot. The sources' ant differs from Gymnasium's in the fields set here."""
    spec, maze = mujoco.MjSpec.from_file(str(ASSETS / xml)), Maze(MAZES[task.maze], task.cell)
    blocks = [cell for cell in maze.cells if cell[2] in BLOCKS]
    spec.geom("floor").rgba = (0.4, 0.45, 0.4, 1)  # colours only
    spec.body("torso").pos[2] += maze.floor_z
    if is_gymnasium_ant:
        spec.option.timestep = 0.02  # 5 of them make the step of 0.1 s
        for motor in spec.actuators:  # Gymnasium: gear 150, controls in [-1, 1]
            motor.gear, motor.ctrlrange = [1, 0, 0, 0, 0, 0], [-30, 30]
        # easy to overlook: the default reaches geoms added later, those of the file have their own copy
        for geom in (spec.default.geom, *spec.geoms):
            # All sources harden the contacts in mazes with a movable block.
            geom.solimp[:3] = (0.995, 0.995, 0.01) if blocks else (0.8, 0.8, 0.01)
            # The sources' margin is 0.01. Since MuJoCo 3.5 a contact adds the margins of both geoms, before
            # it took the larger one. So 0.005 each gives the old contacts back.
            geom.margin = 0.005

    def add_box(body, pos, half_size, **options):
        box = mujoco.mjtGeom.mjGEOM_BOX
        body.add_geom(type=box, pos=pos, size=half_size, contype=1, conaffinity=1, **options)

    half, height = task.cell / 2, task.cell / 4  # half sizes of a wall
    centre_z, wall_height = task.wall_span or (maze.floor_z + height, height)
    wall = dict(rgba=(0.3, 0.35, 0.5, 1), friction=task.wall_friction)
    for row, col, mark in maze.cells:
        x, y = maze.centre(row, col)
        if maze.floor_z and mark != "o":
            add_box(spec.worldbody, (x, y, height), (half, half, height), rgba=(0.5, 0.5, 0.4, 1))
        if mark == "#":
            add_box(spec.worldbody, (x, y, centre_z), (half, half, wall_height), **wall)
    for x, y, half_x, half_y in task.slabs:
        add_box(spec.worldbody, (x, y, centre_z), (half_x, half_y, wall_height), **wall)
    for number, (row, col, mark) in enumerate(blocks):
        mass, scale, axes = BLOCKS[mark]
        place = dict(name=f"block{number or ''}", pos=(*maze.centre(row, col), maze.floor_z + height))
        body = spec.worldbody.add_body(**place)
        add_box(body, (0, 0, 0), (half * scale, half * scale, height), rgba=(0.8, 0.35, 0.2, 1), mass=mass)
        for axis, cells in axes:
            options = dict(armature=0, damping=0, margin=0.01)  # the defaults are those of the ant's hinges
            options |= (
                dict(limited=True, range=[task.cell * n for n in cells]) if cells else dict(limited=False)
            )
            body.add_joint(type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis, **options)
    return spec.compile(), maze


# ----------------------------------------------------------------------------------------------- environments
class AntEnv(gym.Env):
    """An ant in a maze that is to come near a goal. The point robot and the gathering task are subclasses."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 10}
    xml, robot_nq, robot_nv, substeps = "ant.xml", 15, 14, 5
    is_gymnasium_ant = True  # gets the papers' time step, motors and contacts; another robot has its file's

    def __init__(
        self, task, reward=None, evaluate=False, render_mode=None, multi_goal=False, width=480, height=480
    ):
        reward = reward or task.rewards[0]
        if reward not in task.rewards:
            raise ValueError(f"{task.id} has no reward {reward!r}; it has: {', '.join(task.rewards)}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r} is not one of None, 'human', 'rgb_array'")
        if multi_goal and task.multi_goals is None:
            raise ValueError(f"{task.id} has no multi_goal variant")
        self.task, self.reward, self.evaluate, self.render_mode = task, reward, evaluate, render_mode
        self.train_goals = task.multi_goals if multi_goal else task.train_goals
        self.model, self.maze = build_model(task, self.xml, self.is_gymnasium_ant)
        self.check_robot()
        self.data = mujoco.MjData(self.model)
        if task.observe_block:
            self.block_origin = self.model.body("block").pos.copy()
        self.steps, self.reached, self.goal = 0, False, np.zeros(task.goal_dim)
        self.achieved_dim = max(task.goal_dim, 2)  # AntGather has no goal, but a position
        self.success_on_radius = reward == "sparse" or task.success_on_radius
        self.width, self.height = width, height
        self.markers = []  # spheres to draw, e.g. subgoals: dict(pos=(x, y, z), size=, rgba=(r, g, b, a))
        self._renderer = self._viewer = None

        def unbounded(size):
            return gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)

        self.observation_space = gym.spaces.Dict(
            observation=unbounded(len(self._observation())),
            achieved_goal=unbounded(self.achieved_dim),
            desired_goal=unbounded(task.goal_dim),
        )
        limit = task.action_limit
        self.action_space = gym.spaces.Box(-limit, limit, (self.model.nu,), np.float32)

    def check_robot(self):
        """What a robot or a row of your own easily gets wrong, and would not show."""
        model, task = self.model, self.task
        slides = sum(len(BLOCKS[mark][2]) for _, _, mark in self.maze.cells if mark in BLOCKS)
        if (model.nq - slides, model.nv - slides) != (self.robot_nq, self.robot_nv):
            raise ValueError(
                f"{self.xml} has nq {model.nq - slides} and nv {model.nv - slides}: set robot_nq and robot_nv"
            )
        clamped = model.actuator_ctrllimited.astype(bool) & (
            model.actuator_ctrlrange[:, 1] < task.action_limit
        )
        # the point robot moves without its motors, so its turns may be beyond the turning motor's range
        if clamped.all() if isinstance(self, PointEnv) else clamped.any():
            raise ValueError(f"{task.id}: action_limit {task.action_limit} is beyond {self.xml}'s ctrlrange")
        if not (model.geom_contype | model.geom_conaffinity)[model.geom_bodyid > 0].any():
            raise ValueError(f"{self.xml} would walk through walls: give its geoms contype and conaffinity")
        box = task.train_goals if isinstance(task.train_goals, Uniform) else None
        for goal in (*task.eval_goals, *(() if box else task.train_goals)):
            if len(goal) and not self.maze.reachable(*goal[:2]):
                raise ValueError(f"{task.id}: no way leads to the goal {goal}: a wall, or outside the map")
        left_top, right_bottom = self.maze.corners()
        if box and (np.less(box.low[:2], left_top) | np.greater(box.high[:2], right_bottom)).any():
            raise ValueError(f"{task.id}: goals from {box.low} to {box.high} are not all inside the map")

    # -- Gymnasium's interface

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        goal = (options or {}).get("goal")
        needed = (self.task.goal_dim,)
        if goal is not None and np.shape(goal) != needed:
            raise ValueError(f"options['goal'] has shape {np.shape(goal)}, {self.task.id} needs {needed}")
        self.steps, self.reached = 0, False
        mujoco.mj_resetData(self.model, self.data)
        nq, nv = self.robot_nq, self.robot_nv  # the coordinates of a block follow and stay exactly 0
        self.data.qpos[:nq] += self.np_random.uniform(-0.1, 0.1, nq)
        self.data.qvel[:nv] = 0.1 * self.np_random.standard_normal(nv)
        # The noise changes the norm of the root's quaternion. The MuJoCo of the papers normalised it in place
        # before the first observation was read, today's mj_forward does not.
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)
        if self.task.exact_start or len(self.maze.starts) > 1:
            self.data.qpos[:2] = self.maze.starts[self.np_random.integers(len(self.maze.starts))]
        self._start_episode()
        mujoco.mj_forward(self.model, self.data)
        self.goal = np.array(self._draw_goal() if goal is None else goal, np.float64)
        observation = self._dict_observation()
        info = self._info(bool(self.is_success(observation["achieved_goal"], self.goal)))
        if self.render_mode == "human":
            self.render()
        return observation, info

    def step(self, action):
        qpos = self.data.qpos
        x, y = qpos[:2].tolist()
        self._simulate(action)
        self.steps += 1
        if self.task.xy_noise:
            qpos[:2] += self.np_random.normal(0.0, self.task.xy_noise, 2)  # velocities keep their values
        if self.task.manual_collision and self.maze.in_wall(*qpos[:2].tolist()):
            qpos[:2] = x, y  # height, pose and velocities keep their new values
            mujoco.mj_forward(self.model, self.data)
        observation = self._dict_observation()
        reward, terminated, info = self._outcome(observation)
        if self.render_mode == "human":
            self.render()
        return observation, reward, terminated, self.steps >= self.task.max_steps, info

    def compute_reward(self, achieved, desired, info=None):
        """Pure; the last axis holds the goal, any axes before it are batch axes."""
        return self._reward(self._distance(achieved, desired))

    def is_success(self, achieved, desired):
        """Pure; the last axis holds the goal, any axes before it are batch axes."""
        return self._success(self._distance(achieved, desired))

    def _distance(self, achieved, desired):
        n = self.task.reward_dims
        delta = np.asarray(achieved)[..., :n] - np.asarray(desired)[..., :n]
        return np.sqrt((delta * delta).sum(-1))

    def _reward(self, distance):
        if self.reward == "dense":
            return -distance
        return np.where(distance > self.task.success_radius, -1.0, 0.0)[()]  # of a single pair a number

    def _success(self, distance):
        radius = self.task.success_radius
        return distance <= radius if self.success_on_radius else distance < radius

    # -- what differs between the robots and tasks

    def _start_episode(self):
        """Further state of a new episode."""

    def _simulate(self, action):
        self.data.ctrl[:] = action
        self._advance()

    def _advance(self):
        """The physics of a step. MuJoCo starts anew, without a word, from a state that is not finite."""
        before = self.data.time
        mujoco.mj_step(self.model, self.data, self.substeps)
        started = self.steps == 0 and any(self.data.warning[kind].number for kind in NOT_FINITE)
        if started or self.data.time <= before:
            raise FloatingPointError(f"{self.task.id}: the simulation diverged in step {self.steps + 1}")

    def _observation(self):
        qpos, qvel = self.data.qpos, self.data.qvel
        if self.task.observe_block:
            # GCMR: ant x, y, block x, y; then ant x, y, z, block x, y, z, rest of ant
            block = self.block_origin.copy()
            block[:2] += qpos[15:17]
            return np.concatenate((qpos[:2], block[:2], qpos[:3], block, qpos[3:15], qvel[:14]))
        nq, n = self.robot_nq, self.robot_nq + self.robot_nv
        observation = np.empty(n + self.task.observe_time)
        observation[:nq] = qpos[:nq]
        observation[nq:n] = qvel[: self.robot_nv]
        if self.task.observe_time:
            observation[n] = 0.001 * self.steps
        return observation

    def _outcome(self, observation):
        """(reward, terminated, info) of the step that led to `observation`."""
        distance = self._distance(observation["achieved_goal"], self.goal)
        success = bool(self._success(distance))
        self.reached |= success
        terminated = False
        if not self.evaluate and self.steps % 10 == 0:  # the papers' manager_period, whatever the script's
            terminated = {"reached": self.reached, "inside": success}.get(self.task.early_stop, False)
        return float(self._reward(distance)), terminated, self._info(success)

    def _info(self, success):
        _, _, z, w, i, j, k = self.data.qpos[:7].tolist()
        upside_down = w * w + k * k < i * i + j * j  # the body's z axis points down
        return {"is_success": success, "torso_height": z, "upside_down": upside_down, "dead": False}

    def _task_markers(self):
        z = self.goal[2] if self.task.reward_dims == 3 else self.task.cell / 2  # as high as the walls
        return [dict(pos=(*self.goal[:2], z), size=0.15 * self.task.cell, rgba=(0.9, 0.1, 0.1, 0.8))]

    # -- goals

    def _draw_goal(self):
        goals = self.task.eval_goals if self.evaluate else self.train_goals
        if not isinstance(goals, Uniform):
            return goals[self.np_random.integers(len(goals))]
        for _ in range(100):
            goal = self.np_random.uniform(goals.low, goals.high)
            x, y = goal[:2].tolist()
            x0, y0, x1, y1 = goals.hole or (0, 0, 0, 0)
            if not (x0 < x < x1 and y0 < y < y1) and not (goals.free_only and self.maze.in_wall(x, y)):
                return goal
        return self.task.eval_goals[self.np_random.integers(len(self.task.eval_goals))]

    def _dict_observation(self):
        observation = self._observation()
        achieved = observation[: self.achieved_dim].copy()
        return {"observation": observation, "achieved_goal": achieved, "desired_goal": self.goal.copy()}

    # -- checkpoints

    def get_state(self):
        """All that decides the rest of the run, as plain numbers and arrays; qpos and qvel are not enough."""
        physics = np.empty(mujoco.mj_stateSize(self.model, STATE))
        mujoco.mj_getState(self.model, self.data, physics, STATE)
        state = dict(id=self.task.id, steps=self.steps, reached=self.reached, goal=self.goal.copy())
        return {**state, "physics": physics, "np_random": self.np_random.bit_generator.state}

    def set_state(self, state):
        """Continue from get_state(), of this or of another object of the same id; returns the observation."""
        if state["id"] != self.task.id:
            raise ValueError(f"a state of {state['id']} does not fit {self.task.id}")
        self.steps, self.reached = int(state["steps"]), bool(state["reached"])
        self.goal = np.asarray(state["goal"], np.float64).copy()
        self.np_random.bit_generator.state = state["np_random"]
        self._set_physics(state["physics"])
        return self._dict_observation()

    def _set_physics(self, physics):
        mujoco.mj_setState(self.model, self.data, physics, STATE)
        mujoco.mj_forward(self.model, self.data)  # for derived quantities
        mujoco.mj_setState(self.model, self.data, physics, STATE)  # mj_forward may have touched it

    # -- pictures

    def render(self):
        """The maze from above, as an array [height, width, 3] or in a window."""
        if self.render_mode is None:
            return None
        mujoco.mj_kinematics(self.model, self.data)  # positions lag one substep; this moves no state variable
        if self.render_mode == "human":
            return self._show()
        if self._renderer is None:  # the GL context is made at the first picture: training needs none
            offscreen = self.model.vis.global_
            offscreen.offwidth = max(offscreen.offwidth, self.width)
            offscreen.offheight = max(offscreen.offheight, self.height)
            try:
                self._renderer = mujoco.Renderer(self.model, self.height, self.width)
            except Exception as error:  # the type depends on the GL library
                hint = "set MUJOCO_GL=egl (or osmesa) before mujoco is imported and install that library"
                raise RuntimeError(f"cannot render on this machine ({error}); {hint}") from error
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._renderer.scene.flags[flag] = False  # four times as fast where the CPU draws
        camera = mujoco.MjvCamera()
        self._aim(camera)
        self._renderer.update_scene(self.data, camera)
        self._add_markers(self._renderer.scene)
        return self._renderer.render()

    def _show(self):
        if self._viewer is None:
            screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
            if sys.platform == "linux" and not screen:
                raise RuntimeError("render_mode='human' needs a display; without one use 'rgb_array'")
            from mujoco import viewer

            physics = self.get_state()["physics"]
            self._viewer = viewer.launch_passive(self.model, self.data)
            self._set_physics(physics)  # the viewer has called mj_forward
            self._aim(self._viewer.cam)
        with self._viewer.lock():
            self._viewer.user_scn.ngeom = 0
            self._add_markers(self._viewer.user_scn)
        self._viewer.sync()
        time.sleep(1 / self.metadata["render_fps"])  # about real time

    def _aim(self, camera):
        """From the south, steeply down, all boxes of the maze in view."""
        fixed = (self.model.geom_bodyid == 0) & (self.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
        position, half_size = self.model.geom_pos[fixed], self.model.geom_size[fixed]
        low, high = (position - half_size).min(0), (position + half_size).max(0)
        camera.lookat[:] = (low + high) / 2
        camera.distance = 1.35 * (high - low).max()
        camera.azimuth, camera.elevation = 90, -75

    def _add_markers(self, scene):
        sphere, upright = mujoco.mjtGeom.mjGEOM_SPHERE, np.eye(3).ravel()
        for marker in (*self._task_markers(), *self.markers)[: scene.maxgeom - scene.ngeom]:
            pos, rgba = np.array(marker["pos"], np.float64), np.array(marker["rgba"], np.float32)
            size = np.full(3, marker["size"], np.float64)
            mujoco.mjv_initGeom(scene.geoms[scene.ngeom], sphere, size, pos, upright, rgba)
            scene.ngeom += 1

    def close(self):
        for window in (self._renderer, self._viewer):
            if window is not None:
                window.close()
        self._renderer = self._viewer = None


class PointEnv(AntEnv):
    """A ball that turns by action[1] and then moves by 0.2 * action[0] along its heading; no motors.

    HIGL and GCMR let both entries reach 1, hence action_limit; HIRO's 0.25 for the turn is up to the caller.
    """

    metadata = {**AntEnv.metadata, "render_fps": 50}
    xml, robot_nq, robot_nv, substeps = "point.xml", 3, 3, 1
    is_gymnasium_ant = False

    def _simulate(self, action):
        speed, turn = float(action[0]), float(action[1])
        x, y, heading = self.data.qpos[:3].tolist()
        heading += turn
        x, y = x + 0.2 * speed * math.cos(heading), y + 0.2 * speed * math.sin(heading)
        self.data.qpos[:3] = min(max(x, -100.0), 100.0), min(max(y, -100.0), 100.0), heading
        # The velocities of the reset noise and of contacts stay: friction stops x and y, the spin goes on.
        self._advance()

    def _info(self, success):
        return {"is_success": success, "torso_height": 0.5, "upside_down": False, "dead": False}


class GatherEnv(AntEnv):
    """Collect apples (+1), avoid bombs (-1), both seen in ten bins around the ant. No goal, so no success.

    Ends when the torso leaves the heights [0.3, 1] (CHER's; rllab's 0.2 would not notice an ant on its back,
    which rests at 0.257), or when nothing is left.
    """

    kinds, radius, bins, sensor_range, healthy_z = 8, 10, 10, 6.0, (0.3, 1.0)

    def __init__(self, task, **options):
        self.objects = np.zeros((0, 3))  # rows: x, y, +1 apple or -1 bomb
        super().__init__(task, **options)

    def _start_episode(self):
        even = range(-self.radius, self.radius, 2)
        places = np.array([(x, y) for x in even for y in even if x * x + y * y >= 4], np.float64)
        chosen = places[self.np_random.choice(len(places), 2 * self.kinds, replace=False)]
        self.objects = np.column_stack((chosen, np.repeat((1.0, -1.0), self.kinds)))

    def _observation(self):
        ant_and_time = super()._observation()
        return np.concatenate((ant_and_time[:-1], self.sense(), ant_and_time[-1:]))

    def sense(self):
        """Nearness of the next apple in each bin, then of bombs. Bin 5 is ahead, to the left."""
        x, y, _, w, i, j, k = self.data.qpos[:7].tolist()
        heading = math.atan2(2 * (i * j + w * k), 1 - 2 * (j * j + k * k))
        readings = np.zeros(2 * self.bins)
        for object_x, object_y, value in self.objects.tolist():
            dx, dy = object_x - x, object_y - y
            distance = math.hypot(dx, dy)
            if distance <= self.sensor_range:
                angle = (math.atan2(dy, dx) - heading) % (2 * math.pi)
                angle -= 2 * math.pi if angle > math.pi else 0.0
                index = min(int((angle + math.pi) / (2 * math.pi / self.bins)), self.bins - 1)
                index += self.bins if value < 0 else 0
                readings[index] = max(readings[index], 1 - distance / self.sensor_range)
        return readings

    def step(self, action):
        self.pickup, self.dead = 0.0, False
        return super().step(action)

    def _simulate(self, action):
        super()._simulate(action)
        x, y, z = self.data.qpos[:3].tolist()
        low, high = self.healthy_z
        self.dead = not low <= z <= high
        if not self.dead:  # the step of death pays nothing (CHER)
            taken = (self.objects[:, 0] - x) ** 2 + (self.objects[:, 1] - y) ** 2 < 1.0
            if taken.any():
                self.pickup = float(self.objects[taken, 2].sum())
                self.objects = self.objects[~taken]

    def _outcome(self, observation):
        terminated = self.dead or len(self.objects) == 0
        return self.pickup, terminated, {**self._info(False), "dead": self.dead, "pickup": self.pickup}

    def compute_reward(self, achieved, desired, info=None):
        """The reward depends on what was taken, so `info` (or a sequence of them) has to tell."""
        if info is None:
            raise ValueError(f"{self.task.id} has no goal: compute_reward needs the step's info (or a list)")
        return info["pickup"] if isinstance(info, dict) else np.array([each["pickup"] for each in info])

    def is_success(self, achieved, desired):
        return np.zeros(np.shape(achieved)[:-1], bool)

    def get_state(self):
        return {**super().get_state(), "objects": self.objects.copy()}

    def set_state(self, state):
        self.objects = np.asarray(state["objects"], np.float64).copy()
        return super().set_state(state)

    def _task_markers(self):
        colours = {1: (0.1, 0.8, 0.1, 1), -1: (0.9, 0.1, 0.1, 1)}
        return [dict(pos=(x, y, 0.5), size=0.5, rgba=colours[value]) for x, y, value in self.objects.tolist()]


# ----------------------------------------------------------------------------------------------- entry points
ROBOTS = {"ant": AntEnv, "point": PointEnv, "gather": GatherEnv}


def make_env(env_id, reward=None, evaluate=False, render_mode=None, **kwargs):
    """The environment of that row of SPECS; kwargs: multi_goal, width, height."""
    if env_id not in SPECS:
        raise ValueError(f"unknown environment {env_id!r}; known: {', '.join(SPECS)}")
    task = SPECS[env_id]
    return ROBOTS[task.kind](task, reward=reward, evaluate=evaluate, render_mode=render_mode, **kwargs)


make_env.metadata = AntEnv.metadata  # gymnasium.make looks here for render modes, as for "rgb_array_list"

for _id in SPECS:  # no max_episode_steps: the environments count their steps themselves
    if f"{_id}-v0" not in gym.registry:
        gym.register(f"{_id}-v0", entry_point=f"{__name__}:make_env", kwargs={"env_id": _id})


def main():
    env = make_env(sys.argv[1] if len(sys.argv) > 1 else "AntMaze-U")
    obs, _ = env.reset(seed=0)
    env.action_space.seed(0)
    path, total, done = [obs["achieved_goal"]], 0.0, False
    while not done:
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        path.append(obs["achieved_goal"])
        total, done = total + reward, terminated or truncated
    print(
        {name: space.shape for name, space in {**env.observation_space, "action": env.action_space}.items()}
    )
    print(f"{env.task.id}: {env.steps} random steps, return {total:.1f}, goal {env.goal}, {info}")
    print(env.maze.draw(path, env.goal))


if __name__ == "__main__":
    main()
