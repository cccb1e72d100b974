"""Redraw the films and paths of README from the agents in benchmark/agents: a minute each on a CPU.

python benchmark/films.py                                    # needs GL and pip install "imageio[ffmpeg]"
python benchmark/films.py --publish runs/.../model.pt hiro   # a run's model.pt -> benchmark/agents/hiro.pt
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image

HERE = Path(__file__).resolve().parent
# what is shown of 480 x 480 pixels: these mazes without their outer walls; others are shown whole
INSIDE = dict.fromkeys(("AntMaze-U", "AntMaze-Bottleneck", "PointMaze-U"), (82, 86, 398, 402))
INSIDE |= {"AntMaze-ULarge": (96, 104, 384, 392)}


@dataclass
class Args:
    agents: Path = HERE / "agents"  # <name>.pt
    out: Path = HERE.parent / "docs" / "pictures"  # gets film_<name>.gif and paths_<name>.png
    eval_episodes: int = 10  # paths; the first episode of the last goal is filmed
    publish: tuple[Path, str] | None = None  # model.pt and a name: only add it to the agents


def publish(model: Path, agents: Path, name: str):
    """Everything but the optimisers, which are half of the file and of no use for --eval-only."""
    state = torch.load(model, map_location="cpu", weights_only=True)
    for level in ("manager", "worker"):
        state[level] = {name: part for name, part in state[level].items() if not name.endswith("optimizer")}
    agents.mkdir(parents=True, exist_ok=True)
    torch.save(state, agents / f"{name}.pt")


def origin(agent: Path) -> tuple[Path, str]:
    """The script that trained it, as an agent may have another name, and the environment."""
    state = torch.load(agent, map_location="cpu", weights_only=True)
    return HERE.parent / f"{state['script']}.py", state["args"]["env"]


def film(agent: Path, args: Args):
    """One evaluation of the agent: its film as a small gif, its paths as they are."""
    import imageio.v3 as imageio

    script, env = origin(agent)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--eval-only", "--checkpoint", agent, "--run-dir", folder, "--capture-video"]
        flags += ["--eval-episodes", str(args.eval_episodes)]
        subprocess.run([sys.executable, script, *flags], check=True)
        last = sorted((Path(folder) / "videos").glob("eval_goal*.mp4"))[-1]  # of several goals
        frames = imageio.imread(last)[::5]
        frames = [Image.fromarray(frame).crop(INSIDE.get(env)).resize((240, 240)) for frame in frames]
        samples = Image.new("RGB", (240 * 8, 240))  # one palette for all, or small things lose their colour
        for i in range(8):
            samples.paste(frames[i * len(frames) // 8], (240 * i, 0))
        palette = samples.quantize(96, method=Image.Quantize.MAXCOVERAGE)
        first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        options = dict(save_all=True, append_images=rest, duration=80, loop=0, optimize=True)
        first.save(args.out / f"film_{agent.stem}.gif", **options)
        picture = (Path(folder) / "pictures" / "eval.png").read_bytes()
        (args.out / f"paths_{agent.stem}.png").write_bytes(picture)


def main(args: Args):
    if args.publish:
        publish(args.publish[0], args.agents, args.publish[1])
        return
    agents = sorted(args.agents.glob("*.pt"))
    if not agents:
        raise SystemExit(f"films.py: error: no agents in {args.agents}")
    args.out.mkdir(parents=True, exist_ok=True)
    for agent in agents:
        film(agent, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
