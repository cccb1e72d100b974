"""Redraw the figures of README and docs and the table of results from the files in the tree.

    python benchmark/figures.py          # curves and table, some seconds
    python benchmark/figures.py --all    # and films, paths and pictures of the environments, some minutes

Curves are drawn by plot.py, which needs benchmark/requirements.txt, the table by results.py; with --all also
films.py and env_pictures.py, which need a GL library and imageio[ffmpeg].
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
COOPERATION = [f"cher/AntGather/{variant}" for variant in ("fixed", "dynamic", "hrl")]
# the longer seed: curves over several seeds end with the shortest
LONG_CHER = ["cher/AntMaze-ULarge/fixed/seed2", "cher/AntMaze-ULarge/hrl/seed2"]
APART = ("curves_ularge.png", "curves_bottleneck.png")  # a line per seed: they differ much, or in length
# picture: runs below benchmark/results, metric
CURVES = {
    "curves_point.png": (
        ["hiro/PointMaze-U/default", "cher/PointMaze-U", "aclg_gcmr/PointMaze-U/default"],
        "eval/success",
    ),
    "curves_gather.png": (["cher/AntGather"], "eval/return"),
    "curves_gather_value.png": (COOPERATION, "manager/coop_value"),
    "curves_gather_worker.png": (COOPERATION, "worker/period_return"),
    "curves_transfer.png": (["cher/AntMaze-ULarge/transfer"], "eval/success"),
    "curves_ularge.png": (
        [f"hiro/AntMaze-ULarge/{run}" for run in ("far_g95", "quick/seed2", "quick/seed3", "trained_worker")]
        + LONG_CHER,
        "eval/success",
    ),
    "curves_ularge_on.png": (
        [
            f"hiro/AntMaze-ULarge/{run}"
            for run in ("quick/seed2", "quick_on", "quick_on_slow", "quick_on_g98", "quick_then_g98")
        ],
        "eval/success_goal2",
    ),
    "curves_ularge_cher.png": (LONG_CHER, "eval/success"),
    "curves_ularge_cher_quick.png": (
        [f"cher/AntMaze-ULarge/{run}" for run in ("quick/seed1", "quick/seed2", "quick_hrl")],
        "eval/success",
    ),
    "curves_coop.png": (["cher/PointMaze-U/dynamic"], "manager/coop_ratio"),
    "curves_ant.png": (
        [
            "hiro/AntMaze-U/default",
            "hiro/AntMaze-U/diverse",
            "hiro/AntMaze-U/quick",
            "aclg_gcmr/AntMaze-U/default",
            "aclg_gcmr/AntMaze-U/fast",
            "aclg_gcmr/AntMaze-U/walker",
            "aclg_gcmr/AntMaze-U/early",
            "aclg_gcmr/AntMaze-U/early_dense",
            "aclg_gcmr/AntMaze-U/lw5",
        ],
        "eval/success",
    ),
    "curves_ant_gcmr.png": (
        ["aclg_gcmr/AntMaze-U/early_dense", "aclg_gcmr/AntMaze-U/early_dense_aclg"],
        "eval/success",
    ),
    # by GCMR's rule, as W's training episodes end at the goal
    "curves_w.png": (["aclg_gcmr/AntMaze-W/early"], "eval/success_any"),
    "curves_bottleneck.png": (
        # seed 3 is short
        [
            f"aclg_gcmr/AntMaze-Bottleneck/{run}"
            for run in (
                "quick/seed1",
                "quick/seed2",
                "quick_walker/seed2",
                "quick_walker/seed3",
                "quick_walker_again/seed2",
                "quick_walker_again/seed3",
                "quick_walker_g98",
            )
        ],
        "eval/success",
    ),
    "curves_ant_worker.png": (["hiro/AntMaze-U", "aclg_gcmr/AntMaze-U"], "worker/progress"),
}


@dataclass
class Args:
    results: Path = HERE / "results"  # the runs
    docs: Path = HERE.parent / "docs"  # pictures go to its folder pictures
    table: Path = HERE / "RESULTS.md"  # the table
    all: bool = False  # everything that README and docs show


def main(args: Args):
    commands = [["results.py", "--folder", args.results, "--out", args.table]]
    for name, (folders, metric) in CURVES.items():
        paths = [path for path in (args.results / folder for folder in folders) if path.exists()]
        if not paths:
            raise SystemExit(f"figures.py: error: {name} needs runs in {args.results}: {', '.join(folders)}")
        by = ["--by", "variant", "seed"] if name in APART else []
        commands.append(["plot.py", *paths, "--metric", metric, *by, "--out", args.docs / "pictures" / name])
    if args.all:
        commands += [[name, "--out", args.docs / "pictures"] for name in ("env_pictures.py", "films.py")]
    for script, *flags in commands:
        subprocess.run([sys.executable, HERE / script, *flags], check=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
