"""Agents for another discount or another task, to begin with by --start-from: three experiments of LOG.md.

python benchmark/graft.py discount AGENT OUT --worker-gamma 0.98   # its worker looks further ahead
python benchmark/graft.py see-xy AGENT OUT                         # its worker sees where it is
python benchmark/graft.py without-time WORKER MANAGER OUT          # of aclg_gcmr.py, for AntMaze-Bottleneck
"""

import dataclasses
import sys
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
TIME, TIME_VALUE = 29, 0.2  # the last entry of AntMaze-U's obs, 0 to 0.5, and the value put for it


def discount(agent: Positional[Path], out: Positional[Path], worker_gamma: float):
    """The agent with another worker gamma.

    With --rest-value the worker's critics are networks on top of -rest |subgoal|, rest = 1 / (1 - gamma),
    which add up rest times the metres gained. Their last layer is stretched as rest is; how far ahead they
    look is left to be learned.
    """
    state = torch.load(agent, weights_only=True)
    if state["args"].get("rest_value"):
        stretch = (1 - state["args"]["worker_gamma"]) / (1 - worker_gamma)
        for net in ("critic", "target_critic"):
            for name in ("layers.2.weight", "layers.2.bias"):
                state["worker"][net][name] *= stretch
    state["worker"].pop("critic_optimizer", None)  # its moments are of the old scale
    state["args"]["worker_gamma"] = worker_gamma
    torch.save(state, out)


def see_xy(agent: Positional[Path], out: Positional[Path]):
    """The agent with --no-mask-xy: its worker acts as before, x and y weigh nothing until it learns."""
    state = torch.load(agent, weights_only=True)
    for net in ("actor", "target_actor", "critic", "target_critic"):
        weight = state["worker"][net]["layers.0.weight"]  # hidden so far: as drawn, or decayed
        inputs = weight if net.endswith("critic") else weight.T  # [.., inputs, units]
        inputs[..., :2, :] = 0
    for optimizer in ("actor_optimizer", "critic_optimizer"):
        state["worker"].pop(optimizer, None)
    state["args"]["mask_xy"] = False
    torch.save(state, out)


def without_time(worker: Positional[Path], manager: Positional[Path], out: Positional[Path]):
    """The worker of one agent of AntMaze-U and the manager of another, without the time, obs' last entry.

    Settings are those of aclg_gcmr.py's quick preset for AntMaze-Bottleneck; optimizers and novelty are new.
    """
    import aclg_gcmr

    args = aclg_gcmr.parse_args(["--env", "AntMaze-Bottleneck", "--preset", "quick"])
    state = {"script": "aclg_gcmr", "format": aclg_gcmr.FORMAT, "args": dataclasses.asdict(args)}
    state["novelty"] = aclg_gcmr.Novelty(TIME, 2, args).state_dict()
    for level, path in (("worker", worker), ("manager", manager)):
        nets = torch.load(path, weights_only=True)[level]
        nets = {name: net for name, net in nets.items() if not name.endswith("optimizer")}
        for net in nets.values():
            weight, bias = net["layers.0.weight"], net["layers.0.bias"]
            net["layers.0.bias"] = bias + TIME_VALUE * weight.select(1, TIME)
            net["layers.0.weight"] = torch.cat([weight[:, :TIME], weight[:, TIME + 1 :]], 1)
        state[level] = nets
    torch.save(state, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"discount": discount, "see-xy": see_xy, "without-time": without_time}
    )
