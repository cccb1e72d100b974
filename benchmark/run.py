"""A grid of runs, environments x seeds, on this machine or as a Slurm job array.

    python benchmark/run.py --script hiro.py --env AntMaze-U AntMaze-W --seeds 5 --workers 2
    python benchmark/run.py --script hiro.py --env AntMaze-U --variant uncorrected -- --relabeling none
    python benchmark/run.py --script hiro.py --env AntMaze-U --slurm gpu --slurm-options mem=8G exclusive

Flags after -- go to the script. Run k has the folder <results>/<script>/<env>/<variant>/seed<k>; what it
prints is in log.txt there. The same command again skips finished runs and continues interrupted ones from
their last checkpoint. Ctrl-C and SIGTERM let the runs save before they end; so does Slurm when it preempts a
job or its time is over, and the job is queued again. Exit status 1 if a run did not reach its end.
"""

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # submitit's for preemption; they would kill a script


@dataclass
class Args:
    script: str  # hiro.py, or a path
    env: tuple[str, ...]  # ids of environments
    seeds: int = 5  # runs per environment, with the seeds 1, 2, ...
    workers: int = 2  # runs at a time
    variant: str = "default"  # a name for the flags after --
    results: Path = Path("runs/grid")  # the folder above all runs; benchmark/results holds the published ones
    threads: int = 1  # CPU threads per run
    save_every: int = 50_000  # environment steps between checkpoints
    slurm: str | None = None  # submit to this partition; "local": the same jobs without Slurm, all at once
    slurm_hours: float = 24.0  # time limit of a job; one that runs out of time saves and is queued again
    slurm_options: tuple[str, ...] = ()  # more options of sbatch, NAME=VALUE or NAME
    wait: bool = False  # with --slurm: stay until all jobs have ended, and report failures


def fail(message: str):
    """One clear line on stderr and a non-zero exit."""
    raise SystemExit(f"run.py: error: {message}")


@dataclass
class Run:
    """One run of the grid. As a Slurm job it is pickled and called, and preempted by checkpoint()."""

    name: str  # <script>/<env>/<variant>/seed<k>
    folder: Path
    script: str
    settings: list[str]  # flags that say what is run
    options: list[str]  # flags that say how
    process: subprocess.Popen | None = None

    def command(self) -> list[str]:
        """With --resume the script refuses settings other than those of the checkpoint."""
        checkpoint = self.folder / "checkpoint.pt"
        resume = ["--resume", str(checkpoint)] if checkpoint.exists() else []
        return [sys.executable, self.script, *resume, *self.options, *self.settings]

    def config(self) -> dict:
        """config.json of an earlier start; empty if there is none, or half of one."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "config.json").read_text())
        return {}

    def is_of_this_command(self) -> bool:
        """Did the earlier start have these settings? More steps are no other command."""

        def without_length(words: str) -> str:
            return re.sub(r" --total[-_]steps[ =]\S+", "", words)

        command = self.config().get("command", "")
        return without_length(command).endswith(without_length(shlex.join(self.settings)))

    def finished(self, as_it_was: bool = False) -> bool:
        """The last evaluation is at the last step: of --total-steps if given now, else of config.json."""
        config, path = self.config(), self.folder / "progress.csv"
        if not config or not path.exists():
            return False
        asked = None if as_it_was else re.search(r"--total[-_]steps[ =](\S+)", " ".join(self.settings))
        total_steps = int(float(asked[1])) if asked else config["args"]["total_steps"]
        with open(path, newline="") as file:
            return max((int(row["step"]) for row in csv.DictReader(file)), default=0) >= total_steps

    def start(self):
        """Start the script. The lock lives as long as the script: two never write to one folder.

        A run that ended before its first checkpoint starts anew: what it wrote goes to *_before.csv, .json.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.txt", "a") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in () if (self.folder / "checkpoint.pt").exists() else ("progress.csv", "config.json"):
                if (self.folder / name).exists():
                    os.replace(self.folder / name, self.folder / name.replace(".", "_before."))
            # as one piece: print() writes its line end by itself, and other threads print too
            print(f"{self.name}: {shlex.join(self.command())}\n", end="", flush=True)
            print(f"$ {shlex.join(self.command())}", file=log, flush=True)
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            # in its own process group, so that a Ctrl-C reaches it once and from here
            self.process = subprocess.Popen(self.command(), **streams, process_group=0)

    def problem(self) -> str:
        """Once it has ended: why it is not finished, "" if it is."""
        code = self.process.wait() if self.process else 0
        if code == 0 and self.finished():
            return ""
        lines = []
        with contextlib.suppress(OSError):
            lines = (self.folder / "log.txt").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"exit status {code}: {last}" if code else last

    # ---- as a Slurm job

    def __call__(self):
        """Run, or go on after a preemption."""
        if self.finished():
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, USER_SIGNALS)  # the script keeps this mask
        self.start()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, USER_SIGNALS)
            self.wait()
        except BaseException:
            self.save()
            raise
        if self.problem():
            raise RuntimeError(f"{self.name}: {self.problem()}")

    def checkpoint(self):
        """submitit calls this, in a signal handler, when the job is preempted or out of time."""
        import submitit

        self.save()
        return submitit.helpers.DelayedSubmission(dataclasses.replace(self, process=None))

    def save(self):
        """Have the script save and end."""
        if self.process is not None:
            self.process.terminate()
            self.wait()

    def wait(self):
        """Not Popen.wait: its lock would be held by __call__ while checkpoint() waits for it."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)


def plan(args: Args, extra: list[str]) -> list[Run]:
    """The grid, seed by seed, so that every environment has its first results early."""
    script = Path(args.script) if Path(args.script).exists() else ROOT / args.script
    if not script.is_file():
        fail(f"no script {args.script}")
    if not args.env or min(args.seeds, args.workers, args.threads, args.save_every) < 1:
        fail("--env needs at least one id; --seeds, --workers, --threads and --save-every at least 1")
    taken = {"--env", "--seed", "--variant", "--run-dir", "--resume", "--checkpoint", "--eval-only"}
    taken &= {word.split("=")[0].replace("_", "-") for word in extra}
    if taken:
        fail(f"not after --: {', '.join(sorted(taken))}")
    runs = []
    for seed in range(1, args.seeds + 1):
        for env in dict.fromkeys(args.env):
            name = f"{script.stem}/{env}/{args.variant}/seed{seed}"
            settings = ["--env", env, "--seed", str(seed), "--variant", args.variant, *extra]
            options = ["--threads", str(args.threads), "--save-every", str(args.save_every)]
            options += ["--run-dir", str(args.results / name)]
            runs.append(Run(name, args.results / name, str(script), settings, options))
    return runs


def run_here(runs: list[Run], workers: int) -> list[str]:
    """Each run in a process, `workers` at a time. Returns their problems."""
    stop = threading.Event()

    def work(run: Run) -> str:
        if stop.is_set():
            return "not started"
        try:
            run.start()
        except BlockingIOError:
            return "another process is at it"
        except OSError as error:
            return f"cannot start: {error}"
        if stop.is_set():  # the signal came while it was starting
            run.process.terminate()
        return run.problem()

    def handle(number, frame):
        if not stop.is_set():
            stop.set()
            print("stopping: the runs save and end; the same command continues them", flush=True)
            for run in runs:
                if run.process is not None:
                    run.process.terminate()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, runs))


def submit(runs: list[Run], args: Args) -> list[str]:
    """All runs as one job array. Returns their problems, if it waits for them."""
    try:
        import submitit
    except ImportError:
        fail("--slurm needs submitit: pip install -r benchmark/requirements.txt")
    options = [option.partition("=") for option in args.slurm_options]
    cluster = "local" if args.slurm == "local" else "slurm"
    try:
        folder = args.results / "slurm" / "%j"
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=1000)
        executor.update_parameters(
            name=Path(args.script).stem,
            timeout_min=max(1, int(60 * args.slurm_hours)),
            cpus_per_task=args.threads,
            slurm_partition=args.slurm,
            slurm_array_parallelism=args.workers,
            slurm_additional_parameters={name: value or True for name, _, value in options},
        )
        with executor.batch():
            jobs = [executor.submit(run) for run in runs]
    except (RuntimeError, ValueError, OSError) as error:
        fail(f"cannot submit: {str(error).splitlines()[0]}")
    for run, job in zip(runs, jobs):
        print(f"{run.name}: job {job.job_id}: {shlex.join(run.command())}", flush=True)
    if cluster == "slurm" and not args.wait:
        return [""] * len(runs)
    for job in jobs:
        job.wait()
    problems = [run.problem() for run in runs]
    return [problem and f"{problem} (see also {job.paths.stderr})" for problem, job in zip(problems, jobs)]


def main(args: Args, extra: list[str]):
    todo = []
    for run in plan(args, extra):
        if not run.finished():
            if run.finished(as_it_was=True) and not (run.folder / "checkpoint.pt").exists():
                fail(f"{run.name} ended without a checkpoint.pt to go on from; choose another --variant")
            if (run.folder / "checkpoint.pt").exists() and not run.is_of_this_command():
                # the script takes flags that are left out now from the checkpoint
                started = run.config().get("command", "unknown")
                fail(f"{run.name} was started by another command: {started}; choose another --variant")
            todo.append(run)
            continue
        command = run.config().get("command", "unknown")
        how = "" if command.endswith(shlex.join(run.settings)) else f" BY ANOTHER COMMAND: {command}"
        print(f"{run.name}: skipped, finished{how}", flush=True)
    if not todo:
        return
    problems = submit(todo, args) if args.slurm else run_here(todo, args.workers)
    failed = [f"  {run.name}: {problem}" for run, problem in zip(todo, problems) if problem]
    if failed:
        fail("\n".join([f"{len(failed)} of {len(todo)} runs did not finish", *failed]))


if __name__ == "__main__":
    words = [*sys.argv[1:], "--"]
    main(tyro.cli(Args, args=words[: words.index("--")]), words[words.index("--") + 1 : -1])
