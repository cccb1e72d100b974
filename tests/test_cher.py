"""CHER: the cooperative term, the one replay for both levels, the baselines, the transfer of a worker."""

import copy
import csv
import dataclasses
import itertools
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NO_EVALUATION, TINY, ToyEnv, read_rows, spy_on_worker

import cher
import common_envs
import hiro
from common_envs import make_env

CPU = torch.device("cpu")


def tensor(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def toy_agents(**settings):
    """Two levels for the toy environment, with outputs that are not nearly 0."""
    args = cher.Args(**dict(hidden=16, output_init=0.0, subgoal_space="xy", batch_size=32) | settings)
    manager, worker = cher.make_agents(ToyEnv(), args, CPU)
    return args, manager, worker


def random_batch(rows=32, period=10, dims=2, obs_dim=5, dtype=torch.float32):
    """Segments as sample_segments gives them; of 1 to `period` steps."""
    batch = SimpleNamespace(
        obs_seq=torch.randn(rows, period + 1, obs_dim, dtype=dtype).cumsum(1),
        subgoal_seq=3 * torch.randn(rows, period + 1, dims, dtype=dtype),
        action_seq=2 * torch.rand(rows, period, 2, dtype=dtype) - 1,
        worker_reward_seq=-torch.rand(rows, period, dtype=dtype),
        goal=torch.randn(rows, 2, dtype=dtype),
        reward=torch.randn(rows, dtype=dtype),
        terminated=(torch.rand(rows, dtype=dtype) < 0.2).to(dtype),
        dead=(torch.rand(rows, dtype=dtype) < 0.2).to(dtype),
        length=(torch.arange(rows) % period + 1).to(dtype),
    )
    batch.subgoal, batch.step = batch.subgoal_seq[:, 0], (torch.rand(rows) * batch.length).long()
    return batch


def params(*agents):
    nets = ("actor", "target_actor", "critic", "target_critic")
    return [p.detach().clone() for agent in agents for net in nets for p in getattr(agent, net).parameters()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ------------------------------------------------------------------------------ the cooperative term, by hand

# Segments of three steps, of which steps 1 and 0 are sampled; Q(s, g, a) = -1/2 |g - a|^2 + 0.1 sum(s), and
# the worker does 0.5 g.
SUBGOALS = [[2, 1], [-1, 0]]


def example(dtype=torch.float64):
    obs_seq = [[[0, 0], [1, 0.5], [1.5, 0.5], [3, 2]], [[1, 1], [1, 2], [5, 5], [0, 1]]]
    action_seq = [[[9, 9], [0.5, -0.5], [9, 9]], [[1, 1], [9, 9], [9, 9]]]
    batch = SimpleNamespace(
        obs_seq=tensor(*obs_seq, dtype=dtype),
        action_seq=tensor(*action_seq, dtype=dtype),
        subgoal_seq=torch.full((2, 4, 2), torch.nan, dtype=dtype),  # old subgoals play no part
        worker_reward_seq=torch.full((2, 3), torch.nan, dtype=dtype),  # nor do the rewards for them
        dead=tensor(1, 0, dtype=dtype),  # nor does a death
        length=tensor(3, 3, dtype=dtype),
        step=torch.tensor([1, 0]),
    )
    return batch, tensor(*SUBGOALS, dtype=dtype).requires_grad_()


def example_worker(reward_only=False):
    def q1(obs, goal, action):
        return (
            0 * goal.sum(-1) if reward_only else -0.5 * (goal - action).square().sum(-1) + 0.1 * obs.sum(-1)
        )

    return SimpleNamespace(critic=SimpleNamespace(q1=q1), actor=lambda obs, goal: 0.5 * goal)


@pytest.mark.parametrize(
    "form, loss, reward, gradient",
    [
        ("released", 2.0125, -0.625, [(0.5, 0.75), (-1.5, -1.0)]),
        ("theorem", 1.0262851, -1.0606601, [(0.2285534, 0.2910534), (-0.2285534, -0.3535534)]),
    ],
)
def test_cooperative_loss(form, loss, reward, gradient):
    batch, subgoal = example()
    args = cher.Args(coop_form=form)
    result = cher.cooperative_loss(example_worker(), batch, subgoal, args)
    assert result.shape == () and result.item() == pytest.approx(loss, abs=1e-7)
    assert torch.allclose(torch.autograd.grad(result, subgoal)[0], tensor(*gradient, dtype=torch.float64))
    result = cher.cooperative_loss(example_worker(reward_only=True), batch, subgoal, args)
    assert result.item() == pytest.approx(-reward, abs=1e-7)


def test_parts_of_the_cooperative_loss():
    """What the worker's networks are asked: sampled states, subgoals moved on to them, recorded actions."""
    asked = []

    def q1(obs, goal, action):
        asked.append((obs, goal, action))
        return -0.5 * (goal - action).square().sum(-1) + 0.1 * obs.sum(-1)

    worker = SimpleNamespace(critic=SimpleNamespace(q1=q1), actor=lambda obs, goal: 0.5 * goal)
    batch, subgoal = example()
    for form in ("released", "theorem"):
        cher.cooperative_loss(worker, batch, subgoal, cher.Args(coop_form=form))
    (obs, goal, action), (_, held, done) = asked
    assert obs.tolist() == [[1, 0.5], [1, 1]]
    assert goal.tolist() == held.tolist() == [[1, 0.5], [-1, 0]]
    assert action.tolist() == [[0.5, -0.5], [1, 1]] and done.tolist() == [[0.5, 0.25], [-0.5, 0]]
    assert goal.requires_grad and not held.requires_grad and done.requires_grad and not action.requires_grad
    assert q1(*asked[0]).tolist() == pytest.approx([-0.475, -2.3])
    assert q1(*asked[1]).tolist() == pytest.approx([-0.00625, 0.075])
    gradient = torch.autograd.grad(-q1(*asked[0]).mean(), subgoal)[0]
    assert torch.allclose(gradient, tensor((0.25, 0.5), (-1, -0.5), dtype=torch.float64))


class Recorder(SimpleNamespace):
    """A manager whose steps only note their losses."""

    limit = tensor(10, 10)

    def td_target(self, *inputs):
        self.td_inputs = inputs
        return torch.zeros(2)

    def critic_loss(self, *inputs):
        return torch.tensor(2.0), torch.tensor(3.0)

    def critic_step(self, loss):
        pass

    def actor_step(self, loss):
        self.loss = loss

    update_target_critic = update_target_actor = lambda self: None


@pytest.mark.parametrize(
    "coop_weight, coop_delta, loss, gradient",
    [
        (0.005, None, 0.5100625, [(0.5025, 0.00375), (-1.0075, -0.505)]),
        (0.0, None, 0.5, [(0.5, 0), (-1, -0.5)]),
        # learned: exp(-4.2) = 0.01499558, and lambda's own step comes too late for this loss
        (0.005, -450.0, 0.53017860, [(0.50749779, 0.01124668), (-1.02249337, -0.51499558)]),
    ],
)
def test_loss_of_the_manager(coop_weight, coop_delta, loss, gradient):
    """Q_m(g) = sum(g) - 1/2 |g|^2, and the weighted cooperative term."""
    batch, subgoal = example()
    batch.subgoal = subgoal.detach()
    batch.goal, batch.reward, batch.terminated = torch.zeros(2, 0), torch.zeros(2), torch.zeros(2)
    critic = SimpleNamespace(q1=lambda obs, goal, g: g.sum(-1) - 0.5 * g.square().sum(-1))
    manager = Recorder(actor=lambda obs, goal: subgoal, critic=critic)
    args = cher.Args(coop_weight=coop_weight, coop_delta=coop_delta)
    weight, learned = cher.CoopWeight(args, CPU), coop_delta is not None
    losses = cher.update_manager(manager, example_worker(), weight, batch, args, True, learned)
    assert (weight.log.item() != pytest.approx(-4.2, abs=1e-5)) == learned
    assert manager.loss.item() == pytest.approx(loss)
    result = torch.autograd.grad(manager.loss, subgoal)[0]
    assert torch.allclose(result, tensor(*gradient, dtype=torch.float64))
    assert losses["manager/coop_value"].item() == pytest.approx(-2.0125)  # also without the term
    assert losses["manager/coop_weight"].item() == pytest.approx(0.01499558 if learned else coop_weight)
    assert not any(value.requires_grad for value in losses.values())


# ---------------------------------------------------------------------- the cooperative term, by slow judges


def value_by_hand(worker, batch, row, subgoal, form, held=None):
    """The worker's value of one subgoal in one segment, with single calls of its networks."""
    step = int(batch.step[row])
    obs, next_obs = batch.obs_seq[row, step], batch.obs_seq[row, step + 1]
    moved_on = subgoal + batch.obs_seq[row, 0, :2] - obs[:2]
    left = moved_on + obs[:2] - next_obs[:2]
    if form == "released":
        q = worker.critic(obs[None], moved_on[None], batch.action_seq[row, step][None])[0, 0]
        return q, -(left**2).mean()
    held = moved_on if held is None else held + batch.obs_seq[row, 0, :2] - obs[:2]
    q = worker.critic(obs[None], held[None], worker.actor(obs[None], moved_on[None]))[0, 0]
    return q, -math.sqrt((left**2).sum())


@pytest.mark.parametrize("form", ["released", "theorem"])
def test_cooperative_loss_against_finite_differences(form):
    """Real networks in double precision; the theorem's Q holds its own subgoal still."""
    torch.manual_seed(0)
    args, _, worker = toy_agents(coop_form=form)
    worker.actor.double(), worker.critic.double()
    batch = random_batch(rows=12, dtype=torch.float64)
    subgoal = (4 * torch.randn(12, 2, dtype=torch.float64)).requires_grad_()
    loss = cher.cooperative_loss(worker, batch, subgoal, args)
    gradient = torch.autograd.grad(loss, subgoal)[0]

    with torch.no_grad():
        parts = [value_by_hand(worker, batch, row, subgoal[row], form) for row in range(12)]
        assert loss.item() == pytest.approx(-sum(q + reward for q, reward in parts).item() / 12)
        for row, dim in itertools.product(range(12), range(2)):
            step = torch.zeros(2, dtype=torch.float64)
            step[dim] = 1e-6
            above, below = (
                sum(value_by_hand(worker, batch, row, subgoal[row] + move, form, held=subgoal[row]))
                for move in (step, -step)
            )
            slope = -(above - below).item() / 2e-6 / 12
            assert gradient[row, dim].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("coop_form", ["released", "theorem"])
def test_only_the_manager_learns_from_the_term(coop_form):
    torch.manual_seed(0)
    args, manager, worker = toy_agents(coop_weight=1.0, coop_form=coop_form)
    before = params(worker)
    cher.update_manager(manager, worker, cher.CoopWeight(args, CPU), random_batch(), args, True, False)
    assert same(before, params(worker))
    assert all(p.grad is None for p in worker.actor_params + worker.critic_params)  # nothing lies in wait


def test_cooperation_raises_the_workers_value():
    """Descending the term alone: the manager's subgoals come to suit the worker."""
    torch.manual_seed(0)
    args, manager, worker = toy_agents(actor_lr=1e-2)
    batch, values = random_batch(), []
    for _ in range(60):
        loss = cher.cooperative_loss(worker, batch, manager.actor(batch.obs_seq[:, 0], batch.goal), args)
        values.append(-loss.item())
        manager.actor_step(loss)
    assert values[-1] > values[0] + 0.5


# ------------------------------------------------------------------------------------------ without the term


def test_weight_0_is_the_update_without_the_term(monkeypatch):
    """Bit for bit what hiro.py's own update makes of the same segments without relabeling."""
    trained = {}
    for module in (cher, hiro):
        torch.manual_seed(0)
        args, manager, worker = toy_agents(coop_weight=0.0)
        batch = random_batch()
        torch.manual_seed(1)
        for number in range(1, 7):
            if module is cher:
                weight = cher.CoopWeight(args, CPU)
                cher.update_manager(manager, worker, weight, batch, args, number % 2 == 0, False)
            else:
                buffer = SimpleNamespace(sample=lambda count, batch=batch: batch)
                hiro.update_manager(manager, worker, buffer, args, number % 2 == 0)
        trained[module] = params(manager, worker)
    assert same(trained[cher], trained[hiro])


def test_logged_actor_loss_is_q1_alone():
    """The term has columns of its own, so that runs with and without it can be compared."""
    logged = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        args, manager, worker = toy_agents(coop_weight=weight)
        batch, before = random_batch(), params(manager)
        learned = cher.CoopWeight(args, CPU)
        logged.append(cher.update_manager(manager, worker, learned, batch, args, True, False))
        assert not same(before, params(manager))
    assert logged[0]["manager/actor_loss"] == logged[1]["manager/actor_loss"]


def test_worker_update_is_hiro_s():
    """Bit for bit what hiro.py's makes of the same rows; which rows those are is tested below."""
    trained = {}
    for module in (cher, hiro):
        torch.manual_seed(0)
        args, _, worker = toy_agents(actor_lr=1e-2)
        batch, before = random_batch(), params(worker)
        torch.manual_seed(1)
        for number in range(1, 7):
            if module is cher:
                cher.update_worker(worker, batch, args, number % 2 == 0)
            else:
                buffer = SimpleNamespace(sample=lambda count, batch=batch: cher.worker_rows(batch))
                hiro.update_worker(worker, buffer, args, number % 2 == 0)
        trained[module] = params(worker)
    assert same(trained[cher], trained[hiro]) and not same(before, trained[cher])


def toy_training(toy_run, monkeypatch, steps=90, **settings):
    """Networks and generator after a short run."""
    kept, make = [], cher.make_agents
    monkeypatch.setattr(cher, "make_agents", lambda *inputs: kept.append(make(*inputs)) or kept[0])
    toy_run(cher, steps, ToyEnv(), **dict(learning_starts=20, output_init=0.0, seed=3) | settings)
    monkeypatch.setattr(cher, "make_agents", make)
    return params(*kept[0]), torch.get_rng_state()


def test_weight_0_ignores_the_term_in_a_run(toy_run, monkeypatch):
    """With another function in its place: nothing changes, unless there is a weight."""
    runs = {}
    loss = cher.cooperative_loss
    for weight, factor in ((0.0, 1), (0.0, -50), (0.5, 1), (0.5, -50)):
        changed = lambda *inputs, factor=factor: factor * loss(*inputs)  # noqa: E731
        monkeypatch.setattr(cher, "cooperative_loss", changed)
        runs[weight, factor] = toy_training(toy_run, monkeypatch, coop_weight=weight)
    assert same(runs[0.0, 1][0], runs[0.0, -50][0])
    assert not same(runs[0.5, 1][0], runs[0.5, -50][0]) and not same(runs[0.0, 1][0], runs[0.5, 1][0])
    generators = [generator for _, generator in runs.values()]
    assert all(torch.equal(generator, generators[0]) for generator in generators)  # as many numbers drawn


def test_evaluation_changes_nothing(toy_run, monkeypatch):
    """Networks, and with them what was stored and drawn, are those of a run that evaluates once."""
    (often, drawn), (once, drawn_once) = (
        toy_training(toy_run, monkeypatch, eval_every=every, eval_episodes=2) for every in (15, 10**9)
    )
    assert same(often, once) and torch.equal(drawn, drawn_once)


def test_random_numbers_do_not_depend_on_cooperation(toy_run, monkeypatch):
    generators = [
        toy_training(toy_run, monkeypatch, **settings)[1]
        for settings in (
            dict(coop_weight=0.0),
            dict(coop_delta=-1.0, coop_starts=1),
            dict(coop_form="theorem"),
        )
    ]
    assert torch.equal(generators[0], generators[1]) and torch.equal(generators[0], generators[2])


# ----------------------------------------------------------------------------------------- the learned weight


def learned_weight(delta):
    return cher.CoopWeight(cher.Args(coop_delta=delta), CPU)


def test_learned_weight():
    """Values below delta let it grow by Adam's steps of 3e-4 in the logarithm, values above it shrink."""
    weight = learned_weight(-450.0)
    assert weight.log.dtype == torch.float32 and weight.value().item() == pytest.approx(0.01499558, abs=1e-8)
    for log, value in ((-4.1997, 0.01500008), (-4.1994, 0.01500458), (-4.1991, 0.01500908)):
        weight.update(tensor(-500 - 1.2)[0])
        assert weight.log.item() == pytest.approx(log, abs=1e-6)
        assert weight.value().item() == pytest.approx(value, abs=2e-8)
        assert weight.log.grad.item() == pytest.approx(-51.2 * math.exp(log - 3e-4), rel=1e-4)
    weight = learned_weight(-450.0)
    weight.update(tensor(-400 - 1.2)[0])
    assert weight.log.grad.item() == pytest.approx(0.731784, abs=1e-5)
    assert weight.log.item() == pytest.approx(-4.2003, abs=1e-6)
    assert weight.value().item() == pytest.approx(0.01499108, abs=2e-8)


@pytest.mark.parametrize("value, grows", [(-100.5, True), (-99.5, False), (-1e4, True), (-0.1, False)])
def test_weight_grows_while_the_value_is_below_delta(value, grows):
    weight = learned_weight(-100.0)
    for _ in range(20):
        before = weight.value()
        weight.update(torch.tensor(value))
        assert (weight.value() > before) if grows else (weight.value() < before)
        assert weight.value() > 0


def test_fixed_weight():
    for fixed in (0.0, 0.005, 0.01):
        weight = cher.CoopWeight(cher.Args(coop_weight=fixed), CPU).value()
        assert weight.item() == pytest.approx(fixed) and not weight.requires_grad


def test_state_of_the_weight():
    """The logarithm and Adam's moments come back."""
    weight, other = learned_weight(-100.0), learned_weight(-100.0)
    for value in (-150.0, -90.0, -300.0):
        weight.update(torch.tensor(value))
    other.load_state_dict(copy.deepcopy(weight.state_dict()))
    for each in (weight, other):
        each.update(torch.tensor(-80.0))
    assert torch.equal(weight.log, other.log)


def weights_in_a_run(toy_run, monkeypatch, steps, **settings):
    """The weight in the losses of every update of the manager, and the worker's value in it."""
    logged, update = [], cher.update_manager

    def noted(*inputs):
        losses = update(*inputs)
        logged.append((losses["manager/coop_weight"].item(), losses["manager/coop_value"].item()))
        return losses

    monkeypatch.setattr(cher, "update_manager", noted)
    toy_run(cher, steps, ToyEnv(), learning_starts=20, output_init=0.0, **settings)
    return logged


@pytest.mark.parametrize("delta, grows", [(-1e-3, True), (-1e6, False)])
def test_weight_in_a_run(toy_run, monkeypatch, delta, grows):
    """Unchanged in the first updates of the manager's critic, moved in each one after them."""
    logged = weights_in_a_run(toy_run, monkeypatch, 20 + 10 * 12, coop_delta=delta, coop_starts=5)
    weights = [weight for weight, _ in logged]
    assert len(weights) == 12
    assert weights[:6] == [weights[0]] * 6 and weights[0] == pytest.approx(math.exp(-4.2))
    steps = np.diff(np.log(weights[5:]))  # the 6th update logs the weight that it used, and moves it
    assert np.allclose(steps, 3e-4 if grows else -3e-4, rtol=0.3)
    assert cher.Args.coop_starts == 1_000 and cher.Args.coop_log_weight == -4.2


def test_weight_stays_without_delta(toy_run, monkeypatch):
    logged = weights_in_a_run(toy_run, monkeypatch, 80, coop_weight=0.01, coop_starts=1)
    assert [weight for weight, _ in logged] == pytest.approx([0.01] * 6)


# --------------------------------------------------------------------------- what the trade-off is drawn from


@pytest.mark.parametrize("delta, ratio", [(-450.0, 0.25), (-300.0, 0.5), (-150.0, 0.75), (-50.0, 0.9167)])
def test_cooperation_ratio(delta, ratio):
    args = cher.Args(coop_reference=-600.0, coop_delta=delta)
    metrics = cher.coop_metrics([-500.0, -400.0], args)
    assert metrics["manager/coop_value"] == -450 and metrics["manager/coop_ratio"] == 0.25
    assert metrics["manager/coop_ratio_aim"] == pytest.approx(ratio, abs=5e-5)


def test_learned_weight_is_logged(toy_run, tmp_path):
    """The columns of the paper's figure 7: lambda, the worker's return, the ratio and its aim."""
    flags = dict(learning_starts=20, coop_reference=-4.0, coop_delta=-1.0, coop_starts=0, output_init=0.0)
    toy_run(cher, 60, ToyEnv(), **flags)
    (row,) = read_rows(tmp_path / "run")
    assert float(row["manager/coop_ratio_aim"]) == pytest.approx(0.75)
    assert float(row["manager/coop_ratio"]) == pytest.approx((-4 - float(row["manager/coop_value"])) / -4)
    assert 0.9 < float(row["manager/coop_weight"]) / math.exp(-4.2) < 1.1
    assert float(row["worker/period_return"]) < 0


def test_weight_out_of_bounds_stops_the_run(toy_run):
    """With a delta out of reach lambda would grow until Adam's second moments overflow, without a word."""
    losses, args = {"manager/coop_weight": torch.tensor(1.1e6)}, cher.Args(coop_delta=-1.0)
    cher.check_weight({"manager/coop_weight": torch.tensor(9e5)}, 1000, args)
    cher.check_weight({}, 1000, args)
    cher.check_weight(losses, 1000, cher.Args())
    for check in (
        lambda: cher.check_weight(losses, 1000, args),
        lambda: toy_run(cher, 1001, ToyEnv(), learning_starts=980, coop_delta=-1.0, coop_log_weight=14.0),
    ):
        with pytest.raises(SystemExit, match=r"lambda is above 1e6 at step 1000: .*--coop-delta -1\.0"):
            check()


def test_cooperation_ratio_needs_a_reference():
    assert cher.coop_metrics([-500.0], cher.Args(coop_delta=-450.0)) == {"manager/coop_value": -500}
    fixed = cher.coop_metrics([-450.0], cher.Args(coop_reference=-600.0))
    assert fixed == {"manager/coop_value": -450, "manager/coop_ratio": 0.25}
    assert cher.coop_metrics([], cher.Args(coop_reference=-600.0)) == {}


def test_delta_from_a_run(tmp_path):
    """The mean of the last tenth of 40 rows; the first rows, before learning, are empty."""
    with open(tmp_path / "progress.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["step", "manager/coop_value"])
        table.writeheader()
        table.writerows({"step": i, "manager/coop_value": "" if i < 5 else -100 * i} for i in range(45))
    hint = cher.delta_hint(tmp_path)
    assert "J_HRL = -4250;" in hint and "--coop-reference -4250" in hint
    assert "--coop-delta -1062 (25 % of it) for AntGather, -3188 (75 %) otherwise" in hint


def test_no_delta_from_a_diverged_run(tmp_path):
    (tmp_path / "progress.csv").write_text("step,manager/coop_value\n5,-500\n10,78110\n")
    assert "diverged" in cher.delta_hint(tmp_path) and "--coop-delta" not in cher.delta_hint(tmp_path)


def test_columns_and_the_last_line(toy_run, capsys, tmp_path):
    """Only HRL tells J_HRL, which is the mean over the updates since the last row."""
    hint = "J_HRL = "
    flags = dict(learning_starts=20, coop_reference=-2.0, output_init=0.0)
    for settings, told in (
        (dict(coop_weight=0.0), True),
        (dict(), False),
        (dict(coop_weight=0.0, relabeling="off_policy"), False),
        (dict(coop_weight=0.0, hindsight=True), False),
        (dict(coop_weight=0.0, freeze_worker=True), False),  # transfer: its critic never learned here
        (dict(flat=True), False),
    ):
        toy_run(cher, 60, ToyEnv(), **flags, **settings)
        (row,) = read_rows(tmp_path / "run")
        (tmp_path / "run" / "progress.csv").unlink()
        assert (hint in capsys.readouterr().out) is told
        if settings != dict(flat=True):
            assert float(row["manager/coop_weight"]) == pytest.approx(settings.get("coop_weight", 0.005))
            value = float(row["manager/coop_value"])
            assert value < 0 and float(row["manager/coop_ratio"]) == pytest.approx((-2 - value) / -2)
            assert float(row["worker/period_return"]) < 0
        else:
            assert "manager/coop_value" not in row and float(row["worker/period_return"]) == 0


def test_columns_are_means_since_the_last_row(toy_run, monkeypatch, capsys, tmp_path):
    """Updates at steps 30, 40, .. give -1, -2, ..; periods end at 10, 20, 23, 33, 43, 46, .."""
    values = itertools.count(1)

    def update(*inputs):
        return {"manager/coop_value": torch.tensor(-float(next(values)))}

    monkeypatch.setattr(cher, "update_manager", update)
    settings = dict(learning_starts=20, eval_every=40, coop_weight=0.0, coop_reference=-2.0)
    records = toy_run(cher, 100, ToyEnv(23), **settings).manager
    rows = read_rows(tmp_path / "run")
    assert [float(row["manager/coop_value"]) for row in rows] == [-1.5, -4.5, -7.5]
    assert [float(row["manager/coop_ratio"]) for row in rows] == [0.25, -1.25, -2.75]
    assert "J_HRL = -7.5;" in capsys.readouterr().out
    returns = [record.worker_reward_seq.sum() for record in records]
    expected = [np.mean(returns[:4]), np.mean(returns[4:10]), np.mean(returns[10:12])]
    assert [float(row["worker/period_return"]) for row in rows] == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------- one replay for both levels


def test_random_steps():
    """Every step of a segment as often as any other, also in short ones; never one of the padding."""
    torch.manual_seed(0)
    buffer = cher.ReplayBuffer(10, CPU, length=(), subgoal_seq=(3, 2))
    for length in range(1, 11):
        buffer.add(length=length, subgoal_seq=np.zeros((3, 2)))
    counts = torch.zeros(11, 10)
    for _ in range(60):
        batch = cher.sample_segments(buffer, cher.Args(batch_size=5000))
        assert batch.step.shape == (5000,)
        counts += torch.bincount(batch.length.long() * 10 + batch.step, minlength=110).view(11, 10)
    for length in range(1, 11):
        assert not counts[length, length:].any()
        share = counts[length, :length] / counts[length].sum()
        assert torch.allclose(share, torch.full((length,), 1 / length), rtol=0.06)


def test_last_step_can_be_drawn_but_not_one_beyond(monkeypatch):
    almost_one = np.nextafter(np.float32(1), np.float32(0))
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, float(almost_one)))
    buffer = SimpleNamespace(sample=lambda count: random_batch(rows=40, period=20))
    batch = cher.sample_segments(buffer, cher.Args())
    assert torch.equal(batch.step, batch.length.long() - 1)
    assert torch.equal(batch.subgoal, batch.subgoal_seq[:, 0])


def test_rows_of_the_worker():
    batch = random_batch(rows=320)
    rows = cher.worker_rows(batch)
    assert rows.terminated.shape == (320,)
    for b, step in enumerate(batch.step.tolist()):
        assert torch.equal(rows.obs[b], batch.obs_seq[b, step])
        assert torch.equal(rows.next_obs[b], batch.obs_seq[b, step + 1])
        assert torch.equal(rows.subgoal[b], batch.subgoal_seq[b, step])
        assert torch.equal(rows.next_subgoal[b], batch.subgoal_seq[b, step + 1])
        assert torch.equal(rows.action[b], batch.action_seq[b, step])
        assert rows.reward[b] == batch.worker_reward_seq[b, step]
        assert rows.terminated[b] == (batch.dead[b] if step == batch.length[b] - 1 else 0)
    assert 0 < rows.terminated.sum() < batch.dead.sum()


def test_death():
    """The segment in which an ant dies is terminal for the manager, its last step for the worker."""
    args, manager, worker = toy_agents()
    batch = random_batch(rows=4)
    batch.terminated[:], batch.dead[:] = 1, 1
    batch.length[:], batch.step = 3, torch.tensor([0, 1, 2, 2])
    seen = []
    for agent in (manager, worker):
        td_target = agent.td_target
        agent.td_target = lambda *inputs, f=td_target: seen.append((inputs, f(*inputs))) or seen[-1][1]
        agent.target_critic.forward = lambda obs, goal, action: torch.full((2, 4), -100.0)
    cher.update_manager(manager, worker, cher.CoopWeight(args, CPU), batch, args, False, False)
    cher.update_worker(worker, batch, args, False)
    (_, for_manager), (inputs, for_worker) = seen
    assert torch.equal(for_manager, batch.reward)
    rows = cher.worker_rows(batch)
    assert torch.allclose(for_worker, rows.reward - torch.tensor([99.0, 99.0, 0.0, 0.0]))
    assert torch.equal(inputs[2], rows.next_obs) and torch.equal(inputs[3], rows.next_subgoal)


class Schedule:
    """Notes the updates in the order of their calls instead of doing them."""

    def __init__(self, monkeypatch):
        self.calls = []
        sample = cher.sample_segments
        monkeypatch.setattr(cher, "sample_segments", lambda *inputs: self.note("sample", sample(*inputs)))
        monkeypatch.setattr(cher, "update_worker", self.worker)
        monkeypatch.setattr(cher, "update_manager", self.manager)

    def note(self, name, batch, *flags):
        self.calls.append((name, batch, *flags))
        return batch

    def worker(self, worker, batch, args, with_actor):
        self.note("worker", batch, with_actor)
        return {}

    def manager(self, manager, worker, coop_weight, batch, args, with_actor, with_weight):
        self.note("manager", batch, with_actor, with_weight)
        return {"manager/coop_value": torch.tensor(-1.0)}

    def count(self, name, flag=None):
        return sum(call[0] == name and (flag is None or call[2]) for call in self.calls)


def test_schedule(toy_run, monkeypatch):
    """100 steps of learning; the manager goes first, and both learn from the same segments."""
    schedule = Schedule(monkeypatch)
    toy_run(cher, 40, ToyEnv(), learning_starts=40)
    assert not schedule.calls
    toy_run(cher, 140, ToyEnv(), learning_starts=40)
    assert schedule.count("sample") == schedule.count("worker") == 100
    assert schedule.count("worker", "with_actor") == 50
    assert schedule.count("manager") == 10 and schedule.count("manager", "with_actor") == 5
    steps = [list(group) for _, group in itertools.groupby(schedule.calls, key=lambda call: id(call[1]))]
    assert len(steps) == 100  # one batch each
    for number, step in enumerate(steps, 1):
        names = [call[0] for call in step]
        assert names == (["sample", "manager", "worker"] if number % 10 == 0 else ["sample", "worker"])
        assert step[-1][2] is (number % 2 == 0)
        if number % 10 == 0:
            assert step[1][2] is (number % 20 == 0) and step[1][3] is False
    schedule.calls.clear()
    toy_run(cher, 140, ToyEnv(), learning_starts=40, coop_delta=-1.0, coop_starts=7)
    assert [call[3] for call in schedule.calls if call[0] == "manager"] == [False] * 7 + [True] * 3


def watch(monkeypatch):
    """Which level was asked by explore(), whether for a random action, and the answer."""
    calls, explore = [], cher.explore

    def noted(agent, obs, goal, uniform_share):
        action = explore(agent, obs, goal, uniform_share)
        if not isinstance(agent, cher.FlatWorker):
            calls.append(
                (float(agent.limit[0]), uniform_share, np.array(obs), np.array(goal), np.array(action))
            )
        return action

    monkeypatch.setattr(cher, "explore", noted)
    return calls


@pytest.mark.parametrize("dies", [True, False])
def test_what_the_loop_stores(toy_run, monkeypatch, dies):
    """Episodes of 23, 23 and 17 steps, the last ends for good: periods of 10, 10, 3, 10, 10, 3, 10, 7."""
    calls = watch(monkeypatch)
    env = ToyEnv(23, speed=5.0, dies=dies)

    def die(step=env.step):
        def dying_step(action):
            env.death = 17 if len(env.log) >= 46 else None
            return step(action)

        return dying_step

    env.step = die()
    settings = dict(manager_reward_scale=0.1, worker_gamma=0.9)
    records = toy_run(cher, 63, env, learning_starts=1000, **settings).manager
    lengths = [10, 10, 3, 10, 10, 3, 10, 7]
    assert [int(record.length) for record in records] == lengths
    assert [int(record.terminated) for record in records] == [0] * 7 + [1]
    assert [int(record.dead) for record in records] == [0] * 7 + [int(dies)]  # or the task is done
    given = [(obs, action) for limit, _, obs, _, action in calls if limit == 10]
    acted = [(goal, action) for limit, _, _, goal, action in calls if limit == 1]
    assert len(given) == 9 and len(acted) == 63
    begin, biggest = 0, 0.0
    for number, (record, length, (first_obs, first_subgoal)) in enumerate(zip(records, lengths, given)):
        assert np.array_equal(record.obs_seq[0], first_obs)
        assert record.goal.tolist() == [3 + number // 3, 4 + number // 3]  # each episode has its own
        assert np.array_equal(record.subgoal_seq[0], first_subgoal)
        target = first_obs[:2] + first_subgoal
        for i in range(length):
            obs, action, next_obs = env.log[begin + i]
            assert np.allclose(record.obs_seq[i], obs) and np.array_equal(record.action_seq[i], action)
            # the subgoal that was acted on, which keeps pointing at one place, and is never clipped
            assert np.array_equal(record.subgoal_seq[i], acted[begin + i][0])
            assert np.allclose(record.obs_seq[i, :2] + record.subgoal_seq[i], target, atol=1e-4)
            reward = -math.sqrt(((target - next_obs[:2]) ** 2).sum() + 1e-10)
            if record.dead and i == length - 1:
                reward *= 10  # 1 + 0.9 + 0.9^2 ...: it rests there for ever
            assert record.worker_reward_seq[i] == pytest.approx(reward, rel=1e-5)
        end = env.log[begin + length - 1][2]
        # its last successor belongs to the same period: no look at the manager's next subgoal
        assert np.allclose(record.subgoal_seq[length:], target - end[:2], atol=1e-4)
        assert np.allclose(record.obs_seq[length:], end)
        assert not record.action_seq[length:].any() and not record.worker_reward_seq[length:].any()
        first = int(env.log[begin][2][2])  # steps of the episode
        assert record.reward == pytest.approx(-0.1 * sum(range(first, first + length)))
        biggest = max(biggest, np.abs(record.subgoal_seq).max())
        begin += length
    assert biggest > 10.5


def test_random_subgoals(toy_run, monkeypatch):
    """All of them, the first one, too; never the worker's actions."""
    calls = watch(monkeypatch)
    settings = dict(learning_starts=1000, uniform_warmup=False, random_subgoals=1.0)
    records = toy_run(cher, 46, ToyEnv(23), **settings).manager
    shares = [share for limit, share, *_ in calls if limit == 10]
    assert shares == [1] * 7 and all(share == 0 for limit, share, *_ in calls if limit == 1)
    subgoals = np.stack([record.subgoal_seq[0] for record in records[1:]])
    assert 3 < subgoals.std() < 9 and np.abs(subgoals).max() <= 10


def test_warm_up(toy_run, monkeypatch):
    """Uniform over the whole range at both levels, up to and with step --learning-starts."""
    calls = watch(monkeypatch)
    monkeypatch.setattr(cher, "update_worker", lambda *inputs: {})
    monkeypatch.setattr(cher, "update_manager", lambda *inputs: {"manager/coop_value": torch.tensor(-1.0)})
    toy_run(
        cher, 1500, ToyEnv(100), learning_starts=1400, manager_period=2, worker_noise=0.0, manager_noise=0.0
    )
    worker = [(share, action) for limit, share, _, _, action in calls if limit == 1]
    manager = [(share, action) for limit, share, _, _, action in calls if limit == 10]
    assert [share for share, _ in worker] == [1] * 1400 + [0] * 100
    assert [share for share, _ in manager] == [1] * 701 + [0] * 50  # one is still drawn at step 1400
    for level, half_range in ((worker, 1), (manager, 10)):
        random = np.stack([action for share, action in level if share]) / half_range
        assert np.abs(random).max() <= 1 and np.abs(random).max() > 0.99
        assert np.allclose(random.mean(0), 0, atol=0.08) and np.allclose(random.std(0), 3**-0.5, atol=0.04)
        policy = np.stack([action for share, action in level if not share]) / half_range
        assert np.abs(policy).max() < 0.3  # untrained networks say nearly 0


# ------------------------------------------------------------------------------------- networks and noise


def ant_agents(**settings):
    args = cher.Args(env="AntMaze-ULarge", **settings)
    return cher.make_agents(make_env(args.env), args, CPU)


def test_noise_is_in_units_of_the_half_range():
    """0.1 of it to explore, 0.2 clipped at 0.5 in the targets, entry by entry."""
    manager, worker = ant_agents(hidden=8)
    half_range = tensor(10, 10, 0.5, 1, 1, 1, 1, *[0.5, 0.3] * 4)
    for agent, limit in ((manager, half_range), (worker, torch.full((8,), 30.0))):
        for noise, share in ((agent.noise, 0.1), (agent.target_noise, 0.2), (agent.target_noise_clip, 0.5)):
            assert torch.allclose(noise, share * limit)


@pytest.mark.parametrize(
    "mean, limit, noisy", [((29.5, 0), (30, 30), (30, -6)), ((9.5, 0.4), (10, 0.5), (10, 0.3))]
)
def test_exploration(monkeypatch, mean, limit, noisy):
    monkeypatch.setattr(torch, "randn_like", lambda x: tensor(1, -2))
    agent = SimpleNamespace(
        actor=lambda obs, goal: tensor(mean), limit=tensor(*limit), noise=0.1 * tensor(*limit)
    )
    agent.act = lambda *inputs, **flags: cher.TD3.act(agent, *inputs, **flags)
    obs = np.zeros(3, np.float32)
    assert cher.explore(agent, obs, obs, 0.0).tolist() == pytest.approx(noisy)


def test_target_smoothing(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda x: tensor([4, -1]))
    seen = []
    agent = SimpleNamespace(
        target_actor=lambda obs, goal: tensor([29.8, -3]), limit=tensor(30, 30), gamma=0.99
    )
    agent.target_critic = lambda obs, goal, action: seen.append(action) or torch.zeros(2, 1)
    agent.target_noise, agent.target_noise_clip = 0.2 * agent.limit, 0.5 * agent.limit
    cher.TD3.td_target(agent, tensor(0), tensor(0), torch.zeros(1, 3), torch.zeros(1, 2))
    assert seen[0][0].tolist() == pytest.approx([30, -9])


def test_parameter_counts():
    manager, worker = ant_agents()
    nets = (worker.actor, worker.critic, manager.actor, manager.critic)  # critics are twins
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert counts == [79_624, 2 * 79_873, 78_095, 2 * 78_337]


def test_worker_sees_its_position():
    torch.manual_seed(0)
    _, worker = ant_agents(hidden=16, output_init=0.0)
    obs, subgoal, action = torch.randn(4, 30), torch.randn(4, 15), torch.randn(4, 8)
    for entry in (0, 1, 29):  # x, y, time
        other = obs + torch.eye(30)[entry]
        assert not torch.equal(worker.actor(obs, subgoal), worker.actor(other, subgoal))
        assert not torch.equal(worker.critic(obs, subgoal, action), worker.critic(other, subgoal, action))


def test_defaults_are_the_papers():
    args = cher.parse_args(["--env", "AntMaze-ULarge"])
    expected = dict(
        manager_period=10, subgoal_space="full", mask_xy=False, manager_reward_scale=0.1, relabeling="none",
        coop_weight=0.005, coop_form="released", coop_delta=None, hindsight=False, subgoal_testing_rate=0.3,
        flat=False, hidden=256, output_init=0.003, actor_lr=3e-4, critic_lr=3e-4, critic_weight_decay=0.0,
        tau=0.005, batch_size=128, learning_starts=10_000, worker_actor_every=2, manager_actor_every=2,
        worker_gamma=0.99, manager_gamma=0.99, worker_noise=0.1, manager_noise=0.1, worker_target_noise=0.2,
        manager_target_noise=0.2, worker_target_noise_clip=0.5, manager_target_noise_clip=0.5,
        worker_buffer=200_000, total_steps=3_000_000, candidates=10, candidate_noise=0.5, eval_every=50_000,
        eval_episodes=50, eval_goals=(16, 0, 16, 16, 0, 16),
    )  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    args = cher.parse_args(["--env", "AntGather"])
    assert (args.coop_weight, args.manager_reward_scale, args.total_steps) == (0.01, 10, 1_000_000)
    args = cher.parse_args(["--env", "AntFourRooms"])
    assert (args.coop_weight, args.manager_reward_scale, args.total_steps) == (0.005, 0.1, 3_000_000)


def test_size_of_the_replay():
    args = cher.Args(hidden=8)
    env = make_env("AntMaze-ULarge")
    manager, worker = cher.make_agents(env, args, CPU)
    buffer, _ = cher.make_buffers(env, args, manager, worker, CPU)
    assert len(buffer.rows) == 20_000  # segments, 200,000 steps
    assert 45e6 < buffer.rows.numel() * 4 < 50e6


# ----------------------------------------------------------------------------------------------------- HAC

STATES = np.array([[0, 0], [1, 0], [1, 1], [2, 2]], np.float32)


def test_hindsight_example():
    """The subgoal (0, 2) of three steps that lead to (2, 2) becomes (2, 2)."""
    segment = cher.Segment(3, obs_dim=2, dims=2, action_dim=1)
    subgoal = np.array([0.0, 2.0])
    segment.start(STATES[0], subgoal)
    for obs, next_obs in itertools.pairwise(STATES):
        reward, subgoal_now = cher.intrinsic_reward(obs, subgoal, next_obs), subgoal
        subgoal = cher.subgoal_transition(obs, subgoal, next_obs)
        segment.add(np.array([subgoal_now[0]]), -1.0, reward, next_obs, subgoal)
    recorded = segment.sequences()
    assert recorded["subgoal_seq"].tolist() == [[0, 2], [-1, 2], [-1, 1], [-2, 0]]
    assert recorded["worker_reward_seq"].tolist() == pytest.approx([-2.2360680, -1.4142136, -2])
    before = {name: np.copy(value) for name, value in recorded.items()}
    hindsight = cher.hindsight_sequences(recorded, 2)
    assert hindsight["subgoal_seq"].tolist() == [[2, 2], [1, 2], [1, 1], [0, 0]]
    assert hindsight["worker_reward_seq"].tolist() == pytest.approx([-2.2360680, -1.4142136, -1e-5])
    for name in ("obs_seq", "action_seq", "length"):
        assert np.array_equal(hindsight[name], before[name])
    assert all(
        np.array_equal(recorded[name], before[name]) for name in before
    )  # the original stays as it was


def test_hindsight_of_a_short_segment():
    """Two of three steps: reached at the second, whatever the padding; never clipped to the limit."""
    segment = cher.Segment(3, obs_dim=3, dims=2, action_dim=1)
    segment.start(np.zeros(3), np.zeros(2))
    for x in (15, 30):
        segment.add(np.zeros(1), 0.0, 0.0, np.array([x, -x, 7.0]), np.zeros(2))
    hindsight = cher.hindsight_sequences(segment.sequences(), 2)
    assert hindsight["subgoal_seq"].tolist() == [[30, -30], [15, -15], [0, 0], [0, 0]]
    assert hindsight["worker_reward_seq"][:2].tolist() == pytest.approx([-math.hypot(15, 15), -1e-5])


def test_hac_stores_hindsight_and_sometimes_the_original(toy_run):
    """1.3 records per period. Their tasks' rewards are the same, their subgoals are not."""
    steps = 4000
    records = toy_run(
        cher, steps, ToyEnv(100), hindsight=True, manager_period=2, learning_starts=steps
    ).manager
    reached = [np.allclose(record.subgoal_seq[-1], 0, atol=1e-6) for record in records]
    assert sum(reached) == steps / 2  # of every period
    assert len(records) / (steps / 2) == pytest.approx(1.3, abs=0.035)
    pairs = [(a, b) for a, b in itertools.pairwise(records) if np.array_equal(a.obs_seq, b.obs_seq)]
    assert len(pairs) == len(records) - steps / 2
    for hindsight, original in pairs:
        assert np.allclose(hindsight.subgoal_seq[0], hindsight.obs_seq[-1, :2] - hindsight.obs_seq[0, :2])
        assert not np.allclose(original.subgoal_seq, hindsight.subgoal_seq)
        for name in ("action_seq", "goal", "reward", "terminated", "length"):
            assert np.array_equal(getattr(hindsight, name), getattr(original, name))


@pytest.mark.parametrize("dies, rate", [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_hac_stores_a_death(toy_run, dies, rate):
    """Once, as it was, not in hindsight, where dying would be the best way to it. A stop is no death."""
    flags = dict(hindsight=True, subgoal_testing_rate=rate, learning_starts=100)
    records = toy_run(cher, 17, ToyEnv(death=17, dies=dies), **flags).manager
    expected = [(10, 0)] * (1 + int(rate)) + [(7, int(dies))]
    assert [(int(record.length), int(record.dead)) for record in records] == expected
    left = [math.hypot(*record.subgoal_seq[int(record.length)]) for record in records]
    assert left[0] == pytest.approx(0, abs=1e-6) and (left[-1] > 0.1) == dies
    if dies:
        assert records[-1].worker_reward_seq[6] == pytest.approx(-left[-1] / (1 - 0.99), rel=1e-4)


def test_no_hindsight_by_default(toy_run):
    assert len(toy_run(cher, 200, ToyEnv(100), learning_starts=200).manager) == 20


# ---------------------------------------------------------------------------------------- HIRO within cher.py


def test_relabeling_changes_the_critics_action_only(monkeypatch):
    torch.manual_seed(0)
    args, manager, worker = toy_agents(relabeling="off_policy", coop_weight=0.0)
    batch, relabeled, seen = random_batch(), torch.randn(32, 2), []
    critic_loss = manager.critic_loss
    manager.critic_loss = lambda *inputs: seen.append(inputs) or critic_loss(*inputs)
    monkeypatch.setattr(
        cher, "score_candidates", lambda worker, candidates, batch: -torch.arange(10.0).expand(32, 10)
    )
    monkeypatch.setattr(cher, "make_candidates", lambda *inputs: relabeled[:, None].expand(32, 10, 2))
    losses = cher.update_manager(manager, worker, cher.CoopWeight(args, CPU), batch, args, True, False)
    assert torch.equal(seen[0][3], relabeled) and losses["manager/relabeled_share"] == 1
    assert torch.equal(batch.subgoal, batch.subgoal_seq[:, 0])


# ---------------------------------------------------------------------------------------------- flat TD3


def test_flat(toy_run, monkeypatch):
    """One agent acts at each step on what it sees of the task; a death is an end, a time limit is not."""
    calls = watch(monkeypatch)
    env = ToyEnv(23, death=17)
    records = toy_run(cher, 34, env, flat=True, learning_starts=20, manager_reward_scale=10.0).manager
    assert len(records) == 34 and all(record.length == 1 for record in records)
    assert [int(record.terminated) for record in records] == ([0] * 16 + [1]) * 2
    steps = [int(step[2][2]) for step in env.log]
    for record, (obs, action, next_obs), step in zip(records, env.log, steps, strict=True):
        assert np.allclose(record.obs_seq, [obs, next_obs]) and record.reward == pytest.approx(-10 * step)
        assert np.array_equal(record.subgoal_seq[0], action) and np.array_equal(record.action_seq[0], action)
    assert [share for _, share, *_ in calls] == [1] * 21 + [0] * 14
    goals = [goal.tolist() for limit, _, _, goal, _ in calls if limit == 1]  # a new one in each episode
    assert goals == [[3, 4]] * 17 + [[4, 5]] * 17 + [[5, 6]] and env.resets == [1, None, None]
    assert [record.goal.tolist() for record in records] == goals[:-1]


def test_flat_has_no_subgoals(toy_run, monkeypatch, tmp_path, capsys):
    """Columns about subgoals are 0, in progress.csv as in what --eval-only prints."""
    toy_run(cher, 34, ToyEnv(), flat=True, learning_starts=20)
    (row,) = read_rows(tmp_path / "run")
    model = str(tmp_path / "run" / "model.pt")
    settings = dict(hidden=8, threads=1, eval_episodes=1, device="cpu", subgoal_space="xy", flat=True)
    cher.main(cher.Args(eval_only=True, checkpoint=model, **settings, manager_period=1, coop_weight=0.0))
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("eval/"))
    for metrics in (row, printed):
        about = [name for name in metrics if "subgoal" in name or name.endswith("progress")]
        assert len([name for name in about if name.startswith("eval/")]) == 6
        assert all(float(metrics[name]) == 0 for name in about)
    assert float(printed["eval/return"]) != 0


def test_flat_is_td3():
    """Its update is one of TD3 on (obs, goal, action), with the limits and noise of the robot's action."""
    torch.manual_seed(0)
    args = cher.Args(flat=True, hidden=16, output_init=0.0)
    env = make_env("AntMaze-ULarge")
    agent, body = cher.make_agents(env, args, CPU)
    assert agent.limit.tolist() == [30.0] * 8 and agent.noise.tolist() == pytest.approx([3.0] * 8)
    assert (args.manager_period, args.coop_weight, agent.gamma) == (1, 0, 0.99)
    buffer, _ = cher.make_buffers(env, args, agent, body, CPU)
    assert len(buffer.rows) == 200_000
    obs, next_obs, goal, action = (torch.randn(64, n) for n in (30, 30, 2, 8))
    batch = SimpleNamespace(
        obs_seq=torch.stack([obs, next_obs], 1), goal=goal, subgoal=action, reward=torch.randn(64),
        terminated=torch.zeros(64),
    )  # fmt: skip
    other, _ = cher.make_agents(env, args, CPU)
    other.load_state_dict(agent.state_dict())
    torch.manual_seed(1)
    losses = cher.update_manager(agent, body, cher.CoopWeight(args, CPU), batch, args, True, False)
    assert not any("coop" in name for name in losses)
    torch.manual_seed(1)
    target = other.td_target(batch.reward, batch.terminated, next_obs, goal)
    other.critic_step(other.critic_loss(target, obs, goal, action)[0])
    other.actor_step(-other.critic.q1(obs, goal, other.actor(obs, goal)).mean())
    other.update_target_critic(), other.update_target_actor()
    assert same(params(agent), params(other))


def test_flat_schedule(toy_run, monkeypatch):
    schedule = Schedule(monkeypatch)
    toy_run(cher, 140, ToyEnv(), learning_starts=40, flat=True)
    assert schedule.count("worker") == 0 and schedule.count("manager") == 100
    assert schedule.count("manager", "with_actor") == 50


# --------------------------------------------------------------------------------------- transfer of a worker


def gather_worker(path, **settings):
    """A model.pt of AntGather, with untrained networks whose outputs are not nearly 0."""
    args = cher.Args(**dict(env="AntGather", hidden=16, output_init=0.0) | settings)
    agents = dict(zip(("manager", "worker"), cher.make_agents(make_env(args.env), args, CPU)))
    cher.save_checkpoint(agents, args, path)
    return agents["worker"]


def test_transfer_from_gather_to_a_maze(tmp_path):
    """In a maze the worker acts as in AntGather with nothing in sight: it sees the ant and the time."""
    torch.manual_seed(0)
    old = gather_worker(tmp_path / "model.pt")
    env = make_env("AntMaze-ULarge")
    settings = dict(hidden=16, output_init=0.0, worker_checkpoint=str(tmp_path / "model.pt"))
    _, worker = cher.make_agents(env, cher.Args(**settings), CPU)
    cher.load_worker(worker, env, cher.Args(**settings))
    obs, subgoal, action = torch.randn(20, 30), torch.randn(20, 15), torch.randn(20, 8)
    in_gather = torch.cat([obs[:, :29], torch.zeros(20, 20), obs[:, 29:]], 1)
    for name in ("actor", "target_actor"):
        new = getattr(worker, name)(obs, subgoal)
        assert torch.allclose(new, getattr(old, name)(in_gather, subgoal), atol=1e-5)
        assert not torch.allclose(new, getattr(old, name)(in_gather + torch.eye(50)[35], subgoal))
    for name in ("critic", "target_critic"):
        new = getattr(worker, name)(obs, subgoal, action)
        assert torch.allclose(new, getattr(old, name)(in_gather, subgoal, action), atol=1e-5)
    assert worker.actor.layers[0].weight.shape == (16, 45)


def test_transfer_to_a_maze_without_time(tmp_path):
    """AntMaze-Bottleneck's obs is the ant alone: the worker acts as with nothing in sight at time 0."""
    torch.manual_seed(0)
    old = gather_worker(tmp_path / "model.pt")
    env, args = (
        make_env("AntMaze-Bottleneck"),
        cher.Args(
            env="AntMaze-Bottleneck", hidden=16, output_init=0.0, worker_checkpoint=str(tmp_path / "model.pt")
        ),
    )
    _, worker = cher.make_agents(env, args, CPU)
    cher.load_worker(worker, env, args)
    obs, subgoal = torch.randn(20, 29), torch.randn(20, 15)
    in_gather = torch.cat([obs, torch.zeros(20, 21)], 1)
    assert torch.allclose(worker.actor(obs, subgoal), old.actor(in_gather, subgoal), atol=1e-5)


def test_observations_that_transfer():
    """What load_worker relies on: the ant's 29 entries first, the time last, the sensors between them."""
    gather, maze = make_env("AntGather"), make_env("AntMaze-ULarge")
    assert gather.robot_nq + gather.robot_nv == maze.robot_nq + maze.robot_nv == 29
    for env in (gather, maze):
        env.reset(seed=0)
        obs, *_ = env.step(np.full(8, 5.0))
        obs = obs["observation"]
        assert obs[:15] == pytest.approx(env.data.qpos[:15]) and obs[15:29] == pytest.approx(
            env.data.qvel[:14]
        )
        assert obs[-1] == 0.001
    gather.objects = np.zeros((0, 3))
    assert not gather._observation()[29:49].any() and len(gather._observation()) == 50


def test_transfer_within_a_task(tmp_path):
    old = gather_worker(tmp_path / "model.pt")
    env = make_env("AntGather")
    args = cher.Args(env="AntGather", hidden=16, worker_checkpoint=str(tmp_path / "model.pt"))
    _, worker = cher.make_agents(env, args, CPU)
    cher.load_worker(worker, env, args)
    assert same(params(old), params(worker))


@pytest.mark.parametrize(
    "saved, wanted, word",
    [
        (dict(env="PointMaze-U", subgoal_space="xy"), dict(subgoal_space="xy"), "does not fit"),
        (dict(subgoal_space="xy"), dict(), "subgoal_space"),
        (dict(hidden=8), dict(), "hidden"),
        (dict(flat=True), dict(), "flat"),
        (dict(mask_xy=True), dict(), "mask_xy"),
        (dict(rest_value=True), dict(), "rest_value"),
        (dict(), dict(rest_value=True), "rest_value"),
        (dict(rest_value=True, worker_gamma=0.95), dict(rest_value=True), "worker_gamma"),
        (
            dict(env="PointMaze-U", subgoal_space="xy", action_limit=(1.0, 0.25)),
            dict(env="PointMaze-U", subgoal_space="xy"),
            "action_limit",
        ),
        (
            dict(subgoal_space="xy", scale_worker_inputs=True),
            dict(subgoal_space="xy", scale_worker_inputs=True, subgoal_limit=(2.0, 2.0)),
            "subgoal_limit",
        ),
        (dict(env="AntMaze-U"), dict(env="AntMaze-Bottleneck"), "does not fit"),  # no time there
        (dict(env="AntMaze-U"), dict(env="AntGather"), "does not fit"),
        (dict(env="AntPush-Small", subgoal_space="xy"), dict(subgoal_space="xy"), "does not fit"),
        # the sizes would fit: 50 entries less the sensors, and 36 of another order
        (
            dict(env="AntGather", subgoal_space="xy"),
            dict(env="AntPush-Small", subgoal_space="xy"),
            "other entries",
        ),
    ],
)
def test_workers_that_do_not_transfer(tmp_path, saved, wanted, word):
    path = tmp_path / "model.pt"
    gather_worker(path, **saved)
    args = cher.Args(**dict(hidden=16, worker_checkpoint=str(path)) | wanted)
    env = make_env(args.env)
    _, worker = cher.make_agents(env, args, CPU)
    with pytest.raises(SystemExit) as stop:
        cher.load_worker(worker, env, args)
    assert stop.value.code.startswith("cher.py: error: ") and "\n" not in stop.value.code
    assert word in stop.value.code and str(path) in stop.value.code


def test_frozen_worker(tmp_path, monkeypatch):
    """It neither learns nor explores, also in the warm-up, while the manager learns; then the run resumes."""
    gather_worker(tmp_path / "old.pt", hidden=32)
    made, asked = spy_on_worker(monkeypatch, cher)
    flags = ["--env", "AntMaze-ULarge", *TINY, "--total-steps", "85", "--eval-every", "1000"]
    flags += ["--save-every", "80", "--run-dir", str(tmp_path / "run"), "--freeze-worker"]
    cher.main(cher.parse_args([*flags, "--worker-checkpoint", str(tmp_path / "old.pt")]))
    ((manager, worker),) = made
    assert asked == [True] * 85  # just what the policy says
    old = torch.load(tmp_path / "old.pt", weights_only=True)["worker"]
    assert torch.equal(worker.actor.layers[1].weight, old["actor"]["layers.1.weight"])
    assert torch.equal(worker.target_critic.layers[2].weight, old["target_critic"]["layers.2.weight"])
    assert manager.critic_optimizer.state_dict()["state"][0]["step"] == 2  # at 70 and 80
    assert not worker.critic_optimizer.state_dict()["state"]
    row = read_rows(tmp_path / "run")[-1]
    assert "worker/q" not in row and math.isfinite(float(row["manager/coop_value"]))

    (tmp_path / "old.pt").unlink()  # the checkpoint has all that is needed
    before = params(worker)
    cher.main(cher.parse_args(["--resume", str(tmp_path / "run" / "checkpoint.pt"), "--total-steps", "90"]))
    assert same(before, params(made[-1][1])) and not same(params(manager), params(made[-1][0]))
    assert asked == [True] * 90


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("flags", ["--coop-delta -1 --coop-starts 2", "--hindsight", "--flat"])
def test_resumed_run_is_the_same_run(tmp_path, monkeypatch, flags):
    """The learned weight with its optimiser, the replay and the running segment come back."""
    monkeypatch.setattr(cher, "evaluate", lambda *inputs: NO_EVALUATION)
    simulate, count = common_envs.PointEnv._simulate, []

    def stopping(env, action):
        count.append(1)
        if len(count) == 180 + 117:
            os.kill(os.getpid(), signal.SIGTERM)
        simulate(env, action)

    monkeypatch.setattr(common_envs.PointEnv, "_simulate", stopping)
    whole, part = tmp_path / "whole", tmp_path / "part"
    common = ["--env", "PointMaze-U", *TINY, *flags.split(), "--save-every", "180", "--eval-every", "90"]
    common += ["--total-steps", "180"]
    cher.main(cher.parse_args([*common, "--run-dir", str(whole)]))
    cher.main(cher.parse_args([*common, "--run-dir", str(part)]))
    assert torch.load(part / "checkpoint.pt", weights_only=True)["loop"]["step"] == 117
    cher.main(cher.parse_args(["--resume", str(part / "checkpoint.pt")]))
    assert len(read_rows(part)) == 2 and read_rows(part) == read_rows(whole)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, part))
    for name in ("coop_weight", "buffer", "segment", "manager", "worker"):
        assert equal(a[name], b[name]), name


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# ---------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--freeze-worker", "--worker-checkpoint"),
        ("--coop-weight -0.1", "--coop-weight"),
        ("--coop-weight nan", "--coop-weight"),
        ("--coop-delta nan", "--coop-delta"),
        ("--coop-delta 5", "--coop-delta"),
        ("--coop-weight 0 --coop-delta -5", "choose one"),
        ("--flat --hindsight", "--flat"),
        ("--flat --coop-delta -5", "--flat"),
        ("--flat --relabeling off_policy", "--flat"),
        ("--flat --worker-checkpoint model.pt", "--flat"),
        ("--flat --subgoal-space xy --subgoal-limit 2 2", "--flat"),
        ("--flat --freeze-worker", "--flat"),
        ("--flat --mask-xy", "--flat"),
        ("--flat --scale-worker-inputs", "--flat"),
        ("--flat --rest-value", "--flat"),
        ("--flat --redrawn-subgoals 0.5", "--flat"),
        ("--flat --preset quick", "leave out --preset quick"),
        ("--flat --coop-reference -5", "--flat"),
        ("--coop-reference 600", "--coop-reference"),
        ("--coop-reference 0", "--coop-reference"),
        ("--worker-buffer 5", "--worker-buffer"),
        ("--subgoal-testing-rate 2", "--subgoal-testing-rate"),
        ("--subgoal-testing-rate -1", "--subgoal-testing-rate"),
    ],
)
def test_bad_flags(flags, word):
    with pytest.raises(SystemExit) as stop:
        cher.parse_args(flags.split())
    assert stop.value.code.startswith("cher.py: error: ") and word in stop.value.code
    assert "\n" not in stop.value.code


def test_checkpoint_without_a_worker(tmp_path):
    gather_worker(tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    del state["worker"]
    torch.save(state, tmp_path / "model.pt")
    args = cher.Args(env="AntGather", hidden=16, worker_checkpoint=str(tmp_path / "model.pt"))
    env = make_env("AntGather")
    with pytest.raises(SystemExit, match="has no worker"):
        cher.load_worker(cher.make_agents(env, args, CPU)[1], env, args)


def test_foreign_worker(tmp_path):
    (tmp_path / "garbage.pt").write_bytes(b"no checkpoint")
    env = make_env("AntMaze-ULarge")
    for name, word in (("missing.pt", "no checkpoint at"), ("garbage.pt", "not a checkpoint")):
        args = cher.Args(worker_checkpoint=str(tmp_path / name), hidden=8)
        with pytest.raises(SystemExit) as stop:
            cher.load_worker(cher.make_agents(env, args, CPU)[1], env, args)
        assert word in stop.value.code and name in stop.value.code and "\n" not in stop.value.code


def test_another_environment_brings_its_evaluation_goals(tmp_path):
    state = {"script": "cher", "format": cher.FORMAT, "args": vars(cher.Args(env="AntMaze-U"))}
    torch.save(state, tmp_path / "model.pt")
    flags = ["--eval-only", "--checkpoint", str(tmp_path / "model.pt")]
    assert cher.parse_args(flags).eval_goals == ()
    args = cher.parse_args([*flags, "--env", "AntMaze-ULarge"])
    assert args.eval_goals == (16.0, 0.0, 16.0, 16.0, 0.0, 16.0)


def test_replay_of_an_older_version():
    """Its rows had no entry for a death."""
    new = cher.ReplayBuffer(5, CPU, reward=(), dead=())
    with pytest.raises(ValueError, match="older version"):
        new.load_state_dict({"rows": torch.zeros(3, 1), "added": 3})


@pytest.mark.parametrize(
    "flags",
    ["", "--coop-delta -300", "--coop-weight 0", "--coop-weight 0 --relabeling off_policy", "--flat"]
    + ["--coop-weight 0 --hindsight", "--coop-form theorem"],
)
def test_settings_survive_a_checkpoint(tmp_path, flags):
    """The methods' command lines are accepted, and what is saved of them parses to the same again."""
    args = cher.parse_args(["--env", "AntGather", *flags.split()])
    assert args.flat == ("--flat" in flags) and args.manager_period == (1 if args.flat else 10)
    path = tmp_path / "model.pt"
    cher.save_checkpoint({}, args, path)
    again = cher.parse_args(["--resume", str(path)])
    assert dataclasses.asdict(again) | {"resume": None} == dataclasses.asdict(args)
