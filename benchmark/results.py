"""The table of all published runs, benchmark/RESULTS.md, from the files below benchmark/results.

    python benchmark/results.py

A run that stopped before its --total-steps is unfinished: it has a line of its own and is not averaged over.
--total-steps may have been less than the preset's length.
"""

import csv
import itertools
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
LAST = 5  # evaluations
HEADER = """# Results

Made by `python benchmark/results.py` from the files below `FOLDER`; do not edit.
Success: noise-free, at the last step of the episode, mean of a seed's last five evaluations; then the mean
over seeds (smallest to largest). Any step: the same with the goal counted at any step, as HRAC, HIGL and
GCMR do. Solved at: the first step at which the mean of five evaluations in a row is at least 0.9. Return: of
the environment's rewards per evaluation episode, mean of the last five (AntGather has no goal and so no
success). Progress: of the worker in training, metres along the subgoal per period, mean of the last five
rows. Hours: wall-clock of one run, often beside others; some count pauses. Unfinished: stopped before its own
--total-steps, which may be less than the script's length for the environment. Runs with --start-from in their
command (below) began with a trained agent, not from scratch; their steps and `solved at` count from there.
"""
SEEDS = """
## Seeds together

Variants of several seeds, finished or not, at the last step at which all of them were evaluated: mean and
standard deviation (n - 1) over the seeds of each one's mean of the last five evaluations (or fewer) up to
there. That step is where the shortest run ended, so others may have gone on to more. Intervals and episodes
of evaluation may differ. Where in the published runs more than the seed differs: quick_walker_again's two
began with different agents; far_g95 is seed 1 of hiro's quick on AntMaze-ULarge, and not counted there.
"""
ORIGIN = """
## Commits, machines and commands

Commands are those of a run's first start (with --resume PATH: of a later one, as the first was not kept),
without paths; machine, commit and the settings in its config.json are those of the last start ("a then b":
the commits of all its starts, kept since 2026-11-30). Presets and code have changed since: a command and
its settings hold for the commit.
"""
STARTS = """
## Agents that runs began with

Files of --start-from that are not in the tree, and how they came about (`graft`: `python benchmark/graft.py`,
`agents`: `benchmark/agents`):

- walker.pt: `graft without-time agents/aclg_gcmr_dense.pt agents/aclg_gcmr.pt walker.pt`; novelty
  networks are drawn anew
- bn_g98.pt: `graft discount agents/aclg_gcmr_bottleneck.pt bn_g98.pt --worker-gamma 0.98`
- xy.pt: `graft see-xy` of the run's own model.pt, not kept; the published agent lacks its
  optimizers
- s98.pt: `graft discount agents/hiro_ularge_scratch.pt s98.pt --worker-gamma 0.98`
- g98.pt: the same of the model.pt of hiro/AntMaze-ULarge/quick_on/seed2 at 650,000 steps, not kept
- quick_on_mid.pt: the model.pt of the same run at 300,000 steps, not kept
- A3_80k_agent.pt: the model.pt of aclg_gcmr/AntMaze-Bottleneck/quick_walker/seed3 at 80,000 steps without its
  optimizers, not kept
"""
COLUMNS = (
    "script",
    "environment",
    "variant",
    "seeds",
    "steps",
    "success",
    "solved at",
    "any step",
    "solved at, any step",
    "return",
    "progress",
    "hours",
)


@dataclass
class Args:
    folder: Path = HERE / "results"  # <script>/<env>/<variant>/seed<k>/{progress.csv, config.json}
    out: Path | None = None  # the table; None: RESULTS.md beside the folder


def first_command(config: dict) -> str:
    """What started the run, without the paths of its machine."""
    python, script, *words = shlex.split(config.get("earlier_commands", [config["command"]])[0])
    words, kept = iter(words), [python, Path(script).name]
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in ("--run-dir", "--resume", "--worker-checkpoint", "--start-from"):
            value = value if equals else next(words)
            agent = Path(value).name if Path(value).is_absolute() else value
            shown = {"--run-dir": [], "--start-from": [name, agent]}
            kept += shown.get(name, [name, "PATH"])
        else:
            kept.append(word)
    return shlex.join(kept)


def solved_at(steps, successes) -> int | None:
    """The first step at which the mean of five evaluations in a row is at least 0.9."""
    means = np.convolve(successes, np.ones(LAST) / LAST, "valid") if len(steps) >= LAST else np.empty(0)
    solved = np.flatnonzero(means >= 0.9 - 1e-9)
    return int(steps[LAST - 1 + solved[0]]) if len(solved) else None


def read_run(file: Path) -> dict:
    """One run's numbers."""
    config = json.loads((file.parent / "config.json").read_text())
    with open(file, newline="") as table:
        rows = list(csv.DictReader(table))
    values = {
        name: np.array([float(row.get(name) or "nan") for row in rows])
        for name in ("step", "time", "eval/success", "eval/success_any", "eval/return", "worker/progress")
    }
    settings, versions = config["args"], config.get("versions", {})
    machine = [config.get("cpu"), config["machine"], config.get("vector_units"), config.get("gpu")]
    machine += [f"{name} {versions[name]}" for name in ("torch", "mujoco") if name in versions]
    machine = ", ".join(filter(None, machine))
    commits = " then ".join(dict.fromkeys([*config.get("earlier_commits", []), config["commit"]]))
    in_grid = file.parent.name == f"seed{settings['seed']}"  # benchmark/run.py's <variant>/seed<k>
    variant = file.parent.parent.name if in_grid else settings["variant"]
    return {
        "key": (config["script"], settings["env"], variant),
        "curve": dict(zip(values["step"].astype(int).tolist(), values["eval/success"])),
        "seed": settings["seed"],
        "finished": values["step"][-1] >= settings["total_steps"],
        "steps": int(values["step"][-1]),
        "success": values["eval/success"][-LAST:].mean(),
        "solved": solved_at(values["step"], values["eval/success"]),
        "any": values["eval/success_any"][-LAST:].mean(),
        "any_solved": solved_at(values["step"], values["eval/success_any"]),
        "return": values["eval/return"][-LAST:].mean(),
        "progress": values["worker/progress"][-LAST:].mean(),
        "hours": values["time"][-1] / 3600,
        "origin": f"commit {commits}, {machine}: `{first_command(config)}`",
    }


def spread(values: list, digits: int = 2) -> str:
    """Mean, and the range if there are several."""
    numbers = (np.mean(values), min(values), max(values))
    mean, low, high = (f"{round(x, digits) + 0.0:.{digits}f}" for x in numbers)  # + 0.0: no -0.00
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def together(runs: list[dict]) -> tuple[int, list]:
    """The last step that all runs have, and each one's mean of its last five evaluations up to there."""
    step = max(set.intersection(*(set(run["curve"]) for run in runs)), default=0)
    means = [np.mean([v for at, v in run["curve"].items() if at <= step][-LAST:]) for run in runs if step]
    return step, means


def seeds_row(key: tuple, runs: list[dict]) -> str | None:
    """A line of the second table; None where there is one seed, no step in common, or no such column."""
    step, means = together(runs)
    if len(means) < 2 or not np.isfinite(means).all():
        return None
    each = ", ".join(f"{mean:.2f}" for mean in means)
    seeds = ", ".join(str(run["seed"]) for run in runs)
    cells = (*key, seeds, f"{step:,}", f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}", each)
    return "| " + " | ".join(cells) + " |"


def table_row(key: tuple, runs: list[dict]) -> str:
    """A line of the table for the runs of one script, environment and variant."""
    solved, any_solved = (
        " / ".join(f"{run[rule]:,}" if run[rule] else "no" for run in runs)
        for rule in ("solved", "any_solved")
    )
    cells = (
        *key,
        ", ".join(str(run["seed"]) for run in runs) + ("" if runs[0]["finished"] else ", unfinished"),
        " / ".join(dict.fromkeys(f"{run['steps']:,}" for run in runs)),
        spread([run["success"] for run in runs]),
        solved,
        spread([run["any"] for run in runs]),
        any_solved,
        spread([run["return"] for run in runs]),
        spread([run["progress"] for run in runs]),
        spread([run["hours"] for run in runs], 1),
    )
    return "| " + " | ".join(cells) + " |"


def main(args: Args):
    runs = []
    for file in sorted(args.folder.rglob("progress.csv")):
        try:
            runs.append(read_run(file))
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"({type(error).__name__}: {error}); move it out of {args.folder}"
            raise SystemExit(f"results.py: error: not a run's: {file} {why}") from None
    if not runs:
        raise SystemExit(f"results.py: error: no progress.csv below {args.folder}")
    groups = {}
    for run in sorted(runs, key=lambda run: (run["key"], run["seed"])):
        groups.setdefault((run["key"], run["finished"] or run["seed"]), []).append(run)
    published = args.folder.resolve() == HERE / "results"
    header = HEADER.replace("FOLDER", "benchmark/results" if published else str(args.folder))
    lines = [table_row(key, group) for (key, _), group in groups.items()]
    rule = "|" + "---|" * len(COLUMNS)
    text = "\n".join([header, "| " + " | ".join(COLUMNS) + " |", rule, *lines])
    by_key = {}
    for run in sorted(runs, key=lambda run: (run["key"], run["seed"])):
        by_key.setdefault(run["key"], []).append(run)
    lines = [row for row in itertools.starmap(seeds_row, by_key.items()) if row]
    if lines:
        head = "| script | environment | variant | seeds | step | success | of each |"
        text = "\n".join([text, SEEDS, head, "|" + "---|" * 7, *lines])
    text += "\n" + ORIGIN
    for (key, _), group in groups.items():
        for run in group:
            text += f"\n- {'/'.join(key)}/seed{run['seed']}: {run['origin']}"
    if published:
        text += "\n" + STARTS.rstrip()
    out = args.out or args.folder.resolve().parent / "RESULTS.md"
    out.write_text(text + "\n")
    print(f"wrote {out}: {len(runs)} runs")


if __name__ == "__main__":
    main(tyro.cli(Args))
