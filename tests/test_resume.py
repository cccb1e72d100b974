"""Stopping and going on: bit for bit, and never without a whole checkpoint."""

import collections
import csv
import json
import random
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY, ToyEnv, read_rows

STOP_AT = 557  # in the middle of the second episode and of a segment, after an evaluation at 285

# Before the script starts: what a training environment does at its n-th step.
AT_STEP = """
import common_envs, os, signal
step, count = common_envs.AntEnv.step, [0]
def counting_step(env, action):
    count[0] += not env.evaluate
    if count[0] == {n} and not env.evaluate:
        {do}
    return step(env, action)
common_envs.AntEnv.step = counting_step
"""
SIGTERM = "os.kill(os.getpid(), signal.SIGTERM)"
CRASH = "os._exit(9)"


@pytest.fixture(scope="session")
def stopped(script, train, reference_flags, tmp_path_factory):
    """The folder of the reference run, stopped by SIGTERM during a step; what was printed."""
    folder = tmp_path_factory.mktemp(f"stopped_{script}")
    stop = AT_STEP.format(n=STOP_AT, do=SIGTERM)
    return folder, train(script, "PointMaze-U", folder, *reference_flags, before=stop)


def tensors(tree, name=""):
    """Every number and tensor in a checkpoint, by its path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, f"{name}/{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from tensors(value, f"{name}/{index}")
    else:
        yield name, tree


def same_model(a, b):
    """Networks, targets and optimisers, bit for bit."""
    a, b = (dict(tensors(torch.load(path, weights_only=True))) for path in (a, b))
    a, b = ({name: x for name, x in t.items() if not name.startswith("/args")} for t in (a, b))
    assert a.keys() == b.keys() and sum(torch.is_tensor(x) for x in a.values()) > 40
    for name, x in a.items():
        assert torch.equal(x, b[name]) if torch.is_tensor(x) else x == b[name], name


def same_run(folder, reference):
    assert read_rows(folder) == read_rows(reference)
    same_model(folder / "model.pt", reference / "model.pt")
    times = [float(row["time"]) for row in read_rows(folder, times=True)]
    assert times == sorted(times)


def test_sigterm_saves_and_ends_well(stopped, script):
    folder, result = stopped
    assert result.code == 0 and "Traceback" not in result.err
    assert f"--resume {folder / 'checkpoint.pt'}" in result.out
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["loop"]["step"] == STOP_AT
    assert [row["step"] for row in read_rows(folder)] == ["285"]
    assert not list(folder.glob("*.tmp"))


def test_resumed_run_is_the_same_run(stopped, script, run, reference, tmp_path):
    """In its own folder, by default; only the number of steps is needed, the rest is in the file."""
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    first, commit = (json.loads((folder / "config.json").read_text())[name] for name in ("command", "commit"))
    run(script, "--resume", folder / "checkpoint.pt")
    same_run(folder, reference)
    # the older checkpoint is gone: given more steps, the run goes on from its end and repeats nothing
    end = torch.load(folder / "checkpoint.pt", weights_only=True)["loop"]["step"]
    assert end == (1030 if script == "aclg_gcmr" else 630)
    config = json.loads((folder / "config.json").read_text())  # the run's settings came by the first command
    assert config["earlier_commits"] == [commit]
    assert config["earlier_commands"] == [first] and "--resume" in config["command"]


def test_run_after_a_crash_is_the_same_run(script, train, run, reference, reference_flags, tmp_path):
    """Killed at step 600 with a checkpoint of 557: the row of step 570 is written a second time."""
    flags = (*reference_flags, "--save-every", STOP_AT)
    crash = AT_STEP.format(n=600, do=CRASH)
    result = train(script, "PointMaze-U", tmp_path, *flags, before=crash, ok=False)
    assert result.code == 9, result.err
    assert [row["step"] for row in read_rows(tmp_path)] == ["285", "570"]
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    lines[-1] = lines[-1].replace("570,", "570,9999", 1)  # "time" tells which one stays
    (tmp_path / "progress.csv").write_text("\n".join(lines) + "\n")
    run(script, "--resume", tmp_path / "checkpoint.pt")
    same_run(tmp_path, reference)
    assert float(read_rows(tmp_path, times=True)[1]["time"]) < 9999


def test_ant_resumes(train, run, tmp_path):
    """MuJoCo's state with contacts, and an environment that draws random numbers in each step."""
    flags = ("--total-steps", 200, "--eval-every", 200, "--worker-noise", 10)
    train("hiro", "AntMaze-UStochastic", tmp_path / "whole", *flags)
    train("hiro", "AntMaze-UStochastic", tmp_path / "part", *flags, before=AT_STEP.format(n=127, do=SIGTERM))
    run("hiro", "--resume", tmp_path / "part" / "checkpoint.pt")
    same_run(tmp_path / "part", tmp_path / "whole")


# ---------------------------------------------------------------------------------------- what is refused


def refusal(module, *flags):
    """The one line with which a run does not start, in this process."""
    with pytest.raises(SystemExit) as stop:
        module.main(module.parse_args([str(flag) for flag in flags]))
    assert stop.value.code.startswith(f"{module.SCRIPT}.py: error: ") and "\n" not in stop.value.code
    return stop.value.code


def test_files_that_do_not_resume(stopped, module, tmp_path):
    folder, _ = stopped
    whole = (folder / "checkpoint.pt").read_bytes()
    for name, content in (("half.pt", whole[: len(whole) // 2]), ("garbage.pt", b"no checkpoint" * 50)):
        (tmp_path / name).write_bytes(content)
        assert name in refusal(module, "--resume", tmp_path / name)
    shutil.copy(folder / "model.pt", tmp_path)
    text = refusal(module, "--resume", tmp_path / "model.pt", "--total-steps", 2000)
    assert "networks only" in text and "checkpoint.pt" in text


def test_checkpoint_of_another_version(stopped, module, tmp_path):
    """Its loop counted other things, so that the run could not go on exactly."""
    state = torch.load(stopped[0] / "checkpoint.pt", weights_only=True)
    del state["loop"]["returns"]
    torch.save(state, tmp_path / "old.pt")
    (tmp_path / "config.json").write_text('{"command": "python old.py", "commit": "old"}')
    text = refusal(module, "--resume", tmp_path / "old.pt", "--total-steps", 2000)
    assert "old.pt is of another version" in text and "(returns)" in text and "config.json" in text
    assert json.loads((tmp_path / "config.json").read_text())["commit"] == "old"  # it tells which one


def test_checkpoint_of_an_environment_that_is_not_here(stopped, module, tmp_path):
    state = torch.load(stopped[0] / "checkpoint.pt", weights_only=True)
    state["args"]["env"] = "MyMaze"
    torch.save(state, tmp_path / "mine.pt")
    assert "MyMaze" in refusal(module, "--resume", tmp_path / "mine.pt")
    assert "MyMaze" in refusal(module, "--eval-only", "--checkpoint", tmp_path / "mine.pt")


def test_damaged_config(stopped, module, tmp_path):
    shutil.copy(stopped[0] / "checkpoint.pt", tmp_path)
    for content in ("", "{}"):
        (tmp_path / "config.json").write_text(content)
        text = refusal(module, "--resume", tmp_path / "checkpoint.pt", "--total-steps", 2000)
        assert "config.json is damaged" in text and (tmp_path / "config.json").read_text() == content


def test_settings_cannot_change_in_a_resumed_run(stopped, module, tmp_path):
    shutil.copy(stopped[0] / "checkpoint.pt", tmp_path)
    for flags, word in (
        (("--worker-gamma", 0.5), "worker_gamma"),
        (("--env", "AntMaze-U"), "env"),
        (("--total-steps", 300), "--total-steps"),  # lies behind
    ):
        assert word in refusal(module, "--resume", tmp_path / "checkpoint.pt", *flags)


def test_folder_that_cannot_be_written(module, tmp_path):
    (tmp_path / "file").touch()
    assert "--run-dir" in refusal(module, "--device", "cpu", "--run-dir", tmp_path / "file" / "run")


# -------------------------------------------------------------------------------------------- bad moments


class Part:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": torch.full((1000,), self.value)}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
@pytest.mark.parametrize("moment", ["write", "fsync", "rename"])
def test_full_disk(module, monkeypatch, tmp_path, error, moment):
    """One line; the older file is whole and nothing lies around."""
    path = tmp_path / "checkpoint.pt"
    module.save_checkpoint({"part": Part(1.0)}, module.Args(), path)

    def half_written(state, file):
        file.write(b"PK" + bytes(5000))
        raise error

    def fails(*inputs):
        raise error

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(torch, "save", half_written)
        else:
            patch.setattr(module.os, {"fsync": "fsync", "rename": "replace"}[moment], fails)
        with pytest.raises(SystemExit) as stop:
            module.save_checkpoint({"part": Part(2.0)}, module.Args(), path)
    assert stop.value.code.startswith(f"{module.SCRIPT}.py: error: ") and "\n" not in stop.value.code
    assert str(path) in stop.value.code
    assert torch.load(path, weights_only=True)["part"]["value"][0] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    module.save_checkpoint({"part": Part(3.0)}, module.Args(), path)  # there is room again
    assert torch.load(path, weights_only=True)["part"]["value"][0] == 3


def test_full_disk_at_tensorboard(module, tmp_path):
    """Its thread fails, and the next value meets the error."""

    def fails(*inputs):
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit) as stop:
        module.log_row({"step": 10, "a": 1.5}, tmp_path, SimpleNamespace(add_scalar=fails), None)
    assert "TensorBoard" in stop.value.code and "\n" not in stop.value.code
    assert read_rows(tmp_path) == [{"step": "10", "a": "1.5"}]


def test_progress_survives_a_crash_while_it_is_written(module, monkeypatch, tmp_path):
    path = tmp_path / "progress.csv"
    module.append_row(path, {"step": 10, "a": 1.5})

    def crash(*inputs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", crash)
        with pytest.raises(KeyboardInterrupt):
            module.append_row(path, {"step": 20, "a": 2.5})
    assert read_rows(tmp_path) == [{"step": "10", "a": "1.5"}]
    module.append_row(path, {"step": 20, "a": 2.5, "b": 3.0})  # a column that is new
    module.append_row(path, {"step": 30, "b": 4.0})
    module.append_row(path, {"step": 20, "a": 7.0, "b": 5.0})  # a resumed run
    assert read_rows(tmp_path) == [
        {"step": "10", "a": "1.5", "b": ""},
        {"step": "20", "a": "7.0", "b": "5.0"},
    ]


@pytest.mark.parametrize(
    "script, kills", [("hiro", 5), *(pytest.param(name, 50, marks=pytest.mark.slow) for name in SCRIPTS)]
)
def test_kill_at_any_moment(script, kills, start, run, tmp_path):
    """SIGKILL while checkpoints are written all the time: whichever is there is whole, and resumes.

    One script in CI, as the others save with the same text (test_siblings.py).
    """
    flags = [
        "--env",
        "PointMaze-U",
        *TINY,
        "--total-steps",
        100_000,
        "--eval-every",
        100_000,
        "--save-every",
        2,
    ]
    flags += ["--hidden", 8, "--worker-buffer", 600, "--run-dir", tmp_path]
    flags += [] if script == "cher" else ["--manager-buffer", 50]
    checkpoint, step = tmp_path / "checkpoint.pt", 0
    rng = random.Random(0)
    for repetition in range(kills):
        more = ["--resume", checkpoint, "--run-dir", tmp_path] if repetition else flags
        before = checkpoint.stat().st_mtime_ns if repetition else 0
        job = start(script, *more)
        job.wait_for(checkpoint)
        end = time.time() + 60
        while checkpoint.stat().st_mtime_ns == before and time.time() < end:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.2)
        job.process.kill()
        job.process.join()
        assert job.process.exitcode == -signal.SIGKILL, job.err.read_text()
        state = torch.load(checkpoint, weights_only=True)
        assert state["loop"]["step"] > step and state["loop"]["step"] % 2 == 0
        step = state["loop"]["step"]
    run(script, "--resume", checkpoint, "--total-steps", step + 3, "--eval-every", 100_000)
    assert [row["step"] for row in read_rows(tmp_path)] == [str(step + 3)]


def test_numpy_scalars_can_be_saved(module, tmp_path):
    """A fork's loop easily holds one, as np.linalg.norm(..) < r is; torch.load would refuse the file."""
    tree = {"reached": np.linalg.norm([3, 4]) < 6, "left": [np.float64(0.5), np.arange(3)]}
    torch.save(module.to_tensors(tree), tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded["reached"] is True and loaded["left"][0] == 0.5 and loaded["left"][1].tolist() == [0, 1, 2]


def test_what_no_checkpoint_can_hold(module, toy_run, tmp_path):
    """torch.load would refuse the file in the morning; so the run is refused, before it begins."""
    assert module.to_tensors({"a": [(1, np.zeros(2))]})["a"][0][0] == 1
    assert type(module.to_tensors((1, [2]))) is tuple
    not_readable = [collections.deque([1]), {2}, {np.int64(3): 1}, {frozenset(): 1}, signal.SIGTERM]
    # would come back plain
    plain = [collections.Counter("ab"), collections.namedtuple("Pair", "a b")(1, 2)]
    other = [np.array(["a"]), np.array([None]), np.datetime64("2026-11-30"), 1j, b"a"]
    for value in (*not_readable, *plain, *other):
        with pytest.raises(SystemExit, match=r"state\.best\.5: .* not this "):
            module.to_tensors({"best": {5: [value]}})
    env = ToyEnv()
    env.get_state = lambda: {"recent": collections.deque()}
    with pytest.raises(SystemExit, match="recent: .* not this deque"):
        toy_run(module, 60, env, learning_starts=40)
    assert not (tmp_path / "run").exists()


def test_arrays_in_a_part_can_be_saved(module, tmp_path):
    part = SimpleNamespace(state_dict=lambda: {"best": np.arange(3), "of": None})
    module.save_checkpoint({"elite": part}, module.Args(), tmp_path / "x.pt")
    assert module.load_checkpoint(str(tmp_path / "x.pt"))["elite"]["best"].tolist() == [0, 1, 2]


def test_checkpoint_without_a_part(stopped, module, tmp_path):
    """Of a version that did not have it."""
    state = torch.load(stopped[0] / "checkpoint.pt", weights_only=True)
    del state["worker"]
    torch.save(state, tmp_path / "old.pt")
    text = refusal(module, "--resume", tmp_path / "old.pt", "--total-steps", 2000)
    assert "old.pt has no worker" in text and "config.json" in text
