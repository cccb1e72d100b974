"""The dynamics model: its loss, draws, box and training."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import aclg_gcmr as gcmr

torch.set_num_threads(1)


def make_args(**settings):
    return gcmr.Args(**{"dynamics_hidden": 32, **settings})


def make_ensemble(obs_dim=4, action_dim=2, seed=0, **settings):
    torch.manual_seed(seed)
    return gcmr.DynamicsEnsemble(obs_dim, action_dim, make_args(**settings))


@torch.no_grad()
def constant_members(means, log_var, obs_dim=1, action_dim=1):
    """An ensemble whose member e predicts N(means[e], exp(log_var[e])) everywhere."""
    ensemble = make_ensemble(obs_dim, action_dim, dynamics_members=len(means))
    ensemble.layers[2].weight.zero_()
    ensemble.layers[2].bias[:, :obs_dim] = torch.tensor(means)[:, None]
    ensemble.layers[2].bias[:, obs_dim:] = torch.tensor(log_var)[:, None]
    return ensemble


# ------------------------------------------------------------------------------------------- clamp and loss


def test_clamped_log_variance_g10():
    v = torch.tensor([0.0, 5.0, -12.0, -20.0, 0.5], dtype=torch.float64)
    expected = torch.tensor([-0.4740041, 0.4889801, -9.8730724, -9.9999546, -0.1930921], dtype=torch.float64)
    torch.testing.assert_close(gcmr.clamp_log_variance(v), expected, rtol=0, atol=1e-7)


MEAN = torch.tensor([[[0.0, 1.0], [2.0, 0.0]], [[0.5, 1.0], [1.0, 0.0]]], dtype=torch.float64)
TARGET = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64).expand(2, 2, 2)
LOG_VAR = torch.tensor([[[0.0, -1.0], [0.2, -2.0]], [[0.0, 0.0], [-1.0, -1.0]]], dtype=torch.float64)


def test_loss_g10():
    assert gcmr.dynamics_loss(MEAN, LOG_VAR, TARGET).item() == pytest.approx(1.8440172, abs=1e-7)
    zero = torch.zeros_like(LOG_VAR)  # without variances: the sum of the members' squared errors
    assert gcmr.dynamics_loss(MEAN, zero, TARGET).item() == pytest.approx(0.75 + 0.3125)
    for member, (error, log_var) in enumerate([(2.3019467, -0.7), (0.7420705, -0.5)]):
        alone = gcmr.dynamics_loss(*(x[member : member + 1] for x in (MEAN, LOG_VAR, TARGET)))
        assert alone.item() == pytest.approx(error + log_var, abs=1e-7)


def test_loss_is_least_at_the_true_variance():
    errors = torch.randn(1, 4000, 1, dtype=torch.float64) * 0.7
    losses = {
        v: gcmr.dynamics_loss(errors, torch.full_like(errors, v), 0 * errors) for v in (-1.2, -0.7, -0.2)
    }
    assert min(losses, key=losses.get) == -0.7  # log 0.49 = -0.713


# ------------------------------------------------------------------------------------------------- networks


def test_size_of_a_member():
    ensemble = gcmr.DynamicsEnsemble(30, 8, gcmr.Args())
    assert sum(p.numel() for p in ensemble.parameters()) == 5 * 91_196


def test_initial_weights():
    torch.manual_seed(0)
    for layer in gcmr.DynamicsEnsemble(30, 8, gcmr.Args()).layers:
        std = 0.5 * layer.weight.shape[1] ** -0.5
        assert layer.weight.abs().max() <= 2 * std
        assert layer.weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)  # of a normal cut at 2 std
        assert (layer.bias == 0).all()


def test_forward_equals_a_loop_over_members():
    ensemble = make_ensemble()
    rng = np.random.default_rng(0)
    obs, action = rng.normal(3, 2, (7, 4)), rng.normal(0, 5, (7, 2))
    as_tensors = [torch.tensor(x, dtype=torch.float32) for x in (obs, action)]
    with torch.no_grad():
        for layer in ensemble.layers:
            layer.bias.normal_()
    ensemble.fit_statistics(*as_tensors, torch.randn(7, 4))
    mean, log_var = ensemble(*as_tensors)
    assert mean.shape == log_var.shape == (5, 7, 4)
    x = np.concatenate([obs, action], 1)
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    for e in range(5):
        h = x
        for number, layer in enumerate(ensemble.layers):
            h = h @ layer.weight[e].detach().numpy() + layer.bias[e].detach().numpy()
            if number < 2:
                h = h / (1 + np.exp(-h))  # swish
        np.testing.assert_allclose(mean[e].detach(), h[:, :4], atol=1e-4)
        raw = torch.tensor(h[:, 4:])
        np.testing.assert_allclose(log_var[e].detach(), gcmr.clamp_log_variance(raw), atol=1e-4)
    # a batch for each member instead of one for all
    each = torch.randn(5, 7, 4), torch.randn(5, 7, 2)
    for e in range(5):
        torch.testing.assert_close(ensemble(*each)[0][e], ensemble(each[0][e], each[1][e])[0][e])


def test_members_differ_and_see_positions():
    ensemble = make_ensemble()
    obs, action = torch.randn(6, 4), torch.randn(6, 2)
    mean, _ = ensemble(obs, action)
    for a in range(5):
        for b in range(a):
            assert (mean[a] - mean[b]).abs().max() > 1e-3
    moved = obs.clone()
    moved[:, :2] += 1
    assert (ensemble(moved, action)[0] - mean).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------- draws


def test_draws_follow_the_mixture_of_members():
    means, log_var = [-2.0, -1.0, 0.0, 1.0, 4.5], [-1.0, 0.0, -3.0, -0.5, -2.0]
    ensemble = constant_members(means, log_var)
    ensemble.delta_std.fill_(3.0), ensemble.delta_mean.fill_(10.0)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = ensemble.sample_delta(torch.zeros(60_000, 1), torch.zeros(60_000, 1)).double().numpy()[:, 0]
    variance = np.exp([gcmr.clamp_log_variance(torch.tensor(v, dtype=torch.float64)).item() for v in log_var])
    mean = 10 + 3 * np.mean(means)
    std = 3 * np.sqrt(np.mean(variance) + np.var(means))
    assert draws.mean() == pytest.approx(mean, abs=5 * std / 60_000**0.5)
    assert draws.std() == pytest.approx(std, rel=0.02)
    # Gaussian noise, not the released uniform one: symmetric around each member's mean
    single = constant_members([0.0], [-1.0])
    noise = (
        single.sample_delta(torch.zeros(20_000, 1), torch.zeros(20_000, 1)).detach().double().numpy()[:, 0]
    )
    std = np.exp(0.5 * gcmr.clamp_log_variance(torch.tensor(-1.0)).item())
    assert abs(noise.mean()) < 5 * std / 20_000**0.5
    assert noise.std() == pytest.approx(std, rel=0.02)
    assert np.mean(np.abs(noise) < std) == pytest.approx(0.6827, abs=0.015)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 64, 128])
def test_every_row_gets_its_own_prediction_from_one_member(rows):
    """Also where the rows are not a multiple of the members."""
    ensemble = make_ensemble()
    obs, action = torch.randn(rows, 4), torch.randn(rows, 2)
    with torch.no_grad():
        ensemble.layers[2].weight *= 4
        ensemble.layers[2].weight[:, :, 4:] = 0
        ensemble.layers[2].bias[:, 4:] = -30  # a std of 0.0067
        draw, (mean, _) = ensemble.sample_delta(obs, action), ensemble(obs, action)
    assert draw.shape == (rows, 4)
    distance = (draw - mean).abs().amax(-1)  # [E, rows]
    assert (distance.amin(0) < 0.05).all()  # some member's prediction for this very row


def members_of(rows, draws, members=5):
    """How often each member is drawn by each row. [draws, rows]"""
    ensemble = constant_members([float(e) for e in range(members)], [-30.0] * members)
    zeros = torch.zeros(rows, 1)
    with torch.no_grad():
        return torch.stack([ensemble.sample_delta(zeros, zeros)[:, 0] for _ in range(draws)]).round()


@pytest.mark.parametrize("rows", [5, 7, 12, 128])
def test_members_are_drawn_alike(rows):
    torch.manual_seed(0)
    drawn = members_of(rows, 400)
    share = torch.stack([(drawn == e).float().mean() for e in range(5)])
    assert share.min() > 0.1 and share.max() < 0.3, share
    own = torch.stack([(drawn == e).float().mean(0) for e in range(5)])  # of every row: no fixed member
    assert own.max() < 0.6, own


def test_gradient_flows_through_mean_and_noise_to_the_action():
    ensemble = make_ensemble().double()
    with torch.no_grad():
        ensemble.layers[2].weight *= 5
    obs = torch.randn(6, 4, dtype=torch.float64)
    action = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def total(action):
        torch.manual_seed(7)  # the same members and noise
        return (ensemble.sample_delta(obs, action) * torch.arange(1.0, 5.0)).sum()

    (slope,) = torch.autograd.grad(total(action), action)
    numeric = torch.zeros_like(slope)
    for i in range(6):
        for d in range(2):
            step = torch.zeros_like(slope)
            step[i, d] = 1e-5
            numeric[i, d] = (total(action + step) - total(action - step)).detach() / 2e-5
    assert numeric.abs().min() > 1e-4
    torch.testing.assert_close(slope, numeric, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ box


def test_box_is_the_range_widened_by_half_and_only_grows():
    ensemble = make_ensemble(2, 1)
    ensemble.widen_box(torch.tensor([[-2.0, 0.0], [4.0, 1.0], [0.0, 0.5]]))
    for _ in range(3):  # the released box grows with every training: -3..6, -4.5..9, -8.25..16.5
        low, high = ensemble.box()
        torch.testing.assert_close(low, torch.tensor([-5.0, -0.5]))
        torch.testing.assert_close(high, torch.tensor([7.0, 1.5]))
        ensemble.widen_box(torch.tensor([[-2.0, 0.2], [4.0, 0.3], [1.0, 0.2]]))
    ensemble.widen_box(torch.tensor([[-1.0, 0.2], [6.0, 0.3], [1.0, 0.2]]))  # 4 -> 6
    torch.testing.assert_close(torch.stack(ensemble.box()), torch.tensor([[-6.0, -0.5], [10.0, 1.5]]))


def test_predictions_stay_in_the_box():
    ensemble = constant_members([50.0, -50.0], [0.0, 0.0])
    ensemble.widen_box(torch.tensor([[0.0], [2.0]]))
    obs = torch.full((200, 1), 1.0)
    after = ensemble.predict_next(obs, torch.zeros(200, 1))
    assert set(after[:, 0].tolist()) == {-1.0, 3.0}
    ensemble = constant_members([0.0, 0.0], [-30.0, -30.0])  # inside: the old state and the change
    ensemble.widen_box(torch.tensor([[0.0], [2.0]]))
    ensemble.fit_statistics(torch.tensor([[0.0], [2.0]]), torch.zeros(2, 1), torch.tensor([[0.4], [0.6]]))
    torch.testing.assert_close(ensemble.predict_next(obs, obs * 0), obs + 0.5, rtol=0, atol=0.01)


def test_training_widens_the_box_by_all_states_also_the_last():
    """Held-out rows and the states after the last steps count too."""
    ensemble, args = make_ensemble(), make_args(dynamics_first_updates=1, dynamics_batch_size=16)
    optimizer, buffer = torch.optim.Adam(ensemble.parameters(), 1e-3), linear_buffer(50)
    gcmr.train_dynamics(ensemble, optimizer, buffer, args, 1)
    states = np.concatenate(
        [buffer.unpack(buffer.rows).obs.numpy(), buffer.unpack(buffer.rows).next_obs.numpy()]
    )
    low, high = states.min(0), states.max(0)
    np.testing.assert_allclose(ensemble.box()[0], low - (high - low) / 2, rtol=1e-5)
    np.testing.assert_allclose(ensemble.box()[1], high + (high - low) / 2, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- training

A = torch.tensor([[-0.1, 0.3, 0.0, 0.2], [0.0, -0.2, 0.1, 0.0], [0.2, 0.0, -0.3, 0.1], [0.0, 0.1, 0.0, -0.1]])
B = torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.3, -0.3], [-0.8, 0.2]])


def linear_data(rows, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(rows, 4, generator=generator) * torch.tensor([5.0, 1.0, 0.1, 2.0])
    action = torch.rand(rows, 2, generator=generator) * 2 - 1
    delta = obs @ A.T + action @ B.T
    return obs, action, delta + noise * delta.std(0) * torch.randn(delta.shape, generator=generator)


def linear_buffer(rows, capacity=None, **kwargs):
    buffer = gcmr.ReplayBuffer(capacity or rows, "cpu", obs=(4,), action=(2,), next_obs=(4,))
    obs, action, delta = linear_data(rows, **kwargs)
    for o, a, n in zip(obs.numpy(), action.numpy(), (obs + delta).numpy()):
        buffer.add(obs=o, action=a, next_obs=n)
    return buffer


TRAINING = dict(dynamics_first_updates=400, dynamics_updates=100, dynamics_batch_size=128)


@pytest.fixture(scope="module")
def trained():
    """An ensemble after two trainings on a linear system with a tenth of noise."""
    ensemble, args = make_ensemble(seed=1), make_args(**TRAINING)
    optimizer = torch.optim.Adam(ensemble.parameters(), args.dynamics_lr)
    buffer = linear_buffer(2000, noise=0.1)
    first = gcmr.train_dynamics(ensemble, optimizer, buffer, args, 500)
    trained_at = ensemble.trained_at
    second = gcmr.train_dynamics(ensemble, optimizer, buffer, args, 700)
    return SimpleNamespace(
        model=ensemble, first=first, second=second, trained_at=(trained_at, ensemble.trained_at)
    )


def test_training_learns_a_linear_system(trained):
    assert trained.trained_at == (500, 700)
    assert "dynamics/error_before" not in trained.first  # an untrained model has no error worth a line
    assert trained.first["dynamics/error"] < 0.08  # 0.01 is the noise
    assert trained.second["dynamics/error_before"] < 0.08
    assert trained.second["dynamics/error"] < 0.05
    obs, action, delta = linear_data(1000, seed=99)
    error = trained.model.relative_error(obs, action, delta)
    assert error < 0.05
    prediction = (
        trained.model(obs, action)[0].detach().mean(0) * trained.model.delta_std + trained.model.delta_mean
    )
    squares = (prediction - delta).square().mean(0).numpy()
    variances = [max(np.var(delta[:, d].numpy()), float(trained.model.delta_std[d]) ** 2) for d in range(4)]
    naive = np.mean([squares[d] / variances[d] for d in range(4)])
    assert error == pytest.approx(naive, rel=0.01)


def test_error_of_what_moves_in_training_rows_only():
    """A block that is pushed once, in rows that are not held out: its error is of their scale."""
    ensemble, (obs, action, delta) = make_ensemble(), linear_data(500)
    moved = delta.clone()
    moved[:50, 3] += 5.0
    moved[50:, 3] = 0.0
    ensemble.fit_statistics(obs, action, moved)
    assert ensemble.relative_error(obs[50:], action[50:], moved[50:]) < 2


def test_an_untrained_model_knows_nothing():
    ensemble, (obs, action, delta) = make_ensemble(), linear_data(500)
    ensemble.fit_statistics(obs, action, delta)
    assert ensemble.relative_error(obs, action, delta) > 0.7
    assert ensemble.relative_error(obs, action, delta[torch.randperm(500)]) > 0.7


def test_trained_members_differ_and_know_the_noise(trained):
    obs, action, delta = linear_data(500, seed=99)
    mean, log_var = trained.model(obs, action)
    for a in range(5):
        for b in range(a):
            assert (mean[a] - mean[b]).abs().mean() > 1e-3
    assert (0.5 * log_var).exp().mean().item() == pytest.approx(0.1, rel=0.7)  # of the standardised change
    after = trained.model.predict_next(obs, action)
    residual = ((after - obs - delta) / delta.std(0)).std().item()
    assert 0.05 < residual < 0.35


def test_training_standardises_by_its_own_rows(trained):
    obs, _, delta = linear_data(2000, noise=0.1)
    torch.testing.assert_close(trained.model.input_std[:4], obs.std(0), rtol=0.05, atol=0)
    torch.testing.assert_close(trained.model.delta_std, delta.std(0), rtol=0.05, atol=0)


def test_updates_of_first_and_later_trainings():
    ensemble = make_ensemble()
    steps = SimpleNamespace(count=0)
    optimizer = torch.optim.Adam(ensemble.parameters(), 1e-3)
    optimizer.register_step_post_hook(lambda *_: setattr(steps, "count", steps.count + 1))
    args = make_args(dynamics_first_updates=7, dynamics_updates=3, dynamics_batch_size=16)
    buffer = linear_buffer(100)
    gcmr.train_dynamics(ensemble, optimizer, buffer, args, 50)
    assert steps.count == 7
    gcmr.train_dynamics(ensemble, optimizer, buffer, args, 60)
    assert steps.count == 10


def test_rows_of_a_training(monkeypatch):
    """Beyond dynamics_rows: that many random rows and a fifth as many of the newest; 20 % are held out."""
    ensemble, seen = make_ensemble(), []
    fit, judge = ensemble.fit_statistics, ensemble.relative_error
    monkeypatch.setattr(ensemble, "fit_statistics", lambda *data: seen.append(data) or fit(*data))
    monkeypatch.setattr(ensemble, "relative_error", lambda *data: seen.append(data) or judge(*data))
    optimizer = torch.optim.Adam(ensemble.parameters(), 1e-3)
    args = make_args(dynamics_rows=100, dynamics_first_updates=1, dynamics_batch_size=16)
    buffer = linear_buffer(700, capacity=600)  # the ring has wrapped
    gcmr.train_dynamics(ensemble, optimizer, buffer, args, 50)
    (data, held_out) = seen
    used = torch.cat([data[0], held_out[0]])
    assert 90 < len(used) <= 120 and len(used.unique(dim=0)) == len(used)  # nothing on both sides
    assert len(used) / 10 < len(held_out[0]) < len(used) / 3
    first_data = data[0]
    newest = linear_data(700)[0][-20:]
    assert all((used == row).all(1).any() for row in newest)  # every one of them
    forgotten = linear_data(700)[0][:100]
    assert not any((used == row).all(1).any() for row in forgotten)
    for obs, action, delta in seen:  # rows stay together, and the target is the change
        torch.testing.assert_close(delta, obs @ A.T + action @ B.T, rtol=1e-4, atol=1e-5)

    seen.clear()
    args.dynamics_rows = 600
    gcmr.train_dynamics(ensemble, optimizer, buffer, args, 60)  # not beyond: each row once
    used = torch.cat([seen[1][0], seen[2][0]])  # error before, statistics, error after
    assert len(used) == 600 and len(used.unique(dim=0)) == 600
    assert len(seen[0][0]) == 120  # a fifth, of which no row was ever trained on
    assert not any((first_data == row).all(1).any() for row in seen[0][0])


def test_each_member_has_its_own_rows(monkeypatch):
    ensemble, shapes = make_ensemble(), []
    forward = ensemble.forward

    def spy(obs, action):
        if obs.ndim == 3:
            shapes.append(obs.clone())
        return forward(obs, action)

    monkeypatch.setattr(ensemble, "forward", spy)
    args = make_args(dynamics_first_updates=1, dynamics_batch_size=64)
    gcmr.train_dynamics(ensemble, torch.optim.Adam(ensemble.parameters(), 1e-3), linear_buffer(500), args, 1)
    assert shapes[0].shape == (5, 64, 4)
    assert not torch.equal(shapes[0][0], shapes[0][1])


def test_constant_entries_are_harmless():
    """Entries of obs that never change have no variance to divide by."""
    buffer = gcmr.ReplayBuffer(600, "cpu", obs=(4,), action=(2,), next_obs=(4,))
    obs, action, delta = linear_data(600)
    obs[:, 3], delta[:, 3] = 3.3, 0.0
    for o, a, n in zip(obs.numpy(), action.numpy(), (obs + delta).numpy()):
        buffer.add(obs=o, action=a, next_obs=n)
    ensemble, args = make_ensemble(), make_args(**TRAINING)
    metrics = gcmr.train_dynamics(ensemble, torch.optim.Adam(ensemble.parameters(), 5e-3), buffer, args, 1)
    assert metrics["dynamics/error"] < 0.1
    after = ensemble.predict_next(obs, action)
    assert torch.isfinite(after).all() and (after[:, 3] - 3.3).abs().max() < 1e-3


# ------------------------------------------------------------------------------------------------ round trip


def test_round_trip(trained, tmp_path):
    torch.save(trained.model.state_dict(), tmp_path / "model.pt")
    fresh = make_ensemble(seed=5)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert fresh.trained_at == 700
    obs, action, _ = linear_data(50, seed=3)
    draws = []
    for model in (trained.model, fresh):
        torch.manual_seed(0)
        draws.append(model.predict_next(obs, action))
    assert torch.equal(*draws)
    assert torch.equal(torch.stack(fresh.box()), torch.stack(trained.model.box()))


def test_training_goes_on_the_same_after_a_round_trip(trained, tmp_path):
    args, buffer = make_args(**{**TRAINING, "dynamics_updates": 5}), linear_buffer(300)
    first = copy.deepcopy(trained.model)
    optimizer = torch.optim.Adam(first.parameters(), 5e-3)
    gcmr.train_dynamics(first, optimizer, buffer, args, 800)
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "both.pt")
    second = make_ensemble(seed=5)
    again = torch.optim.Adam(second.parameters(), 5e-3)
    for part, state in zip((second, again), torch.load(tmp_path / "both.pt", weights_only=True)):
        part.load_state_dict(state)
    results = []
    for model, adam in ((first, optimizer), (second, again)):
        torch.manual_seed(0)
        results.append(gcmr.train_dynamics(model, adam, buffer, args, 900))
    assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_an_entry_that_never_moved():
    """Constant in the data, as a block before the first push: its first move must not be an input of 1e6."""
    torch.manual_seed(0)
    dynamics = make_ensemble(3)
    obs = torch.randn(50, 3)
    obs[:, 1] = 4.0
    dynamics.fit_statistics(obs, torch.randn(50, 2), torch.randn(50, 3))
    still, action = torch.tensor([[0.0, 4.0, 0.0]]), torch.zeros(1, 2)
    moved = torch.tensor([[0.0, 4.1, 0.0]])
    by_hand = torch.cat([still, action], 1) - dynamics.input_mean
    inputs = []
    hook = lambda layer, given: inputs.append(given[0][0, 0])  # noqa: E731
    dynamics.layers[0].register_forward_pre_hook(hook)
    dynamics(still, action)
    dynamics(moved, action)
    assert inputs[0][1] == by_hand[0, 1] == 0
    assert inputs[1][1].item() == pytest.approx(0.1, rel=1e-4)
