"""The ``autopar`` command: search, predict, emit, verify, report.

Exit status: 0 done, 1 verification failed, 2 bad input, 3 infeasible, 130 interrupted. A deliberate error is one
message on standard error. Nothing heavy is imported before it is needed: ``autopar --help`` loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopar.errors import AutoparError, BadInputError

if TYPE_CHECKING:
    from autopar.cluster import Cluster
    from autopar.job import Job
    from autopar.plan import Plan

app = typer.Typer(
    name="autopar",
    help="Finds the fastest parallel plan for a PyTorch model on a cluster, and writes the code that trains it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A catalog name (llama3-8b), a Hugging Face config.json, or module.py:function.",
    ),
]
PlanArgument = Annotated[
    Path, typer.Argument(metavar="PLAN", help="A saved plan, or an emitted folder that holds plan.json.")
]
ClusterOption = Annotated[
    str,
    typer.Option("--cluster", "-c", help="NODESxDEVICES:DEVICE, such as 8x8:h100, or a cluster file (TOML)."),
]
BatchOption = Annotated[int, typer.Option("--global-batch", help="Sequences per optimizer step.")]
SeqOption = Annotated[int, typer.Option("--seq-len", help="Tokens per sequence.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Compute dtype: bf16, fp16, fp32 or fp64.")]
OptimizerOption = Annotated[str, typer.Option("--optimizer", help="Optimizer: adamw or sgd.")]
FixOption = Annotated[
    list[str] | None,
    typer.Option("--fix", metavar="KEY=VALUE", help="Fix a part of the plan, such as tp=8; may be repeated."),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder for the emitted code, or a file ending in .json for the plan alone."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MadeForModel = Annotated[
    str | None, typer.Option("--model", help="The model; default the one the plan names. Refused if it differs.")
]
MadeForCluster = Annotated[
    str | None, typer.Option("--cluster", "-c", help="Refuse the plan if it was made for another cluster.")
]
MadeForBatch = Annotated[
    int | None, typer.Option("--global-batch", help="Refuse the plan if it was made for another global batch.")
]
MadeForSeq = Annotated[
    int | None, typer.Option("--seq-len", help="Refuse the plan if it was made for another sequence length.")
]


@app.command()
def search(
    model: ModelArgument,
    cluster: ClusterOption,
    global_batch: BatchOption,
    seq_len: SeqOption,
    dtype: DtypeOption = "bf16",
    optimizer: OptimizerOption = "adamw",
    fix: FixOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the fastest plan that fits."""
    _plan_command(model, cluster, _job(global_batch, seq_len, dtype, optimizer), fix or [], out, as_json)


@app.command()
def predict(
    model: ModelArgument,
    cluster: ClusterOption,
    global_batch: BatchOption,
    seq_len: SeqOption,
    dtype: DtypeOption = "bf16",
    optimizer: OptimizerOption = "adamw",
    fix: FixOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Price a plan given by --fix; what is not given is chosen, and named."""
    _plan_command(model, cluster, _job(global_batch, seq_len, dtype, optimizer), fix or [], out, as_json)


@app.command()
def emit(
    plan: PlanArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    model: MadeForModel = None,
    cluster: MadeForCluster = None,
    global_batch: MadeForBatch = None,
    seq_len: MadeForSeq = None,
) -> None:
    """Write the code that trains a saved plan."""
    loaded = _load(plan, cluster, global_batch, seq_len)
    _check_out(out, file=False)
    from autopar import api

    api.emit(loaded, _model_of(loaded, model), out)
    typer.echo(f"wrote {out}: start it with {out / 'launch.sh'}")


@app.command()
def verify(
    plan: PlanArgument,
    model: MadeForModel = None,
    cluster: MadeForCluster = None,
    global_batch: MadeForBatch = None,
    seq_len: MadeForSeq = None,
) -> None:
    """Prove that a plan computes the single device's loss and gradients (exit status 1 if it does not)."""
    loaded = _load(plan, cluster, global_batch, seq_len)
    from autopar import api

    typer.echo(str(api.verify(loaded, _model_of(loaded, model))))


@app.command()
def report(plan: PlanArgument, as_json: JsonOption = False) -> None:
    """Print a saved plan."""
    _show(_load(plan), as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: every deliberate error becomes one message and a status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    with _interrupts() as interrupted:
        try:
            status = command.main(given or ["--help"], prog_name="autopar", standalone_mode=False)
            sys.stdout.flush()
        except AutoparError as error:
            _fail(str(error), error.exit_status)
        except (KeyboardInterrupt, typer.Abort):
            _fail("interrupted", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 2)
        except Exception as error:
            if interrupted:  # an import that was cut short raises ImportError
                _fail("interrupted", 130)
            usage = getattr(error, "format_message", None)  # click's own errors, wherever typer keeps click
            if usage is None:
                raise
            _fail(f"{usage()} (see autopar --help)", 2)
    if status == 130:
        _fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects the first Ctrl-C and raises KeyboardInterrupt; later ones, while the process ends, do nothing."""
    seen: list[int] = []

    def interrupt(number: int, _: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        if not seen:
            signal.signal(signal.SIGINT, before)


def _fail(message: str, status: int) -> None:
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    sys.exit(status)


def _plan_command(model: str, cluster: str, job: Job, fix: list[str], out: Path | None, as_json: bool) -> None:
    from autopar.solver.fix import parse_fix

    choices = parse_fix(fix).given()
    machine = _cluster(cluster)
    alone = out is not None and out.suffix == ".json"
    if out is not None:
        _check_out(out, file=alone)
    from autopar import api

    with _quiet(as_json), _busy(f"planning {model} on {machine}"):
        plan = api.search(model, job, machine, fix=choices)
        if alone and out is not None:
            plan.save(out)
        elif out is not None:
            api.emit(plan, model, out)
    _show(plan, as_json)
    if out is not None and not as_json:
        typer.echo(f"\nwrote {out}" if alone else f"\nwrote {out}: start it with {out / 'launch.sh'}")


def _show(plan: Plan, as_json: bool) -> None:
    from autopar.report.record import plan_record

    typer.echo(json.dumps(plan_record(plan)) if as_json else str(plan))


@contextlib.contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Send what models and libraries print to standard error while ``wanted``."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _busy(what: str) -> Iterator[None]:
    """A sign of life on standard error while someone watches it."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def _job(global_batch: int, seq_len: int, dtype: str, optimizer: str) -> Job:
    from autopar.job import Job

    return Job(global_batch, seq_len, dtype, optimizer)


def _cluster(text: str) -> Cluster:
    from autopar.cluster import Cluster

    return Cluster.load(text) if Path(text).suffix in (".toml", ".json", ".yaml", ".yml") else Cluster.parse(text)


def _load(path: Path, cluster: str | None = None, batch: int | None = None, seq: int | None = None) -> Plan:
    """The saved plan, which must be for the cluster and shapes given."""
    from dataclasses import replace

    from autopar.plan import Plan

    plan = Plan.load(path / "plan.json" if path.is_dir() else path)
    if cluster is not None:
        plan.check_cluster(_cluster(cluster))
    plan.check_job(
        replace(
            plan.job,
            global_batch=plan.job.global_batch if batch is None else batch,
            seq_len=plan.job.seq_len if seq is None else seq,
        )
    )
    return plan


def _model_of(plan: Plan, given: str | None) -> str:
    """The model to load for a plan: the one given, else the MODEL string that the plan was made from."""
    from autopar.models import catalog_names

    if given is not None:
        return given
    if plan.model in catalog_names() or "." in plan.model or Path(plan.model).exists():
        return plan.model
    raise BadInputError(f"the plan was made from a {plan.model} in Python: name it with --model module.py:function")


def _check_out(out: Path, file: bool) -> None:
    """Refuse early what could not be written after a long search."""
    if out.exists() and out.is_dir() == file:
        kind, wanted = ("folder", "a file") if file else ("file", "a folder, or a file ending in .json")
        raise BadInputError(f"--out {out}: a {kind} is in the way; name {wanted}")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise BadInputError(f"--out {out}: the file {above} is in the way")
    if not os.access(out if out.is_dir() else above, os.W_OK):
        raise BadInputError(f"--out {out}: no permission to write there")
    if not file:
        from autopar.codegen.emit import check_target

        check_target(out)
