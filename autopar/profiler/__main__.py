"""``python -m autopar.profiler``: the measuring commands where nothing but torch and numpy is installed.

    python -m autopar.profiler ops --device cuda --minutes 30 -o h200.json
    torchrun --nproc-per-node 8 -m autopar.profiler collectives --device cuda -o links.json
    python -m autopar.profiler merge h200.json links.json -o h200.json
    python -m autopar.profiler diff A B | show A

Copy the folder ``autopar/`` next to where you stand; ``autopar profile`` is the same with a nicer bar. Exit status: 0
done, 2 bad input, 130 interrupted (what was measured is kept).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from autopar.errors import AutoparError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except AutoparError as error:
        _say(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        _say("interrupted; what was measured is kept, the same command goes on")
        return 130
    except BrokenPipeError:
        return 1
    return 0


class Bar:
    """A line on standard error: how far, the time left, what was measured last. A terminal rewrites it in place;
    elsewhere a line comes every ten seconds."""

    def __init__(self) -> None:
        self._last = 0.0
        self._live = sys.stderr.isatty()
        self._mute = os.environ.get("RANK", "0") != "0"
        self._shown = False

    def __call__(self, spent: float, total: float, what: str) -> None:
        now = time.monotonic()
        if self._mute or (now - self._last < (0.1 if self._live else 10.0) and spent < total):
            return
        self._last = now
        part = min(1.0, spent / total)
        bar = "#" * round(24 * part)
        line = f"[{bar:<24}] {100 * part:3.0f} %, {max(0.0, total - spent):.0f} s left: {what}"
        sys.stderr.write(f"\r{line[:110]:<110}" if self._live else line + "\n")
        sys.stderr.flush()
        self._shown = True

    def close(self) -> None:
        if self._live and self._shown:
            sys.stderr.write("\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m autopar.profiler", description="Measures this machine's devices.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    ops = commands.add_parser("ops", help="measure operators")
    ops.set_defaults(run=_ops)
    ops.add_argument("--ops", default="", help="names, with commas between; default all")
    ops.add_argument("--dtypes", default="", help="fp32,bf16,fp16,fp8; default all that the device computes in")
    ops.add_argument("--threads", type=int, default=1, help="CPU threads; ranks that share a machine compute on one")
    links = commands.add_parser("collectives", help="measure collectives, under torchrun")
    links.set_defaults(run=_collectives)
    links.add_argument("--mesh", default="", help="axis sizes, outermost first, such as 2x8; default nodes x ranks")
    links.add_argument("--kinds", default="", help="collectives, with commas between; default all")
    links.add_argument("--largest", type=int, default=1 << 30, help="bytes of the largest message")
    for command in (ops, links):
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--minutes", type=float, default=5.0 if command is ops else 2.0)
        command.add_argument("-o", "--out", type=Path, required=True, help="the profile; continued if it is there")
    merging = commands.add_parser("merge", help="one profile of several of the same device")
    merging.set_defaults(run=_merge)
    merging.add_argument("profiles", type=Path, nargs="+")
    merging.add_argument("-o", "--out", type=Path, required=True)
    comparing = commands.add_parser("diff", help="what two profiles measured differently")
    comparing.set_defaults(run=_diff)
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    showing = commands.add_parser("show", help="what a profile holds")
    showing.set_defaults(run=_show)
    showing.add_argument("profile", type=Path)
    return parser


def _ops(given: argparse.Namespace) -> None:
    from autopar.profiler.measure import OpsRun, measure_ops, names

    bar = Bar()
    run = OpsRun(given.out, given.device, given.minutes, names(given.ops), names(given.dtypes), given.threads)
    profile = measure_ops(run, bar)
    bar.close()
    _say(f"wrote {given.out}: {len(profile.ops):,} measurements of operators")


def _collectives(given: argparse.Namespace) -> None:
    from autopar.profiler.collectives import LinksRun, measure_collectives, parse_mesh
    from autopar.profiler.measure import names

    bar = Bar()
    mesh, kinds = parse_mesh(given.mesh), names(given.kinds)
    profile = measure_collectives(LinksRun(given.out, given.device, given.minutes, mesh, kinds, given.largest), bar)
    bar.close()
    if profile is not None:
        _say(f"wrote {given.out}: {len(profile.collectives):,} measurements of collectives")


def _merge(given: argparse.Namespace) -> None:
    from autopar.profiler.database import Profile, check_target, merge

    check_target(given.out)
    profile = merge([Profile.load(path) for path in given.profiles])
    profile.save(given.out)
    _say(f"wrote {given.out}: {len(profile.ops):,} operators, {len(profile.collectives):,} collectives")


def _diff(given: argparse.Namespace) -> None:
    from autopar.profiler.compare import difference_text
    from autopar.profiler.database import Profile

    print(difference_text(Profile.load(given.a), Profile.load(given.b), (str(given.a), str(given.b))))


def _show(given: argparse.Namespace) -> None:
    from autopar.profiler.compare import summary_text
    from autopar.profiler.database import Profile

    print(summary_text(Profile.load(given.profile)))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
