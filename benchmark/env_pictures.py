"""A picture of each environment for docs/envs.md: docs/pictures/<id>.png.

    python benchmark/env_pictures.py [--env-ids AntFall AntPush] [--out docs/pictures] [--size 320]

Renders offscreen the first state of an evaluation episode, with all evaluation goals. Importing common_envs
chooses EGL where there is no display; set MUJOCO_GL=osmesa for a machine without it. Only the pictures differ
from env.render(): a plain floor, a blue robot, and a camera that leaves most of the outer wall out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common_envs import SPECS, make_env  # isort: skip  # noqa: E402  # before mujoco: it chooses MUJOCO_GL

import mujoco  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from PIL import Image  # noqa: E402

RED = (0.9, 0.1, 0.1, 1)


@dataclass
class Args:
    env_ids: tuple[str, ...] = tuple(SPECS)  # rows of SPECS
    out: Path = ROOT / "docs" / "pictures"  # folder of the pictures
    size: int = 320  # width and height, pixels
    colours: int = 128  # of the palette; fewer make smaller files


def inner_box(env):
    """(low, high) of the cells that are not wall, or of the boxes of a maze without walls."""
    maze = env.maze
    centres = [maze.centre(row, col) for row, col, mark in maze.cells if (row, col) not in maze.walls]
    low, high = np.min(centres, 0) - maze.size / 2, np.max(centres, 0) + maze.size / 2
    if not maze.walls:
        slabs = np.array(env.task.slabs)
        low, high = (slabs[:, :2] - slabs[:, 2:]).min(0), (slabs[:, :2] + slabs[:, 2:]).max(0)
    return low, high


def repaint(env):
    """Colours, and boxes that overlap: where two tops are level, the picture would flicker."""
    model = env.model
    model.geom_matid[model.geom("floor").id] = -1  # without the squares, in which an ant is hard to find
    names = np.array([model.body(body).name for body in model.geom_bodyid])
    model.geom_rgba[(names != "world") & ~np.char.startswith(names, "block")] = (0.1, 0.1, 0.7, 1)
    boxes = np.flatnonzero((model.geom_bodyid == 0) & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX))
    for number in range(len(env.task.slabs)):  # slabs come last
        model.geom_pos[boxes[-1 - number], 2] -= 0.03 * (number + 1)


def picture(env_id, args):
    env = make_env(env_id, evaluate=True, render_mode="rgb_array", width=args.size, height=args.size)
    env.reset(seed=0)
    repaint(env)
    low, high = inner_box(env)
    extent = (high - low).max()

    def aim(camera):
        camera.lookat[:] = *((low + high) / 2), env.maze.floor_z
        camera.distance = 1.5 * extent
        camera.azimuth, camera.elevation = 90, -78

    env._aim = aim
    if env.task.goal_dim:
        z = env.maze.floor_z + 0.025 * extent
        env.markers = [
            dict(pos=(*goal[:2], z), size=0.025 * extent, rgba=RED) for goal in env.task.eval_goals
        ]
        env._task_markers = list  # the goal of this episode is one of them
    image = Image.fromarray(env.render())
    env.close()
    return image.quantize(
        args.colours, method=Image.Quantize.MAXCOVERAGE
    )  # the usual one loses the goal's red


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    for env_id in args.env_ids:
        path = args.out / f"{env_id}.png"
        picture(env_id, args).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1024:.1f} KB", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
