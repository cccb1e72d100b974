"""Stored pairs, candidates, their scores on recorded and on mixed states, and the soft shift."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import aclg_gcmr as gcmr

torch.set_num_threads(1)
HALF_RANGE = torch.tensor([10.0, 10.0])


def make_args(**settings):
    return gcmr.Args(**settings)


def make_batch(obs_seq, action_seq, length=None, **fields):
    """A batch of segments; length None: all whole."""
    obs_seq, action_seq = torch.as_tensor(obs_seq), torch.as_tensor(action_seq)
    length = [action_seq.shape[1]] * len(obs_seq) if length is None else length
    length = torch.as_tensor(length, dtype=torch.float32)
    return SimpleNamespace(obs_seq=obs_seq, action_seq=action_seq, length=length, **fields)


def make_td3(obs_dim=6, goal_dim=2, limit=(3.0, 1.0, 2.0), mask=True, seed=0):
    torch.manual_seed(seed)
    scale = torch.ones(obs_dim + goal_dim + len(limit))
    scale[:2] = 0 if mask else 1
    return gcmr.TD3(scale, torch.tensor(limit), 0.95, (1.0, 0.2, 0.5), make_args(hidden=24))


def recorded_model(obs_seq, count):
    """A model that repeats the recorded states, whatever the action."""
    calls = []

    def predict_next(obs, action):
        calls.append(len(obs))
        return obs_seq[:, len(calls)].repeat_interleave(count, 0)

    return SimpleNamespace(predict_next=predict_next)


# --------------------------------------------------------------------------------------------- stored pairs


def test_stored_pair_g1():
    pair = np.array([1.0, 1.0]), np.array([3.0, -1.0]), np.array([1.5, 0.9])
    np.testing.assert_allclose(gcmr.subgoal_transition(*pair), [2.5, -0.9])
    assert gcmr.intrinsic_reward(*pair) == pytest.approx(-2.6570661, abs=1e-7)
    moved_on = gcmr.subgoal_transition(np.array([1.5, 0.9]), np.array([2.5, -0.9]), np.array([2.0, 0.8]))
    np.testing.assert_allclose(moved_on, [2.0, -0.8])


def test_transition_keeps_the_target_and_is_not_clipped():
    path = np.cumsum(np.random.default_rng(0).normal(0, 3, (12, 2)), 0)
    subgoal = np.array([9.0, -9.0])
    target = path[0] + subgoal
    for here, there in zip(path, path[1:]):
        subgoal = gcmr.subgoal_transition(here, subgoal, there)
        np.testing.assert_allclose(there + subgoal, target)
    assert np.abs(subgoal).max() > 10  # outside the half-range


def test_reward_uses_every_dimension_and_batches():
    rng = np.random.default_rng(1)
    achieved, subgoal, after = (rng.normal(size=(7, 4)) for _ in range(3))
    naive = [
        -(sum((achieved[i, d] + subgoal[i, d] - after[i, d]) ** 2 for d in range(4)) ** 0.5) for i in range(7)
    ]
    np.testing.assert_allclose(gcmr.intrinsic_reward(achieved, subgoal, after), naive, atol=1e-6)


def test_values_of_stored_pairs_g1():
    """Distances 3, 2, 1, 0.5 to the target: the pair's return, and the released record's."""
    path = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [2.5, 0.0]])
    subgoal, value, released = np.array([3.0, 0.0]), 0.0, 0.0
    for t in range(3):
        reward = gcmr.intrinsic_reward(path[t], subgoal, path[t + 1])
        value += 0.95**t * reward
        released += 0.95**t * -np.linalg.norm(subgoal)  # that of the subgoal that remained before the step
        subgoal = gcmr.subgoal_transition(path[t], subgoal, path[t + 1])
    released += 0.95**3 * -np.linalg.norm(subgoal)
    assert value == pytest.approx(-3.40125, abs=1e-6)
    assert released == pytest.approx(-6.2311875, abs=1e-6)
    assert released == pytest.approx(-3 + 0.95 * value, abs=1e-6)


# ----------------------------------------------------------------------------------------------- candidates


def test_candidates_order_and_draws():
    torch.manual_seed(0)
    half_range = torch.tensor([10.0, 2.0])
    subgoal = torch.tensor([[1.0, -1.0], [3.0, 0.5]]).repeat(500, 1)
    displacement = torch.tensor([[2.0, -0.4], [30.0, -5.0]]).repeat(500, 1)  # the second beyond the range
    drawn = gcmr.make_candidates(subgoal, displacement, half_range, make_args(candidates=22))
    assert drawn.shape == (1000, 22, 2)
    assert torch.equal(drawn[:, 0], subgoal) and torch.equal(drawn[:, 1], displacement)  # never clipped
    draws = drawn[:, 2:]
    assert (draws.abs() <= half_range).all()
    near, far = draws[::2].flatten(0, 1), draws[1::2].flatten(0, 1)
    assert (draws[:, 0] != draws[:, 1]).all(-1).float().mean() > 0.4  # each its own draw
    # N(2, 5^2) cut at +-10: mean of a clipped normal from 400,000 draws of numpy
    reference = np.random.default_rng(0).normal(2, 5, 400_000).clip(-10, 10)
    assert near[:, 0].mean().item() == pytest.approx(reference.mean(), abs=0.2)
    assert near[:, 0].std().item() == pytest.approx(reference.std(), abs=0.2)
    reference = np.random.default_rng(0).normal(-0.4, 1, 400_000).clip(-2, 2)
    assert near[:, 1].mean().item() == pytest.approx(reference.mean(), abs=0.04)
    assert near[:, 1].std().item() == pytest.approx(reference.std(), abs=0.04)
    assert (far == torch.tensor([10.0, -2.0])).float().mean() > 0.95  # 30 and -5 are 4 and 3 std outside


# -------------------------------------------------------------------------- scores: G11, G12, naive loops


def line_worker(limit=1.0):
    """G12's worker, clip(u / 2, +-1), on one-dimensional states."""
    return SimpleNamespace(actor=lambda obs, subgoal: (subgoal / 2).clamp(-1, 1), limit=torch.tensor([limit]))


G12 = dict(obs_seq=torch.tensor([[0.0, 2.0, 2.5, 2.5, 3.5]])[..., None],
           action_seq=torch.tensor([[-1.0, 1.0, 1.0, 1.0]])[..., None])  # fmt: skip
G12_CANDIDATES = torch.tensor([[[0.5], [-4.0]]])


def test_plain_scores_g12():
    score = gcmr.score_candidates(line_worker(), G12_CANDIDATES, make_batch(**G12))
    torch.testing.assert_close(score, torch.tensor([[-6.3125, -6.0]]))


@pytest.mark.parametrize(
    "weight, expected", [(0.95, [-5.7822522, -6.0]), (0.0, [-2.28125, -3.0]), (1.0, [-6.3125, -6.0])]
)
def test_rollout_scores_g12(weight, expected):
    """0: model alone, 1: recorded states alone; -6.0235 at 0.95 would be the exponent i of the paper."""
    visited, actions = [], []

    def actor(obs, subgoal):
        visited.append(obs[0].item())
        actions.append((subgoal / 2).clamp(-1, 1)[0].item())
        return (subgoal / 2).clamp(-1, 1)

    worker = SimpleNamespace(actor=actor, limit=torch.ones(1))
    dynamics = SimpleNamespace(predict_next=lambda obs, action: obs + 2 * action)
    args = make_args(rollout_weight=weight)
    score = gcmr.score_rollouts(
        worker, dynamics, G12_CANDIDATES, make_batch(**G12), torch.tensor([10.0]), args
    )
    torch.testing.assert_close(score, torch.tensor([expected]))
    if weight == 0.95:
        assert actions == pytest.approx([0.25, -0.7125, -0.9025, -0.857375], abs=1e-6)
        assert visited == pytest.approx([0, 1.925, 2.305, 2.21475], abs=1e-6)


def test_mixed_states_g11():
    visited, subgoals = [], []

    def actor(obs, subgoal):
        visited.append(obs.item()), subgoals.append(subgoal.item())
        return torch.zeros(1, 1)

    worker = SimpleNamespace(actor=actor, limit=torch.ones(1))
    dynamics = SimpleNamespace(predict_next=lambda obs, action: obs + 1.5)
    recorded = torch.tensor([[0.0, 0.8, 1.6, 2.4, 3.2, 9.9]])[..., None]
    batch = make_batch(recorded, torch.zeros(1, 5, 1))
    gcmr.score_rollouts(
        worker, dynamics, torch.full((1, 1, 1), 2.0), batch, torch.tensor([10.0]), make_args()
    )
    assert visited == pytest.approx([0, 0.835, 1.671663, 2.510058, 3.350261], abs=1e-6)
    assert subgoals == pytest.approx([2, 1.165, 0.328337, -0.510058, -1.350261], abs=1e-6)


def test_rolled_subgoal_is_clipped_g11():
    visited, subgoals = [], []

    def actor(obs, subgoal):
        visited.append(obs.item()), subgoals.append(subgoal.item())
        return torch.zeros(1, 1)

    worker = SimpleNamespace(actor=actor, limit=torch.ones(1))
    dynamics = SimpleNamespace(predict_next=lambda obs, action: torch.full_like(obs, -2.0))
    batch = make_batch(torch.tensor([[0.0, -0.5, 0.0]])[..., None], torch.zeros(1, 2, 1))
    gcmr.score_rollouts(
        worker, dynamics, torch.full((1, 1, 1), 9.8), batch, torch.tensor([10.0]), make_args()
    )
    assert visited == pytest.approx([0, -0.575], abs=1e-6)
    assert subgoals == pytest.approx([9.8, 10], abs=1e-6)


W_OBS, W_SUBGOAL = np.random.default_rng(5).normal(size=(4, 3)), np.random.default_rng(6).normal(size=(2, 3))
MODEL = np.random.default_rng(7).normal(size=(3, 4)) * 0.4
LIMIT = np.array([1.0, 2.0, 4.0])


def one_action(obs, subgoal):
    """The toy worker for one row, plain numpy: unlike the line worker, it sees its state."""
    return LIMIT * np.tanh(0.3 * obs @ W_OBS + 0.2 * subgoal @ W_SUBGOAL)


def toy_worker():
    weights = [torch.tensor(w, dtype=torch.float32) for w in (W_OBS, W_SUBGOAL, LIMIT)]

    def actor(obs, subgoal):
        return weights[2] * torch.tanh(0.3 * obs @ weights[0] + 0.2 * subgoal @ weights[1])

    return SimpleNamespace(actor=actor, limit=weights[2])


def random_segments(rows=6, period=5, seed=3):
    rng = np.random.default_rng(seed)
    obs_seq = np.cumsum(rng.normal(size=(rows, period + 1, 4)), 1).astype(np.float32)
    action_seq = (LIMIT * rng.uniform(-1, 1, (rows, period, 3))).astype(np.float32)
    length = rng.integers(1, period + 1, rows)
    length[0] = period
    candidates = rng.uniform(-8, 8, (rows, 4, 2)).astype(np.float32)
    return obs_seq, action_seq, length, candidates


def test_plain_scores_equal_a_loop():
    obs_seq, action_seq, length, candidates = random_segments()
    score = gcmr.score_candidates(
        toy_worker(), torch.tensor(candidates), make_batch(obs_seq, action_seq, length)
    )
    for b in range(6):
        for k in range(4):
            expected = 0.0
            for i in range(length[b]):
                subgoal = candidates[b, k] + obs_seq[b, 0, :2] - obs_seq[b, i, :2]
                error = (action_seq[b, i] - one_action(obs_seq[b, i], subgoal)) / LIMIT
                expected -= 0.5 * (error**2).sum()
            assert score[b, k].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("weight", [0.95, 0.4])
def test_rollout_scores_equal_a_loop(weight):
    obs_seq, action_seq, length, candidates = random_segments()
    torch_model = torch.tensor(MODEL, dtype=torch.float32)
    dynamics = SimpleNamespace(predict_next=lambda obs, action: 0.9 * obs + action @ torch_model)
    batch = make_batch(obs_seq, action_seq, length)
    args = make_args(rollout_weight=weight)
    score = gcmr.score_rollouts(toy_worker(), dynamics, torch.tensor(candidates), batch, HALF_RANGE, args)
    for b in range(6):
        for k in range(4):
            state, subgoal, expected = obs_seq[b, 0].astype(float), candidates[b, k].astype(float), 0.0
            for i in range(5):
                action = one_action(state, subgoal)
                if i < length[b]:
                    expected -= 0.5 * (((action_seq[b, i] - action) / LIMIT) ** 2).sum()
                real = weight ** (i + 1)
                after = (1 - real) * (0.9 * state + action @ MODEL) + real * obs_seq[b, i + 1]
                subgoal = np.clip(subgoal + state[:2] - after[:2], -10, 10)
                state = after
            assert score[b, k].item() == pytest.approx(expected, abs=1e-4)


def test_short_segments_do_not_see_their_padding():
    obs_seq, action_seq, _, candidates = random_segments()
    length = np.array([1, 2, 3, 4, 5, 5])
    changed = action_seq.copy()
    for b, n in enumerate(length):
        changed[b, n:] = 99
    dynamics = SimpleNamespace(predict_next=lambda obs, action: obs)
    for score in (
        lambda *batch: gcmr.score_candidates(toy_worker(), torch.tensor(candidates), make_batch(*batch)),
        lambda *batch: gcmr.score_rollouts(
            toy_worker(), dynamics, torch.tensor(candidates), make_batch(*batch), HALF_RANGE, make_args()
        ),
    ):
        assert torch.equal(score(obs_seq, action_seq, length), score(obs_seq, changed, length))
        assert not torch.equal(score(obs_seq, action_seq), score(obs_seq, changed))


def test_scores_in_blocks_equal_one_pass(monkeypatch):
    worker = make_td3()
    torch.manual_seed(4)
    batch = make_batch(torch.randn(30, 11, 6), torch.randn(30, 10, 3))
    candidates = torch.randn(30, 12, 2) * 5  # 3,600 rows: four blocks
    with torch.no_grad():
        blocked = gcmr.score_candidates(worker, candidates, batch)
        monkeypatch.setattr(gcmr, "in_blocks", lambda function, *tensors: function(*tensors))
        torch.testing.assert_close(blocked, gcmr.score_candidates(worker, candidates, batch))


# ------------------------------------------------------------------------------------------------ invariants


def test_weight_one_is_the_plain_score_without_clipping():
    obs_seq, action_seq, length, candidates = random_segments()
    batch, candidates = make_batch(obs_seq, action_seq, length), torch.tensor(candidates)
    dynamics = SimpleNamespace(predict_next=lambda obs, action: obs + 100)
    plain = gcmr.score_candidates(toy_worker(), candidates, batch)
    wide = gcmr.score_rollouts(
        toy_worker(), dynamics, candidates, batch, torch.full((2,), 1e9), make_args(rollout_weight=1.0)
    )
    torch.testing.assert_close(wide, plain, rtol=1e-5, atol=1e-4)
    narrow = gcmr.score_rollouts(
        toy_worker(), dynamics, candidates, batch, torch.full((2,), 1.0), make_args(rollout_weight=1.0)
    )
    assert (narrow - plain).abs().max() > 0.1  # what the clipping does


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.5, 0.95])
def test_a_perfect_model_gives_the_plain_score(weight):
    obs_seq, action_seq, length, candidates = random_segments()
    batch, candidates = make_batch(obs_seq, action_seq, length), torch.tensor(candidates)
    score = gcmr.score_rollouts(
        toy_worker(), recorded_model(batch.obs_seq, 4), candidates, batch, torch.full((2,), 1e9),
        make_args(rollout_weight=weight),
    )  # fmt: skip
    plain = gcmr.score_candidates(toy_worker(), candidates, batch)
    torch.testing.assert_close(score, plain, rtol=1e-5, atol=1e-4)


def test_scores_do_not_see_where_the_walk_was():
    """The same walk elsewhere scores the same, thanks to masked entries 0, 1 and relative subgoals."""
    torch.manual_seed(0)
    obs_seq, action_seq = torch.randn(9, 11, 6), torch.randn(9, 10, 3)
    candidates = torch.randn(9, 5, 2) * 4
    moved = obs_seq.clone()
    moved[..., :2] += torch.tensor([7.0, -3.0])
    step = torch.randn(3, 6) * 0.3
    dynamics = SimpleNamespace(predict_next=lambda obs, action: obs + action @ step)  # the same everywhere
    with torch.no_grad():
        for worker, same in ((make_td3(mask=True), True), (make_td3(mask=False), False)):
            plain = [
                gcmr.score_candidates(worker, candidates, make_batch(o, action_seq)) for o in (obs_seq, moved)
            ]
            rolled = [
                gcmr.score_rollouts(
                    worker, dynamics, candidates, make_batch(o, action_seq), HALF_RANGE, make_args()
                )
                for o in (obs_seq, moved)
            ]
            assert torch.allclose(*plain, atol=1e-4) is same
            assert torch.allclose(*rolled, atol=1e-4) is same


def test_manager_sees_where_it_is_and_the_worker_does_not():
    here, there = torch.randn(8, 6), torch.randn(8, 6)
    there[:, 2:] = here[:, 2:]
    subgoal = torch.randn(8, 2)
    worker, manager = make_td3(mask=True), make_td3(limit=(10.0, 10.0), mask=False)
    action = worker.actor(here, subgoal)
    assert torch.equal(action, worker.actor(there, subgoal))
    assert torch.equal(worker.critic(here, subgoal, action), worker.critic(there, subgoal, action))
    action = manager.actor(here, subgoal)
    assert not torch.allclose(action, manager.actor(there, subgoal))
    assert not torch.allclose(manager.critic(here, subgoal, action), manager.critic(there, subgoal, action))


# ------------------------------------------------------------------------------------------------ soft shift

STORED = torch.tensor([[1.0, 2.0], [-9.0, 9.0]], dtype=torch.float64)
BEST = torch.tensor([[4.0, 6.0], [3.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "norm, shift, expected",
    [
        ("batch", 5.0, [[2.0769372, 3.4359163], [-4.692251, 7.2051046]]),
        ("sample", 5.0, [[4.0, 6.0], [-4.3846154, 7.0769231]]),
        ("batch", 20.0, [[5.307749, 7.7436653], [8.2309958, 1.8204184]]),
        ("sample", 20.0, [[10.0, 10.0], [9.4615385, 1.3076923]]),
    ],
)
def test_soft_shift_g13(norm, shift, expected):
    args = make_args(relabel_norm=norm, relabel_shift=shift)
    relabeled = gcmr.shift_towards(STORED, BEST, HALF_RANGE.double(), args)
    torch.testing.assert_close(relabeled, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_hard_relabeling_and_nothing_to_do():
    assert torch.equal(gcmr.shift_towards(STORED, BEST, HALF_RANGE, make_args(relabel_shift=0.0)), BEST)
    for norm in ("batch", "sample"):
        args = make_args(relabel_norm=norm, relabel_shift=20.0)
        assert torch.equal(gcmr.shift_towards(STORED, STORED, HALF_RANGE, args), STORED)
    best = torch.stack([STORED[0], BEST[1]])  # one row that has nothing to do must not move
    for norm in ("batch", "sample"):
        shifted = gcmr.shift_towards(STORED, best, HALF_RANGE, make_args(relabel_norm=norm))
        assert torch.equal(shifted[0], STORED[0]) and not torch.equal(shifted[1], STORED[1])


def test_shift_grows_with_the_root_of_the_batch():
    """relabel_shift depends on batch_size: twice as many copies, the step is shorter by sqrt(2)."""
    args = make_args(relabel_shift=1.0)
    once = gcmr.shift_towards(STORED, BEST, HALF_RANGE, args) - STORED
    twice = gcmr.shift_towards(STORED.repeat(2, 1), BEST.repeat(2, 1), HALF_RANGE, args)[:2] - STORED
    torch.testing.assert_close(once, twice * 2**0.5)


# ------------------------------------------------------------------------------------------------ relabeling


def relabel_batch(subgoal, rows=3, period=4):
    """Segments in which a worker that acts with its subgoal was given `subgoal`."""
    torch.manual_seed(1)
    obs_seq = torch.randn(rows, period + 1, 2) * 0.3
    left = subgoal[:, None] + obs_seq[:, :1] - obs_seq[:, :-1]
    return make_batch(obs_seq, left / 20, subgoal=subgoal.clone())


def follower():
    return SimpleNamespace(actor=lambda obs, subgoal: subgoal / 20, limit=torch.ones(2))


@pytest.mark.parametrize("with_model", [False, True])
def test_the_subgoal_that_was_followed_stays(with_model):
    batch = relabel_batch(torch.tensor([[3.0, -2.0], [0.5, 6.0], [-8.0, 1.0]]))
    dynamics = recorded_model(batch.obs_seq, 12) if with_model else None
    relabeled = gcmr.relabel_subgoals(follower(), dynamics, batch, HALF_RANGE, make_args())
    assert torch.equal(relabeled, batch.subgoal)


def test_relabeling_finds_the_displacement_and_leaves_the_replay_alone():
    batch = relabel_batch(torch.zeros(3, 2))
    moved = batch.obs_seq[:, -1] - batch.obs_seq[:, 0]
    left = moved[:, None] + batch.obs_seq[:, :1] - batch.obs_seq[:, :-1]
    batch.action_seq = left / 20  # what the displacement explains exactly
    before = batch.subgoal.clone(), batch.obs_seq.clone()
    args = make_args(relabel_shift=0.0)
    relabeled = gcmr.relabel_subgoals(follower(), None, batch, HALF_RANGE, args)
    torch.testing.assert_close(relabeled, moved)
    assert torch.equal(batch.subgoal, before[0]) and torch.equal(batch.obs_seq, before[1])


def test_the_first_candidate_wins_ties():
    batch = relabel_batch(torch.tensor([[3.0, -2.0], [0.5, 6.0], [-8.0, 1.0]]))
    worker = SimpleNamespace(actor=lambda obs, subgoal: torch.zeros_like(subgoal), limit=torch.ones(2))
    relabeled = gcmr.relabel_subgoals(worker, None, batch, HALF_RANGE, make_args())
    assert torch.equal(relabeled, batch.subgoal)


@pytest.mark.parametrize("uses_model", [True, False])
def test_when_the_model_scores(monkeypatch, uses_model):
    batch = relabel_batch(torch.ones(3, 2))
    called = []
    plain, rolled = torch.zeros(3, 12), torch.zeros(3, 12)
    plain[:, 1], rolled[:, 2] = 1, 1
    monkeypatch.setattr(gcmr, "score_candidates", lambda *_: called.append("plain") or plain)
    monkeypatch.setattr(gcmr, "score_rollouts", lambda *_: called.append("model") or rolled)
    dynamics = SimpleNamespace() if uses_model else None
    gcmr.relabel_subgoals(follower(), dynamics, batch, HALF_RANGE, make_args())
    assert called == ["model" if uses_model else "plain"]


def test_no_gradient_and_no_parameter_is_touched(monkeypatch):
    worker = make_td3(limit=(3.0, 1.0))
    dynamics = gcmr.DynamicsEnsemble(6, 2, make_args(dynamics_hidden=16))
    data = torch.randn(40, 6)
    dynamics.fit_statistics(data, torch.randn(40, 2), torch.randn(40, 6))
    dynamics.widen_box(3 * data)
    scores, score = [], gcmr.score_rollouts
    monkeypatch.setattr(gcmr, "score_rollouts", lambda *inputs: scores.append(score(*inputs)) or scores[-1])
    batch = make_batch(torch.randn(5, 11, 6), torch.randn(5, 10, 2), subgoal=torch.randn(5, 2))
    relabeled = gcmr.relabel_subgoals(worker, dynamics, batch, HALF_RANGE, make_args())
    assert not relabeled.requires_grad and relabeled.shape == (5, 2) and torch.isfinite(relabeled).all()
    assert (relabeled.abs() <= HALF_RANGE).all()
    assert scores[0].shape == (5, 12) and torch.isfinite(scores[0]).all() and scores[0].unique().numel() > 50
    assert all(p.grad is None for p in [*worker.actor_params, *dynamics.parameters()])
