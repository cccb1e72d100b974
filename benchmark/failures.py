"""Where do an agent's episodes fail, and does noise free it? For an agent or a run's model.pt of any script.

python benchmark/failures.py benchmark/agents/hiro_ularge_g98.pt --goals 0 16
python benchmark/failures.py benchmark/agents/aclg_gcmr_bottleneck.pt --manager-noise 1   # m, as in training

A line per failure: where the robot ended, on its back or not, since which step it had been within a metre
of that place, and the mean of the subgoals issued since then. Not the episodes of the run's evaluations.
Success is that of the last step: AntMaze-W's agent passes its goal and fails here.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common_envs  # noqa: E402


@dataclass
class Args:
    agent: Positional[Path]  # benchmark/agents/NAME.pt, or model.pt
    episodes: int = 50  # per goal
    goals: tuple[float, ...] = ()  # one after the other; default: the environment's evaluation goals
    start: tuple[float, float] | None = None  # x y, the robot is put there; default: the maze's start
    seed: int = 11
    manager_noise: float = 0.0  # std, units of the subgoal
    worker_noise: float = 0.0  # std, units of the action


def run_episode(script, env, manager, worker, goal, seed: int, period: int, start=None):
    """Returns success, the way [T, 2], whether it ended on its back, and the subgoals as issued [T, 2]."""
    observation, _ = env.reset(seed=seed, options={"goal": goal})
    obs, goal = script.split_observation(observation)
    if start:
        env.data.qpos[:2] = obs[:2] = start
    dims, way, issued, episode_over = len(manager.limit), [], [], False
    while not episode_over:
        if len(way) % period == 0:
            subgoal = first_subgoal = manager.act(obs, goal, explore=True)
        observation, _, terminated, truncated, info = env.step(worker.act(obs, subgoal, explore=True))
        next_obs, _ = script.split_observation(observation)
        subgoal = script.subgoal_transition(obs[:dims], subgoal, next_obs[:dims])
        obs, episode_over = next_obs, terminated or truncated
        way.append(obs[:2])
        issued.append(first_subgoal[:2])
    return bool(info["is_success"]), np.array(way), bool(info["upside_down"]), np.array(issued)


def stayed_since(way) -> int:
    """The first step after which all places of way [T, 2] are within a metre of the last one."""
    away = np.linalg.norm(way - way[-1], axis=1) > 1
    return int(away.nonzero()[0][-1]) + 1 if away.any() else 0


def main(args: Args):
    if not args.agent.is_file():
        raise SystemExit(f"failures.py: error: no agent at {args.agent}")
    torch.set_num_threads(1)
    try:
        name = torch.load(args.agent, map_location="cpu", weights_only=True)["script"]
    except Exception as error:  # a foreign file; what else may be wrong with it the script tells
        raise SystemExit(f"failures.py: error: {args.agent} is no agent ({type(error).__name__})") from None
    if importlib.util.find_spec(name) is None:
        raise SystemExit(f"failures.py: error: {args.agent} is of {name}.py, which is not in {ROOT}")
    script = importlib.import_module(name)
    flags = ["--eval-only", "--checkpoint", str(args.agent), "--device", "cpu"]
    flags += ["--eval-goals", *map(str, args.goals)] if args.goals else []
    settings = script.parse_args(flags)
    if getattr(settings, "flat", False) or common_envs.SPECS[settings.env].kind == "gather":
        raise SystemExit("failures.py: error: --flat has no subgoals, AntGather no goal to fail at")
    env = script.make_env(settings.env, settings.reward, evaluate=True)
    manager, worker = script.make_agents(env, settings, torch.device("cpu"))
    state = script.load_checkpoint(str(args.agent))
    script.load_parts({"manager": manager, "worker": worker}, state, str(args.agent))
    manager.noise, worker.noise = args.manager_noise, args.worker_noise
    torch.manual_seed(args.seed)
    goals = np.reshape(args.goals, (-1, env.task.goal_dim)) if args.goals else env.task.eval_goals
    for goal in np.asarray(goals, float):
        failures, on_back = 0, 0
        for episode in range(args.episodes):
            seed, period = 1000 * args.seed + episode, settings.manager_period
            result = run_episode(script, env, manager, worker, goal, seed, period, args.start)
            success, way, upside_down, issued = result
            if success:
                continue
            failures, on_back = failures + 1, on_back + upside_down
            since, (x, y) = stayed_since(way), way[-1]
            dx, dy = issued[since:].mean(0)
            where = f"{'on its back' if upside_down else 'upright'} at ({x:.1f}, {y:.1f}) since step {since}"
            print(f"  {episode}: {where}, subgoals ({dx:.2f}, {dy:.2f})")
        goal = ", ".join(f"{x:g}" for x in goal)
        print(f"goal ({goal}): {failures} of {args.episodes} failed, {on_back} ended on their backs")


if __name__ == "__main__":
    main(tyro.cli(Args))
