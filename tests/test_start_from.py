"""--start-from: a new run with the settings and networks of an agent."""

import pytest
import torch
from conftest import ROOT, TINY, TINY_OF, spy_on_worker

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
    assert (args.env, args.variant, args.hidden) == ("PointMaze-U", "mine_on", 32)
    assert (args.seed, args.actor_lr) == (7, 1e-5)
    assert args.run_dir is None and not args.track and not args.capture_video and not args.uniform_warmup


def test_optimizers_go_on_at_the_rates_of_the_new_run(module, published, tmp_path, monkeypatch):
    """A run's own model.pt has them, with moments, and with the rates that it had."""
    made = spy_on_worker(monkeypatch, module)[0]
    argv = ["--start-from", str(published[0]), "--eval-every", "80", "--total-steps", "80"]
    module.main(module.parse_args([*argv, "--run-dir", str(tmp_path / "a")]))
    argv = ["--start-from", str(tmp_path / "a" / "model.pt"), "--total-steps", "60", "--actor-lr", "1e-5"]
    argv += ["--critic-lr", "1e-6", "--critic-weight-decay", "0.5", "--run-dir", str(tmp_path / "b")]
    module.main(module.parse_args(argv))
    for before, after in zip(made[0], made[1]):
        old, new = before.actor_optimizer.state_dict(), after.actor_optimizer.state_dict()
        assert old["param_groups"][0]["lr"] == 1e-3 and new["param_groups"][0]["lr"] == 1e-5
        assert torch.equal(old["state"][0]["exp_avg"], new["state"][0]["exp_avg"])
        group = after.critic_optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (1e-6, 0.5)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--hidden 16", "hidden"),
        ("--preset quick", "leave out --preset"),
        ("--manager-period 5", "manager_period"),
        ("--worker-gamma 0.5", "worker_gamma"),
        ("--subgoal-limit 3 3 --hidden 16", "hidden, subgoal_limit"),
        ("--env AntMaze-U", "another robot"),
    ],
)
def test_refusals(module, published, flags, word):
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--start-from", str(published[0]), *flags.split()])
    assert stop.value.code.startswith(f"{module.SCRIPT}.py: error: ") and word in stop.value.code


@pytest.mark.parametrize(
    "script, flags, word",
    [
        ("hiro", "--worker-checkpoint w.pt", "leave out --worker-checkpoint"),
        ("cher", "--worker-checkpoint w.pt", "leave out --worker-checkpoint"),
        ("cher", "--flat", "flat"),
        ("hiro", "--reward sparse", "reward"),
        ("aclg_gcmr", "--reward dense", "reward"),
        ("aclg_gcmr", "--novelty-landmarks 7", "novelty_landmarks"),
        ("aclg_gcmr", "--worker-reward-scale 2", "worker_reward_scale"),
    ],
)
def test_refusals_of_one_script(script, flags, word):
    module = pytest.importorskip(script)
    agent = ROOT / "benchmark" / "agents" / f"{script}.pt"
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--start-from", str(agent), *flags.split()])
    assert stop.value.code.startswith(f"{script}.py: error: ") and word in stop.value.code


@pytest.mark.parametrize("script", ["hiro", "cher"])
def test_worker_of_the_file_may_stay_as_it_is(script):
    """Also that of a run whose own worker came from a file."""
    module = pytest.importorskip(script)
    agents = ROOT / "benchmark" / "agents"
    args = module.parse_args(["--start-from", str(agents / f"{script}.pt"), "--freeze-worker"])
    assert args.freeze_worker and args.worker_checkpoint is None
    if script == "hiro":
        args = module.parse_args(["--start-from", str(agents / "hiro_ularge.pt")])
        assert args.freeze_worker and args.worker_checkpoint is None


def test_a_frozen_worker_stays_as_it_is(module, published, tmp_path, monkeypatch):
    """--freeze-worker with --start-from: the manager alone learns."""
    if module.SCRIPT == "aclg_gcmr":
        pytest.skip("it has no --freeze-worker")
    path, agents = published
    made, by_policy = spy_on_worker(monkeypatch, module)
    argv = ["--start-from", str(path), "--freeze-worker", "--eval-every", "1000", "--total-steps", "80"]
    argv += ["--no-hindsight", "--relabeling", "none"] if module.SCRIPT == "cher" else []
    module.main(module.parse_args([*argv, "--run-dir", str(tmp_path / "run")]))
    manager, worker = made[0]
    assert len(by_policy) == 80 and all(by_policy), "without noise"
    assert torch.equal(numbers([worker]), numbers(agents[1:]))
    assert not torch.equal(numbers([manager]), numbers(agents[:1]))


def test_hrl_from_an_agent_tells_no_j_hrl(module, published, tmp_path, monkeypatch, capsys):
    """Its worker may have learned under another manager; the same run from scratch tells it."""
    if module.SCRIPT != "cher":
        pytest.skip("of cher.py alone")
    flags = "--coop-weight 0 --coop-delta None --no-hindsight --relabeling none --total-steps 80".split()
    begins = {"new": ["--env", "PointMaze-U", *TINY], "on": ["--start-from", str(published[0])]}
    for name, begin in begins.items():
        spy_on_worker(monkeypatch, module)
        module.main(module.parse_args([*begin, *flags, "--run-dir", str(tmp_path / name)]))
        assert ("J_HRL = " in capsys.readouterr().out) is (name == "new")


def test_a_command_with_it_is_continued(module, published, tmp_path, monkeypatch):
    """benchmark/run.py and Slurm repeat the whole command, with --resume before it."""
    spy_on_worker(monkeypatch, module)
    command = ["--start-from", str(published[0]), "--actor-lr", "1e-5", "--total-steps"]
    module.main(module.parse_args([*command, "60", "--save-every", "60", "--run-dir", str(tmp_path / "run")]))
    again = ["--resume", str(tmp_path / "run" / "checkpoint.pt"), *command, "70"]
    args = module.parse_args(again)
    assert args.start_from == str(published[0]) and args.variant == "mine_on"
    with pytest.raises(SystemExit) as stop:
        module.parse_args([*again, "--start-from", "other.pt"])
    assert "start_from" in stop.value.code


def published_agent(module):
    """An ant of this script in a maze."""
    names = {"hiro": "hiro_ant", "cher": "cher_ularge", "aclg_gcmr": "aclg_gcmr"}
    if module.SCRIPT not in names:
        pytest.skip("a fork without a published agent")
    return str(ROOT / "benchmark" / "agents" / f"{names[module.SCRIPT]}.pt")


def test_another_maze(module, tmp_path, monkeypatch):
    """The ant of one maze begins in another; landmarks of the old one are forgotten."""
    spy_on_worker(monkeypatch, module)
    agent = published_agent(module)
    argv = ["--start-from", agent, "--env", "AntMaze-W", "--total-steps", "20", "--threads", "1"]
    module.main(module.parse_args([*argv, "--run-dir", str(tmp_path / "run")]))
    old, new = (torch.load(path, weights_only=True) for path in (agent, tmp_path / "run" / "model.pt"))
    for name, weight in old["worker"]["actor"].items():
        assert torch.equal(weight, new["worker"]["actor"][name])
    assert new["args"]["env"] == "AntMaze-W"
    if module.SCRIPT == "aclg_gcmr":
        assert (old["novelty"]["score"] > -torch.inf).any() and (new["novelty"]["score"] == -torch.inf).all()


def test_a_maze_with_other_obs_is_refused(module, tmp_path):
    """AntMaze-Bottleneck's obs has no time."""
    agent = published_agent(module)
    argv = ["--start-from", agent, "--env", "AntMaze-Bottleneck", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        module.main(module.parse_args(argv))
    assert "does not fit" in stop.value.code and not (tmp_path / "run").exists()
