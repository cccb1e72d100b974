"""The off-policy correction: worked examples, and a slow triple loop as the judge of the batched score."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ToyEnv

import hiro


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


STATES = [[0, 0], [1, 0], [1, 1], [2, 2]]
ACTIONS = [[1, 0.5], [0.5, 0.5], [0.5, 0.25]]


def example(actions=ACTIONS, length=3, subgoal=(0, 2)):
    """Three steps to (2, 2)."""
    return SimpleNamespace(
        obs_seq=tensor(STATES),
        action_seq=tensor(actions),
        length=tensor(length),
        subgoal=tensor(list(subgoal)),
    )


def worker_like(function, limit=(1.0, 1.0)):
    return SimpleNamespace(actor=lambda obs, goal: function(goal), limit=torch.tensor(limit))


HALF = worker_like(lambda goal: (0.5 * goal).clamp(-1, 1))
QUARTER = worker_like(lambda goal: 0.25 * goal)
DRAW_DELTA_STORED = tensor([[1.2, 3.2], [2, 2], [0, 2]])  # [1, 3, 2]


# ------------------------------------------------------------------------------------- worked examples


@pytest.mark.parametrize("length, scores", [(3, (-0.77125, -0.28125, -1.78125)), (2, (-0.41, -0.25, -1.25))])
def test_scores(length, scores):
    result = hiro.score_candidates(HALF, DRAW_DELTA_STORED, example(length=length))
    assert result.shape == (1, 3) and result[0].tolist() == pytest.approx(scores)


def test_subgoals_follow_the_right_sign():
    """With s_i - s_0 instead of s_0 - s_i the second would win, -0.375 against -0.1796875."""
    batch = example(actions=[[0.5, 0.5], [0.25, 0.5], [0.25, 0.25]])
    result = hiro.score_candidates(QUARTER, tensor([[2, 2], [0.5, 1]]), batch)
    assert result[0].tolist() == pytest.approx([0, -0.3046875])


def test_subgoals_along_the_segment():
    """Each candidate, less what has been covered; not clipped on the way."""
    asked = []

    def actor(obs, goal):
        asked.append((obs, goal))
        return torch.zeros(len(obs), 2)

    batch = example()
    batch.obs_seq = tensor([[0, 0], [1, 0], [-30, 1], [2, 2]])
    hiro.score_candidates(SimpleNamespace(actor=actor, limit=tensor(1, 1)), DRAW_DELTA_STORED, batch)
    obs, goal = (torch.cat(parts) for parts in zip(*asked))
    assert obs.tolist() == [[0, 0], [1, 0], [-30, 1]] * 3
    expected = [(1.2, 3.2), (0.2, 3.2), (31.2, 2.2), (2, 2), (1, 2), (32, 1), (0, 2), (-1, 2), (30, 1)]
    assert torch.allclose(goal, torch.tensor(expected))


def test_errors_are_in_units_of_the_limit():
    """(3, -6) of 30: half of 0.05."""
    batch = example(actions=[[3, -6], [9, 9], [9, 9]], length=1)
    worker = worker_like(lambda goal: 0 * goal, (30.0, 30.0))
    assert hiro.score_candidates(worker, tensor([[1, 1]]), batch).item() == pytest.approx(-0.025)
    worker.limit = tensor(30, 60)
    assert hiro.score_candidates(worker, tensor([[1, 1]]), batch).item() == pytest.approx(-0.01)


def test_relabeling_the_example(monkeypatch):
    """One draw at z = (-0.4, 0.6) of 0.5 x 4, the displacement, the stored one: the displacement wins."""
    monkeypatch.setattr(torch, "randn", lambda *shape, device: tensor(-0.4, 0.6).expand(shape))
    half_range, args = tensor(4, 4), hiro.Args(candidates=3)
    candidates = hiro.make_candidates(tensor([0, 2]), tensor([2, 2]), half_range, args)
    assert torch.allclose(candidates[0].sort(0).values, DRAW_DELTA_STORED[0].sort(0).values)
    assert hiro.relabel_subgoals(HALF, example(), half_range, args).tolist() == [[2, 2]]


def test_draws_are_clipped(monkeypatch):
    """(12, 3) + 5 x (0.5, -1) = (14.5, -2), clipped to (10, -2); and so is the displacement."""
    monkeypatch.setattr(torch, "randn", lambda *shape, device: tensor(0.5, -1).expand(shape))
    candidates = hiro.make_candidates(
        tensor([1, 2]), tensor([12, 3]), tensor(10, 10), hiro.Args(candidates=4)
    )
    assert sorted(candidates[0].tolist()) == [[1, 2], [10, -2], [10, -2], [10, 3]]


# ------------------------------------------------------------------------------------------ candidates


@pytest.mark.parametrize("count", [3, 10])
def test_candidates(count):
    torch.manual_seed(0)
    half_range = tensor(10, 0.5, 1)
    subgoal = (2 * torch.rand(50, 3) - 1) * half_range
    displacement = 0.2 * torch.randn(50, 3) * half_range
    displacement[:5] *= 10  # some beyond the range
    candidates = hiro.make_candidates(subgoal, displacement, half_range, hiro.Args(candidates=count))
    assert candidates.shape == (50, count, 3)
    assert (candidates.abs() <= half_range).all()
    for row in range(50):
        found = {tuple(c) for c in candidates[row].tolist()}
        assert tuple(subgoal[row].tolist()) in found
        assert tuple(displacement[row].clamp(-half_range, half_range).tolist()) in found
        assert len(found) == count or row < 5  # the draws differ


def test_statistics_of_the_draws():
    """Around the displacement with half of the half-range; nothing is clipped at a tenth of that."""
    torch.manual_seed(0)
    half_range, displacement = tensor(10, 0.5), tensor([1, -0.02]).expand(5000, 2)
    args = hiro.Args(candidates=10, candidate_noise=0.05)
    candidates = hiro.make_candidates(torch.full((5000, 2), 99.0), displacement, half_range, args)
    other = (candidates != displacement[:1]).any(-1) & (candidates != half_range).any(-1)
    draws = candidates[other]
    assert len(draws) == 40_000
    assert draws.mean(0).tolist() == pytest.approx([1, -0.02], abs=0.005)
    assert draws.std(0).tolist() == pytest.approx([0.5, 0.025], rel=0.02)
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 0.02
    assert hiro.Args().candidate_noise == 0.5


# --------------------------------------------------------------------------------------------- batches


def random_worker(seed=0, obs_dim=5, dims=2):
    torch.manual_seed(seed)
    args = hiro.Args(hidden=16, output_init=0.0, subgoal_space="xy", scale_worker_inputs=True)
    return hiro.make_agents(ToyEnv(), args, torch.device("cpu"))[1]


def random_segments(batch=12, period=6, obs_dim=5):
    return SimpleNamespace(
        obs_seq=torch.randn(batch, period + 1, obs_dim).cumsum(1),
        action_seq=2 * torch.rand(batch, period, 2) - 1,
        length=(torch.arange(batch) % period + 1).float(),
        subgoal=4 * torch.randn(batch, 2),
    )


def test_score_against_a_loop():
    """Segments of 1 to 6 steps, each sum taken one by one with single calls of the actor."""
    worker, batch = random_worker(), random_segments()
    candidates = 3 * torch.randn(12, 7, 2)
    scores = hiro.score_candidates(worker, candidates, batch)
    assert scores.shape == (12, 7)
    for b in range(12):
        for k in range(7):
            total = 0.0
            for i in range(int(batch.length[b])):
                goal = candidates[b, k] + batch.obs_seq[b, 0, :2] - batch.obs_seq[b, i, :2]
                action = worker.actor(batch.obs_seq[b, i][None], goal[None])[0].tolist()
                total += sum((float(batch.action_seq[b, i, j]) - action[j]) ** 2 for j in range(2))
            assert scores[b, k].item() == pytest.approx(-0.5 * total, rel=1e-4, abs=1e-5)


def test_padding_does_not_count():
    worker, batch = random_worker(), random_segments()
    candidates = 3 * torch.randn(12, 7, 2)
    scores = hiro.score_candidates(worker, candidates, batch)
    for b, n in enumerate(batch.length.int().tolist()):
        batch.obs_seq[b, n:-1] += 7.0  # the last entry is the end of the segment
        batch.action_seq[b, n:] = -0.5
    assert torch.equal(scores, hiro.score_candidates(worker, candidates, batch))


def test_displacement_reaches_to_the_end():
    """Of all the steps, not only to where the last action was chosen; short segments too."""
    batch, args = random_segments(), hiro.Args(candidates=3, candidate_noise=0.0)
    worker = worker_like(lambda goal: 0 * goal)
    batch.action_seq[:] = 0  # all candidates score 0, the first wins: a draw without noise
    displacement = batch.obs_seq[:, -1, :2] - batch.obs_seq[:, 0, :2]
    result = hiro.relabel_subgoals(worker, batch, tensor(100, 100), args)
    assert torch.allclose(result, displacement)


def follow(worker, batch, subgoal):
    """Let the actions be what the worker does under these subgoals."""
    for i in range(batch.action_seq.shape[1]):
        goal = subgoal + batch.obs_seq[:, 0, :2] - batch.obs_seq[:, i, :2]
        batch.action_seq[:, i] = worker.actor(batch.obs_seq[:, i], goal).detach()


@pytest.mark.parametrize("stored_wins", [False, True])
def test_the_subgoal_that_explains_the_actions_wins(stored_wins):
    worker, batch, half_range = random_worker(), random_segments(64), tensor(30, 30)
    displacement = batch.obs_seq[:, -1, :2] - batch.obs_seq[:, 0, :2]
    right = batch.subgoal if stored_wins else displacement
    follow(worker, batch, right)
    before = batch.subgoal.clone()
    result = hiro.relabel_subgoals(worker, batch, half_range, hiro.Args())
    assert torch.equal(result, right) and not result.requires_grad
    assert torch.equal(batch.subgoal, before)


def test_result_is_the_best_of_the_candidates(monkeypatch):
    worker, batch, half_range = random_worker(), random_segments(40), tensor(5, 2)
    given = []
    make = hiro.make_candidates
    monkeypatch.setattr(hiro, "make_candidates", lambda *inputs: given.append(make(*inputs)) or given[0])
    result = hiro.relabel_subgoals(worker, batch, half_range, hiro.Args())
    assert (result.abs() <= half_range).all()
    chosen = set()
    for b in range(40):
        row = SimpleNamespace(**{name: value[b : b + 1] for name, value in vars(batch).items()})
        scores = [hiro.score_candidates(worker, c[None, None], row).item() for c in given[0][b]]
        best = max(range(10), key=scores.__getitem__)
        chosen.add(best)
        assert torch.equal(result[b], given[0][b, best])
    assert len(chosen) > 4


# -------------------------------------------------------------------------------------------- ablations


def test_no_relabeling():
    batch = random_segments()
    assert hiro.relabel_subgoals(None, batch, tensor(1, 1), hiro.Args(relabeling="none")) is batch.subgoal


def test_fun_relabeling():
    """One draw of a tenth of the half-range around the displacement, neither scored nor clipped."""
    torch.manual_seed(0)
    batch = example()
    batch = SimpleNamespace(
        **{name: value.expand(20_000, *value.shape[1:]) for name, value in vars(batch).items()}
    )
    draws = hiro.relabel_subgoals(None, batch, tensor(1.5, 0.5), hiro.Args(relabeling="fun"))
    assert draws.mean(0).tolist() == pytest.approx([2, 2], abs=0.01)  # beyond the half-range
    assert draws.std(0).tolist() == pytest.approx([0.15, 0.05], rel=0.05)
    share = (draws[:, 0] > 2 + 0.15).float().mean().item()
    assert share == pytest.approx(0.5 * math.erfc(2**-0.5), abs=0.02)  # Gaussian
