"""Landmarks by farthest points and by novelty, edges, path values, and the choice among landmarks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import aclg_gcmr as gcmr

torch.set_num_threads(1)


def make_args(**settings):
    return gcmr.Args(**settings)


def make_worker(obs_dim=6, dims=2, limit=(3.0, 1.0, 2.0), mask=True, seed=0):
    torch.manual_seed(seed)
    scale = torch.ones(obs_dim + dims + len(limit))
    scale[:2] = 0 if mask else 1
    return gcmr.TD3(scale, torch.tensor(limit), 0.95, (1.0, 0.2, 0.5), make_args(hidden=24))


# ---------------------------------------------------------------------------------------------- coverage: G5


def farthest(points, count):
    """Those to use; what is asked for has always the same shape."""
    index, apart = gcmr.farthest_point_sample(points, count)
    assert index.shape == apart.shape == (count,)
    return index[apart].tolist()


def test_farthest_points_g5():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [4.0, 0.0], [4.0, 4.0], [1.0, 1.0]])
    assert farthest(points, 6) == [0, 4, 3, 2, 5, 1]
    assert farthest(points, 3) == [0, 4, 3]
    close = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.03, 0.0]])
    assert farthest(close, 4) == [0, 2]


def test_farthest_points_equal_a_loop():
    points = np.random.default_rng(0).uniform(-4, 12, (150, 3)).astype(np.float32)
    chosen = [0]
    while len(chosen) < 40:
        nearest = [min(np.mean((p - points[c]) ** 2) for c in chosen) for p in points]
        chosen.append(int(np.argmax(nearest)))
    assert farthest(torch.tensor(points), 40) == chosen


def test_farthest_points_of_one_place():
    assert farthest(torch.ones(50, 2), 10) == [0]


# --------------------------------------------------------------------------------------- novelty queue: G16


def make_novelty(obs_dim=2, seed=0, **settings):
    torch.manual_seed(seed)
    return gcmr.Novelty(obs_dim, 2, make_args(**settings))


def queue_of(novelty):
    """Observations and scores, without the empty places."""
    used = novelty.score > -torch.inf
    assert (novelty.obs[~used] == 0).all() and used.tolist() == sorted(used.tolist(), reverse=True)
    assert np.array_equal(novelty.landmarks(), novelty.obs[used].numpy())
    return novelty.obs[used], novelty.score[used]


def test_queue_g16():
    novelty, args = make_novelty(novelty_landmarks=3), make_args()

    def visit(*states):
        novelty.update_queue(
            torch.tensor([s[:2] for s in states]), torch.tensor([s[2] for s in states]), args
        )
        obs, score = queue_of(novelty)
        return [(round(x, 4), round(y, 4)) for x, y in obs.tolist()], score.tolist()

    places, scores = visit((0.0, 0, 0.1), (1.0, 0, 0.5), (1.05, 0, 0.6), (3.0, 0, 0.9), (3.0, 0, 0.9))
    assert places == [(3, 0), (1.05, 0), (1, 0)] and scores == pytest.approx([0.9, 0.6, 0.5])
    places, scores = visit((1.22, 0, 0.2), (2.0, 0, 0.3), (3.19, 0, 0.15))
    assert places == [(1, 0), (2, 0), (1.22, 0)] and scores == pytest.approx([0.5, 0.3, 0.2])
    places, scores = visit((9.0, 9, 0.05), (1.25, 0, 0.01))
    assert places == [(1, 0), (2, 0), (9, 9)] and scores == pytest.approx([0.5, 0.3, 0.05])


def test_queue_equals_a_loop_over_many_episodes():
    """And it never holds an old entry within the radius of a position of the last episode."""
    novelty, args = make_novelty(5, novelty_landmarks=25), make_args()
    rng, queue = np.random.default_rng(0), []
    for _ in range(12):
        walk = np.cumsum(rng.normal(0, 0.25, (61, 2)), 0) + rng.uniform(0, 4, 2)
        obs = np.concatenate([walk, rng.normal(size=(61, 3))], 1).astype(np.float32)
        score = (rng.permutation(61) + rng.random()).astype(np.float32)
        novelty.update_queue(torch.tensor(obs), torch.tensor(score), args)
        kept = [
            (o, s) for o, s in queue
            if all((o[0] - v[0]) ** 2 + (o[1] - v[1]) ** 2 >= 0.2**2 for v in obs.astype(float))
        ]  # fmt: skip
        queue = sorted(kept + list(zip(obs.astype(float), score)), key=lambda entry: -entry[1])[:25]
        np.testing.assert_allclose(novelty.obs, [o for o, _ in queue], atol=1e-6)
        np.testing.assert_allclose(novelty.score, [s for _, s in queue])


def test_radius_is_exact_far_from_the_origin():
    """501 positions and 60 entries in the far corner of a maze: rounding must not matter at 0.2."""
    rng = np.random.default_rng(0)
    old, new = (rng.uniform(30, 34, (n, 2)).astype(np.float32) for n in (60, 501))
    novelty, args = make_novelty(), make_args(novelty_radius=0.2)
    novelty.update_queue(torch.tensor(old), torch.ones(60) * 5, args)
    novelty.update_queue(torch.tensor(new[:40]), torch.arange(40.0) * 0.01, args)
    distance = np.linalg.norm(old[:, None].astype(float) - new[None, :40], axis=-1).min(1)
    assert np.abs(distance - 0.2).min() > 2e-4  # none on the border
    assert (novelty.score == 5).sum() == (distance >= 0.2).sum()


def test_radius_is_strict_and_only_new_visits_remove():
    novelty, args = make_novelty(), make_args(novelty_radius=0.25)
    novelty.update_queue(torch.tensor([[0.0, 0.0], [0.01, 0.0], [5.0, 0.0]]), torch.ones(3), args)
    assert len(queue_of(novelty)[0]) == 3  # neighbours of one episode stay
    novelty.update_queue(torch.tensor([[5.25, 0.0], [0.0, 0.25]]), torch.zeros(2), args)
    assert len(queue_of(novelty)[0]) == 5  # exactly 0.25 away
    novelty.update_queue(torch.tensor([[5.125, 0.125]]), torch.zeros(1), args)
    obs = queue_of(novelty)[0].tolist()
    assert [5.0, 0.0] not in obs and len(obs) == 4


def test_an_empty_place_is_no_old_landmark():
    """They lie at the origin: a visit there must find none to drop, and one elsewhere none to keep."""
    for here in (0.0, 3.0):
        novelty = make_novelty(novelty_landmarks=5)
        novelty.update_queue(torch.tensor([[1.0, 1.0]]), torch.ones(1), make_args())
        novelty.update_queue(torch.tensor([[here, here]]), torch.tensor([2.0]), make_args())
        obs, score = queue_of(novelty)
        assert obs.tolist() == [[here, here], [1, 1]] and score.tolist() == [2, 1]


def test_queue_keeps_the_higher_score_of_a_repeated_place():
    novelty = make_novelty(3)
    obs = torch.tensor([[1.0, 1.0, 7.0], [2.0, 2.0, 0.0], [1.0, 1.0, 8.0]])
    novelty.update_queue(obs, torch.tensor([0.1, 0.2, 0.3]), make_args())
    assert queue_of(novelty)[0].tolist() == [[1, 1, 8], [2, 2, 0]]


def test_first_occurrences():
    rows = torch.tensor([[2.0, 1.0], [0.0, 0.0], [2.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert gcmr.first_occurrences(rows).tolist() == [0, 1, 3]
    assert gcmr.first_occurrences(torch.zeros(0, 2)).tolist() == []


def test_novelty_score_and_loss_g16():
    novelty = make_novelty()
    for name, values in (("predictor", [1.0, 2.0, 3.0]), ("target", [0.0, 2.0, 1.0])):
        layer = torch.nn.Linear(2, 3)
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(values)
        setattr(novelty, name, layer)
    obs = torch.randn(4, 2)
    torch.testing.assert_close(novelty.novelty(obs), torch.full((4,), 2.5))
    assert novelty.loss(obs).item() == pytest.approx(1.6666667)


def test_size_of_novelty_networks():
    novelty = make_novelty(30)
    for net in (novelty.predictor, novelty.target):
        assert sum(p.numel() for p in net.parameters()) == 36_992


def test_novelty_sees_the_position():
    novelty, obs = make_novelty(6), torch.randn(8, 6)
    moved = obs.clone()
    moved[:, :2] += 1
    assert (novelty.novelty(obs) - novelty.novelty(moved)).abs().min() > 0


def test_training_makes_the_familiar_dull():
    novelty, args = make_novelty(4), make_args(batch_size=32)
    buffer = gcmr.ReplayBuffer(300, "cpu", obs=(4,))
    rng = np.random.default_rng(0)
    for row in rng.normal(size=(300, 4)) * 0.3 - 1:
        buffer.add(obs=row)
    familiar, strange = torch.tensor(rng.normal(size=(2, 200, 4)) * 0.3, dtype=torch.float32) + torch.tensor(
        [[[-1.0]], [[4.0]]]
    )
    target = [p.clone() for p in novelty.target.parameters()]
    optimizer = torch.optim.Adam(novelty.predictor.parameters(), 1e-3)
    before = novelty.novelty(familiar).mean().item()
    for _ in range(150):
        gcmr.update_novelty(novelty, optimizer, buffer, args)
    after = novelty.novelty(familiar).mean().item()
    assert after < 0.2 * before and after < 0.1 * novelty.novelty(strange).mean().item()
    assert all(torch.equal(a, b) for a, b in zip(target, novelty.target.parameters()))


def test_visit_scores_with_the_present_predictor():
    novelty, args = make_novelty(4, novelty_landmarks=7), make_args()
    obs = torch.randn(30, 4) * 3
    novelty.visit(obs, args)
    with torch.no_grad():
        score = 0.5 * ((novelty.predictor(obs) - novelty.target(obs)) ** 2).sum(1)
    best = score.argsort(descending=True)[:7]
    assert torch.equal(novelty.obs, obs[best])
    torch.testing.assert_close(novelty.score, score[best])
    assert not novelty.score.requires_grad


def test_novelty_round_trip(tmp_path):
    first, args = make_novelty(4, novelty_landmarks=7), make_args()
    first.visit(torch.randn(30, 4), args)
    torch.save(first.state_dict(), tmp_path / "novelty.pt")
    second = make_novelty(4, seed=1, novelty_landmarks=7)
    second.visit(torch.randn(3, 4), args)  # another number of entries
    second.load_state_dict(torch.load(tmp_path / "novelty.pt", weights_only=True))
    obs = torch.randn(20, 4)
    assert torch.equal(first.novelty(obs), second.novelty(obs))
    for novelty in (first, second):
        novelty.visit(obs, args)
    assert torch.equal(first.obs, second.obs) and torch.equal(first.score, second.score)


# -------------------------------------------------------------------------------------------------- edges


def test_in_blocks_equals_one_pass():
    torch.manual_seed(0)
    a, b = torch.randn(2500, 3), torch.randn(2500, 2)
    sizes = []

    def function(a, b):
        sizes.append(len(a))
        return a.sum(1) * b[:, 0] + b[:, 1]

    assert torch.equal(gcmr.in_blocks(function, a, b), function(a, b))
    assert sizes == [1024, 1024, 452, 2500]
    assert torch.equal(gcmr.in_blocks(function, a[:7], b[:7], rows=3), function(a[:7], b[:7]))


def test_edges_equal_a_double_loop():
    worker = make_worker()
    obs, targets = torch.randn(40, 6), torch.randn(45, 2)  # 1,800 rows: two blocks
    with torch.no_grad():
        worker.critic.layers[2].bias += torch.tensor([[0.0], [0.02]])
        edges = gcmr.edge_values(worker, obs, targets)
        assert edges.shape == (40, 45)
        for i in range(0, 40, 3):
            for j in range(45):
                subgoal = (targets[j] - obs[i, :2])[None]
                q = worker.critic(obs[i : i + 1], subgoal, worker.actor(obs[i : i + 1], subgoal))
                assert edges[i, j].item() == pytest.approx(min(q.min().item(), 0.0), abs=1e-6)
    assert (edges <= 0).all() and (edges == 0).any() and (edges < 0).any()


def test_edges_in_four_dimensions():
    worker = SimpleNamespace(
        actor=lambda obs, subgoal: subgoal,
        critic=lambda obs, subgoal, action: torch.stack([-subgoal.abs().sum(-1), obs[:, 0] * 0 + 9]),
    )
    obs, targets = torch.randn(3, 8), torch.randn(5, 4)
    naive = [[-(targets[j] - obs[i, :4]).abs().sum().item() for j in range(5)] for i in range(3)]
    torch.testing.assert_close(gcmr.edge_values(worker, obs, targets), torch.tensor(naive))


def test_edges_do_not_see_where_things_are():
    obs, targets = torch.randn(10, 6), torch.randn(12, 2)
    moved, shift = obs.clone(), torch.tensor([7.0, -3.0])
    moved[:, :2] += shift
    with torch.no_grad():
        for mask in (True, False):
            edges = [
                gcmr.edge_values(make_worker(mask=mask), o, t)
                for o, t in ((obs, targets), (moved, targets + shift))
            ]
            assert torch.allclose(*edges, atol=1e-5) is mask


# ------------------------------------------------------------------------------------------- clipping: G6

G6 = torch.tensor([[0.5, -6, -45, -70], [-7, -0.2, -42, -60], [-25, -39, -0.4, -80]])


def test_clipped_edges_g6():
    clipped = gcmr.clip_edges(G6, -38.0)
    cut = [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]
    kept = [[0, -6, 0, 0], [-7, 0, -42, -60], [-25, 0, 0, 0]]
    for i in range(3):
        for j in range(4):
            if cut[i][j]:
                assert clipped[i, j].item() == pytest.approx(G6[i, j].item() - 1e6, abs=0.07)
            else:
                assert clipped[i, j].item() == kept[i][j]


def test_clipping_keeps_ties_and_what_is_above_the_cutoff():
    edges = torch.tensor([[0.0, -9.0, -50.0], [-38.0, 0.0, -50.0]])
    clipped = gcmr.clip_edges(edges, -38.0)
    assert torch.equal(clipped, edges)  # -38 is not below; the two best edges to the goal tie
    assert gcmr.clip_edges(torch.tensor([[-0.5, -99.0]]), -38.0).tolist() == [[0.0, -99.0]]  # one landmark


def test_clipping_equals_a_loop():
    torch.manual_seed(0)
    edges = -torch.rand(9, 14) * 80
    clipped = gcmr.clip_edges(edges, -38.0)
    for j in range(14):
        best = max(edges[i, j].item() for i in range(9) if i != j)
        for i in range(9):
            expected = (
                0 if i == j else edges[i, j].item() - (1e6 if edges[i, j].item() < min(best, -38) else 0)
            )
            assert clipped[i, j].item() == pytest.approx(expected, abs=0.1 if expected < -1e5 else 1e-6)
        assert (clipped[:, j] > -1e5).sum() > (j < 9)  # someone else leads to every node


# ------------------------------------------------------------------------------------------ path values: G7

G7 = torch.tensor([[0.5, -6, -20, -50], [-7, -0.2, -8, -30], [-25, -9, -0.4, -5]], dtype=torch.float64)


def g7(**changes):
    edges = G7.clone()
    for name, value in changes.items():
        edges["abc".index(name[0]), "abcg".index(name[1])] = value
    return gcmr.clip_edges(edges, -38.0)


def between(edges):
    """The same graph with the landmarks as goals too, to ask for values among them."""
    return edges[:, list(range(len(edges))) * 2]


def test_exact_path_values_g7():
    values = gcmr.best_path_values(g7())
    torch.testing.assert_close(values, torch.tensor([[-19.0], [-13.0], [-5.0]], dtype=torch.float64))
    inner = gcmr.best_path_values(between(g7()))
    assert inner[0, 2].item() == -14 and inner[2, 0].item() == -16
    assert inner.diagonal().tolist() == [0, 0, 0]
    values = gcmr.best_path_values(g7(ab=-1, ba=-1))
    torch.testing.assert_close(values[:, 0], torch.tensor([-14.0, -13, -5], dtype=torch.float64))


@pytest.mark.parametrize(
    "rounds, expected", [(1, -25.0006), (2, -19.0537), (5, -19.0166), (10, -19.0570), (20, -21.5620)]
)
def test_soft_path_values_g7(rounds, expected):
    values = gcmr.soft_path_values(g7(), 0.9, rounds)
    assert values.shape == (3, 1)
    assert values[0, 0].item() == pytest.approx(expected, abs=5e-5)


def test_soft_path_values_g7_after_all_rounds():
    values = gcmr.soft_path_values(g7(), 0.9)  # 20 is the default
    assert values[:, 0].tolist() == pytest.approx([-21.5620, -15.0085, -6.0016], abs=5e-5)
    values = gcmr.soft_path_values(g7(ab=-1, ba=-1), 0.9)
    assert values[:, 0].tolist() == pytest.approx([-16.1529, -15.3082, -5.9779], abs=5e-5)
    hot = gcmr.soft_path_values(g7(), 200.0)
    torch.testing.assert_close(hot, gcmr.best_path_values(g7()), rtol=0, atol=1e-6)


def soft_loop(edges, heat, rounds=20):
    """The released search over all nodes, one entry at a time; goals have no edges out but to themselves."""
    n, nodes = edges.shape
    value = np.full((nodes, nodes), -1e6)
    value[:n] = edges
    np.fill_diagonal(value, 0)
    for _ in range(rounds):
        old = value.copy()
        for i in range(nodes):
            for j in range(nodes):
                sums = [old[i, k] + old[k, j] for k in range(nodes)]
                weights = np.exp(heat * (np.array(sums) - max(sums)))
                value[i, j] = np.dot(weights, sums) / weights.sum()
    return value


def test_soft_path_values_equal_a_loop():
    value = soft_loop(g7().numpy(), 0.9)  # the loop itself against the numbers
    assert value.diagonal().tolist() == pytest.approx([-37.5536, -23.2597, -4.0377, 0], abs=6e-5)
    assert soft_loop(-1 + np.eye(2), 0.9)[0, 0] == pytest.approx(-273_000, rel=0.01)
    edges = random_edges(n=5, goals=3, missing=0.4, seed=2)
    torch.testing.assert_close(
        gcmr.soft_path_values(edges, 0.9, 6), torch.tensor(soft_loop(edges.numpy(), 0.9, 6)[:5, 5:])
    )


def random_edges(n=9, goals=6, missing=0.5, seed=0):
    """Edges as after clip_edges, some of them cut."""
    generator = torch.Generator().manual_seed(seed)
    edges = -torch.rand(n, n + goals, generator=generator, dtype=torch.float64) * 37
    edges[torch.rand(n, n + goals, generator=generator) < missing] -= 1e6
    edges[range(n), range(n)] = 0
    return edges


def bellman_ford(edges, goal, keep=lambda value: True):
    """Values of the best paths from every landmark to one goal, by relaxing edges one at a time."""
    n = len(edges)
    value = [edges[i][goal] if keep(edges[i][goal]) else -np.inf for i in range(n)]
    for _ in range(n):
        for i in range(n):
            for j in range(n):
                if i != j and keep(edges[i][j]):
                    value[i] = max(value[i], edges[i][j] + value[j])
    return value


@pytest.mark.parametrize("missing", [0.0, 0.5, 0.85])
@pytest.mark.parametrize("seed", range(4))
def test_exact_path_values_equal_bellman_ford(missing, seed):
    edges = random_edges(missing=missing, seed=seed)
    values = gcmr.best_path_values(edges)
    assert values.shape == (9, 6)
    for goal in range(6):
        expected = bellman_ford(edges.tolist(), 9 + goal)
        torch.testing.assert_close(values[:, goal], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_edge_is_never_used_if_a_path_exists(seed):
    edges = random_edges(missing=0.75, seed=seed)
    values, reachable = gcmr.best_path_values(edges), 0
    for goal in range(6):
        without = bellman_ford(edges.tolist(), 9 + goal, keep=lambda value: value > -1e5)
        for i in range(9):
            if without[i] > -np.inf:
                assert values[i, goal].item() == pytest.approx(without[i])
                reachable += 1
            else:
                assert values[i, goal] < -9e5
    assert 0 < reachable < 54  # both kinds were met


@pytest.mark.parametrize("missing", [0.0, 0.6])
def test_exact_values_are_closed(missing):
    inner = gcmr.best_path_values(between(random_edges(missing=missing)[:, :9]))
    through = inner[:, :, None] + inner[None]  # V_ik + V_kj
    assert (inner >= through.amax(1) - 1e-6).all()
    assert (inner.diagonal() == 0).all()
    assert (gcmr.best_path_values(random_edges()) >= random_edges()[:, 9:]).all()


@pytest.mark.parametrize("search", [gcmr.best_path_values, lambda edges: gcmr.soft_path_values(edges, 0.9)])
def test_goals_are_never_intermediate(search):
    """Values to a goal do not depend on which other goals there are."""
    edges = random_edges(missing=0.3)
    values = search(edges)
    for goal in range(6):
        alone = search(edges[:, [*range(9), 9 + goal]])
        torch.testing.assert_close(alone[:, 0], values[:, goal])


def test_soft_values_tend_to_the_exact_ones():
    edges = random_edges(missing=0.3, seed=5)
    exact = gcmr.best_path_values(edges)
    gaps = [
        (gcmr.soft_path_values(edges, heat) - exact).abs().max().item() for heat in (1.0, 3.0, 10.0, 100.0)
    ]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-3 < gaps[0]


def test_float32_edges_lose_nothing_beside_cut_ones():
    """Differences of 0.01 survive although cut edges are a million away."""
    edges = torch.tensor([[0.0, -1.00, -2.00, -1e6], [-1e6, 0, -1e6, -5.01], [-1e6, -1e6, 0, -4.00]])
    assert gcmr.best_path_values(edges)[0, 0].item() == pytest.approx(-6.0, abs=1e-5)


# ------------------------------------------------------------------------------------------------ choice: G8

VALUES_G7 = torch.tensor([-19.0, -13.0, -5.0])
LANDMARKS = torch.tensor([[10.0, 0.0], [20.0, 0.0], [30.0, 0.0]])
GOAL = torch.tensor([[99.0, 9.0]])


@pytest.mark.parametrize(
    "to_landmarks, direct, chosen",
    [
        ((-3, -12, -28), -36.0, LANDMARKS[0]),
        ((-3, -12, -28), -9.9, GOAL[0]),
        ((-3, -12, -28), -10.0, LANDMARKS[0]),  # strict
        ((-12, -3, -9), -20.0, LANDMARKS[2]),
        ((-1000060, -1000045, -1000050), -70.0, LANDMARKS[2]),  # all cut
        ((-3, -9, -17), -36.0, LANDMARKS[0]),  # all three tie
    ],
)
def test_choice_g8(to_landmarks, direct, chosen):
    values = torch.tensor([to_landmarks], dtype=torch.float64) + VALUES_G7
    landmark = gcmr.choose_landmarks(values, torch.tensor([direct]), LANDMARKS, GOAL, -10.0)
    assert torch.equal(landmark, chosen[None])


def test_choice_by_rows():
    values = torch.tensor([[-9.0, -1.0, -5.0], [-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0]])
    goals = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    landmark = gcmr.choose_landmarks(values, torch.tensor([-20.0, -5.0, -11.0]), LANDMARKS, goals, -10.0)
    assert landmark.tolist() == [[20, 0], [2, 2], [30, 0]]


# ---------------------------------------------------------------------- pseudo-landmarks: G9


def test_pseudo_landmark_g9():
    achieved = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    chosen = torch.tensor([[4.0, 5.0], [2.0, 2.0], [0.3, 0.4]])
    shifted = gcmr.shift_landmark(achieved, chosen, 2.0)
    torch.testing.assert_close(shifted, torch.tensor([[2.2, 2.6], [2.0, 2.0], [1.2, 1.6]]))
    push = gcmr.shift_landmark(torch.tensor([[0.0, 0, 0, 4]]), torch.tensor([[0.0, 8, 0, 0]]), 3.0)
    torch.testing.assert_close(push, torch.tensor([[0.0, 2.6832816, 0.0, 2.6583592]]))


def test_pseudo_landmarks_lie_shift_away():
    torch.manual_seed(0)
    achieved, chosen = torch.randn(100, 3) * 5, torch.randn(100, 3) * 5
    chosen[::10] = achieved[::10]
    shifted = gcmr.shift_landmark(achieved, chosen, 2.5)
    length = (shifted - achieved).norm(dim=1)
    expected = torch.full((100,), 2.5)
    expected[::10] = 0
    torch.testing.assert_close(length, expected)


# ---------------------------------------------------------------------- the whole planner


def crosses_wall(a, b):
    """A wall at y = 4 for x < 6, as in a U maze: only the right side is open."""
    if (a[1] - 4) * (b[1] - 4) >= 0:
        return False
    return a[0] + (4 - a[1]) / (b[1] - a[1]) * (b[0] - a[0]) < 6


def wall_q(achieved, subgoal):
    """The value of going straight: minus 4 per metre, -60 more through the wall."""
    target = achieved + subgoal
    values = [
        -4 * np.hypot(*s) - 60 * crosses_wall(a, t)
        for a, s, t in zip(achieved.tolist(), subgoal.tolist(), target.tolist())
    ]
    return torch.tensor(values, dtype=torch.float32)


def wall_worker():
    def critic(obs, subgoal, action):
        assert torch.equal(action, subgoal / 2)  # the worker's own action
        q = wall_q(obs[:, :2], subgoal)
        return torch.stack([q + 1, q])  # the smaller one counts

    return SimpleNamespace(actor=lambda obs, subgoal: subgoal / 2, critic=critic)


def loop_planner(landmarks, query, goals, args):
    """Section 12 in plain Python: straight values, cutoffs, Bellman and Ford, choice, shift."""

    def value(a, b):
        a, b = torch.tensor([a], dtype=torch.float32), torch.tensor([b], dtype=torch.float32)
        return min(wall_q(a, b - a).item(), 0.0)

    n, nodes = len(landmarks), landmarks + goals
    edges = [[value(a, b) for b in nodes] for a in landmarks]
    for j in range(len(nodes)):
        threshold = min(max(edges[i][j] for i in range(n) if i != j), args.edge_cutoff)
        for i in range(n):
            edges[i][j] = 0.0 if i == j else edges[i][j] - 1e6 * (edges[i][j] < threshold)
    result = []
    for b, here in enumerate(query):
        paths = bellman_ford(edges, n + b)
        first = [value(here, landmark) for landmark in landmarks]
        total = [f - 1e6 * (f < args.edge_cutoff) + p for f, p in zip(first, paths)]
        chosen = landmarks[int(np.argmax(total))]
        if value(here, goals[b]) > args.direct_value:
            chosen = goals[b]
        difference = np.subtract(chosen, here)
        result.append(here + args.landmark_shift * difference / max(np.linalg.norm(difference), 1e-12))
    return result, edges


def plan(worker, novelty, buffer, obs, goal, args):
    """With a graph made for this plan."""
    args.novelty_landmarks = len(novelty.obs)
    graph = gcmr.LandmarkGraph(obs.shape[-1], args)
    graph.renew(worker, novelty, buffer, goal.shape[-1], args)
    return gcmr.plan_landmarks(worker, graph, obs, goal, args)


def novel(obs):
    """A queue of these landmarks."""
    return SimpleNamespace(obs=obs, score=torch.ones(len(obs)))


@pytest.mark.parametrize("search", ["exact", "soft"])
@pytest.mark.parametrize("empty", [0, 3])
def test_plan_equals_a_loop(search, empty):
    """Empty places of the queue lie in the best spot there is, and must not be used."""
    rng = np.random.default_rng(0)
    args = make_args(coverage_landmarks=9, coverage_pool=60, path_search=search, path_heat=200.0)
    args.landmark_shift = 0.8
    pool = torch.tensor(rng.uniform(0, 8, (60, 5)), dtype=torch.float32)
    asked = []
    buffer = SimpleNamespace(sample=lambda count: asked.append(count) or SimpleNamespace(obs=pool))
    found = torch.tensor(rng.uniform(0, 8, (4, 5)), dtype=torch.float32)
    obs = torch.tensor(rng.uniform(0, 8, (20, 5)), dtype=torch.float32)
    goal = torch.tensor(rng.uniform(0, 8, (20, 2)), dtype=torch.float32)
    novelty = novel(torch.cat([found, torch.cat([goal[:empty], torch.zeros(empty, 3)], 1)]))
    novelty.score[4:] = -torch.inf
    goal[3] = obs[3, :2] + 0.5  # near: gone to directly
    planned = plan(wall_worker(), novelty, buffer, obs, goal, args)
    assert asked == [60] and not planned.requires_grad
    coverage = pool[farthest(pool[:, :2], 9), :2].tolist()
    expected, edges = loop_planner(coverage + found[:, :2].tolist(), obs[:, :2].tolist(), goal.tolist(), args)
    assert np.sum(np.array(edges) < -1e5) > 10  # the wall cut edges
    np.testing.assert_allclose(planned, expected, atol=1e-3)
    away = (planned - obs[:, :2]).norm(dim=1)
    torch.testing.assert_close(away, torch.full((20,), 0.8))
    toward = goal[3] - obs[3, :2]
    torch.testing.assert_close(planned[3], obs[3, :2] + 0.8 * toward / toward.norm())


def test_plan_goes_round_the_wall():
    spots = torch.tensor([[1.0, 1.0], [4.0, 1.0], [7.0, 1.0], [8.0, 4.0], [7.0, 7.0], [4.0, 7.0], [1.0, 7.0]])
    obs = torch.cat([torch.tensor([[1.5, 1.0]]), torch.zeros(1, 3)], 1)
    buffer = SimpleNamespace(
        sample=lambda count: SimpleNamespace(obs=torch.cat([spots, torch.zeros(7, 3)], 1))
    )
    novelty = novel(torch.zeros(0, 5))  # before the first episode's end
    goal = torch.tensor([[1.5, 7.0]])
    planned = plan(wall_worker(), novelty, buffer, obs, goal, make_args(coverage_pool=7))
    step = planned - obs[:, :2]
    assert step[0, 0] > 1.5  # to the right, although the goal is straight above


def test_a_first_edge_that_is_too_long_is_cut():
    """Straight over (10, 0) would cost 48, over (6, 3) 53.7; but the first edge of 40 is beyond -38."""
    spots = torch.tensor([[10.0, 0.0], [6.0, 3.0]])
    buffer = SimpleNamespace(
        sample=lambda count: SimpleNamespace(obs=torch.cat([spots, torch.zeros(2, 3)], 1))
    )
    novelty = novel(torch.zeros(0, 5))
    obs, goal = torch.zeros(1, 5), torch.tensor([[12.0, 0.0]])
    planned = plan(wall_worker(), novelty, buffer, obs, goal, make_args(coverage_pool=2))
    torch.testing.assert_close(planned, torch.tensor([[6.0, 3.0]]) * 2 / 45**0.5)
    planned = plan(wall_worker(), novelty, buffer, obs, goal, make_args(coverage_pool=2, edge_cutoff=-41.0))
    torch.testing.assert_close(planned, torch.tensor([[2.0, 0.0]]))


def test_plan_with_networks_and_without_gradient():
    worker, novelty = make_worker(), make_novelty(6)
    novelty.visit(torch.randn(50, 6) * 3, make_args())
    buffer = gcmr.ReplayBuffer(100, "cpu", obs=(6,))
    for row in np.random.default_rng(0).normal(size=(100, 6)):
        buffer.add(obs=row)
    obs, goal = torch.randn(7, 6), torch.randn(7, 2)
    with torch.no_grad():  # every target network is useless: planning must not ask one
        for parameter in [*worker.target_actor_params, *worker.target_critic_params]:
            parameter.fill_(torch.nan)
    for search in ("exact", "soft"):
        args = make_args(coverage_pool=50, coverage_landmarks=10, path_search=search, direct_value=5.0)
        planned = plan(worker, novelty, buffer, obs, goal, args)
        torch.testing.assert_close((planned - obs[:, :2]).norm(dim=1), torch.full((7,), 2.0))
    assert all(p.grad is None for p in worker.actor_params + worker.critic_params)


def test_plan_in_bfloat16_chooses_alike():
    """A worker whose values are distances: the choice of nearly all queries survives the lower precision."""
    worker, novelty = make_worker(), make_novelty(6)
    buffer = gcmr.ReplayBuffer(200, "cpu", obs=(6,))
    for row in np.random.default_rng(1).normal(size=(200, 6)):
        buffer.add(obs=5 * row)
    obs, goal = 5 * torch.randn(40, 6), 5 * torch.randn(40, 2)
    plans, seen, forward = [], [], worker.critic.forward
    worker.critic.forward = lambda *inputs: seen.append(torch.is_autocast_enabled("cpu")) or forward(*inputs)
    for low in (False, True):
        seen.clear()
        torch.manual_seed(0)
        args = make_args(coverage_pool=100, coverage_landmarks=20, planner_bfloat16=low, direct_value=5.0)
        plans.append(plan(worker, novelty, buffer, obs, goal, args))
        assert any(seen) == low  # or the flag did nothing
    same = (plans[0] - plans[1]).norm(dim=1) < 0.1
    assert plans[1].dtype == torch.float32 and same.float().mean() > 0.7


def test_a_graph_is_kept_for_some_plans():
    """Three plans with the same landmarks, then new ones; a copy from a checkpoint goes on alike."""
    novelty = novel(torch.tensor([[7.0, 7.0, 0, 0, 0]]))
    buffer = SimpleNamespace(sample=lambda count: SimpleNamespace(obs=8 * torch.rand(count, 5)))
    settings = dict(coverage_landmarks=6, coverage_pool=30, novelty_landmarks=1)
    args = make_args(planner_keeps_graph=3, **settings)
    graph = gcmr.LandmarkGraph(5, args)
    assert [graph.next_is_new(args) for _ in range(7)] == [True, False, False, True, False, False, True]
    graph.renew(wall_worker(), novelty, buffer, 2, args)
    assert graph.edges.shape == (7, 7) and torch.equal(graph.obs[-1], novelty.obs[0])
    copy = gcmr.LandmarkGraph(5, args)
    copy.load_state_dict(graph.state_dict())
    assert [copy.next_is_new(args) for _ in range(3)] == [False, False, True]
    assert torch.equal(graph.obs, copy.obs) and torch.equal(graph.edges, copy.edges) and copy.present.all()
    for i, a in enumerate(graph.obs[:, :2]):
        for j, b in enumerate(graph.obs[:, :2]):
            assert graph.edges[i, j].item() == pytest.approx(
                min(wall_q(a[None], (b - a)[None]).item(), 0.0), abs=1e-4
            )


def test_a_picture_of_another_maze_has_no_landmarks_of_the_old_one(tmp_path, monkeypatch, capsys):
    agent = Path(__file__).parents[1] / "benchmark" / "agents" / "aclg_gcmr.pt"
    marked, recorder = [], gcmr.Recorder
    monkeypatch.setattr(gcmr, "evaluate", lambda *inputs: {})
    monkeypatch.setattr(gcmr, "Recorder", lambda *inputs: marked.append(len(inputs[3])) or recorder(*inputs))
    for env in ("AntMaze-U", "AntMaze-ULarge"):
        flags = ["--eval-only", "--checkpoint", str(agent), "--env", env, "--run-dir", str(tmp_path)]
        gcmr.main(gcmr.parse_args(flags))
    assert marked[0] > 0 and marked[1] == 0
