"""Subgoals, the worker's reward, segments, and what the training loop stores of them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, ToyEnv

import aclg_gcmr
import cher
import hiro
from common_envs import make_env

S, G = np.array([1, 2, 0.5]), np.array([3, -1, 0.2])
NEXT, LATER = np.array([1.5, 1.8, 0.6]), np.array([2, 1, 0.55])


# ------------------------------------------------------------------------------------- the two formulas


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_subgoal_transition(kind):
    s, g, following, later = (kind(x) for x in (S, G, NEXT, LATER))
    g1 = hiro.subgoal_transition(s, g, following)
    g2 = hiro.subgoal_transition(following, g1, later)
    assert np.allclose(g1, (2.5, -0.8, 0.1))
    assert np.allclose(g2, (2, 0, 0.15)) and np.allclose(g2, S + G - LATER)
    for state, subgoal in ((s, g), (following, g1), (later, g2)):
        assert np.allclose(state + subgoal, (4, 1, 0.7))  # the same place


def test_subgoal_transition_is_not_clipped():
    assert hiro.subgoal_transition(np.array([9.0]), np.array([10.0]), np.array([-8.0])) == 27


def test_intrinsic_reward():
    g1 = np.array([2.5, -0.8, 0.1])
    assert hiro.intrinsic_reward(S, G, NEXT) == pytest.approx(-2.6267851)
    assert hiro.intrinsic_reward(NEXT, g1, LATER) == pytest.approx(-2.0056171)
    assert hiro.intrinsic_reward(S, G, S + G) == pytest.approx(-1e-5)  # an exact hit
    batch = hiro.intrinsic_reward(np.stack([S, NEXT]), np.stack([G, g1]), np.stack([NEXT, LATER]))
    assert batch == pytest.approx([-2.6267851, -2.0056171])


# --------------------------------------------------------------------------------------------- segments


def test_segment_sums_and_pads():
    rewards = [-12, -11.9, -11.7, -11.6, -11.4, -11.1, -11.0, -10.8, -10.5, -10.2]
    segment = hiro.Segment(10, obs_dim=2, action_dim=1)
    segment.start(np.array([7.0, 8.0]))
    for i, reward in enumerate(rewards):
        segment.add(np.array([0.1 * i]), reward, np.array([i, -i]))
    assert segment.reward == pytest.approx(-112.2)
    assert hiro.Args.manager_reward_scale * segment.reward == pytest.approx(-11.22)
    assert segment.length == 10
    assert np.array_equal(segment.obs_seq, [(7, 8)] + [(i, -i) for i in range(10)])
    assert np.allclose(segment.action_seq[:, 0], 0.1 * np.arange(10))

    segment.start(np.array([1.0, 1.0]))  # nothing of the old one stays
    for i in range(3):
        segment.add(np.array([i + 1]), -2.0, np.array([i + 2, 0]))
    fields = segment.sequences()
    assert fields["length"] == 3 and segment.reward == -6.0
    assert np.array_equal(fields["obs_seq"], [(1, 1), (2, 0), (3, 0)] + [(4, 0)] * 8)
    assert np.array_equal(fields["action_seq"][:, 0], [1, 2, 3] + [0] * 7)


# --------------------------------------------------------------------------- what the worker gets to see


@pytest.mark.parametrize("module", [hiro, cher, aclg_gcmr])
@pytest.mark.parametrize("mask", [True, False])
def test_worker_does_not_see_its_position(module, mask):
    args, dims = module.Args(env="AntMaze-ULarge", mask_xy=mask, hidden=8), 2 if module is aclg_gcmr else 15
    manager, worker = module.make_agents(make_env(args.env), args, torch.device("cpu"))
    seen = {}

    def note(name):
        return lambda layer, inputs: seen.update({name: inputs[0].detach()})

    for name, net in (("manager", manager.actor), ("worker", worker.actor), ("critic", worker.critic)):
        net.layers[0].register_forward_pre_hook(note(name))
    obs, subgoal, action = torch.arange(1.0, 31), torch.full((dims,), 0.5), torch.full((8,), 20.0)
    worker.actor(obs[None], subgoal[None])
    worker.critic(obs[None], subgoal[None], action[None])
    manager.actor(obs[None], torch.tensor([[0.0, 16.0]]))
    position = [0.0, 0.0] if mask else [1.0, 2.0]
    assert seen["worker"][0].tolist() == position + list(range(3, 31)) + [0.5] * dims
    assert seen["critic"][0, 0].tolist() == position + list(range(3, 31)) + [0.5] * dims + [20.0] * 8
    assert seen["manager"][0].tolist() == list(range(1, 31)) + [0.0, 16.0]


@pytest.mark.parametrize("module", [hiro, cher, aclg_gcmr])
def test_scaled_worker_inputs(module):
    args = module.Args(env="AntMaze-ULarge", scale_worker_inputs=True, mask_xy=True, hidden=8)
    _, worker = module.make_agents(make_env(args.env), args, torch.device("cpu"))
    half_range = [10, 10, 0.5, 1, 1, 1, 1, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3]
    half_range = half_range[:2] if module is aclg_gcmr else half_range
    expected = [0, 0] + [1] * 28 + [1 / x for x in half_range] + [1 / 30] * 8
    assert worker.critic.input_scale.tolist() == pytest.approx(expected)
    assert worker.actor.input_scale.tolist() == pytest.approx(expected[:-8])
    manager, _ = module.make_agents(make_env(args.env), args, torch.device("cpu"))
    assert manager.critic.input_scale.tolist() == [1] * (32 + len(half_range))


@pytest.mark.parametrize("module", [hiro, cher, aclg_gcmr])
def test_each_level_has_its_noise(module):
    """In units of the action; cher.py's are shares of the half-range, 10 m and 30."""
    settings = dict(worker_noise=0.3, worker_target_noise=0.4, worker_target_noise_clip=0.6)
    settings |= dict(manager_noise=0.7, manager_target_noise=0.8, manager_target_noise_clip=0.9)
    args = module.Args(env="AntMaze-U", subgoal_space="xy", hidden=8, **settings)
    manager, worker = module.make_agents(make_env("AntMaze-U"), args, torch.device("cpu"))
    for level, half_range, expected in ((worker, 30, (0.3, 0.4, 0.6)), (manager, 10, (0.7, 0.8, 0.9))):
        found = level.noise, level.target_noise, level.target_noise_clip
        if module is cher:
            assert all(torch.allclose(x, torch.full_like(x, half_range * y)) for x, y in zip(found, expected))
        else:
            assert found == expected


@pytest.mark.parametrize("module", [hiro, aclg_gcmr])
def test_each_level_has_its_buffer(module):
    args = module.Args(subgoal_space="xy", hidden=8, worker_buffer=300, manager_buffer=40)
    env, device = make_env("AntMaze-U"), torch.device("cpu")
    worker_buffer, manager_buffer, _ = module.make_buffers(
        env, args, *module.make_agents(env, args, device), device
    )
    assert len(worker_buffer.rows) == 300 and "next_subgoal" in worker_buffer.shapes
    assert len(manager_buffer.rows) == 40 and "obs_seq" in manager_buffer.shapes


# ------------------------------------------------------------------------------------ the training loop

LOOPS = [name for name in ("hiro", "aclg_gcmr") if name in SCRIPTS]


@pytest.fixture(params=LOOPS)
def loop_module(request):
    return pytest.importorskip(request.param)


def watch_actions(module, monkeypatch):
    """Agent, obs, subgoal or goal, and action of every exploring call of act()."""
    calls = []

    def act(agent, obs, goal, explore, _act=module.TD3.act):
        action = _act(agent, obs, goal, explore)
        if explore:
            calls.append((agent, np.array(obs), np.array(goal), np.array(action)))
        return action

    monkeypatch.setattr(module.TD3, "act", act)
    return calls


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_what_the_loop_stores(loop_module, toy_run, monkeypatch, looks_ahead):
    """Two episodes of 23 steps: periods of 10, 10 and 3. Steps of up to 5 m carry subgoals out of range."""
    calls = watch_actions(loop_module, monkeypatch)
    env = ToyEnv(23, speed=5.0)
    stored = toy_run(
        loop_module, 46, env, learning_starts=1000, worker_noise=2.0, worker_looks_ahead=looks_ahead,
        manager_reward_scale=0.7,
    )  # fmt: skip
    assert len(stored.worker) == 46
    assert [int(row.length) for row in stored.manager] == [10, 10, 3, 10, 10, 3]

    # the manager spoke at the start of each period, without a clipped sum
    given = [(obs, action) for agent, obs, goal, action in calls if float(agent.limit[0]) == 10]
    assert len(given) == 7  # the last one for the episode that would follow
    acted = [(obs, goal, action) for agent, obs, goal, action in calls if float(agent.limit[0]) == 1]
    assert len(acted) == 46
    spans = [(0, 10), (10, 20), (20, 23), (23, 33), (33, 43), (43, 46)]
    biggest = 0.0
    for number, (begin, end) in enumerate(spans):
        segment, (first_obs, first_subgoal) = stored.manager[number], given[number]
        assert np.array_equal(segment.subgoal, first_subgoal) and np.all(np.abs(first_subgoal) <= 10)
        assert np.array_equal(segment.obs_seq[0], first_obs.astype(np.float32))
        assert segment.goal.tolist() == [3 + number // 3, 4 + number // 3]  # each episode has its own
        assert segment.terminated == 0  # a time limit is no end
        steps_in_episode = range(begin % 23 + 1, begin % 23 + 1 + end - begin)
        assert segment.reward == pytest.approx(-0.7 * sum(steps_in_episode))
        for i in range(begin, end):
            obs, action, next_obs = env.log[i]
            row = stored.worker[i]
            # the subgoal that was acted on, with the action that it led to
            assert np.array_equal(row.subgoal, acted[i][1]) and np.array_equal(row.action, acted[i][2])
            assert np.array_equal(row.action, action)
            assert np.allclose(row.obs, obs) and np.allclose(row.next_obs, next_obs)
            assert np.allclose(segment.obs_seq[i - begin], obs)
            assert np.array_equal(segment.action_seq[i - begin], action)
            # subgoals keep pointing at one place, and are never clipped
            assert np.allclose(row.obs[:2] + row.subgoal, first_obs[:2] + first_subgoal, atol=1e-4)
            rest = obs[:2] + row.subgoal - next_obs[:2]
            assert row.reward == pytest.approx(-np.sqrt((rest**2).sum() + 1e-10), rel=1e-5)
            assert row.terminated == 0
            last_of_period, last_of_episode = i == end - 1, env.log[i][2][2] == 23
            if last_of_period and not last_of_episode and looks_ahead:
                assert np.array_equal(row.next_subgoal, given[number + 1][1])  # what comes next
            else:
                assert np.allclose(row.next_subgoal, rest, atol=1e-4)
            biggest = max(biggest, np.abs(row.next_subgoal).max())
        length = end - begin
        assert np.allclose(segment.obs_seq[length:], env.log[end - 1][2])  # the true end, also as padding
        assert not segment.action_seq[length:].any()
    assert biggest > 10.5
    # the manager is told the goal of the episode that it acts in; only the first start is seeded
    asked = [goal.tolist() for agent, obs, goal, action in calls if float(agent.limit[0]) == 10]
    assert asked == [[3, 4]] * 3 + [[4, 5]] * 3 + [[5, 6]]
    assert env.resets == [1, None, None]


def test_worker_looks_ahead_in_hiro_only(loop_module):
    """As in the released code of each."""
    assert loop_module.Args().worker_looks_ahead is (loop_module is hiro)


def test_uniform_warm_up(loop_module, toy_run, monkeypatch):
    """Nobody is asked in the first 24 steps; then both levels are."""
    calls = watch_actions(loop_module, monkeypatch)
    flags = dict(learning_starts=24, uniform_warmup=True, worker_noise=0.0, worker_target_noise=0.0)
    stored = toy_run(loop_module, 46, ToyEnv(23), **flags)
    assert sum(float(agent.limit[0]) == 1 for agent, *_ in calls) == 46 - 24
    subgoals = sum(float(agent.limit[0]) == 10 for agent, *_ in calls)
    assert subgoals == 7 - 4  # issued at steps 0, 10, 20, 23 of the warm-up, then 33, 43, 46
    actions = np.stack([row.action for row in stored.worker[:24]])
    assert 0.4 < actions.std() < 0.75 and np.abs(actions).max() <= 1
    assert 3 < np.stack([row.subgoal for row in stored.manager[:4]]).std() < 9


def test_random_subgoals(loop_module, toy_run, monkeypatch):
    """All of them, the first one, too: the manager is never asked and the worker always."""
    calls = watch_actions(loop_module, monkeypatch)
    stored = toy_run(loop_module, 46, ToyEnv(23), learning_starts=1000, random_subgoals=1.0)
    assert sum(float(agent.limit[0]) == 10 for agent, *_ in calls) == 0
    assert sum(float(agent.limit[0]) == 1 for agent, *_ in calls) == 46
    subgoals = np.stack([row.subgoal for row in stored.manager[1:]])
    assert 3 < subgoals.std() < 9 and np.abs(subgoals).max() <= 10


@pytest.mark.parametrize("dies", [True, False])
def test_end_of_an_episode_for_good(loop_module, toy_run, dies):
    """By a death, or because the task is done, which is no end for the worker."""
    scale = {"worker_reward_scale": 1.5} if hasattr(loop_module.Args, "worker_reward_scale") else {}
    env = ToyEnv(23, death=17, dies=dies)
    stored = toy_run(loop_module, 34, env, learning_starts=1000, worker_gamma=0.9, **scale)
    assert [int(row.length) for row in stored.manager] == [10, 7, 10, 7]
    assert [int(row.terminated) for row in stored.manager] == [0, 1, 0, 1]
    # the worker's rewards are negative: dying must not pay, so the last one counts for all that follow
    assert [int(row.terminated) for row in stored.worker] == ([0] * 16 + [int(dies)]) * 2
    for row in stored.worker:
        left = row.obs[:2] + row.subgoal - row.next_obs[:2]
        reward = -math.hypot(*left) * scale.get("worker_reward_scale", 1)
        resting = sum(0.9**k for k in range(1000)) if row.terminated else 1
        assert float(row.reward) == pytest.approx(reward * resting, rel=1e-4)
    assert [float(row.reward) for row in stored.manager][:2] == pytest.approx(
        [-5.5, -0.1 * sum(range(11, 18))]
    )


def test_time_limit_as_in_the_released_code(toy_run):
    """aclg_gcmr.py --time-limit-is-terminal: for both levels, at the reward of that step."""
    settings = dict(learning_starts=1000, time_limit_is_terminal=True, worker_gamma=0.9)
    stored = toy_run(aclg_gcmr, 46, ToyEnv(23), **settings)
    assert [int(row.terminated) for row in stored.worker] == ([0] * 22 + [1]) * 2
    assert [int(row.terminated) for row in stored.manager] == [0, 0, 1] * 2
    row = stored.worker[22]
    left = row.obs[:2] + row.subgoal - row.next_obs[:2]
    assert float(row.reward) == pytest.approx(
        -aclg_gcmr.Args.worker_reward_scale * math.hypot(*left), rel=1e-4
    )


def test_an_early_stop_as_in_the_released_code(toy_run):
    """At the goal, say, after 17 of 23 steps: by --time-limit-is-terminal it is terminal for both levels."""
    for released in (True, False):
        env = ToyEnv(23, death=17, dies=False)
        stored = toy_run(aclg_gcmr, 17, env, learning_starts=1000, time_limit_is_terminal=released)
        assert [int(row.terminated) for row in stored.worker] == [0] * 16 + [int(released)]
        assert [int(row.terminated) for row in stored.manager] == [0, 1]


# ------------------------------------------------------------------------------- evaluation and its numbers


class Walker(ToyEnv):
    """Inside the goal's radius at steps 2 and 3 of 4; with the second goal at the last step too."""

    def is_success(self):
        return self.steps in (2, 3) or (self.steps == 4 and self.goal[0] == 7)


def test_evaluate():
    """A manager that says (4, 0), a worker that makes 1 m to the right: two goals, episodes of 4 steps."""
    asked, seeds = [], []
    env = Walker(4)
    reset = env.reset

    def noted_reset(seed, options):
        seeds.append(seed)
        return reset(seed=seed, options=options)

    env.reset = noted_reset

    def level(answer, name):
        def act(obs, goal, explore):
            assert explore is False
            asked.append((name, obs[2], *goal.tolist()))
            return np.array(answer, np.float32)

        return SimpleNamespace(act=act, limit=torch.tensor([10.0, 10.0]))

    manager, worker = level((4, 0), "manager"), level((1, 0), "worker")
    args = hiro.Args(eval_goals=(3.0, -0.25, 7.0, -0.25), eval_episodes=2, manager_period=3)
    generator = torch.get_rng_state()
    metrics = hiro.evaluate(env, manager, worker, args, seed=50)
    assert torch.equal(generator, torch.get_rng_state())
    assert len(set(seeds)) == 4
    # an episode: the manager at steps 0 and 3; the worker is told what is left of (4, 0)
    episode = [("manager", 0, 3, -0.25), ("worker", 0, 4, 0), ("worker", 1, 3, 0), ("worker", 2, 2, 0)]
    episode += [("manager", 3, 3, -0.25), ("worker", 3, 4, 0)]
    assert asked[:6] == episode
    assert metrics["eval/success"] == 0.5 and metrics["eval/success_any"] == 1.0
    assert (metrics["eval/success_goal0"], metrics["eval/success_goal1"]) == (0, 1)
    assert metrics["eval/return"] == -10
    assert metrics["eval/final_distance"] == pytest.approx((1.5 + 2.5) / 2)  # from x = 4.5
    # periods of 3 m and 1 m of the wanted 4
    assert metrics["eval/progress"] == pytest.approx(2) and metrics["eval/subgoal_distance"] == pytest.approx(
        2
    )
    assert metrics["eval/subgoal_halved"] == 0.5  # 1 m and 3 m of 4 are left
    assert metrics["eval/subgoal_reached"] == 0 and metrics["eval/subgoal_length"] == pytest.approx(4)


@pytest.mark.parametrize("dims, distance", [(2, 1.5), (3, 2.5)])
def test_final_distance_is_of_what_the_reward_counts(dims, distance):
    """The robot ends at x = 4.5, y = -0.25, 4 in the third entry; AntPush-Small's goal has dummies."""
    env = Walker(4)
    env.task.goal_dim, env.task.reward_dims = 4, dims
    level = SimpleNamespace(act=lambda *_, **how: np.array([1, 0], np.float32), limit=torch.ones(2))
    args = hiro.Args(eval_goals=(3.0, -0.25, 6.0, 50.0), eval_episodes=1)
    metrics = hiro.evaluate(env, level, level, args, seed=0)
    assert metrics["eval/final_distance"] == pytest.approx(distance)


def test_evaluation_ends_with_the_episode():
    """Also by a death, at step 4 of 9."""
    level = SimpleNamespace(act=lambda *_, **how: np.zeros(2, np.float32), limit=torch.tensor([10.0, 10.0]))
    metrics = hiro.evaluate(ToyEnv(9, death=4), level, level, hiro.Args(eval_episodes=1), seed=0)
    assert metrics["eval/return"] == -1 - 2 - 3 - 4


def test_period_metrics():
    """Start, subgoal, end: 3 of 5 m in its direction and exactly there; sideways only."""
    periods = [[0, 0, 3, 4, 3, 4], [1, 1, 2, 0, 1, 2]]
    metrics = hiro.period_metrics("worker", periods, reached_radius=1.0)
    assert metrics["worker/progress"] == pytest.approx((5 + 0) / 2)
    assert metrics["worker/subgoal_distance"] == pytest.approx((0 + 5**0.5) / 2)
    assert metrics["worker/subgoal_reached"] == metrics["worker/subgoal_halved"] == 0.5
    assert metrics["worker/subgoal_length"] == pytest.approx(3.5)
    assert metrics["worker/subgoal_spread"] == pytest.approx((0.5 + 2) / 2)
    assert hiro.period_metrics("worker", [], 1.0) == {}
