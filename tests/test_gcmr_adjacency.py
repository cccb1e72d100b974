"""Which cells are adjacent, the embedding that learns it, and the manager's hinge on it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import aclg_gcmr as gcmr

torch.set_num_threads(1)


def make_args(**settings):
    return gcmr.Args(**settings)


def make_adjacency(dims=2, seed=0, **settings):
    torch.manual_seed(seed)
    return gcmr.Adjacency(dims, make_args(**settings))


def neighbours(adjacency):
    """Pairs of different adjacent cells, each once, as sets."""
    cells = list(adjacency.cells)
    rows, columns = np.nonzero(adjacency.matrix)
    return {frozenset((cells[a], cells[b])) for a, b in zip(rows, columns) if a != b}


def as_pairs(*names):
    """'00-10' -> {(0, 0), (1, 0)}"""
    return {frozenset(tuple(int(digit) for digit in cell) for cell in name.split("-")) for name in names}


# --------------------------------------------------------------------------------------------- cells: G2

PATH_A = np.array([(0, 0), (0.5, 0), (0.6, 0), (1.5, 0), (2.4, 0), (2.5, 0.5), (3.5, 0), (5.2, 0)])
PATH_B = np.array([(0, 2), (1, 2), (1, 1)], float)
WITHIN_B = as_pairs("02-12", "02-11", "12-11")


@pytest.mark.parametrize(
    "factor, lags, within_a",
    [
        (0.5, 4, as_pairs("00-10", "00-20", "10-20", "10-40", "20-40", "20-50", "40-50")),
        (0.7, 6, None),
        (1.0, 9, None),
    ],
)
def test_adjacent_cells_g2(factor, lags, within_a):
    adjacency = make_adjacency(adjacency_factor=factor)
    assert adjacency.lags == lags
    adjacency.add_trajectory(PATH_A), adjacency.add_trajectory(PATH_B)
    assert set(adjacency.cells) == {(0, 0), (1, 0), (2, 0), (4, 0), (5, 0), (0, 2), (1, 2), (1, 1)}
    if within_a is None:
        within_a = as_pairs(
            *(f"{a}-{b}" for a in "00 10 20 40 50".split() for b in "00 10 20 40 50".split() if a < b)
        )
        assert len(within_a) == 10
    assert neighbours(adjacency) == within_a | WITHIN_B
    assert adjacency.matrix.diagonal().all() and (adjacency.matrix == adjacency.matrix.T).all()
    assert adjacency.positions == 11


def test_order_of_cells_g2():
    adjacency = make_adjacency()
    adjacency.add_trajectory(PATH_A), adjacency.add_trajectory(PATH_B)
    assert list(adjacency.cells) == [(0, 0), (1, 0), (2, 0), (4, 0), (5, 0), (0, 2), (1, 2), (1, 1)]
    assert list(adjacency.cells.values()) == list(range(8))


def test_halves_go_to_even_cells_also_below_zero():
    adjacency = make_adjacency()
    adjacency.add_trajectory(np.array([(0.5, -0.5), (1.5, -1.5), (2.5, -2.5), (-0.4, -7.6)]))
    assert list(adjacency.cells) == [(0, 0), (2, -2), (0, -8)]


def test_every_dimension_makes_a_cell():
    adjacency = make_adjacency(4)
    adjacency.add_trajectory(np.array([(0, 0, 0, 4), (0, 0, 0, 5), (0, 0, 1, 4)], float))
    assert len(adjacency.cells) == 3


def test_cells_equal_a_loop_and_are_never_unset():
    rng = np.random.default_rng(0)
    paths = [np.cumsum(rng.normal(0, 0.6, (n, 2)), 0) + rng.uniform(-5, 5, 2) for n in (80, 1, 3, 60, 120)]
    adjacency, expected, known = make_adjacency(), set(), []
    for path in paths:
        before = neighbours(adjacency)
        adjacency.add_trajectory(path)
        cells = [tuple(int(round(x)) for x in point) for point in path.tolist()]  # Python: halves to even
        known = list(dict.fromkeys(known + cells))
        for i in range(len(cells)):
            for j in range(i + 1, len(cells)):
                if j - i <= 4 and cells[i] != cells[j]:
                    expected.add(frozenset((cells[i], cells[j])))
        assert before <= neighbours(adjacency) == expected
        assert list(adjacency.cells) == known
        assert len(adjacency.matrix) == len(known)
    assert adjacency.positions == 264


def test_more_cells_than_the_released_matrix_had():
    """1,000 there; here the matrix grows."""
    adjacency = make_adjacency()
    adjacency.add_trajectory(np.stack([np.arange(1200.0), np.zeros(1200)], 1))
    assert adjacency.matrix.shape == (1200, 1200)
    assert adjacency.matrix.sum() == 1200 + 2 * (1199 + 1198 + 1197 + 1196)


# -------------------------------------------------------------------------------------- the network's loss


@pytest.mark.parametrize("near, far, expected", [(1.0, 1.2, 0.25), (2.0, 2.4, 0.7)])
def test_contrastive_loss_g4(near, far, expected):
    distance, adjacent = torch.tensor([1.5, 0.5, 0.7, 1.3]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    args = make_args(adjacency_near=near, adjacency_far=far)
    assert gcmr.contrastive_loss(distance, adjacent, args).item() == pytest.approx(expected)


def test_contrastive_loss_pulls_and_pushes():
    distance = torch.tensor([1.5, 0.5, 0.7, 1.3], requires_grad=True)
    loss = gcmr.contrastive_loss(distance, torch.tensor([1.0, 1.0, 0.0, 0.0]), make_args())
    loss.backward()
    torch.testing.assert_close(distance.grad, torch.tensor([0.25, 0.0, -0.25, 0.0]))


def test_embedding_distance_has_a_gradient_at_zero():
    a = torch.zeros(3, 32, requires_grad=True)
    distance = gcmr.embedding_distance(a, torch.zeros(3, 32))
    distance.sum().backward()
    assert torch.isfinite(a.grad).all()
    torch.testing.assert_close(distance.detach(), torch.full((3,), 1e-6))
    b = torch.randn(5, 32)
    naive = [sum((b[0, d] - b[i, d]).item() ** 2 for d in range(32)) ** 0.5 for i in range(5)]
    torch.testing.assert_close(gcmr.embedding_distance(b[:1], b), torch.tensor(naive), rtol=1e-5, atol=2e-6)


def test_size_of_the_network():
    assert sum(p.numel() for p in make_adjacency().parameters()) == 37_536
    kinds = [type(layer).__name__ for layer in make_adjacency().embed]
    assert kinds == ["Linear", "ReLU"] * 3 + ["Linear"]


# -------------------------------------------------------------------------------------------------- hinge: G3


def quarter():
    return SimpleNamespace(embed=lambda z: z / 4)


def test_hinge_g3():
    achieved = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    subgoal = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    loss = gcmr.adjacency_loss(quarter(), achieved, subgoal, make_args())
    assert loss.item() == pytest.approx(0.075)
    assert make_args().adjacency_weight * loss.item() == pytest.approx(1.5)
    loss.backward()
    torch.testing.assert_close(subgoal.grad, torch.tensor([[0.075, 0.1], [0.0, 0.0]]))
    narrower = make_args(adjacency_near=1.0, adjacency_far=1.0)
    assert gcmr.adjacency_loss(quarter(), achieved, subgoal, narrower).item() == pytest.approx(0.125)


def test_hinge_leaves_the_network_alone():
    adjacency = make_adjacency()
    manager = torch.nn.Linear(2, 2)
    with torch.no_grad():
        manager.weight.mul_(100)
    loss = gcmr.adjacency_loss(adjacency, torch.randn(16, 2), manager(torch.randn(16, 2)), make_args())
    grads = torch.autograd.grad(loss, list(manager.parameters()))
    assert all(grad.abs().max() > 0 for grad in grads)
    assert all(p.grad is None for p in adjacency.parameters())


# ------------------------------------------------------------------------------------------------- training


def corridor(length=14, factor=0.5, **settings):
    """Walks along a corridor and back, a cell in every other step."""
    adjacency = make_adjacency(adjacency_factor=factor, **settings)
    path = np.stack([np.arange(0, length - 0.9, 0.5), np.zeros(2 * length - 1)], 1)
    adjacency.add_trajectory(path), adjacency.add_trajectory(path[::-1])
    return adjacency


def train(adjacency, **settings):
    args = make_args(**settings)
    optimizer = torch.optim.Adam(adjacency.parameters(), args.adjacency_lr)
    metrics = gcmr.train_adjacency(adjacency, optimizer, args)
    return {name: float(value) for name, value in metrics.items()}


def test_training_makes_adjacent_cells_near():
    adjacency = corridor()
    assert len(adjacency.cells) == 14
    settings = dict(adjacency_epochs=60, adjacency_batch_size=16, adjacency_lr=3e-3)
    metrics = train(adjacency, **settings)
    cells = torch.tensor(list(adjacency.cells), dtype=torch.float32)
    with torch.no_grad():
        embedded = adjacency.embed(cells)
    distance = torch.cdist(embedded, embedded)
    adjacent = torch.from_numpy(adjacency.matrix)
    others = ~torch.eye(14, dtype=torch.bool)
    near, far = distance[adjacent & others], distance[~adjacent]
    assert near.mean() < 1.0 < 1.2 < far.mean()
    assert (near < 1.1).float().mean() > 0.9 and (far > 1.1).float().mean() > 0.9
    assert metrics["adjacency/loss"] < 0.05
    # the manager's hinge then tells a subgoal within reach from one that is not
    here = torch.tensor([[5.0, 0.0]])
    within, beyond = (
        gcmr.adjacency_loss(adjacency, here, torch.tensor([[d, 0.0]]), make_args()).item() for d in (1.0, 7.0)
    )
    assert within < 0.05 < beyond


def test_positions_are_forgotten_and_cells_are_kept():
    adjacency = corridor()
    assert adjacency.positions == 54
    train(adjacency, adjacency_epochs=1)
    assert adjacency.positions == 0 and len(adjacency.cells) == 14
    adjacency.add_trajectory(np.array([(0.0, 0.0), (0.0, 3.0)]))
    assert adjacency.positions == 2 and len(adjacency.cells) == 15


def test_an_epoch_sees_every_pair_once_including_the_last_short_batch(monkeypatch):
    adjacency, seen, sizes = corridor(), [], []

    def spy(distance, adjacent, args):
        seen.append(adjacent.sum().item()), sizes.append(len(adjacent))
        return distance.mean()

    monkeypatch.setattr(gcmr, "contrastive_loss", spy)
    train(adjacency, adjacency_epochs=3)
    assert sizes == [64, 27] * 3  # 14 x 13 / 2 = 91 pairs
    inside = (adjacency.matrix.sum() - 14) / 2
    assert sum(seen) == 3 * inside


def test_the_reported_loss_is_that_of_the_last_epoch(monkeypatch):
    adjacency, count = corridor(), iter(range(100))
    monkeypatch.setattr(gcmr, "contrastive_loss", lambda distance, *_: distance.mean() * 0 + next(count))
    assert train(adjacency, adjacency_epochs=3)["adjacency/loss"] == 4.5  # of 0 .. 5, two per epoch


def test_a_single_cell_gives_no_nan():
    """No pair to learn from (an agent that never left its cell) must not look like a broken run."""
    adjacency = make_adjacency()
    adjacency.add_trajectory(np.zeros((20, 2)))
    before = [p.clone() for p in adjacency.parameters()]
    metrics = train(adjacency, adjacency_epochs=2)
    assert adjacency.positions == 0
    assert all(torch.equal(a, b) for a, b in zip(before, adjacency.parameters()))
    assert all(np.isfinite(value) for value in metrics.values())


# ----------------------------------------------------------------------------------------------- round trip


def test_round_trip(tmp_path):
    first = corridor()
    train(first, adjacency_epochs=3)
    first.add_trajectory(PATH_B - 4)
    torch.save(first.state_dict(), tmp_path / "adjacency.pt")
    second = make_adjacency(seed=3)
    second.load_state_dict(torch.load(tmp_path / "adjacency.pt", weights_only=True))
    assert second.cells == first.cells and list(second.cells) == list(first.cells)
    assert second.matrix.dtype == bool and (second.matrix == first.matrix).all()
    assert second.positions == first.positions == 3
    results = []
    for adjacency in (first, second):  # both go on alike, and apart from each other
        torch.manual_seed(0)
        adjacency.add_trajectory(PATH_A)
        results.append((train(adjacency, adjacency_epochs=2), neighbours(adjacency), list(adjacency.cells)))
    assert results[0] == results[1]
    points = torch.randn(9, 2)
    assert torch.equal(first.embed(points), second.embed(points))


def test_an_empty_one_survives_a_round_trip(tmp_path):
    torch.save(make_adjacency().state_dict(), tmp_path / "adjacency.pt")
    fresh = make_adjacency(seed=1)
    fresh.load_state_dict(torch.load(tmp_path / "adjacency.pt", weights_only=True))
    fresh.add_trajectory(PATH_B)
    assert neighbours(fresh) == WITHIN_B
