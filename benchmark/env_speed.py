"""What env.step costs on top of the physics: AntMaze-U against a bare loop of mj_step(model, data, nstep=5).

    python benchmark/env_speed.py [--env-id AntMaze-U] [--rounds 20] [--steps 500]

Both loops take the same random actions from the same start, in turns, so that a change of the machine's load
hits both.
"""

import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common_envs import make_env  # noqa: E402


@dataclass
class Args:
    env_id: str = "AntMaze-U"  # a row of SPECS with an ant
    rounds: int = 20  # turns of each loop; the table shows their quartiles
    steps: int = 500  # env steps per turn
    max_ratio: float = 1.25  # the target: time of env.step / time of the bare loop


def time_env(env, actions, seed):
    env.reset(seed=seed)
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    return (time.perf_counter() - start) / len(actions)


def time_bare(env, data, actions, seed):
    env.reset(seed=seed)
    data.qpos[:], data.qvel[:], data.qacc_warmstart[:] = env.data.qpos, env.data.qvel, 0
    model, substeps = env.model, env.substeps
    start = time.perf_counter()
    for action in actions:
        data.ctrl[:] = action
        mujoco.mj_step(model, data, nstep=substeps)
    return (time.perf_counter() - start) / len(actions)


def main(args):
    env = make_env(args.env_id)
    data = mujoco.MjData(env.model)
    env.action_space.seed(0)
    times = []
    for turn in range(args.rounds + 1):  # the first turn warms up
        actions = [env.action_space.sample() for _ in range(args.steps)]
        times.append((time_env(env, actions, turn), time_bare(env, data, actions, turn)))
    times = np.array(times[1:]) * 1e6  # [rounds, 2], microseconds per env step
    ratios = times[:, 0] / times[:, 1]
    machine = platform.processor() or platform.machine()
    print(f"{args.env_id}, {args.rounds} x {args.steps} steps, mujoco {mujoco.__version__}, {machine}")
    print(f"{'':14}{'25 %':>10}{'median':>10}{'75 %':>10}{'steps/s':>10}")
    for name, values in (("env.step, us", times[:, 0]), ("bare loop, us", times[:, 1]), ("ratio", ratios)):
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        rate = "" if name == "ratio" else f"{1e6 / median:10.0f}"
        print(f"{name:14}{low:10.3f}{median:10.3f}{high:10.3f}{rate}")
    met = np.median(ratios) <= args.max_ratio
    print(f"target: ratio <= {args.max_ratio} - {'met' if met else 'NOT met'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
