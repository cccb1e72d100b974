"""Networks, TD3, replay: hand-computed numbers and slow independent loops."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ToyEnv
from torch import nn

import hiro
from common_envs import make_env

CPU = torch.device("cpu")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def make_td3(obs_dim=3, goal_dim=2, limit=(2.0, 5.0), mask=0, noise=(1.0, 0.2, 0.5), **settings):
    scale = torch.ones(obs_dim + goal_dim + len(limit))
    scale[:mask] = 0
    settings = dict(hidden=8, output_init=0.0) | settings
    return hiro.TD3(scale, torch.tensor(limit), 0.99, noise, hiro.Args(**settings))


def ant_agents(**settings):
    args = hiro.Args(env="AntMaze-ULarge", **settings)
    return hiro.make_agents(make_env(args.env), args, CPU)


def copies(agent):
    nets = ("actor", "target_actor", "critic", "target_critic")
    return {name: [p.detach().clone() for p in getattr(agent, name).parameters()] for name in nets}


def changed(agent, before):
    return {
        name
        for name, old in before.items()
        if not all(torch.equal(a, b) for a, b in zip(old, getattr(agent, name).parameters()))
    }


def random_batch(agent, rows=16, obs_dim=3, goal_dim=2):
    action_dim = len(agent.limit)
    action = (2 * torch.rand(rows, action_dim) - 1) * agent.limit
    return torch.randn(rows, obs_dim), torch.randn(rows, goal_dim), action


# --------------------------------------------------------------------------------------------- networks


def test_output_scaling():
    actor = hiro.Actor(torch.ones(3), tensor(10, 0.5), hidden=4, output_init=0.0)
    with torch.no_grad():
        actor.layers[2].weight.zero_()
        actor.layers[2].bias.copy_(tensor(0.5, -1))
    for obs in (torch.zeros(1, 2), torch.full((1, 2), 100.0)):
        assert actor(obs, torch.ones(1, 1))[0].tolist() == pytest.approx([4.62117157, -0.38079708])


def linear_layers(net):
    """Weight [fan_in, fan_out] and bias of every layer, of every member of an ensemble."""
    for layer in net.layers:
        if isinstance(layer, nn.Linear):
            yield layer.weight.T, layer.bias
        else:
            yield from zip(layer.weight, layer.bias)


@pytest.mark.parametrize("level", [0, 1])
def test_initialisation(level):
    """300 units: hidden weights within 1/sqrt(fan_in), output within 0.003, biases 0."""
    agent = ant_agents()[level]
    for net in (agent.actor, agent.critic):
        for weight, bias in linear_layers(net):
            last = weight.shape[1] in (1, 8, 15)
            bound = (
                0.003
                if last
                else {30 + 2: 0.176777, 45: 0.149071, 53: 0.137361, 47: 0.145865}.get(
                    weight.shape[0], 0.057735
                )
            )
            assert weight.abs().max() <= bound + 1e-6
            assert weight.abs().max() > 0.95 * bound  # all of the range is used
            assert abs(weight.mean()) < 0.1 * bound
            assert not bias.any()
    first, second = agent.critic.layers[0].weight.detach()
    assert not torch.allclose(first, second)  # twins, not copies
    targets = ((agent.actor, agent.target_actor), (agent.critic, agent.target_critic))
    for online, target in targets:
        for a, b in zip(online.parameters(), target.parameters()):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and not b.requires_grad


def test_initialisation_of_pytorch():
    agent = ant_agents(output_init=0.0)[1]
    for net in (agent.actor, agent.critic):
        for weight, bias in linear_layers(net):
            bound = weight.shape[0] ** -0.5
            assert 0.9 * bound < weight.abs().max() <= bound + 1e-6
            assert 0 < bias.abs().max() <= bound + 1e-6


def test_parameter_counts():
    """HIRO's AntMaze networks; the critic holds two."""
    manager, worker = ant_agents()
    count = {
        name: sum(p.numel() for p in net.parameters())
        for name, net in (
            ("low actor", worker.actor),
            ("low critics", worker.critic),
            ("high actor", manager.actor),
            ("high critics", manager.critic),
        )
    }
    expected = {"low actor": 106_508, "low critics": 2 * 106_801}
    assert count == expected | {"high actor": 104_715, "high critics": 2 * 105_001}


def mlp_by_hand(layers, x):
    """One network, one row, numbers one by one."""
    for index, (weight, bias) in enumerate(layers):
        y = [bias[j] + sum(x[i] * weight[i, j] for i in range(len(x))) for j in range(len(bias))]
        x = [max(value, 0.0) for value in y] if index < len(layers) - 1 else y
    return x


def test_networks_by_hand():
    torch.manual_seed(0)
    agent = make_td3(mask=1)
    obs, goal, action = random_batch(agent, rows=5)
    layers = [
        (w.detach().double().numpy(), b.detach().double().numpy()) for w, b in linear_layers(agent.critic)
    ]
    twins = (layers[0::2], layers[1::2])  # layer 0 of both, layer 1 of both, ...
    q, q1 = agent.critic(obs, goal, action), agent.critic.q1(obs, goal, action)
    twin_input = (torch.stack([x, 2 * x]) for x in (obs, goal, action))
    q_of_two = agent.critic(*twin_input)
    actions = agent.actor(obs, goal)
    actor_layers = [
        (w.detach().double().numpy(), b.detach().double().numpy()) for w, b in linear_layers(agent.actor)
    ]
    assert q.shape == q_of_two.shape == (2, 5) and q1.shape == (5,)
    for row in range(5):
        x = np.concatenate([obs[row], goal[row], action[row]]).astype(float)
        x[0] = 0
        by_hand = [mlp_by_hand(twin, list(x))[0] for twin in twins]
        assert q[:, row].tolist() == pytest.approx(by_hand, abs=1e-5)
        assert q1[row].item() == pytest.approx(by_hand[0], abs=1e-5)
        assert q_of_two[0, row].item() == pytest.approx(by_hand[0], abs=1e-5)
        assert q_of_two[1, row].item() == pytest.approx(mlp_by_hand(twins[1], list(2 * x))[0], abs=1e-5)
        u = mlp_by_hand(actor_layers, list(x[:5]))
        assert actions[row].tolist() == pytest.approx([2 * np.tanh(u[0]), 5 * np.tanh(u[1])], abs=1e-5)


def test_worker_is_blind_to_its_position():
    torch.manual_seed(0)
    manager, worker = ant_agents(hidden=16, output_init=0.0)
    obs, subgoal, action = torch.randn(4, 30), torch.randn(4, 15), torch.randn(4, 8)
    elsewhere = obs.clone()
    elsewhere[:, :2] += torch.randn(4, 2) * 5
    for net in (worker.actor, worker.target_actor):
        assert torch.equal(net(obs, subgoal), net(elsewhere, subgoal))
    for net in (worker.critic, worker.target_critic):
        assert torch.equal(net(obs, subgoal, action), net(elsewhere, subgoal, action))
        assert torch.equal(net.q1(obs, subgoal, action), net.q1(elsewhere, subgoal, action))
    higher = obs + torch.eye(30)[2]
    assert not torch.allclose(worker.actor(obs, subgoal), worker.actor(higher, subgoal))
    assert not torch.allclose(manager.actor(obs, subgoal[:, :2]), manager.actor(elsewhere, subgoal[:, :2]))

    # a whole segment moved by whole metres, so that sums are exact: the correction sees no change either
    obs_seq = (torch.randn(4, 11, 30) * 64).round() / 64
    batch = SimpleNamespace(obs_seq=obs_seq, action_seq=torch.randn(4, 10, 8), length=torch.full((4,), 10.0))
    candidates = (torch.randn(4, 6, 15) * 64).round() / 64
    scores = hiro.score_candidates(worker, candidates, batch)
    batch.obs_seq = obs_seq + torch.cat([tensor(8, -4), torch.zeros(28)])
    assert torch.equal(scores, hiro.score_candidates(worker, candidates, batch))
    batch.obs_seq = obs_seq + torch.eye(30)[2]
    assert not torch.allclose(scores, hiro.score_candidates(worker, candidates, batch))


@pytest.mark.parametrize("rows", [1, 7, 1024, 2500])
def test_in_blocks(rows):
    a, b = torch.randn(rows, 3), torch.randn(rows, 1)
    assert torch.equal(hiro.in_blocks(lambda x, y: x * y, a, b), a * b)


# ----------------------------------------------------------------------------------------------- noise


def with_noise(monkeypatch, *z):
    """torch.randn_like gives these numbers."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.tensor(z, dtype=x.dtype).expand_as(x))


@pytest.mark.parametrize(
    "mean, limit, noisy", [((29.5, 0), (30, 30), (30, -2)), ((9.5, 0.4), (10, 0.5), (10, -0.5))]
)
def test_exploration(monkeypatch, mean, limit, noisy):
    with_noise(monkeypatch, 1.0, -2.0)
    agent = SimpleNamespace(actor=lambda obs, goal: tensor(mean), limit=tensor(*limit), noise=1.0)
    obs = np.zeros(3, np.float32)
    assert hiro.TD3.act(agent, obs, obs, explore=True).tolist() == pytest.approx(noisy)
    assert hiro.TD3.act(agent, obs, obs, explore=False).tolist() == pytest.approx(mean)


def test_exploration_noise_of_the_levels():
    """One unit of the action and of the subgoal, unless set."""
    manager, worker = ant_agents(worker_noise=0.5, manager_target_noise_clip=0.7)
    assert (manager.noise, manager.target_noise, manager.target_noise_clip) == (1.0, 0.2, 0.7)
    assert (worker.noise, worker.target_noise, worker.target_noise_clip) == (0.5, 0.2, 0.5)
    assert worker.limit.tolist() == [30.0] * 8
    assert manager.limit.tolist() == pytest.approx([10, 10, 0.5, 1, 1, 1, 1] + [0.5, 0.3] * 4)
    assert (manager.gamma, worker.gamma) == (0.99, 0.99)


def test_discounts_of_the_levels(module):
    args = module.Args(env="PointMaze-U", manager_gamma=0.9, worker_gamma=0.8, hidden=8, subgoal_space="xy")
    manager, worker = module.make_agents(make_env(args.env), args, torch.device("cpu"))
    assert (manager.gamma, worker.gamma) == (0.9, 0.8)


def test_act_takes_and_gives_numpy():
    torch.manual_seed(0)
    agent = make_td3(noise=(0.1, 0.2, 0.5))
    obs, goal = np.array([1, 2, 3], np.float32), np.array([4, 5], np.float32)
    mean = agent.act(obs, goal, explore=False)
    assert mean.shape == (2,) and mean.dtype == np.float32
    expected = agent.actor(torch.from_numpy(obs)[None], torch.from_numpy(goal)[None])[0]
    assert mean.tolist() == pytest.approx(expected.tolist())
    draws = np.stack([agent.act(obs, goal, explore=True) for _ in range(4000)]) - mean
    assert draws.mean(0) == pytest.approx([0, 0], abs=0.01)
    assert draws.std(0) == pytest.approx([0.1, 0.1], rel=0.1)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.1


@pytest.mark.parametrize("explore", [True, False])
def test_a_broken_actor_does_not_act(explore):
    """MuJoCo would take NaN for 0, and the run would go on until the next look at the losses."""
    agent = make_td3()
    with torch.no_grad():
        agent.actor_params[0].fill_(torch.nan)
    with pytest.raises(SystemExit, match="hiro.py: error: an actor's output is not finite"):
        agent.act(np.zeros(3, np.float32), np.zeros(2, np.float32), explore)


def test_explore():
    """The policy, or uniform within the limit with the given chance."""
    torch.manual_seed(0)
    agent = SimpleNamespace(limit=tensor(30, 0.5), act=lambda obs, goal, explore: np.array([99.0, explore]))
    assert all(hiro.explore(agent, None, None, 0.0).tolist() == [99, True] for _ in range(100))
    draws = np.stack([hiro.explore(agent, None, None, 1.0) for _ in range(3000)]) / (30, 0.5)
    assert np.abs(draws).max() <= 1 and draws.std(0) == pytest.approx([3**-0.5, 3**-0.5], rel=0.05)
    assert draws.mean(0) == pytest.approx([0, 0], abs=0.05) and draws.dtype in (np.float32, np.float64)
    shares = [hiro.explore(agent, None, None, 0.2)[0] != 99 for _ in range(3000)]
    assert np.mean(shares) == pytest.approx(0.2, abs=0.03)


# ------------------------------------------------------------------------------------------- TD3's losses


def test_target_smoothing(monkeypatch):
    """Noise 0.2 z within 0.5, then the action within its limit."""
    with_noise(monkeypatch, 4.0, -1.0)
    seen = []

    def target_critic(obs, goal, action):
        seen.append(action)
        return torch.zeros(2, len(action))

    agent = SimpleNamespace(target_actor=lambda obs, goal: tensor([29.8, -3.0]), target_critic=target_critic)
    agent.target_noise, agent.target_noise_clip, agent.limit, agent.gamma = 0.2, 0.5, tensor(30, 30), 0.99
    hiro.TD3.td_target(agent, tensor(0), tensor(0), torch.zeros(1, 3), torch.zeros(1, 2))
    assert seen[0][0].tolist() == pytest.approx([30, -3.2])
    agent.limit = tensor(100, 100)
    hiro.TD3.td_target(agent, tensor(0), tensor(0), torch.zeros(1, 3), torch.zeros(1, 2))
    assert seen[1][0].tolist() == pytest.approx([30.3, -3.2])


def test_td_target():
    def target_critic(obs, goal, action):
        assert torch.equal(obs, next_obs) and torch.equal(goal, next_goal)
        return torch.tensor([[-40.0, -40.0, -900.0], [-41.5, -41.5, -880.0]])

    next_obs, next_goal = torch.randn(3, 4), torch.randn(3, 2)
    agent = SimpleNamespace(target_actor=lambda obs, goal: torch.zeros(3, 2), target_critic=target_critic)
    agent.target_noise, agent.target_noise_clip, agent.limit, agent.gamma = 0.2, 0.5, tensor(30, 30), 0.99
    target = hiro.TD3.td_target(agent, tensor(-3.2, -3.2, -11.22), tensor(0, 1, 0), next_obs, next_goal)
    assert target.tolist() == pytest.approx([-44.285, -3.2, -902.22])


def test_critic_loss():
    """Huber: 0.3 and 1.5, then 0.2 and 0.3 above 1; means over the batch, summed over the critics."""
    q = torch.tensor([[0.7, 0.5], [1.2, -1.5]], requires_grad=True)
    agent = SimpleNamespace(critic=lambda obs, goal, action: q)
    loss, mean_q = hiro.TD3.critic_loss(agent, tensor(1, -2), None, None, None)
    assert loss.item() == pytest.approx(1.0225 + 0.0725)
    assert mean_q.item() == pytest.approx(0.225) and not mean_q.requires_grad
    gradient = torch.autograd.grad(loss, q)[0]  # within +-1 per element, over the batch
    assert gradient.flatten().tolist() == pytest.approx([-0.15, 0.5, 0.1, 0.25])
    for error, value in ((0.3, 0.045), (1.0, 0.5), (2.5, 2.0), (-2.5, 2.0)):
        agent.critic = lambda obs, goal, action, error=error: torch.full((2, 3), error)
        assert hiro.TD3.critic_loss(agent, torch.zeros(3), None, None, None)[0].item() == pytest.approx(
            2 * value
        )


def test_polyak():
    agent = make_td3(tau=0.005)
    for params, value in ((agent.actor_params, 1.0), (agent.critic_params, 1.0)):
        for param in params:
            param.data.fill_(value)
    for param in agent.target_actor_params + agent.target_critic_params:
        param.data.fill_(0.2)
    agent.update_target_critic()
    assert all(torch.allclose(p, tensor(0.204)) for p in agent.target_critic.parameters())
    assert all(torch.equal(p, torch.full_like(p, 0.2)) for p in agent.target_actor.parameters())
    agent.update_target_actor()
    assert all(torch.allclose(p, tensor(0.204)) for p in agent.target_actor.parameters())
    assert all(torch.equal(p, torch.ones_like(p)) for p in agent.actor.parameters())


# --------------------------------------------------------------------------------------------- one update


def test_steps_move_one_network():
    torch.manual_seed(0)
    agent = make_td3()
    obs, goal, _ = random_batch(agent)
    before = copies(agent)
    agent.actor_step(-agent.critic.q1(obs, goal, agent.actor(obs, goal)).mean())
    assert changed(agent, before) == {"actor"}
    assert all(p.grad is None for p in agent.critic.parameters())  # no gradient lies in wait
    before = copies(agent)
    agent.critic_step(agent.critic(obs, goal, agent.actor(obs, goal)).square().mean())
    assert changed(agent, before) == {"critic"}


def test_actor_climbs_q():
    torch.manual_seed(0)
    agent = make_td3(actor_lr=1e-2)
    obs, goal, _ = random_batch(agent, 64)
    q = []
    for _ in range(100):
        q.append(agent.critic.q1(obs, goal, agent.actor(obs, goal)).mean())
        agent.actor_step(-q[-1])
    assert q[-1] > q[0] + 0.05


def test_learning_rates_and_weight_decay():
    """Adam's first step is the learning rate, whatever the gradient; decay pulls what has none."""
    agent = make_td3(actor_lr=1e-4, critic_lr=1e-3)
    for step, params, rate in (
        (agent.actor_step, agent.actor_params, 1e-4),
        (agent.critic_step, agent.critic_params, 1e-3),
    ):
        before = [p.detach().clone() for p in params]
        step(sum((p * 7.0).sum() for p in params))
        for old, new in zip(before, params):
            assert torch.allclose(old - new, torch.full_like(old, rate), rtol=1e-3)
    for decay, moves in ((0.0, False), (1e-2, True)):
        agent = make_td3(critic_weight_decay=decay)
        before = copies(agent)
        agent.critic_step(sum((p * 0.0).sum() for p in agent.critic_params))
        assert bool(changed(agent, before)) is moves
        before = copies(agent)  # only critics decay
        agent.actor_step(sum((p * 0.0).sum() for p in agent.actor_params))
        assert not changed(agent, before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("network", ["actor", "critic"])
def test_steps_are_those_of_adam(network, transposed):
    """Two steps against the formula. The fused kernel ignores the strides of a transposed gradient."""
    torch.manual_seed(0)
    agent = make_td3(hidden=6)
    obs, goal, action = random_batch(agent)
    params = getattr(agent, f"{network}_params")
    expected = [p.detach().double().clone() for p in params]
    mean, square = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    rate = {"actor": 1e-4, "critic": 1e-3}[network]
    for t in (1, 2):
        if network == "critic":
            loss = agent.critic_loss(torch.randn(16), obs, goal, action)[0]
        else:
            loss = -agent.critic.q1(obs, goal, agent.actor(obs, goal)).mean()
        if transposed:
            loss = sum((p.transpose(0, -1) * torch.randn(p.transpose(0, -1).shape)).sum() for p in params)
        gradients = torch.autograd.grad(loss, params, retain_graph=True)
        assert all(gradient.is_contiguous() for gradient in gradients) is not transposed
        getattr(agent, f"{network}_step")(loss)
        for i, gradient in enumerate(gradients):
            mean[i] = 0.9 * mean[i] + 0.1 * gradient.double()
            square[i] = 0.999 * square[i] + 0.001 * gradient.double() ** 2
            step = (mean[i] / (1 - 0.9**t)) / ((square[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            expected[i] = expected[i] - rate * step
            assert torch.allclose(params[i].detach().double(), expected[i], rtol=0, atol=0.02 * rate)


class Recorder(SimpleNamespace):
    """An agent whose networks are given functions and whose steps only note their losses."""

    def __init__(self, **parts):
        super().__init__(calls=[], losses={}, **parts)

    def critic_step(self, loss):
        self.calls.append("critic")

    def actor_step(self, loss):
        self.calls.append("actor")
        self.losses["actor"] = loss

    def update_target_critic(self):
        self.calls.append("target_critic")

    def update_target_actor(self):
        self.calls.append("target_actor")

    def td_target(self, *inputs):
        self.td_inputs = inputs
        return tensor(-1)

    def critic_loss(self, *inputs):
        self.critic_inputs = inputs
        return torch.tensor(2.0), torch.tensor(3.0)


def recorder_with_linear_q():
    """Actor: its output `action` itself; Q1 = 0.2 a_0 - 0.4 a_1, while Q2 points elsewhere."""
    action, asked = tensor([0.3, -0.2]).requires_grad_(), []
    critic = SimpleNamespace(q1=lambda obs, goal, a: asked.append((obs, goal)) or a @ tensor(0.2, -0.4))
    actor = lambda obs, goal: asked.append((obs, goal)) or action  # noqa: E731
    return Recorder(actor=actor, critic=critic, limit=tensor(10, 10), asked=asked), action


def a_segment():
    """Two steps of a period of three, obs = (x, y)."""
    obs_seq = tensor([[1, 1], [2, 1], [2, 3], [2, 3]])
    return SimpleNamespace(
        obs_seq=obs_seq, action_seq=torch.zeros(1, 3, 2), length=tensor(2), goal=tensor([8, 9]),
        subgoal=tensor([4, 5]), reward=tensor(-11.22), terminated=tensor(0),
    )  # fmt: skip


def test_update_worker():
    worker, action = recorder_with_linear_q()
    batch = SimpleNamespace(
        obs=tensor([1, 2]), subgoal=tensor([3, 4]), action=tensor([5, 6]), reward=tensor(-7),
        next_obs=tensor([8, 9]), next_subgoal=tensor([10, 11]), terminated=tensor(0),
    )  # fmt: skip
    buffer = SimpleNamespace(sample=lambda count: batch if count == 100 else None)
    losses = hiro.update_worker(worker, buffer, hiro.Args(), with_actor=False)
    assert worker.calls == ["critic"]
    expected = [batch.reward, batch.terminated, batch.next_obs, batch.next_subgoal]
    assert all(a is b for a, b in zip(worker.td_inputs, expected, strict=True))
    target, *inputs = worker.critic_inputs
    assert target.item() == -1
    assert all(a is b for a, b in zip(inputs, [batch.obs, batch.subgoal, batch.action], strict=True))
    assert losses == {"worker/critic_loss": 2.0, "worker/q": 3.0}

    worker.calls.clear()
    losses = hiro.update_worker(worker, buffer, hiro.Args(), with_actor=True)
    assert worker.calls[:2] == ["critic", "actor"]
    assert sorted(worker.calls[2:]) == ["target_actor", "target_critic"]
    assert len(worker.asked) == 2  # the actor, then Q1 of what it says
    assert all(obs is batch.obs and subgoal is batch.subgoal for obs, subgoal in worker.asked)
    assert losses["worker/actor_loss"].item() == pytest.approx(-(0.06 + 0.08))
    gradient = torch.autograd.grad(worker.losses["actor"], action)[0]
    assert gradient[0].tolist() == pytest.approx([-0.2, 0.4])  # up Q1's slope when descended


def test_update_manager(monkeypatch):
    """The relabeled subgoal is the critic's action, and nothing else changes."""
    manager, action = recorder_with_linear_q()
    relabeled, seen = tensor([6, 5]), []

    def relabel(*inputs):
        seen.append(inputs)
        return relabeled

    monkeypatch.setattr(hiro, "relabel_subgoals", relabel)
    batch, worker, args = a_segment(), object(), hiro.Args()
    buffer = SimpleNamespace(sample=lambda count: batch if count == 100 else None)
    losses = hiro.update_manager(manager, worker, buffer, args, with_actor=False)
    assert manager.calls == ["critic"]
    assert seen[0][0] is worker and seen[0][1] is batch and seen[0][2] is manager.limit
    reward, terminated, next_obs, goal = manager.td_inputs
    assert reward is batch.reward and terminated is batch.terminated and goal is batch.goal
    assert next_obs.tolist() == [[2, 3]]  # the true end of the short segment
    target, obs, goal, chosen = manager.critic_inputs
    assert target.item() == -1 and obs.tolist() == [[1, 1]] and goal is batch.goal and chosen is relabeled
    assert losses["manager/relabeled_share"] == 1 and losses["manager/relabeled_distance"] == 2

    manager.calls.clear()
    hiro.update_manager(manager, worker, buffer, args, with_actor=True)
    assert manager.calls[:2] == ["critic", "actor"]
    assert sorted(manager.calls[2:]) == ["target_actor", "target_critic"]
    gradient = torch.autograd.grad(manager.losses["actor"], action)[0]
    assert gradient[0].tolist() == pytest.approx([-0.2, 0.4])


@pytest.mark.parametrize("with_actor", [False, True])
def test_updates_keep_to_their_level(with_actor):
    """Real networks on random rows: who moves, and that neither the other level nor the replay does."""
    torch.manual_seed(0)
    args = hiro.Args(hidden=8, batch_size=8, subgoal_space="xy", output_init=0.0, tau=0.25)
    env = ToyEnv()
    manager, worker = hiro.make_agents(env, args, CPU)
    worker_buffer, manager_buffer, _ = hiro.make_buffers(env, args, manager, worker, CPU)
    rng = np.random.default_rng(0)
    for buffer in (worker_buffer, manager_buffer):
        for _ in range(20):
            fields = {name: rng.normal(size=shape) for name, shape in buffer.shapes.items()}
            buffer.add(**fields | {"length": 10, "terminated": 0})
    rows = [buffer.rows[:20].clone() for buffer in (worker_buffer, manager_buffer)]
    moving = {"critic"} | ({"actor", "target_actor", "target_critic"} if with_actor else set())

    before, others = copies(worker), copies(manager)
    hiro.update_worker(worker, worker_buffer, args, with_actor)
    assert changed(worker, before) == moving and not changed(manager, others)
    if with_actor:  # a quarter of the way to where the online critic is now
        triples = zip(before["target_critic"], worker.target_critic_params, worker.critic_params)
        for old, target, online in triples:
            assert torch.allclose(target, 0.75 * old + 0.25 * online, atol=1e-6)

    before, others = copies(manager), copies(worker)
    hiro.update_manager(manager, worker, manager_buffer, args, with_actor)
    assert changed(manager, before) == moving and not changed(worker, others)
    assert torch.equal(rows[0], worker_buffer.rows[:20]) and torch.equal(rows[1], manager_buffer.rows[:20])


def test_update_counts(toy_run, monkeypatch):
    """100 steps of learning: updates of the worker's critic, its actor, the manager's critic, its actor."""
    count = dict.fromkeys(("worker", "worker actor", "manager", "manager actor"), 0)

    def counting(name):
        def update(*inputs):
            count[name] += 1
            count[f"{name} actor"] += inputs[-1]
            return {}

        return update

    monkeypatch.setattr(hiro, "update_worker", counting("worker"))
    monkeypatch.setattr(hiro, "update_manager", counting("manager"))
    toy_run(hiro, 40, ToyEnv(), learning_starts=40)
    assert not any(count.values())
    toy_run(hiro, 140, ToyEnv(), learning_starts=40)
    assert count == {"worker": 100, "worker actor": 50, "manager": 10, "manager actor": 5}
    count.update(dict.fromkeys(count, 0))
    toy_run(
        hiro, 140, ToyEnv(), learning_starts=40, manager_period=5, worker_actor_every=4, manager_actor_every=3
    )
    assert count == {"worker": 100, "worker actor": 25, "manager": 20, "manager actor": 6}


def test_state_of_an_agent():
    """Networks, targets and both optimisers come back."""
    torch.manual_seed(0)
    agent, other = make_td3(), make_td3()
    obs, goal, action = random_batch(agent)

    def train(agent):
        agent.critic_step(agent.critic_loss(torch.ones(16), obs, goal, action)[0])
        agent.actor_step(-agent.critic.q1(obs, goal, agent.actor(obs, goal)).mean())
        agent.update_target_actor(), agent.update_target_critic()

    for _ in range(3):
        train(agent)
    assert changed(other, copies(agent)) == {"actor", "critic", "target_actor", "target_critic"}
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    train(agent), train(other)  # Adam's moments and step counts matter now
    assert not changed(other, copies(agent))


# ---------------------------------------------------------------------------------------------- replay


def test_replay_buffer():
    """Ring of 5: after 7 entries the first two are gone."""
    buffer = hiro.ReplayBuffer(5, CPU, obs=(3,), sequence=(2, 2), reward=())
    assert len(buffer) == 0
    entries = []
    for i in range(7):
        entries.append(
            {"reward": 0.5 * i, "sequence": np.arange(4.0).reshape(2, 2) + i, "obs": np.full(3, 10.0 * i)}
        )
        buffer.add(**entries[-1])
        assert len(buffer) == min(i + 1, 5)
        batch = buffer.sample(64)
        assert (
            batch.obs.shape == (64, 3) and batch.sequence.shape == (64, 2, 2) and batch.reward.shape == (64,)
        )
        assert all(x.dtype == torch.float32 for x in (batch.obs, batch.sequence, batch.reward))
        seen = set()
        for obs, sequence, reward in zip(batch.obs, batch.sequence, batch.reward):
            number = int(2 * reward)  # an entry comes back whole
            assert np.array_equal(obs, entries[number]["obs"])
            assert np.array_equal(sequence, entries[number]["sequence"])
            seen.add(number)
        assert seen <= set(range(max(0, i - 4), i + 1))  # no row that is empty or overwritten
    assert buffer.added == 7


def test_replay_samples_all_rows_alike():
    torch.manual_seed(0)
    buffer = hiro.ReplayBuffer(1000, CPU, x=())
    buffer.rows.zero_()
    for i in range(10):
        buffer.add(x=i + 1)
    counts = torch.bincount(buffer.sample(50_000).x.long(), minlength=11)
    assert counts[0] == 0  # no row that was never filled
    assert (counts[1:] > 4700).all() and (counts[1:] < 5300).all()


def test_a_replay_of_more_rows_than_float32_counts(monkeypatch):
    """The largest draw gives the last row, neither one before it nor one beyond."""
    buffer, seen = hiro.ReplayBuffer(1, CPU, x=()), []
    buffer.size.fill_(2**24 + 3)

    def index_select(dim, index):
        seen.append(index)
        return torch.zeros(len(index), 1)

    def largest(count, device, dtype=torch.float32):
        return torch.full((count,), 1 - torch.finfo(dtype).eps / 2, dtype=dtype)

    buffer.rows = SimpleNamespace(device=CPU, index_select=index_select)
    monkeypatch.setattr(torch, "rand", largest)
    buffer.sample(1)
    assert seen[0].tolist() == [2**24 + 2]


def test_replay_does_not_keep_the_callers_array():
    buffer, obs = hiro.ReplayBuffer(3, CPU, obs=(2,)), np.ones(2, np.float32)
    buffer.add(obs=obs)
    obs[:] = 5
    assert buffer.sample(1).obs.tolist() == [[1, 1]]


@pytest.mark.parametrize("entries", [3, 5, 12])
def test_state_of_a_replay_buffer(entries):
    buffer, other = (hiro.ReplayBuffer(5, CPU, x=(), y=(2,)) for _ in range(2))
    for i in range(entries):
        buffer.add(x=i, y=[i, -i])
    other.load_state_dict(buffer.state_dict())
    for b in (buffer, other):
        b.add(x=100, y=[1, 2])  # goes to the same row
    filled = min(entries + 1, 5)
    assert len(buffer) == len(other) == filled == buffer.size == other.size
    assert torch.equal(buffer.rows[:filled], other.rows[:filled]) and buffer.added == other.added


def test_replay_with_an_empty_field():
    """AntGather has no goal."""
    buffer = hiro.ReplayBuffer(5, CPU, obs=(2,), goal=(0,), reward=())
    buffer.add(obs=[1, 2], goal=np.zeros(0), reward=3)
    batch = buffer.sample(4)
    assert batch.goal.shape == (4, 0) and batch.reward.tolist() == [3] * 4


# ---------------------------------------------------------------------------------------------- numbers


def test_a_loss_that_is_not_finite_stops(tmp_path):
    losses = {"a": torch.tensor(1.5), "b": torch.tensor(float("nan")), "c": torch.tensor(float("-inf"))}
    assert hiro.check_finite({"a": losses["a"]}, 7, tmp_path) == {"a": 1.5}
    with pytest.raises(SystemExit, match="b, c is not finite at step 7"):
        hiro.check_finite(losses, 7, tmp_path)


def test_defaults_are_the_papers():
    """Section 0 of the specification: 300 units, rates, batch, buffers, noise, candidates, 10M steps."""
    args = dataclasses.asdict(hiro.Args())
    expected = dict(
        manager_period=10, subgoal_space="full", mask_xy=True, manager_reward_scale=0.1,
        relabeling="off_policy", candidates=10, candidate_noise=0.5, fun_noise=0.1,
        hidden=300, output_init=0.003, actor_lr=1e-4, critic_lr=1e-3, critic_weight_decay=0.0, tau=0.005,
        batch_size=100, learning_starts=2500, worker_actor_every=2, manager_actor_every=2,
        worker_gamma=0.99, worker_noise=1.0, worker_target_noise=0.2, worker_target_noise_clip=0.5,
        manager_gamma=0.99, manager_noise=1.0, manager_target_noise=0.2, manager_target_noise_clip=0.5,
        worker_buffer=200_000, manager_buffer=200_000, total_steps=10_000_000,
    )  # fmt: skip
    assert {name: args[name] for name in expected} == expected
