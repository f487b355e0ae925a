"""The ``autopar`` command: search, predict, emit, verify, report, explain, diff, profile (`cli_profile`).

Exit status: 0 done, 1 verification failed, 2 bad input, 3 infeasible, 130 interrupted. A deliberate error is one
message on standard error. Nothing heavy is imported before it is needed: ``autopar --help`` loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.cli_profile import app as profile_app
from autopar.errors import AutoparError, BadInputError

if TYPE_CHECKING:
    from autopar.cluster import Cluster
    from autopar.job import Job
    from autopar.objective import Objective
    from autopar.plan import Plan
    from autopar.solver.limits import Progress

app = typer.Typer(
    name="autopar",
    help="Finds the fastest parallel plan for a PyTorch model on a cluster, and writes the code that trains it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

app.add_typer(profile_app)

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
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", metavar="FILE", help="Price by what `autopar profile` measured.")
]
BatchOption = Annotated[int, typer.Option("--global-batch", help="Sequences per optimizer step.")]
SeqOption = Annotated[int, typer.Option("--seq-len", help="Tokens per sequence.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Compute dtype: bf16, fp16, fp32 or fp64.")]
StackOption = Annotated[
    str, typer.Option("--stack", help="The software that runs it: torch is what autopar emits, others are predicted.")
]
LinearOption = Annotated[
    str | None, typer.Option("--linear-dtype", help="fp8 or fp4: what linear layers cast their operands to.")
]
OptimizerOption = Annotated[str, typer.Option("--optimizer", help="Optimizer: adamw or sgd.")]
FixOption = Annotated[
    list[str] | None,
    typer.Option("--fix", metavar="KEY=VALUE", help="Fix a part of the plan, such as tp=8; may be repeated."),
]
ObjectiveOption = Annotated[
    str,
    typer.Option("--objective", help="What is sought: step-time, throughput (per device), devices, cost or energy."),
]
WithinOption = Annotated[
    float | None, typer.Option("--within", metavar="SECONDS", help="For devices: the step time to reach.")
]
PriceOption = Annotated[
    list[str] | None,
    typer.Option("--price", metavar="DEVICE=MONEY", help="For cost: money per device-hour, such as h100=2.5."),
]
GapOption = Annotated[
    float | None, typer.Option("--gap", help="Stop at a plan this close to the bound; default 0.01, which is 1 %.")
]
TimeOption = Annotated[
    float | None, typer.Option("--time-limit", metavar="SECONDS", help="Take the best plan found by then.")
]
WorkOption = Annotated[
    int | None,
    typer.Option("--work-limit", metavar="STEPS", help="The same in steps of the search, equal on every machine."),
]
EqualBlocksOption = Annotated[
    bool,
    typer.Option(
        "--equal-blocks/--no-equal-blocks",
        help="Blocks of one kind share one sharding (recomputation and what waits on the host may differ).",
    ),
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
    profile: ProfileOption = None,
    fix: FixOption = None,
    objective: ObjectiveOption = "step-time",
    within: WithinOption = None,
    price: PriceOption = None,
    gap: GapOption = None,
    time_limit: TimeOption = None,
    work_limit: WorkOption = None,
    equal_blocks: EqualBlocksOption = True,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the fastest plan that fits, or the plan and the part of the cluster that serve --objective best."""
    from autopar.objective import Objective, parse_prices

    sought = Objective.of({"kind": objective, "within_s": within, "price": parse_prices(price or [])})
    options = {"gap": gap, "time_limit": time_limit, "work_limit": work_limit, "equal_blocks": equal_blocks}
    job = _job(global_batch, seq_len, dtype, optimizer)
    _plan_command(model, _cluster(cluster, profile), job, fix or [], out, as_json, sought, options)


@app.command()
def predict(
    model: ModelArgument,
    cluster: ClusterOption,
    global_batch: BatchOption,
    seq_len: SeqOption,
    dtype: DtypeOption = "bf16",
    optimizer: OptimizerOption = "adamw",
    stack: StackOption = "torch",
    linear_dtype: LinearOption = None,
    profile: ProfileOption = None,
    fix: FixOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Price a plan given by --fix; what is not given is chosen, and named."""
    job = _job(global_batch, seq_len, dtype, optimizer, stack, linear_dtype)
    _plan_command(model, _cluster(cluster, profile), job, fix or [], out, as_json)


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


@app.command()
def explain(
    plan: PlanArgument,
    op: Annotated[
        str | None,
        typer.Option("--op", metavar="NAME", help="An operator (self_attn.q_proj): all it could do, and at what cost."),
    ] = None,
    block: Annotated[
        str | None,
        typer.Option("--block", metavar="KIND", help="A block kind: its operators, seconds, bytes, recompute."),
    ] = None,
    why_not: Annotated[
        list[str] | None,
        typer.Option(
            "--why-not", metavar="KEY=VALUE", help="Search again with this fixed, and compare; may be repeated."
        ),
    ] = None,
    model: MadeForModel = None,
    as_json: JsonOption = False,
) -> None:
    """Say why a saved plan is as it is."""
    if sum(map(bool, (op, block, why_not))) > 1:
        raise BadInputError("explain: one question at a time: --op, --block or --why-not")
    loaded = _load(plan)
    from autopar.report.answer import answer

    with _quiet(as_json), _busy(f"asking about {loaded.model}"):
        name = _model_of(loaded, model) if op or block or why_not else None
        found = answer(loaded, name, op=op, block=block, why_not=why_not or ())
    typer.echo(json.dumps(found.record) if as_json else found.text)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A saved plan, or an emitted folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: JsonOption = False,
) -> None:
    """Say what two saved plans decide differently, and where their seconds and bytes differ."""
    from autopar.report.answer import difference

    found = difference(_load(first), _load(second))
    typer.echo(json.dumps(found.record) if as_json else found.text)


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


def _plan_command(
    model: str,
    machine: Cluster,
    job: Job,
    fix: list[str],
    out: Path | None,
    as_json: bool,
    objective: Objective | None = None,
    options: dict[str, float | int | None] | None = None,
) -> None:
    from autopar.solver.fix import parse_fix

    choices = parse_fix(fix).given()
    given: dict[str, Any] = {name: value for name, value in (options or {}).items() if value is not None}
    alone = out is not None and out.suffix == ".json"
    if out is not None:
        _check_out(out, file=alone)
    from autopar import api

    with _quiet(as_json), _busy(f"planning {model} on {machine}") as told:
        plan = api.search(model, job, machine, fix=choices, objective=objective, progress=told, **given)
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
def _busy(what: str) -> Iterator[Callable[[Progress], None] | None]:
    """A sign of life on standard error while someone watches it, which tells how far a search is."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda progress: status.update(f"{what}: {progress} (Ctrl-C takes the best so far)")


def _job(
    global_batch: int,
    seq_len: int,
    dtype: str,
    optimizer: str,
    stack: str = "torch",
    linear_dtype: str | None = None,
) -> Job:
    from autopar.job import Job

    return Job(global_batch, seq_len, dtype, optimizer, stack, linear_dtype)


def _cluster(text: str, profile: Path | None = None) -> Cluster:
    from autopar.cluster import Cluster

    a_file = Path(text).suffix in (".toml", ".json", ".yaml", ".yml")
    cluster = Cluster.load(text) if a_file else Cluster.parse(text)
    return cluster.with_profile(profile) if profile else cluster


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
