"""Every script from the command line: what it writes, what it prints, what it refuses."""

import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, TINY_OF, ToyEnv, read_rows

from common_envs import MAZES, SPECS, make_env

ENVS = ("PointMaze-U", "AntMaze-U")
FLAGS = [
    "--total-steps",
    "5.2e2",
    "--eval-every",
    "260",
]  # a number with an exponent; past an end of an episode


@pytest.fixture(scope="session", params=ENVS)
def trained(request, script, train, tmp_path_factory):
    """A finished tiny run: its folder and what it printed. One per script is a real command line."""
    folder = tmp_path_factory.mktemp(f"{script}_{request.param}")
    if request.param == "PointMaze-U":
        flags = ["--env", request.param, "--run-dir", folder, *TINY, *TINY_OF.get(script, ()), *FLAGS]
        command = [sys.executable, f"{script}.py", *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        result = SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)
    else:
        result = train(script, request.param, folder, *FLAGS)
    return SimpleNamespace(folder=folder, env=request.param, result=result)


@pytest.fixture(scope="session")
def model_of(train, tmp_path_factory):
    """model_of(script): a model.pt on PointMaze-U, made in as few steps as possible."""
    files = {}

    def model_of(script):
        if script not in files:
            folder = tmp_path_factory.mktemp(f"model_{script}")
            train(script, "PointMaze-U", folder, "--total-steps", "12")
            files[script] = folder / "model.pt"
        return files[script]

    return model_of


# --------------------------------------------------------------------------------------- what a run writes


def test_run_succeeds(trained):
    assert trained.result.code == 0, trained.result.err
    assert "Traceback" not in trained.result.err
    assert "step 260: success" in trained.result.out and "step 520: success" in trained.result.out


def test_progress(trained, script):
    rows = read_rows(trained.folder, times=True)
    assert [row["step"] for row in rows] == ["260", "520"]
    columns = set(rows[-1])
    assert {"step", "time", "steps_per_second", "eval/success", "eval/success_any", "eval/return"} <= columns
    assert {"worker/critic_loss", "worker/q", "worker/actor_loss", "worker/progress"} <= columns
    assert {"manager/critic_loss", "manager/q", "manager/actor_loss"} <= columns
    if script == "cher":
        assert {"manager/coop_value", "manager/coop_weight", "manager/relabeled_share"} <= columns
    if script == "aclg_gcmr":  # all of its parts took part
        assert {"worker/gradient_penalty", "worker/planning_loss", "dynamics/loss", "novelty/loss"} <= columns
        assert {"manager/adjacency_loss", "manager/landmark_loss"} <= columns
        assert "adjacency/loss" in columns or trained.env == "AntMaze-U"  # that ant has not left its cell
    last = {name: float(value) for name, value in rows[-1].items()}  # each a number
    assert last["steps_per_second"] > 0 and 0 < float(rows[0]["time"]) < last["time"]
    assert 0 <= last["eval/success"] <= last["eval/success_any"] <= 1
    assert last["eval/return"] < 0  # minus distances
    assert last["worker/torso_height"] > 0.2 and 0 <= last["worker/upside_down"] <= 1


def test_return_of_training_episodes(toy_run, module, tmp_path):
    """Episodes of 2, 4, 3 and 9 steps, which pay -1, -2, ...: two end by step 7, one by 14, none by 16."""
    lengths = iter((2, 4, 3, 9))

    class Env(ToyEnv):
        def reset(self, **options):
            self.limit = next(lengths)
            return super().reset(**options)

    toy_run(module, 16, Env(), eval_every=7, learning_starts=10)
    rows = read_rows(tmp_path / "run")
    assert [row["train/return"] for row in rows] == ["-6.5", "-6.0", ""]  # (-3 - 10) / 2, -6, none


def test_config(trained, script):
    config = json.loads((trained.folder / "config.json").read_text())
    assert config["script"] == script and script in config["command"]
    assert {"python", "torch", "gymnasium", "mujoco", "numpy"} <= set(config["versions"])
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert config["gpu"] is None  # of --device cpu
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    assert not models or config["cpu"].startswith(f"{models[0]}, family ")
    args = config["args"]
    assert args["env"] == trained.env and args["total_steps"] == 520 and args["hidden"] == 32


def test_memory_of_the_replay_is_told(trained, script):
    """float32; entries of obs, achieved, action: PointMaze-U 7, 2, 2, AntMaze-U 30, 2, 8."""
    obs, action = (7, 2) if trained.env == "PointMaze-U" else (30, 8)
    step = 2 * obs + 2 * 2 + action + 2  # obs, subgoal and their successors, action, reward, terminated
    segment = 11 * obs + 10 * action + 1 + 2 + 2 + 2  # length; goal, subgoal; reward, terminated
    if script != "cher":  # whose 20,000 segments hold the worker's subgoals and rewards, too
        assert f"replay: at most {200_000 * 4 * (step + segment) / 1e9:.2f} GB" in trained.result.out
    else:
        assert re.search(r"replay: at most 0\.0[1-9] GB", trained.result.out)


def test_files(trained, script):
    state = torch.load(trained.folder / "model.pt", weights_only=True)
    assert state["script"] == script and state["args"]["env"] == trained.env
    events = [path for path in trained.folder.iterdir() if path.name.startswith("events.out.tfevents")]
    assert len(events) == 1 and events[0].stat().st_size > 500
    assert not list(trained.folder.glob("*.tmp")) and not (trained.folder / "checkpoint.pt").exists()


def test_tensorboard_has_the_same_numbers(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained.folder))
    events.Reload()
    for name in ("eval/return", "worker/critic_loss"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        rows = [(int(row["step"]), float(row[name])) for row in read_rows(trained.folder)]
        assert [step for step, _ in logged] == [step for step, _ in rows]
        assert [value for _, value in logged] == pytest.approx([value for _, value in rows])


def test_eval_only(trained, script, run):
    """Prints the numbers, with the settings from the file: the same at every call, others at another seed."""
    flags = ["--eval-only", "--checkpoint", trained.folder / "model.pt", "--eval-goals", 1, 0.5, 0, 8]
    printed = run(script, *flags).out
    values = dict(line.split() for line in printed.splitlines())
    assert {"eval/success", "eval/success_any", "eval/return", "eval/success_goal1"} <= set(values)
    assert float(values["eval/success"]) in (0, 0.5, 1)  # one episode for each of the two goals
    assert float(values["eval/return_goal0"]) > 2 * float(values["eval/return_goal1"])  # (1, 0.5) is near
    if trained.env == "PointMaze-U":
        assert run(script, *flags).out == printed
        assert run(script, *flags, "--seed", 5).out != printed


# ------------------------------------------------------------------------------------------- help and input


def parse(module, capsys, *argv):
    """Exit code and output of parse_args, in this process."""
    try:
        return module.parse_args([str(arg) for arg in argv]), ""
    except SystemExit as stop:
        printed = capsys.readouterr()
        text = stop.code if isinstance(stop.code, str) else printed.out + printed.err
        return (1 if isinstance(stop.code, str) else stop.code), text


def test_every_setting_has_its_help(script):
    """tyro takes it from the comment behind the default, and misses it when the formatter wraps the line."""
    text = (ROOT / f"{script}.py").read_text()
    fields = re.search(r"^class Args:\n(.*?)^\S", text, re.M | re.S).group(1).splitlines()
    fields = [line for line in fields if re.match(r"    \w+: ", line)]
    assert len(fields) > 40
    assert [line for line in fields if "  # " not in line] == []


def test_help_shows_the_values_of_the_environment(script, module, run):
    result = run(script, "--env", "PointMaze-U", "--help")
    words = result.out.split()
    assert all(f"--{name}" in words for name in ("seed", "worker-gamma", "manager-period", "subgoal-space"))
    preset = module.PRESETS["PointMaze-U"]
    assert " ".join(preset["source"].split()) in " ".join(result.out.replace("│", " ").split())
    names = ", ".join(name for name in preset if name != "source")
    assert f"Set for it: {names}." in " ".join(result.out.replace("│", " ").split())
    assert str(preset["total_steps"]) in result.out and str(module.Args.total_steps) not in result.out


def test_every_setting_is_explained(module):
    """tyro shows the comment on a setting's own line; one that was wrapped says nothing."""
    lines = [line for line in inspect.getsource(module.Args).splitlines() if re.match(r"    \w+: ", line)]
    names = {re.match(r"    (\w+): .+ = .+  # .+", line)[1] for line in lines}
    assert names == {field.name for field in dataclasses.fields(module.Args)}


def test_presets(module):
    """Each belongs to an environment and changes settings that exist; the command line has the last word."""
    for env, preset in module.PRESETS.items():
        assert env in SPECS and preset["source"]
        args = module.parse_args(["--env", env])
        for name, value in preset.items():
            assert name == "source" or getattr(args, name) == value
    args = module.parse_args(["--env", "PointMaze-U", "--total-steps", "4e2", "--worker-noise", "0.75"])
    assert (args.total_steps, args.worker_noise) == (400, 0.75)
    assert type(args.total_steps) is int
    assert module.parse_args([]).env == module.Args.env


def test_quick_presets(module, script, capsys, run):
    """On top of PRESETS; flags have the last word; where there is none it says where there is one."""
    for env, quick in module.QUICK.items():
        args = module.parse_args(["--env", env, "--preset", "quick"])
        default = module.parse_args(["--env", env])
        assert env in SPECS and quick["source"]
        assert args.preset == args.variant == "quick" and default.preset == default.variant == "default"
        changed = {name for name in vars(args) if getattr(args, name) != getattr(default, name)}
        assert changed == quick.keys() - {"source"} | {"preset", "variant"}  # none that changes nothing
        assert all(getattr(args, name) == quick[name] for name in quick if name != "source")
        again = module.parse_args(["--env", env, "--preset", "quick", "--redrawn-subgoals", "0.25"])
        assert again.redrawn_subgoals == 0.25 and again.rest_value
        text = run(script, "--env", env, "--preset", "quick", "--help").out
        assert " ".join(quick["source"].split()) in " ".join(text.replace("│", " ").split())
    code, text = parse(module, capsys, "--env", "AntGather", "--preset", "quick")
    assert code == 1 and text.startswith(f"{script}.py: error: ") and "\n" not in text
    assert "AntGather" in text and all(env in text for env in module.QUICK)


BAD_FLAGS = [
    ("--env AntMaze-X", "AntMaze-X"),
    ("--eval-only", "--checkpoint"),
    ("--checkpoint model.pt", "--eval-only"),
    ("--eval-only --checkpoint missing.pt", "missing.pt"),
    ("--resume missing.pt", "missing.pt"),
    ("--manager-period 0", "--manager-period"),
    ("--batch-size 0", "--batch-size"),
    ("--hidden -3", "--hidden"),
    ("--total-steps 0", "--total-steps"),
    ("--eval-every 0", "--eval-every"),
    ("--eval-episodes 0", "--eval-episodes"),
    ("--learning-starts 1", "--learning-starts"),
    ("--worker-actor-every 0", "--worker-actor-every"),
    ("--env AntFall --reward sparse", "dense"),
    ("--eval-goals 1 2 3", "--eval-goals"),
    ("--candidates 2", "--candidates"),
    ("--seed -1", "--seed"),
    ("--worker-buffer 0", "--worker-buffer"),
    ("--worker-gamma 1", "--worker-gamma"),
    ("--worker-gamma -0.5", "--worker-gamma"),
    ("--threads -1", "--threads"),
    ("--threads 100000", "--threads"),
    ("--seed 99999999999", "--seed"),
    ("--tau 7", "--tau"),
    ("--manager-gamma 1.5", "--manager-gamma"),
    ("--random-subgoals 1.5", "--random-subgoals"),
    ("--actor-lr -1e-4", "--actor-lr"),
    ("--worker-noise -1", "--worker-noise"),
    ("--worker-noise nan", "--worker-noise is not a finite number"),
    ("--worker-noise inf", "--worker-noise is not a finite number"),
    ("--eval-goals nan 1", "--eval-goals is not a finite number"),
    ("--subgoal-space xy --subgoal-limit inf 2", "--subgoal-limit is not a finite number"),
    ("--reached-radius -1", "--reached-radius"),
    ("--device mps", "--device mps"),  # a device of torch, but not for these scripts
    ("--device cuda:x", "--device cuda:x"),
    ("--resume=", "no checkpoint at"),  # an empty variable of a shell must not start a new run
    ("--subgoal-space xy --subgoal-limit 2 nan", "--subgoal-limit"),
    ("--env PointMaze-U --subgoal-space xyz", "--subgoal-space xyz"),  # the third entry is the heading
    ("--env AntPush-Small --subgoal-space xyz", "--subgoal-space xyz"),  # the third is the block's x
]
if importlib.util.find_spec("wandb") is None:
    BAD_FLAGS.append(("--track", "pip install wandb"))


@pytest.mark.parametrize("flags, word", BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_bad_flags(script, module, capsys, flags, word):
    """One line with the name of the flag, and a code other than 0."""
    if flags.startswith("--candidates") and script == "cher":
        flags += " --relabeling off_policy"  # which is not its default
    code, text = parse(module, capsys, *flags.split())
    assert code == 1 and text.startswith(f"{script}.py: error: ") and word in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "flags",
    [
        "--total-steps many",
        "--total-steps 1.5",
        "--total-steps inf",
        "--subgoal-space q",
        "--preset best",
        "--no-such-flag 1",
        "--seed",
    ],
)
def test_flags_that_cannot_be_read(module, capsys, flags):
    code, text = parse(module, capsys, *flags.split())
    assert code == 2 and flags.split()[0].strip("-") in text


def test_a_folder_holds_one_run(trained, module):
    """A second run would mix its rows with those of the first, and --resume would go on with the first."""
    assert f"results: {trained.folder}" in trained.result.out
    args = module.parse_args(["--env", trained.env, "--run-dir", str(trained.folder)])
    before = {path.name: path.read_bytes() for path in trained.folder.glob("*.*")}
    with pytest.raises(SystemExit, match="holds a run already.*--resume"):
        module.make_run_dir(args)
    assert before == {path.name: path.read_bytes() for path in trained.folder.glob("*.*")}


def test_two_runs_of_one_second_do_not_share_a_folder(module, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.time, "strftime", lambda form: "20260101-000000")
    folder = module.make_run_dir(module.Args())
    for path in folder.iterdir():  # the other run has not come to config.json yet
        path.unlink()
    with pytest.raises(SystemExit, match="choose another --run-dir"):
        module.make_run_dir(module.Args())


def test_a_run_resumed_elsewhere_takes_no_other_runs_folder(module, tmp_path):
    """config.json, model.pt and checkpoint.pt of the run that is there would be replaced, its rows mixed."""
    own, other, new = (tmp_path / name for name in ("own", "other", "new"))
    other.mkdir()
    args = dataclasses.replace(module.Args(), resume=str(own / "checkpoint.pt"))
    for sign in (
        "config.json",
        "progress.csv",
        "checkpoint.pt",
    ):  # before the first evaluation only the first
        (other / sign).write_text("{}")
        for resume in (args.resume, None):
            with pytest.raises(SystemExit, match="holds a run already"):
                module.make_run_dir(dataclasses.replace(args, resume=resume, run_dir=str(other)))
        assert [path.name for path in other.iterdir()] == [sign]
        (other / sign).unlink()
    assert module.make_run_dir(dataclasses.replace(args, run_dir=str(new))) == new
    for sign in ("progress.csv", "disk.pt"):
        (new / sign).write_text("")
    (new / "checkpoint.pt").symlink_to(new / "disk.pt")
    same = dataclasses.replace(args, run_dir=str(new), resume=str(new / "checkpoint.pt"))
    assert module.make_run_dir(same) == new  # by its own checkpoint a run goes on


def test_a_resumed_run_goes_on_in_its_run_of_weights_and_biases(module, monkeypatch, tmp_path):
    """wandb.init would begin a second one; two runs in two folders are two there."""
    begun = []
    fake = SimpleNamespace(init=lambda **settings: begun.append(settings))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("a", "b"):
        args = dataclasses.replace(module.Args(), run_dir=str(tmp_path / name), track=True)
        module.make_run_dir(args)
        again = dataclasses.replace(args, resume=str(tmp_path / name / "checkpoint.pt"))
        for track in (True, False, True):
            module.make_run_dir(dataclasses.replace(again, track=track))
    ids = [settings["id"] for settings in begun]
    assert ids == [ids[0]] * 3 + [ids[3]] * 3 and ids[0] != ids[3]
    assert {settings["resume"] for settings in begun} == {"allow"}
    assert begun[5]["config"]["resume"] == str(tmp_path / "b" / "checkpoint.pt")


def test_ctrl_c_without_a_reader_of_stderr_saves(module, toy_run, monkeypatch, tmp_path):
    """python .. 2>&1 | tee log: Ctrl-C ends tee, too, and the notice meets a broken pipe."""

    class Interrupted(ToyEnv):
        def step(self, action):
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", lambda *what: (_ for _ in ()).throw(BrokenPipeError))
                if len(self.log) == 30:
                    os.kill(os.getpid(), signal.SIGINT)
            return super().step(action)

        def get_state(self):
            return {}

    toy_run(module, 60, Interrupted(), learning_starts=40)
    loop = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["loop"]
    assert loop["step"] == 31


def test_a_lost_terminal_costs_nothing(module, toy_run, monkeypatch, tmp_path):
    """Nobody reads stdout any more (ssh is gone, `| tee` ended), SIGHUP comes: all files are written."""

    class LostTerminal(ToyEnv):
        def step(self, action):
            if len(self.log) == 50:
                os.kill(os.getpid(), signal.SIGHUP)
            return super().step(action)

    said = []

    def write(progress, line):
        said.append(line)
        raise BrokenPipeError

    monkeypatch.setattr(module.tqdm, "write", write)
    monkeypatch.setattr(module, "STOP_SIGNALS", [signal.SIGHUP])  # also where pytest runs under nohup
    toy_run(module, 90, LostTerminal(), learning_starts=40, eval_every=45)
    assert len(said) == 2 and "step 45" in said[0] and "--resume" in said[1]
    loop = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["loop"]
    assert loop["step"] == 51 and (tmp_path / "run" / "model.pt").exists()
    assert [row["step"] for row in read_rows(tmp_path / "run")] == ["45"]


def test_nohup_keeps_a_run_alive(script):
    """nohup has SIGHUP ignored; without it a script saves and ends."""
    code = f"import {script}, signal; print(signal.SIGHUP in {script}.STOP_SIGNALS)"
    for how, answer in (("IGN", "False"), ("DFL", "True")):
        start = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_{how}); "
        result = subprocess.run(
            [sys.executable, "-c", start + code], capture_output=True, text=True, cwd=ROOT
        )
        assert result.stdout.strip() == answer, result.stderr


def full_disk(*args, **more):
    raise OSError(28, "No space left on device")


def test_a_picture_that_cannot_be_written_costs_no_row(module, toy_run, monkeypatch, tmp_path):
    """The row and model.pt come first."""
    monkeypatch.setattr(module.Figure, "savefig", full_disk)
    with pytest.raises(SystemExit, match="cannot write .*pictures.*No space left on device"):
        toy_run(module, 60, ToyEnv(), learning_starts=40, eval_every=45)
    assert [row["step"] for row in read_rows(tmp_path / "run")] == ["45"]
    assert (tmp_path / "run" / "model.pt").exists()


def test_events_that_cannot_be_written_are_told_in_a_line(module, toy_run, monkeypatch):
    monkeypatch.setattr(module, "SummaryWriter", full_disk)
    with pytest.raises(SystemExit, match="cannot write .*No space left on device"):
        toy_run(module, 60, ToyEnv(), learning_starts=40)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_first_subgoal_is_uniform_as_often_as_the_others(module, toy_run, monkeypatch, share):
    shares = []

    def explore(agent, obs, goal, uniform_share):
        shares.append((len(goal), uniform_share))
        return np.zeros(2, np.float32)

    monkeypatch.setattr(module, "explore", explore)
    toy_run(module, 1, ToyEnv(), learning_starts=40, uniform_warmup=False, random_subgoals=share)
    assert shares[0] == (2, share)


@pytest.mark.parametrize(
    "amx, fast, inside", [(False, True, "medium"), (True, True, "highest"), (False, False, "highest")]
)
def test_updates_never_lose_precision(module, monkeypatch, amx, fast, inside):
    """With AMX units "medium" would mean bfloat16; elsewhere on x86 it only picks oneDNN's kernels."""
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    with module.fast_cpu_matmul(module.Args(fast_matmul=fast), torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_the_reward_reaches_both_environments(module, monkeypatch, tmp_path, reward):
    asked = []

    def make(env_id, reward=None, evaluate=False, **more):
        asked.append((env_id, reward, evaluate))
        return ToyEnv(3)

    monkeypatch.setattr(module, "make_env", make)
    settings = dict(total_steps=1, eval_episodes=1, hidden=8, threads=1, device="cpu", subgoal_space="xy")
    module.main(module.Args(env="AntMaze-U", reward=reward, run_dir=str(tmp_path / "run"), **settings))
    assert asked == [("AntMaze-U", reward, False), ("AntMaze-U", reward, True)]


def test_the_seed_reaches_networks_and_environment(module, toy_run, monkeypatch):
    weights, make = [], module.make_agents

    def noted(*inputs):
        agents = make(*inputs)
        weights.append([agent.actor.layers[0].weight.detach().clone() for agent in agents])
        return agents

    monkeypatch.setattr(module, "make_agents", noted)
    for seed in (3, 4, 3):
        env = ToyEnv()
        toy_run(module, 1, env, seed=seed, learning_starts=40)
        assert env.resets[0] == seed
    for level in (0, 1):
        assert torch.equal(weights[0][level], weights[2][level])
        assert not torch.equal(weights[0][level], weights[1][level])


def test_columns_of_the_worker(module, toy_run, monkeypatch, tmp_path):
    """4 m to the right asked for, 10 m per period up to step 30, then 5 m. Each row is of its own steps."""

    class Env(ToyEnv):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            info |= {"torso_height": 0.01 * len(self.log), "upside_down": len(self.log) % 3 == 0}
            return observation, reward, terminated, truncated, info

    env = Env(limit=1000)

    def explore(agent, obs, goal, uniform_share):
        manager = float(agent.limit[0]) == 10
        pace = 1.0 if len(env.log) < 30 else 0.5
        return np.array([4.0 if manager else pace, 0.0], np.float32)

    monkeypatch.setattr(module, "explore", explore)
    toy_run(module, 60, env, eval_every=30, learning_starts=1000)
    rows = [{name: float(x) for name, x in row.items()} for row in read_rows(tmp_path / "run")]
    assert [row["worker/progress"] for row in rows] == pytest.approx([10, 5])
    assert [row["worker/subgoal_length"] for row in rows] == pytest.approx([4, 4])
    assert [row["worker/subgoal_distance"] for row in rows] == pytest.approx([6, 1])
    assert [row["worker/torso_height"] for row in rows] == pytest.approx([0.155, 0.455])
    assert [row["worker/upside_down"] for row in rows] == pytest.approx([1 / 3, 1 / 3])


def test_speed_leaves_evaluation_out(module, toy_run, monkeypatch, tmp_path):
    """Ten seconds of evaluation, by a clock that only evaluation and steps move."""
    clock, evaluate = [0.0], module.evaluate

    class Env(ToyEnv):
        def step(self, action):
            clock[0] += 0.5
            return super().step(action)

    def slow(*inputs):
        clock[0] += 10
        return evaluate(*inputs)

    monkeypatch.setattr(module, "evaluate", slow)
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    toy_run(module, 60, Env(limit=1000), eval_every=30, learning_starts=1000)
    rows = read_rows(tmp_path / "run", times=True)
    assert [float(row["steps_per_second"]) for row in rows] == [2, 2]
    assert [float(row["time"]) for row in rows] == [15, 40]


def test_eval_only_takes_both_levels_from_the_file(module, toy_run, monkeypatch, tmp_path):
    toy_run(module, 60, ToyEnv(), learning_starts=40)
    file, seen = tmp_path / "run" / "model.pt", []

    def note(env, manager, worker, *more):
        seen.append({"manager": manager.state_dict(), "worker": worker.state_dict()})
        return {}

    monkeypatch.setattr(module, "evaluate", note)
    saved = torch.load(file, weights_only=True)
    settings = saved["args"] | dict(eval_only=True, checkpoint=str(file), seed=9, run_dir=None)
    module.main(module.Args(**settings))
    for level in ("manager", "worker"):
        for net in ("actor", "target_actor", "critic", "target_critic"):
            for name, value in saved[level][net].items():
                assert torch.equal(seen[0][level][net][name], value), (level, net, name)


def test_a_maze_of_your_own_works_in_every_script(module, tmp_path):
    """The block of docs/envs.md, as it stands."""
    text = (ROOT / "docs" / "envs.md").read_text()
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "EnvSpec(" in part)
    specs, mazes = dict(SPECS), dict(MAZES)
    try:
        exec(block, {})
        (own,) = SPECS.keys() - specs
        flags = ["--env", own, *TINY, "--run-dir", str(tmp_path / "own"), "--total-steps", "12"]
        module.main(module.parse_args(flags))
        assert [row["step"] for row in read_rows(tmp_path / "own")] == ["12"]
    finally:
        for table, before in ((SPECS, specs), (MAZES, mazes)):
            for name in table.keys() - before:
                del table[name]


def test_an_error_leaves_the_precision_as_it_was(module):
    with pytest.raises(RuntimeError), module.fast_cpu_matmul(module.Args(), torch.device("cpu")):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("limit", [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0,)])
def test_limits_of_actions(module, limit):
    """Scores of candidates are divided by them."""
    with pytest.raises(SystemExit, match="--action-limit needs 2 positive numbers"):
        module.make_agents(ToyEnv(), module.Args(subgoal_space="xy", action_limit=limit), torch.device("cpu"))


def test_actions_of_one_sign(module):
    """An actor gives +-limit; an environment with other bounds would silently get half of them."""
    env = ToyEnv()
    env.action_space = gym.spaces.Box(0.0, 1.0, (2,), np.float32)
    with pytest.raises(SystemExit, match="actions must lie within"):
        module.make_agents(env, module.Args(subgoal_space="xy"), torch.device("cpu"))


def one_line_on_stderr(result, script):
    assert result.code not in (0, None), result.err
    assert result.err.startswith(f"{script}.py: error: ") and result.err.count("\n") == 1, result.err
    return result.err


def test_unknown_environment_lists_the_known(script, run):
    text = one_line_on_stderr(run(script, "--env", "AntMaze-X", ok=False), script)
    assert all(env in text for env in SPECS)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--env PointMaze-U --action-limit 1 2 3", "--action-limit"),
        ("--subgoal-limit 1 2 3", "--subgoal-limit"),
        ("--subgoal-space xy --subgoal-limit 1 0", "--subgoal-limit"),
        ("--env PointMaze-U --device nonsense", "--device"),
        ("--env PointMaze-U --run-dir {file}/below", "--run-dir"),
    ],
)
def test_bad_flags_that_show_later(script, run, tmp_path, flags, word):
    (tmp_path / "file").write_text("a file, not a folder")
    flags = flags.format(file=tmp_path / "file").split()
    text = one_line_on_stderr(run(script, "--run-dir", tmp_path / "run", *flags, ok=False), script)
    assert word in text


def test_foreign_checkpoints(script, module, capsys, tmp_path, model_of):
    """Garbage, nothing, a tensor, a folder, a pickle that would run code, another's, a later format."""
    files = {
        name: tmp_path / name for name in ("garbage", "empty", "tensor", "folder", "code", "other", "later")
    }
    files["garbage"].write_bytes(os.urandom(1000))
    files["empty"].touch()
    files["folder"].mkdir()
    torch.save(torch.zeros(3), files["tensor"])
    torch.save(Trap(tmp_path / "trapped"), files["code"])
    others = [name for name in SCRIPTS if name != script]
    torch.save({"script": "someone_else"}, files["other"])
    if others:
        files["sibling"] = model_of(others[0])
    later = torch.load(model_of(script), weights_only=True)
    torch.save(later | {"format": 99}, files["later"])
    for name, path in files.items():
        for flags in (["--eval-only", "--checkpoint", path], ["--resume", path]):
            code, text = parse(module, capsys, *flags)
            assert code == 1 and str(path) in text and "\n" not in text, (name, text)
            if name == "sibling":
                assert f"written by {others[0]}" in text
    assert not (tmp_path / "trapped").exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoint_of_another_environment(script, run, model_of, tmp_path):
    flags = ["--eval-only", "--checkpoint", model_of(script), "--env", "AntMaze-U"]
    assert "has another robot" in one_line_on_stderr(run(script, *flags, ok=False), script)
    state = torch.load(model_of(script), weights_only=True)
    wrong = {"env": "AntMaze-U", "action_limit": ()}  # networks of the point say that they are an ant's
    torch.save(state | {"args": state["args"] | wrong}, tmp_path / "model.pt")
    flags[2] = tmp_path / "model.pt"
    text = one_line_on_stderr(run(script, *flags, ok=False), script)
    assert "does not fit" in text and "size mismatch for layers.0.weight" in text


def test_evaluation_elsewhere_takes_a_reward_that_is_there(module, tmp_path):
    env = make_env("AntMaze-U", "sparse")
    args = module.Args(env="AntMaze-U", reward="sparse", hidden=8)
    agents = dict(zip(("manager", "worker"), module.make_agents(env, args, torch.device("cpu"))))
    module.save_checkpoint(agents, args, tmp_path / "model.pt")
    flags = ["--eval-only", "--checkpoint", str(tmp_path / "model.pt"), "--env"]
    assert module.parse_args([*flags, "AntFourRooms"]).reward is None  # it has the dense one only
    assert module.parse_args([*flags, "AntMaze-W"]).reward == "sparse"


def test_evaluation_keeps_the_agent(script, module, capsys, model_of, tmp_path):
    """What would make it another agent is refused; another environment brings its own goals."""
    flags = ["--eval-only", "--checkpoint", model_of(script)]
    args, _ = parse(module, capsys, *flags, "--eval-episodes", 3, "--seed", 7, "--reached-radius", 2)
    assert (args.eval_episodes, args.seed, args.reached_radius) == (3, 7, 2.0)
    old = torch.load(model_of(script), weights_only=True)
    torch.save(old | {"args": old["args"] | {"track": True, "capture_video": True}}, tmp_path / "tracked.pt")
    args, _ = parse(module, capsys, flags[0], flags[1], tmp_path / "tracked.pt")
    assert args.track is args.capture_video is False  # those were for the training
    old["args"].pop("subgoal_limit")  # from before that setting, so with its default
    torch.save(old, tmp_path / "old.pt")
    code, text = parse(module, capsys, flags[0], flags[1], tmp_path / "old.pt", "--subgoal-limit", 2, 2)
    assert code == 1 and "subgoal_limit" in text
    for more in (["--manager-period", 5], ["--hidden", 8], ["--scale-worker-inputs"]):
        code, text = parse(module, capsys, *flags, *more)
        name = more[0].lstrip("-").replace("-", "_")
        assert code == 1 and "as it was trained" in text and name in text and "\n" not in text
    code, text = parse(module, capsys, *flags, "--resume", model_of(script))
    assert code == 1 and "choose one" in text
    state = torch.load(model_of(script), weights_only=True)
    settings = state["args"] | {"env": "AntMaze-ULarge", "eval_goals": (16.0, 0.0), "action_limit": ()}
    torch.save(state | {"args": settings}, tmp_path / "model.pt")
    flags[2] = tmp_path / "model.pt"
    for env, goals in (("AntMaze-ULarge", (16.0, 0.0)), ("AntMaze-U", ())):
        args, _ = parse(module, capsys, *flags, "--env", env)
        assert args.env == env and args.eval_goals == goals


# ---------------------------------------------------------------------------------------- when it goes wrong


def break_worker(module, monkeypatch, after):
    """From then on the worker's critic loss is NaN."""
    count, update = [0], module.update_worker

    def broken(*inputs, **flags):
        losses = update(*inputs, **flags)
        count[0] += 1
        return losses | ({"worker/critic_loss": torch.tensor(float("nan"))} if count[0] > after else {})

    monkeypatch.setattr(module, "update_worker", broken)


def tiny_args(module, script, *flags):
    flags = ["--env", "PointMaze-U", *TINY, *TINY_OF.get(script, ()), *flags]
    return module.parse_args([str(flag) for flag in flags])


def test_nan_stops_the_run(script, module, monkeypatch, tmp_path):
    """The evaluation at step 80 is good, the loss is NaN from about step 90 on."""
    break_worker(module, monkeypatch, after=30)
    args = tiny_args(module, script, "--total-steps", 160, "--eval-every", 80, "--run-dir", tmp_path)
    kept = []
    save = module.save_checkpoint
    monkeypatch.setattr(
        module,
        "save_checkpoint",
        lambda *inputs, **more: (save(*inputs, **more), kept.append(model.read_bytes())),
    )
    model = tmp_path / "model.pt"
    with pytest.raises(SystemExit) as stop:
        module.main(args)
    assert "worker/critic_loss" in stop.value.code and "160" in stop.value.code
    assert len(kept) == 1 and model.read_bytes() == kept[0]
    assert [row["step"] for row in read_rows(tmp_path)] == ["80"]


def test_nan_does_not_spoil_the_checkpoint(script, module, monkeypatch, tmp_path):
    """Saved at 70 with good networks; at 140 they are NaN, but --resume must have something to start from."""
    break_worker(module, monkeypatch, after=30)
    flags = ("--total-steps", 160, "--eval-every", 1000, "--save-every", 70, "--run-dir", tmp_path)
    with pytest.raises(SystemExit):
        module.main(tiny_args(module, script, *flags))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["loop"]["step"] == 70


def test_gather_trains(script, train, tmp_path):
    """The environment without a goal, whose episodes end early."""
    flags = {"aclg_gcmr": ["--landmark-weight", 0]}.get(script, [])
    train(script, "AntGather", tmp_path, "--total-steps", 120, "--eval-every", 60, *flags)
    assert [row["step"] for row in read_rows(tmp_path)] == ["60", "120"]


def test_a_full_disk_leaves_the_table_whole(script, module, capsys, tmp_path, monkeypatch):
    path = tmp_path / "progress.csv"
    module.append_row(path, {"step": 1, "eval/success": 0.5})
    before = path.read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(SystemExit, match="cannot write .*progress.csv.*No space left"):
        module.append_row(path, {"step": 2, "eval/success": 0.5})
    assert path.read_text() == before and [file.name for file in tmp_path.iterdir()] == ["progress.csv"]


@pytest.mark.parametrize("odd", [{}, {"format": "1", "args": {}}, {"format": 1, "args": [1]}])
def test_a_checkpoint_without_settings(script, module, tmp_path, odd):
    torch.save({"script": script} | odd, tmp_path / "model.pt")
    with pytest.raises(SystemExit, match="damaged"):
        module.load_checkpoint(str(tmp_path / "model.pt"))
