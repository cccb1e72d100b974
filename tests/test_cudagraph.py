"""The updates as CUDA graphs: what can be shown without a GPU, and the comparison with one (marked cuda)."""

import itertools

import numpy as np
import pytest
import torch
from conftest import ToyEnv
from torch.utils._python_dispatch import TorchDispatchMode

import aclg_gcmr
import cher
import hiro

CPU = torch.device("cpu")


def filled(buffer, rows=40):
    rng = np.random.default_rng(0)
    for _ in range(rows):
        fields = {name: rng.normal(size=shape) for name, shape in buffer.shapes.items()}
        buffer.add(**fields | ({"length": 7} if "length" in buffer.shapes else {}) | {"terminated": 0})
    return buffer


def learner(name, device, **settings):
    """The script's agents on random rows: (networks and optimizers, one round of updates with flags)."""
    module = {"hiro": hiro, "cher": cher, "aclg_gcmr": aclg_gcmr}[name]
    torch.manual_seed(0)
    size = dict(hidden=16, batch_size=8, subgoal_space="xy", output_init=0.0)
    args, env = module.Args(**size | settings), ToyEnv()
    manager, worker = module.make_agents(env, args, device)
    *buffers, _ = module.make_buffers(env, args, manager, worker, device)
    buffers, extra = [filled(buffer) for buffer in buffers], []
    graph = lambda function: module.cuda_graph(function, args, device)  # noqa: E731
    learn_worker = graph(module.update_worker)
    if name == "hiro":
        learn_manager = graph(module.update_manager)

        def learn(actor, weight, planning):
            learn_worker(worker, buffers[0], args, actor)
            return learn_manager(manager, worker, buffers[1], args, actor)

    elif name == "cher":
        coop_weight = cher.CoopWeight(args, device)
        sample, learn_manager = graph(cher.sample_segments), graph(cher.update_manager)
        extra = [coop_weight]

        def learn(actor, weight, planning):
            batch = sample(buffers[0], args)
            weight = weight and args.coop_delta is not None
            losses = learn_manager(manager, worker, coop_weight, batch, args, actor, weight)
            return losses | learn_worker(worker, batch, args, actor)

    else:
        dynamics = aclg_gcmr.DynamicsEnsemble(env.observation_space["observation"].shape[0], 2, args).to(
            device
        )
        dynamics.widen_box(torch.tensor([[-9.0], [9.0]], device=device).expand(2, len(dynamics.low)))

        def learn(actor, weight, planning):
            due = dict(with_actor=actor, with_penalty=weight, with_planning=planning and actor)
            return learn_worker(worker, manager, dynamics, *buffers, args, **due)

    return [manager, worker, *extra], learn


def tensors(tree):
    if torch.is_tensor(tree):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [leaf for branch in branches for leaf in tensors(branch)]


CASES = [
    ("hiro", {}),
    ("hiro", {"relabeling": "fun"}),
    ("cher", {}),
    ("cher", {"coop_delta": -5.0}),
    ("cher", {"coop_form": "theorem", "relabeling": "off_policy"}),
    ("aclg_gcmr", {}),
    ("aclg_gcmr", {"gradient_penalty_form": "released"}),
]
FLAGS = list(itertools.product([False, True], repeat=3))


class Recordable(TorchDispatchMode):
    """Stops what a graph cannot record: values fetched to the CPU, shapes that depend on them, constants."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "equal.default")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        index = args[1] if "aten.index.Tensor" in str(func) else ()
        assert not any(i is not None and i.dtype == torch.bool for i in index), "rows chosen by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, settings", CASES)
def test_updates_can_be_recorded(name, settings):
    """No value goes through the CPU, and every network and optimizer state stays where it was."""
    agents, learn = learner(name, CPU, **settings)
    for flags in FLAGS:  # optimizers make their state
        learn(*flags)
    state = [t for agent in agents[:2] for t in tensors(agent.state_dict())]
    places, values = [t.data_ptr() for t in state], [t.clone() for t in state]
    with Recordable():
        for flags in FLAGS:
            learn(*flags)
    after = [t for agent in agents[:2] for t in tensors(agent.state_dict())]
    assert [t.data_ptr() for t in after] == places
    assert any(not torch.equal(old, new) for old, new in zip(values, after))


def test_recordable_notices():
    """The check above can fail."""
    x = torch.arange(3.0)
    for unfit in (lambda: x.sum().item(), lambda: x[x > 1], lambda: torch.tensor(1.0), lambda: x.nonzero()):
        with pytest.raises(AssertionError), Recordable():
            unfit()


@pytest.mark.parametrize("module", [hiro, cher, aclg_gcmr])
def test_nothing_is_recorded_on_a_cpu(module):
    function = lambda: None  # noqa: E731
    assert module.cuda_graph(function, module.Args(), CPU) is function
    assert module.cuda_graph(function, module.Args(cudagraph=False), torch.device("cuda")) is function


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name, settings", CASES)
def test_recorded_equals_eager(name, settings):
    """Ten rounds over all flags, most of them replays, from the same state and random numbers."""
    results = []
    for cudagraph in (False, True):
        agents, learn = learner(name, torch.device("cuda"), cudagraph=cudagraph, **settings)
        torch.manual_seed(1)
        losses = [{k: v.clone() for k, v in learn(*flags).items()} for _ in range(10) for flags in FLAGS]
        results.append((tensors([agent.state_dict() for agent in agents]), tensors(losses)))
    (eager, eager_losses), (recorded, recorded_losses) = results
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(eager, recorded, strict=True))
    pairs = zip(eager_losses, recorded_losses, strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
