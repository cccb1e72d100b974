"""What happens when: counts of updates, the order at episode ends, settings of the environments."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ToyEnv

import aclg_gcmr as gcmr


def make_args(**settings):
    return gcmr.Args(**settings)


# ----------------------------------------------------------------------------------------------- counts: G17


def count(phases, **settings):
    """Run UpdateCounts over (updates, model_trained) phases; totals after each."""
    counts, args, totals, rows = gcmr.UpdateCounts(), make_args(**settings), np.zeros(4, int), []
    for updates, model_trained in phases:
        for _ in range(updates):
            due = counts.next(model_trained, args)
            totals += [1, due["with_actor"], due["with_penalty"], due["with_planning"]]
        rows.append(totals.tolist())
    assert counts.critic == totals[0]
    return rows


G17 = [(500, False), (19_500, False), (2_500, True), (2_500, True)]  # to steps 500, 20,000, 20,500, 21,000


def test_counts_g17_of_the_released_code():
    rows = count(G17, gradient_penalty_every=6, rollout_planning_every=11)
    assert rows == [
        [500, 100, 0, 0],
        [20_000, 4_000, 0, 0],
        [22_500, 4_500, 417, 46],
        [25_000, 5_000, 834, 91],
    ]


def test_counts_g17_of_the_paper():
    rows = count(G17)
    assert rows[:2] == [[500, 100, 0, 0], [20_000, 4_000, 0, 0]]
    assert rows[2:] == [[22_500, 4_500, 500, 50], [25_000, 5_000, 1_000, 100]]


def test_first_updates_with_the_model():
    """The first critic update with a model has the penalty, the first actor update the planning loss."""
    counts, args = gcmr.UpdateCounts(), make_args()
    for _ in range(7):  # the actor's turn comes at multiples of 5 whatever the model does
        counts.next(False, args)
    due = [counts.next(True, args) for _ in range(60)]
    assert [i for i, d in enumerate(due) if d["with_penalty"]] == list(range(0, 60, 5))
    assert [i for i, d in enumerate(due) if d["with_actor"]] == list(range(2, 60, 5))
    assert [i for i, d in enumerate(due) if d["with_planning"]] == [2, 52]
    assert all(set(d) == {"with_actor", "with_penalty", "with_planning"} for d in due)


def test_terms_of_weight_zero_are_never_due():
    none = count(G17, gradient_penalty_weight=0.0, rollout_planning_weight=0.0)[-1]
    assert none == [25_000, 5_000, 0, 0]
    assert count(G17, gradient_penalty_weight=0.0)[-1] == [25_000, 5_000, 0, 100]
    assert count(G17, rollout_planning_weight=0.0)[-1] == [25_000, 5_000, 1_000, 0]


def test_actor_at_every_update():
    assert count([(30, False)], worker_actor_every=1) == [[30, 30, 0, 0]]


def test_counts_round_trip(tmp_path):
    args, first, second = make_args(), gcmr.UpdateCounts(), gcmr.UpdateCounts()
    for i in range(233):
        first.next(i > 100, args)
    torch.save(first.state_dict(), tmp_path / "counts.pt")
    second.load_state_dict(torch.load(tmp_path / "counts.pt", weights_only=True))
    assert [first.next(True, args) for _ in range(120)] == [second.next(True, args) for _ in range(120)]
    assert vars(first) == vars(second)


def test_latest_rows_of_a_full_ring():
    buffer = gcmr.ReplayBuffer(5, "cpu", x=())
    for i in range(7):
        buffer.add(x=i)
    assert buffer.latest(4).x.tolist() == [3, 4, 5, 6]


# ----------------------------------------------------------------------- the loop, with recorded stand-ins


@pytest.fixture
def schedule(toy_run, monkeypatch):
    """schedule(steps, **settings): what main() called, as (step, name, details) in order."""

    def schedule(steps, limit=50, death=None, **settings):
        events, env = [], ToyEnv(limit, death)
        # the updates of a step are made before the step is taken
        note = lambda name, offset, **details: events.append(  # noqa: E731
            SimpleNamespace(step=len(env.log) + offset, name=name, **details)
        )

        def learns(optimizer, param, lr):
            """It steps that network, at its own rate (the three differ)."""
            (group,) = optimizer.param_groups
            assert group["params"][0] is param and group["lr"] == lr

        def update_worker(worker, manager, dynamics, buffer, manager_buffer, args, **due):
            note("worker", 1, stored=len(buffer), **due)
            return {}

        def update_manager(
            manager, worker, dynamics, adjacency, novelty, graph, buffer, worker_buffer, args, **due
        ):
            assert all(type(flag) is bool for flag in due.values())  # they tell CUDA graphs apart
            note("manager", 1, stored=len(buffer), **due)
            return {}

        def train_dynamics(dynamics, optimizer, buffer, args, step):
            learns(optimizer, next(dynamics.parameters()), args.dynamics_lr)
            note("dynamics", 0, given=step)
            dynamics.trained_at = step
            return {}

        def train_adjacency(adjacency, optimizer, args):
            learns(optimizer, next(adjacency.parameters()), args.adjacency_lr)
            note("adjacency", 0, positions=adjacency.positions)
            adjacency.positions = 0
            return {}

        def update_novelty(novelty, optimizer, buffer, args):
            learns(optimizer, next(novelty.predictor.parameters()), args.novelty_lr)
            note("novelty", 0)
            return {}

        stubs = (update_worker, update_manager, train_dynamics, train_adjacency, update_novelty)
        for stub in stubs:
            monkeypatch.setattr(gcmr, stub.__name__, stub)
        monkeypatch.setattr(
            gcmr.Novelty, "visit", lambda self, obs, args: note("visit", 0, obs=obs.clone().numpy())
        )
        settings = dict(dynamics_hidden=8, worker_buffer=1000, manager_buffer=100) | settings
        toy_run(gcmr, steps, env, **SMALL | settings)
        return events

    return schedule


SMALL = dict(
    learning_starts=50, dynamics_starts=200, dynamics_every=100, planner_starts=280, adjacency_every=204,
    gradient_penalty_every=6, rollout_planning_every=11,
)  # fmt: skip


def totals(events, until):
    """Critic, actor, manager updates, penalties and planning losses up to a step."""
    worker = [e for e in events if e.name == "worker" and e.step <= until]
    manager = sum(e.name == "manager" and e.step <= until for e in events)
    flags = [
        sum(getattr(e, name) for e in worker) for name in ("with_actor", "with_penalty", "with_planning")
    ]
    return [len(worker), flags[0], manager, *flags[1:]]


def test_updates_per_step(schedule):
    """G17 at a hundredth of the size: one critic update per step, five once the model is trained."""
    events = schedule(300)
    assert totals(events, 50) == [0, 0, 0, 0, 0]
    assert totals(events, 200) == [150, 30, 15, 0, 0]
    assert totals(events, 250) == [400, 80, 20, 42, 5]  # 250 / 6, 50 / 11, rounded up
    assert totals(events, 300) == [650, 130, 25, 84, 10]
    per_step = np.bincount([e.step for e in events if e.name == "worker"], minlength=301)
    assert (per_step[:51] == 0).all() and (per_step[51:201] == 1).all() and (per_step[201:] == 5).all()
    manager = [e for e in events if e.name == "manager"]
    assert [e.step for e in manager] == list(range(60, 301, 10))
    assert [e.with_planner for e in manager] == [e.step >= 280 for e in manager]
    assert [e.with_new_graph for e in manager] == [e.step >= 280 for e in manager]
    assert [e.with_model for e in manager] == [e.step > 200 for e in manager]
    assert all(e.stored >= 5 for e in manager)


@pytest.mark.parametrize(
    "settings, flag, steps",
    [
        (dict(model_relabeling=False), "with_model", []),
        (dict(rollout_weight=1.0), "with_model", []),
        (dict(rollout_weight=0.0), "with_model", [*range(210, 361, 10)]),  # by the model alone
        (dict(planner_keeps_graph=3), "with_new_graph", [280, 310, 340]),
        (dict(landmark_weight=0.0), "with_planner", []),
        (dict(landmark_weight=0.0), "with_new_graph", []),
    ],
)
def test_what_the_manager_s_updates_contain(schedule, settings, flag, steps):
    events = [e for e in schedule(360, **settings) if e.name == "manager"]
    assert [e.step for e in events if getattr(e, flag)] == steps and len(events) == 31


@pytest.mark.parametrize(
    "settings, per_step",
    [
        (dict(gradient_penalty_weight=0.0), (1, 1)),
        (dict(worker_critic_updates=5, gradient_penalty_weight=0.0), (5, 5)),
        (dict(worker_critic_updates_with_penalty=2), (1, 2)),
    ],
)
def test_number_of_critic_updates(schedule, settings, per_step):
    events = schedule(260, **settings)
    numbers = np.bincount([e.step for e in events if e.name == "worker"], minlength=261)
    assert (numbers[51:201] == per_step[0]).all() and (numbers[201:] == per_step[1]).all()
    if "gradient_penalty_weight" in settings:
        assert not any(e.with_penalty for e in events if e.name == "worker")
        assert any(e.with_planning for e in events if e.name == "worker")


def test_trainings_at_episode_ends(schedule):
    events = [e for e in schedule(500) if e.name not in ("worker", "manager")]
    at = {
        name: [e.step for e in events if e.name == name]
        for name in ("visit", "novelty", "adjacency", "dynamics")
    }
    assert at["visit"] == list(range(50, 501, 50))
    assert at["novelty"] == np.repeat(at["visit"], 50).tolist()  # as many as the episode had steps
    assert at["adjacency"] == [200, 400]  # 51 positions per episode
    assert at["dynamics"] == [200, 300, 400, 500]
    order = [e.name for e in events if e.step == 200]
    assert order == ["visit", *50 * ["novelty"], "adjacency", "dynamics"]  # scored before RND is trained
    assert all(e.given == e.step for e in events if e.name == "dynamics")


def test_the_model_waits_for_an_episode_s_end(schedule):
    events = schedule(340, limit=60)
    assert [e.step for e in events if e.name == "dynamics"] == [240]  # 300 is only 60 steps later
    assert min(e.step for e in events if e.name == "worker" and e.with_penalty) == 241


def test_a_first_training_before_one_interval(schedule):
    """dynamics_starts counts from the start of the run, dynamics_every from the last training."""
    events = schedule(450, dynamics_starts=100, dynamics_every=300)
    assert [e.step for e in events if e.name == "dynamics"] == [100, 400]


def test_an_episode_s_states_include_its_first(schedule):
    visits = [e.obs for e in schedule(120, death=30) if e.name == "visit"]
    assert len(visits) == 4
    for obs in visits:  # x, y, steps, action
        assert obs.shape == (31, 5)
        assert obs[:, 2].tolist() == list(range(31))
        assert obs[0, :2].tolist() == [0.5, -0.25]
        np.testing.assert_allclose(obs[1:, :2] - obs[:-1, :2], obs[1:, 3:], atol=1e-5)


def test_adjacency_collects_trajectories_one_by_one(schedule, monkeypatch):
    seen, add = [], gcmr.Adjacency.add_trajectory
    monkeypatch.setattr(
        gcmr.Adjacency, "add_trajectory", lambda self, path: seen.append(path.copy()) or add(self, path)
    )
    schedule(100, limit=25)
    assert [path.shape for path in seen] == [(26, 2)] * 4
    assert all(path[0].tolist() == [0.5, -0.25] for path in seen)


@pytest.mark.parametrize(
    "settings, absent",
    [
        (dict(landmark_weight=0.0), {"visit", "novelty"}),
        (dict(adjacency_weight=0.0), {"adjacency"}),
        (dict(adjacency_weight=0.0, landmark_space="adjacency"), set()),
        (
            dict(adjacency_weight=0.0, landmark_weight=0.0, landmark_space="adjacency"),
            {"adjacency", "visit", "novelty"},
        ),
        (
            dict(gradient_penalty_weight=0.0, rollout_planning_weight=0.0, model_relabeling=False),
            {"dynamics"},
        ),
        (dict(gradient_penalty_weight=0.0, rollout_planning_weight=0.0), set()),
        (dict(gradient_penalty_weight=0.0, rollout_planning_weight=0.0, rollout_weight=1.0), {"dynamics"}),
        (dict(gradient_penalty_weight=0.0, model_relabeling=False), set()),
    ],
)
def test_what_is_switched_off_is_not_trained(schedule, settings, absent):
    names = {e.name for e in schedule(210, **settings)}
    assert names == {"worker", "manager", "visit", "novelty", "adjacency", "dynamics"} - absent


# --------------------------------------------------------------------------------------------------- settings

# Section 1 of the spec, column by column: delta_sg, lambda_gp, lambda_osrp, adjacency and landmark weight,
# landmark shift, lags, hinge margin, coverage landmarks, worker's reward scale, worker's buffer, steps.
TABLE = {
    "AntMaze-U": (20, 1, 5e-4, 20, 1, 2, 4, 1.1, 60, 1, 2e5, 0.7e6),
    "AntMaze-UStochastic": (20, 1, 5e-4, 20, 1, 2, 4, 1.1, 60, 1, 2e5, 0.7e6),
    "AntMaze-ULarge": (30, 1, 5e-4, 20, 1, 3, 4, 1.1, 60, 1, 2e5, 1.2e6),
    "AntMaze-W": (10, 1, 5e-4, 20, 1, 2, 4, 1.1, 60, 1, 2e5, 0.6e6),
    "AntMaze-Bottleneck": (20, 10, 5e-3, 20, 1, 2, 4, 1.1, 60, 1, 2e5, 0.7e6),
    "AntPush-Small": (20, 0.01, 5e-4, 0.02, 0.1, 3, 4, 2.2, 60, 1.5, 1e6, 0.7e6),
    "AntMaze-Complex": (30, 1, 5e-4, 20, 1, 3, 4, 1.1, 200, 1, 2e5, 3e6),
    # shift 1 and 150,000 steps instead of the released 2 and 500,000: this environment is for runs of minutes
    "PointMaze-U": (20, 1, 5e-5, 20, 1, 1, 6, 1.1, 60, 1, 2e5, 150_000),
}


@pytest.mark.parametrize("env", TABLE)
def test_settings_of_the_table(env):
    args = gcmr.parse_args(["--env", env])
    weights = args.gradient_penalty_weight, args.rollout_planning_weight, args.adjacency_weight
    lags = gcmr.Adjacency(2, args).lags
    margin = (args.adjacency_near + args.adjacency_far) / 2
    found = (args.relabel_shift, *weights, args.landmark_weight, args.landmark_shift, lags, margin)
    found += args.coverage_landmarks, args.worker_reward_scale, args.worker_buffer, args.total_steps
    assert found == pytest.approx(TABLE[env])
    assert args.manager_buffer == args.worker_buffer and args.manager_reward_scale == 0.1
    half_range = gcmr.SUBGOAL_SPACES[args.subgoal_space]
    assert half_range == ((10, 10, 2, 2) if env == "AntPush-Small" else (10, 10))


def test_gather_has_the_reward_scale_of_hrac_and_no_landmarks():
    args = gcmr.parse_args(["--env", "AntGather"])
    assert (args.manager_reward_scale, args.landmark_weight, args.adjacency_weight) == (1, 0, 20)


def test_settings_that_all_environments_share():
    for env in TABLE:
        args = gcmr.parse_args(["--env", env])
        assert (args.edge_cutoff, args.direct_value, args.novelty_radius) == (-38, -10, 0.2)
        assert (args.rollout_weight, args.novelty_landmarks, args.coverage_pool) == (0.95, 60, 1000)
        point = env == "PointMaze-U"  # cheaper and faster, for runs of minutes
        starts = (args.dynamics_starts, args.planner_starts, args.adjacency_every)
        assert starts == ((10_000, 15_000, 10_000) if point else (20_000, 60_000, 50_000))
        assert (args.dynamics_every, args.learning_starts, args.manager_period) == (2_000, 500, 10)
        assert (args.worker_gamma, args.manager_gamma, args.tau, args.batch_size) == (0.95, 0.99, 0.005, 128)
        assert (args.critic_lr, args.critic_weight_decay) == (1e-3, 1e-4)
        assert args.actor_lr == (5e-4 if point else 1e-4)
        assert (args.planner_rows, args.planner_keeps_graph) == (32 if point else 0, 1)
        assert (args.adjacency_lr, args.novelty_lr, args.dynamics_lr) == (2e-4, 1e-3, 5e-3)
        assert (args.manager_noise, args.candidates, args.hidden) == (1, 12, 300)
        assert (args.worker_noise, args.mask_xy) == ((0.2, False) if point else (1, True))
        assert (args.worker_critic_updates, args.worker_critic_updates_with_penalty) == (1, 1 if point else 5)
        assert args.reward == (None if env == "AntPush-Small" else "sparse")  # of the paper's main figures
        assert (args.worker_actor_every, args.path_search, args.relabel_norm) == (5, "exact", "batch")


@pytest.mark.parametrize(
    "flags",
    [
        "--coverage-pool 0",
        "--adjacency-batch-size 0",
        "--dynamics-batch-size 0",
        "--rollout-planning-goals 0",
        "--rollout-planning-subgoals 0",
        "--gradient-penalty-copies 0",
        "--dynamics-rows 4",
        "--landmark-shift -1",
        "--adjacency-near 2 --adjacency-far 1",
        "--dynamics-starts 5",
        "--coverage-landmarks -100 --landmark-weight 0",
        "--novelty-landmarks -1",
        "--landmark-weight -1",
        "--dynamics-lr -1",
        "--adjacency-lr nan",
        "--worker-critic-updates 0",
        "--subgoal-space xyz --landmark-weight 0 --env PointMaze-U",
        "--subgoal-space xyz --landmark-weight 0 --env AntPush-Small",
        "--subgoal-space xy_block --landmark-weight 0",
        "--relabel-shift -2",
    ],
)
def test_flags_that_would_fail_hours_later(flags):
    with pytest.raises(SystemExit) as stop:
        gcmr.parse_args(flags.split())
    assert flags.split()[0] in stop.value.code and "\n" not in stop.value.code
