"""What a training step costs on this machine: ms per environment step by part, for each script.

    python benchmark/speed.py                            # the breakdown, scripts side by side
    python benchmark/speed.py --grow                     # the sum for several fills and batch sizes, memory
    python benchmark/speed.py --end-to-end aclg_gcmr     # the script itself, for --steps steps
    python benchmark/speed.py --scripts aclg_gcmr -- --path-search soft    # flags of the scripts

Run it on an idle machine (the header has the load), and compare only figures of one run. It times a bare
mj_step loop and a reference matrix product, too. "GFLOP per step" counts the matrix products of the parts,
weighted as their times; "share of the reference product" is how much of its throughput the sum reaches.

Buffers hold random rows; parts are timed alone and all of them are on (planner, model). The sum leaves out
the loop itself, logs, evaluation, and the adjacency network (some 2,000 small updates in 50,000 steps).

--end-to-end prints steps_per_second of progress.csv, which leaves out only evaluation; the first steps only
collect, so judge by the last row or half. aclg_gcmr gets --dynamics-starts 3000 --planner-starts 3000
--adjacency-every 3000, so that all is on within a short run: its buffers are far from full (see --grow) and
its adjacency network is trained 17 times too often. Flags after -- come last and win.
"""

import csv
import dataclasses
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mujoco
import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common_envs import make_env  # noqa: E402

Script = Literal["hiro", "cher", "aclg_gcmr"]
CPU = torch.device("cpu")
FULL = 10**9  # environment steps that fill any buffer
GROWTH = [(10_000, None), (100_000, None), (FULL, None)] + [(100_000, size) for size in (64, 128, 256, 512)]
EARLY = {"aclg_gcmr": "--dynamics-starts 3000 --planner-starts 3000 --adjacency-every 3000".split()}


@dataclass
class Args:
    threads: int = 1  # torch threads
    repeats: int = 20  # calls per figure
    rows: int = 200_000  # environment steps in the buffers, as far as they hold them
    env: str = "AntMaze-U"  # a row of SPECS
    scripts: tuple[Script, ...] = ("hiro", "cher", "aclg_gcmr")  # which to measure
    grow: bool = False  # instead: the sum of the parts for several fills and batch sizes, a process for each
    end_to_end: str | None = None  # instead: run this script, its name without .py
    steps: int = 20_000  # environment steps of --end-to-end
    cell: Script | None = None  # what --grow calls itself with: one sum and its memory, as JSON


# ------------------------------------------------------------------------------------------------ measuring


def milliseconds(function, repeats: int) -> float:
    """The median call: parts are differences of such figures, and an interruption would swamp them."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def cost(function, repeats: int):
    """[ms, GFLOP] of a call, as one array, so that both get the same weights when parts are put together."""
    with FlopCounterMode(display=False) as counter:
        function()
    return np.array([milliseconds(function, repeats), counter.get_total_flops() / 1e9])


def fixed_plus_slope(cost_of, few: int, many: int, wanted: int):
    """cost_of(wanted) from two cheaper calls: a call costs something anyway, and so much per repetition."""
    low, high = cost_of(few), cost_of(many)
    return low + (high - low) / (many - few) * (wanted - few)


def reference_product(repeats: int) -> float:
    """GFLOP/s of [2048, 300] x [300, 300] in float32."""
    a, b = torch.randn(2048, 300), torch.randn(300, 300)
    return 2 * 2048 * 300 * 300 / milliseconds(lambda: a @ b, 5 * repeats) / 1e6


def peak_gigabytes(who: int) -> float:
    """Peak resident memory. On Linux a child's starts at its parent's: parents here hold only libraries."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit / 1e9


def average_rate(rows: list[dict], first_step: float) -> float:
    """Over the rows of progress.csv beyond first_step: all their steps by all their seconds."""
    steps, seconds, before = 0, 0.0, 0
    for step, rate in ((int(row["step"]), float(row["steps_per_second"])) for row in rows):
        if step > first_step:
            steps, seconds = steps + step - before, seconds + (step - before) / rate
        before = step
    return steps / seconds


# ---------------------------------------------------------------------------------------------------- parts


def fill(buffer, steps: int, period: int):
    """Pretend that `steps` steps of plausible size were stored, or the segments that they make."""
    rows = min(steps // period if "obs_seq" in buffer.shapes else steps, len(buffer.rows))
    buffer.rows[:rows].normal_()
    columns = dict(zip(buffer.shapes, np.cumsum([0, *buffer.sizes]).tolist()))
    for name, value in (("length", period), ("terminated", 0), ("dead", 0)):
        if name in columns:
            buffer.rows[:rows, columns[name]] = value
    buffer.added = rows
    buffer.size.fill_(rows)


def parts_of(script, settings, args: Args) -> dict:
    """What each part of a script costs per environment step, [ms, GFLOP]."""
    env, n, period = make_env(args.env), args.repeats, settings.manager_period
    manager, worker = script.make_agents(env, settings, CPU)
    *buffers, _ = script.make_buffers(env, settings, manager, worker, CPU)
    obs, goal = script.split_observation(env.reset(seed=0)[0])
    subgoal, action = np.zeros(len(manager.limit), np.float32), np.zeros(len(worker.limit), np.float32)
    parts = {
        "act": cost(lambda: worker.act(obs, subgoal, explore=True), 10 * n)
        + cost(lambda: manager.act(obs, goal, explore=True), 10 * n) / period,
        "environment": cost(lambda: env.step(action), 10 * n),
        "store": 0,
    }
    for buffer in buffers:
        entry = {name: np.zeros(shape, np.float32) for name, shape in buffer.shapes.items()}
        every = period if "obs_seq" in entry else 1
        parts["store"] = parts["store"] + cost(lambda b=buffer, e=entry: b.add(**e), 10 * n) / every
        fill(buffer, args.rows, period)
    more = {"hiro": hiro_parts, "cher": cher_parts, "aclg_gcmr": gcmr_parts}[script.__name__]
    with script.fast_cpu_matmul(settings, CPU):
        return parts | more(script, settings, manager, worker, *buffers, n)


def hiro_parts(script, settings, manager, worker, worker_buffer, manager_buffer, n: int) -> dict:
    def update_worker(with_actor):
        return cost(lambda: script.update_worker(worker, worker_buffer, settings, with_actor), n)

    def update_manager(with_actor):
        return cost(lambda: script.update_manager(manager, worker, manager_buffer, settings, with_actor), n)

    batch, period = manager_buffer.sample(settings.batch_size), settings.manager_period
    relabel = cost(lambda: script.relabel_subgoals(worker, batch, manager.limit, settings), n)
    critics, manager_critics = update_worker(False), update_manager(False)
    return {
        "worker critics": critics,
        "worker actor": (update_worker(True) - critics) / settings.worker_actor_every,
        "relabeling": relabel / period,
        "manager critics": (manager_critics - relabel) / period,
        "manager actor": (update_manager(True) - manager_critics) / settings.manager_actor_every / period,
    }


def cher_parts(script, settings, manager, worker, buffer, n: int) -> dict:
    """The cooperative loss is computed at each update of the manager's critics, for the log, too."""
    batch, coop_weight = script.sample_segments(buffer, settings), script.CoopWeight(settings, CPU)
    period, learned = settings.manager_period, settings.coop_delta is not None

    def update_worker(with_actor):
        return cost(lambda: script.update_worker(worker, batch, settings, with_actor), n)

    def update_manager(with_actor):
        modules = (manager, worker, coop_weight, batch, settings)
        return cost(lambda: script.update_manager(*modules, with_actor, learned), n)

    relabel = cost(lambda: script.relabel_subgoals(worker, batch, manager.limit, settings), n)
    critics, manager_critics = update_worker(False), update_manager(False)
    actor = (update_manager(True) - manager_critics) / settings.manager_actor_every / period
    return {
        "sampling, both levels": cost(lambda: script.sample_segments(buffer, settings), n),
        "worker critics": critics,
        "worker actor": (update_worker(True) - critics) / settings.worker_actor_every,
        "relabeling": relabel / period,
        "manager critics": (manager_critics - relabel) / period,
        "manager actor, cooperative" if settings.coop_weight else "manager actor": actor,
    }


def gcmr_parts(script, settings, manager, worker, worker_buffer, manager_buffer, n: int) -> dict:
    """A part whose weight is 0 is left out, as in the script."""
    obs_dim, dims, period = worker_buffer.shapes["obs"][0], len(manager.limit), settings.manager_period
    dynamics = script.DynamicsEnsemble(obs_dim, len(worker.limit), settings)
    adjacency, novelty = script.Adjacency(dims, settings), script.Novelty(obs_dim, dims, settings)
    novelty.visit(worker_buffer.latest(500).obs, settings)
    dynamics_adam = torch.optim.Adam(dynamics.parameters(), settings.dynamics_lr, fused=True)
    novelty_adam = torch.optim.Adam(novelty.predictor.parameters(), settings.novelty_lr, fused=True)

    def train_model(updates):
        few = dataclasses.replace(settings, dynamics_updates=updates, dynamics_first_updates=updates)
        return cost(lambda: script.train_dynamics(dynamics, dynamics_adam, worker_buffer, few, 1), 3)

    def update_worker(**due):
        due = {"with_actor": False, "with_penalty": False, "with_planning": False} | due
        modules = (worker, manager, dynamics, worker_buffer, manager_buffer, settings)
        return cost(lambda: script.update_worker(*modules, **due), n)

    train_model(1)  # what follows needs a model, and later trainings are to be timed, not the first
    penalty_on, planning_on = settings.gradient_penalty_weight > 0, settings.rollout_planning_weight > 0
    repeat = settings.worker_critic_updates_with_penalty if penalty_on else settings.worker_critic_updates
    actors = repeat / settings.worker_actor_every
    critics, actor = update_worker(), update_worker(with_actor=True)
    parts = {"worker critics": repeat * critics, "worker actor": (actor - critics) * actors}
    if penalty_on:
        penalty = update_worker(with_penalty=True) - critics
        parts["gradient penalty"] = penalty * repeat / settings.gradient_penalty_every
    if planning_on:
        planning = update_worker(with_actor=True, with_planning=True) - actor
        parts["one-step planning"] = planning * actors / settings.rollout_planning_every
    batch = manager_buffer.sample(settings.batch_size)
    with_model = script.relabels_by_model(settings)
    query = (worker, dynamics if with_model else None, batch, manager.limit, settings)
    relabel = cost(lambda: script.relabel_subgoals(*query), n)
    graph, keeps = script.LandmarkGraph(obs_dim, settings), settings.planner_keeps_graph
    modules = (manager, worker, dynamics, adjacency, novelty, graph, manager_buffer, worker_buffer, settings)

    def update_manager(with_planner, with_new_graph):
        due = {"with_planner": with_planner, "with_new_graph": with_new_graph}
        repeats = max(3, n // 4) if with_planner else n
        return cost(lambda: script.update_manager(*modules, with_model=with_model, **due), repeats)

    update = update_manager(False, False)
    parts |= {"relabeling": relabel / period, "manager critics and actor": (update - relabel) / period}
    if penalty_on or planning_on or with_model:
        training = fixed_plus_slope(train_model, 2, 2 + 2 * n, settings.dynamics_updates)
        parts["dynamics model"] = training / settings.dynamics_every
    if settings.landmark_weight > 0:
        new, kept = update_manager(True, True), update_manager(True, False)
        parts["landmark planner"] = ((new + (keeps - 1) * kept) / keeps - update) / period
        parts["novelty"] = cost(
            lambda: script.update_novelty(novelty, novelty_adam, worker_buffer, settings), n
        )
    return parts


def measure(name: str, args: Args, flags: list[str]) -> tuple:
    """The parts of a script, and its settings with these flags."""
    script = importlib.import_module(name)
    settings = script.parse_args(["--env", args.env, *flags])
    return parts_of(script, settings, args), settings


# ---------------------------------------------------------------------------------------------------- modes


def header(args: Args) -> str:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    words = (platform.machine(), (names or [platform.processor()])[0], f"{os.cpu_count()} cores")
    words += (f"load {os.getloadavg()[0]:.1f}", f"torch {torch.__version__}", f"mujoco {mujoco.__version__}")
    words += (f"{args.threads} torch threads", args.env, time.strftime("%Y-%m-%d"), f"commit {commit}")
    return ", ".join(words[:6]) + "\n" + ", ".join(words[6:])


def breakdown(args: Args, flags: list[str]):
    """A column per script, a row per part."""
    env, hiro = make_env(args.env), importlib.import_module("hiro")
    env.reset(seed=0)
    step = milliseconds(lambda: mujoco.mj_step(env.model, env.data, nstep=env.substeps), 50 * args.repeats)
    default = reference_product(args.repeats)
    with hiro.fast_cpu_matmul(hiro.Args(), CPU):
        reference = reference_product(args.repeats)
    print(f"bare mj_step(nstep={env.substeps}): {step:.3f} ms; buffers after {args.rows} steps")
    print(f"reference product: {default:.0f} GFLOP/s by default, {reference:.0f} as in the updates")
    columns = {name: measure(name, args, flags)[0] for name in args.scripts}
    rows = {part: [parts.get(part) for parts in columns.values()] for c in columns.values() for part in c}
    print(f"{'ms per environment step':30s}" + "".join(f"{name:>12s}" for name in columns))
    for part, values in rows.items():
        print(f"{part:30s}" + "".join(" " * 12 if v is None else f"{v[0]:12.3f}" for v in values))
    totals = np.array([sum(parts.values()) for parts in columns.values()])  # [scripts, 2]
    shares = totals[:, 1] / (totals[:, 0] / 1e3 * reference)
    print(f"{'sum':30s}" + "".join(f"{total:12.3f}" for total in totals[:, 0]))
    print(f"{'steps/s from that':30s}" + "".join(f"{1000 / total:12.0f}" for total in totals[:, 0]))
    print(f"{'GFLOP per step':30s}" + "".join(f"{total:12.3f}" for total in totals[:, 1]))
    print(f"{'share of the reference product':30s}" + "".join(f"{share:12.0%}" for share in shares))


def print_cell(args: Args, flags: list[str]):
    """The sum of the parts, in a process of its own so that the peak of memory is its own."""
    parts, settings = measure(args.cell, args, flags)
    peak = peak_gigabytes(resource.RUSAGE_SELF)
    print(json.dumps({"ms": sum(parts.values())[0], "peak": peak, "batch": settings.batch_size}))


def grow(args: Args, flags: list[str]):
    """A row per script, fill of the buffers and batch size."""
    print(f"{'script':12s}{'rows':>9s}{'batch':>7s}{'ms/step':>10s}{'steps/s':>9s}{'peak GB':>9s}")
    for name in args.scripts:
        for rows, batch_size in GROWTH:
            command = [sys.executable, __file__, "--cell", name, "--env", args.env, "--rows", str(rows)]
            command += ["--threads", str(args.threads), "--repeats", str(args.repeats), "--", *flags]
            command += ["--batch-size", str(batch_size)] if batch_size else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            cell, fullness = json.loads(done.stdout), "full" if rows == FULL else rows
            print(f"{name:12s}{fullness:>9}{cell['batch']:7d}{cell['ms']:10.3f}", end="")
            print(f"{1000 / cell['ms']:9.0f}{cell['peak']:9.2f}", flush=True)


def end_to_end(args: Args, flags: list[str]):
    """The script as a user runs it, but for evaluations of one episode per goal."""
    name = args.end_to_end
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"{name}.py"), "--env", args.env, "--run-dir", folder]
        command += ["--total-steps", str(args.steps), "--eval-every", "5000", "--eval-episodes", "1"]
        command += ["--threads", str(args.threads), *EARLY.get(name, []), *flags]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"speed.py: error: {' '.join(command)}\n{done.stderr.strip()}")
        with open(Path(folder) / "progress.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    print(f"{name}, steps per second from progress.csv")
    for row in rows:
        print(f"up to step {row['step']:19s}{row['steps_per_second']:>12s}")
    print(f"{'last row':30s}{rows[-1]['steps_per_second']:>12s}")
    print(f"{'average of the last half':30s}{average_rate(rows, args.steps / 2):12.1f}")
    print(f"{'peak memory, GB':30s}{peak_gigabytes(resource.RUSAGE_CHILDREN):12.2f}")


def main(args: Args, flags: list[str]):
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.cell:
        return print_cell(args, flags)
    print(header(args), flush=True)
    (end_to_end if args.end_to_end else grow if args.grow else breakdown)(args, flags)


if __name__ == "__main__":
    words = [*sys.argv[1:], "--"]
    split = words.index("--")
    main(tyro.cli(Args, args=words[:split]), words[split + 1 : -1])
