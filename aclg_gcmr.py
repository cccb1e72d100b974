"""ACLG with guided cooperation via model-based rollout (GCMR: Wang et al. 2023, https://arxiv.org/abs/2309.13508).

    python aclg_gcmr.py --env AntMaze-U            # train
    python aclg_gcmr.py --env AntMaze-U --help     # every setting, with the values for this environment

This is hiro.py with subgoals in x and y and, in the order in which they were proposed,

    HRAC   adjacency_loss: the manager keeps its subgoals within a few steps' reach  (arXiv 2006.11485)
    HIGL   landmarks, spread out and novel, and a planner over them                  (arXiv 2110.13625)
    ACLG   landmark_loss: the subgoal is drawn towards the next landmark of the plan (GCMR)
    GCMR   relabel_subgoals moves an old subgoal towards the best candidate, scored on states mixed from the
           replay and from a learned model;
           gradient_penalty bounds how fast the worker's Q changes with the action, by the model's reward;
           rollout_planning_loss lets the worker look one step ahead with the manager's critics

    every step:
        act, and store as in hiro.py, but with --no-worker-looks-ahead
        update_worker: (with the default intervals)
            critics: critic_loss, one update a step; as soon as the model is trained five, one of them
                with + gradient_penalty
            actor, at every fifth critic update: -q1; as soon as the model is trained at every tenth of these
                with + rollout_planning_loss
    every manager_period steps:
        update_manager: relabeled critic_loss; -q1 + adjacency_loss + landmark_loss towards plan_landmarks
    at the end of an episode:
        novelty landmarks from random network distillation; now and then the adjacency network and the model

The landmarks' planner is a training signal for the manager's actor only: nothing plans while acting.
A weight of 0 switches a term off; docs/aclg_gcmr.md has the flags of HIRO, HRAC, HIGL and ACLG.
The method is in the sections from the dynamics model to the updates (first what is trained apart: model,
adjacency, novelty; then relabeling, planning and the losses, which use them), and in main's loop; the rest is
as in hiro.py, but for defaults and for when target networks move (update_worker, update_manager).

Off by default, for a worker that learns faster: --redrawn-subgoals (an ablation in HIRO's paper) and
--rest-value (in no paper that we know). --preset quick turns them on.
"""

import contextlib
import csv
import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, OrderedDict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common_envs import SPECS, make_env

SCRIPT = Path(__file__).stem
FORMAT = 1  # of checkpoints; to be raised when this version writes what older ones cannot read
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup ignores
    STOP_SIGNALS.append(signal.SIGHUP)  # the terminal is gone

# ------------------------------------------------------------------------------------------------ arguments


def whole_number(text: str) -> int:
    """7e5 and 700_000 are whole numbers, 1.5 and inf are not."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text} is not a whole number")
    return int(number)


# An integer that may be written as 7e5.
Count = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass
class Args:
    # --- Experiment ---
    env: str = "AntMaze-U"  # id of the environment, a row of SPECS in common_envs.py
    preset: Literal["default", "quick"] = "default"  # settings of PRESETS; "quick": and of QUICK on top
    reward: str | None = None  # "dense" or "sparse"; None: the first that the environment has
    seed: int = 1  # fixes torch (networks, noise, sampling) and the environment
    total_steps: Count = 700_000  # environment steps, counted from the start also after --resume
    device: str = "auto"  # "auto": cuda if there is one, else cpu
    threads: int = 0  # CPU threads of torch; 0: all cores (use 1 when several runs share a machine)
    fast_matmul: bool = True  # on a CPU without AMX, oneDNN's float32 kernels for the updates; same precision
    cudagraph: bool = True  # on CUDA, record the updates' kernels once and launch them as one
    eval_every: Count = 5_000  # environment steps between evaluations
    eval_episodes: int = 10  # noise-free episodes per evaluation goal
    eval_goals: tuple[float, ...] = ()  # evaluation goals, coordinates in a row; empty: the environment's own
    eval_only: bool = False  # evaluate --checkpoint and stop
    checkpoint: str | None = None  # model.pt or checkpoint.pt of an earlier run, for --eval-only
    save_every: Count = 0  # environment steps between checkpoints for --resume; 0: when stopped only
    resume: str | None = None  # checkpoint.pt to continue exactly where it stopped
    start_from: str | None = None  # model.pt to begin with: its settings and networks; replay, steps are new
    run_dir: str | None = None  # this run's folder; None: runs/<env>__<script>__<variant>__<seed>__<time>
    variant: str = "default"  # a name for this setting, used in the folder's name
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    capture_video: bool = False  # film an episode per evaluation goal (pip install "imageio[ffmpeg]")

    # --- Hierarchy (HIRO) ---
    manager_period: int = 10  # c, worker steps per subgoal
    subgoal_space: Literal["xy", "xyz", "xy_block"] = "xy"  # which first entries of obs
    subgoal_limit: tuple[float, ...] = ()  # subgoals lie within +-this, metres first; empty: SUBGOAL_SPACES
    mask_xy: bool = True  # hide obs entries 0, 1 (position) from the worker; True in HIRO's code
    manager_reward_scale: float = 0.1  # factor on the sum of environment rewards of a segment
    worker_reward_scale: float = 1.0  # factor on the worker's reward
    candidates: int = 12  # K, one is the stored subgoal, one the displacement (where the period ended)
    candidate_noise: float = 0.5  # std of the drawn candidates around the displacement, times half-range
    random_subgoals: float = 0.0  # share of subgoals drawn uniformly; not in the paper
    worker_looks_ahead: bool = False  # a period's last step bootstraps from the next period's subgoal (HIRO)
    time_limit_is_terminal: bool = False  # True as released: every end of an episode is terminal

    # --- TD3, both levels ---
    hidden: int = 300  # units in each of the two hidden layers
    output_init: float = 0.0  # output layers start uniform within this, biases at 0; 0: PyTorch's init
    actor_lr: float = 1e-4  # Adam
    critic_lr: float = 1e-3  # Adam
    critic_weight_decay: float = 1e-4  # Adam's L2 term
    tau: float = 0.005  # step of the target networks
    batch_size: int = 128  # rows per update
    learning_starts: Count = 500  # first steps only collect
    uniform_warmup: bool = False  # uniformly at random at both levels, not by the untrained policies
    worker_actor_every: int = 5  # worker critic updates per update of its actor
    worker_critic_updates: int = 1  # per environment step, until the gradient penalty acts
    worker_critic_updates_with_penalty: int = 5  # the same once it does

    # --- Worker ---
    worker_gamma: float = 0.95  # discount per environment step
    worker_noise: float = 1.0  # std of exploration noise, in units of the action (torques are within 30)
    worker_target_noise: float = 0.2  # std of target policy smoothing, units of the action
    worker_target_noise_clip: float = 0.5  # its bound
    worker_buffer: Count = 200_000  # steps kept
    action_limit: tuple[float, ...] = ()  # bounds of the worker's output; empty: the environment's
    scale_worker_inputs: bool = False  # divide subgoal and action by their half-range before worker networks
    rest_value: bool = False  # worker Q = network - |subgoal| / (1 - gamma), of resting; not in the paper
    redrawn_subgoals: float = 0.0  # share of the worker's rows with a random subgoal (HIRO 5.2, an ablation)

    # --- Manager ---
    manager_gamma: float = 0.99  # discount per segment
    manager_noise: float = 1.0  # std of exploration noise, units of the subgoal (metres for x and y)
    manager_target_noise: float = 0.2  # std of target policy smoothing, units of the subgoal
    manager_target_noise_clip: float = 0.5  # its bound
    manager_buffer: Count = 200_000  # segments kept

    # --- Adjacency (HRAC) ---
    adjacency_weight: float = 20.0  # weight of adjacency_loss in the manager's actor loss
    adjacency_factor: float = 0.5  # pairs up to int(factor x period) - 1 steps apart are adjacent
    adjacency_near: float = 1.0  # adjacent cells are pulled together to within this embedding distance
    adjacency_far: float = 1.2  # others are pushed apart to this; the manager's margin is the mean of both
    adjacency_every: Count = 50_000  # positions between trainings of the adjacency network
    adjacency_epochs: int = 25  # passes over all pairs of cells per training
    adjacency_batch_size: int = 64  # pairs per update
    adjacency_lr: float = 2e-4  # Adam

    # --- Landmarks (HIGL; ACLG: GCMR) ---
    landmark_weight: float = 1.0  # weight of landmark_loss in the manager's actor loss
    landmark_weight_before_planner: float = 1.0  # factor on it before planner_starts; 1: pulls subgoals to 0
    landmark_space: Literal["goal", "adjacency"] = "goal"  # the loss in metres (ACLG) or embedded (HIGL)
    landmark_shift: float = 2.0  # m, the pseudo-landmark lies this far towards the landmark
    planner_starts: Count = 60_000  # environment steps
    coverage_landmarks: int = 60  # by farthest-point sampling
    coverage_pool: int = 1_000  # states from which they are taken
    novelty_landmarks: int = 60  # the most novel states, by random network distillation
    novelty_radius: float = 0.2  # m, old novelty landmarks nearer than this to the new episode are dropped
    novelty_lr: float = 1e-3  # Adam, of the predictor
    edge_cutoff: float = -38.0  # clip_v, edges (the worker's Q from one landmark to another) below it are cut
    direct_value: float = -10.0  # goal_thr, a goal whose value from the state is above it is the landmark
    path_search: Literal["exact", "soft"] = "exact"  # "soft": the released 20 rounds of soft value iteration
    planner_rows: int = 0  # rows of a batch to plan for, 0: all (released); fewer only raise the variance
    planner_keeps_graph: int = 1  # plans made with one set of landmarks and their edges (released: 1)
    planner_bfloat16: bool = False  # score edges in bfloat16: 1.6 times as fast, 98 % equal choices
    path_heat: float = 0.9  # inverse temperature of "soft"

    # --- Dynamics model (GCMR) ---
    dynamics_members: int = 5  # E, networks of the ensemble
    dynamics_hidden: int = 256  # units in each of the two hidden layers
    dynamics_lr: float = 5e-3  # Adam
    dynamics_batch_size: int = 512  # rows per member and update
    dynamics_starts: Count = 20_000  # environment steps before the first training
    dynamics_every: Count = 2_000  # environment steps between trainings
    dynamics_first_updates: int = 2_000  # gradient steps of the first training
    dynamics_updates: int = 200  # gradient steps of later ones (released: up to 52 passes over 60,000 rows)
    dynamics_rows: Count = 50_000  # so many random draws, and a fifth as many of the newest rows

    # --- Relabeling (GCMR) ---
    model_relabeling: bool = True  # score candidates on model rollouts; off: on the recorded states (HIRO)
    rollout_weight: float = 0.95  # w, the i-th state is w^i recorded, 1 - w^i model; 0: model alone; 1: none
    relabel_shift: float = 20.0  # delta_sg; norm "batch": moves rms this / sqrt(rows); 0: to the best
    relabel_norm: Literal["batch", "sample"] = "batch"  # shift / norm of all differences, or each row's

    # --- Gradient penalty (GCMR) ---
    gradient_penalty_weight: float = 1.0  # lambda_gp
    gradient_penalty_every: int = 5  # worker critic updates
    gradient_penalty_form: Literal["paper", "released"] = "paper"  # worker's actions, k; or random, k / rows
    gradient_penalty_copies: int = 16  # random actions per row of "released"

    # --- One-step rollout planning (GCMR) ---
    rollout_planning_weight: float = 5e-4  # lambda_osrp
    rollout_planning_every: int = 10  # worker actor updates
    rollout_planning_goals: int = 2  # goals per observation (released: 10); fewer only raise the variance
    rollout_planning_subgoals: int = 2  # subgoals per goal (released: 10)
    rollout_planning_noise: float = 0.5  # std of those subgoals around the manager's, times half-range

    # --- Diagnostics ---
    reached_radius: float = 1.0  # m, a subgoal counts as reached when its period ends within this of it


# Settings that differ from the defaults, with their source. Other environments use the defaults.
# The mazes have the sparse reward of the paper's main figures (docs/aclg_gcmr.md, deviations, 21).
PRESETS: dict[str, dict] = {
    "AntMaze-U": {"source": "released script of AntMaze-v1", "reward": "sparse"},
    "AntMaze-UStochastic": {"source": "released script of the stochastic AntMaze-v1", "reward": "sparse"},
    "AntMaze-ULarge": {
        "source": "released script of AntMaze-v0, but without the put-back at walls (docs/envs.md)",
        "reward": "sparse",
        "relabel_shift": 30.0,
        "landmark_shift": 3.0,
        "total_steps": 1_200_000,
    },
    "AntMaze-W": {
        "source": "released script of AntMazeW-v2",
        "reward": "sparse",
        "relabel_shift": 10.0,
        "total_steps": 600_000,
    },
    "AntMaze-Bottleneck": {
        "source": "released script of AntMazeBottleneck-v1",
        "reward": "sparse",
        "gradient_penalty_weight": 10.0,
        "rollout_planning_weight": 5e-3,
    },
    "AntMaze-Complex": {
        "source": "released script of AntMazeComplex-v2",
        "reward": "sparse",
        "relabel_shift": 30.0,
        "landmark_shift": 3.0,
        "coverage_landmarks": 200,
        "total_steps": 3_000_000,
    },
    "AntPush-Small": {
        "source": "released script of AntPush-v1, added after the paper",
        "subgoal_space": "xy_block",
        "gradient_penalty_weight": 0.01,
        "adjacency_weight": 0.02,
        "adjacency_near": 2.0,
        "adjacency_far": 2.4,
        "landmark_weight": 0.1,
        "landmark_shift": 3.0,
        "worker_reward_scale": 1.5,
        "worker_buffer": 1_000_000,
        "manager_buffer": 1_000_000,
    },
    "AntFall": {"source": "no settings were published; HRAC's subgoal space", "subgoal_space": "xyz"},
    "AntPush": {"source": "no settings were published; those of AntMaze-U"},
    "AntFourRooms": {"source": "no settings were published; those of AntMaze-U"},
    "AntGather": {
        "source": "no settings were published; HRAC's reward scale; no goals, so no landmarks",
        "manager_reward_scale": 1.0,
        "landmark_weight": 0.0,
    },
    "PointMaze-U": {
        "source": "PointMaze-v1 as released, but less noise, a worker that sees walls, early starts",
        "reward": "sparse",
        "worker_noise": 0.2,
        "mask_xy": False,
        "landmark_shift": 1.0,
        "adjacency_factor": 0.7,
        "rollout_planning_weight": 5e-5,
        "adjacency_every": 10_000,
        "dynamics_starts": 10_000,
        "planner_starts": 15_000,
        "planner_rows": 32,
        "worker_critic_updates_with_penalty": 1,
        "actor_lr": 5e-4,
        "total_steps": 150_000,
    },
}

# With --preset quick, on top of PRESETS: half the work per step, and a worker that walks sooner. Found here.
QUICK_ANT = {
    "scale_worker_inputs": True,
    "rest_value": True,
    "redrawn_subgoals": 0.8,
    "actor_lr": 3e-4,
    "worker_critic_updates_with_penalty": 2,
    "worker_actor_every": 2,
    "planner_rows": 32,
    "planner_keeps_graph": 10,
    "planner_starts": 30_000,
    "adjacency_every": 25_000,
}
QUICK: dict[str, dict] = {
    "AntMaze-U": {"source": "found here, not in a paper: success 0.9 from about 100k on (docs)"} | QUICK_ANT,
    "AntMaze-W": {"source": "as AntMaze-U; the goal is reached in 0.9 from about 50k on (docs)"} | QUICK_ANT,
    "AntMaze-Bottleneck": {"source": "as AntMaze-U; unsteady, or 0 (three seeds, docs)"} | QUICK_ANT,
}

# Subgoals are about the first entries of obs: x and y, then z (HRAC's AntFall) or the block's x and y (GCMR's
# AntPush). Half-ranges in metres.
SUBGOAL_SPACES = {"xy": (10.0, 10.0), "xyz": (10.0, 10.0, 0.5), "xy_block": (10.0, 10.0, 2.0, 2.0)}


def uses_adjacency(args: Args) -> bool:
    return args.adjacency_weight > 0 or (args.landmark_weight > 0 and args.landmark_space == "adjacency")


def relabels_by_model(args: Args) -> bool:
    return args.model_relabeling and args.rollout_weight < 1


# ------------------------------------------------------------------------------------------------- subgoals


def subgoal_transition(achieved, subgoal, next_achieved):
    """h(s, g, s') = s + g - s' (HIRO): what is left to the same target, not clipped. [..., D]

    In shapes, here and below: B rows of a batch, D entries of a subgoal.
    """
    return achieved + subgoal - next_achieved


def intrinsic_reward(achieved, subgoal, next_achieved):
    """r(s, g, s') = -|s + g - s'| (HIRO), of the subgoal before the step. numpy, [..., D] -> [...]"""
    return -np.sqrt(np.square(subgoal_transition(achieved, subgoal, next_achieved)).sum(-1) + 1e-10)


def safe_norm(difference):
    """Euclidean length; its gradient at 0 is 0, not NaN. torch, [..., D] -> [...]"""
    return (difference.square().sum(-1) + 1e-10).sqrt()


# ------------------------------------------------------------------------------------------------- networks


class EnsembleLinear(nn.Module):
    """`members` linear layers as one batched product: [members, B, fan_in] -> [members, B, fan_out]."""

    def __init__(self, members: int, fan_in: int, fan_out: int):
        super().__init__()
        bound = fan_in**-0.5  # PyTorch's default for nn.Linear
        self.weight = nn.Parameter(torch.empty(members, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, fan_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias[:, None], x, self.weight)

    def member(self, index: int, x):
        """One member alone. [B, fan_in] -> [B, fan_out]"""
        return torch.addmm(self.bias[index], x, self.weight[index])


def init_output_(layers: list[nn.Module], bound: float):
    """As in HIRO's code: all biases 0, the output layer within +-bound. bound 0 leaves PyTorch's init."""
    if bound > 0:
        for layer in layers:
            nn.init.zeros_(layer.bias)
        nn.init.uniform_(layers[-1].weight, -bound, bound)


class Actor(nn.Module):
    """(obs, goal) -> action within +-limit. The manager's action is a subgoal, which is the worker's goal."""

    def __init__(self, input_scale, limit, hidden: int, output_init: float):
        super().__init__()
        self.register_buffer("input_scale", input_scale, persistent=False)  # [obs_dim + goal_dim], 0 hides
        self.register_buffer("limit", limit, persistent=False)  # [action_dim]
        sizes = [len(input_scale), hidden, hidden, len(limit)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        init_output_(list(self.layers), output_init)

    def forward(self, obs, goal):
        x = torch.cat([obs, goal], -1) * self.input_scale
        x = F.relu(self.layers[0](x))
        x = F.relu(self.layers[1](x))
        return self.limit * torch.tanh(self.layers[2](x))


class Critic(nn.Module):
    """Twin Q functions: (obs, goal, action) -> q [2, B]. Inputs [B, .] are shared, [2, B, .] one for each.

    --rest-value (off by default): Q = network - rest |goal|, rest = 1 / (1 - gamma) times the reward's scale.
    A worker that stays where it is pays |goal| at every step for ever, rest |goal| in all; with this known
    part taken out the network learns only what steps gain, rest (|goal| - |next goal|) each. The optimum is
    the same: it is potential-based shaping (Ng et al. 1999; Wiewiora 2003).
    easy to overlook: q1 repeats forward for one member, for speed; in a network of yours it may return
    self(...)[0].
    """

    def __init__(self, input_scale, hidden: int, output_init: float, rest: float = 0.0):
        super().__init__()
        self.rest = rest
        self.register_buffer("input_scale", input_scale, persistent=False)  # [obs + goal + action dims]
        sizes = [len(input_scale), hidden, hidden, 1]
        self.layers = nn.ModuleList(EnsembleLinear(2, a, b) for a, b in zip(sizes, sizes[1:]))
        init_output_(list(self.layers), output_init)

    def forward(self, obs, goal, action):
        x = torch.cat([obs, goal, action], -1) * self.input_scale
        x = F.relu(self.layers[0](x.expand(2, *x.shape[-2:])))
        x = F.relu(self.layers[1](x))
        return self.plus_resting(self.layers[2](x).squeeze(-1), goal)

    def q1(self, obs, goal, action):
        """The first Q function alone, which the actor follows. [B]"""
        x = torch.cat([obs, goal, action], -1) * self.input_scale
        x = F.relu(self.layers[0].member(0, x))
        x = F.relu(self.layers[1].member(0, x))
        return self.plus_resting(self.layers[2].member(0, x).squeeze(-1), goal)

    def plus_resting(self, q, goal):
        """q as the network says it, and the value of resting, which is known beforehand."""
        return q - self.rest * safe_norm(goal) if self.rest else q


def in_blocks(function, *tensors, rows: int = 1024):
    """function(*tensors [N, .]) by blocks of rows; their activations stay in a CPU's cache: 2.5 x as fast."""
    if tensors[0].is_cuda:
        return function(*tensors)
    return torch.cat([function(*block) for block in zip(*(tensor.split(rows) for tensor in tensors))])


def adam_step(optimizer, params: list, loss):
    """One step of these parameters on any loss; no other network's gradient is computed or touched."""
    for param, grad in zip(params, torch.autograd.grad(loss, params)):
        param.grad = grad.contiguous()  # easy to overlook: fused Adam ignores the strides of a transposed one
    optimizer.step()


class TD3:
    """One level of the hierarchy (Fujimoto et al. 2018). Only plumbing: what the methods differ in is below.

    goal is what the level is asked for: for the manager the task's goal, for the worker the subgoal.

    input_scale [obs_dim + goal_dim + action_dim] multiplies what the networks see, limit [action_dim] bounds
    the action, noise = (exploration std, target smoothing std, its clip) in units of the action. The worker
    also has half_range [D], of its subgoals, for redraw_subgoals, and rest, see Critic.
    """

    def __init__(self, input_scale, limit, gamma: float, noise: tuple, args: Args, half_range=None, rest=0.0):
        self.limit, self.gamma, self.tau = limit, gamma, args.tau
        self.half_range = half_range
        self.noise, self.target_noise, self.target_noise_clip = noise
        size = dict(hidden=args.hidden, output_init=args.output_init)
        self.actor, self.target_actor = (Actor(input_scale[: -len(limit)], limit, **size) for _ in range(2))
        self.critic, self.target_critic = (Critic(input_scale, rest=rest, **size) for _ in range(2))
        for net in (self.actor, self.target_actor, self.critic, self.target_critic):
            net.to(limit.device)
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.actor_params, self.critic_params = list(self.actor.parameters()), list(self.critic.parameters())
        self.target_actor_params = list(self.target_actor.requires_grad_(False).parameters())
        self.target_critic_params = list(self.target_critic.requires_grad_(False).parameters())
        adam = dict(fused=True, capturable=limit.is_cuda)
        self.actor_optimizer = torch.optim.Adam(self.actor_params, args.actor_lr, **adam)
        adam["weight_decay"] = args.critic_weight_decay
        self.critic_optimizer = torch.optim.Adam(self.critic_params, args.critic_lr, **adam)

    @torch.no_grad()
    def act(self, obs, goal, explore: bool):
        """obs [obs_dim], goal [goal_dim] -> action [action_dim], numpy. explore adds noise, then clips."""
        obs, goal = (torch.as_tensor(x, device=self.limit.device)[None] for x in (obs, goal))
        action = self.actor(obs, goal)[0]
        if explore:
            action = (action + torch.randn_like(action) * self.noise).clamp(-self.limit, self.limit)
        action = action.cpu().numpy()
        if not np.isfinite(action).all():
            fail("an actor's output is not finite: it diverged, or obs is not finite; model.pt is as it was")
        return action

    @torch.no_grad()
    def td_target(self, reward, terminated, next_obs, next_goal):
        """y = r + gamma (1 - terminated) min(Q1', Q2')(s', smoothed target action). reward [B] -> [B]"""
        next_action = self.target_actor(next_obs, next_goal)
        noise = torch.randn_like(next_action) * self.target_noise
        next_action = next_action + noise.clamp(-self.target_noise_clip, self.target_noise_clip)
        next_q = self.target_critic(next_obs, next_goal, next_action.clamp(-self.limit, self.limit)).amin(0)
        return reward + self.gamma * (1 - terminated) * next_q

    def critic_loss(self, td_target, obs, goal, action):
        """td_target [B] -> Huber loss of both critics, summed, and the mean Q for the log; both []"""
        q = self.critic(obs, goal, action)  # [2, B]
        return F.smooth_l1_loss(q, td_target.expand_as(q), reduction="none").mean(1).sum(), q.detach().mean()

    def critic_step(self, loss):
        adam_step(self.critic_optimizer, self.critic_params, loss)

    def actor_step(self, loss):
        adam_step(self.actor_optimizer, self.actor_params, loss)

    @torch.no_grad()
    def update_target_critic(self):
        """Polyak step of the target network: target += tau (online - target)."""
        torch._foreach_lerp_(self.target_critic_params, self.critic_params, self.tau)

    @torch.no_grad()
    def update_target_actor(self):
        torch._foreach_lerp_(self.target_actor_params, self.actor_params, self.tau)

    def state_dict(self) -> dict:
        parts = ("actor", "target_actor", "critic", "target_critic", "actor_optimizer", "critic_optimizer")
        return {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state: dict):
        for name in self.state_dict():
            if name in state or not name.endswith("optimizer"):  # published agents come without
                getattr(self, name).load_state_dict(state[name])
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                # as constructed: the file may come from another device, or from a run with other rates
                group |= optimizer.defaults


def explore(agent: TD3, obs, goal, uniform_share: float):
    """An action in training: with probability uniform_share a uniform one, else the policy's with noise.

    obs [obs_dim], goal [goal_dim] -> [action_dim], numpy.
    """
    if uniform_share == 0 or (uniform_share < 1 and torch.rand(()) >= uniform_share):
        return agent.act(obs, goal, explore=True)
    return ((2 * torch.rand_like(agent.limit) - 1) * agent.limit).cpu().numpy()


# --------------------------------------------------------------------------------------------------- replay


class ReplayBuffer:
    """Ring buffer of named fields. A float32 row per entry: adding is one copy, sampling one index_select."""

    def __init__(self, capacity: int, device, **shapes: tuple[int, ...]):
        self.shapes, self.sizes = shapes, [int(np.prod(shape)) for shape in shapes.values()]
        self.rows = torch.empty(capacity, sum(self.sizes), device=device)  # memory is taken as it fills
        self.added = 0  # entries ever added
        # len(self), where a recorded CUDA graph reads it anew; float32 would round above 2^24
        self.size = torch.zeros((), dtype=torch.float64, device=device)

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, **fields):
        row = np.concatenate([np.ravel(fields[name]) for name in self.shapes]).astype(np.float32, copy=False)
        self.rows[self.added % len(self.rows)].copy_(torch.from_numpy(row), non_blocking=True)
        self.added += 1
        self.size.fill_(len(self))

    def sample(self, count: int) -> SimpleNamespace:
        """count entries, uniformly with replacement; each field [count, *shape]."""
        index = (torch.rand(count, device=self.rows.device, dtype=torch.float64) * self.size).long()
        return self.unpack(self.rows.index_select(0, index))

    def latest(self, count: int) -> SimpleNamespace:
        """The newest count entries, oldest first."""
        index = torch.arange(self.added - count, self.added, device=self.rows.device) % len(self.rows)
        return self.unpack(self.rows.index_select(0, index))

    def unpack(self, rows) -> SimpleNamespace:
        """Rows [n, row size] -> their fields as views, [n, *shape]."""
        columns = zip(self.shapes.items(), rows.split(self.sizes, -1))
        return SimpleNamespace(**{name: c.reshape(len(rows), *shape) for (name, shape), c in columns})

    def state_dict(self) -> dict:
        rows = self.rows[: len(self)].clone()  # a view would save all its storage
        return {"rows": rows, "added": self.added}

    def load_state_dict(self, state: dict):
        if len(state["rows"]) != min(state["added"], len(self.rows)):
            raise ValueError("another capacity")
        if state["rows"].shape[1] != self.rows.shape[1]:
            raise ValueError("its replay has other fields: another task, or written by an older version")
        self.rows[: len(state["rows"])] = state["rows"]
        self.added = state["added"]
        self.size.fill_(len(self))


class Segment:
    """The steps between two decisions of the manager, padded to a whole period if the episode ends."""

    def __init__(self, period: int, obs_dim: int, action_dim: int):
        self.obs_seq = np.zeros((period + 1, obs_dim), np.float32)
        self.action_seq = np.zeros((period, action_dim), np.float32)
        self.length, self.reward = 0, 0.0

    def start(self, obs):
        self.obs_seq[:], self.action_seq[:] = obs, 0
        self.length, self.reward = 0, 0.0

    def add(self, action, reward: float, next_obs):
        self.action_seq[self.length] = action
        self.length += 1
        self.obs_seq[self.length :] = next_obs  # the last entry is the true end also of a short segment
        self.reward += reward

    def sequences(self) -> dict:
        return {"obs_seq": self.obs_seq, "action_seq": self.action_seq, "length": self.length}

    def state_dict(self) -> dict:
        return to_tensors(vars(self))

    def load_state_dict(self, state: dict):
        for name, value in state.items():
            setattr(self, name, value.numpy().copy() if torch.is_tensor(value) else value)


# ------------------------------------------------------------------------------------------- dynamics model


class DynamicsEnsemble(nn.Module):
    """E networks that predict the change of obs in one step as a Gaussian (GCMR, after PETS).

    Inputs and targets are standardised by the statistics of the data of the last training.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim + action_dim, args.dynamics_hidden, args.dynamics_hidden, 2 * obs_dim]
        self.layers = nn.ModuleList(
            EnsembleLinear(args.dynamics_members, a, b) for a, b in zip(sizes, sizes[1:])
        )
        for layer in self.layers:
            std = 0.5 * layer.weight.shape[1] ** -0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)
        self.register_buffer("input_mean", torch.zeros(sizes[0]))
        self.register_buffer("input_std", torch.ones(sizes[0]))
        self.register_buffer("delta_mean", torch.zeros(obs_dim))
        self.register_buffer("delta_std", torch.ones(obs_dim))
        self.register_buffer("low", torch.full((obs_dim,), torch.inf))  # least value of each entry so far
        self.register_buffer("high", torch.full((obs_dim,), -torch.inf))
        self.trained_at = 0  # environment step of the last training; 0: not yet

    def forward(self, obs, action):
        """[B, .] or [E, B, .] -> mean, log variance of the standardised change [E, B, .]"""
        x = (torch.cat([obs, action], -1) - self.input_mean) / (self.input_std + 1e-7)
        x = x.expand(len(self.layers[0].weight), *x.shape[-2:])
        x = F.silu(self.layers[0](x))
        x = F.silu(self.layers[1](x))
        mean, log_var = self.layers[2](x).chunk(2, -1)
        return mean, clamp_log_variance(log_var)

    def sample_delta(self, obs, action):
        """A draw of s' - s, each row from one random member. Differentiable. [B, .] -> [B, obs_dim]

        Rows are shuffled and dealt out in equal shares (some twice, to fill up), and put back in order, so
        that each row is computed once and not by all members.
        """
        members, rows = len(self.layers[0].weight), len(obs)
        order = torch.rand(rows, device=obs.device).argsort()
        each = -(-rows // members)  # rows per member, rounded up
        index = order.repeat(members)[: each * members].view(each, members).T  # [E, each]
        mean, log_var = self(obs[index], action[index])
        delta = (mean + torch.randn_like(mean) * (0.5 * log_var).exp()).transpose(0, 1).flatten(0, 1)[:rows]
        return delta[order.argsort()] * self.delta_std + self.delta_mean

    def predict_next(self, obs, action):
        """A draw of s', kept within the box of the states that it was trained on. [B, obs_dim]"""
        return torch.clamp(obs + self.sample_delta(obs, action), *self.box())

    def box(self):
        """The states of all trainings, half their range wider on each side (released: it grows on and on)."""
        margin = 0.5 * (self.high - self.low)
        return self.low - margin, self.high + margin

    @torch.no_grad()
    def fit_statistics(self, obs, action, delta):
        inputs = torch.cat([obs, action], -1)
        self.input_mean.copy_(inputs.mean(0))
        std = inputs.std(0)
        self.input_std.copy_(torch.where(std < 1e-6, 1.0, std))  # one that never moved is not scaled
        self.delta_mean.copy_(delta.mean(0))
        self.delta_std.copy_(delta.std(0) + 1e-7)

    @torch.no_grad()
    def widen_box(self, obs):
        self.low.copy_(torch.minimum(self.low, obs.amin(0)))
        self.high.copy_(torch.maximum(self.high, obs.amax(0)))

    @torch.no_grad()
    def relative_error(self, obs, action, delta) -> float:
        """Squared error / variance, the larger of here and in training; mean over dims. 1: knows nothing."""
        prediction = self(obs, action)[0].mean(0) * self.delta_std + self.delta_mean
        std = torch.maximum(delta.std(0) + 1e-7, self.delta_std)  # some entries move in some rows only
        return float(((prediction - delta) / std).square().mean())

    def get_extra_state(self):
        return {"trained_at": self.trained_at}

    def set_extra_state(self, state):
        self.trained_at = state["trained_at"]


def clamp_log_variance(log_var, low: float = -10.0, high: float = 0.5):
    """Soft bounds (PETS), fixed here as in the released code."""
    log_var = high - F.softplus(high - log_var)
    return low + F.softplus(log_var - low)


def dynamics_loss(mean, log_var, target):
    """Gaussian likelihood loss, sum over members of mean(err^2 / var) + mean(log var). [E, B, .] -> []"""
    error = (mean - target).square() * (-log_var).exp()
    return (error.mean((1, 2)) + log_var.mean((1, 2))).sum()


def train_dynamics(
    dynamics: DynamicsEnsemble, optimizer, buffer: ReplayBuffer, args: Args, step: int
) -> dict:
    """Some gradient steps on one-step transitions of the replay; every fifth row is held out, for the log.

    One step, although the released code feeds its model displacements of ten steps (docs: deviations).
    """
    rows = torch.arange(len(buffer), device=buffer.rows.device)
    if len(buffer) > args.dynamics_rows:
        newest = (buffer.added - 1 - torch.arange(args.dynamics_rows // 5, device=rows.device)) % len(buffer)
        random_rows = torch.randint(len(buffer), (args.dynamics_rows,), device=rows.device)
        rows = torch.cat([random_rows, newest]).unique()
    batch = buffer.unpack(buffer.rows[rows])
    data = (batch.obs, batch.action, batch.next_obs - batch.obs)
    dynamics.widen_box(torch.cat([batch.obs, batch.next_obs]))
    hold = rows % 5 == 4  # the same ones at each training, as the networks remember what they learned
    held_out, data = [x[hold] for x in data], [x[~hold] for x in data]
    metrics = {"dynamics/error_before": dynamics.relative_error(*held_out)} if dynamics.trained_at else {}
    dynamics.fit_statistics(*data)
    obs, action, target = data[0], data[1], (data[2] - dynamics.delta_mean) / dynamics.delta_std
    params = list(dynamics.parameters())
    for _ in range(args.dynamics_updates if dynamics.trained_at else args.dynamics_first_updates):
        shape = (args.dynamics_members, args.dynamics_batch_size)  # each member its own rows
        index = torch.randint(len(obs), shape, device=obs.device)
        loss = dynamics_loss(*dynamics(obs[index], action[index]), target[index])
        adam_step(optimizer, params, loss)
    dynamics.trained_at = step
    return metrics | {"dynamics/loss": loss.detach(), "dynamics/error": dynamics.relative_error(*held_out)}


# ------------------------------------------------------------------------------------------------- adjacency


class Adjacency(nn.Module):
    """Which cells of 1 m are a few steps apart, and an embedding in which those are near (HRAC).

    Positions come per trajectory; cells that occur within `lags` steps of each other become adjacent.
    """

    def __init__(self, dims: int, args: Args):
        super().__init__()
        sizes = [dims, 128, 128, 128, 32]
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.embed = nn.Sequential(*layers[:-1])
        # adjacent: up to so many steps apart, as released; the paper's text has manager_period
        self.lags = int(args.manager_period * args.adjacency_factor) - 1
        self.cells: dict[tuple, int] = {}  # cell -> its row in the matrix
        self.matrix = np.eye(0, dtype=bool)  # [cells, cells]
        self.positions = 0  # collected since the last training

    def add_trajectory(self, achieved: np.ndarray):
        """achieved [T + 1, D], the positions of one episode in order."""
        cells = [tuple(cell) for cell in np.rint(achieved).astype(int).tolist()]  # halves to even
        self.positions += len(cells)
        pairs = {
            (cells[i], cells[i + lag]) for lag in range(1, self.lags + 1) for i in range(len(cells) - lag)
        }
        for cell in dict.fromkeys(cells):
            self.cells.setdefault(cell, len(self.cells))
        grown = np.eye(len(self.cells), dtype=bool)
        grown[: len(self.matrix), : len(self.matrix)] = self.matrix
        for a, b in pairs:
            grown[self.cells[a], self.cells[b]] = grown[self.cells[b], self.cells[a]] = True
        self.matrix = grown

    def get_extra_state(self):
        cells = [list(cell) for cell in self.cells]
        return {"cells": cells, "matrix": torch.from_numpy(self.matrix), "positions": self.positions}

    def set_extra_state(self, state):
        self.cells = {tuple(cell): row for row, cell in enumerate(state["cells"])}
        self.matrix, self.positions = state["matrix"].numpy().copy(), state["positions"]


def contrastive_loss(distance, adjacent, args: Args):
    """Pull adjacent cells within near, push others beyond far (HRAC). distance, adjacent [B] -> []"""
    pull = adjacent * F.relu(distance - args.adjacency_near)
    push = (1 - adjacent) * F.relu(args.adjacency_far - distance)
    return pull.mean() + push.mean()


def embedding_distance(a, b):
    return ((a - b).square().sum(-1) + 1e-12).sqrt()


def train_adjacency(adjacency: Adjacency, optimizer, args: Args) -> dict:
    """Passes over all pairs of known cells in random order."""
    device, params = next(adjacency.parameters()).device, list(adjacency.parameters())
    cells = torch.tensor(list(adjacency.cells), dtype=torch.float32, device=device)
    labels = torch.from_numpy(adjacency.matrix).to(device, torch.float32)
    pairs = torch.triu_indices(len(cells), len(cells), 1, device=device)
    adjacency.positions = 0
    if pairs.shape[1] == 0:
        return {}
    for _ in range(args.adjacency_epochs):
        losses = []  # of this pass
        order = pairs[:, torch.randperm(pairs.shape[1], device=device)]
        for a, b in order.split(args.adjacency_batch_size, 1):
            embedded = adjacency.embed(torch.cat([cells[a], cells[b]]))
            distance = embedding_distance(*embedded.chunk(2))
            loss = contrastive_loss(distance, labels[a, b], args)
            adam_step(optimizer, params, loss)
            losses.append(loss.detach())
    return {"adjacency/loss": torch.stack(losses).mean()}


# --------------------------------------------------------------------------------------------------- novelty


EXACT = "donot_use_mm_for_euclid_dist"  # the product form of cdist errs by a millimetre


class Novelty(nn.Module):
    """Random network distillation, and the most novel states as landmarks (HIGL)."""

    def __init__(self, obs_dim: int, dims: int, args: Args):
        super().__init__()
        self.predictor, self.target = (
            nn.Sequential(
                nn.Linear(obs_dim, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)
            )
            for _ in range(2)
        )
        self.target.requires_grad_(False)
        self.dims = dims
        count = args.novelty_landmarks
        self.register_buffer("obs", torch.zeros(count, obs_dim))  # the landmarks, most novel first
        self.register_buffer("score", torch.full((count,), -torch.inf))  # -inf: an empty place

    def novelty(self, obs):
        """1/2 |f(s) - f*(s)|^2 [B]"""
        return 0.5 * (self.predictor(obs) - self.target(obs)).square().sum(-1)

    def loss(self, obs):
        return (self.predictor(obs) - self.target(obs)).square().mean()

    def landmarks(self) -> np.ndarray:
        """Those that there are, most novel first. numpy, [n, obs_dim]"""
        return self.obs[self.score > -torch.inf].cpu().numpy()

    @torch.no_grad()
    def visit(self, obs, args: Args):
        """Put an episode's states [T + 1, obs_dim] among the most novel, in place of old ones near them."""
        self.update_queue(obs, self.novelty(obs), args)

    def update_queue(self, obs, score, args: Args):
        distance = torch.cdist(self.obs[:, : self.dims], obs[:, : self.dims], compute_mode=EXACT)
        # a place that was visited again is no longer novel, and stored scores are never refreshed: drop it
        kept = (self.score > -torch.inf) & ~(distance < args.novelty_radius).any(1)
        obs, score = torch.cat([self.obs[kept], obs]), torch.cat([self.score[kept], score])
        best = score.argsort(descending=True, stable=True)
        best = best[first_occurrences(obs[best, : self.dims])][: len(self.obs)]
        self.obs.zero_()
        self.score.fill_(-torch.inf)
        self.obs[: len(best)], self.score[: len(best)] = obs[best], score[best]


def first_occurrences(rows):
    """Indices of rows [N, D] without the exact repetitions of earlier ones."""
    _, inverse = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((len(rows),), len(rows), device=rows.device)
    first = first.scatter_reduce(0, inverse, torch.arange(len(rows), device=rows.device), "amin")
    return first[first < len(rows)].sort().values


def update_novelty(novelty: Novelty, optimizer, buffer: ReplayBuffer, args: Args) -> dict:
    """The predictor learns to match the fixed network on replayed states: the familiar scores low."""
    loss = novelty.loss(buffer.sample(args.batch_size).obs)
    adam_step(optimizer, list(novelty.predictor.parameters()), loss)
    return {"novelty/loss": loss.detach()}


# ----------------------------------------------------------------------------------------------- relabeling


def make_candidates(subgoal, displacement, half_range, args: Args):
    """K subgoals that may explain a segment: the stored one, its displacement, clipped draws around that.

    subgoal, displacement [B, D] -> [B, K, D].
    """
    batch, dims = subgoal.shape
    noise = torch.randn(batch, args.candidates - 2, dims, device=subgoal.device)
    draws = displacement[:, None] + args.candidate_noise * half_range * noise
    return torch.cat([subgoal[:, None], displacement[:, None], draws.clamp(-half_range, half_range)], 1)


def score_candidates(worker: TD3, candidates, batch):
    """Log-likelihood of the recorded actions under each candidate (HIRO). [B, K, D] -> [B, K]

    -1/2 sum_i |a_i - mu(s_i, g_i)|^2 in units of the action's limit (its constant left out, as it is the same
    for all candidates); g_i follows the subgoal transition.
    B rows, K candidates, D entries of a subgoal, c steps of a period, A entries of an action.
    """
    dims, period = candidates.shape[-1], batch.action_seq.shape[1]
    achieved_seq = batch.obs_seq[:, None, :-1, :dims]  # [B, 1, c, D]
    # what is left of each candidate at each step, s_0 + g - s_i [B, K, c, D]
    subgoals = subgoal_transition(achieved_seq[:, :, :1], candidates[:, :, None], achieved_seq)
    obs = batch.obs_seq[:, None, :-1].expand(*subgoals.shape[:-1], -1)  # [B, K, c, obs_dim]
    actions = in_blocks(worker.actor, obs.flatten(0, 2), subgoals.flatten(0, 2)).view(*obs.shape[:3], -1)
    error = (batch.action_seq[:, None] - actions) / worker.limit  # [B, K, c, A]
    # easy to overlook: a segment that the end of an episode cut short counts only its own steps
    valid = torch.arange(period, device=obs.device) < batch.length[:, None]  # [B, c]
    return -0.5 * (error.square().sum(-1) * valid[:, None]).sum(-1)


def score_rollouts(worker: TD3, dynamics: DynamicsEnsemble, candidates, batch, half_range, args: Args):
    """score_candidates on states that drift from the recorded ones to those of the model. [B, K, D] -> [B, K]

    The recorded states are where the old worker went, the model's where the present one would go under this
    candidate. From the second step on it acts in w^i x recorded + (1 - w^i) x predicted states, i = 1, 2, ..
    (GCMR): the model's errors add up, so that its share grows slowly, from 5 to 37 %. Subgoals are clipped at
    each step, unlike in score_candidates.
    """
    batch_size, count, dims = candidates.shape
    obs = batch.obs_seq[:, 0].repeat_interleave(count, 0)  # [B * K, obs_dim]
    subgoal, score = candidates.flatten(0, 1), 0.0
    for i in range(batch.action_seq.shape[1]):
        action = worker.actor(obs, subgoal)
        error = (batch.action_seq[:, i, None] - action.unflatten(0, (batch_size, count))) / worker.limit
        score = score - 0.5 * error.square().sum(-1) * (i < batch.length)[:, None]
        if i + 1 == batch.action_seq.shape[1]:
            break  # where the last action leads is not scored
        recorded = batch.obs_seq[:, i + 1].repeat_interleave(count, 0)
        weight = args.rollout_weight ** (i + 1)
        next_obs = torch.lerp(dynamics.predict_next(obs, action), recorded, weight)
        subgoal = subgoal_transition(obs[:, :dims], subgoal, next_obs[:, :dims]).clamp(
            -half_range, half_range
        )
        obs = next_obs
    return score


def shift_towards(subgoal, best, half_range, args: Args):
    """Soft relabeling (GCMR): the subgoal moves towards the best candidate. [B, D] -> [B, D]

    The unit of relabel_shift is the norm of the whole batch of differences, so that the batch moves by
    relabel_shift / sqrt(batch_size) in root mean square, 1.77 at 20, whatever the differences. With the norm
    of each row, as printed in the paper, 20 would overshoot almost always.
    """
    if args.relabel_shift == 0:
        return best
    difference = best - subgoal
    norm = difference.norm() if args.relabel_norm == "batch" else difference.norm(dim=-1, keepdim=True)
    return (subgoal + args.relabel_shift * difference / (norm + 1e-7)).clamp(-half_range, half_range)


@torch.no_grad()
def relabel_subgoals(worker: TD3, dynamics: DynamicsEnsemble | None, batch, half_range, args: Args):
    """The subgoals with which to train the manager on old segments [B, D]; the replay stays as it is.

    dynamics None: scored on the recorded states, as in HIRO.
    """
    dims = batch.subgoal.shape[-1]
    displacement = batch.obs_seq[:, -1, :dims] - batch.obs_seq[:, 0, :dims]
    candidates = make_candidates(batch.subgoal, displacement, half_range, args)
    if dynamics is not None:
        score = score_rollouts(worker, dynamics, candidates, batch, half_range, args)
    else:
        score = score_candidates(worker, candidates, batch)
    index = score.argmax(1)  # the first wins ties
    best = candidates[torch.arange(len(index), device=index.device), index]
    return shift_towards(batch.subgoal, best, half_range, args)


# -------------------------------------------------------------------------------------------------- planning


def farthest_point_sample(points, count: int):
    """Indices of points spread out: the first, then always the one farthest from those chosen.

    points [N, D] -> [count], and which of these to use [count], bool: none any more once all others are
    nearer than 1e-3 (4.5 cm in x and y). Distance is the mean of squares over D.
    """
    chosen = [torch.zeros((), dtype=torch.long, device=points.device)]
    distance, spread = (points - points[0]).square().mean(-1), []
    for _ in range(min(count, len(points)) - 1):
        spread.append(distance.max())
        chosen.append(distance.argmax())
        farthest = points.index_select(0, chosen[-1][None])  # [1, D], without asking a GPU for the index
        distance = torch.minimum(distance, (points - farthest).square().mean(-1))
    apart = torch.stack([torch.full_like(distance[0], torch.inf), *spread]) >= 1e-3
    return torch.stack(chosen), apart


# How far is it from i to j for the worker? Its reward is minus the distance left, so its Q at i of the
# subgoal to j is minus a discounted sum of distances: the higher, the nearer. With gamma 0.95 an ant that
# rests has -20 per metre; -38 (edge_cutoff) is 1.9 m for it, 3.6 m for one that walks 1 m per period straight
# to its target, and -10 (direct_value) 0.5 m and 1.6 m (sums over its way). An edge is such a value, at most
# 0. n landmarks, G goals (one per row of the batch). Shapes are fixed, for CUDA graphs: empty places stay,
# but lead nowhere.


def edge_values(worker: TD3, obs, targets):
    """What the worker thinks of going from obs [N, obs_dim] to targets [M, D]: min Q, at most 0. [N, M]"""
    subgoals = (targets - obs[:, None, : targets.shape[-1]]).flatten(0, 1)  # [N * M, D]
    obs = obs.repeat_interleave(len(targets), 0)

    def value(obs, subgoal):
        return worker.critic(obs, subgoal, worker.actor(obs, subgoal)).amin(0)

    return in_blocks(value, obs, subgoals).clamp(max=0).view(-1, len(targets))


def clip_edges(edges, cutoff: float):
    """Cut edges [n, n + G] that are below the cutoff and not the best one into their node. float64

    Without the exception nothing might reach a node. Cut is -1e6, not -inf: with no way left at all the least
    bad one is still the largest.
    """
    itself = torch.eye(*edges.shape, dtype=torch.bool, device=edges.device)
    edges = edges.double()
    best = edges.masked_fill(itself, -torch.inf).amax(0)  # [n + G]
    cut = edges < best.clamp(max=cutoff)  # min(best, cutoff)
    return torch.where(cut, edges - 1e6, edges).masked_fill(itself, 0.0)


def best_path_values(edges):
    """Values of the best paths over landmarks to each goal, exact. edges [n, n + G] -> [n, G]

    Floyd and Warshall; goals have no outgoing edges and are never passed through. float64, as cut edges are
    1e6 away from the differences that count.
    """
    best = edges.double()
    for k in range(len(edges)):
        best = torch.maximum(best, best[:, k, None] + best[k])
    return best[:, len(edges) :]


def soft_path_values(edges, heat: float, rounds: int = 20):
    """The released search: 20 rounds of V_ij <- softmax average over k of V_ik + V_kj. [n, n + G] -> [n, G]

    An average, not a maximum; its diagonal drifts below 0. Kept to reproduce.
    """
    n = len(edges)
    inner, goals = edges[:, :n].double(), edges[:, n:].double()
    for _ in range(rounds):
        through = inner[:, :, None] + inner[None]  # [n, k, n]
        to_goals = inner[:, :, None] + goals[None]  # [n, k, G]
        to_goals = torch.cat([to_goals, goals[:, None]], 1)  # k may be the goal itself
        inner = (torch.softmax(heat * through, 1) * through).sum(1)
        goals = (torch.softmax(heat * to_goals, 1) * to_goals).sum(1)
    return goals


def choose_landmarks(values, direct, landmarks, goal, direct_value: float):
    """Best landmark for each query, or the goal itself if it is near enough to go directly.

    values [B, n] of the paths over each landmark, direct [B] edges to the goals [B, D], landmarks [n, D].
    """
    chosen = landmarks[values.argmax(1)]  # the first wins ties
    return torch.where((direct > direct_value)[:, None], goal, chosen)


def shift_landmark(achieved, landmark, shift: float):
    """Pseudo-landmark: `shift` metres from achieved towards the landmark (HIGL). [B, D]"""
    difference = landmark - achieved
    return achieved + shift * difference / difference.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def planner_precision(args: Args, obs):
    return torch.autocast(obs.device.type, torch.bfloat16, enabled=args.planner_bfloat16)


class LandmarkGraph(nn.Module):
    """The landmarks and the edges between them: a third of a plan's work, so they can be kept for several.

    Empty until the planner starts, and throughout with landmark_weight 0: `present` says which places count.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        n = min(args.coverage_landmarks, args.coverage_pool) + args.novelty_landmarks
        self.register_buffer("obs", torch.zeros(n, obs_dim))
        self.register_buffer("edges", torch.zeros(n, n))
        self.register_buffer("present", torch.zeros(n, dtype=torch.bool))  # False: an empty place
        self.plans = 0  # made so far

    def next_is_new(self, args: Args) -> bool:
        """Count one plan more; is it the first with a new graph?"""
        self.plans += 1
        return (self.plans - 1) % args.planner_keeps_graph == 0

    @torch.no_grad()
    def renew(self, worker: TD3, novelty: Novelty, buffer: ReplayBuffer, dims: int, args: Args):
        """Draw coverage landmarks, add the novel ones, and score the edges."""
        pool = buffer.sample(args.coverage_pool).obs
        coverage, apart = farthest_point_sample(pool[:, :dims], args.coverage_landmarks)
        self.obs.copy_(torch.cat([pool[coverage], novelty.obs]))
        self.present.copy_(torch.cat([apart, novelty.score > -torch.inf]))
        with planner_precision(args, self.obs):
            self.edges.copy_(edge_values(worker, self.obs, self.obs[:, :dims]))

    def get_extra_state(self):
        return {"plans": self.plans}

    def set_extra_state(self, state):
        self.plans = state["plans"]


@torch.no_grad()
def plan_landmarks(worker: TD3, graph: LandmarkGraph, obs, goal, args: Args):
    """The pseudo-landmarks at which the subgoals should aim. obs [B, obs_dim], goal [B, D] -> [B, D]

    Edges among the landmarks, and from them to each row's goal; the best path from each landmark to each
    goal; for each row the landmark with the best sum of the edge to it and its path.
    """
    dims = goal.shape[-1]
    landmarks = graph.obs[:, :dims]
    with planner_precision(args, obs):
        to_goals = edge_values(worker, graph.obs, goal)  # [n, B]
        to_landmarks = edge_values(worker, obs, landmarks).double()  # [B, n]
    edges = torch.cat([graph.edges, to_goals], 1)  # [n, n + B]
    edges = edges.masked_fill(~graph.present[:, None], -1e12)  # no way leads on from an empty place
    edges = clip_edges(edges, args.edge_cutoff)
    exact = args.path_search == "exact"
    path_values = best_path_values(edges) if exact else soft_path_values(edges, args.path_heat)  # [n, B]
    to_landmarks = torch.where(to_landmarks < args.edge_cutoff, to_landmarks - 1e6, to_landmarks)
    subgoal = goal - obs[:, :dims]
    direct = worker.critic(obs, subgoal, worker.actor(obs, subgoal)).amin(0)  # the edge to the goal itself
    landmark = choose_landmarks(to_landmarks + path_values.T, direct, landmarks, goal, args.direct_value)
    return shift_landmark(obs[:, :dims], landmark, args.landmark_shift)


# --------------------------------------------------------------------------------------------------- losses


def adjacency_loss(adjacency: Adjacency, achieved, subgoal, args: Args):
    """Hinge on the embedding distance from here to the subgoal (HRAC), for the manager's actor.

    achieved, subgoal [B, D] -> []; the subgoal is how far to go, not where.
    It acts from the first update on, until adjacency_every with an untrained embedding, as released.
    """
    margin = 0.5 * (args.adjacency_near + args.adjacency_far)
    distance = embedding_distance(adjacency.embed(achieved), adjacency.embed(achieved + subgoal))
    return F.relu(distance - margin).mean()


def landmark_loss(adjacency: Adjacency, achieved, subgoal, pseudo_landmark, args: Args):
    """How far the subgoal's target is from the pseudo-landmark, for the manager's actor.

    achieved, subgoal, pseudo_landmark (a place) [B, D] -> []: the mean square over rows and entries (ACLG),
    or a hinge on the embedded distance (HIGL).
    """
    target = achieved + subgoal
    if args.landmark_space == "goal":
        return (pseudo_landmark - target).square().mean()
    margin = 0.5 * (args.adjacency_near + args.adjacency_far)
    distance = embedding_distance(adjacency.embed(pseudo_landmark), adjacency.embed(target))
    return F.relu(distance - margin).mean()


def gradient_penalty(worker: TD3, dynamics: DynamicsEnsemble, obs, subgoal, args: Args) -> tuple:
    """Hinge on the critics' gradient by the action (GCMR). Returns it and numbers for the log.

    Q is a discounted sum of rewards, so it should not change faster with the action than the reward does,
    over 1 - gamma; a steeper critic makes up differences between actions. The paper's bound is k = sqrt(A)
    L_r / (1 - gamma), one number per batch, with L_r the steepest slope in it of the reward -|s + g - s'| =
    -|g - change| under the model. obs [B, obs_dim], subgoal [B, D].

    As released the reward is unscaled: with --worker-reward-scale 1.5 (AntPush-Small) k is too low.
    """
    if args.gradient_penalty_form == "paper":
        action = worker.actor(obs, subgoal).detach()
    else:  # the released code: actions within +-1 (the ants' limit is 30)
        obs = obs.repeat_interleave(args.gradient_penalty_copies, 0)
        subgoal = subgoal.repeat_interleave(args.gradient_penalty_copies, 0)
        action = 2 * torch.rand(len(obs), len(worker.limit), device=obs.device) - 1
    return penalty_at(worker, dynamics, obs, subgoal, action, args)


def penalty_at(worker: TD3, dynamics: DynamicsEnsemble, obs, subgoal, action, args: Args) -> tuple:
    """gradient_penalty at given actions [B, A]; apart, for the tests."""
    action = action.requires_grad_()
    change = dynamics.sample_delta(obs, action)[:, : subgoal.shape[-1]]
    distance = (change - subgoal).norm(dim=-1)  # minus the model's reward
    reward_slope = torch.autograd.grad(distance.sum(), action)[0].norm(dim=-1).amax()
    bound = action.shape[-1] ** 0.5 / (1 - worker.gamma) * reward_slope
    if args.gradient_penalty_form == "released":
        bound = bound / len(action)
    slope = action_slope(worker.critic, obs, subgoal, action.detach())  # [2, B, A]
    norm = (slope.square().sum(-1) + 1e-12).sqrt()
    diagnostics = {"worker/gradient_bound": bound, "worker/gradient_norm": norm.mean()}
    diagnostics["worker/reward_slope"] = reward_slope
    return F.relu(norm - bound).square().sum(0).mean(), diagnostics


def action_slope(critic: Critic, obs, goal, action):
    """dQ/da of both Q functions, to be trained itself. [2, B, action_dim]

    The chain rule by hand: the masks of the ReLUs are constants, so its gradient takes one backward pass,
    where autograd would take a double one through the whole network. easy to overlook: it repeats
    Critic.forward (without the value of resting, in which the action has no part); for another network take
    autograd.grad(q.sum(), action, create_graph=True) of each Q.
    """
    with torch.no_grad():
        x = torch.cat([obs, goal, action], -1) * critic.input_scale
        first = critic.layers[0](x.expand(2, *x.shape))
        masks = first > 0, critic.layers[1](F.relu(first)) > 0  # [2, B, hidden] each
    weights = [layer.weight.mT for layer in critic.layers]  # [2, fan_out, fan_in]
    slope = (masks[0] * ((masks[1] * weights[2]) @ weights[1])) @ weights[0]
    return (slope * critic.input_scale)[..., -action.shape[-1] :]


def rollout_planning_loss(manager: TD3, worker: TD3, dynamics: DynamicsEnsemble, obs, goal, args: Args):
    """-Q of the manager after one modelled step of the worker (GCMR), for the worker's actor.

    Each of the B observations meets several goals of the batch and several subgoals for each.
    """
    goals, subgoals = args.rollout_planning_goals, args.rollout_planning_subgoals
    obs = obs.repeat_interleave(goals * subgoals, 0)
    goal = goal.repeat(goals, 1)
    goal = goal[torch.rand(len(goal), device=goal.device).argsort()].repeat_interleave(subgoals, 0)
    with torch.no_grad():
        subgoal = manager.actor(obs, goal)
        subgoal = subgoal + args.rollout_planning_noise * manager.limit * torch.randn_like(subgoal)
        subgoal = subgoal.clamp(-manager.limit, manager.limit)
        noise = torch.randn_like(subgoal) * manager.target_noise
        noise = noise.clamp(-manager.target_noise_clip, manager.target_noise_clip)
    return planning_value_loss(manager, worker, dynamics, obs, goal, subgoal, noise)


def planning_value_loss(manager: TD3, worker: TD3, dynamics: DynamicsEnsemble, obs, goal, subgoal, noise):
    """rollout_planning_loss at given subgoals [B, D], and noise for new_subgoal; apart, for the tests."""
    dims = subgoal.shape[-1]
    next_obs = dynamics.predict_next(obs, worker.actor(obs, subgoal))
    moved_subgoal = subgoal_transition(obs[:, :dims], subgoal, next_obs[:, :dims])
    new_subgoal = (manager.actor(next_obs, goal) + noise).clamp(-manager.limit, manager.limit)
    value = manager.critic(next_obs, goal, moved_subgoal).amin(0) + manager.critic(
        next_obs, goal, new_subgoal
    ).amin(0)
    return -0.5 * value.mean()


# -------------------------------------------------------------------------------------------------- updates


class UpdateCounts:
    """Which terms are due at the worker's next critic update. *_with_model: since the model was trained.

    Counted here, as a step may have several critic updates.
    """

    def __init__(self):
        self.critic = self.critic_with_model = self.actor_with_model = 0

    def next(self, model_trained: bool, args: Args) -> dict:
        self.critic += 1
        with_actor = self.critic % args.worker_actor_every == 0
        terms = {"with_actor": with_actor, "with_penalty": False, "with_planning": False}
        if model_trained:
            penalty_due = self.critic_with_model % args.gradient_penalty_every == 0
            terms["with_penalty"] = args.gradient_penalty_weight > 0 and penalty_due
            self.critic_with_model += 1
        if model_trained and with_actor:
            planning_due = self.actor_with_model % args.rollout_planning_every == 0
            terms["with_planning"] = args.rollout_planning_weight > 0 and planning_due
            self.actor_with_model += 1
        return terms

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict):
        vars(self).update(state)


def redraw_subgoals(worker: TD3, batch, args: Args):
    """A share of the worker's rows as if they had been done for another subgoal, uniform in its range.

    HIRO section 5.2, lower-level re-labelling. What happened does not depend on the subgoal and the reward of
    any other is known, so each step teaches all directions, whatever was asked for (Kaelbling 1993).
    Changes subgoal, next_subgoal [B, D] and reward [B] of batch.
    """
    if args.redrawn_subgoals == 0:
        return batch
    dims = batch.subgoal.shape[-1]
    achieved, next_achieved = batch.obs[:, :dims], batch.next_obs[:, :dims]
    subgoal = (2 * torch.rand_like(batch.subgoal) - 1) * worker.half_range
    next_subgoal = subgoal_transition(achieved, subgoal, next_achieved)
    # batch.reward is -own times what holds for any subgoal: 1 / (1 - gamma) at a death, a reward scale if any
    own = safe_norm(subgoal_transition(achieved, batch.subgoal, next_achieved))
    reward = batch.reward * safe_norm(next_subgoal) / own
    chosen = torch.rand_like(batch.reward) < args.redrawn_subgoals
    batch.reward = torch.where(chosen, reward, batch.reward)
    batch.subgoal = torch.where(chosen[:, None], subgoal, batch.subgoal)
    batch.next_subgoal = torch.where(chosen[:, None], next_subgoal, batch.next_subgoal)
    return batch


def update_worker(
    worker: TD3,
    manager: TD3,
    dynamics: DynamicsEnsemble,
    buffer: ReplayBuffer,
    manager_buffer: ReplayBuffer,
    args: Args,
    with_actor: bool,
    with_penalty: bool,
    with_planning: bool,
) -> dict:
    """One update of the worker's critics and their targets; with_actor: of its actor and that target, too.

    In hiro.py all targets move with the actor.
    """
    batch = redraw_subgoals(worker, buffer.sample(args.batch_size), args)
    td_target = worker.td_target(batch.reward, batch.terminated, batch.next_obs, batch.next_subgoal)
    critic_loss, q = worker.critic_loss(td_target, batch.obs, batch.subgoal, batch.action)
    losses = {"worker/critic_loss": critic_loss, "worker/q": q}
    if with_penalty:
        penalty, diagnostics = gradient_penalty(worker, dynamics, batch.obs, batch.subgoal, args)
        critic_loss = critic_loss + args.gradient_penalty_weight * penalty
        losses |= {"worker/gradient_penalty": penalty} | diagnostics
    worker.critic_step(critic_loss)
    worker.update_target_critic()
    if with_actor:
        action = worker.actor(batch.obs, batch.subgoal)
        actor_loss = -worker.critic.q1(batch.obs, batch.subgoal, action).mean()
        losses["worker/actor_loss"] = actor_loss
        if with_planning:
            start = manager_buffer.sample(args.batch_size)
            planning = rollout_planning_loss(manager, worker, dynamics, start.obs_seq[:, 0], start.goal, args)
            actor_loss = actor_loss + args.rollout_planning_weight * planning
            losses["worker/planning_loss"] = planning
        worker.actor_step(actor_loss)
        worker.update_target_actor()
    return {name: loss.detach() for name, loss in losses.items()}


def update_manager(
    manager: TD3,
    worker: TD3,
    dynamics: DynamicsEnsemble,
    adjacency: Adjacency,
    novelty: Novelty,
    graph: LandmarkGraph,
    buffer: ReplayBuffer,
    worker_buffer: ReplayBuffer,
    args: Args,
    with_model: bool,
    with_planner: bool,
    with_new_graph: bool,
) -> dict:
    """One update of the manager on relabeled segments: critics, plan, actor, targets, all at each update."""
    batch = buffer.sample(args.batch_size)
    obs, next_obs = batch.obs_seq[:, 0], batch.obs_seq[:, -1]
    relabeled = relabel_subgoals(worker, dynamics if with_model else None, batch, manager.limit, args)
    td_target = manager.td_target(batch.reward, batch.terminated, next_obs, batch.goal)
    critic_loss, q = manager.critic_loss(td_target, obs, batch.goal, relabeled)
    manager.critic_step(critic_loss)
    moved = relabeled - batch.subgoal
    losses = {
        "manager/critic_loss": critic_loss,
        "manager/q": q,
        "manager/relabeled_share": (moved != 0).any(-1).float().mean(),
        "manager/relabeled_distance": moved[:, :2].norm(dim=-1).mean(),
    }
    subgoal = manager.actor(obs, batch.goal)
    achieved = obs[:, : subgoal.shape[-1]]
    actor_loss = -manager.critic.q1(obs, batch.goal, subgoal).mean()
    losses["manager/actor_loss"] = actor_loss
    if args.adjacency_weight > 0:
        losses["manager/adjacency_loss"] = adjacency_loss(adjacency, achieved, subgoal, args)
        actor_loss = actor_loss + args.adjacency_weight * losses["manager/adjacency_loss"]
    if args.landmark_weight > 0:
        rows = args.planner_rows or args.batch_size
        here = achieved[:rows]
        if with_new_graph:
            graph.renew(worker, novelty, worker_buffer, subgoal.shape[-1], args)
        if with_planner:
            pseudo_landmark = plan_landmarks(worker, graph, obs[:rows], batch.goal[:rows], args)
            weight = args.landmark_weight
        else:  # as released, perhaps by mistake: the landmark is where the robot is, so subgoals go to 0
            pseudo_landmark = here
            weight = args.landmark_weight * args.landmark_weight_before_planner
        losses["manager/landmark_loss"] = landmark_loss(
            adjacency, here, subgoal[:rows], pseudo_landmark, args
        )
        actor_loss = actor_loss + weight * losses["manager/landmark_loss"]
    manager.actor_step(actor_loss)
    manager.update_target_critic()
    manager.update_target_actor()
    return {name: loss.detach() for name, loss in losses.items()}


# ----------------------------------------------------------------------------------------------- evaluation


def period_metrics(prefix: str, periods: list, reached_radius: float) -> dict:
    """How well the worker follows. periods: a row per segment, x, y of start, subgoal and end, in metres."""
    if not periods:
        return {}
    start, subgoal, end = np.split(np.asarray(periods, np.float64).reshape(-1, 6), 3, 1)
    length, distance = np.linalg.norm(subgoal, axis=1), np.linalg.norm(start + subgoal - end, axis=1)
    return {
        f"{prefix}/progress": float((((end - start) * subgoal).sum(1) / np.maximum(length, 1e-9)).mean()),
        f"{prefix}/subgoal_distance": float(distance.mean()),
        f"{prefix}/subgoal_reached": float((distance < reached_radius).mean()),
        f"{prefix}/subgoal_halved": float((distance < 0.5 * length).mean()),
        f"{prefix}/subgoal_length": float(length.mean()),
        f"{prefix}/subgoal_spread": float(subgoal.std(0).mean()),
    }


def split_observation(observation: dict):
    """The environment's Dict observation -> (obs, goal) as float32."""
    return observation["observation"].astype(np.float32), observation["desired_goal"].astype(np.float32)


def evaluate(env, manager: TD3, worker: TD3, args: Args, seed: int, recorder=None) -> dict:
    """Noise-free episodes at each evaluation goal, up to the time limit. Uses no random numbers of torch.

    success: inside the goal's radius at the last step; success_any: at any step. Papers use one or the other.
    """
    goals = np.reshape(args.eval_goals, (-1, env.task.goal_dim)) if args.eval_goals else env.task.eval_goals
    dims, metrics, periods, episodes = len(manager.limit), {}, [], []
    for goal_index, episode in itertools.product(range(len(goals)), range(args.eval_episodes)):
        options = {"goal": np.asarray(goals[goal_index], np.float64)}
        observation, _ = env.reset(seed=seed + 1000 * goal_index + episode, options=options)
        obs, goal = split_observation(observation)
        success_any, episode_return, steps, episode_over = False, 0.0, 0, False
        if recorder:
            recorder.start(goal, goal_index, film=args.capture_video and episode == 0)
        while not episode_over:
            if steps % args.manager_period == 0:
                start, subgoal = obs, manager.act(obs, goal, explore=False)
                first_subgoal = subgoal
            if recorder:
                recorder.add(obs, subgoal)
            action = worker.act(obs, subgoal, explore=False)
            observation, reward, terminated, truncated, info = env.step(action)
            next_obs, _ = split_observation(observation)
            subgoal = subgoal_transition(obs[:dims], subgoal, next_obs[:dims])
            obs, steps, episode_over = next_obs, steps + 1, terminated or truncated
            episode_return += reward
            success_any |= bool(info["is_success"])
            if steps % args.manager_period == 0 or episode_over:
                periods.append([*start[:2], *first_subgoal[:2], *obs[:2]])
        distance = np.linalg.norm((obs[: len(goal)] - goal)[: env.task.reward_dims])
        episodes.append((goal_index, info["is_success"], success_any, episode_return, distance))
    index, *columns = np.asarray(episodes, np.float64).T
    for name, values in zip(("success", "success_any", "return", "final_distance"), columns):
        metrics[f"eval/{name}"] = float(values.mean())
        if len(goals) > 1:
            metrics |= {f"eval/{name}_goal{i}": float(values[index == i].mean()) for i in range(len(goals))}
    return metrics | period_metrics("eval", periods, args.reached_radius)


# --------------------------------------------------------------------------------------------------- pictures


@contextlib.contextmanager
def writing(path: Path):
    """A full disk or a read-only folder ends the run with one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        fail(f"cannot write {path}: {str(error).splitlines()[0]}; choose another --run-dir")


class Recorder:
    """Watches evaluation: every path for a picture from above, and films on demand. Files start with `name`.

    landmarks [n, 2 or more]: positions to mark, the novel ones of aclg_gcmr.py's planner. has_subgoals: False
    where a flat TD3 of cher.py acts.
    """

    def __init__(self, env, folder: Path, name: str, landmarks=()):
        self.env, self.folder, self.name, self.landmarks = env, folder, name, landmarks
        self.paths, self.film, self.has_subgoals = [], None, True

    def start(self, goal, goal_index: int, film: bool):
        """A new episode."""
        self.close_film()
        self.goal, self.positions, self.targets = goal, [], []
        self.paths.append((goal, self.positions, self.targets))
        if film:
            import imageio  # an extra, see --capture-video

            self.path = self.folder / "videos" / f"{self.name}_goal{goal_index}.mp4"
            with writing(self.path):
                self.film = imageio.get_writer(self.path, fps=self.env.metadata["render_fps"])

    def add(self, obs, subgoal):
        """What the worker sees [obs_dim] and is asked for [D], before it acts."""
        target = obs[:2] + subgoal[:2]
        new = not self.targets or np.abs(target - self.targets[-1]).max() > 1e-3  # it stays for a period
        if self.has_subgoals and new:
            self.targets.append(target)
        self.positions.append(obs[:2].copy())
        if self.film:
            self.env.markers = self.markers()
            with writing(self.path):
                self.film.append_data(self.env.render())

    def markers(self) -> list[dict]:
        """The subgoal, a trail of earlier ones and the landmarks, as spheres for the renderer."""
        height = self.env.maze.floor_z + 0.5
        groups = ((self.landmarks, 0.15, (0, 0.7, 0.3, 0.8)), (self.targets[-20:-1], 0.12, (1, 0.6, 0, 0.5)))
        groups += ((self.targets[-1:], 0.35, (1, 0.4, 0, 0.9)),)
        return [
            dict(pos=(float(place[0]), float(place[1]), height), size=size, rgba=colour)
            for places, size, colour in groups
            for place in places
        ]

    def draw(self) -> Figure:
        """Walls grey, paths blue, subgoals orange dots, landmarks green crosses, goals red stars."""
        figure, maze = Figure(figsize=(4, 4), dpi=80, layout="tight"), self.env.maze
        axes, side = figure.add_subplot(aspect="equal"), maze.size
        for row, column in maze.walls:
            x, y = maze.centre(row, column)
            axes.add_patch(Rectangle((x - side / 2, y - side / 2), side, side, color="0.8"))
        for x, y, half_x, half_y in self.env.task.slabs:
            axes.add_patch(Rectangle((x - half_x, y - half_y), 2 * half_x, 2 * half_y, color="0.8"))
        for goal, positions, targets in self.paths:
            axes.plot(*np.reshape(targets, (-1, 2)).T, ".", color="tab:orange", markersize=2)
            axes.plot(*np.transpose(positions), color="tab:blue", linewidth=1)
            axes.plot(*np.reshape(goal[:2], (2, -1)), "*", color="tab:red", markersize=12)
        if len(self.landmarks):
            axes.plot(*np.transpose(self.landmarks)[:2], "x", color="tab:green", markersize=4)
        return figure

    def save(self, writer: SummaryWriter | None = None, step: int = 0):
        """End the film, write the picture, and show it in TensorBoard."""
        self.close_film()
        figure, path = self.draw(), self.folder / "pictures" / f"{self.name}.png"
        with writing(path):
            figure.savefig(path)
            if writer is not None:
                writer.add_figure("eval/paths", figure, step)

    def close_film(self):
        if self.film:
            self.film.close()
            self.film, self.env.markers = None, []


# ----------------------------------------------------------------------------------------------- command line

# arguments that --resume, and --eval-only, may change
RESUME_MAY_CHANGE = ("resume", "run_dir", "total_steps", "device", "threads", "eval_every", "eval_episodes")
RESUME_MAY_CHANGE += ("eval_goals", "save_every", "variant", "track", "capture_video", "cudagraph")
EVAL_MAY_CHANGE = (*RESUME_MAY_CHANGE, "checkpoint", "eval_only", "env", "reward", "seed", "reached_radius")
# what --start-from may not change: networks learned with it, or the file has its size; preset sets some
START_KEEPS = ("preset", "reward", "hidden", "subgoal_space", "subgoal_limit", "action_limit", "mask_xy")
START_KEEPS += ("scale_worker_inputs", "rest_value", "worker_gamma", "manager_gamma", "manager_period")
START_KEEPS += ("manager_reward_scale", "worker_reward_scale", "time_limit_is_terminal", "novelty_landmarks")


def fail(message: str):
    """One clear line on stderr and a non-zero exit."""
    raise SystemExit(f"{SCRIPT}.py: error: {message}")


def parse_args(argv: list[str] | None = None) -> Args:
    """Two passes: --env or a checkpoint sets the defaults, then all flags are read, and shown, with them."""

    @dataclass
    class First:
        env: str | None = None
        preset: Literal["default", "quick"] = "default"
        checkpoint: str | None = None
        resume: str | None = None
        start_from: str | None = None
        eval_only: bool = False

    first, _ = tyro.cli(First, args=argv, return_unknown_args=True, add_help=False)
    if first.env not in (None, *SPECS):
        fail(f"unknown --env {first.env}; known: {', '.join(SPECS)}")
    if first.eval_only and first.checkpoint is None:
        fail("--eval-only needs --checkpoint PATH")
    if first.checkpoint is not None and not first.eval_only:
        fail("--checkpoint is for --eval-only; to go on use --resume checkpoint.pt or --start-from model.pt")
    if first.checkpoint is not None and first.resume is not None:
        fail("--resume trains, --eval-only does not: choose one of them")
    begins = first.start_from is not None and first.checkpoint is None and first.resume is None
    if begins and first.preset != "default":
        fail("--start-from takes all settings of the file: leave out --preset")
    saved = first.start_from if begins else first.checkpoint if first.resume is None else first.resume
    if saved is not None:
        settings = load_checkpoint(saved)["args"] | {"resume": None, "checkpoint": None, "run_dir": None}
        source = f"read from {saved}"
        if begins:  # a run of its own, with networks that know something
            settings |= {"variant": f"{settings['variant']}_on", "uniform_warmup": False}
            settings |= {"worker_checkpoint": None} if "worker_checkpoint" in settings else {}
        if first.resume is None:
            settings |= {"track": False, "capture_video": False}  # those of the training
        if first.resume is None and first.env not in (None, settings["env"]):
            old = settings["env"]
            if old in SPECS and SPECS[first.env].kind != SPECS[old].kind:
                fail(f"--env {first.env} has another robot or other obs than {old}, where the agent learned")
            settings |= {"env": first.env, "eval_goals": PRESETS.get(first.env, {}).get("eval_goals", ())}
            settings |= {} if settings["reward"] in SPECS[first.env].rewards else {"reward": None}
    else:
        env = first.env or Args.env
        settings = {"env": env, "preset": first.preset, "variant": first.preset} | PRESETS.get(env, {})
        if first.preset == "quick":
            if env not in QUICK:
                known = ", ".join(QUICK) or "no environment"
                fail(f"--preset quick: QUICK of {SCRIPT}.py has no row for {env}, only for {known}")
            settings |= QUICK[env]
        source = settings.pop("source", "this file's defaults, nothing was chosen for this environment")
    names = ", ".join(name for name in settings if name not in ("env", "preset", "variant"))
    chosen = f"Set for it: {names}. " if names and saved is None else ""  # a saved file names all settings
    before = Args(**settings)
    args = tyro.cli(
        Args,
        args=argv,
        default=before,
        description=f"{__doc__.splitlines()[0]} Settings of {settings['env']}: {source}. {chosen}"
        f"Environments: {', '.join(SPECS)}.",
    )
    may_change = EVAL_MAY_CHANGE if first.eval_only else RESUME_MAY_CHANGE
    fixed = (field.name for field in dataclasses.fields(Args) if field.name not in may_change)
    changed = ", ".join(name for name in fixed if getattr(args, name) != getattr(before, name))
    if first.resume is not None and changed:
        fail(f"--resume continues the run as it was set; not with another {changed}")
    if first.eval_only and changed:
        fail(f"--eval-only shows the agent as it was trained; not with another {changed}")
    changed = ", ".join(name for name in START_KEEPS if getattr(args, name) != getattr(before, name))
    if begins and changed:
        fail(f"--start-from takes the networks as they have learned; not with another {changed}")
    check_args(args)
    return args


def check_args(args: Args):
    """Refuse what makes no sense, with the reason."""
    if args.env not in SPECS:
        fail(f"the checkpoint is of {args.env}, an environment that common_envs.py here does not have")
    spec = SPECS[args.env]
    for name, value in vars(args).items():
        if isinstance(value, (float, tuple)) and not np.isfinite(value).all():  # comparisons let NaN pass
            fail(f"--{name.replace('_', '-')} is not a finite number")
    if args.reward is not None and args.reward not in spec.rewards:
        fail(f"--reward {args.reward}: {args.env} has {', '.join(spec.rewards)}")
    positive = """
    total_steps eval_every eval_episodes manager_period hidden batch_size worker_buffer manager_buffer
    worker_critic_updates worker_critic_updates_with_penalty worker_actor_every gradient_penalty_every
    rollout_planning_every adjacency_epochs adjacency_batch_size planner_keeps_graph coverage_pool
    dynamics_members dynamics_hidden dynamics_first_updates dynamics_updates dynamics_batch_size
    gradient_penalty_copies rollout_planning_goals rollout_planning_subgoals
    """
    for name in positive.split():
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1")
    not_negative = """
    seed threads save_every actor_lr critic_lr critic_weight_decay adjacency_lr novelty_lr dynamics_lr
    planner_rows coverage_landmarks novelty_landmarks novelty_radius path_heat landmark_shift
    adjacency_weight landmark_weight landmark_weight_before_planner
    relabel_shift gradient_penalty_weight rollout_planning_weight reached_radius candidate_noise
    worker_noise worker_target_noise worker_target_noise_clip rollout_planning_noise
    manager_noise manager_target_noise manager_target_noise_clip dynamics_every adjacency_every
    """
    for name in not_negative.split():
        if getattr(args, name) < 0:
            fail(f"--{name.replace('_', '-')} must not be negative")
    if args.seed >= 2**32:
        fail("--seed must be below 2**32")
    if args.threads > 1024:
        fail(f"--threads {args.threads}: torch crashes with so many; use at most the number of cores")
    for name in ("tau", "manager_gamma", "random_subgoals", "redrawn_subgoals", "rollout_weight"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must be within 0 to 1")
    if (args.redrawn_subgoals > 0 or args.rest_value) and args.worker_looks_ahead:
        fail(
            "--redrawn-subgoals and --rest-value hold for one subgoal at a time: add --no-worker-looks-ahead"
        )
    if not 0 <= args.worker_gamma < 1:
        fail("--worker-gamma must be below 1, and not negative: a death counts reward / (1 - gamma)")
    if args.learning_starts < args.manager_period:
        fail("--learning-starts must be at least --manager-period: the manager learns from whole segments")
    spaces = ["xy"] if spec.kind == "point" else ["xy", "xy_block" if spec.observe_block else "xyz"]
    if args.subgoal_space not in spaces:
        fail(f"--subgoal-space {args.subgoal_space}: by its obs {args.env} has {' and '.join(spaces)}")
    dims = len(SUBGOAL_SPACES[args.subgoal_space])
    if args.subgoal_limit and (len(args.subgoal_limit) != dims or not all(x > 0 for x in args.subgoal_limit)):
        fail(
            f"--subgoal-limit: --subgoal-space {args.subgoal_space} needs {dims} positive numbers, or none: "
            "the flag alone stands for the space's own"
        )
    if args.eval_goals and (not spec.goal_dim or len(args.eval_goals) % spec.goal_dim):
        fail(f"--eval-goals: a goal of {args.env} has {spec.goal_dim} numbers")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        fail(f"--device {args.device}: use auto, cpu, cuda or cuda:0")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track needs Weights & Biases: pip install wandb")
    if args.capture_video and importlib.util.find_spec("imageio_ffmpeg") is None:
        fail('--capture-video needs a video encoder: pip install "imageio[ffmpeg]"')
    if args.device.startswith("cuda") and (torch.device(args.device).index or 0) >= torch.cuda.device_count():
        fail(f"--device {args.device}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if args.candidates < 3:
        fail("--candidates must be at least 3: the stored subgoal, the displacement and one draw")
    if spec.goal_dim != len(SUBGOAL_SPACES[args.subgoal_space]) and args.landmark_weight > 0:
        fail(
            f"landmarks need goals and subgoals of one kind: {args.env} has {spec.goal_dim}-dim goals, "
            f"--subgoal-space {args.subgoal_space} has {len(SUBGOAL_SPACES[args.subgoal_space])}; "
            "choose another or set --landmark-weight 0"
        )
    if int(args.adjacency_factor * args.manager_period) < 2 and uses_adjacency(args):
        fail("--adjacency-factor x --manager-period must be at least 2, or no two steps are adjacent")
    if args.adjacency_near > args.adjacency_far:
        fail("--adjacency-near must not be above --adjacency-far: adjacent cells are the nearer ones")
    if args.landmark_weight > 0 and args.coverage_landmarks < 1:
        fail("--coverage-landmarks must be at least 1 while --landmark-weight is not 0")
    for name in ("dynamics_rows", "dynamics_starts"):
        if getattr(args, name) < 100:
            fail(f"--{name.replace('_', '-')} must be at least 100, to train on some and to hold out some")
    if args.worker_buffer < spec.max_steps:
        fail(f"--worker-buffer must hold an episode of {spec.max_steps} steps")


# -------------------------------------------------------------------------------------- logs and checkpoints


def try_to_render(env):
    """Without a GL library a film fails: better now than at the first evaluation."""
    try:
        env.render()
    except (RuntimeError, NotImplementedError) as error:
        fail(f"--capture-video: the environment does not render ({type(error).__name__}: {error})")


def cpu_model() -> str:
    """Its name, and family and model, as virtual machines hide a part of the name; off Linux perhaps ""."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = (re.search(rf"^{name}\s*: (.*)", text, re.M) for name in ("model name", "cpu family", "model"))
    words = [match[1] for match in found if match]
    return f"{words[0]}, family {words[1]}, model {words[2]}" if len(words) == 3 else platform.processor()


def describe_run(args: Args) -> dict:
    """What is needed to repeat a run: arguments, command, versions, commit, machine."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    has_git = shutil.which("git") is not None
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if has_git else ""
    packages = ("torch", "gymnasium", "mujoco", "numpy", "tyro")
    device = "cuda" if args.device == "auto" else args.device
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "script": SCRIPT,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or "unknown",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "vector_units": torch.backends.cpu.get_cpu_capability(),  # "AVX2", "AVX512": tells much of the speed
        "args": dataclasses.asdict(args),
    }


def append_row(path: Path, row: dict):
    """Add an evaluation to progress.csv, atomically. A resumed run replaces the rows that it repeats."""
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = [old for old in csv.DictReader(file) if int(old["step"]) < row["step"]]
    rows.append(row)
    try:
        with open(path.with_suffix(".tmp"), "w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for r in rows for name in r)), restval="")
            table.writeheader()
            table.writerows(rows)
        os.replace(path.with_suffix(".tmp"), path)
    except OSError as error:
        path.with_suffix(".tmp").unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}; the rows before this one are untouched")


def to_tensors(tree, name: str = "state"):
    """Nested dicts and lists with arrays as tensors, which torch.load(weights_only=True) accepts.

    Types are compared exactly: a file with others could not be read, or they would come back plain.
    """
    if isinstance(tree, np.generic):  # a numpy scalar, which it does not accept either
        tree = tree.item()
    if type(tree) in (dict, OrderedDict) and all(type(key) in (str, int) for key in tree):
        return {key: to_tensors(value, f"{name}.{key}") for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(to_tensors(value, name) for value in tree)
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biuf":
        return torch.from_numpy(tree.copy())
    if tree is None or type(tree) in (bool, int, float, str) or isinstance(tree, torch.Tensor):
        return tree
    holds = "None, numbers, strings, lists, tuples, dicts (keys: str, int), arrays of numbers and tensors"
    fail(f"{name}: a checkpoint holds {holds}, not this {type(tree).__name__}")


def say(progress: tqdm, line: str):
    """A line to the console. One that is gone (ssh, a `| tee` that Ctrl-C ended) must not cost the run."""
    with contextlib.suppress(OSError):
        progress.write(line)


def log_row(row: dict, run_dir: Path, writer: SummaryWriter, progress: tqdm):
    """One evaluation to progress.csv, TensorBoard and the console."""
    append_row(run_dir / "progress.csv", row)
    try:
        for name, value in row.items():
            writer.add_scalar(name, value, row["step"])
    except OSError as error:
        fail(f"cannot write TensorBoard events to {run_dir}: {error}; progress.csv has this evaluation")
    progress.set_postfix(success=row["eval/success"], refresh=False)
    line = (
        f"step {row['step']}: success {row['eval/success']:.2f} (any step {row['eval/success_any']:.2f}), "
        f"return {row['eval/return']:.1f}, progress {row['eval/progress']:.2f} m, {row['steps_per_second']}/s"
    )
    say(progress, line)


def check_finite(losses: dict, step: int, run_dir: Path) -> dict:
    """Tensors -> numbers; a NaN or an infinity stops the run by name before anything is overwritten."""
    numbers = {name: float(value) for name, value in losses.items()}
    bad = [name for name, value in numbers.items() if not np.isfinite(value)]
    if bad:
        fail(f"{', '.join(bad)} is not finite at step {step}; the files in {run_dir} are from before")
    return numbers


def save_checkpoint(parts: dict, args: Args, path: Path, **more):
    """Write beside the old file and rename, so that a crash or a full disk leaves the old one whole."""
    state = {name: to_tensors(part.state_dict(), name) for name, part in parts.items()}
    state |= {"script": SCRIPT, "format": FORMAT, "args": dataclasses.asdict(args)} | more
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {str(error).splitlines()[0]}; an older file there is untouched")


def load_checkpoint(path: str) -> dict:
    """Read a file of this script. weights_only: a stranger's file cannot run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no checkpoint at {path}")
    except Exception as error:  # every other failure means a damaged or foreign file
        fail(f"{path} is not a checkpoint of this suite ({type(error).__name__})")
    if not isinstance(state, dict) or state.get("script") != SCRIPT:
        wrong = state.get("script", "something else") if isinstance(state, dict) else "something else"
        fail(f"{path} was written by {wrong}, not by {SCRIPT}.py")
    if not isinstance(state.get("format"), int) or not isinstance(state.get("args"), dict):
        fail(f"{path} is damaged: it has no format or no settings")
    if state["format"] > FORMAT:
        fail(f"{path} has format {state['format']}, this version reads up to {FORMAT}: update {SCRIPT}.py")
    unknown = set(state["args"]) - {field.name for field in dataclasses.fields(Args)}
    if unknown:
        names = ", ".join(sorted(unknown))
        fail(f"{path} has settings that this version does not know: {names}; use that one (see config.json)")
    return state


def load_parts(parts: dict, state: dict, path: str):
    """Fill the named parts from a checkpoint; other shapes mean another environment or other settings."""
    for name, part in parts.items():
        if name not in state:
            fail(f"{path} has no {name}: use the version of {SCRIPT}.py that wrote it (see config.json)")
        try:
            part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).replace("\t", "").splitlines()[:2])
            fail(f"{path} does not fit these settings ({name}: {why})")


def freeze_run(step: int, loop: SimpleNamespace, env, device) -> dict:
    """What networks and buffers do not hold: counters, the running episode, simulator, generators."""
    generators = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(device)
    state = {"step": step, "generators": generators, "env": to_tensors(env.get_state())}
    return state | to_tensors(vars(loop))


@contextlib.contextmanager
def fast_cpu_matmul(args: Args, device):
    """oneDNN's float32 kernels for the updates: twice as fast as MKL's on AMD, slower for acting's one row.

    The setting "medium" permits bfloat16. With AMX units oneDNN would take it, so not used there; on a CPU
    that has bfloat16 but no AMX its float32 kernels ran.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    if args.fast_matmul and device.type == "cpu" and x86 and not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")
    else:
        yield


def cuda_graph(function, args: Args, device):
    """The same function; on CUDA its kernels are recorded once per set of flags and then launched as one.

    A replay reads and writes the tensors that were recorded: what changes must change in place, and what it
    returns is overwritten by the next call. The booleans among the inputs tell the recordings apart.
    """
    if device.type != "cuda" or not args.cudagraph:
        return function
    if device.index is not None:
        torch.cuda.set_device(device)  # streams and recordings belong to the current device
    warnings.filterwarnings("ignore", message=".*capturable=True")  # the first calls are not yet recorded
    calls, recorded, stream = Counter(), {}, torch.cuda.Stream()

    def replay(*inputs, **flags):
        if any(type(x) in (int, float) or isinstance(x, np.generic) for x in (*inputs, *flags.values())):
            raise TypeError("a recording keeps a number as it is now: pass a tensor, changed in place")
        key = tuple(value for value in (*inputs, *flags.values()) if isinstance(value, bool))
        calls[key] += 1
        if calls[key] <= 3:  # optimizers and libraries make their own state in the first calls
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function(*inputs, **flags)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if key not in recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):  # records, does not compute
                recorded[key] = graph, function(*inputs, **flags)
        graph, result = recorded[key]
        graph.replay()
        return result

    return replay


def load_run(path: str, parts: dict, env, device, fresh) -> tuple[int, SimpleNamespace]:
    """Fill parts and env from a checkpoint.pt. Returns the first step to take and the state of the loop.

    fresh: that state at the start of a run, for the fields that the file must have.
    """
    state = load_checkpoint(path)
    if "loop" not in state:
        fail(f"{path} holds networks only: use a checkpoint.pt (of --save-every), or begin with --start-from")
    differ = (state["loop"].keys() - {"step", "env", "generators"}) ^ vars(fresh).keys()
    if differ:
        names = ", ".join(sorted(differ))
        why = "use that one (see config.json), or set what you added before `if args.resume`"
        fail(f"{path} is of another version of {SCRIPT}.py ({names}): {why}")
    load_parts(parts, state, path)
    loop = {name: value.numpy() if torch.is_tensor(value) else value for name, value in state["loop"].items()}
    generators = loop.pop("generators")
    torch.set_rng_state(generators["torch"])
    if device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], device)
    env.set_state(loop.pop("env"))
    return loop.pop("step") + 1, SimpleNamespace(**loop)


# ----------------------------------------------------------------------------------------------------- main


def make_agents(env, args: Args, device) -> tuple[TD3, TD3]:
    """The two levels, for the sizes of this environment."""
    obs_dim, goal_dim = env.observation_space["observation"].shape[0], env.task.goal_dim
    half_range = torch.tensor(args.subgoal_limit or SUBGOAL_SPACES[args.subgoal_space], device=device)
    limit = torch.tensor(args.action_limit or env.action_space.high.tolist(), device=device)
    if len(half_range) > obs_dim:
        fail(f"--subgoal-space {args.subgoal_space} needs obs of {len(half_range)}, {args.env} has {obs_dim}")
    if not (env.action_space.low == -env.action_space.high).all():
        fail(f"{args.env}: actions must lie within +-limit, as the actor's do; rescale them in step()")
    if len(limit) != env.action_space.shape[0] or not all(x > 0 for x in args.action_limit):
        fail(f"--action-limit needs {env.action_space.shape[0]} positive numbers for {args.env}")
    noise = (args.manager_noise, args.manager_target_noise, args.manager_target_noise_clip)
    scale = torch.ones(obs_dim + goal_dim + len(half_range), device=device)
    manager = TD3(scale, half_range, args.manager_gamma, noise, args)
    noise = (args.worker_noise, args.worker_target_noise, args.worker_target_noise_clip)
    scale = torch.ones(obs_dim + len(half_range) + len(limit), device=device)
    if args.mask_xy:
        scale[:2] = 0  # a walk is the same everywhere
    if args.scale_worker_inputs:
        scale[obs_dim:] = 1 / torch.cat([half_range, limit])
    rest = args.worker_reward_scale / (1 - args.worker_gamma) if args.rest_value else 0.0
    worker = TD3(scale, limit, args.worker_gamma, noise, args, half_range, rest)
    return manager, worker


def make_buffers(env, args: Args, manager: TD3, worker: TD3, device) -> tuple:
    """The worker's steps, the manager's segments, and the segment that is being recorded."""
    obs_dim, goal_dim = env.observation_space["observation"].shape[0], env.task.goal_dim
    dims, action_dim, period = len(manager.limit), len(worker.limit), args.manager_period
    worker_shapes = dict(obs=(obs_dim,), subgoal=(dims,), action=(action_dim,), reward=())
    worker_shapes |= dict(next_obs=(obs_dim,), next_subgoal=(dims,), terminated=())
    manager_shapes = dict(obs_seq=(period + 1, obs_dim), action_seq=(period, action_dim), length=())
    manager_shapes |= dict(goal=(goal_dim,), subgoal=(dims,), reward=(), terminated=())
    worker_buffer = ReplayBuffer(args.worker_buffer, device, **worker_shapes)
    manager_buffer = ReplayBuffer(args.manager_buffer, device, **manager_shapes)
    return worker_buffer, manager_buffer, Segment(period, obs_dim, action_dim)


def make_run_dir(args: Args) -> Path:
    """The run's folder, with config.json in it."""
    default = f"runs/{args.env}__{SCRIPT}__{args.variant}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or (Path(args.resume).parent if args.resume else default))
    own = args.resume and run_dir.resolve() == Path(args.resume).parent.resolve()
    files = ("config.json", "progress.csv", "checkpoint.pt", "model.pt")
    if not own and any((run_dir / name).exists() for name in files):
        fail(f"{run_dir} holds a run already; choose another --run-dir, or --resume the checkpoint.pt in it")
    try:
        # without --run-dir two runs of one second have one name: the later one is refused
        run_dir.mkdir(parents=True, exist_ok=bool(args.run_dir or args.resume))
        config, path, earlier = describe_run(args), run_dir / "config.json", {}
        if args.resume and path.exists():
            earlier = json.loads(path.read_text())
            config["earlier_commands"] = [*earlier.get("earlier_commands", []), earlier["command"]]
            config["earlier_commits"] = [
                *earlier.get("earlier_commits", []),
                earlier.get("commit", "unknown"),
            ]
        if args.track or "wandb_id" in earlier:  # a resumed run goes on in the same run of Weights & Biases
            config["wandb_id"] = earlier.get("wandb_id") or os.urandom(8).hex()
        path.with_suffix(".tmp").write_text(json.dumps(config, indent=2) + "\n")
        os.replace(path.with_suffix(".tmp"), path)  # a crash here must not leave half a file for --resume
    except (ValueError, KeyError) as error:
        fail(f"{path} is damaged ({type(error).__name__}): move it away; --resume needs only the checkpoint")
    except OSError as error:
        fail(f"cannot write to {run_dir}: {error}; choose another --run-dir")
    if args.track:
        import wandb

        run = dict(name=run_dir.name, id=config["wandb_id"], resume="allow")  # goes on if that id is there
        wandb.init(project="hrl", config=config["args"], sync_tensorboard=True, **run)
    print(f"results: {run_dir}", flush=True)
    return run_dir


def main(args: Args):
    # ---- set up
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # numpy's and Python's global generators are not used
    env, render_mode = make_env(args.env, args.reward), "rgb_array" if args.capture_video else None
    eval_env = make_env(args.env, args.reward, evaluate=True, render_mode=render_mode)
    manager, worker = make_agents(env, args, device)
    obs_dim = env.observation_space["observation"].shape[0]
    dynamics = DynamicsEnsemble(obs_dim, len(worker.limit), args).to(device)
    adjacency = Adjacency(len(manager.limit), args).to(device)
    novelty = Novelty(obs_dim, len(manager.limit), args).to(device)
    # agents: what model.pt holds; parts: what checkpoint.pt holds; loop: what else --resume brings back
    agents = {"manager": manager, "worker": worker, "novelty": novelty}  # novelty: for pictures, --start-from
    eval_seed = 1_000_003 * (args.seed + 1)  # far from the seeds of training
    if args.capture_video:
        try_to_render(eval_env)

    if args.eval_only:
        state = load_checkpoint(args.checkpoint)
        load_parts(agents, state, args.checkpoint)
        if state["args"]["env"] != args.env:
            novelty.score.fill_(-torch.inf)  # landmarks of another maze
        folder = Path(args.run_dir or Path(args.checkpoint).parent)
        recorder = Recorder(eval_env, folder, "eval", novelty.landmarks())
        for name, value in evaluate(eval_env, manager, worker, args, eval_seed, recorder).items():
            print(f"{name:28s} {value:.4f}")
        recorder.save()
        print(f"picture: {folder / 'pictures' / 'eval.png'}")
        return

    if args.start_from and not args.resume:
        state = load_checkpoint(args.start_from)
        load_parts(agents, state, args.start_from)
        if state["args"]["env"] != args.env:
            novelty.score.fill_(-torch.inf)  # landmarks of another maze
    worker_buffer, manager_buffer, segment = make_buffers(env, args, manager, worker, device)
    adam = dict(fused=True)  # not capturable: the trainings of these two are not recorded as CUDA graphs
    dynamics_optimizer = torch.optim.Adam(dynamics.parameters(), args.dynamics_lr, **adam)
    adjacency_optimizer = torch.optim.Adam(adjacency.parameters(), args.adjacency_lr, **adam)
    adam["capturable"] = device.type == "cuda"
    novelty_optimizer = torch.optim.Adam(novelty.predictor.parameters(), args.novelty_lr, **adam)
    needs_model = (
        args.gradient_penalty_weight > 0 or args.rollout_planning_weight > 0 or relabels_by_model(args)
    )
    counts, graph = UpdateCounts(), LandmarkGraph(obs_dim, args).to(device)
    parts = agents | {"worker_buffer": worker_buffer, "manager_buffer": manager_buffer, "segment": segment}
    parts |= {"dynamics": dynamics, "adjacency": adjacency, "counts": counts, "graph": graph}
    parts |= {"dynamics_optimizer": dynamics_optimizer, "adjacency_optimizer": adjacency_optimizer}
    parts |= {"novelty_optimizer": novelty_optimizer}
    period, dims = args.manager_period, len(manager.limit)

    # ---- start, or continue
    first_step, loop = 1, SimpleNamespace(losses={}, seconds=0.0, periods=[], heights=[], flips=[])
    loop.returns, loop.episode_return = [], 0.0
    loop.episode_steps = 0
    loop.obs, loop.goal = split_observation(env.reset(seed=args.seed)[0])
    uniform_share = 1.0 if args.uniform_warmup else args.random_subgoals
    loop.subgoal = loop.first_subgoal = explore(manager, loop.obs, loop.goal, uniform_share)
    segment.start(loop.obs)
    # what a fork cannot save fails here, not when it is to be saved
    to_tensors({name: part.state_dict() for name, part in parts.items()} | freeze_run(0, loop, env, device))
    if args.resume:
        first_step, loop = load_run(args.resume, parts, env, device, loop)
        for group in novelty_optimizer.param_groups:
            group |= novelty_optimizer.defaults  # as constructed: the file may come from another device
        if first_step > args.total_steps:
            fail(f"{args.resume} is at step {first_step - 1} already; raise --total-steps")
    run_dir = make_run_dir(args)  # after all refusals: a refused --resume leaves the run's config.json alone
    replay = sum(part.rows.nbytes for part in parts.values() if isinstance(part, ReplayBuffer))
    print(f"replay: at most {replay / 1e9:.2f} GB", flush=True)
    learn_worker, learn_manager = (cuda_graph(f, args, device) for f in (update_worker, update_manager))
    learn_novelty = cuda_graph(update_novelty, args, device)
    stop = []  # signals received

    def ask_to_stop(number, frame):
        stop.append(number)
        with contextlib.suppress(OSError):  # Ctrl-C may have ended a reader of stderr, too
            os.write(2, b"\nstopping after this step (or its evaluation), with a checkpoint\n")

    handlers = {number: signal.signal(number, ask_to_stop) for number in STOP_SIGNALS}
    with writing(run_dir / "events"):
        writer = SummaryWriter(str(run_dir), purge_step=first_step)
        writer.add_text("config", f"```\n{(run_dir / 'config.json').read_text()}```", first_step)
    progress = tqdm(total=args.total_steps, initial=first_step - 1, unit="step", mininterval=2, disable=None)
    begin, last_time, last_step = time.time() - loop.seconds, time.time(), first_step - 1

    for step in range(first_step, args.total_steps + 1):
        # ---- act; loop.first_subgoal: as the manager issued it; subgoal: what is left of it now
        obs, goal, subgoal = loop.obs, loop.goal, loop.subgoal
        warm_up = args.uniform_warmup and step <= args.learning_starts
        uniform_share = 1.0 if warm_up else args.random_subgoals  # of subgoals issued
        action = explore(worker, obs, subgoal, float(warm_up))

        # ---- learn from all steps up to the last; a GPU does so while the CPU simulates the next one
        learning_step = step - args.learning_starts
        with fast_cpu_matmul(args, device):
            penalized = dynamics.trained_at > 0 and args.gradient_penalty_weight > 0
            repeat = args.worker_critic_updates_with_penalty if penalized else args.worker_critic_updates
            for _ in range(repeat if learning_step > 0 else 0):
                terms = counts.next(dynamics.trained_at > 0, args)
                loop.losses |= learn_worker(
                    worker, manager, dynamics, worker_buffer, manager_buffer, args, **terms
                )
            if learning_step > 0 and learning_step % period == 0:  # wherever the segment stands
                modules = (manager, worker, dynamics, adjacency, novelty, graph)
                with_model = relabels_by_model(args) and dynamics.trained_at > 0
                with_planner = args.landmark_weight > 0 and step >= args.planner_starts
                terms = {"with_model": with_model, "with_planner": with_planner}
                terms["with_new_graph"] = with_planner and graph.next_is_new(args)
                loop.losses |= learn_manager(*modules, manager_buffer, worker_buffer, args, **terms)

        # ---- step the environment
        observation, reward, terminated, truncated, info = env.step(action)
        next_obs, _ = split_observation(observation)
        achieved, next_achieved, episode_over = obs[:dims], next_obs[:dims], terminated or truncated
        next_subgoal = subgoal_transition(achieved, subgoal, next_achieved)
        worker_reward = intrinsic_reward(achieved, subgoal, next_achieved)
        # easy to overlook: after a death the distance is paid for ever, r + gamma r + .. = r / (1 - gamma). A
        # mere end, worth 0, would reward dying; a bootstrap would read Q where nothing is ever learned
        if info["dead"]:
            worker_reward /= 1 - args.worker_gamma
        segment.add(action, reward, next_obs)

        # ---- close the segment
        issued = segment.length == period and not episode_over  # the manager sets a new subgoal
        if segment.length == period or episode_over:
            manager_buffer.add(
                **segment.sequences(),
                goal=goal,
                subgoal=loop.first_subgoal,
                reward=args.manager_reward_scale * segment.reward,
                terminated=terminated or (truncated and args.time_limit_is_terminal),
            )
            xy_rows = (segment.obs_seq[0, :2], loop.first_subgoal[:2], next_obs[:2])
            loop.periods.append(np.concatenate(xy_rows).tolist())
        if issued:  # from here on first_subgoal is that of the next segment
            loop.first_subgoal = explore(manager, next_obs, goal, uniform_share)
            segment.start(next_obs)
        if issued and args.worker_looks_ahead:
            next_subgoal = loop.first_subgoal

        # ---- store; easy to overlook: the subgoal that the worker acted on, together with its successor
        worker_buffer.add(
            obs=obs,
            subgoal=subgoal,
            action=action,
            reward=args.worker_reward_scale * worker_reward,
            next_obs=next_obs,
            next_subgoal=next_subgoal,
            terminated=info["dead"] or (episode_over and args.time_limit_is_terminal),
        )
        loop.episode_steps += 1
        loop.obs, loop.subgoal = next_obs, (loop.first_subgoal if issued else next_subgoal)
        loop.heights.append(info["torso_height"])
        loop.flips.append(info["upside_down"])
        loop.episode_return += float(reward)

        if episode_over:
            # ---- end of an episode: novelty (score, then train), adjacency, dynamics
            with fast_cpu_matmul(args, device):
                episode = worker_buffer.latest(loop.episode_steps)
                states = torch.cat([episode.obs, episode.next_obs[-1:]])  # [T + 1, obs_dim]
                if args.landmark_weight > 0:
                    novelty.visit(states, args)
                    for _ in range(loop.episode_steps):
                        loop.losses |= learn_novelty(novelty, novelty_optimizer, worker_buffer, args)
                if uses_adjacency(args):
                    adjacency.add_trajectory(states[:, :dims].cpu().numpy())
                    if adjacency.positions >= args.adjacency_every:
                        loop.losses |= train_adjacency(adjacency, adjacency_optimizer, args)
                stale = not dynamics.trained_at or step - dynamics.trained_at >= args.dynamics_every
                if needs_model and stale and step >= args.dynamics_starts:
                    loop.losses |= train_dynamics(dynamics, dynamics_optimizer, worker_buffer, args, step)
            loop.episode_steps = 0
            loop.returns.append(loop.episode_return)
            loop.episode_return = 0.0
            loop.obs, loop.goal = split_observation(env.reset()[0])
            loop.subgoal = loop.first_subgoal = explore(manager, loop.obs, loop.goal, uniform_share)
            segment.start(loop.obs)

        # ---- evaluate, log, save
        progress.update()
        if step % 1000 == 0:
            check_finite(loop.losses, step, run_dir)
        if step % args.eval_every == 0 or step == args.total_steps:
            row = {"step": step, "time": round(time.time() - begin, 1)}
            row["steps_per_second"] = round((step - last_step) / (time.time() - last_time), 1)
            recorder = Recorder(eval_env, run_dir, f"step_{step:09d}", novelty.landmarks())
            row |= evaluate(eval_env, manager, worker, args, eval_seed + step, recorder)
            row |= period_metrics("worker", loop.periods, args.reached_radius)
            row["worker/torso_height"] = float(np.mean(loop.heights))
            row["worker/upside_down"] = float(np.mean(loop.flips))
            row |= {"train/return": float(np.mean(loop.returns))} if loop.returns else {}
            row |= check_finite(loop.losses, step, run_dir)
            log_row(row, run_dir, writer, progress)
            save_checkpoint(agents, args, run_dir / "model.pt")
            recorder.save(writer, step)
            loop.periods, loop.heights, loop.flips, loop.returns = [], [], [], []
            last_time, last_step = time.time(), step
        checkpoint = run_dir / "checkpoint.pt"
        save_now = args.save_every > 0 and step % args.save_every == 0
        if step == args.total_steps:  # an older one would repeat steps in a run that is given more of them
            save_now = args.save_every > 0 or checkpoint.exists()
        if stop or save_now:
            check_finite(loop.losses, step, run_dir)
            loop.seconds = time.time() - begin
            save_checkpoint(parts, args, checkpoint, loop=freeze_run(step, loop, env, device))
        if stop:
            say(progress, f"stopped at step {step}; continue with --resume {checkpoint}")
            break
    progress.close()
    with writing(run_dir / "events"):
        writer.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


if __name__ == "__main__":
    try:
        main(parse_args())
    except FloatingPointError as error:  # of the simulation; deterministic, so --resume would meet it again
        fail(f"{error}; take another --seed")
