"""Landmark loss, gradient penalty, planning loss, and what each update may touch."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import aclg_gcmr as gcmr
import hiro

torch.set_num_threads(1)
F64 = dict(dtype=torch.float64)


def make_args(**settings):
    return gcmr.Args(**{"hidden": 16, "dynamics_hidden": 16, "batch_size": 16, **settings})


def make_worker(obs_dim=6, limit=(3.0, 3.0, 3.0), seed=0, **settings):
    torch.manual_seed(seed)
    scale = torch.ones(obs_dim + 2 + len(limit))
    scale[:2] = 0
    return gcmr.TD3(scale, torch.tensor(limit), 0.95, (1.0, 0.2, 0.5), make_args(**settings))


def make_manager(obs_dim=6, seed=1, **settings):
    torch.manual_seed(seed)
    scale = torch.ones(obs_dim + 4)
    return gcmr.TD3(scale, torch.tensor([10.0, 10.0]), 0.99, (1.0, 0.2, 0.5), make_args(**settings))


def make_dynamics(obs_dim=6, action_dim=3, seed=2):
    """A fitted, "trained" ensemble with clear effects of the action."""
    torch.manual_seed(seed)
    dynamics = gcmr.DynamicsEnsemble(obs_dim, action_dim, make_args())
    dynamics.widen_box(torch.randn(50, obs_dim) * 3)
    dynamics.fit_statistics(
        torch.randn(50, obs_dim) * 3, torch.randn(50, action_dim), torch.randn(50, obs_dim)
    )
    dynamics.trained_at = 1
    return dynamics


def numbers(result):
    """What gradient_penalty returns: penalty, bound k, mean norm of the critics' gradients, L_r."""
    penalty, log = result
    names = ("worker/gradient_bound", "worker/gradient_norm", "worker/reward_slope")
    return [penalty.item(), *(log[name].item() for name in names)]


def values(*parts):
    """A copy of every parameter of networks and TD3 learners."""
    result = []
    for part in parts:
        nets = (
            (part.actor, part.target_actor, part.critic, part.target_critic)
            if isinstance(part, gcmr.TD3)
            else (part,)
        )
        result += [p.detach().clone() for net in nets for p in net.parameters()]
    return result


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


# ------------------------------------------------------------------------------------------ landmark loss: G9

ACHIEVED = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
SUBGOAL = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
TARGET = torch.tensor([[2.2, 2.6], [2.0, 2.0], [1.2, 1.6]])


def test_landmark_loss_g9():
    subgoal, target = SUBGOAL.clone().requires_grad_(), TARGET.clone()
    loss = gcmr.landmark_loss(None, ACHIEVED, subgoal, target, make_args())
    assert loss.item() == pytest.approx(0.7666667, abs=1e-6)
    assert 2 * loss.item() == pytest.approx(1.5333333, abs=1e-6)  # the paper's squared norm
    loss.backward()
    expected = [[0.2666667, -0.5333333], [0.3333333, 0.0], [-0.0666667, -0.2]]
    torch.testing.assert_close(subgoal.grad, torch.tensor(expected), rtol=0, atol=1e-6)
    before_planner = gcmr.landmark_loss(None, ACHIEVED, SUBGOAL, ACHIEVED, make_args())
    assert before_planner.item() == pytest.approx(1.1666667, abs=1e-6)


def test_landmark_loss_in_the_embedding():
    """HIGL's: with psi(z) = z / 4 as in G3, distances 1.25 and 0.25 between landmark and target."""
    adjacency = SimpleNamespace(embed=lambda z: z / 4)
    achieved, args = torch.tensor([[2.0, 2.0], [5.0, 5.0]]), make_args(landmark_space="adjacency")
    subgoal = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    loss = gcmr.landmark_loss(adjacency, achieved, subgoal, achieved, args)
    assert loss.item() == pytest.approx(0.075)  # p = achieved: HRAC's term
    loss.backward()
    torch.testing.assert_close(subgoal.grad, torch.tensor([[0.075, 0.1], [0.0, 0.0]]))
    reached = (achieved + subgoal).detach()
    assert gcmr.landmark_loss(adjacency, achieved, subgoal, reached, args).item() == 0


# -------------------------------------------------------------------------------------- gradient penalty: G14


def g14_slope(critic, obs, subgoal, action):
    """Of Q1 = -(x^2 + y^2 / 2) + x and Q2 = -(x^2 + y^2) / 2 + 2 y, by hand."""
    x, y = action[:, 0], action[:, 1]
    return torch.stack([torch.stack([1 - 2 * x, -y], -1), torch.stack([-x, 2 - y], -1)])


@pytest.fixture
def g14_worker(monkeypatch):
    monkeypatch.setattr(gcmr, "action_slope", g14_slope)
    return SimpleNamespace(critic=None, gamma=0.95, limit=torch.ones(2, **F64))


def g14_dynamics(scale=1.0):
    slope = torch.tensor([0.01, 0.02], **F64) * scale
    return SimpleNamespace(sample_delta=lambda obs, action: torch.cat([action * slope, action], -1))


G14_ACTION = torch.tensor([[0.5, -1.0], [-1.0, 0.5]], **F64)
G14_SUBGOAL = torch.tensor([[1.0, 0.0], [0.0, -0.5]], **F64)


@pytest.mark.parametrize(
    "form, model, bound, penalty",
    [
        ("paper", 1.0, 0.5656039, 6.9891206),
        ("released", 1.0, 0.2828019, 9.0221064),
        ("paper", 0.0, 0.0, 11.375),
    ],
)
def test_penalty_g14(g14_worker, form, model, bound, penalty):
    result = gcmr.penalty_at(
        g14_worker, g14_dynamics(model), torch.zeros(2, 4, **F64), G14_SUBGOAL, G14_ACTION.clone(),
        make_args(gradient_penalty_form=form),
    )  # fmt: skip
    norm = (1 + 3.0413813 + 3.0413813 + 1.8027756) / 4
    assert numbers(result) == pytest.approx([penalty, bound, norm, 0.0199971 * model], abs=1e-6)


def test_the_bound_of_another_discount(g14_worker):
    """1 / (1 - 0.8) is a quarter of 1 / (1 - 0.95)."""
    g14_worker.gamma = 0.8
    result = gcmr.penalty_at(
        g14_worker, g14_dynamics(), torch.zeros(2, 4, **F64), G14_SUBGOAL, G14_ACTION.clone(), make_args()
    )
    assert numbers(result)[1] == pytest.approx(0.5656039 / 4, abs=1e-6)


def test_a_large_bound_leaves_no_penalty(g14_worker):
    result = gcmr.penalty_at(
        g14_worker,
        g14_dynamics(100.0),
        torch.zeros(2, 4, **F64),
        G14_SUBGOAL,
        G14_ACTION.clone(),
        make_args(),
    )
    assert numbers(result)[0] == 0 and numbers(result)[1] > 3.05


def smooth_dynamics():
    """A model without noise: the change of x and y is bent in the action."""
    torch.manual_seed(3)
    weight = torch.randn(3, 6, **F64) * 0.001
    return SimpleNamespace(sample_delta=lambda obs, action: torch.sin(action @ weight) + 0.0001 * obs)


def naive_penalty(worker, dynamics, obs, subgoal, action, eps=1e-6):
    """One row and one coordinate at a time, by central differences."""
    reward_slopes, norms = [], []
    with torch.no_grad():
        for o, g, a in zip(obs, subgoal, action):
            reward_slope, slope = np.zeros(3), np.zeros((2, 3))
            for d in range(3):
                ends = []
                for sign in (1, -1):
                    moved = a.clone()
                    moved[d] += sign * eps
                    change = dynamics.sample_delta(o[None], moved[None])[0, :2]
                    ends.append(
                        (
                            (change - g).norm().item(),
                            worker.critic(o[None], g[None], moved[None])[:, 0].numpy(),
                        )
                    )
                reward_slope[d] = (ends[0][0] - ends[1][0]) / (2 * eps)
                slope[:, d] = (ends[0][1] - ends[1][1]) / (2 * eps)
            reward_slopes.append(np.linalg.norm(reward_slope))
            norms.append(np.linalg.norm(slope, axis=1))
    bound = np.sqrt(3) * max(reward_slopes) / (1 - 0.95)
    return np.mean([(np.maximum(n - bound, 0) ** 2).sum() for n in norms]), bound, np.mean(norms)


def double_worker():
    worker = make_worker()
    for net in (worker.actor, worker.critic):
        net.double()
    worker.limit = worker.limit.double()
    with torch.no_grad():
        for layer in worker.critic.layers:
            layer.weight *= 1.5
    return worker


def penalty_inputs(rows=9):
    torch.manual_seed(5)
    return torch.randn(rows, 6, **F64), torch.randn(rows, 2, **F64), torch.randn(rows, 3, **F64)


def test_penalty_equals_finite_differences():
    worker, dynamics, inputs = double_worker(), smooth_dynamics(), penalty_inputs()
    penalty, bound, norm, _ = numbers(gcmr.penalty_at(worker, dynamics, *inputs, make_args()))
    expected = naive_penalty(worker, dynamics, *inputs)
    assert bound == pytest.approx(expected[1], rel=1e-4)
    assert norm == pytest.approx(expected[2], rel=1e-4)
    assert penalty == pytest.approx(expected[0], rel=1e-3)
    assert 0.02 < bound < norm and penalty > 1e-4  # the hinge is inside the range of the gradients


def test_second_order_gradient_reaches_the_critics():
    worker, dynamics, inputs = double_worker(), smooth_dynamics(), penalty_inputs()

    def penalty():
        return gcmr.penalty_at(worker, dynamics, *(x.clone() for x in inputs), make_args())[0]

    grads = torch.autograd.grad(penalty(), worker.critic_params, allow_unused=True)
    checked = 0
    for parameter, grad in zip(worker.critic_params, grads):
        if parameter.ndim < 3:
            continue
        for critic in range(2):
            index = divmod(int(grad[critic].abs().argmax()), grad.shape[2])
            value, ends = parameter.data[critic][index].item(), []
            for sign in (1, -1):
                parameter.data[critic][index] = value + sign * 1e-6
                ends.append(penalty().item())
            parameter.data[critic][index] = value
            numeric = (ends[0] - ends[1]) / 2e-6
            assert abs(numeric) > 1e-4
            assert grad[critic][index].item() == pytest.approx(numeric, rel=1e-3)
            checked += 1
    assert checked == 6  # weights of three layers of both critics


def test_slope_by_hand_is_the_slope_of_autograd():
    """Same slopes, and same gradients of a function of them, as by differentiating twice."""
    critic = double_worker().critic
    critic.input_scale.copy_(torch.rand_like(critic.input_scale) + 0.1)  # as with scale_worker_inputs
    obs, subgoal, action = penalty_inputs()
    by_hand = gcmr.action_slope(critic, obs, subgoal, action)
    twin = action.expand(2, *action.shape).clone().requires_grad_()
    q = critic(obs.expand(2, *obs.shape), subgoal.expand(2, *subgoal.shape), twin)
    twice = torch.autograd.grad(q.sum(), twin, create_graph=True)[0]
    torch.testing.assert_close(by_hand, twice)
    weights = [layer.weight for layer in critic.layers]
    once, twice = (torch.autograd.grad(slope.pow(3).sum(), weights) for slope in (by_hand, twice))
    torch.testing.assert_close(once, twice)


def test_penalty_leaves_actor_and_model_alone():
    worker, dynamics = make_worker(), make_dynamics()
    before = values(worker, dynamics)
    args = make_args(gradient_penalty_form="released")
    penalty, log = gcmr.gradient_penalty(worker, dynamics, torch.randn(8, 6), torch.randn(8, 2), args)
    assert penalty.item() > 0 and not log["worker/gradient_bound"].requires_grad  # k is a constant
    others = worker.actor_params + list(dynamics.parameters())
    assert all(g is None for g in torch.autograd.grad(penalty, others, allow_unused=True, retain_graph=True))
    penalty.backward()
    assert all(p.grad is None for p in others)
    assert same(before, values(worker, dynamics))


def test_actions_of_the_paper_s_form():
    worker, seen = make_worker(), []
    dynamics = SimpleNamespace(sample_delta=lambda o, a: seen.append((o, a)) or a * 0.1)
    obs, subgoal = torch.randn(8, 6), torch.randn(8, 2)
    _, bound, _, _ = numbers(gcmr.gradient_penalty(worker, dynamics, obs, subgoal, make_args()))
    torch.testing.assert_close(seen[0][1].detach(), worker.actor(obs, subgoal).detach())
    assert torch.equal(seen[0][0], obs) and seen[0][1].is_leaf
    # |grad_a |0.1 a - g|| is 0.1 where the first two entries of a are concerned
    assert bound == pytest.approx(0.1 * 3**0.5 / 0.05, rel=1e-4)


def test_actions_of_the_released_form(monkeypatch):
    worker, seen = make_worker(), []
    dynamics = SimpleNamespace(sample_delta=lambda o, a: seen.append((o, a)) or a * 0.1)
    obs, subgoal = torch.randn(128, 6), torch.randn(128, 2)
    slope, pairs = gcmr.action_slope, []
    monkeypatch.setattr(gcmr, "action_slope", lambda c, o, g, a: pairs.append((o, g)) or slope(c, o, g, a))
    torch.manual_seed(0)
    args = make_args(gradient_penalty_form="released")
    _, bound, _, _ = numbers(gcmr.gradient_penalty(worker, dynamics, obs, subgoal, args))
    action = seen[0][1].detach()
    assert action.shape == (2048, 3)
    assert action.min() >= -1 and action.max() <= 1
    assert action.mean().abs() < 0.05 and action.std().item() == pytest.approx(1 / 3**0.5, rel=0.03)
    assert bound == pytest.approx(0.1 * 3**0.5 / 0.05 / 2048, rel=1e-4)
    rows = torch.cat([*pairs[0]], 1)
    for b in (0, 77, 127):  # each row with its own subgoal, 16 times
        assert (rows == torch.cat([obs[b], subgoal[b]])).all(1).sum() == 16


def test_penalty_ignores_the_position_but_the_model_sees_it():
    """The critics' part does not change with entries 0, 1 of obs; the bound, from the model, does."""
    worker, dynamics = make_worker(), make_dynamics()
    obs, subgoal, action = torch.randn(8, 6), torch.randn(8, 2), torch.randn(8, 3)
    moved = obs.clone()
    moved[:, :2] += 2
    results = []
    for o in (obs, moved):
        torch.manual_seed(0)
        results.append(numbers(gcmr.penalty_at(worker, dynamics, o, subgoal, action.clone(), make_args())))
    assert results[0][2] == results[1][2]
    assert results[0][1] != results[1][1]


# ---------------------------------------------------------------------------------------- planning loss: G15


def g15(box=None):
    action = torch.tensor([[0.5, -0.5]], requires_grad=True, **F64)

    def predict_next(obs, action):
        after = obs + 0.2 * action
        return after if box is None else torch.cat([after[:, :1].clamp(max=box), after[:, 1:]], 1)

    def critic(obs, goal, subgoal):
        far, long = (obs - goal).square().sum(-1), subgoal.square().sum(-1)
        return torch.stack([-far / 2 - 0.05 * long, -0.4 * far - 0.2 * long])

    manager = SimpleNamespace(
        actor=lambda obs, goal: (goal - obs) / 2, critic=critic, limit=torch.full((2,), 10.0, **F64)
    )

    def act(obs, subgoal):
        assert obs.tolist() == [[1, 1]] and subgoal.tolist() == [[2, 0]]
        return action

    worker = SimpleNamespace(actor=act)
    loss = gcmr.planning_value_loss(
        manager, worker, SimpleNamespace(predict_next=predict_next), torch.ones(1, 2, **F64),
        torch.tensor([[4.0, 2.0]], **F64), torch.tensor([[2.0, 0.0]], **F64),
        torch.tensor([[0.3, -0.1]], **F64),
    )  # fmt: skip
    return loss.item(), torch.autograd.grad(loss, action)[0][0].tolist()


def test_planning_loss_g15():
    loss, grad = g15()
    assert loss == pytest.approx(4.982125, abs=1e-9)
    assert grad == pytest.approx([-0.60775, -0.22325], abs=1e-9)


def test_planning_loss_in_the_box_g15():
    loss, grad = g15(box=1.05)
    assert loss == pytest.approx(5.1353906, abs=1e-7)
    assert grad == pytest.approx([0, -0.22325], abs=1e-9)  # nothing through a clamped coordinate


def test_the_new_subgoal_is_clipped_and_the_moved_one_is_not():
    seen = []
    manager = SimpleNamespace(
        actor=lambda obs, goal: goal * 0 + 9.8,
        critic=lambda obs, goal, subgoal: seen.append(subgoal) or obs[:, 0].expand(2, -1),
        limit=torch.tensor([10.0, 10.0]),
    )
    worker = SimpleNamespace(actor=lambda obs, subgoal: subgoal)
    dynamics = SimpleNamespace(predict_next=lambda obs, action: obs - 5)
    gcmr.planning_value_loss(
        manager, worker, dynamics, torch.zeros(1, 4), torch.zeros(1, 2), torch.tensor([[9.0, -9.0]]),
        torch.tensor([[0.5, -0.5]]),
    )  # fmt: skip
    assert seen[0].tolist() == [[14.0, -4.0]]
    torch.testing.assert_close(seen[1], torch.tensor([[10.0, 9.3]]))


@pytest.mark.parametrize("goals, subgoals", [(2, 5), (10, 10), (1, 1)])
def test_rows_of_the_planning_loss(monkeypatch, goals, subgoals):
    seen = {}
    monkeypatch.setattr(
        gcmr, "planning_value_loss",
        lambda manager, worker, dynamics, obs, goal, subgoal, noise: seen.update(
            obs=obs, goal=goal, subgoal=subgoal, noise=noise
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    batch = 128
    manager = SimpleNamespace(
        actor=lambda obs, goal: torch.stack([obs[:, 0] * 0 + 4, goal[:, 0] * 0 - 1], 1),
        limit=torch.tensor([10.0, 2.0]), target_noise=0.2, target_noise_clip=0.5,
    )  # fmt: skip
    obs, goal = (
        torch.arange(float(batch))[:, None].expand(-1, 6),
        torch.arange(float(batch))[:, None].expand(-1, 2),
    )
    args = make_args(rollout_planning_goals=goals, rollout_planning_subgoals=subgoals, candidate_noise=0.01)
    gcmr.rollout_planning_loss(manager, None, None, obs, goal, args)
    rows = batch * goals * subgoals
    assert all(len(x) == rows for x in seen.values())
    owner, met = seen["obs"][:, 0].view(batch, -1), seen["goal"][:, 0].view(batch, goals, subgoals)
    assert torch.equal(owner, torch.arange(float(batch))[:, None].expand_as(owner))
    assert (met == met[..., :1]).all()  # the same goal for `subgoals` rows in a row
    counts = seen["goal"][:, 0].long().bincount(minlength=batch)
    assert (counts == goals * subgoals).all()  # every goal equally often
    distinct = [len(set(row[:, 0].tolist())) for row in met]
    assert np.mean(distinct) > 0.9 * goals and max(distinct) == goals
    assert (met[:, 0, 0] == torch.arange(float(batch))).float().mean() < 0.1  # shuffled
    # subgoals: normal around the manager's, std half the half-range, clipped; each row its own
    assert len(seen["subgoal"][:, 0].unique()) > 0.5 * rows
    if rows > 1000:
        reference = np.random.default_rng(0).normal([4, -1], [5, 1], (200_000, 2)).clip([-10, -2], [10, 2])
        np.testing.assert_allclose(seen["subgoal"].mean(0), reference.mean(0), atol=0.5)
        np.testing.assert_allclose(seen["subgoal"].std(0), reference.std(0), rtol=0.1)
        assert seen["noise"].std().item() == pytest.approx(0.2, rel=0.1)
        assert 0.4 < seen["noise"].abs().max() <= 0.5
    assert (seen["subgoal"].abs() <= manager.limit).all()
    assert not seen["subgoal"].requires_grad and not seen["noise"].requires_grad


def test_planning_reaches_the_worker_s_actor_only():
    worker, manager, dynamics = make_worker(), make_manager(), make_dynamics()
    obs, goal = torch.randn(12, 6), torch.randn(12, 2)
    others = [*manager.actor_params, *manager.critic_params, *worker.critic_params, *dynamics.parameters()]
    before = values(worker, manager, dynamics)
    loss = gcmr.rollout_planning_loss(manager, worker, dynamics, obs, goal, make_args())
    worker.actor_step(loss)
    after = values(worker, manager, dynamics)
    moved = [not torch.equal(a, b) for a, b in zip(before, after)]
    assert moved == [True] * 6 + [False] * (len(moved) - 6)
    assert all(p.grad is None for p in others)


def test_planning_lowers_its_loss():
    """Steps on it make the manager's value of where the worker goes rise."""
    worker, manager = make_worker(actor_lr=1e-2), make_manager()
    dynamics = SimpleNamespace(predict_next=lambda obs, action: obs + torch.cat([action, action], -1))
    obs, goal = torch.randn(64, 6), torch.randn(64, 2)

    def loss():
        torch.manual_seed(0)
        return gcmr.rollout_planning_loss(manager, worker, dynamics, obs, goal, make_args())

    before = loss().item()
    for _ in range(20):
        worker.actor_step(loss())
    assert loss().item() < before - 0.05


# ------------------------------------------------------------------------------------------- whole updates


def make_buffers(rows=60):
    rng = np.random.default_rng(0)
    worker = gcmr.ReplayBuffer(
        rows,
        "cpu",
        obs=(6,),
        subgoal=(2,),
        action=(3,),
        reward=(),
        next_obs=(6,),
        next_subgoal=(2,),
        terminated=(),
    )
    manager = gcmr.ReplayBuffer(
        rows,
        "cpu",
        obs_seq=(11, 6),
        action_seq=(10, 3),
        length=(),
        goal=(2,),
        subgoal=(2,),
        reward=(),
        terminated=(),
    )
    for buffer in (worker, manager):
        for _ in range(rows):
            row = {name: rng.normal(size=shape) for name, shape in buffer.shapes.items()}
            row["terminated"] = float(rng.random() < 0.5)
            buffer.add(**row | ({"length": 10} if "length" in buffer.shapes else {}))
    return worker, manager


def one_worker_update(with_actor=True, with_penalty=False, with_planning=False, **settings):
    """One update from the same start; returns the learner, the other parts and the logged losses."""
    worker, manager, dynamics = make_worker(), make_manager(), make_dynamics()
    buffers, args = make_buffers(), make_args(gradient_penalty_form="released", **settings)
    torch.manual_seed(9)
    losses = gcmr.update_worker(
        worker, manager, dynamics, *buffers, args,
        with_actor=with_actor, with_penalty=with_penalty, with_planning=with_planning,
    )  # fmt: skip
    return worker, values(manager, dynamics) + [b.rows for b in buffers], losses


@pytest.mark.parametrize("with_actor", [False, True])
def test_plain_worker_update_is_hiro_s(with_actor):
    """Whose inputs are tested by themselves; but here the critics' targets follow at every update."""
    ends = []
    for module in (gcmr, hiro):
        worker, (rows, segments), args = make_worker(actor_lr=1e-2), make_buffers(), make_args()
        torch.manual_seed(9)
        for _ in range(6):
            if module is gcmr:
                gcmr.update_worker(
                    worker, None, None, rows, segments, args,
                    with_actor=with_actor, with_penalty=False, with_planning=False,
                )  # fmt: skip
            else:
                hiro.update_worker(worker, rows, args, with_actor)
                if not with_actor:
                    worker.update_target_critic()
        ends.append(values(worker))
    assert same(*ends) and not same(ends[0], values(make_worker(actor_lr=1e-2)))


def test_plain_manager_update_is_hiro_s(monkeypatch):
    ends = []
    for module in (gcmr, hiro):
        manager, (rows, segments) = make_manager(actor_lr=1e-2), make_buffers()
        args = make_args(adjacency_weight=0.0, landmark_weight=0.0)
        monkeypatch.setattr(
            module, "relabel_subgoals", lambda *inputs: inputs[-3].subgoal + torch.tensor([3.0, 4.0])
        )
        torch.manual_seed(9)
        for _ in range(6):
            if module is gcmr:
                parts = (manager, None, None, None, None, None)
                gcmr.update_manager(*parts, segments, rows, args, False, False, False)
            else:
                hiro.update_manager(manager, None, segments, args, True)
        ends.append(values(manager))
    assert same(*ends) and not same(ends[0], values(make_manager(actor_lr=1e-2)))


def gradients_of(monkeypatch, step, params):
    """The gradient of the last of those parameters in each call of that step, which does nothing else."""
    seen = []
    monkeypatch.setattr(
        gcmr.TD3, step, lambda self, loss: seen.append(torch.autograd.grad(loss, getattr(self, params))[-1])
    )
    return seen


def test_planning_enters_the_actor_s_loss_with_its_weight(monkeypatch):
    """A known term 3 x (sum of the output's biases), asked for at starts of segments and their goals."""
    grads, asked = gradients_of(monkeypatch, "actor_step", "actor_params"), []

    def plan(manager, worker, dynamics, obs, goal, args):
        asked.append(torch.cat([obs, goal], 1))
        return 3 * worker.actor_params[-1].sum()

    monkeypatch.setattr(gcmr, "rollout_planning_loss", plan)
    for weight in (0.0, 1.0, 10.0):
        one_worker_update(with_planning=True, rollout_planning_weight=weight)
    torch.testing.assert_close(grads[1] - grads[0], torch.full_like(grads[0], 3.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[2] - grads[0], torch.full_like(grads[0], 30.0), rtol=1e-4, atol=1e-4)
    segments = make_buffers()[1]
    segments = segments.unpack(segments.rows)
    starts = torch.cat([segments.obs_seq[:, 0], segments.goal], 1)
    assert all((row == starts).all(1).any() for row in asked[0]) and len(asked[0]) == 16


@pytest.mark.parametrize("term", ["adjacency", "landmark"])
def test_terms_enter_the_manager_s_loss_with_their_weights(monkeypatch, term):
    """Known terms, the sum of all subgoals: descending them must lower the subgoals."""
    grads = gradients_of(monkeypatch, "actor_step", "actor_params")
    monkeypatch.setattr(gcmr, "adjacency_loss", lambda network, here, subgoal, *_: subgoal.sum())
    monkeypatch.setattr(gcmr, "landmark_loss", lambda network, here, subgoal, *_: subgoal.sum())
    for weight in (0.0, 1.0, 20.0):
        weights = {"adjacency_weight": 0.0, "landmark_weight": 0.0, f"{term}_weight": weight}
        one_manager_update(term == "landmark", **weights)
    assert (grads[1] - grads[0] > 1).all()
    torch.testing.assert_close(grads[2] - grads[0], 20 * (grads[1] - grads[0]), rtol=1e-3, atol=1e-3)


def test_worker_update_touches_only_the_worker():
    before = values(make_manager(), make_dynamics()) + [b.rows for b in make_buffers()]
    start = make_worker()
    for flags in (
        {},
        {"with_penalty": True},
        {"with_planning": True},
        {"with_penalty": True, "with_planning": True},
    ):
        worker, others, losses = one_worker_update(**flags)
        assert same(before, others)
        for net in ("actor", "critic", "target_actor", "target_critic"):
            assert not same(values(getattr(worker, net)), values(getattr(start, net)))
        assert all(not loss.requires_grad and torch.isfinite(loss).all() for loss in losses.values())
        assert ("worker/gradient_penalty" in losses) is ("with_penalty" in flags)
        assert ("worker/planning_loss" in losses) is ("with_planning" in flags)


def first_adam_step(start, grad, lr, weight_decay=0.0):
    """Where Adam's first step leads, by hand: both moments are the gradient's."""
    grad = grad + weight_decay * start
    return start - lr * grad / (grad.abs() + 1e-8)


@pytest.mark.parametrize(
    "flags",
    [{}, {"with_penalty": True}, {"with_planning": True}, {"with_penalty": True, "with_planning": True}],
)
def test_every_weight_moves_against_its_own_gradient(monkeypatch, flags):
    """Fused Adam reads gradients in the order of memory: theirs must be that of the weights.

    After a double backward pass the critics' gradients come transposed.
    """
    seen, adam_step = [], gcmr.adam_step

    def spy(optimizer, params, loss):
        start = [p.detach().clone() for p in params]
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        adam_step(optimizer, params, loss)
        seen.append((optimizer.param_groups[0], start, grads, params))

    monkeypatch.setattr(gcmr, "adam_step", spy)
    one_worker_update(**flags, gradient_penalty_weight=100.0)
    one_manager_update(True)
    assert len(seen) == 4
    for group, start, grads, params in seen:
        for s, g, p in zip(start, grads, params):
            expected = first_adam_step(s, g, group["lr"], group["weight_decay"])
            sure = (g + group["weight_decay"] * s).abs() > 1e-5  # the rest is rounding
            torch.testing.assert_close(p.detach()[sure], expected[sure], rtol=1e-4, atol=1e-6)


def test_critic_only_updates_leave_the_actor():
    worker, _, losses = one_worker_update(with_actor=False)
    start = make_worker()
    assert same(values(worker.actor, worker.target_actor), values(start.actor, start.target_actor))
    assert "worker/actor_loss" not in losses


def test_terms_of_weight_zero_change_nothing_in_the_worker():
    plain, _, _ = one_worker_update()
    zero, _, _ = one_worker_update(
        with_penalty=True, with_planning=True, gradient_penalty_weight=0.0, rollout_planning_weight=0.0
    )
    assert same(values(plain), values(zero))
    penalised, _, _ = one_worker_update(with_penalty=True, gradient_penalty_weight=1e6)
    assert not same(values(plain.critic), values(penalised.critic))
    planned, _, _ = one_worker_update(with_planning=True, rollout_planning_weight=1e6)
    assert same(values(plain.critic), values(planned.critic))  # only the actor is stepped
    assert not same(values(plain.actor), values(planned.actor))


def test_penalty_enters_the_critic_s_loss_with_its_weight(monkeypatch):
    """A known penalty 3 x (sum of one bias): its gradient is the weight times 3 on top of the TD loss's."""
    grads = []
    monkeypatch.setattr(gcmr.TD3, "critic_step", lambda self, loss: grads.append(
        torch.autograd.grad(loss, self.critic_params)[-1]
    ))  # fmt: skip
    learned, punished, critic_loss = [], [], gcmr.TD3.critic_loss

    def noted_critic_loss(self, td_target, obs, subgoal, action):
        learned.append((obs, subgoal))
        return critic_loss(self, td_target, obs, subgoal, action)

    def penalty(worker, dynamics, obs, subgoal, args):
        punished.append((obs, subgoal))
        return 3 * worker.critic_params[-1].sum(), {"log": torch.zeros(())}

    monkeypatch.setattr(gcmr.TD3, "critic_loss", noted_critic_loss)
    monkeypatch.setattr(gcmr, "gradient_penalty", penalty)
    for weight in (0.0, 1.0, 10.0):
        one_worker_update(with_actor=False, with_penalty=True, gradient_penalty_weight=weight)
    torch.testing.assert_close(grads[1] - grads[0], torch.full_like(grads[0], 3.0))
    torch.testing.assert_close(grads[2] - grads[0], torch.full_like(grads[0], 30.0), rtol=1e-4, atol=1e-4)
    for td_rows, penalty_rows in zip(learned, punished, strict=True):  # the same rows
        assert all(a is b for a, b in zip(td_rows, penalty_rows, strict=True))


def one_manager_update(
    with_planner=False,
    adjacency="default",
    novelty="default",
    with_model=True,
    with_new_graph=None,
    **settings,
):
    worker, manager, dynamics = make_worker(), make_manager(), make_dynamics()
    args = make_args(coverage_pool=40, coverage_landmarks=8, **settings)
    with_new_graph = with_planner if with_new_graph is None else with_new_graph
    torch.manual_seed(4)
    if adjacency == "default":
        adjacency = gcmr.Adjacency(2, args)
    if novelty == "default":
        novelty = gcmr.Novelty(6, 2, args)
        novelty.visit(torch.randn(20, 6), args)
    worker_buffer, manager_buffer = make_buffers()
    others = [part for part in (worker, dynamics, adjacency, novelty) if part is not None]
    before = values(*others) + [worker_buffer.rows.clone(), manager_buffer.rows.clone()]
    torch.manual_seed(9)
    losses = gcmr.update_manager(
        manager, worker, dynamics, adjacency, novelty, gcmr.LandmarkGraph(6, args),
        manager_buffer, worker_buffer, args, with_model, with_planner, with_new_graph,
    )  # fmt: skip
    assert same(before, values(*others) + [worker_buffer.rows, manager_buffer.rows])
    return manager, losses


def test_flags_of_the_manager_s_update(monkeypatch):
    """The model scores candidates only with with_model; a graph is made only with with_new_graph."""
    models, renewed, relabel = [], [], gcmr.relabel_subgoals
    monkeypatch.setattr(
        gcmr, "relabel_subgoals", lambda w, d, *rest: models.append(d) or relabel(w, d, *rest)
    )
    monkeypatch.setattr(gcmr.LandmarkGraph, "renew", lambda self, *inputs: renewed.append(inputs))
    for with_model in (True, False):
        one_manager_update(with_model=with_model)
    assert isinstance(models[0], gcmr.DynamicsEnsemble) and models[1] is None and not renewed
    one_manager_update(True, with_new_graph=False)
    assert not renewed
    one_manager_update(True, with_new_graph=True)
    assert len(renewed) == 1


def test_manager_update_touches_only_the_manager():
    start = make_manager()
    for with_planner in (False, True):
        for space in ("goal", "adjacency"):
            manager, losses = one_manager_update(with_planner, landmark_space=space)
            for net in ("actor", "critic", "target_actor", "target_critic"):
                assert not same(values(getattr(manager, net)), values(getattr(start, net)))
            assert all(not loss.requires_grad and torch.isfinite(loss).all() for loss in losses.values())


def test_terms_of_weight_zero_change_nothing_in_the_manager():
    """HIRO's update needs neither network: without them, the numbers are those of weights 0."""
    off = dict(adjacency_weight=0.0, landmark_weight=0.0)
    plain, losses = one_manager_update(adjacency=None, novelty=None, **off)
    assert "manager/adjacency_loss" not in losses and "manager/landmark_loss" not in losses
    with_networks, _ = one_manager_update(True, **off)
    assert same(values(plain), values(with_networks))
    switched_off, losses = one_manager_update(adjacency_weight=0.0, landmark_weight_before_planner=0.0)
    assert same(values(plain), values(switched_off)) and "manager/landmark_loss" in losses
    for changed in (dict(adjacency_weight=1e3, landmark_weight=0.0), dict(adjacency_weight=0.0)):
        other, _ = one_manager_update(**changed, adjacency_near=0.0, adjacency_far=0.0)
        assert same(values(plain.critic), values(other.critic))  # only the actor is stepped
        assert not same(values(plain.actor), values(other.actor))


def test_before_the_planner_the_landmark_is_where_one_is():
    manager, losses = one_manager_update(with_planner=False, adjacency_weight=0.0)
    torch.manual_seed(9)
    obs = make_buffers()[1].sample(16)
    subgoal = make_manager().actor(obs.obs_seq[:, 0], obs.goal)
    assert losses["manager/landmark_loss"].item() == pytest.approx(subgoal.square().mean().item(), rel=1e-5)
    double, _ = one_manager_update(adjacency_weight=0.0, landmark_weight=2.0)
    factor, _ = one_manager_update(adjacency_weight=0.0, landmark_weight_before_planner=2.0)
    assert same(values(double), values(factor))
    # once the planner runs, the factor is out of force
    first, _ = one_manager_update(True, landmark_weight_before_planner=0.0)
    second, _ = one_manager_update(True, landmark_weight_before_planner=1.0)
    assert same(values(first), values(second))


def test_planning_for_some_rows(monkeypatch):
    """The landmark term is the mean over the rows that were planned for; the other terms keep all."""
    asked = []

    def plan(worker, graph, obs, goal, args):
        asked.append((obs, goal))
        return obs[:, :2] + torch.tensor([2.0, 0.0])

    monkeypatch.setattr(gcmr, "plan_landmarks", plan)
    _, losses = one_manager_update(True, planner_rows=5)
    _, all_rows = one_manager_update(True)
    torch.manual_seed(9)
    batch = make_buffers()[1].sample(16)
    for (obs, goal), rows in zip(asked, (5, 16), strict=True):
        assert torch.equal(obs, batch.obs_seq[:rows, 0]) and torch.equal(goal, batch.goal[:rows])
    subgoal = make_manager().actor(batch.obs_seq[:, 0], batch.goal)
    error = (torch.tensor([2.0, 0.0]) - subgoal).square()
    assert losses["manager/landmark_loss"].item() == pytest.approx(error[:5].mean().item(), rel=1e-4)
    assert all_rows["manager/landmark_loss"].item() == pytest.approx(error.mean().item(), rel=1e-4)
    assert losses["manager/adjacency_loss"] == all_rows["manager/adjacency_loss"]


def test_manager_learns_from_relabeled_subgoals(monkeypatch):
    monkeypatch.setattr(
        gcmr, "relabel_subgoals", lambda w, d, batch, *_: batch.subgoal + torch.tensor([3.0, 4.0])
    )
    seen, critic_loss = [], gcmr.TD3.critic_loss
    monkeypatch.setattr(
        gcmr.TD3, "critic_loss", lambda self, *inputs: seen.append(inputs) or critic_loss(self, *inputs)
    )
    _, losses = one_manager_update()
    torch.manual_seed(9)
    batch = make_buffers()[1].sample(16)
    torch.testing.assert_close(seen[0][3], batch.subgoal + torch.tensor([3.0, 4.0]))
    assert torch.equal(seen[0][1], batch.obs_seq[:, 0]) and torch.equal(seen[0][2], batch.goal)
    assert losses["manager/relabeled_share"] == 1
    assert losses["manager/relabeled_distance"].item() == pytest.approx(5, rel=1e-5)


def test_actor_steps_follow_the_updated_critic():
    """Order critic, then actor: the manager's actor loss is -q1 of the critic after its step."""
    manager, losses = one_manager_update(adjacency_weight=0.0, landmark_weight=0.0)
    torch.manual_seed(9)
    batch = make_buffers()[1].sample(16)
    subgoal = make_manager().actor(batch.obs_seq[:, 0], batch.goal)
    q = manager.critic(batch.obs_seq[:, 0], batch.goal, subgoal)[0].mean().item()
    assert losses["manager/actor_loss"].item() == pytest.approx(-q, rel=1e-5)


@torch.no_grad()
def test_target_networks_are_used_in_td_targets_only():
    """With useless target networks everything else stays as it was."""
    clean = make_worker(), make_manager()
    broken = copy.deepcopy(clean)
    for learner in broken:
        for parameter in learner.target_actor_params + learner.target_critic_params:
            parameter.fill_(torch.nan)
    dynamics, args = make_dynamics(), make_args()
    obs, goal = torch.randn(12, 6), torch.randn(12, 2)
    batch = SimpleNamespace(
        obs_seq=torch.randn(12, 11, 6),
        action_seq=torch.randn(12, 10, 3),
        length=torch.full((12,), 10.0),
        subgoal=goal,
    )
    results = []
    for worker, manager in (clean, broken):
        torch.manual_seed(0)
        with torch.enable_grad():
            penalty = torch.tensor(numbers(gcmr.gradient_penalty(worker, dynamics, obs, goal, args)))
            planning = gcmr.rollout_planning_loss(manager, worker, dynamics, obs, goal, args)
        relabeled = gcmr.relabel_subgoals(worker, dynamics, batch, manager.limit, args)
        results.append([penalty, planning, relabeled])
    assert same(*([x.detach() for x in result] for result in results))


def test_network_sizes_of_antmaze():
    args = gcmr.Args()
    worker = gcmr.TD3(torch.ones(30 + 2 + 8), torch.full((8,), 30.0), 0.95, (1, 0.2, 0.5), args)
    manager = gcmr.TD3(torch.ones(30 + 2 + 2), torch.full((2,), 10.0), 0.99, (1, 0.2, 0.5), args)

    def size(net):
        return sum(p.numel() for p in net.parameters())

    assert (size(worker.actor), size(worker.critic)) == (102_608, 2 * 102_901)
    assert (size(manager.actor), size(manager.critic)) == (100_802, 2 * 101_101)
