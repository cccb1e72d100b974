"""Shared by the tests: running a script as its own process, and a toy environment for the training loops.

A process that imports torch and MuJoCo afresh costs seconds, so scripts run in children of a "fork server"
that holds these libraries (but no script). test_scripts.py has real command lines as well.
"""

import csv
import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [name for name in ("hiro", "cher", "aclg_gcmr") if (ROOT / f"{name}.py").exists()]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "pytest",
        "numpy",
        "torch",
        "torch.utils.tensorboard",
        "tyro",
        "tqdm",
        "gymnasium",
        "mujoco",
        "matplotlib.pyplot",
    ]
)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    """A test that seeds nothing must not depend on which tests ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


NO_EVALUATION = {"eval/success": 0.0, "eval/success_any": 0.0, "eval/return": 0.0, "eval/progress": 0.0}


def spy_on_worker(monkeypatch, module):
    """Agents of each run of the script, and for each action: is it just what the worker's policy says?"""
    made, by_policy, make, explore = [], [], module.make_agents, module.explore

    def noted(agent, obs, goal, uniform_share):
        action = explore(agent, obs, goal, uniform_share)
        if agent is made[-1][1]:
            by_policy.append(np.array_equal(action, agent.act(obs, goal, explore=False)))
        return action

    monkeypatch.setattr(module, "make_agents", lambda *inputs: made.append(make(*inputs)) or made[-1])
    monkeypatch.setattr(module, "explore", noted)
    monkeypatch.setattr(module, "evaluate", lambda *inputs: NO_EVALUATION)
    return made, by_policy


# Flags with which a script trains in a second or two, and what makes each of its parts run.
TINY = "--learning-starts 60 --eval-episodes 1 --batch-size 16 --hidden 32 --threads 1 --device cpu".split()
TINY_OF = {
    "cher": "--coop-delta -5 --coop-starts 2 --hindsight --relabeling off_policy".split(),
    "aclg_gcmr": "--dynamics-starts 200 --dynamics-every 200 --dynamics-first-updates 5 --dynamics-updates 3 "
    "--dynamics-batch-size 16 --dynamics-hidden 16 --planner-starts 300 --coverage-landmarks 5 "
    "--planner-keeps-graph 3 --coverage-pool 50 --novelty-landmarks 5 --adjacency-every 200 "
    "--adjacency-epochs 2 --worker-critic-updates-with-penalty 2 --rollout-planning-every 3 "
    "--redrawn-subgoals 0.5 --rest-value".split(),
}


def run_as_main(path, argv, out, err, before):
    """In the child: what `python path argv` does, after the statements of `before`."""
    for stream, number in ((out, 1), (err, 2)):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [str(path), *argv]
    sys.path.insert(0, str(Path(path).parent))
    exec(before, {})
    runpy.run_path(str(path), run_name="__main__")


class Job:
    """A script that runs as its own process."""

    def __init__(self, folder, script, argv, before):
        self.out, self.err = folder / "stdout", folder / "stderr"
        self.out.touch(), self.err.touch()
        arguments = (ROOT / f"{script}.py", [str(arg) for arg in argv], self.out, self.err, before)
        self.process = FORKSERVER.Process(target=run_as_main, args=arguments)
        self.process.start()

    def wait_for(self, path, timeout=120):
        """Until the file exists."""
        end = time.time() + timeout
        while not path.exists():
            assert self.process.is_alive() or path.exists(), self.err.read_text()
            assert time.time() < end, f"{path} did not appear"
            time.sleep(0.002)

    def wait(self, timeout=300):
        """Exit code, stdout and stderr."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {self.out.read_text()}")
        return SimpleNamespace(code=self.process.exitcode, out=self.out.read_text(), err=self.err.read_text())


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start(script, *flags, before="") -> a running Job."""
    jobs = []

    def start(script, *argv, before=""):
        jobs.append(Job(tmp_path_factory.mktemp("job"), script, argv, before))
        return jobs[-1]

    yield start
    for job in jobs:  # what a failed test left running
        job.process.kill()
        job.process.join()


@pytest.fixture(scope="session")
def run(start):
    """run(script, *flags, before="", ok=True, timeout=300) -> code, out and err of the finished process."""

    def run(script, *argv, before="", ok=True, timeout=300):
        result = start(script, *argv, before=before).wait(timeout)
        assert not ok or result.code == 0, result.err
        return result

    return run


@pytest.fixture(scope="session")
def train(run):
    """train(script, env, run_dir, *flags): a short training with every part of the script."""

    def train(script, env, run_dir, *argv, **options):
        flags = ["--env", env, "--run-dir", run_dir, *TINY, *TINY_OF.get(script, ()), *argv]
        return run(script, *flags, **options)

    return train


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="session")
def module(script):
    return importlib.import_module(script)


@pytest.fixture(scope="session")
def reference_flags(script):
    """A run that test_determinism.py repeats and test_resume.py interrupts in its second episode (of 500).

    The parts of aclg_gcmr.py that work between episodes get a second turn.
    """
    return ["--total-steps", 1030 if script == "aclg_gcmr" else 630, "--eval-every", 285]


@pytest.fixture(scope="session")
def reference(script, train, reference_flags, tmp_path_factory):
    """The folder of that run."""
    folder = tmp_path_factory.mktemp(f"reference_{script}")
    train(script, "PointMaze-U", folder, *reference_flags)
    return folder


def read_rows(run_dir, times=False):
    """progress.csv as a list of dicts, without the columns that measure time."""
    with open(run_dir / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    drop = () if times else ("time", "steps_per_second")
    return [{name: value for name, value in row.items() if name not in drop} for row in rows]


@pytest.fixture(autouse=True)
def as_before():
    """main() of a script, called in this process, leaves signal handlers behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_float32_matmul_precision("highest")


class ToyEnv:
    """A point on a plane: x, y move by the action times `speed`; obs = x, y, steps, last action.

    An episode is cut at `limit` steps, or ends at step `death`, by a death if it `dies`. Reward at step n of
    the episode: -n. The goal moves by (1, 1) from episode to episode.
    """

    def __init__(self, limit=23, death=None, speed=1.0, goal=(3.0, 4.0), dies=True):
        self.limit, self.death, self.speed, self.dies = limit, death, speed, dies
        space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float64)
        self.observation_space = gym.spaces.Dict(observation=space)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.task = SimpleNamespace(goal_dim=2, reward_dims=2, eval_goals=(goal,), slabs=())
        self.maze = SimpleNamespace(walls=(), size=1.0)
        self.log = []  # (obs, action, next_obs) of each step
        self.resets = []  # the seed of each

    def observe(self):
        obs = np.concatenate([self.xy, [self.steps], self.action])
        return {"observation": obs, "achieved_goal": self.xy.copy(), "desired_goal": self.goal.copy()}

    def reset(self, *, seed=None, options=None):
        self.xy, self.action, self.steps = np.array([0.5, -0.25]), np.zeros(2), 0
        goal = np.add(self.task.eval_goals[0], len(self.resets))
        self.resets.append(seed)
        self.goal = np.array((options or {}).get("goal", goal), np.float64)
        return self.observe(), {}

    def step(self, action):
        before = self.observe()["observation"]
        assert np.all(np.abs(action) <= 1)
        self.action = np.asarray(action, np.float64)
        self.xy = self.xy + self.speed * self.action
        self.steps += 1
        self.log.append((before, action, self.observe()["observation"]))
        info = {"is_success": self.is_success(), "torso_height": 0.5, "upside_down": False}
        info["dead"] = self.dies and self.steps == self.death
        return self.observe(), -float(self.steps), self.steps == self.death, self.steps >= self.limit, info

    def get_state(self):
        return {}

    def is_success(self):
        return False


@pytest.fixture
def toy_run(monkeypatch, tmp_path):
    """toy_run(module, steps, env, **settings): main() on a ToyEnv; what went into both replay buffers."""

    def toy_run(module, steps, env, **settings):
        added = {"worker": [], "manager": []}

        def add(buffer, _add=module.ReplayBuffer.add, **fields):
            kept = {name: np.array(value, copy=True) for name, value in fields.items()}
            added["manager" if "action_seq" in fields else "worker"].append(SimpleNamespace(**kept))
            _add(buffer, **fields)

        monkeypatch.setattr(module.ReplayBuffer, "add", add)
        monkeypatch.setattr(
            module, "make_env", lambda *args, evaluate=False, **how: ToyEnv(3) if evaluate else env
        )
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # of an earlier call
        settings = dict(total_steps=steps, eval_every=10**9, eval_episodes=1, hidden=8, threads=1) | settings
        settings |= dict(device="cpu", subgoal_space="xy", run_dir=str(tmp_path / "run"), batch_size=8)
        module.main(module.Args(**settings))
        return SimpleNamespace(**added)

    return toy_run
