"""benchmark/results.py and figures.py: the table and the figures from the files of runs."""

import csv
import dataclasses
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS

import common_envs

sys.path.insert(0, str(ROOT / "benchmark"))
import films  # noqa: E402
import results  # noqa: E402

AGENTS = sorted((ROOT / "benchmark" / "agents").glob("*.pt"))
EACH_AGENT = pytest.mark.parametrize("agent", AGENTS, ids=[path.stem for path in AGENTS])


@pytest.fixture
def publish(tmp_path):
    """publish(script, env, variant, seed, successes, total): a run with an evaluation every 10 steps."""

    def publish(script, env, variant, seed, successes, total):
        folder = tmp_path / "results" / script / env / variant / f"seed{seed}"
        folder.mkdir(parents=True)
        config = {"script": script, "commit": "abc", "machine": "two cores", "command": "python hiro.py"}
        config |= {"gpu": "H100", "vector_units": "AVX2", "versions": {"torch": "2.9", "tyro": "1"}}
        config["args"] = {"env": env, "seed": seed, "total_steps": total, "variant": variant}
        (folder / "config.json").write_text(json.dumps(config))
        with open(folder / "progress.csv", "w", newline="") as file:
            names = ["step", "time", "eval/success", "eval/success_any", "eval/return", "worker/progress"]
            table = csv.DictWriter(file, names)
            table.writeheader()
            for index, success in enumerate(successes, 1):
                table.writerow(dict(zip(names, (10 * index, 360 * index, success, 1, -index, 0.5))))

    return publish


def table_of(tmp_path):
    results.main(results.Args(tmp_path / "results", tmp_path / "RESULTS.md"))
    rows = (tmp_path / "RESULTS.md").read_text().split("## Seeds together")[0].splitlines()
    return [row.strip("| ").split(" | ") for row in rows if row.startswith("| hiro")]


def test_mean_of_the_last_five_and_of_the_seeds(publish, tmp_path):
    publish("hiro", "A", "x", 1, [0, 0, 1, 1, 1, 1, 0.5], 70)
    publish("hiro", "A", "x", 2, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 70)
    (row,) = table_of(tmp_path)
    assert row[:5] == ["hiro", "A", "x", "1, 2", "70"]
    assert row[5] == "0.70 (0.50 to 0.90)"  # 4.5 / 5 and 2.5 / 5
    assert row[6] == "70 / no"
    assert row[9:] == ["-5.00 (-5.00 to -5.00)", "0.50 (0.50 to 0.50)", "0.7 (0.7 to 0.7)"]


def test_success_at_any_step_has_its_own_columns(publish, tmp_path):
    publish("hiro", "A", "x", 1, [0] * 7, 70)  # the fixture's success_any is 1 throughout
    (row,) = table_of(tmp_path)
    assert row[5:9] == ["0.00", "no", "1.00", "50"]


def test_the_command_that_started_a_run():
    """Not that of its last start, and without the paths of its machine."""
    command = "python hiro.py --run-dir '/tmp/a b' --seed 2 --eval-goals 0 8"
    config = {"command": "python hiro.py --resume x.pt", "earlier_commands": [command, "python hiro.py"]}
    assert results.first_command(config) == "python hiro.py --seed 2 --eval-goals 0 8"
    assert results.first_command({"command": config["command"]}) == "python hiro.py --resume PATH"
    command = "python /home/me/cher.py --run_dir=/x --worker-checkpoint /y/model.pt --freeze-worker"
    shown = "python cher.py --worker-checkpoint PATH --freeze-worker"
    assert results.first_command({"command": command}) == shown
    command = "python hiro.py --start-from=/y/ant.pt --start-from benchmark/b.pt --seed 1"
    shown = "python hiro.py --start-from ant.pt --start-from benchmark/b.pt --seed 1"
    assert results.first_command({"command": command}) == shown


def test_the_machine_is_told(publish, tmp_path):
    publish("hiro", "A", "x", 1, [1] * 5, 50)
    table_of(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "- hiro/A/x/seed1: commit abc, two cores, AVX2, H100, torch 2.9: `python hiro.py`\n" in text


def test_unfinished_runs_stand_alone(publish, tmp_path):
    publish("hiro", "A", "x", 1, [1] * 5, 50)
    publish("hiro", "A", "x", 2, [0] * 3, 50)
    publish("hiro", "A", "x", 3, [0] * 2, 50)
    rows = table_of(tmp_path)
    assert [row[3] for row in rows] == ["1", "2, unfinished", "3, unfinished"]
    assert [row[5] for row in rows] == ["1.00", "0.00", "0.00"]
    assert [row[6] for row in rows] == ["50", "no", "no"]
    assert [row[8] for row in rows] == ["50", "no", "no"]


def test_folders_that_the_scripts_name(publish, tmp_path):
    """runs/<env>__<script>__<variant>__...: the variant is in the settings, the table beside the folder."""
    for variant, success in (("near", 1), ("far", 0)):
        publish("hiro", "A", variant, 1, [success] * 5, 50)
        (tmp_path / "results" / "hiro" / "A" / variant / "seed1").rename(tmp_path / "results" / variant)
    results.main(results.Args(tmp_path / "results"))
    rows = [row.split(" | ") for row in (tmp_path / "RESULTS.md").read_text().splitlines() if "hiro |" in row]
    assert [(row[2], row[5]) for row in rows] == [("far", "0.00"), ("near", "1.00")]


def test_no_runs(tmp_path):
    with pytest.raises(SystemExit, match="no progress.csv"):
        results.main(results.Args(tmp_path, tmp_path / "RESULTS.md"))


def test_a_file_that_is_no_run_s(publish, tmp_path):
    publish("hiro", "A", "default", 1, [1.0], 10)
    (tmp_path / "results" / "progress.csv").write_text("a,b")
    with pytest.raises(SystemExit, match="not a run's: .*progress.csv .*FileNotFoundError"):
        results.main(results.Args(tmp_path / "results"))


def test_the_published_table_is_that_of_the_files(tmp_path):
    results.main(results.Args(out=tmp_path / "RESULTS.md"))
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "benchmark" / "RESULTS.md").read_text()


def test_one_command_redraws_all_figures(tmp_path):
    pytest.importorskip("scipy", reason="benchmark/requirements.txt")
    command = [
        sys.executable,
        ROOT / "benchmark" / "figures.py",
        "--docs",
        tmp_path,
        "--table",
        tmp_path / "T.md",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    published = {path.name for path in (ROOT / "docs" / "pictures").glob("curves_*.png")}
    assert drawn == published and (tmp_path / "T.md").exists()


@EACH_AGENT
def test_films_know_the_script_of_an_agent(agent):
    script, env = films.origin(agent)
    assert script.exists() and env in common_envs.SPECS


@EACH_AGENT
def test_published_agents_evaluate(agent, run, tmp_path):
    """They come without optimisers. Another CPU may round differently, so 2 of 5 episodes have to do."""
    flags = ("--eval-only", "--checkpoint", agent, "--eval-episodes", 5, "--run-dir", tmp_path)
    state = torch.load(agent, weights_only=True)
    done = run(state["script"], *flags)
    assert (tmp_path / "pictures" / "eval.png").exists()
    told = dict(line.split() for line in done.out.splitlines() if line.startswith("eval/"))
    if state["args"]["env"] == "AntGather":
        assert float(told["eval/return"]) > 0  # 3.7 at its best, 0 at rest
    else:
        assert float(told["eval/success_any"]) >= 0.4  # 0.86 and more of 50 episodes; at rest 0.04 or less
    assert not any(name.endswith("optimizer") for name in [*state["manager"], *state["worker"]])


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_runs_have_todays_settings(script):
    """The bare command, or for cher.py's "fixed" the same, still means what was published under that name."""
    module, run_settings, found = importlib.import_module(script), {"reward", "seed"}, 0
    for file in (ROOT / "benchmark" / "results" / script).rglob("config.json"):
        published = json.loads(file.read_text())["args"]
        if file.parent.parent.name in ("default", "fixed"):
            found += 1
            today = dataclasses.asdict(module.parse_args(["--env", published["env"]]))
            published = dataclasses.asdict(module.Args()) | published  # settings that came later
            for name in today.keys() - run_settings - set(module.RESUME_MAY_CHANGE):
                assert json.dumps(published[name]) == json.dumps(today[name]), (file, name)
    assert found >= 3 or not (ROOT / "benchmark" / "results" / script).exists()  # a fork has none


NOT_LEARNING = {"preset", "seed", "resume", "threads", "run_dir", "variant", "total_steps"}
NOT_LEARNING |= {"eval_every", "eval_episodes", "eval_goals", "save_every"}


@pytest.mark.parametrize(
    "run",
    [
        "hiro/AntMaze-U/quick/seed2",
        "hiro/AntMaze-U/quick/seed3",
        "hiro/AntMaze-ULarge/far_g95/seed1",
        "hiro/AntMaze-ULarge/quick/seed2",
        "hiro/AntMaze-ULarge/quick/seed3",
        "cher/AntMaze-ULarge/quick/seed1",
        "cher/AntMaze-ULarge/quick/seed2",
        "aclg_gcmr/AntMaze-Bottleneck/quick/seed1",
        "aclg_gcmr/AntMaze-Bottleneck/quick/seed2",
        "aclg_gcmr/AntMaze-Bottleneck/quick/seed3",
    ],
)
def test_quick_presets_are_the_settings_of_their_runs(run):
    """But for what learning does not see."""
    config = json.loads((ROOT / "benchmark" / "results" / run / "config.json").read_text())
    module = importlib.import_module(config["script"])
    preset = vars(module.parse_args(["--env", config["args"]["env"], "--preset", "quick"]))
    preset = json.loads(json.dumps(preset))  # tuples as lists, as in the file
    assert {name for name, value in config["args"].items() if preset[name] != value} <= NOT_LEARNING


def test_every_agent_that_a_run_began_with_is_told():
    """In the tree, or how it was made."""
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    files = re.findall(r"--start-from (\S+\.pt)", text)
    assert len(files) > 10
    assert all((ROOT / file).exists() or f"\n- {file}: " in text for file in files)


def test_seeds_together_at_their_last_common_step(publish, tmp_path):
    """Seed 1 was stopped at 60, seed 2 went on: (0 + 0.2 + 0.4 + 0.6 + 0.8) / 5 = 0.4 and 1.5 / 5 = 0.3."""
    publish("hiro", "A", "x", 1, [1, 0, 0.2, 0.4, 0.6, 0.8], 100)
    publish("hiro", "A", "x", 2, [0, 0, 0, 0, 0.5, 1, 1, 1, 1, 1], 100)
    publish("hiro", "A", "one_seed", 1, [1, 1], 100)
    table_of(tmp_path)
    lines = (tmp_path / "RESULTS.md").read_text().split("## Seeds together")[1].splitlines()
    (row,) = [line for line in lines if line.startswith("| hiro")]
    assert row == "| hiro | A | x | 1, 2 | 60 | 0.35 ± 0.07 | 0.40, 0.30 |"  # 0.1 / sqrt(2)


# How a row of README's table, or of the part of docs/results.md, begins -> its runs, below benchmark/results.
TOLD = {
    "README.md": {
        "`PointMaze-U`, hiro.py": "hiro/PointMaze-U/default/seed1 seed2 seed3",
        "`PointMaze-U`, cher.py, fixed lambda": "cher/PointMaze-U/fixed/seed1 seed2 seed3",
        "`PointMaze-U`, aclg_gcmr.py": "aclg_gcmr/PointMaze-U/default/seed1 seed2 seed3",
        "`AntMaze-U`, hiro.py, `--preset quick`": "hiro/AntMaze-U/quick/seed1 seed2 seed3",
        "`AntMaze-U`, hiro.py, default settings": "hiro/AntMaze-U/default/seed1",
        "`AntMaze-U`, aclg_gcmr.py, `--preset quick` †": "aclg_gcmr/AntMaze-U/early/seed1",
        "`AntMaze-U`, aclg_gcmr.py, `--preset quick --reward dense`": "aclg_gcmr/AntMaze-U/early_dense/seed2"
        " aclg_gcmr/AntMaze-U/early_dense_aclg/seed2",
        "`AntMaze-U`, aclg_gcmr.py, default settings": "aclg_gcmr/AntMaze-U/default/seed1",
        "`AntMaze-W`, aclg_gcmr.py": "aclg_gcmr/AntMaze-W/early/seed1",
        "`AntMaze-Bottleneck`, aclg_gcmr.py, `--pre": "aclg_gcmr/AntMaze-Bottleneck/quick/seed1 seed2 seed3",
        "`AntMaze-Bottleneck`, aclg_gcmr.py, begun": "aclg_gcmr/AntMaze-Bottleneck/quick_walker/seed2 seed3"
        " aclg_gcmr/AntMaze-Bottleneck/quick_walker_again/seed2 seed3",
        "`AntMaze-ULarge`, hiro.py, `--preset quick`": "hiro/AntMaze-ULarge/far_g95/seed1"
        " hiro/AntMaze-ULarge/quick/seed2 seed3",
        "`AntMaze-ULarge`, hiro.py, the worker": "hiro/AntMaze-ULarge/trained_worker/seed1 seed2 seed3",
        "`AntMaze-ULarge`, cher.py, `--preset quick`": "cher/AntMaze-ULarge/quick/seed1 seed2"
        " cher/AntMaze-ULarge/quick_hrl/seed1",
        "`AntMaze-ULarge`, cher.py, the paper's settings": "cher/AntMaze-ULarge/fixed/seed1 seed2"
        " cher/AntMaze-ULarge/hrl/seed1 seed2",
    },
    "docs/results.md": {
        "PointMaze-U: hiro.py": "hiro/PointMaze-U/default/seed1 seed2 seed3",
        "PointMaze-U: cher.py, fixed": "cher/PointMaze-U/fixed/seed1 seed2 seed3",
        "PointMaze-U: cher.py, learned": "cher/PointMaze-U/dynamic/seed1 seed2 seed3",
        "PointMaze-U: cher.py, HRL": "cher/PointMaze-U/hrl/seed1",
        "PointMaze-U: aclg_gcmr.py": "aclg_gcmr/PointMaze-U/default/seed1 seed2 seed3",
        "AntMaze-U: aclg_gcmr.py, variant `fast`": "aclg_gcmr/AntMaze-U/fast/seed1",
        "AntMaze-U: aclg_gcmr.py, variant `walker`": "aclg_gcmr/AntMaze-U/walker/seed1",
        "AntMaze-U: aclg_gcmr.py, `--preset quick` (": "aclg_gcmr/AntMaze-U/early/seed1",
        "AntMaze-U: aclg_gcmr.py, `--preset quick --reward dense`": "aclg_gcmr/AntMaze-U/early_dense/seed2",
        "AntMaze-U: aclg_gcmr.py, the same without": "aclg_gcmr/AntMaze-U/early_dense_aclg/seed2",
        "AntMaze-U: aclg_gcmr.py, default settings but": "aclg_gcmr/AntMaze-U/default/seed1",
        "AntMaze-U: aclg_gcmr.py, default settings, v": "aclg_gcmr/AntMaze-U/sparse/seed1",
        "AntMaze-U: hiro.py (8)": "hiro/AntMaze-U/default/seed1",
        "AntMaze-U: hiro.py, `--preset quick`": "hiro/AntMaze-U/quick/seed1 seed2 seed3",
        "AntMaze-ULarge: hiro.py, `--preset quick` (": "hiro/AntMaze-ULarge/far_g95/seed1"
        " hiro/AntMaze-ULarge/quick/seed2 seed3",
        "AntMaze-ULarge: hiro.py, seed 2": "hiro/AntMaze-ULarge/quick_on/seed2",
        "AntMaze-ULarge: hiro.py, going on": "hiro/AntMaze-ULarge/quick_on_g98/seed2",
        "AntMaze-ULarge: hiro.py, with worker": "hiro/AntMaze-ULarge/quick_then_g98/seed2",
        "AntMaze-ULarge: hiro.py, `--preset quick --worker-gamma": "hiro/AntMaze-ULarge/quick_g98/seed1",
        "AntMaze-ULarge: hiro.py, the worker": "hiro/AntMaze-ULarge/trained_worker/seed1 seed2 seed3",
        "AntMaze-ULarge: cher.py, `--preset quick` (": "cher/AntMaze-ULarge/quick/seed1 seed2",
        "AntMaze-ULarge: cher.py, `--preset quick --coop": "cher/AntMaze-ULarge/quick_hrl/seed1",
        "AntMaze-ULarge: hiro.py, `--preset quick --relabel": "hiro/AntMaze-ULarge/quick_no_relabeling/seed2",
        "AntMaze-ULarge: cher.py, fixed": "cher/AntMaze-ULarge/fixed/seed1 seed2",
        "AntMaze-ULarge: cher.py, HRL": "cher/AntMaze-ULarge/hrl/seed1 seed2",
        "AntMaze-W: aclg_gcmr.py": "aclg_gcmr/AntMaze-W/early/seed1",
        "AntMaze-Bottleneck: aclg_gcmr.py, `--preset quick` (": "aclg_gcmr/AntMaze-Bottleneck/quick/seed1"
        " seed2 seed3",
        "AntMaze-Bottleneck: aclg_gcmr.py, begun": "aclg_gcmr/AntMaze-Bottleneck/quick_walker/seed2 seed3",
        "AntMaze-Bottleneck: aclg_gcmr.py, going on": "aclg_gcmr/AntMaze-Bottleneck/quick_walker_again/seed2"
        " seed3",
        "AntMaze-Bottleneck: aclg_gcmr.py, seed 2": "aclg_gcmr/AntMaze-Bottleneck/quick_walker_g98/seed2",
        "AntMaze-Bottleneck: aclg_gcmr.py, `--preset quick --no-mask": "aclg_gcmr/AntMaze-Bottleneck/"
        "quick_sees_xy/seed2",
    },
}


def minutes_of(run: list[dict]) -> float:
    """Without pauses: an interval of more than ten times the median counts as the median."""
    seconds = np.diff([float(line["time"]) for line in run], prepend=0)
    usual = np.median(seconds)
    return np.where(seconds > 10 * usual, usual, seconds).sum() / 60


def told_row(page: str, row: str) -> dict:
    """The cells of a row, by the names in the table's header."""
    part, header, found = "", [], []
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if "success" in cells and "minutes" in cells:
            header = cells
        if line.startswith("| **"):
            part = re.search(r"\*\*(.*?)\*\*", line)[1] + ": "
        elif line.startswith("|") and (part + cells[0]).startswith(row):
            found.append(dict(zip(header, cells, strict=True)))
    (only,) = found
    return only


@pytest.mark.parametrize("page, row", [(page, row) for page in TOLD for row in TOLD[page]])
def test_rows_of_the_tables_are_those_of_the_files(page, row):
    """Steps, minutes, and success as the mean of the last five evaluations, of each seed or of the seeds."""
    cells = told_row(page, row)
    runs, folder = [], None
    for word in TOLD[page][row].split():
        *parents, seed = word.split("/")
        folder = "/".join(parents) or folder
        with open(ROOT / "benchmark" / "results" / folder / seed / "progress.csv", newline="") as file:
            runs.append(list(csv.DictReader(file)))
    minutes = [minutes_of(run) for run in runs]
    units = {"k": 1000, "M": 1_000_000}
    steps = {round(float(x) * units[unit]) for x, unit in re.findall(r"([\d.]+)([kM])\b", cells["steps"])}
    ends = {int(run[-1]["step"]) for run in runs}
    assert ends <= steps or (" to " in cells["steps"] and {min(ends), max(ends)} <= steps)

    # "36 (at 120k), 80 in all", "22 to 44", "88, 93; 39, 43"
    told = [int(x) for x in re.findall(r"\d+", re.sub(r"\d+ \(.*?\),", "", cells["minutes"]))]
    expected = [min(minutes), max(minutes)] if " to " in cells["minutes"] else minutes
    np.testing.assert_allclose(told, expected, atol=0.51)

    def means(column, runs=runs):
        return [np.mean([float(line[column]) for line in run[-5:]]) for run in runs]

    expected = means("eval/success")
    if "AntMaze-W" in row:  # README tells the one first, docs/results.md the other
        expected = [*means("eval/success_any"), *expected][:: 1 if page == "README.md" else -1]
    if "(0, 16)" in cells["success"]:  # README tells it of the paper's settings for seed 2 alone
        expected += means("eval/success_goal2", runs[1::2] if "the paper's" in row else runs)
    # in the order of the runs: "0.52, 0, 0; first at 1.0" begins with three successes
    numbers = [float(x) for x in re.findall(r"(?<![\d.(])[01](?:\.\d+)?(?![\d.k])", cells["success"])]
    if len(numbers) == 1:  # the mean of the seeds
        expected = [np.mean(expected)]
    assert len(expected) <= len(numbers)
    np.testing.assert_allclose(numbers[: len(expected)], expected, atol=0.0051)


@pytest.mark.parametrize("row", TOLD["docs/results.md"])
def test_first_evaluations_at_nine_tenths_are_those_of_the_files(row):
    """The column "first at 0.9" of docs/results.md, in thousands of steps."""
    cells, folder, expected, at_once = told_row("docs/results.md", row), None, [], []
    for word in TOLD["docs/results.md"][row].split():
        *parents, seed = word.split("/")
        folder = "/".join(parents) or folder
        column = "eval/success_any" if "AntMaze-W" in row else "eval/success"
        with open(ROOT / "benchmark" / "results" / folder / seed / "progress.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        good = [int(line["step"]) for line in lines if float(line[column]) >= 0.9 - 1e-9]
        expected.append(good[0] if good else None)
        at_once.append(good[:1] == [int(lines[0]["step"])])
    told = re.sub(r"\(.*", "", cells["first at 0.9"])
    if "at once" in told:  # in the first evaluation, before it learns
        assert all(at_once)
        return
    words = re.findall(r"\bno\b|[\d.]+[kM]", told)
    units = {"k": 1000, "M": 1_000_000}
    assert [None if word == "no" else round(float(word[:-1]) * units[word[-1]]) for word in words] == expected
