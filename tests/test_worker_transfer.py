"""--worker-checkpoint and --freeze-worker of hiro.py; cher.py's, the same text, are in test_cher.py."""

import pytest
import torch
from conftest import TINY, spy_on_worker

import hiro
from common_envs import make_env

CPU = torch.device("cpu")


def trained(path, env="AntMaze-U"):
    """A model.pt with untrained networks whose outputs are not nearly 0."""
    args = hiro.parse_args(
        ["--env", env, "--subgoal-limit", "10", "10", "--hidden", "32", "--output-init", "0"]
    )
    agents = dict(zip(("manager", "worker"), hiro.make_agents(make_env(env), args, CPU)))
    hiro.save_checkpoint(agents, args, path)
    return agents["worker"]


def parameters(agent):
    nets = agent.actor, agent.critic, agent.target_actor, agent.target_critic
    return [p.clone() for net in nets for p in net.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


LARGE = "--env AntMaze-ULarge --subgoal-space xy --subgoal-limit 10 10 --scale-worker-inputs".split()
LARGE += "--no-worker-looks-ahead --worker-gamma 0.95 --output-init 0".split()


@pytest.mark.parametrize("frozen", [True, False])
def test_worker_of_another_maze(tmp_path, monkeypatch, frozen):
    """Frozen, it acts by its policy alone from the first step, and only the manager learns; it resumes."""
    old = trained(tmp_path / "old.pt")
    made, asked = spy_on_worker(monkeypatch, hiro)
    flags = [*LARGE, *TINY, "--total-steps", "85", "--eval-every", "1000", "--save-every", "80"]
    flags += ["--uniform-warmup", "--run-dir", str(tmp_path / "run"), *["--freeze-worker"] * frozen]
    hiro.main(hiro.parse_args([*flags, "--worker-checkpoint", str(tmp_path / "old.pt")]))
    ((manager, worker),) = made
    assert all(asked) if frozen else not any(asked)
    assert len(asked) == 85 and equal(parameters(old), parameters(worker)) == frozen
    assert manager.critic_optimizer.state_dict()["state"][0]["step"] == 2  # at 70 and 80
    assert bool(worker.critic_optimizer.state_dict()["state"]) != frozen

    (tmp_path / "old.pt").unlink()  # the checkpoint has all that is needed
    before = parameters(worker), parameters(manager)
    hiro.main(hiro.parse_args(["--resume", str(tmp_path / "run" / "checkpoint.pt"), "--total-steps", "90"]))
    manager, worker = made[-1]
    assert equal(before[0], parameters(worker)) == frozen and not equal(before[1], parameters(manager))


def test_loaded_worker_starts_as_it_was(tmp_path):
    old = trained(tmp_path / "old.pt")
    env, args = make_env("AntMaze-ULarge"), hiro.parse_args([*LARGE, "--hidden", "32"])
    args.worker_checkpoint = str(tmp_path / "old.pt")
    _, worker = hiro.make_agents(env, args, CPU)
    assert not equal(parameters(old), parameters(worker))
    hiro.load_worker(worker, env, args)
    assert equal(parameters(old), parameters(worker))


@pytest.mark.parametrize("saved, flags", [((10.0, 10.0), ""), ((), "--subgoal-limit 10 10")])
def test_the_default_limit_by_name_is_the_same_limit(tmp_path, saved, flags):
    """The space's own half-range, once as numbers and once as (): nothing to refuse."""
    path = tmp_path / "old.pt"
    trained(path)
    state = torch.load(path, weights_only=True)
    state["args"] |= {"subgoal_limit": list(saved), "scale_worker_inputs": True}
    torch.save(state, path)
    flags = ["--subgoal-space", "xy", "--scale-worker-inputs", *flags.split()]
    env = make_env("AntMaze-ULarge")
    args = hiro.parse_args(["--hidden", "32", *flags, "--worker-checkpoint", str(path)])
    hiro.load_worker(hiro.make_agents(env, args, CPU)[1], env, args)


def test_a_worker_of_a_maze_that_only_a_fork_has(tmp_path):
    path = tmp_path / "old.pt"
    old = trained(path)
    state = torch.load(path, weights_only=True)
    state["args"]["env"] = "AntMaze-Zigzag"
    torch.save(state, path)
    env, args = make_env("AntMaze-ULarge"), hiro.parse_args([*LARGE, "--hidden", "32"])
    args.worker_checkpoint = str(path)
    _, worker = hiro.make_agents(env, args, CPU)
    hiro.load_worker(worker, env, args)
    assert equal(parameters(old), parameters(worker))


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--subgoal-limit 2 2", "subgoal_limit"),
        ("--no-mask-xy", "mask_xy"),
        ("--hidden 16", "hidden"),
        ("--subgoal-space full", "subgoal_space"),
    ],
)
def test_settings_that_must_agree(tmp_path, flags, word):
    trained(tmp_path / "old.pt")
    env = make_env("AntMaze-ULarge")
    other = [] if word == "subgoal_space" else ["--subgoal-space", "xy", "--subgoal-limit", "10", "10"]
    args = hiro.parse_args(["--hidden", "32", *other, "--scale-worker-inputs", *flags.split()])
    args.worker_checkpoint = str(tmp_path / "old.pt")
    _, worker = hiro.make_agents(env, args, CPU)
    with pytest.raises(SystemExit) as stop:
        hiro.load_worker(worker, env, args)
    assert stop.value.code.startswith("hiro.py: error: ") and word in stop.value.code


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--freeze-worker", "--worker-checkpoint"),
        (
            "--freeze-worker --worker-checkpoint x.pt --redrawn-subgoals 0.5 --no-worker-looks-ahead",
            "does not learn",
        ),
    ],
)
def test_impossible_flags(flags, word):
    with pytest.raises(SystemExit) as stop:
        hiro.parse_args(["--env", "AntMaze-ULarge", *flags.split()])
    assert stop.value.code.startswith("hiro.py: error: ") and word in stop.value.code
