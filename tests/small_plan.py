"""A plan written by hand, for tests that need one but no search: 2 nodes of 4 h100, pp=2 dp=2 tp=2, four blocks."""

from autopar.cluster import Cluster
from autopar.job import Job
from autopar.plan import Candidate, Mesh, Plan, Predicted, Run, Stage
from autopar.sharding.decision import BlockDecision, Conversion
from autopar.sharding.layout import Layout

GIB = 2**30


def small_decision(kind: str = "Layer") -> BlockDecision:
    split, partial = Layout.parse("tp:S(1)"), Layout.parse("tp:P")
    return BlockDecision(
        kind=kind,
        axes={"tp": 2},
        inputs={"x": split, "w": Layout.parse("tp:S(0)")},
        strategies={"linear": {"tp": "n"}},
        conversions=(Conversion("x", split, Layout.parse("tp:R")),),
        outputs={"linear": partial},
    )


def small_candidate(name: str, recompute: str = "none") -> Candidate:
    return Candidate(
        name=name,
        decision=small_decision(),
        recompute=recompute,
        forward_s=0.0123,
        backward_s=0.0246,
        step_s=0.001,
        resident_bytes=3 * GIB,
        inflight_bytes=GIB // 2,
        transient_bytes=GIB // 4,
        parameters=1_000_000,
    )


def small_plan(model: str = "tiny") -> Plan:
    memory = {
        "parameters": 2 * GIB,
        "gradients": 2 * GIB,
        "optimizer": 4 * GIB,
        "activations": 3 * GIB // 2,
        "transient": GIB // 4,
        "reserve": GIB,
    }
    kinds = {"Layer/plain": small_candidate("Layer/plain"), "Layer/full": small_candidate("Layer/full", "full")}
    return Plan(
        model=model,
        fingerprint="0123456789abcdef",
        cluster=Cluster.parse("2x4:h100"),
        job=Job(global_batch=16, seq_len=4096),
        mesh=Mesh(pp=2, dp=2, tp=2),
        micro_batch=1,
        micro_batches=8,
        schedule="1f1b",
        zero=3,
        fsdp=2,
        candidates=kinds,
        stages=(
            Stage((Run(0, 2, "Layer/full"),), 0.0246, 0.0492, 0.002, memory),
            Stage((Run(2, 4, "Layer/plain"),), 0.0246, 0.0492, 0.002, {**memory, "activations": GIB}),
        ),
        predicted=Predicted(0.7, 93_622.9, 0.412, (0.63, 0.77), {"compute": 0.5, "collectives": 0.15, "bubble": 0.05}),
        bound=0.69,
        gap=0.0145,
        status="feasible",
        fixed={"tp": 2},
        searched={"meshes": 12, "candidates": 40},
        seconds={"trace": 0.4, "search": 1.25},
        notes=("aten.foo has no rule and runs replicated",),
        described={
            "tp": ("tensor parallel", "sequence parallel"),
            "Layer/full": ("linear  column  tp R -> S(2)", "collectives forward: 1 tp all-gather"),
            "Layer/plain": ("linear  column  tp R -> S(2)", "collectives forward: 1 tp all-gather"),
        },
    )
