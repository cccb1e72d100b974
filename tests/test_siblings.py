"""Each script stands alone, so they share by copies, and copies must stay equal."""

import ast
import difflib
import itertools
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, TINY, TINY_OF

# Defined in more than one script with the same text; Class.method where the rest of the class differs.
SHARED = """
SCRIPT FORMAT STOP_SIGNALS RESUME_MAY_CHANGE EVAL_MAY_CHANGE whole_number Count fail parse_args
subgoal_transition intrinsic_reward
EnsembleLinear init_output_ Actor Critic in_blocks adam_step TD3 explore
ReplayBuffer.__init__ ReplayBuffer.__len__ ReplayBuffer.add ReplayBuffer.sample ReplayBuffer.unpack
ReplayBuffer.state_dict ReplayBuffer.load_state_dict
Segment score_candidates
make_candidates relabel_subgoals
period_metrics split_observation evaluate writing Recorder
cpu_model describe_run append_row to_tensors say log_row check_finite
save_checkpoint load_checkpoint load_parts freeze_run
fast_cpu_matmul cuda_graph load_run make_buffers make_run_dir
redraw_subgoals safe_norm try_to_render load_worker
""".split()
# What a method is about: the same name, another text.
DIFFERENT = """
Args START_KEEPS PRESETS QUICK FULL SUBGOAL_SPACES
check_args ReplayBuffer update_worker update_manager make_agents main
""".split()
# Shared by the others: segments of cher.py hold the worker's subgoals and rewards, as it has one replay;
# aclg_gcmr.py has HIGL's order of candidates, relabels by its model, and scales the worker's reward.
OWN = {"cher": {"Segment", "make_buffers"}, "aclg_gcmr": {"make_candidates", "relabel_subgoals"}}
ALLOWED = {*sys.stdlib_module_names, "numpy", "torch", "tyro", "tqdm", "matplotlib", "mujoco", "common_envs"}
OPTIONAL = {"wandb", "imageio"}  # imported where they are asked for


def definitions(script):
    """Source text of every top-level name, and of the methods of classes."""
    source = (ROOT / f"{script}.py").read_text()
    lines, found = source.splitlines(), {}

    def text(node):
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        return "\n".join(lines[first - 1 : node.end_lineno])

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = text(node)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": text(method) for method in methods}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in getattr(node, "targets", None) or [node.target]:
                found[target.id] = text(node)
        if isinstance(node, ast.AugAssign):
            found[node.target.id] += text(node)
        if isinstance(node, ast.If) and "__main__" not in text(node):
            for name in set(found) & {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}:
                found[name] += text(node)
    return found


DEFINITIONS = {script: definitions(script) for script in SCRIPTS}


@pytest.mark.parametrize("name", SHARED)
def test_copies_are_equal(name):
    owners = [s for s in SCRIPTS if name in DEFINITIONS[s] and name not in OWN.get(s, ())]
    assert len(owners) > (len(SCRIPTS) == 3), f"{name} is in one script only"  # a fork may have fewer
    for one, other in itertools.pairwise(owners):
        a, b = (DEFINITIONS[script][name].splitlines() for script in (one, other))
        assert a == b, "\n".join(difflib.unified_diff(a, b, one, other, lineterm=""))


def test_every_common_name_is_listed():
    """So that nobody forgets a new function that two scripts have."""
    counts = [name for found in DEFINITIONS.values() for name in found if "." not in name]
    common = {name for name in counts if counts.count(name) > 1}
    assert common <= {*SHARED, *DIFFERENT}
    assert not set(SHARED) & set(DIFFERENT)


def test_what_a_resumed_run_may_change(module):
    """What it learns from is fixed; published runs are compared in the rest, too (test_results.py)."""
    free = "resume run_dir total_steps device threads eval_every eval_episodes eval_goals save_every variant"
    assert set(module.RESUME_MAY_CHANGE) == {*free.split(), "track", "capture_video", "cudagraph"}
    evaluating = {"checkpoint", "eval_only", "env", "reward", "seed", "reached_radius"}
    assert set(module.EVAL_MAY_CHANGE) == {*module.RESUME_MAY_CHANGE, *evaluating}


def imports(tree):
    """Names of imported packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0  # no package here
            yield node.module.split(".")[0]


def test_imports(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    inside = {name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for name in imports(f)}
    everywhere = set(imports(tree))
    assert everywhere - OPTIONAL <= ALLOWED
    assert inside == OPTIONAL  # and so they are not at the top, of which there is one statement each
    assert sum(name in OPTIONAL for name in imports(tree)) == len(OPTIONAL)
    assert not everywhere & {"hiro", "cher", "aclg_gcmr"}


def test_common_envs_needs_no_torch():
    packages = set(imports(ast.parse((ROOT / "common_envs.py").read_text())))
    assert packages <= {*sys.stdlib_module_names, "numpy", "gymnasium", "mujoco"}


def test_a_copy_with_the_environments_is_enough(script, tmp_path):
    for name in (f"{script}.py", "common_envs.py"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, f"{script}.py", "--env", "PointMaze-U", "--total-steps", "80", *TINY]
    command += [*TINY_OF.get(script, ()), "--run-dir", "run"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert {"config.json", "progress.csv", "model.pt"} <= {path.name for path in (tmp_path / "run").iterdir()}
