"""Where the time of a training step goes: ms per environment step by part, for each script, on this machine.

    python benchmark/speed.py [--threads 1] [--repeats 20] [--rows 200000]

In the same run it times a bare mj_step loop and a reference matrix product, so that figures of two machines
can be compared. Buffers hold random rows; parts are timed alone, so their sum leaves out the loop itself.
Run it on an idle machine. End-to-end speed is steps_per_second in a run's progress.csv.
"""

import dataclasses
import importlib
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common_envs import make_env  # noqa: E402


@dataclass
class Args:
    threads: int = 1  # torch threads
    repeats: int = 20  # calls per figure
    rows: int = 200_000  # entries of the worker's buffer; the manager's gets a tenth
    env: str = "AntMaze-U"  # a row of SPECS


def milliseconds(function, repeats: int) -> float:
    function()
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begin) / repeats * 1e3


def reference_product(repeats: int) -> float:
    """GFLOP/s of [2048, 300] x [300, 300] in float32, with the kernels that the updates use."""
    a, b = torch.randn(2048, 300), torch.randn(300, 300)
    return 2 * 2048 * 300 * 300 / milliseconds(lambda: a @ b, 5 * repeats) / 1e6


def fill(buffer, rows: int, period: int):
    """Pretend that `rows` entries of plausible size were stored."""
    rows = min(rows, len(buffer.rows))
    buffer.rows[:rows].normal_()
    names, sizes = list(buffer.shapes), buffer.sizes
    if "length" in names:
        buffer.rows[:, sum(sizes[: names.index("length")])] = period
    buffer.added = rows
    buffer.size.fill_(rows)


def parts_of(name: str, args: Args) -> dict[str, float]:
    """ms per environment step of each part of a script."""
    script, cpu, n = importlib.import_module(name), torch.device("cpu"), args.repeats
    settings = script.parse_args(["--env", args.env])
    env = make_env(args.env)
    manager, worker = script.make_agents(env, settings, cpu)
    *buffers, _ = script.make_buffers(env, settings, manager, worker, cpu)
    for buffer, share in zip(buffers, (1, 10)):
        fill(buffer, args.rows // share, settings.manager_period)
    obs, _ = script.split_observation(env.reset(seed=0)[0])
    subgoal, action = np.zeros(len(manager.limit), np.float32), np.zeros(len(worker.limit), np.float32)
    parts = {
        "act": milliseconds(lambda: worker.act(obs, subgoal, explore=True), 10 * n),
        "environment": milliseconds(lambda: env.step(action), 10 * n),
    }
    with script.fast_cpu_matmul(settings, cpu):
        if name == "hiro":
            parts |= hiro_parts(script, settings, manager, worker, *buffers, n)
        elif name == "aclg_gcmr":
            parts |= gcmr_parts(script, settings, manager, worker, *buffers, n)
    return parts


def hiro_parts(script, settings, manager, worker, worker_buffer, manager_buffer, n: int) -> dict[str, float]:
    def update_worker(with_actor):
        return milliseconds(lambda: script.update_worker(worker, worker_buffer, settings, with_actor), n)

    critic, both, period = update_worker(False), update_worker(True), settings.manager_period
    batch = manager_buffer.sample(settings.batch_size)
    relabel = milliseconds(lambda: script.relabel_subgoals(worker, batch, manager.limit, settings), n)
    update = (manager, worker, manager_buffer, settings, True)
    manager_time = milliseconds(lambda: script.update_manager(*update), n) - relabel
    return {
        "worker critics": critic,
        "worker actor": (both - critic) / settings.worker_actor_every,
        "relabeling": relabel / period,
        "manager": manager_time / period,
    }


def gcmr_parts(script, settings, manager, worker, worker_buffer, manager_buffer, n: int) -> dict[str, float]:
    obs_dim, dims = worker_buffer.shapes["obs"][0], len(manager.limit)
    dynamics = script.DynamicsEnsemble(obs_dim, len(worker.limit), settings)
    adjacency, novelty = script.Adjacency(dims, settings), script.Novelty(obs_dim, dims)
    novelty.visit(worker_buffer.latest(500).obs, settings)
    dynamics_adam = torch.optim.Adam(dynamics.parameters(), settings.dynamics_lr, fused=True)
    novelty_adam = torch.optim.Adam(novelty.predictor.parameters(), settings.novelty_lr, fused=True)
    few = dataclasses.replace(settings, dynamics_first_updates=n, dynamics_updates=n)

    def train_model():
        script.train_dynamics(dynamics, dynamics_adam, worker_buffer, few, 1)

    def update_worker(**due):
        due = {"with_actor": False, "with_penalty": False, "with_planning": False} | due
        modules = (worker, manager, dynamics, worker_buffer, manager_buffer, settings)
        return milliseconds(lambda: script.update_worker(*modules, **due), n)

    model = milliseconds(train_model, 1) / n * settings.dynamics_updates / settings.dynamics_every
    critic, penalty, actor = update_worker(), update_worker(with_penalty=True), update_worker(with_actor=True)
    planning = update_worker(with_actor=True, with_planning=True)
    batch, period = manager_buffer.sample(settings.batch_size), settings.manager_period
    relabel = milliseconds(
        lambda: script.relabel_subgoals(worker, dynamics, batch, manager.limit, settings), n
    )
    modules = (manager, worker, dynamics, adjacency, novelty, manager_buffer, worker_buffer, settings)
    manager_time = milliseconds(lambda: script.update_manager(*modules, False), n) - relabel
    query = (worker, novelty, worker_buffer, batch.obs_seq[:, 0], batch.goal, settings)
    planner = milliseconds(lambda: script.plan_landmarks(*query), max(3, n // 4))
    distillation = (novelty, novelty_adam, worker_buffer, settings, 10)
    repeat = settings.worker_critic_updates_with_penalty
    actors = repeat / settings.worker_actor_every
    return {
        "worker critics": repeat * critic,
        "gradient penalty": (penalty - critic) * repeat / settings.gradient_penalty_every,
        "worker actor": (actor - critic) * actors,
        "one-step planning": (planning - actor) * actors / settings.rollout_planning_every,
        "relabeling": relabel / period,
        "manager": manager_time / period,
        "landmark planner": planner / period,
        "dynamics model": model,
        "novelty": milliseconds(lambda: script.train_novelty(*distillation), n) / 10,
    }


def main(args: Args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{platform.machine()}, torch {torch.__version__}, mujoco {mujoco.__version__}, ")
    print(f"{args.threads} threads, {args.env}, {args.rows} rows, {time.strftime('%Y-%m-%d')}")
    env = make_env(args.env)
    env.reset(seed=0)
    step = milliseconds(lambda: mujoco.mj_step(env.model, env.data, nstep=5), 50 * args.repeats)
    highest = reference_product(args.repeats)
    torch.set_float32_matmul_precision("medium")
    medium = reference_product(args.repeats)
    torch.set_float32_matmul_precision("highest")
    print(
        f"bare mj_step(nstep=5): {step:.3f} ms; reference product: {highest:.0f}, oneDNN {medium:.0f} GFLOP/s"
    )
    columns = {name: parts_of(name, args) for name in ("hiro", "aclg_gcmr")}
    rows = list(dict.fromkeys(part for parts in columns.values() for part in parts))
    print(f"{'ms per environment step':26s}" + "".join(f"{name:>12s}" for name in columns))
    for row in rows:
        print(
            f"{row:26s}"
            + "".join(f"{parts[row]:12.3f}" if row in parts else " " * 12 for parts in columns.values())
        )
    totals = [sum(parts.values()) for parts in columns.values()]
    print(f"{'sum':26s}" + "".join(f"{total:12.3f}" for total in totals))
    print(f"{'steps/s from that':26s}" + "".join(f"{1000 / total:12.0f}" for total in totals))


if __name__ == "__main__":
    main(tyro.cli(Args))
