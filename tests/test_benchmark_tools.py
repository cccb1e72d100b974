"""benchmark: plot, speed, graft, failures by hand-made numbers; run.py: grids that end, stop, go on, fail."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, read_rows

TINY = "--learning-starts 100 --eval-every 150 --eval-episodes 1 --hidden 32 --batch-size 16".split()
TIMEOUT = 300  # s; far more than it takes on a free core

# --------------------------------------------------------------------------------------------------- plot.py


def load(name):
    """The module benchmark/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmark" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def plot():
    pytest.importorskip("scipy")
    return load("plot")


def write_run(folder, rows, script="hiro", env="PointMaze-U", variant="default", seed=1, **settings):
    """A run's progress.csv and config.json; rows: {step: value of eval/success}."""
    folder.mkdir(parents=True)
    lines = [f"{step},{value}" for step, value in rows.items()]
    (folder / "progress.csv").write_text("\n".join(["step,eval/success", *lines]) + "\n")
    args = {"env": env, "variant": variant, "seed": seed, **settings}
    (folder / "config.json").write_text(json.dumps({"script": script, "args": args}))


@pytest.fixture
def draw(plot, tmp_path, capsys, monkeypatch):
    """draw(*flags): what it printed, each panel's legend, its number of bands, the bytes of the PNG."""

    def draw(*flags):
        out, figures = tmp_path / "figures" / "curves.png", []
        monkeypatch.setattr(plot.plt, "close", figures.append)
        args = plot.tyro.cli(plot.Args, args=[str(tmp_path), "--out", str(out), *flags])
        plot.draw(plot.read_runs(args), args)
        (figure,) = figures
        legends = {a.get_title(): [t.get_text() for t in a.get_legend().get_texts()] for a in figure.axes}
        bands = {axis.get_title(): len(axis.collections) for axis in figure.axes}
        monkeypatch.undo()
        plot.plt.close(figure)
        printed = capsys.readouterr().out
        return SimpleNamespace(out=printed, legends=legends, bands=bands, png=out.read_bytes())

    return draw


def test_mean_and_interquartile_mean(plot):
    """Four seeds, two steps. IQM: without the lowest and the highest."""
    values = [[0, 4], [10, 4], [1, 4], [0, 4]]
    np.testing.assert_allclose(plot.aggregate(values, "mean")[0], [2.75, 4])
    np.testing.assert_allclose(plot.aggregate(values, "iqm")[0], [0.5, 4])
    np.testing.assert_allclose(plot.aggregate([[1], [2], [6]], "iqm")[0], [3])  # a quarter of 3 is none


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
def test_interval(plot, statistic):
    """Two seeds 0 and 1: a resample's mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4, so 2.5 % is 0."""
    _, interval = plot.aggregate([[0, 3], [1, 3]], statistic)
    np.testing.assert_allclose(interval, [[0, 3], [1, 3]])
    assert plot.aggregate([[0, 3]], statistic)[1] is None


def test_interval_of_five_seeds(plot):
    """One of five succeeds. In a resample: binomial(5, 1/5), P(0) = 0.33, P(<= 2) = 0.94, P(<= 3) = 0.993."""
    _, interval = plot.aggregate([[0], [0], [0], [0], [1]], "mean")
    np.testing.assert_allclose(interval[:, 0], [0, 3 / 5])


def test_common_steps(plot):
    steps, values = plot.common_steps([{100: 1.0, 200: 2.0, 300: 3.0}, {150: 0.0, 300: 5.0, 100: 4.0}])
    assert steps.tolist() == [100, 300] and values.tolist() == [[1, 3], [4, 5]]


def test_figure(draw, tmp_path):
    """The two layouts of folders, a shorter seed, a line of one seed, two environments."""
    for seed, last in ((1, {2000: 1.0}), (2, {2000: 0.0, 3000: 1.0})):
        folder = tmp_path / "results" / "hiro" / "PointMaze-U" / "default" / f"seed{seed}"
        write_run(folder, {1000: 0.0} | last, seed=seed)
    write_run(tmp_path / "runs" / "PointMaze-U__cher__default__1__1", {1000: 0.25}, script="cher")
    write_run(
        tmp_path / "runs" / "AntMaze-U__hiro__fun__7__1",
        {5: 0.5, 10: ""},
        env="AntMaze-U",
        variant="fun",
        seed=7,
    )
    drawn = draw()
    assert drawn.legends["PointMaze-U"] == ["cher/default (n=1)", "hiro/default (n=2)"]
    assert drawn.legends["AntMaze-U"] == ["hiro/fun (n=1)"]
    assert drawn.bands == {"PointMaze-U": 1, "AntMaze-U": 0}
    assert "PointMaze-U, hiro/default (n=2): eval/success at step 2000: 0.5 [0, 1]\n" in drawn.out
    assert (
        "AntMaze-U, hiro/fun (n=1): eval/success at step 5: 0.5\n" in drawn.out
    )  # the empty cell is no number
    assert "hiro/default: 2 of 3 steps are common" in drawn.out
    assert drawn.png.startswith(b"\x89PNG") and drawn.png == draw().png


def test_lines(draw, tmp_path):
    """By a setting; a folder's <variant>/seed<k> goes before the name in config.json; a seed counts once."""
    write_run(tmp_path / "a" / "seed1", {1: 1.0}, reward="dense")
    write_run(tmp_path / "b" / "seed1", {1: 1.0}, reward="sparse")
    write_run(tmp_path / "PointMaze-U__1", {1: 1.0, 2: 1.0}, variant="a", reward="dense")
    drawn = draw()
    assert drawn.legends["PointMaze-U"] == ["hiro/a (n=1)", "hiro/b (n=1)"]
    assert f"is longer or newer: {tmp_path / 'a' / 'seed1'}" in drawn.out
    assert draw("--by", "reward").legends["PointMaze-U"] == ["hiro/dense (n=1)", "hiro/sparse (n=1)"]


def test_plot_refuses(plot, tmp_path):
    write_run(tmp_path / "full" / "a", {1: 1.0}, seed=1)
    write_run(tmp_path / "full" / "b", {2: 1.0}, seed=2)
    write_run(tmp_path / "half" / "a", {1: 1.0})
    (tmp_path / "half" / "a" / "config.json").unlink()
    (tmp_path / "empty").mkdir()
    for flags, message in (
        (["empty"], "no progress.csv below"),
        (["nowhere"], "no such folder"),
        (["full", "--metric", "eval/luck"], "no run has eval/luck; columns: step, eval/success"),
        (["full", "--by", "luck"], "--by luck: no setting of"),
        (["full"], "its 2 runs have no step of evaluation in common"),
        (["half"], "not a run's"),
        (["full/a", "--out", "full/a/progress.csv/curves.png"], "cannot write"),
    ):
        args = plot.tyro.cli(plot.Args, args=flags)
        args.paths = tuple(tmp_path / path for path in args.paths)
        args.out = tmp_path / args.out
        with pytest.raises(SystemExit, match=message) as error:
            plot.draw(plot.read_runs(args), args)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- run.py


@pytest.fixture(scope="module")
def start_grid():
    """start_grid(*flags, extra=()): python benchmark/run.py, one environment and one seed by default."""
    started = []

    def start_grid(*flags, extra=(), **options):
        command = [sys.executable, "benchmark/run.py", "--script", "hiro.py", "--env", "PointMaze-U"]
        command += ["--seeds", "1", *map(str, flags), "--", *TINY, *map(str, extra)]
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        started.append(subprocess.Popen(command, **streams, **options))
        return started[-1]

    yield start_grid
    for process in started:
        process.terminate()  # and so what it runs, if a test failed
        process.communicate()


@pytest.fixture(scope="module")
def grid(start_grid):
    """The same, with the exit status and all that it printed."""

    def grid(*flags, **options):
        process = start_grid(*flags, **options)
        out = process.communicate(timeout=TIMEOUT)[0]
        return SimpleNamespace(code=process.returncode, out=out)

    return grid


def wait_for(path, process):
    """Until the file exists."""
    end = time.time() + TIMEOUT
    while not path.exists():
        assert time.time() < end and process.poll() is None, f"{path} did not appear"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(grid, tmp_path_factory):
    """A grid of two seeds that went through: its folder and what was printed."""
    results = tmp_path_factory.mktemp("results")
    return results, grid("--results", results, "--seeds", 2, extra=("--total-steps", 300))


def test_grid(finished):
    results, done = finished
    assert done.code == 0, done.out
    lines = done.out.splitlines()
    assert len(lines) == 2
    for seed, line in enumerate(sorted(lines), start=1):
        folder = results / "hiro" / "PointMaze-U" / "default" / f"seed{seed}"
        name, command = line.split(": ", 1)
        words = shlex.split(command)
        assert name == f"hiro/PointMaze-U/default/seed{seed}" and words[0] == sys.executable
        config = json.loads((folder / "config.json").read_text())
        assert config["command"] == " ".join(["python", *words[1:]])
        args = config["args"]
        assert (args["seed"], args["threads"], args["variant"]) == (seed, 1, "default")
        assert [row["step"] for row in read_rows(folder)] == ["150", "300"]
        log = (folder / "log.txt").read_text()
        assert log.startswith(f"$ {command}\n") and "step 300: success" in log


def test_finished_runs_are_skipped(finished, grid):
    results, _ = finished
    folder = results / "hiro" / "PointMaze-U" / "default" / "seed1"
    before = (folder / "log.txt").read_text()
    again = grid("--results", results, "--seeds", 2, extra=("--total-steps", 300))
    assert again.code == 0 and again.out.count(": skipped, finished\n") == 2, again.out
    assert (folder / "log.txt").read_text() == before
    other = grid("--results", results, extra=("--total-steps", 300, "--tau", 0.1))
    assert other.code == 0 and "skipped, finished BY ANOTHER COMMAND: python" in other.out


@pytest.mark.parametrize(
    "extra, refused",
    [
        (["--reward", "sparse", "--total-steps", "80"], False),
        (["--reward", "sparse", "--total-steps", "120"], False),
        (["--reward", "sparse"], False),
        (["--total-steps", "120"], True),
        (["--reward", "dense", "--total-steps", "80"], True),
    ],
)
def test_an_unfinished_run_of_another_command_is_not_continued(tmp_path, monkeypatch, extra, refused):
    """Flags left out now would come from its checkpoint: two methods would be one run."""
    grids = load("run")
    args = grids.Args("hiro.py", ("PointMaze-U",), seeds=1, results=tmp_path)
    (run,) = grids.plan(args, ["--reward", "sparse", "--total-steps", "80"])
    command = ["python", str(ROOT / "hiro.py"), "--resume", "checkpoint.pt", *run.options, *run.settings]
    write_run(run.folder, {40: 0.0}, total_steps=80)
    config = json.loads((run.folder / "config.json").read_text()) | {"command": shlex.join(command)}
    (run.folder / "config.json").write_text(json.dumps(config))
    (run.folder / "checkpoint.pt").touch()
    continued = []
    monkeypatch.setattr(grids, "run_here", lambda runs, workers: continued.extend(runs) or [""])
    if refused:
        with pytest.raises(SystemExit, match="started by another command.*choose another --variant"):
            grids.main(args, extra)
    else:
        grids.main(args, extra)
    assert len(continued) == (not refused)


def test_failure_is_named(finished, grid):
    """Seed 1 is whole; seed 2 is not, and its checkpoint is none."""
    results, _ = finished
    folder = results / "hiro" / "PointMaze-U" / "default" / "seed2"
    (folder / "progress.csv").rename(folder / "kept")
    (folder / "checkpoint.pt").rename(folder / "kept.pt")
    (folder / "checkpoint.pt").write_text("no checkpoint")
    again = grid("--results", results, "--seeds", 2, extra=("--total-steps", 300))
    (folder / "kept").rename(folder / "progress.csv")
    (folder / "kept.pt").rename(folder / "checkpoint.pt")
    assert again.code == 1 and "1 of 1 runs did not finish" in again.out, again.out
    last = again.out.splitlines()[-1]
    assert last.startswith("  hiro/PointMaze-U/default/seed2: exit status 1: hiro.py: error: ")
    assert "is not a checkpoint of this suite" in last


def test_interrupted_grid_goes_on(start_grid, grid, tmp_path):
    """Ctrl-C: the running one saves, the queued one does not start; then the first goes on to an end."""
    folder = tmp_path / "hiro" / "PointMaze-U" / "default" / "seed1"
    flags = ("--results", tmp_path, "--workers", 1)
    process = start_grid(*flags, "--seeds", 2, extra=("--total-steps", "1e6"))
    wait_for(folder / "progress.csv", process)
    assert not (folder / "checkpoint.pt").exists()
    locked = grid(*flags, extra=("--total-steps", "1e6"))
    assert locked.code == 1 and "another process is at it" in locked.out
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 1 and "2 of 2 runs did not finish" in out, out
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["loop"]["step"]
    assert f"seed1: stopped at step {step}; continue with --resume" in out
    assert "seed2: not started" in out and not (folder.parent / "seed2").exists()

    done = grid(*flags, extra=("--total-steps", step + 10))
    assert done.code == 0 and f"--resume {folder / 'checkpoint.pt'}" in done.out, done.out
    assert read_rows(folder)[0]["step"] == "150" and read_rows(folder)[-1]["step"] == str(step + 10)


def test_longer_run_without_a_checkpoint_is_not_overwritten(grid, tmp_path):
    write_run(tmp_path / "hiro" / "PointMaze-U" / "default" / "seed1", {10: 1.0}, total_steps=10)
    refused = grid("--results", tmp_path, extra=("--total-steps", 20))
    assert refused.code == 1 and refused.out.count("\n") == 1 and "without a checkpoint.pt" in refused.out


def test_rows_of_a_run_without_a_checkpoint_are_kept(grid, tmp_path):
    """It starts anew; here it does not even start."""
    folder = tmp_path / "hiro" / "PointMaze-U" / "default" / "seed1"
    write_run(folder, {10: 1.0}, total_steps=20)
    rows = (folder / "progress.csv").read_text()
    failed = grid("--results", tmp_path, extra=("--no-such-flag", 1))
    assert failed.code == 1 and (folder / "progress_before.csv").read_text() == rows
    assert (folder / "config_before.json").exists() and not (folder / "config.json").exists()


def test_run_refuses(grid, tmp_path):
    for flags, extra, message in (
        (("--script", "hirro.py"), (), "no script hirro.py"),
        (("--seeds", 0), (), "at least 1"),
        ((), ("--seed", 3), "not after --: --seed"),
    ):
        refused = grid("--results", tmp_path, *flags, extra=extra)
        assert refused.code == 1 and refused.out.startswith("run.py: error: ") and message in refused.out
        assert refused.out.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- Slurm


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the job's process by /proc")
def test_preempted_job_goes_on(start_grid, tmp_path):
    """submitit's local executor; the job gets Slurm's signal, after its first checkpoint."""
    pytest.importorskip("submitit")
    folder = tmp_path / "hiro" / "PointMaze-U" / "default" / "seed1"
    flags = ("--results", tmp_path, "--slurm", "local", "--save-every", 200)
    process = start_grid(*flags, extra=("--total-steps", 900))
    wait_for(folder / "checkpoint.pt", process)
    (controller,) = children(process.pid)
    (job,) = children(controller)
    os.kill(job, signal.SIGUSR2)
    out = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0 and "hiro/PointMaze-U/default/seed1: job " in out, out
    log = (folder / "log.txt").read_text()
    first, second = [line for line in log.splitlines() if line.startswith("$ ")]
    assert "--resume" not in first and f"--resume {folder / 'checkpoint.pt'}" in second
    assert "stopped at step" in log
    steps = [int(row["step"]) for row in read_rows(folder)]
    assert steps == [150, 300, 450, 600, 750, 900]


def test_slurm_job_array(grid, tmp_path):
    """What sbatch gets, from an sbatch of our own."""
    pytest.importorskip("submitit")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", ""), ("sbatch", 'cp "$1" "$0.sh"; echo Submitted batch job 4711')):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    flags = ("--results", tmp_path, "--seeds", 3, "--slurm", "long", "--slurm-hours", 1.5)
    flags += ("--slurm-options", "mem=8G", "exclusive")
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = grid(*flags, env=environment)
    assert done.code == 0 and "seed3: job 4711_2: " in done.out, done.out
    sbatch = (programs / "sbatch.sh").read_text()
    for option in ("partition=long", "array=0-2%2", "time=90", "cpus-per-task=1", "mem=8G", "exclusive"):
        assert f"#SBATCH --{option}\n" in sbatch, option
    (programs / "srun").unlink()
    environment["PATH"] = str(programs)
    refused = grid(*flags, env=environment)
    assert refused.code == 1 and refused.out.startswith("run.py: error: cannot submit: "), refused.out


def test_missing_libraries(grid, tmp_path):
    """One line each."""
    for name in ("scipy", "submitit"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    refused = grid("--results", tmp_path, "--slurm", "long", env=environment)
    assert refused.code == 1 and refused.out.startswith("run.py: error: --slurm needs submitit: pip")
    assert refused.out.count("\n") == 1
    command = [sys.executable, "benchmark/plot.py", str(tmp_path)]
    plotted = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=TIMEOUT
    )
    assert plotted.returncode == 1 and plotted.stderr.startswith("plot.py: error: needs scipy: pip")


# -------------------------------------------------------------------------------------------------- speed.py


@pytest.fixture(scope="module")
def speed():
    return load("speed")


def test_fixed_plus_slope(speed):
    """5 ms and 1 GFLOP per call, 2 ms and 7 GFLOP per update; exact, as there is no noise."""
    costs = speed.fixed_plus_slope(lambda n: np.array([5 + 2 * n, 1 + 7 * n]), 2, 12, 200)
    np.testing.assert_allclose(costs, [405, 1401])


def test_average_rate(speed):
    """The last half: 5,000 steps at 50/s are 100 s, 2,500 at 100/s are 25 s."""
    rates = {5000: "400.0", 10000: "100.0", 15000: "50.0", 17500: "100.0"}
    rows = [{"step": str(step), "steps_per_second": rate} for step, rate in rates.items()]
    assert speed.average_rate(rows, 10000) == 7500 / 125


def test_operations_of_hiro(speed):
    """GFLOP per environment step: batch 100, obs of 30 numbers, subgoal 15, action 8, period 10."""
    settings = speed.Args(repeats=1, rows=500, env="AntMaze-ULarge")
    parts, _ = speed.measure("hiro", settings, ["--worker-buffer", "500"])
    actor, critic, inner = 45 * 300 + 300 * 300 + 300 * 8, 53 * 300 + 300 * 300 + 300, 300 * 300 + 300
    update = actor + 6 * critic + 2 * inner  # targets, forward, gradients by weights, by hidden units
    assert 2 * update == pytest.approx(1.9e6, rel=0.03)
    assert parts["worker critics"][1] == pytest.approx(100 * 2 * update / 1e9)
    update = 2 * actor + 2 * critic + 300 * 308  # forward, gradients by weights, by action, by hidden units
    assert 2 * update == pytest.approx(1.06e6, rel=0.03)
    assert parts["worker actor"][1] == pytest.approx(100 * 2 * update / 1e9 / 2)
    assert parts["relabeling"][1] == pytest.approx(100 * 10 * 10 * 2 * actor / 1e9 / 10)
    assert parts["environment"][1] == parts["store"][1] == 0


@pytest.mark.parametrize("script", ["cher", "aclg_gcmr"])
def test_cell(speed, script, capsys):
    """The process of --grow; and that a script's every part can be timed."""
    tiny = ["--hidden", "32", "--worker-buffer", "600", "--batch-size", "16"]
    tiny += ["--dynamics-hidden", "16", "--coverage-landmarks", "5"] if script == "aclg_gcmr" else []
    speed.print_cell(speed.Args(cell=script, repeats=1, rows=speed.FULL), tiny)
    cell = json.loads(capsys.readouterr().out)
    assert cell["batch"] == 16 and cell["ms"] > 0 and 0.05 < cell["peak"] < 50


# -------------------------------------------------------------------------------------------------- graft.py


def both_levels(module, path):
    """manager and worker of a file, as the script builds them for it."""
    args = module.parse_args(["--eval-only", "--checkpoint", str(path)])
    agents = module.make_agents(module.make_env(args.env, args.reward), args, torch.device("cpu"))
    module.load_parts(
        dict(zip(("manager", "worker"), agents)), torch.load(path, weights_only=True), str(path)
    )
    return agents


def test_graft_discount(tmp_path):
    """rest 20 -> 50: resting is worth what the new gamma says, what is gained on top 2.5 times as much."""
    hiro = pytest.importorskip("hiro")
    agent, out = ROOT / "benchmark" / "agents" / "hiro_ularge_scratch.pt", tmp_path / "out.pt"
    load("graft").discount(agent, out, 0.98)
    old, new = both_levels(hiro, agent)[1], both_levels(hiro, out)[1]
    assert (old.gamma, new.gamma) == (0.95, 0.98)
    torch.manual_seed(0)
    obs, goal, action = torch.randn(5, 30), 5 * torch.randn(5, 2), torch.randn(5, 8)
    gained = old.critic(obs, goal, action) + 20 * goal.norm(dim=1)
    expected = 2.5 * gained - 50 * goal.norm(dim=1)  # a difference of hundreds, in float32
    torch.testing.assert_close(new.critic(obs, goal, action), expected, atol=1e-3, rtol=1e-5)
    assert torch.equal(new.actor(obs, goal), old.actor(obs, goal))
    assert hiro.parse_args(["--start-from", str(out)]).worker_gamma == 0.98


def test_graft_without_time(tmp_path):
    """The agent acts in AntMaze-Bottleneck as the old ones do at 0.2, 40 % of an episode of AntMaze-U."""
    gcmr = pytest.importorskip("aclg_gcmr")
    agents, out = ROOT / "benchmark" / "agents", tmp_path / "out.pt"
    files = agents / "aclg_gcmr_dense.pt", agents / "aclg_gcmr.pt"
    load("graft").without_time(*files, out)
    manager, worker = both_levels(gcmr, out)
    old_worker, old_manager = both_levels(gcmr, files[0])[1], both_levels(gcmr, files[1])[0]
    obs, goal, action = torch.randn(5, 29), 5 * torch.randn(5, 2), torch.randn(5, 8)
    timed = torch.cat([obs, torch.full((5, 1), 0.2)], 1)
    for new, old, act in ((worker, old_worker, action), (manager, old_manager, goal)):
        torch.testing.assert_close(new.actor(obs, goal), old.actor(timed, goal), atol=1e-4, rtol=1e-4)
        q = old.critic(timed, goal, act)
        torch.testing.assert_close(new.critic(obs, goal, act), q, atol=1e-3, rtol=1e-4)
    assert gcmr.parse_args(["--start-from", str(out)]).env == "AntMaze-Bottleneck"


def test_graft_see_xy(tmp_path):
    """Position changes nothing at first, but it is seen: a gradient reaches its weights."""
    gcmr = pytest.importorskip("aclg_gcmr")
    agent, out = tmp_path / "agent.pt", tmp_path / "out.pt"
    state = torch.load(ROOT / "benchmark" / "agents" / "aclg_gcmr.pt", weights_only=True)
    state["worker"]["critic"]["layers.0.weight"][:, :2] = 1.0  # decayed to 0 there, which would hide a fault
    torch.save(state, agent)
    load("graft").see_xy(agent, out)
    old, new = both_levels(gcmr, agent)[1], both_levels(gcmr, out)[1]
    obs, goal, action = torch.randn(5, 30), torch.randn(5, 2), torch.randn(5, 8)
    assert torch.equal(new.actor(obs, goal), old.actor(obs, goal))
    torch.testing.assert_close(new.critic(obs, goal, action), old.critic(obs, goal, action))
    new.actor(obs, goal).sum().backward()
    assert (new.actor.layers[0].weight.grad[:, :2] != 0).any()
    assert not gcmr.parse_args(["--start-from", str(out)]).mask_xy


# ----------------------------------------------------------------------------------------------- failures.py


def test_failures_stayed_since():
    """Within a metre of the end from the second visit on, not from the first."""
    way = np.array([(0, 0), (5, 0), (0, 0.9), (2, 0), (0.5, 0), (0, 0)], float)
    stayed_since = load("failures").stayed_since
    assert stayed_since(way) == 4
    assert stayed_since(way[:1]) == 0


@pytest.mark.parametrize(
    "agent, message",
    [("nope.pt", "no agent at"), ("cher_gather.pt", "AntGather no goal"), ("../figures.py", "is no agent")],
)
def test_failures_refuses(agent, message):
    failures = load("failures")
    with pytest.raises(SystemExit, match=message):
        failures.main(failures.Args(agent=ROOT / "benchmark" / "agents" / agent))


def test_failures_refuses_the_agent_of_a_script_elsewhere(tmp_path):
    failures = load("failures")
    torch.save({"script": "mine"}, tmp_path / "model.pt")
    with pytest.raises(SystemExit, match=r"is of mine\.py, which is not in"):
        failures.main(failures.Args(agent=tmp_path / "model.pt"))


def test_failures_of_an_agent(capsys):
    """The point robot that solves its maze, and the same with subgoals drowned in noise."""
    failures = load("failures")
    args = failures.Args(agent=ROOT / "benchmark" / "agents" / "cher.pt", episodes=2)
    failures.main(args)
    assert capsys.readouterr().out == "goal (0, 8): 0 of 2 failed, 0 ended on their backs\n"
    args.manager_noise, args.episodes = 1e3, 1
    failures.main(args)
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith("  0: upright at (") and summary.startswith("goal (0, 8): 1 of 1 failed")


def test_failures_start(monkeypatch):
    """The robot is put there: its first place is within a step of it."""
    failures, ways = load("failures"), []
    run_episode = failures.run_episode

    def record(*args):
        ways.append(run_episode(*args))
        return ways[-1]

    monkeypatch.setattr(failures, "run_episode", record)
    agent = ROOT / "benchmark" / "agents" / "cher.pt"
    for start in (None, (8.0, 4.0)):
        failures.main(failures.Args(agent=agent, episodes=1, start=start))
    assert np.linalg.norm(ways[0][1][0]) < 1.5
    assert np.linalg.norm(ways[1][1][0] - (8, 4)) < 1.5
