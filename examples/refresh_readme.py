"""Runs the commands that README.md shows and puts what they print into it: ``make readme``."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
JOB = ("llama3-8b", "--cluster", "8x8:h100", "--global-batch", "512", "--seq-len", "8192")
GIVEN = ("tp=8", "pp=2", "micro_batch=1", "recompute=full", "sp=true")


def autopar(*arguments: str) -> str:
    """What the command prints. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "autopar", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip()


def between(text: str, start: str, stop: str) -> str:
    first = text.index(start)
    return text[first : text.index(stop, first)].rstrip()


def shown() -> dict[str, str]:
    """The text of each marked place of README.md."""
    autopar("search", *JOB)  # so that the seconds shown are those of a traced model
    searched = autopar("search", *JOB)
    fixed = [part for choice in GIVEN for part in ("--fix", choice)]
    with tempfile.TemporaryDirectory() as folder:
        predicted = autopar("predict", *JOB, *fixed, "-o", str(Path(folder) / "out"))
        module = (Path(folder) / "out" / "module.py").read_text()
    typed = f"$ autopar predict {' '.join(JOB)} \\\n      {' '.join(fixed)}"
    head = predicted[: predicted.index("\n\n")]
    block = between(predicted, "LlamaDecoderLayer, blocks", "Epilogue, block")
    return {
        "plan": f"$ autopar search {' '.join(JOB)}\n{searched}",
        "predict": f"{typed}\n{head}\n...\n{block}\n...",
        "module": textwrap.dedent(between(module, "    def forward(self, hidden", "\n\n\n")),
    }


def main() -> None:
    text = README.read_text()
    for mark, shows in shown().items():
        place = re.compile(rf"(<!-- {mark} -->\n```\w*\n).*?(\n```)", re.DOTALL)
        text, found = place.subn(lambda match, shows=shows: match[1] + shows + match[2], text)
        assert found == 1, f"README.md has {found} places marked {mark}"
    README.write_text(text)


if __name__ == "__main__":
    main()
