"""Runs the commands that README.md shows and puts what they print into it: ``make readme``. The table of capabilities
is written from the data that search and emitter obey."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from autopar.solver.capabilities import CAPABILITIES, LIMITS

README = Path(__file__).parent.parent / "README.md"
JOB = ("llama3-8b", "--cluster", "8x8:h100", "--global-batch", "512", "--seq-len", "8192")
SOUGHT = ("--objective", "devices", "--within", "35")
GIVEN = ("tp=8", "pp=2", "micro_batch=1", "recompute=full", "sp=true")


def autopar(*arguments: str) -> str:
    """What the command prints. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "autopar", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip()


def between(text: str, start: str, stop: str) -> str:
    first = text.index(start)
    return text[first : text.index(stop, first)].rstrip()


FORMS = {
    "size": "any size",
    "axis": "any size, or its parts as in 2x4",
    "counts": "blocks in each stage",
    "mesh": "sizes of all axes",
    "order": "any order of pp, dp, cp, tp",
}
"""Values of the keys that take any of their form."""


def capabilities() -> str:
    """The table of what can be fixed, what of it runs and what the search looks at; then what cannot be combined."""
    lines = ["| key | runs | searched |", "| --- | --- | --- |"]
    for key, capability in CAPABILITIES.items():
        values = capability.executable
        runs = ", ".join(map(_word, values)) if values is not None else FORMS[capability.form]
        lines.append(f"| `{key}` | {runs} | {capability.searched or 'as fixed'} |")
    lines += ["", "| what is refused | because | in PyTorch |", "| --- | --- | --- |"]
    for limit in LIMITS:
        keys = ", ".join(f"`{key}`" for key in limit.keys)
        lines.append(f"| {limit.name} ({keys}) | {limit.reason} | {limit.avoids} |")
    return "\n".join(lines)


def _word(value: Any) -> str:
    return f"{value}".lower() if isinstance(value, bool) else str(value)


def with_capabilities(text: str) -> str:
    """README.md's text with the tables of `capabilities` in their place."""
    place = re.compile(r"(<!-- capabilities -->\n).*?(\n<!-- end of capabilities -->)", re.DOTALL)
    text, found = place.subn(lambda match: match[1] + capabilities() + match[2], text)
    assert found == 1, f"README.md has {found} places for the table of capabilities"
    return text


def reasons(free: Path, given: Path) -> dict[str, str]:
    """Answers to why: of the plan found freely and of the folder of the one given, parts left out."""
    operator = autopar("explain", str(given), "--op", "attention").split("\n\n")
    other = autopar("explain", str(free), "--why-not", "tp=4")
    first, _, rest = other.partition("\nPrologue: ")
    seconds = between(rest, "seconds of a step", "GiB of the fullest rank")
    table = rest[rest.index("GiB of the fullest rank") :]
    return {
        "explain": "$ autopar explain out --op attention\n" + "\n\n".join([*operator[:4], "...", operator[-1]]),
        "why-not": f"$ autopar explain plan.json --why-not tp=4\n{first}\n...\n\n{seconds}\n\n{table}",
    }


def shown() -> dict[str, str]:
    """The text of each marked place of README.md."""
    autopar("search", *JOB)  # so that the seconds shown are those of a traced model
    fixed = [part for choice in GIVEN for part in ("--fix", choice)]
    with tempfile.TemporaryDirectory() as folder:
        free, given = Path(folder) / "plan.json", Path(folder) / "out"
        searched = autopar("search", *JOB, "-o", str(free)).rpartition("\n\n")[0]
        predicted = autopar("predict", *JOB, *fixed, "-o", str(given)).rpartition("\n\n")[0]
        module = (given / "module.py").read_text()
        answers = reasons(free, given)
    fewest = autopar("search", *JOB, *SOUGHT)
    asked = f"$ autopar search {' '.join(JOB)} \\\n      {' '.join(SOUGHT)}"
    typed = f"$ autopar predict {' '.join(JOB)} \\\n      {' '.join(fixed)}"
    head = predicted[: predicted.index("\n\n")]
    block = between(predicted, "LlamaDecoderLayer, blocks", "Epilogue, block")
    return {
        "plan": f"$ autopar search {' '.join(JOB)}\n{searched}",
        "predict": f"{typed}\n{head}\n...\n{block}\n...",
        **answers,
        "objective": f"{asked}\n{fewest[: fewest.index(chr(10) + 'searched')]}\n...",
        "module": textwrap.dedent(between(module, "    def forward(self, hidden", "\n\n\n")),
    }


def main() -> None:
    text = with_capabilities(README.read_text())
    for mark, shows in shown().items():
        place = re.compile(rf"(<!-- {mark} -->\n```\w*\n).*?(\n```)", re.DOTALL)
        text, found = place.subn(lambda match, shows=shows: match[1] + shows + match[2], text)
        assert found == 1, f"README.md has {found} places marked {mark}"
    README.write_text(text)


if __name__ == "__main__":
    main()
