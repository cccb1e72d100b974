"""--start-from: a new run with the settings and networks of an agent."""

import pytest
import torch
from conftest import TINY, TINY_OF, spy_on_worker

from common_envs import make_env

CPU = torch.device("cpu")
OTHER = "--output-init 0 --actor-lr 1e-3 --random-subgoals 0.25 --uniform-warmup --variant mine".split()


@pytest.fixture
def published(module, tmp_path):
    """A file as in benchmark/agents: networks without optimizers; its two levels."""
    args = module.parse_args(["--env", "PointMaze-U", *TINY, *TINY_OF.get(module.SCRIPT, ()), *OTHER])
    env = make_env("PointMaze-U")
    agents = dict(zip(("manager", "worker"), module.make_agents(env, args, CPU)))
    parts = dict(agents)
    if module.SCRIPT == "aclg_gcmr":
        obs_dim = env.observation_space["observation"].shape[0]
        parts["novelty"] = module.Novelty(obs_dim, 2, args)
    path = tmp_path / "agent.pt"
    module.save_checkpoint(parts, args, path)
    state = torch.load(path, weights_only=True)
    for level in agents:
        state[level] = {name: x for name, x in state[level].items() if not name.endswith("optimizer")}
    torch.save(state, path)
    return path, tuple(agents.values())


def numbers(agents):
    names = "actor", "critic", "target_actor", "target_critic"
    nets = [getattr(agent, name) for agent in agents for name in names]
    return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])


def test_a_run_begins_with_the_agent(module, published, tmp_path, monkeypatch):
    """Up to learning_starts its policies collect, with noise; then the networks learn."""
    path, agents = published
    shares, made = [], spy_on_worker(monkeypatch, module)[0]
    explore = module.explore
    monkeypatch.setattr(module, "explore", lambda *inputs: shares.append(inputs[3]) or explore(*inputs))
    argv = ["--start-from", str(path), "--eval-every", "1000", "--save-every", "1000"]
    module.main(module.parse_args([*argv, "--total-steps", "60", "--run-dir", str(tmp_path / "a")]))
    assert torch.equal(numbers(made[0]), numbers(agents))
    assert set(shares) == {0.25, 0.0}, "the file's uniform warm-up is for networks that know nothing"
    state = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    assert state["loop"]["step"] == 60 and state["args"]["actor_lr"] == 1e-3

    module.main(module.parse_args([*argv, "--total-steps", "80", "--run-dir", str(tmp_path / "b")]))
    assert not torch.equal(numbers(made[1]), numbers(agents))
    path.unlink()  # the checkpoint has all that is needed
    resumed = ["--resume", str(tmp_path / "a" / "checkpoint.pt"), "--total-steps", "80"]
    module.main(module.parse_args(resumed))
    assert torch.equal(numbers(made[2]), numbers(made[1]))


def test_the_run_is_its_own(module, published):
    """The file's settings, but for what concerned that run; flags change what networks do not depend on."""
    path, _ = published
    state = torch.load(path, weights_only=True)
    state["args"] |= {"run_dir": "elsewhere", "track": True, "capture_video": True}
    torch.save(state, path)
    args = module.parse_args(["--start-from", str(path), "--seed", "7", "--actor-lr", "1e-5"])
    assert (args.env, args.variant, args.hidden) == ("PointMaze-U", "mine", 32)
    assert (args.seed, args.actor_lr) == (7, 1e-5)
    assert args.run_dir is None and not args.track and not args.capture_video


def test_optimizers_go_on_at_the_rates_of_the_new_run(module, published, tmp_path, monkeypatch):
    """A run's own model.pt has them, with moments, and with the rates that it had."""
    made = spy_on_worker(monkeypatch, module)[0]
    argv = ["--start-from", str(published[0]), "--eval-every", "80", "--total-steps", "80"]
    module.main(module.parse_args([*argv, "--run-dir", str(tmp_path / "a")]))
    argv = ["--start-from", str(tmp_path / "a" / "model.pt"), "--actor-lr", "1e-5", "--total-steps", "60"]
    module.main(module.parse_args([*argv, "--run-dir", str(tmp_path / "b")]))
    for before, after in zip(made[0], made[1]):
        old, new = before.actor_optimizer.state_dict(), after.actor_optimizer.state_dict()
        assert old["param_groups"][0]["lr"] == 1e-3 and new["param_groups"][0]["lr"] == 1e-5
        assert torch.equal(old["state"][0]["exp_avg"], new["state"][0]["exp_avg"])


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--eval-only --checkpoint {path}", "--start-from begins"),
        ("--resume {path}", "--start-from begins"),
        ("--hidden 16", "hidden"),
        ("--preset quick", "preset"),
        ("--worker-gamma 0.5", "worker_gamma"),
        ("--subgoal-limit 3 3 --hidden 16", "hidden, subgoal_limit"),
    ],
)
def test_refusals(module, published, flags, word):
    path, _ = published
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--start-from", str(path), *flags.format(path=path).split()])
    assert stop.value.code.startswith(f"{module.SCRIPT}.py: error: ") and word in stop.value.code


def test_an_environment_with_other_obs_is_refused(module, published, tmp_path):
    path, _ = published
    with pytest.raises(SystemExit) as stop:
        argv = ["--start-from", str(path), "--env", "AntMaze-U", "--run-dir", str(tmp_path / "run")]
        module.main(module.parse_args(argv))
    assert stop.value.code.startswith(f"{module.SCRIPT}.py: error: ") and not (tmp_path / "run").exists()
