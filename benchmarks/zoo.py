"""Does it take my model? Every architecture of a list: traced, planned, emitted, its gradients compared.

    python benchmarks/zoo.py --configs FILE [--only llama,bert] [--ranks 4,8] [--jobs N] [--json OUT]

FILE defines ``ZOO = {name: (transformers config class name, arguments, auto head name or None)}``. Each model is built
with random weights, example inputs are derived from it (`zoo_inputs`), and each plan is run by `autopar.verify`: the
emitted module on all ranks in one process, in float64, against the model on one device. In one process data ranks are
emulated (their gradients are added up where FSDP2 would) and stages run one after another; what FSDP2 and the pipeline
schedules do on real ranks is proved by `make subset` and `make proof`. Each model runs in a process of its own,
several at a time (`zoo_pool`), so that no model can stop the others; one that is ended at its limit keeps its plans.

Printed per model: nodes; operators without a rule and their share of the step, where that is over 1 %; the plans, and
the worst gradient error of any. Exit status 1 if a model failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from zoo_inputs import Example, NoInputsError, examples_of
from zoo_pool import default_jobs, run_pool

import autopar
from autopar.cluster import Device
from autopar.codegen.verify import verify
from autopar.errors import AutoparError, VerificationError
from autopar.graph.ir import ModelGraph, TensorMeta
from autopar.graph.trace import trace
from autopar.objective import Objective
from autopar.sharding.data_parallel import samples_mixed
from autopar.sharding.rules import has_rule
from autopar.solver.fix import parse_fix
from autopar.solver.limits import Limits
from autopar.solver.objectives import search_parts
from autopar.solver.op_costs import LocalTensor, OpCosts

Entry = tuple[str, Mapping[str, Any], str | None]

SHARE = 0.01
"""Operators without a rule are told when they take more of the step than this."""


@dataclass
class Result:
    """One row: see the module's docstring; ``plans``: per plan the worst gradient error, or why there is none."""

    status: str = "ok"
    nodes: int = 0
    no_rule: list[str] = field(default_factory=list)
    plans: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    seconds: float = 0.0
    doing: str = ""
    """What was under way when this was told."""

    def to_json(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "nodes": self.nodes,
            "no_rule": self.no_rule,
            "plans": self.plans,
            "message": self.message,
        }

    @property
    def worst(self) -> float | None:
        return max((error for error in self.plans.values() if isinstance(error, float)), default=None)


def plan_fixes(ranks: int, blocks: int, experts: bool) -> dict[str, dict[str, Any]]:
    """The plans of the table on ``ranks`` ranks, as what is fixed of each."""
    stages = max(size for size in range(1, ranks + 1) if ranks % size == 0 and size <= max(blocks, 1))
    plans: dict[str, dict[str, Any]] = {
        "dp": {"dp": ranks, "zero": 0},
        "zero3": {"dp": ranks, "zero": 3},
        "tp": {"tp": ranks, "sp": False},
        "tp+sp": {"tp": ranks, "sp": True},
        "cp": {"cp": ranks},
        **({"ep": {"ep": ranks, "dp": ranks}} if experts else {}),
        "pp": {"pp": stages, "dp": ranks // stages},
        "search": {},
    }
    if ranks > 4:
        plans["dp+cp+tp"] = {"dp": ranks // 4, "cp": 2, "tp": 2}
    return plans


def without_rules(graph: ModelGraph, job: autopar.Job, device: Device) -> list[str]:
    """Operators without a rule that take more than `SHARE` of a micro-batch of one sample on one device, dearest first.

    Those that read no tensor (a table of positions) have none and need none.
    """
    costs = OpCosts(device, job)
    seconds: dict[str, float] = {}
    total = 0.0
    for block in graph.blocks:
        inner = graph.kinds[block.kind].graph
        for node in inner.of("op"):
            metas = [inner.nodes[name].meta for name in node.operands()]
            inputs = [_local(meta, job) for meta in metas]
            time = costs.seconds(node, inputs, _local(node.meta, job), [meta.requires_grad for meta in metas])
            total += time.forward + time.backward
            if inputs and not has_rule(node, inner):
                seconds[node.op] = seconds.get(node.op, 0.0) + time.forward + time.backward
    found = sorted(seconds.items(), key=lambda pair: -pair[1])
    return [op for op, cost in found if cost > SHARE * total]


def _local(meta: TensorMeta, job: autopar.Job) -> LocalTensor:
    width = {"compute": job.compute_bytes, "bool": 1, "int64": 8, "float64": 8}.get(meta.dtype, 4)
    return LocalTensor(meta.at(1, job.seq_len), width)


def examine(
    entry: Entry, ranks: Sequence[int], only: Sequence[str], tell: Callable[[Result], None] = lambda result: None
) -> Result:
    """Take one model through all plans; ``tell`` is called with what is found so far whenever there is more."""
    result = Result()
    begin = time.perf_counter()
    try:
        _examine(entry, ranks, only, result, tell)
    except NoInputsError as error:
        result.status, result.message = "unsupported", str(error)
    except VerificationError as error:
        result.status, result.message = "failed", str(error)
    except AutoparError as error:
        result.status, result.message = "unsupported", str(error)
    except Exception as error:  # one model must not stop the others
        result.status, result.message = "failed", _told(error)
    result.seconds = time.perf_counter() - begin
    return result


def _examine(
    entry: Entry, ranks: Sequence[int], only: Sequence[str], result: Result, tell: Callable[[Result], None]
) -> None:
    result.doing = "while it was traced"
    tell(result)
    model = build(entry)
    example, graph = _traced(model, result)
    result.nodes = sum(len(list(graph.kinds[block.kind].graph.of("op"))) for block in graph.blocks)
    cluster = autopar.Cluster.parse("1x1:h100")
    result.no_rule = without_rules(graph, autopar.Job(1, example.seq), cluster.groups[0].device)
    # What mixes samples means something for a micro-batch of given size only.
    given = {"micro_batch": 2} if samples_mixed(graph) else {}
    experts = any("expert" in node.op for kind in graph.kinds.values() for node in kind.graph.of("op"))
    for count in ranks:
        for name, fix in plan_fixes(count, len(graph.blocks), experts).items():
            if only and name not in only:
                continue
            label = name if len(ranks) == 1 else f"{name}@{count}"
            result.doing = f"in plan {label}"
            tell(result)
            result.plans[label] = _plan(model, graph, example, count, given | fix, result)
    if result.plans and result.worst is None and result.status == "ok":
        result.status, result.message = "unsupported", str(next(iter(result.plans.values())))


def _traced(model: torch.nn.Module, result: Result) -> tuple[Example, ModelGraph]:
    """The fullest inputs with which the model can be traced; where that is not all it takes, the message says why."""
    refusal: AutoparError | None = None
    for example in examples_of(model):
        try:
            graph = trace(model, example.inputs, example.loss)
        except AutoparError as error:
            refusal = refusal or error
            continue
        if refusal is not None:
            result.message = f"with {', '.join(example.inputs)} alone; with more: {refusal}"
        return example, graph
    assert refusal is not None
    raise refusal


def _plan(
    model: torch.nn.Module, graph: ModelGraph, example: Example, ranks: int, fix: dict[str, Any], result: Result
) -> float | str:
    """The worst gradient error under one plan, or why the model cannot have it.

    As `autopar.search` and `autopar.verify` do, but with the model traced once for all plans.
    """
    cluster = autopar.Cluster.parse(f"1x{ranks}:h100")
    job = autopar.Job(global_batch=2 * ranks, seq_len=example.seq)
    try:
        plan = search_parts(graph, job, cluster, Objective.of(None), parse_fix(fix).given(), Limits())
        report = verify(plan, model, example.inputs, loss=example.loss, graph=graph)
        return max(report.loss_error, report.worst[1])
    except VerificationError as error:
        result.status, result.message = "failed", str(error)
        return str(error)
    except AutoparError as error:
        return str(error)
    except Exception as error:
        result.status, result.message = "failed", _told(error)
        return _told(error)


def _told(error: Exception) -> str:
    text = (str(error).strip() or " ").splitlines()[0]
    trace_back = error.__traceback__
    while trace_back is not None and trace_back.tb_next is not None:
        trace_back = trace_back.tb_next
    place = f" ({Path(trace_back.tb_frame.f_code.co_filename).name}:{trace_back.tb_lineno})" if trace_back else ""
    return f"{type(error).__name__}: {text}{place}"


def build(entry: Entry) -> torch.nn.Module:
    """The model with seeded random weights, in float32; biases and norms are drawn too."""
    config_class, arguments, head = entry
    config = getattr(transformers, config_class)(**arguments)
    config.architectures = config.architectures or []  # where a head has several classes, transformers looks there
    torch.manual_seed(0)
    made = getattr(transformers, head or "AutoModel")
    model: torch.nn.Module = made.from_config(config) if hasattr(made, "from_config") else made(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model.float()


def load_zoo(path: Path) -> dict[str, Entry]:
    """``ZOO`` of a Python file."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None or not path.is_file():
        raise SystemExit(f"zoo: cannot read {path}")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    zoo = getattr(module, "ZOO", None)
    if not isinstance(zoo, dict):
        raise SystemExit(f"zoo: {path} defines no dict ZOO")
    return zoo


def run_models(
    zoo: Mapping[str, Entry], ranks: Sequence[int], only: Sequence[str], limit: float, jobs: int
) -> Iterator[tuple[str, Result]]:
    """`examine` for each model in a process of its own, ``jobs`` at a time, each ended after ``limit`` seconds."""
    tasks = {name: partial(_examine_and_tell, entry, ranks, only) for name, entry in zoo.items()}
    for name, ended in run_pool(tasks, jobs, limit):
        result: Result = ended.last or Result()
        if ended.why:
            kept = f"; kept: {', '.join(result.plans)}" if result.plans else ""
            place = f" {result.doing}" if result.doing else ""
            result.status, result.message, result.seconds = "failed", f"{ended.why}{place}{kept}", ended.seconds
        yield name, result


def _examine_and_tell(entry: Entry, ranks: Sequence[int], only: Sequence[str], tell: Callable[[Result], None]) -> None:
    tell(examine(entry, ranks, only, tell))


def _columns(name: str, status: str, nodes: str, error: str, seconds: str, no_rule: str, plans: str) -> str:
    return f"{name:<16} {status:<11} {nodes:>5}  {error:>7}  {seconds:>5}  {no_rule:<20}  {plans}"


def row_of(name: str, result: Result) -> str:
    """One line of the table, and a line for each plan that the model cannot have or that failed."""
    worst = result.worst
    good = [plan for plan, error in result.plans.items() if isinstance(error, float)]
    told = ", ".join(result.no_rule) or "-"
    error = "-" if worst is None else f"{worst:.1e}"
    lines = [_columns(name, result.status, str(result.nodes), error, f"{result.seconds:.0f}", told, " ".join(good))]
    lines += [f"    {plan}: {error}" for plan, error in result.plans.items() if not isinstance(error, float)]
    if result.message and not any(result.message == error for error in result.plans.values()):
        lines.append(f"    {result.message}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the zoo; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Take every architecture of a list through tracing, plans and proof.")
    parser.add_argument("--configs", type=Path, default=Path(__file__).parent / "zoo_models.py", help="file with ZOO")
    parser.add_argument("--only", default="", help="names of models, comma separated")
    parser.add_argument("--plans", default="", help="names of plans, comma separated")
    parser.add_argument("--ranks", default="4", help="numbers of ranks, comma separated")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one model may take")
    parser.add_argument("--jobs", type=int, default=0, help="models at a time; default: the cores, as memory allows")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    zoo = load_zoo(options.configs)
    wanted = [name for name in options.only.split(",") if name] or list(zoo)
    if unknown := [name for name in wanted if name not in zoo]:
        raise SystemExit(f"zoo: no model {', '.join(unknown)} in {options.configs}")
    ranks = [int(count) for count in options.ranks.split(",")]
    plans = [name for name in options.plans.split(",") if name]
    transformers.logging.set_verbosity_error()
    results: dict[str, Result] = {}
    print(_columns("architecture", "status", "nodes", "error", "s", "without rules > 1 %", "equal under"))
    jobs = options.jobs or default_jobs()
    for name, result in run_models({name: zoo[name] for name in wanted}, ranks, plans, options.limit, jobs):
        results[name] = result
        print(row_of(name, result), flush=True)
        if options.json:  # each time: a run that is stopped leaves what it has found
            found = {"models": {name: results[name].to_json() for name in wanted if name in results}}
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    counts = {status: sum(r.status == status for r in results.values()) for status in ("ok", "unsupported", "failed")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
