"""The updates as CUDA graphs: what can be shown without a GPU, and the comparison with one (marked cuda)."""

import contextlib
import gc
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ToyEnv, read_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aclg_gcmr
import cher
import hiro

CPU, META = torch.device("cpu"), torch.device("meta")  # meta tensors have shapes, but no values
MODULES = {"hiro": hiro, "cher": cher, "aclg_gcmr": aclg_gcmr}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CASES = [
    ("hiro", {}),
    ("hiro", {"relabeling": "fun"}),
    ("hiro", {"redrawn_subgoals": 0.8, "rest_value": True, "worker_looks_ahead": False}),
    ("cher", {}),
    ("cher", {"coop_delta": -5.0}),
    ("cher", {"coop_form": "theorem", "relabeling": "off_policy"}),
    ("aclg_gcmr", {}),
    ("aclg_gcmr", {"gradient_penalty_form": "released"}),
    ("aclg_gcmr", {"redrawn_subgoals": 0.8, "rest_value": True}),
    ("aclg_gcmr", {"path_search": "soft", "landmark_space": "adjacency", "model_relabeling": False}),
]
FLAGS = list(itertools.product([False, True], repeat=3))


class Learner:
    """A script's agents, buffers and updates, wrapped as in its main()."""

    def __init__(self, name, device, **settings):
        module = MODULES[name]
        torch.manual_seed(0)
        size = dict(hidden=16, batch_size=8, subgoal_space="xy", output_init=0.0)
        size |= {"coverage_landmarks": 6, "novelty_landmarks": 20} if name == "aclg_gcmr" else {}
        args, env = module.Args(**size | settings), ToyEnv()
        self.args = args
        manager, worker = module.make_agents(env, args, device)
        *self.buffers, _ = module.make_buffers(env, args, manager, worker, device)
        for buffer in self.buffers:
            buffer.rows.zero_()  # compared below, and most of them never written
        self.rng, self.device, self.agents = np.random.default_rng(0), device, [manager, worker]
        self.dynamics = None
        graph = lambda function: module.cuda_graph(function, args, device)  # noqa: E731
        learn_worker = graph(module.update_worker)
        if name == "hiro":
            learn_manager = graph(module.update_manager)

            def learn(actor, weight, planning):
                losses = learn_worker(worker, self.buffers[0], args, actor)
                return losses | learn_manager(manager, worker, self.buffers[1], args, actor)

        elif name == "cher":
            coop_weight = cher.CoopWeight(args, device)
            sample, learn_manager = graph(cher.sample_segments), graph(cher.update_manager)
            self.agents.append(coop_weight)

            def learn(actor, weight, planning):
                batch = sample(self.buffers[0], args)
                weight = weight and args.coop_delta is not None
                losses = learn_manager(manager, worker, coop_weight, batch, args, actor, weight)
                return losses | learn_worker(worker, batch, args, actor)

        else:
            obs_dim = env.observation_space["observation"].shape[0]
            self.dynamics = aclg_gcmr.DynamicsEnsemble(obs_dim, 2, args).to(device)
            adjacency = aclg_gcmr.Adjacency(2, args).to(device)
            self.novelty = aclg_gcmr.Novelty(obs_dim, 2, args).to(device)
            landmarks = aclg_gcmr.LandmarkGraph(obs_dim, args).to(device)
            adam = dict(fused=True, capturable=device.type == "cuda")
            optimizer = torch.optim.Adam(self.novelty.predictor.parameters(), args.novelty_lr, **adam)
            learn_novelty, learn_manager = graph(module.update_novelty), graph(module.update_manager)
            self.agents.append(SimpleNamespace(a=self.novelty, b=landmarks, c=optimizer))
            parts = (manager, worker, self.dynamics, adjacency, self.novelty, landmarks)
            rows, segments = self.buffers

            def learn(actor, weight, planning):
                due = dict(with_actor=actor, with_penalty=weight, with_planning=planning and actor)
                losses = dict(learn_worker(worker, manager, self.dynamics, rows, segments, args, **due))
                due = dict(with_model=actor, with_planner=weight, with_new_graph=weight and planning)
                losses |= learn_manager(*parts, segments, rows, args, **due)
                return losses | learn_novelty(self.novelty, optimizer, rows, args)

        self.learn = learn

    def collect(self, rows=5):
        """New rows in the buffers and, for the model, new statistics and a wider box."""
        for buffer in self.buffers:
            for _ in range(rows):
                fields = {name: self.rng.normal(size=shape) for name, shape in buffer.shapes.items()}
                fields |= {"terminated": 0, "dead": 0} | ({"length": 7} if "length" in buffer.shapes else {})
                buffer.add(**fields)
        if self.dynamics is not None:
            obs, change, action = (torch.from_numpy(self.rng.normal(size=(9, n))) for n in (5, 5, 2))
            obs, change, action = (x.float().to(self.device) for x in (obs, change, action))
            self.dynamics.fit_statistics(obs, action, change)
            self.dynamics.widen_box(10 * obs)
            self.novelty.visit(10 * obs, self.args)

    def tensors(self):
        """What must stay where it is."""
        state = [getattr(agent, "__dict__", {}) for agent in self.agents]
        modules = [m for d in state for m in d.values() if isinstance(m, torch.nn.Module)]
        modules += [self.dynamics] if self.dynamics is not None else []
        optimizers = [o for d in state for o in d.values() if isinstance(o, torch.optim.Optimizer)]
        found = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        found += [t for o in optimizers for t in tree_leaves([list(o.state.values()), o.param_groups])]
        found += [t for buffer in self.buffers for t in (buffer.rows, buffer.size)]
        return [t for t in found if torch.is_tensor(t)]


class Recordable(TorchDispatchMode):
    """Stops what a graph cannot record: values or tensors of the CPU, and shapes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "equal.default")

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        index = args[1] if "aten.index.Tensor" in str(func) else ()
        assert not any(i is not None and i.dtype == torch.bool for i in index), "rows chosen by a mask"
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)]
        assert all(t.device.type == self.device.type for t in tensors), f"{func} leaves {self.device}"
        return result


@pytest.mark.parametrize("name, settings", CASES)
def test_everything_stays_where_it_is(name, settings):
    """A recording reads and writes fixed places, and these are those of all networks, states and buffers."""
    learner = Learner(name, CPU, **settings)
    for flags in FLAGS:  # optimizers make their state
        learner.collect()
        learner.learn(*flags)
    tensors = learner.tensors()
    places, values = [t.data_ptr() for t in tensors], [t.detach().clone() for t in tensors]
    with Recordable(CPU):
        for flags in FLAGS:
            learner.learn(*flags)
    learner.collect()
    assert [t.data_ptr() for t in learner.tensors()] == places
    moved = [not torch.equal(old, new) for old, new in zip(values, learner.tensors(), strict=True)]
    assert np.mean(moved) > 0.5 and moved[-1]  # the last one: how full a buffer is


@pytest.mark.parametrize("name, settings", CASES)
def test_updates_need_no_cpu(name, settings, monkeypatch):
    """On tensors without values, where a detour over the CPU fails. Adam, which refuses them, is left out."""
    monkeypatch.setattr(
        MODULES[name], "adam_step", lambda optimizer, params, loss: torch.autograd.grad(loss, params)
    )
    no_autocast = lambda *inputs: contextlib.nullcontext()  # noqa: E731 META has none
    monkeypatch.setattr(aclg_gcmr, "planner_precision", no_autocast)
    learner = Learner(name, META, **settings)
    for buffer in learner.buffers:
        buffer.added = 40
    for flags in FLAGS:
        with Recordable(META):
            learner.learn(*flags)


def test_recordable_notices():
    """The check above can fail."""
    x, y = torch.arange(3.0), torch.arange(3.0, device=META)
    for unfit in (lambda: x.sum().item(), lambda: x[x > 1], lambda: torch.tensor(1.0), lambda: x.nonzero()):
        with pytest.raises(AssertionError), Recordable(CPU):
            unfit()
    for unfit in (lambda: y[torch.arange(2)], lambda: y + x[0], lambda: y.cpu(), lambda: y.tolist()):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Recordable(META):
            unfit()


@pytest.mark.parametrize("module", [hiro, cher, aclg_gcmr])
def test_nothing_is_recorded_on_a_cpu(module):
    function = lambda: None  # noqa: E731
    assert module.cuda_graph(function, module.Args(), CPU) is function
    assert module.cuda_graph(function, module.Args(cudagraph=False), torch.device("cuda")) is function


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("name, settings", CASES)
def test_recorded_equals_eager(name, settings, monkeypatch):
    """Ten rounds over all flags, most of them replays, on the same data and random numbers."""
    results, replays, replay = [], [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    gc.collect()
    for cudagraph in (False, True):
        assert not replays
        learner, losses = Learner(name, torch.device("cuda"), cudagraph=cudagraph, **settings), []
        torch.manual_seed(1)
        for _ in range(10):
            learner.collect()
            losses += [{k: v.clone() for k, v in learner.learn(*flags).items()} for flags in FLAGS]
        results.append(([t.detach().clone() for t in learner.tensors()], tree_leaves(losses)))
    assert len(replays) > 10
    gc.collect()  # not while the next case records: a dying graph would spoil that
    (eager, eager_losses), (recorded, recorded_losses) = results
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(eager, recorded, strict=True))
    pairs = zip(eager_losses, recorded_losses, strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


@pytest.mark.cuda
@needs_gpu
def test_script_on_a_gpu(script, train, run, tmp_path):
    """Training, a checkpoint, and going on from it on either device."""
    flags = ("--device", "cuda", "--total-steps", 600, "--eval-every", 300, "--save-every", 300)
    train(script, "PointMaze-U", tmp_path, *flags)
    assert json.loads((tmp_path / "config.json").read_text())["gpu"]
    for number, device in enumerate(("cuda", "cpu", "cuda"), 1):
        more = ("--total-steps", 600 + 300 * number, "--device", device)
        run(script, "--resume", tmp_path / "checkpoint.pt", *more)
    assert [int(row["step"]) for row in read_rows(tmp_path)] == [300, 600, 900, 1200, 1500]


def test_numbers_are_no_inputs(module, monkeypatch):
    """A recording would keep a weight as it was; booleans choose between recordings."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    update = module.cuda_graph(lambda *inputs: None, module.Args(), SimpleNamespace(type="cuda", index=None))
    for number in (1, 0.5, np.float64(1), np.mean([1.0, 2.0]), np.bool_(True)):
        with pytest.raises(TypeError, match="pass a tensor"):
            update(torch.zeros(2), number)
