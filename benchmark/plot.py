"""Learning curves of any set of runs: one panel per environment, one line per script and variant.

    python benchmark/plot.py benchmark/results --out curves.png
    python benchmark/plot.py benchmark/results runs --metric eval/return --statistic iqm
    python benchmark/plot.py runs --by reward subgoal_space

A run is a progress.csv with a config.json beside it, anywhere below the given folders. The line is the mean,
or the interquartile mean, over the seeds; the band is the 95 % percentile interval of scipy.stats.bootstrap,
which one seed does not have. Nothing is interpolated or smoothed: a line has the steps that all of its seeds
have. Needs benchmark/requirements.txt.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

try:
    from scipy import stats
except ImportError:
    raise SystemExit("plot.py: error: needs scipy: pip install -r benchmark/requirements.txt") from None


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]]  # folders with runs somewhere below, or progress.csv files
    metric: str = "eval/success"  # a column of progress.csv
    out: Path = Path("curves.png")  # the picture
    statistic: Literal["mean", "iqm"] = "mean"  # iqm: of the middle half; below 4 seeds that is the mean
    by: tuple[str, ...] = ("variant",)  # settings (args in config.json) that, beside the script, make a line


STATISTICS = {"mean": np.mean, "iqm": lambda values, axis: stats.trim_mean(values, 0.25, axis=axis)}


def fail(message: str):
    """One clear line on stderr and a non-zero exit."""
    raise SystemExit(f"plot.py: error: {message}")


def aggregate(values, statistic: str, resamples: int = 2000):
    """values [seeds, steps] -> statistic over seeds [steps], its interval [2, steps] (None for one seed)."""
    values, function = np.asarray(values, float), STATISTICS[statistic]
    center = function(values, axis=0)
    if len(values) < 2:
        return center, None
    options = dict(axis=0, vectorized=True, method="percentile", confidence_level=0.95, batch=100)
    options |= dict(n_resamples=resamples, rng=np.random.default_rng(0))  # the same picture each time
    return center, np.array(stats.bootstrap((values,), function, **options).confidence_interval)


def common_steps(curves: list[dict]):
    """Curves {step: value} -> the steps that all of them have [steps], their values [seeds, steps]."""
    steps = sorted(set(curves[0]).intersection(*curves[1:]))
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def read_curve(path: Path, metric: str) -> tuple[dict, list]:
    """{step: value} of one progress.csv, without empty cells and NaN; the names of its columns."""
    with open(path, newline="") as file:
        table = csv.DictReader(file)
        curve = {int(row["step"]): float(row.get(metric) or "nan") for row in table}
        return {step: value for step, value in curve.items() if np.isfinite(value)}, table.fieldnames or []


def read_run(file: Path, args: Args) -> tuple:
    """Of one progress.csv: environment, line's label, (variant, seed), curve, columns."""
    config = json.loads((file.parent / "config.json").read_text())
    settings = config["args"]
    if file.parent.name == f"seed{settings['seed']}":  # benchmark/run.py's <variant>/seed<k>
        settings["variant"] = file.parent.parent.name
    unknown = [name for name in args.by if name not in settings]
    if unknown:
        fail(f"--by {' '.join(unknown)}: no setting of {file.parent}; it has {', '.join(settings)}")
    label = "/".join([config["script"], *(str(settings[name]) for name in args.by)])
    return settings["env"], label, (settings["variant"], settings["seed"]), *read_curve(file, args.metric)


def read_runs(args: Args) -> dict:
    """{environment: {label: {(variant, seed): (last step, file, curve)}}}"""
    missing = [str(path) for path in args.paths if not path.exists()]
    if missing:
        fail(f"no such folder: {', '.join(missing)}")
    found = [[path] if path.is_file() else path.rglob("progress.csv") for path in args.paths]
    files = sorted({file.resolve() for group in found for file in group})
    if not files:
        fail(f"no progress.csv below {', '.join(map(str, args.paths)) or 'nothing'}")
    runs, notes, columns = {}, [], {}
    for file in files:
        try:
            env, label, key, curve, names = read_run(file, args)
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"left out, not a run's: {file} ({type(error).__name__}: {error})")
            continue
        columns |= dict.fromkeys(names)
        if not curve:
            notes.append(f"left out, no {args.metric}: {file}")
            continue
        line = runs.setdefault(env, {}).setdefault(label, {})
        same_seed = sorted([(max(curve), file, curve), *([line[key]] if key in line else [])])
        line[key] = same_seed[-1]
        if len(same_seed) > 1:
            notes.append(
                f"left out, another run of {label}, seed {key[1]}, is longer or newer: {same_seed[0][1]}"
            )
    if not runs:
        fail(f"no run has {args.metric}; columns: {', '.join(columns)}" if columns else notes[0])
    print("".join(f"note: {note}\n" for note in notes), end="")
    return runs


def draw(runs: dict, args: Args):
    """The figure; each line's last point as text."""
    labels = sorted({label for lines in runs.values() for label in lines})
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    size = (4.6 * columns, (3.4 + 0.2 * max(len(lines) for lines in runs.values())) * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(runs) :]:
        axis.remove()
    for axis, (env, lines) in zip(axes.flat, sorted(runs.items())):
        for label, line in sorted(lines.items()):
            curves = [curve for _, _, curve in line.values()]
            steps, values = common_steps(curves)
            if not len(steps):
                fail(f"{env}, {label}: its {len(line)} runs have no step of evaluation in common")
            longest = max(curves, key=len)
            if len(steps) < len(longest):
                print(f"note: {env}, {label}: {len(steps)} of {len(longest)} steps are common to all seeds")
            center, interval = aggregate(values, args.statistic)
            color = f"C{labels.index(label) % 10}"
            style = ("-", "--", ":", "-.")[labels.index(label) // 10 % 4]
            marker = "." if len(steps) == 1 else None
            name = f"{label} (n={len(line)})"
            axis.plot(steps / 1000, center, color=color, ls=style, marker=marker, label=name)
            if interval is not None:
                axis.fill_between(steps / 1000, *interval, color=color, alpha=0.2, linewidth=0)
            band = "" if interval is None else f" [{interval[0, -1]:.3g}, {interval[1, -1]:.3g}]"
            print(f"{env}, {name}: {args.metric} at step {steps[-1]}: {center[-1]:.3g}{band}")
        axis.set(title=env, xlabel="thousand steps", ylabel=args.metric)
        if "success" in args.metric:
            axis.set_ylim(-0.03, 1.03)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))  # below the panel
    figure.suptitle(f"{args.statistic} over seeds, 95 % bootstrap interval", fontsize="small")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    except OSError as error:
        fail(f"cannot write {args.out}: {error}")
    plt.close(figure)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    parsed = tyro.cli(Args)
    draw(read_runs(parsed), parsed)
