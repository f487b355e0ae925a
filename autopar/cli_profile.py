"""``autopar profile``: measure this machine's devices, look at profiles, merge and compare them.

The measuring itself is `autopar.profiler`, which runs without this command where nothing but torch and numpy is
installed (``python -m autopar.profiler``, the same options).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="profile", help="Measure this machine's operators and collectives.", no_args_is_help=True)

OutOption = Annotated[Path, typer.Option("--out", "-o", help="The profile to write; continued if it is there.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
MinutesOption = Annotated[float, typer.Option("--minutes", help="In all, with what the file holds already.")]
ProfileArgument = Annotated[Path, typer.Argument(metavar="PROFILE", help="What `autopar profile` wrote.")]


@app.command()
def ops(
    out: OutOption,
    device: DeviceOption = "cpu",
    minutes: MinutesOption = 5.0,
    only: Annotated[str, typer.Option("--ops", help="Operators, with commas between; default all.")] = "",
    dtypes: Annotated[
        str, typer.Option("--dtypes", help="fp32,bf16,fp16,fp8; default all that the device computes in.")
    ] = "",
    threads: Annotated[
        int, typer.Option("--threads", help="CPU threads; several ranks of a machine use one each.")
    ] = 1,
) -> None:
    """Measure operators, forward and backward. Killed at any point, the same command goes on."""
    from autopar.profiler.measure import OpsRun, measure_ops, names

    run = OpsRun(out, device, minutes, names(only), names(dtypes), threads)
    with _bar(f"measuring {device}") as told:
        profile = measure_ops(run, told)
    typer.echo(f"wrote {out}: {len(profile.ops):,} measurements of operators", err=True)


@app.command()
def collectives(
    out: OutOption,
    device: DeviceOption = "cpu",
    minutes: MinutesOption = 2.0,
    mesh: Annotated[str, typer.Option("--mesh", help="Axis sizes, outermost first, such as 2x8.")] = "",
    kinds: Annotated[str, typer.Option("--kinds", help="Collectives, with commas between; default all.")] = "",
    largest: Annotated[int, typer.Option("--largest", help="Bytes of the largest message.")] = 1 << 30,
) -> None:
    """Measure collectives, under torchrun: torchrun --nproc-per-node N -m autopar.profiler collectives -o FILE."""
    from autopar.profiler.collectives import LinksRun, measure_collectives, parse_mesh
    from autopar.profiler.measure import names

    run = LinksRun(out, device, minutes, parse_mesh(mesh), names(kinds), largest)
    with _bar("measuring collectives") as told:
        profile = measure_collectives(run, told)
    if profile is not None:
        typer.echo(f"wrote {out}: {len(profile.collectives):,} measurements of collectives", err=True)


@app.command()
def merge(
    profiles: Annotated[list[Path], typer.Argument(metavar="PROFILE...", help="Profiles of one device.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
) -> None:
    """One profile of several of the same device; of two of the same measurement the surer one is kept."""
    from autopar.profiler.database import Profile, check_target
    from autopar.profiler.database import merge as joined

    check_target(out)
    profile = joined([Profile.load(path) for path in profiles])
    profile.save(out)
    typer.echo(f"wrote {out}: {len(profile.ops):,} operators, {len(profile.collectives):,} collectives", err=True)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A")],
    second: Annotated[Path, typer.Argument(metavar="B")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say what two profiles measured differently: seconds of B over those of A."""
    from autopar.profiler.compare import difference, difference_text
    from autopar.profiler.database import Profile

    a, b = Profile.load(first), Profile.load(second)
    typer.echo(json.dumps(difference(a, b)) if as_json else difference_text(a, b, (str(first), str(second))))


@app.command()
def show(profile: ProfileArgument) -> None:
    """Say what a profile holds: how many shapes, how sure, launch overhead, links."""
    from autopar.profiler.compare import summary_text
    from autopar.profiler.database import Profile

    typer.echo(summary_text(Profile.load(profile)))


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[float, float, str], None]]:
    """A progress bar with the time left on standard error, if someone watches; else a line now and then."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        from autopar.profiler.__main__ import Bar

        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=1.0, left="")

        def told(spent: float, total: float, last: str) -> None:
            left = f"{max(0.0, total - spent):.0f} s left: {last}"
            progress.update(task, completed=min(1.0, spent / total), left=left)

        yield told
