"""Predicted bytes of every rank against those of the emitted code's tensors, for plans of every kind.

``python -m proof.memory`` prints the table. All plans run in one launch of real ranks (gloo), each under a `Tracker`:

static   what stands through the whole step: parameters (and what of them is gathered for all of it), gradients as they
         wait for their reduction, optimizer state
peak     the most that is held at once in a step's forward and backward, after the first step; of `STEPS` steps the
         least, because gloo's threads hold what a collective read for some moments after it is done
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from autopar.cluster import Cluster
from autopar.codegen.emit import emit
from autopar.codegen.loading import load_train
from autopar.codegen.prove import run_ranks
from autopar.codegen.runtime import launch
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.models import model_graph
from autopar.plan import Plan
from autopar.solver.search import search
from proof.fused import fused_rms_norm
from proof.tracker import Tracker

SEQ = 64
STATIC = ("parameters", "gradients", "optimizer")
STATIC_TOLERANCE, PEAK_TOLERANCE = 0.01, 0.03
STEPS = 4


@dataclass(frozen=True, slots=True)
class Sized:
    """One plan to measure: its fix, and the job's dtype and optimizer."""

    name: str
    fix: dict[str, Any]
    batch: int = 16
    dtype: str = "bf16"
    optimizer: str = "adamw"
    model: str = "llama"

    @property
    def ranks(self) -> int:
        return 4


PLANS = (
    Sized("dp4 zero0", {"dp": 4, "zero": 0, "micro_batch": 2}),
    Sized("dp4 zero1", {"dp": 4, "zero": 1, "micro_batch": 2}),
    Sized("dp4 zero2", {"dp": 4, "zero": 2, "micro_batch": 2}),
    Sized("dp4 zero3", {"dp": 4, "zero": 3, "micro_batch": 2}),
    Sized("dp4 zero3 some stay", {"dp": 4, "zero": 3, "micro_batch": 2, "reshard": "true,2-3:false,6:false"}),
    Sized("dp4 zero3 all stay", {"dp": 4, "zero": 3, "micro_batch": 1, "reshard": False, "recompute": "full"}),
    Sized("dp4 zero3 groups of 2", {"dp": 4, "zero": 3, "fsdp": 2, "micro_batch": 2}),
    Sized("dp4 zero3 fp32 sgd", {"dp": 4, "zero": 3, "micro_batch": 1}, dtype="fp32", optimizer="sgd"),
    Sized("dp4 zero1 fp32", {"dp": 4, "zero": 1, "micro_batch": 4}, dtype="fp32"),
    Sized("dp4 zero3 full", {"dp": 4, "zero": 3, "micro_batch": 2, "recompute": "full"}),
    Sized("dp4 zero0 selective", {"dp": 4, "zero": 0, "micro_batch": 2, "recompute": "selective(attention)"}),
    Sized("tp4 sp", {"tp": 4, "sp": True, "micro_batch": 4}),
    Sized("tp4 no sp", {"tp": 4, "sp": False, "micro_batch": 4}),
    Sized("tp2 dp2 zero3", {"tp": 2, "dp": 2, "zero": 3, "micro_batch": 2}),
    Sized("tp2 sp regather", {"tp": 4, "sp": True, "micro_batch": 4, "recompute": "selective(matmul+attention)"}),
    Sized("cp2 dp2 zero3", {"cp": 2, "dp": 2, "tp": 1, "zero": 3, "micro_batch": 2}),
    Sized("cp4 ring", {"cp": 4, "dp": 1, "context": "ring", "micro_batch": 4}),
    Sized("cp2 dp2 ring full", {"cp": 2, "dp": 2, "zero": 3, "context": "ring", "micro_batch": 4, "recompute": "full"}),
    Sized("cp2 tp2", {"cp": 2, "tp": 2, "dp": 1, "zero": 0, "micro_batch": 4}),
    Sized("pp4 1f1b", {"pp": 4, "schedule": "1f1b", "micro_batch": 2}),
    Sized("pp2 dp2 gpipe zero1", {"pp": 2, "dp": 2, "schedule": "gpipe", "zero": 1, "micro_batch": 2}),
    Sized("pp2 dp2 1f1b zero3", {"pp": 2, "dp": 2, "schedule": "1f1b", "zero": 3, "micro_batch": 2}),
    Sized("pp2 tp2 interleaved", {"pp": 2, "tp": 2, "schedule": "interleaved", "vpp": 2, "micro_batch": 2}),
    Sized(
        "pp2 dp2 1f1b some stay",
        {"pp": 2, "dp": 2, "schedule": "1f1b", "zero": 3, "micro_batch": 2, "reshard": "true,1-2:false,5:false"},
    ),
    Sized(
        "pp2 dp2 interleaved zero1",
        {"pp": 2, "dp": 2, "schedule": "interleaved", "vpp": 2, "zero": 1, "micro_batch": 2},
    ),
    Sized("pp2 dp2 zbv zero1", {"pp": 2, "dp": 2, "schedule": "zbv", "zero": 1, "micro_batch": 2}),
    Sized("pp2 dp2 1f1b zero2", {"pp": 2, "dp": 2, "schedule": "1f1b", "zero": 2, "micro_batch": 2}),
    Sized("pp2 dp2 zbv", {"pp": 2, "dp": 2, "schedule": "zbv", "zero": 0, "micro_batch": 2}),
    Sized("mixtral ep2 zero1", {"dp": 4, "ep": 2, "fsdp": 4, "zero": 1, "micro_batch": 2}, model="mixtral"),
    Sized("mixtral ep2 zero3", {"dp": 4, "ep": 2, "fsdp": 4, "zero": 3, "micro_batch": 2}, model="mixtral"),
    Sized("gpt2 pp2 dp2 tied", {"pp": 2, "dp": 2, "schedule": "1f1b", "zero": 0, "micro_batch": 2}, model="gpt2"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes of one pipeline rank: predicted and measured."""

    name: str
    rank: int
    static: int
    static_predicted: int
    peak: int
    peak_predicted: int
    reserve: int
    kinds: Mapping[str, int]
    held: Mapping[str, int]
    predicted: Mapping[str, int]

    @property
    def static_error(self) -> float:
        return self.static_predicted / self.static - 1

    @property
    def peak_error(self) -> float:
        return self.peak_predicted / self.peak - 1

    @property
    def failures(self) -> list[str]:
        found = []
        for what, error, limit in (
            ("static", self.static_error, STATIC_TOLERANCE),
            ("peak", self.peak_error, PEAK_TOLERANCE),
        ):
            if abs(error) > limit:
                found.append(f"{self.name}, stage rank {self.rank}: {what} is predicted {error:+.1%} off")
        return found


def model_of(name: str) -> nn.Module:
    """A model small enough to run on CPU ranks and wide enough that bytes are those of its weights and tokens."""
    torch.manual_seed(0)
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=128,
                n_layer=6,
                n_head=8,
                vocab_size=2048,
                n_positions=SEQ,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    if name == "mixtral":
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=4,
                num_local_experts=8,
                num_experts_per_tok=2,
                vocab_size=2048,
                max_position_embeddings=SEQ,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=2048,
            max_position_embeddings=SEQ,
            tie_word_embeddings=False,
        )
    )


def plan_of(sized: Sized, graph: ModelGraph) -> Plan:
    """The plan of the fix, with nothing recomputed where it does not say so, and under zero 3 nothing that stays
    gathered."""
    job = Job(sized.batch, SEQ, sized.dtype, sized.optimizer)
    usual = {"pp": 1, "tp": 1, "recompute": "none", **({"reshard": True} if sized.fix.get("zero") == 3 else {})}
    return search(graph, job, Cluster.parse(f"1x{sized.ranks}:h100"), {**usual, **sized.fix})


def prepare(folder: Path, plans: tuple[Sized, ...]) -> dict[str, str]:
    """Emit the plans; what could not be made, by name."""
    graphs = {name: model_graph(model_of(name)) for name in {sized.model for sized in plans}}
    cases, failed = [], {}
    for index, sized in enumerate(plans):
        try:
            plan = plan_of(sized, graphs[sized.model])
            plan.check_whole()
            emit(plan, graphs[sized.model], folder / f"case_{index}")
        except Exception as error:  # the table says so, the others go on
            failed[sized.name] = f"{type(error).__name__}: {error}"
            continue
        cases.append({"name": sized.name, "folder": f"case_{index}"})
    (folder / "cases.json").write_text(json.dumps(cases))
    return failed


def measure(folder: Path, plans: tuple[Sized, ...] = PLANS) -> tuple[list[Row], dict[str, str]]:
    """Emit and run the plans in one launch: a row per pipeline rank, and what failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    failed = prepare(folder, plans)
    run_ranks(["-m", "proof.memory", str(folder)], 4, 900, modules=[Path(__file__).parents[1]])
    rows = [Row(**json.loads(line)) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return rows, failed


def table(rows: list[Row]) -> str:
    """Measured and predicted KiB, and the error of the prediction."""
    lines = [
        f"{'plan':<24}{'rank':>4}{'static':>10}{'predicted':>11}{'':>8}{'peak':>10}{'predicted':>11}{'':>8}"
        "  parameters, gradients, optimizer (measured:predicted)"
    ]
    for row in rows:
        static, peak = (f"{value / 1024:,.0f}" for value in (row.static, row.peak))
        told, most = (f"{value / 1024:,.0f}" for value in (row.static_predicted, row.peak_predicted))
        kinds = (f"{row.kinds[kind] / 1024:,.0f}:{row.predicted[kind] / 1024:,.0f}" for kind in STATIC)
        lines.append(
            f"{row.name:<24}{row.rank:>4}{static:>10}{told:>11}{row.static_error:>+8.1%}"
            f"{peak:>10}{most:>11}{row.peak_error:>+8.1%}  {'  '.join(kinds)}"
        )
    return "\n".join(lines)


def _worker(folder: Path) -> None:
    torch.set_num_threads(1)
    for case in json.loads((folder / "cases.json").read_text()):
        row = _measure(case["name"], folder / case["folder"])
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, row)
        if dist.get_rank() == 0:
            by_rank = {}
            for found in rows:
                known = by_rank.setdefault(found.rank, found)
                if found.peak > known.peak:
                    by_rank[found.rank] = found
            with (folder / "rows.jsonl").open("a") as file:
                for found in by_rank.values():
                    file.write(json.dumps(asdict(found)) + "\n")
            print(case["name"], flush=True)
    launch.stop()
    launch.leave()


def _measure(name: str, folder: Path) -> Row:
    train = load_train(folder)
    plan = Plan.load(folder / "plan.json")
    mesh, fsdp_mesh, device = train.launch.start(train.MESH, train.FSDP, "cpu")
    with fused_rms_norm(), Tracker() as tracker:
        step = train.parallelize(mesh, fsdp_mesh, device)
        train.parameters.initialise(step.stage, train.module.init_parameter, 0, train.module.TIED)
        optimizer = _optimizer(train, step, plan)
        ids = torch.zeros(train.MICRO_BATCH * train.MICRO_BATCHES, train.SEQ_LEN, dtype=torch.int64)
        of_samples = (list(range(len(ids))), 0) if hasattr(train, "mask_tokens") else ()
        batch = train.make_batch(ids, *of_samples)
        given = _bytes(batch.values())
        step.forward_backward(batch)
        optimizer.step()
        peaks = []
        with Static(step.stages) as static:
            for _ in range(STEPS):
                optimizer.zero_grad()
                tracker.reset_peak()
                step.forward_backward(batch)
                peaks.append((tracker.peak, dict(tracker.at_peak)))
        static.optimizer = _bytes(value for state in optimizer.state.values() for value in state.values())
        rank = mesh["pp"].get_local_rank()
    memory: dict[str, int] = {}
    for stage in plan.stages_of(rank):
        for kind, size in plan.stages[stage].memory.items():
            memory[kind] = memory.get(kind, 0) + size
    reserve = memory["reserve"]
    least, held = min(peaks, key=lambda found: found[0])
    return Row(
        name=name,
        rank=rank,
        static=static.parameters + static.gradients + static.optimizer,
        static_predicted=sum(memory[kind] for kind in STATIC),
        peak=least - given,
        peak_predicted=sum(memory.values()) - reserve,
        reserve=reserve,
        kinds={kind: getattr(static, kind) for kind in STATIC},
        held=dict(sorted(held.items(), key=lambda item: -item[1])[:25]),
        predicted=memory,
    )


def _optimizer(train: Any, step: Any, plan: Plan) -> torch.optim.Optimizer:
    if plan.job.optimizer == "sgd":
        return torch.optim.SGD(step.stage.parameters(), lr=1e-3, momentum=0.9)
    return torch.optim.AdamW(step.stage.parameters(), lr=1e-3, foreach=True)


class Static:
    """Bytes of a stage's parameters and gradients while it runs steps, by looking at FSDP2's own tensors.

    ``parameters``: the shards, and what is still gathered after the forward of its own group; ``gradients``: the most
    that waits, whole or reduced, when a group's backward is done, or a half of a backward that gives weights theirs.
    """

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        self.stages = list(stages)
        self.weights = [weight for stage in self.stages for weight in stage.parameters()]
        sharded = [module for stage in self.stages for module in stage.modules() if isinstance(module, FSDPModule)]
        groups = [group for module in sharded for group in module._get_fsdp_state()._fsdp_param_groups]
        self.groups = [group for group in groups if group is not None]
        self.shards = _bytes(self.weights)
        self.gathered: dict[int, int] = {}
        self.gradients = self.optimizer = 0

    @property
    def parameters(self) -> int:
        return self.shards + sum(self.gathered.values())

    def __enter__(self) -> Static:
        for group in self.groups:
            for module in group.modules:
                module.register_forward_hook(lambda *_, group=group: self._after_forward(group))
        self._after_backward, outer = FSDPParamGroup.post_backward, self

        def post_backward(group: FSDPParamGroup, *arguments: Any) -> None:
            # The root group's have waited for the whole backward, in the compute dtype.
            if any(stage in group.modules for stage in outer.stages):
                outer._count_gradients()
            outer._after_backward(group, *arguments)
            outer._count_gradients()

        self._weights = PipelineStage.backward_weight_one_chunk

        def weights(stage: PipelineStage, *arguments: Any, **options: Any) -> None:
            # Halved backwards: what came after the hooks waits for the next ones.
            outer._weights(stage, *arguments, **options)
            outer._count_gradients()

        FSDPParamGroup.post_backward = post_backward  # type: ignore[method-assign]
        PipelineStage.backward_weight_one_chunk = weights  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        FSDPParamGroup.post_backward = self._after_backward  # type: ignore[method-assign]
        PipelineStage.backward_weight_one_chunk = self._weights  # type: ignore[method-assign]

    def _after_forward(self, group: FSDPParamGroup) -> None:
        found = _bytes(output for param in group.fsdp_params for output in getattr(param, "all_gather_outputs", ()))
        self.gathered[id(group)] = max(found, self.gathered.get(id(group), 0))

    def _count_gradients(self) -> None:
        held = [weight.grad for weight in self.weights]
        for param in (param for group in self.groups for param in group.fsdp_params):
            whole = getattr(param, "_unsharded_param", None)
            held += [param.unsharded_accumulated_grad, None if whole is None else whole.grad, param.sharded_param.grad]
        # Shards that their replicas have yet to add up.
        held += [group._partial_reduce_output for group in self.groups]
        self.gradients = max(self.gradients, _bytes(grad for grad in held if grad is not None))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors' storages on this rank, each once."""
    local = (value.to_local() if isinstance(value, DTensor) else value for value in tensors)
    storages = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in local}
    return sum(storages.values())


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/proof/memory")
    if "RANK" in os.environ:
        _worker(folder)
        return 0
    rows, failed = measure(folder)
    print(table(rows))
    for name, reason in failed.items():
        print(f"{name}: {reason}")
    failures = [failure for row in rows for failure in row.failures]
    print("\n".join(failures))
    return 1 if failures or failed else 0


if __name__ == "__main__":
    sys.exit(main())
