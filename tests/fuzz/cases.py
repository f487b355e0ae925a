"""Cases: a drawn model and some drawn plans for it, each of which is emitted, run and compared.

Tracing a model costs more than running a plan, so a model comes with several plans; each of them is a case.
"""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import strategies as st

from autopar.plan import Plan
from fuzz.models import LENGTH, Drawn, built, drawn_model
from fuzz.plans import drawn_plan
from fuzz.running import LIMIT, UnsoundError, run

PLANS = 8
"""Plans of one model."""


@dataclass
class Counts:
    """What has been run: cases, by operator of the graph and by mesh; models, and those not to compare with."""

    cases: int = 0
    models: int = 0
    unsound: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    meshes: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0


@dataclass(frozen=True)
class Case:
    """A model and a plan for it, as they print where something is wrong with them."""

    model: Drawn
    plan: Plan

    def __str__(self) -> str:
        plan = self.plan
        lines = [
            f"{plan.mesh}, {plan.micro_batches} micro-batches of {plan.micro_batch}, {plan.job.seq_len} positions",
            f"stages: {' | '.join(', '.join(run.candidate for run in stage.runs) for stage in plan.stages)}",
        ]
        for name, candidate in plan.candidates.items():
            decision = candidate.decision
            saved = f" but {', '.join(candidate.saved)}" if candidate.saved else ""
            lines.append(f"{name}: recompute {candidate.recompute}{saved}")
            lines += [f"    {node} arrives as {layout}" for node, layout in decision.inputs.items()]
            lines += [f"    {node}: {choice}" for node, choice in decision.strategies.items() if choice]
            lines += [f"    {c.tensor}: {c.source} -> {c.target}" for c in decision.conversions]
            lines += [f"    {node} leaves as {layout}" for node, layout in decision.outputs.items()]
        return f"{self.model!r}\n" + "\n".join(lines)


class WrongError(AssertionError):
    """The emitted module fails, or is not the model."""


@st.composite
def models(draw: st.DrawFn) -> Drawn:
    return drawn_model(lambda options: draw(st.sampled_from(options)))


@st.composite
def plans(draw: st.DrawFn, model: Drawn) -> Plan:
    return drawn_plan(lambda options: draw(st.sampled_from(options)), built(model)[2], LENGTH)


def check(data: st.DataObject, counts: Counts) -> None:
    """Draw a model and plans for it, and run them. Raises WrongError with the case that fails."""
    model = data.draw(models())
    try:
        module, inputs, graph = built(model)
    except Exception as error:
        raise WrongError(f"{model!r}\ncannot be traced: {told(error)}") from error
    counts.models += 1
    operators = {node.op for kind in graph.kinds.values() for node in kind.graph.of("op")}
    for _ in range(PLANS):
        case = Case(model, data.draw(plans(model)))
        try:
            result = run(case.plan, module, inputs, graph)
        except UnsoundError:
            counts.unsound += 1
            return
        except Exception as error:
            raise WrongError(f"{case}\nfails: {told(error)}") from error
        if not result.holds:
            raise WrongError(
                f"{case}\nis off by {result.loss:.1e} in the loss and {result.gradient:.1e} in the gradient of "
                f"{result.worst} (at most {LIMIT:.0e})"
            )
        counts.cases += 1
        counts.worst = max(counts.worst, result.gradient, result.loss)
        counts.operators.update(operators)
        counts.meshes[str(case.plan.mesh)] += 1


def told(error: Exception) -> str:
    return "".join([*traceback.format_tb(error.__traceback__)[-2:], f"{type(error).__name__}: {error}"])
