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
    """Arguments and the two agents, with subgoals in x and y."""
    settings = dict(env="AntMaze-ULarge", subgoal_space="xy", hidden=16, output_init=0.0) | settings
    args = module.Args(**settings)
    return args, *module.make_agents(make_env(args.env), args, CPU)


def worker_batch(rows=500, obs_dim=30, dims=2):
    """The entries of a worker's rows, reward -left; every third is a death, which costs ten times as much."""
    obs, next_obs = torch.randn(rows, obs_dim), torch.randn(rows, obs_dim)
    subgoal = torch.full((rows, dims), 77.0)
    left = obs[:, :dims] + subgoal - next_obs[:, :dims]
    terminated = (torch.arange(rows) % 3 == 0).float()
    reward = -left.norm(dim=1) * (1 + 9 * terminated)
    batch = dict(obs=obs, subgoal=subgoal, action=torch.randn(rows, 8), reward=reward)
    return SimpleNamespace(**batch, next_obs=next_obs, next_subgoal=left, terminated=terminated)


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
    """Reward and successor are those of the new subgoal; a death stays ten times as dear as it was."""
    torch.manual_seed(1)
    args, _, worker = make_worker(module, redrawn_subgoals=0.75, subgoal_limit=(4.0, 2.0))
    before = worker_batch()
    batch = module.redraw_subgoals(worker, SimpleNamespace(**vars(before)), args)
    redrawn = batch.subgoal[:, 0] != 77
    for rows in (before.terminated == 0, before.terminated == 1):
        assert 0.65 < redrawn[rows].float().mean() < 0.85
    for row in range(500):
        if not redrawn[row]:
            for name in ("subgoal", "next_subgoal", "reward"):
                assert torch.equal(getattr(batch, name)[row], getattr(before, name)[row])
            continue
        (x, y), (ax, ay), (bx, by) = (
            t[row, :2].tolist() for t in (batch.subgoal, before.obs, before.next_obs)
        )
        assert abs(x) <= 4 and abs(y) <= 2
        left = [ax + x - bx, ay + y - by]
        assert batch.next_subgoal[row].tolist() == pytest.approx(left, abs=1e-5)
        factor = 10 if row % 3 == 0 else 1
        assert batch.reward[row].item() == pytest.approx(-factor * math.hypot(*left), rel=1e-4, abs=1e-3)
    drawn = batch.subgoal[redrawn]
    assert drawn.amin(0).tolist() == pytest.approx([-4, -2], abs=0.2)
    assert drawn.amax(0).tolist() == pytest.approx([4, 2], abs=0.2)
    for name in ("obs", "action", "next_obs", "terminated"):
        assert torch.equal(getattr(batch, name), getattr(before, name))


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "aclg_gcmr"])
def test_redrawn_in_all_dimensions(name):
    """Subgoals in 15 entries of obs: each within its own half-range."""
    module = importlib.import_module(name)
    args, manager, worker = make_worker(module, redrawn_subgoals=1.0, subgoal_space="full")
    batch = module.redraw_subgoals(worker, worker_batch(dims=15), args)
    half_range = torch.tensor([10, 10, 0.5, 1, 1, 1, 1, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3])
    share = batch.subgoal.abs() / half_range
    assert share.amax(0).max() <= 1 and share.amax(0).min() > 0.95


def test_none_redrawn_by_default(module):
    """Nor is a random number used, so that runs without the flag stay as they were."""
    args, _, worker = make_worker(module)
    batch, state = worker_batch(), torch.get_rng_state()
    assert module.redraw_subgoals(worker, batch, args) is batch
    assert torch.equal(torch.get_rng_state(), state)
    assert args.redrawn_subgoals == 0 and not args.rest_value


def test_scaled_rewards_of_the_worker():
    """aclg_gcmr.py's --worker-reward-scale holds for the value of resting, too."""
    module = importlib.import_module("aclg_gcmr")
    _, _, worker = make_worker(module, worker_reward_scale=1.5, rest_value=True, worker_gamma=0.9)
    assert worker.critic.rest == pytest.approx(15) and worker.target_critic.rest == pytest.approx(15)


def test_slope_by_hand_is_that_of_autograd_with_rest():
    module = importlib.import_module("aclg_gcmr")
    _, _, worker = make_worker(module, rest_value=True)
    obs, subgoal, action = torch.randn(5, 30), torch.randn(5, 2), torch.randn(5, 8, requires_grad=True)
    slope = module.action_slope(worker.critic, obs, subgoal, action.detach())
    for q, expected in zip(worker.critic(obs, subgoal, action), slope):
        (gradient,) = torch.autograd.grad(q.sum(), action, retain_graph=True)
        assert torch.allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("form, pull", [("released", 20.0), ("theorem", 0.0)])
def test_cooperation_climbs_the_value_of_resting(form, pull):
    """With a network that says 0: 1 / (1 - 0.95) = 20 per metre towards a subgoal of 0, and 0 at 0 itself."""
    module = importlib.import_module("cher")
    settings = dict(rest_value=True, worker_gamma=0.95, coop_form=form)
    args, _, worker = make_worker(module, **settings)
    for param in worker.critic.layers[2].parameters():
        param.data.zero_()
    rows = dict(obs_seq=torch.zeros(1, 11, 30), action_seq=torch.zeros(1, 10, 8))
    rows |= dict(subgoal_seq=torch.zeros(1, 11, 2), worker_reward_seq=torch.zeros(1, 10))
    rows |= dict(length=torch.full((1,), 10.0), step=torch.zeros(1, dtype=torch.long), dead=torch.zeros(1))
    for subgoal, slope in (((3.0, 4.0), (0.6 * pull, 0.8 * pull)), ((0.0, 0.0), (0.0, 0.0))):
        subgoal = torch.tensor([subgoal], requires_grad=True)
        loss = module.cooperative_loss(worker, SimpleNamespace(**rows), subgoal, args)
        (gradient,) = torch.autograd.grad(loss, subgoal)
        unit = subgoal.detach() / subgoal.norm().clamp(min=1e-9)
        own = 2 * subgoal.detach() / 2 if form == "released" else unit  # of the reward: mean square, or norm
        assert gradient[0].tolist() == pytest.approx((torch.tensor(slope) + own[0]).tolist(), abs=1e-3)


@pytest.mark.parametrize("share", ["-0.1", "1.5"])
def test_impossible_shares(module, share):
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--redrawn-subgoals", share])
    assert stop.value.code.startswith(f"{module.__name__}.py: error: --redrawn-subgoals")


@pytest.mark.parametrize(
    "name, flags, word",
    [
        ("hiro", "--env AntMaze-ULarge --rest-value", "--no-worker-looks-ahead"),
        ("hiro", "--env AntMaze-ULarge --redrawn-subgoals 0.8", "--no-worker-looks-ahead"),
        ("aclg_gcmr", "--worker-looks-ahead --rest-value", "--no-worker-looks-ahead"),
        ("cher", "--redrawn-subgoals 0.8 --hindsight", "--hindsight"),
        ("cher", "--redrawn-subgoals 0.8 --freeze-worker --worker-checkpoint model.pt", "--freeze-worker"),
    ],
)
def test_what_does_not_go_together(name, flags, word):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        module.parse_args(flags.split())
    assert stop.value.code.startswith(f"{name}.py: error: --re") and word in stop.value.code


def test_updates_use_redrawn_rows(module, monkeypatch):
    """What update_worker learns from is what redraw_subgoals returns: critics, target and actor."""
    args, manager, worker = make_worker(module, batch_size=8)
    batch, seen, learned = worker_batch(8), [], {}
    monkeypatch.setattr(
        module, "redraw_subgoals", lambda agent, rows, args: seen.append((agent, rows)) or batch
    )

    def note(name, result):
        monkeypatch.setattr(worker, name, lambda *inputs: learned.setdefault(name, inputs) and None or result)

    note("td_target", torch.zeros(8))
    note("critic_loss", (torch.zeros(()), torch.zeros(())))
    note("critic_step", None)
    note("actor", torch.zeros(8, 8))
    worker.critic.q1 = lambda *inputs: learned.setdefault("q1", inputs) and torch.zeros(8)
    note("actor_step", None)
    raw, buffer = object(), SimpleNamespace(sample=lambda count: raw)
    if module.__name__ == "hiro":
        module.update_worker(worker, buffer, args, True)
    elif module.__name__ == "cher":
        monkeypatch.setattr(module, "worker_rows", lambda rows: rows)
        module.update_worker(worker, raw, args, True)
    else:
        module.update_worker(worker, manager, None, buffer, None, args, True, False, False)
    assert seen == [(worker, raw)]
    target = (batch.reward, batch.terminated, batch.next_obs, batch.next_subgoal)
    assert all(a is b for a, b in zip(learned["td_target"], target, strict=True))
    assert all(a is b for a, b in zip(learned["critic_loss"][1:], (batch.obs, batch.subgoal, batch.action)))
    assert all(a is b for a, b in zip(learned["actor"], (batch.obs, batch.subgoal), strict=True))
    assert all(a is b for a, b in zip(learned["q1"][:2], (batch.obs, batch.subgoal), strict=True))
