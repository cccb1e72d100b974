"""--rest-value and --redrawn-subgoals, which no paper has: against hand-computed numbers and loops."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS

from common_envs import make_env

CPU = torch.device("cpu")


@pytest.fixture(params=SCRIPTS)
def module(request):
    return importlib.import_module(request.param)


def make_worker(module, **settings):
    settings = dict(env="AntMaze-ULarge", subgoal_space="xy", hidden=16, output_init=0.0) | settings
    args = module.Args(**settings)
    return args, *module.make_agents(make_env(args.env), args, CPU)


def worker_batch(rows=500, obs_dim=30):
    """The entries of a worker's rows; every third ends by a death."""
    batch = dict(obs=torch.randn(rows, obs_dim), next_obs=torch.randn(rows, obs_dim))
    batch |= dict(subgoal=torch.full((rows, 2), 77.0), next_subgoal=torch.full((rows, 2), 78.0))
    terminated = (torch.arange(rows) % 3 == 0).float()
    return SimpleNamespace(
        **batch, action=torch.randn(rows, 8), reward=torch.full((rows,), -5.0), terminated=terminated
    )


def test_value_of_resting(module):
    """A subgoal 3 m and 4 m away costs 5 per step, for ever: 5 / (1 - 0.95) = 100."""
    torch.manual_seed(0)
    _, manager, plain = make_worker(module, worker_gamma=0.95)
    _, _, worker = make_worker(module, worker_gamma=0.95, rest_value=True)
    obs, action = torch.randn(4, 30), torch.randn(4, 8)
    subgoal = torch.tensor([[3.0, 4.0], [-6.0, 8.0], [0.0, 0.0], [0.0, -1.0]])
    rest = torch.tensor([-100.0, -200.0, 0.0, -20.0])
    for name in ("critic", "target_critic"):
        getattr(worker, name).load_state_dict(getattr(plain, name).state_dict())
        more = getattr(worker, name)(obs, subgoal, action) - getattr(plain, name)(obs, subgoal, action)
        assert torch.allclose(more, rest.expand(2, 4), atol=1e-3)
    more = worker.critic.q1(obs, subgoal, action) - plain.critic.q1(obs, subgoal, action)
    assert torch.allclose(more, rest, atol=1e-3)
    assert manager.critic.rest == 0


def test_who_rests_has_the_value_of_resting(module):
    """With a network that says 0 the TD error of an ant that does not move is 0."""
    _, _, worker = make_worker(module, worker_gamma=0.9, rest_value=True)
    for net in (worker.critic, worker.target_critic):
        for param in net.layers[2].parameters():
            param.data.zero_()
    obs, subgoal, action = torch.randn(6, 30), torch.randn(6, 2), torch.randn(6, 8)
    reward = torch.tensor([-math.hypot(x, y) for x, y in subgoal.tolist()])
    target = worker.td_target(reward, torch.zeros(6), obs, subgoal)
    assert worker.critic_loss(target, obs, subgoal, action)[0].item() == pytest.approx(0, abs=1e-8)


def test_a_step_is_worth_what_it_gained(module):
    """3 m of (3, 4) done: 5 m left become 4. The network, at 0 here, is to learn (5 - 4) / (1 - 0.9) = 10."""
    _, _, worker = make_worker(module, worker_gamma=0.9, rest_value=True)
    for net in (worker.critic, worker.target_critic):
        for param in net.layers[2].parameters():
            param.data.zero_()
    obs, action = torch.randn(1, 30), torch.randn(1, 8)
    before, after = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]])
    target = worker.td_target(torch.tensor([-4.0]), torch.zeros(1), obs, after)
    assert target.item() == pytest.approx(-40, abs=1e-3)
    assert (target - worker.critic(obs, before, action)).flatten().tolist() == pytest.approx(
        [10, 10], abs=1e-3
    )


def test_redrawn_subgoals(module):
    torch.manual_seed(1)
    args, _, worker = make_worker(module, redrawn_subgoals=0.75, subgoal_limit=(4.0, 2.0))
    before = worker_batch()
    batch = SimpleNamespace(**vars(before))
    batch = module.redraw_subgoals(worker, batch, args)
    redrawn = batch.subgoal[:, 0] != 77
    share = redrawn[before.terminated == 0].float().mean()
    assert 0.68 < share < 0.82
    for row in range(500):
        if not redrawn[row]:
            assert batch.subgoal[row].tolist() == [77, 77] and batch.next_subgoal[row].tolist() == [78, 78]
            assert batch.reward[row] == -5
            continue
        assert before.terminated[row] == 0  # a death's reward stands for all later ones
        (x, y), (ax, ay), (bx, by) = (
            t[row, :2].tolist() for t in (batch.subgoal, before.obs, before.next_obs)
        )
        assert abs(x) <= 4 and abs(y) <= 2
        left = [ax + x - bx, ay + y - by]
        assert batch.next_subgoal[row].tolist() == pytest.approx(left, abs=1e-5)
        assert float(batch.reward[row]) == pytest.approx(-math.hypot(*left), abs=1e-5)
    drawn = batch.subgoal[redrawn]
    assert drawn.amin(0).tolist() == pytest.approx([-4, -2], abs=0.2)
    assert drawn.amax(0).tolist() == pytest.approx([4, 2], abs=0.2)
    for name in ("obs", "action", "next_obs", "terminated"):
        assert torch.equal(getattr(batch, name), getattr(before, name))


def test_none_redrawn_by_default(module):
    """Nor is a random number used, so that runs without the flag stay as they were."""
    args, _, worker = make_worker(module)
    batch, state = worker_batch(), torch.get_rng_state()
    assert module.redraw_subgoals(worker, batch, args) is batch
    assert torch.equal(torch.get_rng_state(), state)
    assert args.redrawn_subgoals == 0 and not args.rest_value


def test_scaled_rewards_of_the_worker():
    """aclg_gcmr.py's --worker-reward-scale holds for both flags."""
    module = importlib.import_module("aclg_gcmr")
    settings = dict(worker_reward_scale=1.5, redrawn_subgoals=1.0, rest_value=True, worker_gamma=0.9)
    args, _, worker = make_worker(module, **settings)
    assert worker.critic.rest == pytest.approx(15)
    batch = module.redraw_subgoals(worker, worker_batch(30), args)
    row = 1  # row 0 is a death
    left = batch.next_subgoal[row].norm()
    assert float(batch.reward[row]) == pytest.approx(-1.5 * float(left), rel=1e-4)


@pytest.mark.parametrize("share", ["-0.1", "1.5"])
def test_impossible_shares(module, share):
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--redrawn-subgoals", share])
    assert stop.value.code.startswith(f"{module.__name__}.py: error: --redrawn-subgoals")


def test_updates_use_redrawn_rows(module, monkeypatch):
    """What update_worker learns from is what redraw_subgoals returns."""
    args, manager, worker = make_worker(module, batch_size=8)
    batch, seen = worker_batch(8), []
    monkeypatch.setattr(
        module, "redraw_subgoals", lambda agent, rows, args: seen.append((agent, rows)) or batch
    )
    monkeypatch.setattr(worker, "td_target", lambda *inputs: inputs[0] * 0 + 3)
    learned = []
    monkeypatch.setattr(
        worker, "critic_loss", lambda *inputs: learned.append(inputs) or (torch.zeros(()),) * 2
    )
    monkeypatch.setattr(worker, "critic_step", lambda loss: None)
    raw, buffer = object(), SimpleNamespace(sample=lambda count: raw)
    if module.__name__ == "hiro":
        module.update_worker(worker, buffer, args, False)
    elif module.__name__ == "cher":
        monkeypatch.setattr(module, "worker_rows", lambda rows: rows)
        module.update_worker(worker, raw, args, False)
    else:
        module.update_worker(worker, manager, None, buffer, None, args, False, False, False)
    assert seen == [(worker, raw)]
    assert learned[0][2] is batch.subgoal and learned[0][1] is batch.obs
