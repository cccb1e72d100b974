"""Commands that README and docs show must at least be understood by the scripts, as they are written."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT, SCRIPTS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """(page, words) of each `python script.py ...` in a block or between backticks, without its comment."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', text, re.M))
        for block in re.findall(r"```\w*\n(.*?)```", text, re.S):
            for line in block.splitlines():
                yield page.name, line, variables
        for line in re.findall(
            r"`(python [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S).replace("\n", " ")
        ):
            yield page.name, line, variables


def ours():
    for page, line, variables in commands():
        found = re.search(rf"python ({'|'.join(SCRIPTS)})\.py\b(.*)", line)
        if not found:
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(re.search(r"\.py\b(.*)", line)[1].split(" > ")[0].rstrip("& "), comments=True)
        yield pytest.param(found[1], words, id=f"{page}: {found[1]} {' '.join(words)}")


ALL = list(ours())


def test_there_are_commands():
    assert len(ALL) >= 5 * len(SCRIPTS)


@pytest.mark.parametrize("script, words", ALL)
def test_command_is_understood(script, words, monkeypatch):
    """Placeholders (runs/..., D, J_HRL) become what a user would write."""
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script)
    for flag in ("--resume", "--checkpoint", "--start-from"):
        if flag in words and not (ROOT / words[words.index(flag) + 1]).exists():
            pytest.skip("a file of the reader's")
    if "--help" in words:
        words = [word for word in words if word != "--help"]
    numbers = {"--coop-delta": "-50", "--coop-reference": "-60"}
    words = [numbers.get(before, word) for before, word in zip(["", *words], words)]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)  # of wandb, imageio_ffmpeg
    module.parse_args(words)
