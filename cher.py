"""CHER: inter-level cooperation in hierarchical RL (Kreidieh et al. 2019, https://arxiv.org/abs/1912.02368).

    python cher.py --env AntMaze-ULarge            # train
    python cher.py --env AntMaze-ULarge --help     # every setting, with the values for this environment

HIRO relabels old subgoals, as the worker changes. Here the manager's loss has one more term instead: it also
ascends the worker's value, so that it prefers subgoals that the worker can follow. As in HIRO a subgoal is a
change of `achieved`, the first entries of obs. Both levels learn from the same segments, records of a period:

    every manager_period steps:
        subgoal = manager.actor(obs, goal) + noise         (uniformly random in the first --learning-starts)
    every step:
        action = worker.actor(obs, subgoal) + noise        (the same)
        batch = sample_segments: segments for the manager, one random step of each for the worker
        every manager_period steps, update_manager: TD3, with
            subgoal = manager.actor(obs, goal)
            actor_loss = -q1(obs, goal, subgoal) + coop_weight * cooperative_loss(worker, batch, subgoal)
            coop_weight: fixed, or learned so that the worker's value stays near --coop-delta
        update_worker: TD3 on the sampled steps; next_subgoal is of the same period also at its end
        next_obs, reward = env.step(action)
        worker's reward = -|achieved + subgoal - next_achieved|           intrinsic_reward
        next_subgoal = achieved + subgoal - next_achieved                 subgoal_transition: the same target
    at the end of a period or an episode:
        store the segment; with --hindsight as if its end had been its subgoal, and now and then
        (--subgoal-testing-rate) also as it was; one that ends by a death only as it was

    python cher.py --coop-weight 0                            # HRL; in the end it says which delta to use
    python cher.py --coop-delta D                             # CHER with a learned weight, D as HRL said
    python cher.py --coop-weight 0 --relabeling off_policy    # HIRO, otherwise as CHER
    python cher.py --coop-weight 0 --hindsight                # HAC with egocentric subgoals
    python cher.py --flat                                     # TD3 without a hierarchy
    python cher.py --worker-checkpoint PATH --freeze-worker   # a new manager for a trained worker

The method is in the sections subgoals, replay (sample_segments), cooperation and updates, and in main's loop;
the rest is as in hiro.py.

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
    env: str = "AntMaze-ULarge"  # id of the environment, a row of SPECS in common_envs.py
    preset: Literal["default", "quick"] = "default"  # settings of PRESETS; "quick": and of QUICK on top
    reward: str | None = None  # "dense" or "sparse"; None: the first that the environment has
    seed: int = 1  # fixes torch (networks, noise, sampling) and the environment
    total_steps: Count = 3_000_000  # environment steps, counted from the start also after --resume
    device: str = "auto"  # "auto": cuda if there is one, else cpu
    threads: int = 0  # CPU threads of torch; 0: all cores (use 1 when several runs share a machine)
    fast_matmul: bool = True  # on a CPU without AMX, oneDNN's float32 kernels for the updates; same precision
    cudagraph: bool = True  # on CUDA, record the updates' kernels once and launch them as one
    eval_every: Count = 50_000  # environment steps between evaluations
    eval_episodes: int = 50  # noise-free episodes per evaluation goal
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
    subgoal_space: Literal["full", "xyz", "xy"] = "full"  # first 15, 3 or 2 entries; "xy": as later papers
    subgoal_limit: tuple[float, ...] = ()  # subgoals lie within +-this, metres first; empty: SUBGOAL_SPACES
    mask_xy: bool = False  # hide obs entries 0, 1 (position) from the worker; True in HIRO's code
    manager_reward_scale: float = 0.1  # factor on the sum of environment rewards of a segment
    relabeling: Literal["off_policy", "fun", "none"] = "none"  # HIRO's correction and its two ablations
    candidates: int = 10  # K, one is the stored subgoal, one the displacement (where the period ended)
    candidate_noise: float = 0.5  # std of the drawn candidates around the displacement, times half-range
    fun_noise: float = 0.1  # std of the only draw of --relabeling fun, times half-range
    random_subgoals: float = 0.0  # share of subgoals drawn uniformly; not in the paper

    # --- Cooperation (CHER section 4) ---
    coop_weight: float = 0.005  # lambda, the weight of cooperative_loss without --coop-delta; 0: naive HRL
    coop_form: Literal["released", "theorem"] = "released"  # of cooperative_loss: released code or Theorem 1
    coop_delta: float | None = None  # below 0: learn lambda for this coop_value; HRL prints one
    coop_log_weight: float = -4.2  # log of a learned lambda at the start; its Adam has the actors' rate
    coop_starts: Count = 1_000  # manager updates before lambda moves
    coop_reference: float | None = None  # J_HRL, the worker's value under HRL, to log the cooperation ratio

    # --- Baselines and transfer (CHER section 5) ---
    hindsight: bool = False  # HAC: store segments with their end as their subgoal, but for deaths ...
    subgoal_testing_rate: float = 0.3  # ... and with this probability also as they were (deaths always)
    flat: bool = False  # one TD3 in the manager's place acts; no worker. Sets manager_period 1, coop_weight 0
    worker_checkpoint: str | None = None  # model.pt whose worker to use; it learns after --learning-starts
    freeze_worker: bool = False  # it neither learns nor explores, also in the warm-up

    # --- TD3, both levels ---
    hidden: int = 256  # units in each of the two hidden layers
    output_init: float = 0.003  # output layers start uniform within this, biases at 0; 0: PyTorch's init
    actor_lr: float = 3e-4  # Adam
    critic_lr: float = 3e-4  # Adam
    critic_weight_decay: float = 0.0  # Adam's L2 term
    tau: float = 0.005  # step of the target networks
    batch_size: int = 128  # segments per update, and as many of their steps
    learning_starts: Count = 10_000  # first steps only collect
    uniform_warmup: bool = True  # uniformly at random at both levels, not by the untrained policies
    worker_actor_every: int = 2  # critic updates per update of the worker's actor and targets
    manager_actor_every: int = 2  # the same for the manager

    # --- Worker ---
    worker_gamma: float = 0.99  # discount per environment step
    worker_noise: float = 0.1  # std of exploration noise, times half-range (torques are within 30)
    worker_target_noise: float = 0.2  # std of target policy smoothing, times half-range
    worker_target_noise_clip: float = 0.5  # its bound, times half-range
    worker_buffer: Count = 200_000  # steps kept, as segments; both levels learn from them
    action_limit: tuple[float, ...] = ()  # bounds of the worker's output; empty: the environment's
    scale_worker_inputs: bool = False  # divide subgoal and action by their half-range before worker networks
    rest_value: bool = False  # worker Q = network - |subgoal| / (1 - gamma), of resting; not in the paper
    redrawn_subgoals: float = 0.0  # share of the worker's rows with a random subgoal (HIRO 5.2, an ablation)

    # --- Manager ---
    manager_gamma: float = 0.99  # discount per segment
    manager_noise: float = 0.1  # std of exploration noise, times half-range
    manager_target_noise: float = 0.2  # std of target policy smoothing, times half-range
    manager_target_noise_clip: float = 0.5  # its bound, times half-range

    # --- Diagnostics ---
    reached_radius: float = 1.0  # m, a subgoal counts as reached when its period ends within this of it

    def __post_init__(self):
        if self.flat:
            self.manager_period, self.coop_weight = 1, 0.0


# Settings that differ from the defaults, with their source. Other environments use the defaults.
PRESETS: dict[str, dict] = {
    "AntMaze-ULarge": {
        "source": "the paper's values, evaluated at its three corners",
        "eval_goals": (16.0, 0.0, 16.0, 16.0, 0.0, 16.0),
    },
    "AntFourRooms": {"source": "the paper's values; its length is not stated, so that of AntMaze-ULarge"},
    "AntGather": {
        "source": "the paper's values",
        "manager_reward_scale": 10.0,
        "coop_weight": 0.01,
        "total_steps": 1_000_000,
    },
    "AntPush": {"source": "CHER's values; not in its paper"},
    "AntFall": {"source": "CHER's values; not in its paper"},
    "PointMaze-U": {
        "source": "CHER's values but HIRO's released limit 0.25 rad and worker_gamma of HIGL's HIRO baseline",
        "subgoal_space": "xy",
        "action_limit": (1.0, 0.25),
        "learning_starts": 2_500,
        "worker_gamma": 0.95,
        "eval_every": 5_000,
        "eval_episodes": 10,
        "total_steps": 300_000,
    },
    "AntMaze-U": {
        "source": "CHER's values; not in its paper and not run here; length as HIGL's on AntMaze-U",
        "total_steps": 1_000_000,
    },
    "AntMaze-UStochastic": {"source": "as AntMaze-U", "total_steps": 1_000_000},
    "AntMaze-W": {"source": "as AntMaze-U", "total_steps": 1_000_000},
    "AntMaze-Bottleneck": {"source": "as AntMaze-U", "total_steps": 1_000_000},
    "AntMaze-Complex": {
        "source": "CHER's values; not in its paper, length as in GCMR",
        "total_steps": 3_000_000,
    },
    "AntPush-Small": {
        "source": "CHER's values, length chosen here; obs starts x, y, block x, y: no full subgoals",
        "subgoal_space": "xy",
        "total_steps": 1_000_000,
    },
}

# With --preset quick, on top of PRESETS. Found here.
QUICK: dict[str, dict] = {
    "AntMaze-ULarge": {
        "source": "found here: hiro.py's flags, critic_lr and mask_xy; docs/cher_runs.md",
        "eval_every": 25_000,
        "eval_episodes": 10,
        "subgoal_space": "xy",
        "mask_xy": True,
        "random_subgoals": 0.5,
        "critic_lr": 1e-3,
        "manager_actor_every": 1,
        "worker_gamma": 0.95,
        "scale_worker_inputs": True,
        "rest_value": True,
        "redrawn_subgoals": 0.8,
    }
}

# Subgoals are about the first entries of obs: x, y, z, quaternion, then hip and ankle of four legs.
# Half-ranges (entries lie within +-) of HIRO appendix C, the limits of the manager's output.
FULL = (10.0, 10.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3)
SUBGOAL_SPACES = {"full": FULL, "xyz": FULL[:3], "xy": FULL[:2]}


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


class FlatWorker:
    """In the worker's place with --flat: what the manager says is done. Nothing to learn."""

    def __init__(self, limit):
        self.limit = limit

    def act(self, obs, subgoal, explore: bool):
        return subgoal

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass


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

    def __init__(self, period: int, obs_dim: int, dims: int, action_dim: int):
        self.obs_seq = np.zeros((period + 1, obs_dim), np.float32)
        self.subgoal_seq = np.zeros((period + 1, dims), np.float32)
        self.action_seq = np.zeros((period, action_dim), np.float32)
        self.worker_reward_seq = np.zeros(period, np.float32)
        self.length, self.reward = 0, 0.0

    def start(self, obs, subgoal):
        self.obs_seq[:], self.action_seq[:] = obs, 0
        self.subgoal_seq[:], self.worker_reward_seq[:] = subgoal, 0
        self.length, self.reward = 0, 0.0

    def add(self, action, reward: float, worker_reward: float, next_obs, next_subgoal):
        self.action_seq[self.length] = action
        self.worker_reward_seq[self.length] = worker_reward
        self.length += 1
        self.obs_seq[self.length :] = next_obs  # the last entry is the true end also of a short segment
        self.subgoal_seq[self.length :] = next_subgoal
        self.reward += reward

    def sequences(self) -> dict:
        sequences = {"obs_seq": self.obs_seq, "action_seq": self.action_seq, "length": self.length}
        return sequences | {"subgoal_seq": self.subgoal_seq, "worker_reward_seq": self.worker_reward_seq}

    def state_dict(self) -> dict:
        return to_tensors(vars(self))

    def load_state_dict(self, state: dict):
        for name, value in state.items():
            setattr(self, name, value.numpy().copy() if torch.is_tensor(value) else value)


def sample_segments(buffer: ReplayBuffer, args: Args) -> SimpleNamespace:
    """Segments for the manager, and batch.step: of each one random step for the worker, [B].

    The manager's cooperative_loss asks the worker about the same steps.
    """
    batch = buffer.sample(args.batch_size)
    batch.subgoal = batch.subgoal_seq[:, 0]
    # easy to overlook: any of its own n steps; the released code from October 2020 on never draws the last
    batch.step = (torch.rand_like(batch.length) * batch.length).long()
    return batch


def worker_rows(batch) -> SimpleNamespace:
    """The sampled steps as the worker's rows."""
    rows, step = torch.arange(len(batch.step), device=batch.step.device), batch.step
    return SimpleNamespace(
        obs=batch.obs_seq[rows, step],
        subgoal=batch.subgoal_seq[rows, step],
        action=batch.action_seq[rows, step],
        reward=batch.worker_reward_seq[rows, step],
        next_obs=batch.obs_seq[rows, step + 1],
        next_subgoal=batch.subgoal_seq[rows, step + 1],  # of this period, also at its end
        terminated=batch.dead * (step == batch.length - 1),
    )


# ----------------------------------------------------------------------------------------------- relabeling


def make_candidates(subgoal, displacement, half_range, args: Args):
    """K subgoals that may explain a segment: draws around its displacement, that itself, the stored subgoal.

    subgoal, displacement [B, D] -> [B, K, D], all clipped to the half-range (HIRO).
    """
    batch, dims = subgoal.shape
    noise = torch.randn(batch, args.candidates - 2, dims, device=subgoal.device)
    draws = displacement[:, None] + args.candidate_noise * half_range * noise
    candidates = torch.cat([draws, displacement[:, None], subgoal[:, None]], 1)
    return candidates.clamp(-half_range, half_range)


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


@torch.no_grad()
def relabel_subgoals(worker: TD3, batch, half_range, args: Args):
    """The subgoals with which to train the manager on old segments [B, D]; the replay stays as it is."""
    if args.relabeling == "none":
        return batch.subgoal
    dims = batch.subgoal.shape[-1]
    displacement = batch.obs_seq[:, -1, :dims] - batch.obs_seq[:, 0, :dims]
    if args.relabeling == "fun":  # HIRO's ablation after FeUdal networks: one draw, not scored, not clipped
        return displacement + torch.randn_like(displacement) * (args.fun_noise * half_range)
    candidates = make_candidates(batch.subgoal, displacement, half_range, args)
    index = score_candidates(worker, candidates, batch).argmax(1)  # the first wins ties
    return candidates[torch.arange(len(index), device=index.device), index]


def hindsight_sequences(sequences: dict, dims: int) -> dict:
    """HAC: the segment as if its end had been its subgoal, so reached with the last step. numpy

    The first of these subgoals is the manager's action, not clipped to its limit.
    """
    achieved_seq = sequences["obs_seq"][:, :dims]  # [c + 1, D]
    subgoal_seq = achieved_seq[-1] - achieved_seq
    rewards = intrinsic_reward(achieved_seq[:-1], subgoal_seq[:-1], achieved_seq[1:])
    return sequences | {"subgoal_seq": subgoal_seq, "worker_reward_seq": rewards}


# ---------------------------------------------------------------------------------------------- cooperation


def cooperative_loss(worker: TD3, batch, subgoal, args: Args):
    """Minus (Q_worker + reward) of the manager's new subgoals, at the sampled steps. [B, D] -> []

    CHER eq. 5. The gradient goes to `subgoal`, the manager's output; the worker's networks are not stepped
    with it. The default is the form of the released code.
    """
    rows, dims = worker_rows(batch), subgoal.shape[-1]
    achieved, next_achieved = rows.obs[:, :dims], rows.next_obs[:, :dims]
    # easy to overlook: the subgoal as it stands at the sampled step, then what is left of it one step later,
    # for the recorded action (as in the proof of Theorem 1; eq. 5 lets it vary). So did the released code in
    # 2019; later it moved on to the end of the segment and counted `achieved` twice: not followed
    moved_on = subgoal_transition(batch.obs_seq[:, 0, :dims], subgoal, achieved)  # [B, D]
    left = subgoal_transition(achieved, moved_on, next_achieved)
    # both forms count the step's reward once more beside Q, which has it already
    if args.coop_form == "released":  # along Q's subgoal, at the recorded action; lambda was tuned for this
        q = worker.critic.q1(rows.obs, moved_on, rows.action)
        reward = -left.square().mean()
    else:  # along the worker's action, where Q is flat once the worker is greedy
        q = worker.critic.q1(rows.obs, moved_on.detach(), worker.actor(rows.obs, moved_on))
        reward = -safe_norm(left).mean()
    return -(q.mean() + reward)


class CoopWeight:
    """lambda, the weight of cooperative_loss: fixed, or with --coop-delta learned as exp(log)."""

    def __init__(self, args: Args, device):
        self.fixed, self.delta = args.coop_weight, args.coop_delta
        self.log = torch.tensor(args.coop_log_weight, device=device, requires_grad=True)
        adam = dict(fused=True, capturable=self.log.is_cuda)
        self.optimizer = torch.optim.Adam([self.log], args.actor_lr, **adam)

    def value(self):
        learned = self.log.exp().detach()
        return torch.full_like(learned, self.fixed) if self.delta is None else learned

    def update(self, coop_value):
        """It grows while the worker's value is below delta, as in algorithm 1; eq. 6 has the sign turned."""
        loss = self.log.exp() * (coop_value.detach() - self.delta)
        adam_step(self.optimizer, [self.log], loss)

    def state_dict(self) -> dict:
        return {"log": self.log.detach().clone(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict):
        self.log.data.copy_(state["log"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group |= self.optimizer.defaults  # as constructed: the file may come from another device


# -------------------------------------------------------------------------------------------------- updates


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


def update_worker(worker: TD3, batch, args: Args, with_actor: bool) -> dict:
    """One TD3 update of the worker; with_actor: its actor and the targets too."""
    batch = redraw_subgoals(worker, worker_rows(batch), args)
    td_target = worker.td_target(batch.reward, batch.terminated, batch.next_obs, batch.next_subgoal)
    critic_loss, q = worker.critic_loss(td_target, batch.obs, batch.subgoal, batch.action)
    losses = {"worker/critic_loss": critic_loss, "worker/q": q}
    worker.critic_step(critic_loss)
    if with_actor:
        action = worker.actor(batch.obs, batch.subgoal)
        actor_loss = -worker.critic.q1(batch.obs, batch.subgoal, action).mean()
        losses["worker/actor_loss"] = actor_loss
        worker.actor_step(actor_loss)
        worker.update_target_critic()
        worker.update_target_actor()
    return {name: loss.detach() for name, loss in losses.items()}


def update_manager(
    manager: TD3, worker: TD3, cooperation: CoopWeight, batch, args: Args, with_actor: bool, with_weight: bool
) -> dict:
    """One TD3 update of the manager; with_actor: its actor and the targets; with_weight: a learned lambda."""
    obs, next_obs = batch.obs_seq[:, 0], batch.obs_seq[:, -1]
    relabeled = relabel_subgoals(worker, batch, manager.limit, args)
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
    if not args.flat:  # also without the term, for J_HRL; lambda moves only after its value was taken
        coop_loss, weight = cooperative_loss(worker, batch, subgoal, args), cooperation.value()
        losses |= {"manager/coop_value": -coop_loss, "manager/coop_weight": weight}
        if with_weight:
            cooperation.update(-coop_loss)
    if with_actor:
        actor_loss = -manager.critic.q1(obs, batch.goal, subgoal).mean()
        losses["manager/actor_loss"] = actor_loss
        if args.coop_weight > 0:
            actor_loss = actor_loss + weight * coop_loss
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


def nobody_follows(row: dict) -> dict:
    """Zeros for the columns about subgoals, of which --flat has none."""
    ends = ("progress", "period_return")
    return {name: 0.0 for name in row if "subgoal" in name or name.endswith(ends)}


def coop_metrics(values: list, args: Args) -> dict:
    """Mean coop_value since the last row and the cooperation ratio (J_HRL - value) / J_HRL, CHER 5.4.

    The ratio is 0 at HRL's value, 1 at a value of 0; _aim is that of delta.
    """
    if not values:
        return {}
    metrics = {"manager/coop_value": float(np.mean([float(value) for value in values]))}
    reference = args.coop_reference
    if reference is not None:
        metrics["manager/coop_ratio"] = (reference - metrics["manager/coop_value"]) / reference
    if reference is not None and args.coop_delta is not None:
        metrics["manager/coop_ratio_aim"] = (reference - args.coop_delta) / reference
    return metrics


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
START_KEEPS += ("manager_reward_scale", "flat")


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
    total_steps eval_every eval_episodes manager_period hidden batch_size worker_buffer
    worker_actor_every manager_actor_every
    """
    for name in positive.split():
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1")
    not_negative = """
    seed threads save_every actor_lr critic_lr critic_weight_decay reached_radius candidate_noise fun_noise
    worker_noise worker_target_noise worker_target_noise_clip
    manager_noise manager_target_noise manager_target_noise_clip
    """
    for name in not_negative.split():
        if getattr(args, name) < 0:
            fail(f"--{name.replace('_', '-')} must not be negative")
    if args.seed >= 2**32:
        fail("--seed must be below 2**32")
    if args.threads > 1024:
        fail(f"--threads {args.threads}: torch crashes with so many; use at most the number of cores")
    for name in ("tau", "manager_gamma", "random_subgoals", "redrawn_subgoals", "subgoal_testing_rate"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must be within 0 to 1")
    if not 0 <= args.worker_gamma < 1:
        fail("--worker-gamma must be below 1, and not negative: a death counts reward / (1 - gamma)")
    if args.learning_starts < args.manager_period:
        fail("--learning-starts must be at least --manager-period: the manager learns from whole segments")
    if args.subgoal_space != "xy" and (spec.kind not in ("ant", "gather") or spec.observe_block):
        fail(f"--subgoal-space {args.subgoal_space} is about an ant's obs, not that of {args.env}: use xy")
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
    if args.candidates < 3 and args.relabeling == "off_policy":
        fail("--candidates must be at least 3: the stored subgoal, the displacement and one draw")
    if args.coop_weight < 0:
        fail("--coop-weight must not be below 0: the manager would seek what the worker cannot reach")
    for name in ("coop_delta", "coop_reference"):
        if getattr(args, name) is not None and getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must be below 0, as the worker's rewards are")
    if args.worker_buffer < args.manager_period:
        fail("--worker-buffer must hold at least one segment of --manager-period steps")
    two_levels = "coop_delta coop_reference freeze_worker hindsight mask_xy relabeling scale_worker_inputs"
    two_levels += " subgoal_limit worker_checkpoint rest_value redrawn_subgoals"
    given = [name for name in two_levels.split() if getattr(args, name) != getattr(Args, name)]
    if args.flat and given:
        instead = ": leave out --preset quick" if args.preset == "quick" else ""
        fail(f"--flat has one level: not with --{given[0].replace('_', '-')}{instead}")
    if args.coop_delta is not None and args.coop_weight == 0:
        fail("--coop-weight 0 switches cooperation off, --coop-delta learns its weight: choose one of them")
    if args.redrawn_subgoals > 0 and args.hindsight:
        fail("--redrawn-subgoals must be 0 with --hindsight, HAC's own way of it")
    if args.redrawn_subgoals > 0 and args.freeze_worker:
        fail("--redrawn-subgoals must be 0 with --freeze-worker, whose worker does not learn")
    if args.freeze_worker and args.worker_checkpoint is None and args.start_from is None:
        fail("--freeze-worker needs --worker-checkpoint or --start-from PATH, or no worker ever learns")
    if args.worker_checkpoint is not None and args.start_from is not None:
        fail("--start-from brings a worker: leave out --worker-checkpoint")


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


def delta_hint(run_dir: Path) -> str:
    """After a run without cooperation: J_HRL, from the last tenth of the rows, and what to do with it."""
    with open(run_dir / "progress.csv", newline="") as file:
        column = [row["manager/coop_value"] for row in csv.DictReader(file)]
    values = [float(value) for value in column if value]
    value = float(np.mean(values[-max(1, len(values) // 10) :]))
    if value >= 0:
        return (
            f"J_HRL = {value:.4g}: the worker's rewards are negative, so its Q has diverged; no delta follows"
        )
    return (
        f"J_HRL = {value:.4g}; paper: --coop-delta {0.25 * value:.4g} (25 % of it) for AntGather, "
        f"{0.75 * value:.4g} (75 %) otherwise, and --coop-reference {value:.4g} to log the cooperation ratio"
    )


def check_finite(losses: dict, step: int, run_dir: Path) -> dict:
    """Tensors -> numbers; a NaN or an infinity stops the run by name before anything is overwritten."""
    numbers = {name: float(value) for name, value in losses.items()}
    bad = [name for name, value in numbers.items() if not np.isfinite(value)]
    if bad:
        fail(f"{', '.join(bad)} is not finite at step {step}; the files in {run_dir} are from before")
    return numbers


def check_weight(losses: dict, step: int, args: Args):
    """A learned lambda grows for ever if delta is out of reach; in the end the squared gradients overflow."""
    if args.coop_delta is not None and float(losses.get("manager/coop_weight", 0.0)) > 1e6:
        fail(
            f"lambda is above 1e6 at step {step}: the worker's value stays below --coop-delta "
            f"{args.coop_delta}; choose a lower one (--coop-weight 0 prints some)"
        )


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


def load_worker(worker: TD3, env, args: Args):
    """The networks of a worker that was trained in another task, for the part of obs that both tasks share.

    AntGather's obs is the ant (29), sensors of apples and bombs (20), time; a maze's is the ant and the time
    (on AntMaze-Bottleneck the ant alone). Without the weights of what is missing the worker acts as if it
    read 0, which for a sensor says that there is nothing near. The optimizers start anew.
    """
    path = args.worker_checkpoint
    state = load_checkpoint(path)
    if "actor" not in state.get("worker", {}):
        fail(f"{path} has no worker: it is damaged, or of a flat TD3")
    nets, saved = ("actor", "target_actor", "critic", "target_critic"), state["worker"]
    same = "subgoal_space mask_xy scale_worker_inputs rest_value hidden action_limit"
    same += " worker_gamma" if args.rest_value else ""
    for name in same.split():
        old = state["args"].get(name, getattr(Args, name))
        if old != getattr(args, name):
            fail(f"{path} was trained with {name} {old}, this run has {getattr(args, name)}")
    space = SUBGOAL_SPACES[args.subgoal_space]
    saved_limit, limit = state["args"].get("subgoal_limit") or space, args.subgoal_limit or space
    if args.scale_worker_inputs and tuple(saved_limit) != tuple(limit):
        fail(f"{path} scales its inputs by subgoal_limit {saved_limit}, this run by {limit}")
    old_env = state["args"]["env"]  # may be of a fork, unknown here
    if old_env in SPECS and SPECS[old_env].kind == "gather" and env.task.kind != "gather":
        if env.task.kind != "ant" or env.task.observe_block:
            fail(f"{path} has a worker of AntGather: obs of {args.env} has other entries")
        robot = env.robot_nq + env.robot_nv  # entries before the sensors
        for net in nets:
            weight = saved[net]["layers.0.weight"]  # both kinds of layers have the inputs in dimension 1
            more = weight.shape[1] - getattr(worker, net).layers[0].weight.shape[1]
            saved[net]["layers.0.weight"] = torch.cat([weight[:, :robot], weight[:, robot + more :]], 1)
    load_parts({net: getattr(worker, net) for net in nets}, saved, path)


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
    if args.flat:
        half_range = limit  # the "subgoal" is what the robot does
    if len(half_range) > obs_dim:
        fail(f"--subgoal-space {args.subgoal_space} needs obs of {len(half_range)}, {args.env} has {obs_dim}")
    if not (env.action_space.low == -env.action_space.high).all():
        fail(f"{args.env}: actions must lie within +-limit, as the actor's do; rescale them in step()")
    if len(limit) != env.action_space.shape[0] or not all(x > 0 for x in args.action_limit):
        fail(f"--action-limit needs {env.action_space.shape[0]} positive numbers for {args.env}")
    noise = (args.manager_noise, args.manager_target_noise, args.manager_target_noise_clip)
    noise = [std * half_range for std in noise]  # as released; the paper's text has the range, twice that
    scale = torch.ones(obs_dim + goal_dim + len(half_range), device=device)
    manager = TD3(scale, half_range, args.manager_gamma, noise, args)
    if args.flat:
        return manager, FlatWorker(limit)
    noise = (args.worker_noise, args.worker_target_noise, args.worker_target_noise_clip)
    noise = [0 * limit] * 3 if args.freeze_worker else [std * limit for std in noise]
    scale = torch.ones(obs_dim + len(half_range) + len(limit), device=device)
    if args.mask_xy:
        scale[:2] = 0  # a walk is the same everywhere
    if args.scale_worker_inputs:
        scale[obs_dim:] = 1 / torch.cat([half_range, limit])
    rest = 1 / (1 - args.worker_gamma) if args.rest_value else 0.0
    worker = TD3(scale, limit, args.worker_gamma, noise, args, half_range, rest)
    return manager, worker


def make_buffers(env, args: Args, manager: TD3, worker: TD3, device) -> tuple:
    """The segments, for both levels, and the one that is being recorded."""
    obs_dim, goal_dim = env.observation_space["observation"].shape[0], env.task.goal_dim
    dims, action_dim, period = len(manager.limit), len(worker.limit), args.manager_period
    shapes = dict(obs_seq=(period + 1, obs_dim), subgoal_seq=(period + 1, dims), length=())
    shapes |= dict(action_seq=(period, action_dim), worker_reward_seq=(period,))
    shapes |= dict(goal=(goal_dim,), reward=(), terminated=(), dead=())
    buffer = ReplayBuffer(args.worker_buffer // period, device, **shapes)
    return buffer, Segment(period, obs_dim, dims, action_dim)


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
    # agents: what model.pt holds; parts: what checkpoint.pt holds; loop: what else --resume brings back
    agents = {"manager": manager, "worker": worker}
    eval_seed = 1_000_003 * (args.seed + 1)  # far from the seeds of training
    if args.capture_video:
        try_to_render(eval_env)

    if args.eval_only:
        load_parts(agents, load_checkpoint(args.checkpoint), args.checkpoint)
        folder = Path(args.run_dir or Path(args.checkpoint).parent)
        recorder = Recorder(eval_env, folder, "eval")
        recorder.has_subgoals = not args.flat
        metrics = evaluate(eval_env, manager, worker, args, eval_seed, recorder)
        for name, value in (metrics | (nobody_follows(metrics) if args.flat else {})).items():
            print(f"{name:28s} {value:.4f}")
        recorder.save()
        print(f"picture: {folder / 'pictures' / 'eval.png'}")
        return

    if args.start_from and not args.resume:
        load_parts(agents, load_checkpoint(args.start_from), args.start_from)
    elif args.worker_checkpoint and not args.resume:
        load_worker(worker, env, args)
    worker_learns = not (args.flat or args.freeze_worker)
    cooperation = CoopWeight(args, device)
    buffer, segment = make_buffers(env, args, manager, worker, device)
    parts = agents | {"coop_weight": cooperation, "buffer": buffer, "segment": segment}
    period, dims = args.manager_period, len(manager.limit)

    # ---- start, or continue
    first_step, loop = 1, SimpleNamespace(losses={}, seconds=0.0, periods=[], heights=[], flips=[])
    loop.returns, loop.episode_return = [], 0.0
    loop.worker_returns, loop.coop_values = [], []
    loop.obs, loop.goal = split_observation(env.reset(seed=args.seed)[0])
    uniform_share = 1.0 if args.uniform_warmup else args.random_subgoals
    loop.subgoal = loop.first_subgoal = explore(manager, loop.obs, loop.goal, uniform_share)
    segment.start(loop.obs, loop.subgoal)
    # what a fork cannot save fails here, not when it is to be saved
    to_tensors({name: part.state_dict() for name, part in parts.items()} | freeze_run(0, loop, env, device))
    if args.resume:
        first_step, loop = load_run(args.resume, parts, env, device, loop)
        if first_step > args.total_steps:
            fail(f"{args.resume} is at step {first_step - 1} already; raise --total-steps")
    run_dir = make_run_dir(args)  # after all refusals: a refused --resume leaves the run's config.json alone
    replay = sum(part.rows.nbytes for part in parts.values() if isinstance(part, ReplayBuffer))
    print(f"replay: at most {replay / 1e9:.2f} GB", flush=True)
    # recorded updates read the batch at the place where sample's recording writes it: no other batch will do
    sample, learn_worker, learn_manager = (
        cuda_graph(f, args, device) for f in (sample_segments, update_worker, update_manager)
    )
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
        action = explore(worker, obs, subgoal, float(warm_up and worker_learns))

        # ---- learn from all steps up to the last; a GPU does so while the CPU simulates the next one
        learning_step = step - args.learning_starts
        with fast_cpu_matmul(args, device):
            if learning_step > 0:
                batch = sample(buffer, args)
            if learning_step > 0 and learning_step % period == 0:  # wherever the segment stands
                with_actor = learning_step % (period * args.manager_actor_every) == 0
                terms = (
                    with_actor,
                    args.coop_delta is not None and learning_step > period * args.coop_starts,
                )
                loop.losses |= learn_manager(manager, worker, cooperation, batch, args, *terms)
                if not args.flat:
                    loop.coop_values.append(loop.losses["manager/coop_value"].clone())
            if learning_step > 0 and worker_learns:
                with_actor = learning_step % args.worker_actor_every == 0
                loop.losses |= learn_worker(worker, batch, args, with_actor)

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
        # easy to overlook: the subgoal that the worker acted on, and its successor in the same period
        segment.add(action, reward, worker_reward, next_obs, next_subgoal)

        # ---- close the segment
        if segment.length == period or episode_over:
            outcome = dict(goal=goal, reward=args.manager_reward_scale * segment.reward)
            outcome |= dict(terminated=terminated, dead=info["dead"])
            # easy to overlook: no hindsight for a death. As a subgoal that was reached it would be worth 0,
            # more than living on
            in_hindsight = args.hindsight and not info["dead"]
            if in_hindsight:
                buffer.add(**hindsight_sequences(segment.sequences(), dims), **outcome)
            if not in_hindsight or torch.rand(()) < args.subgoal_testing_rate:
                buffer.add(**segment.sequences(), **outcome)
            xy_rows = (segment.obs_seq[0, :2], loop.first_subgoal[:2], next_obs[:2])
            loop.periods.append(np.concatenate(xy_rows).tolist())
            loop.worker_returns.append(float(segment.worker_reward_seq.sum()))
            if not episode_over:
                next_subgoal = loop.first_subgoal = explore(manager, next_obs, goal, uniform_share)
                segment.start(next_obs, next_subgoal)
        loop.obs, loop.subgoal = next_obs, next_subgoal
        loop.heights.append(info["torso_height"])
        loop.flips.append(info["upside_down"])
        loop.episode_return += float(reward)

        if episode_over:
            loop.returns.append(loop.episode_return)
            loop.episode_return = 0.0
            loop.obs, loop.goal = split_observation(env.reset()[0])
            loop.subgoal = loop.first_subgoal = explore(manager, loop.obs, loop.goal, uniform_share)
            segment.start(loop.obs, loop.subgoal)

        # ---- evaluate, log, save
        progress.update()
        if step % 1000 == 0:
            check_finite(loop.losses, step, run_dir)
            check_weight(loop.losses, step, args)
        if step % args.eval_every == 0 or step == args.total_steps:
            row = {"step": step, "time": round(time.time() - begin, 1)}
            row["steps_per_second"] = round((step - last_step) / (time.time() - last_time), 1)
            recorder = Recorder(eval_env, run_dir, f"step_{step:09d}")
            recorder.has_subgoals = not args.flat  # there the manager's word is the action itself
            row |= evaluate(eval_env, manager, worker, args, eval_seed + step, recorder)
            row |= period_metrics("worker", loop.periods, args.reached_radius)
            row["worker/torso_height"] = float(np.mean(loop.heights))
            row["worker/upside_down"] = float(np.mean(loop.flips))
            row |= {"train/return": float(np.mean(loop.returns))} if loop.returns else {}
            row["worker/period_return"] = float(np.mean(loop.worker_returns or [0.0]))
            row |= nobody_follows(row) if args.flat else {}
            row |= check_finite(loop.losses, step, run_dir) | coop_metrics(loop.coop_values, args)
            log_row(row, run_dir, writer, progress)
            save_checkpoint(agents, args, run_dir / "model.pt")
            recorder.save(writer, step)
            loop.periods, loop.heights, loop.flips, loop.returns = [], [], [], []
            loop.worker_returns, loop.coop_values = [], []
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
    is_hrl = args.coop_weight == 0 and args.relabeling == "none" and not args.hindsight and worker_learns
    is_hrl = is_hrl and not args.start_from  # whose worker may have learned under another manager
    if is_hrl and not stop and "manager/coop_value" in loop.losses:
        print(delta_hint(run_dir))


if __name__ == "__main__":
    try:
        main(parse_args())
    except FloatingPointError as error:  # of the simulation; deterministic, so --resume would meet it again
        fail(f"{error}; take another --seed")
