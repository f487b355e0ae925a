"""Write the folder that trains a plan: module.py, train.py, what they import, the plan, and how to start it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from autopar.codegen.tokens import DENOISING, GIVEN, MASKED, NEXT, batch_of, samples_text, vocabulary_of
from autopar.codegen.wiring import blocks_method
from autopar.errors import BadInputError, UnsupportedError
from autopar.graph.ir import COMPUTE, ModelGraph
from autopar.graph.size import SEQ
from autopar.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

RUNTIME = Path(__file__).parent / "runtime"
WEIGHTS_FILE = "initial.pt"
TORCH_DTYPES = {
    "bf16": ("bfloat16", "float32"),
    "fp16": ("float16", "float32"),
    "fp32": ("float32", "float32"),
    "fp64": ("float64", "float64"),
}
"""Compute and master dtype of a job's dtype, by torch's names."""

ZERO_TEXTS = (
    "every data rank holds whole parameters, gradients and optimizer state",
    "optimizer state is sharded; gradients are reduced once a step, parameters gathered once",
    "optimizer state and gradients are sharded, gradients reduced at each micro-batch",
    "parameters, gradients and optimizer state are sharded; a block's parameters are gathered as it runs",
)
"""What each ZeRO level does, in words."""

MASK_SHARES = {MASKED: 0.15, DENOISING: 0.3}
"""Share of tokens that is masked: as in BERT (Devlin et al. 2019), and in BART (Lewis et al. 2020)."""

OBJECTIVE_TEXTS = {
    NEXT: "The model learns the next token at every position of a sample.",
    MASKED: """\
The model sees all positions, so it learns masked tokens: {share:.0%} of each sample. Set `MASK_ID` at the top of
`train.py` to your tokenizer's mask token; `make_batch` there is the place for another objective.""",
    DENOISING: """\
The encoder reads samples with {share:.0%} of their tokens masked, the decoder learns to write them whole. Set `MASK_ID`
at the top of `train.py` to your tokenizer's mask token; `make_batch` there is the place for another task.""",
    GIVEN: """\
A sample is what the model takes: the tensors in `TENSORS` at the top of `train.py`, each saved for all samples, on dim
0. `read_data` and `make_batch` there are the places for a dataset of your own, and for what is to be done to its
samples.""",
}
"""What a model is trained on, in words."""

SCHEDULE_TEXTS = {
    "none": "one stage",
    "gpipe": "all forwards, then all backwards",
    "1f1b": "forward and backward in turns",
    "interleaved": "forward and backward in turns, over several stages a rank",
    "zbv": "two stages a rank, there and back; weight gradients fill the gaps",
    "dualpipev": "two stages a rank, there and back; forward and backward at once",
}


def check_emitted(plan: Plan) -> None:
    """Raise UnsupportedError for a plan of another stack or of narrower matmuls than autopar emits."""
    if plan.job.predicts_only:
        what = f"stack={plan.job.stack}" + (f", linear_dtype={plan.job.linear_dtype}" if plan.job.linear_dtype else "")
        raise UnsupportedError(
            f"the plan predicts what another stack does ({what}); autopar emits plans of stack=torch with linear "
            "layers in the job's dtype: search again without them"
        )


def emit(plan: Plan, graph: ModelGraph, out: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the folder ``out``: all of it, or nothing if anything fails.

    ``weights``: initial values by full name, written along (default: train.py draws them from its seed). A folder
    that autopar wrote before is replaced; other files in it (checkpoints) stay. Raises BadInputError for another model
    than the plan's, a folder that holds something else, or a missing weight.
    """
    out = Path(out)
    plan.check_model(graph.fingerprint(), graph.name)
    check_emitted(plan)
    check_target(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise BadInputError(f"cannot write the folder {out}: {error.strerror}; name another place") from error
    try:
        write_folder(plan, graph, temporary, weights)
        temporary.chmod(0o755)
        _move_in(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(plan: Plan, graph: ModelGraph, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the files of `emit` into an existing folder."""
    from autopar.codegen.buffers import filed
    from autopar.codegen.emit_module import imported_modules, module_source
    from autopar.codegen.runtime.buffers import FILE
    from autopar.solver.capabilities import check_executable

    check_executable(plan)
    if "__main__" in imported_modules(graph):
        raise UnsupportedError(
            f"{graph.name} uses operators that are defined in the script being run, which emitted code cannot import; "
            "move them into a module of their own"
        )
    (folder / "module.py").write_text(module_source(plan, graph))
    templates = Environment(
        loader=PackageLoader("autopar.codegen"), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    buffers = filed(graph)
    values = {**_values(plan, graph, weights is not None), "has_buffers": bool(buffers)}
    for name in ("train.py", "launch.sh", "README.md"):
        (folder / name).write_text(templates.get_template(f"{name}.jinja").render(values))
    (folder / "launch.sh").chmod(0o755)
    (folder / "runtime").mkdir()
    for name in _runtime_needed((folder / "module.py").read_text(), (folder / "train.py").read_text()):
        shutil.copyfile(RUNTIME / f"{name}.py", folder / "runtime" / f"{name}.py")
    if buffers:
        _save(buffers, folder / FILE.name)
    plan.save(folder / "plan.json")
    if weights is not None:
        _save_weights(graph, weights, folder / WEIGHTS_FILE)


def _runtime_needed(*sources: str) -> list[str]:
    """The files of the runtime that these texts import, and those that these import."""
    needed, pending = {"__init__"}, [*sources]
    while pending:
        for node in ast.walk(ast.parse(pending.pop())):
            if not isinstance(node, ast.ImportFrom) or (node.level == 0 and not f"{node.module}".startswith("runtime")):
                continue
            module = f"{node.module or ''}".removeprefix("runtime").removeprefix(".")
            for name in {module} if module else {alias.name for alias in node.names}:
                if name not in needed:
                    needed.add(name)
                    pending.append((RUNTIME / f"{name}.py").read_text())
    return sorted(needed)


def _values(plan: Plan, graph: ModelGraph, has_weights: bool) -> dict[str, Any]:
    compute, master = TORCH_DTYPES[plan.job.dtype]
    names = [block.path or block.kind for block in graph.blocks]
    tokens = batch_of(graph)
    given = tokens.objective == GIVEN
    share = MASK_SHARES.get(tokens.objective, 0.0)
    stages = []
    for index, stage in enumerate(plan.stages):
        first, last = stage.runs[0].start, stage.runs[-1].stop - 1
        recomputed: list[tuple[int, int]] = []
        for run in stage.runs:
            if plan.candidates[run.candidate].recompute != "none":
                joins = bool(recomputed) and recomputed[-1][1] + 1 == run.start
                start = recomputed.pop()[0] if joins else run.start
                recomputed.append((start, run.stop - 1))
        stages.append(
            {
                "index": index,
                "blocks": _span(names, first, last),
                "recompute": ", ".join(_span(names, *span) for span in recomputed) or "none",
            }
        )
    return {
        "model": plan.model,
        "devices": plan.cluster.devices,
        "nodes": plan.cluster.nodes,
        "devices_per_node": plan.cluster.devices_per_node,
        "device_type": plan.cluster.device.backend,
        "mesh": plan.mesh.ranked_axes(),
        "mesh_text": str(plan.mesh),
        "global_batch": plan.job.global_batch,
        "seq_len": plan.job.seq_len,
        "dtype": plan.job.dtype,
        "optimizer": plan.job.optimizer,
        "micro_batch": plan.micro_batch,
        "micro_batches": plan.micro_batches,
        "schedule": plan.schedule,
        "schedule_text": SCHEDULE_TEXTS[plan.schedule],
        "vpp": plan.vpp,
        "zero": plan.zero,
        "zero_text": ZERO_TEXTS[plan.zero],
        "gathered": _gathered(plan, names),
        "fsdp": plan.fsdp,
        "ep": plan.mesh.ep,
        "replicas": plan.mesh.data // plan.fsdp,
        "groups_text": f"; {plan.mesh.data // plan.fsdp} groups, replicas of each other"
        if 1 < plan.fsdp < plan.mesh.data
        else "",
        "offload": plan.offload == "state",
        "compute_dtype": compute,
        "master_dtype": master,
        "vocabulary": 0 if given else vocabulary_of(graph),
        "tensors": samples_text(graph) if given else {},
        "counts": "GLOBAL_BATCH" if given and not _has_sequence(graph) else "GLOBAL_BATCH * SEQ_LEN",
        "in_tokens": not given or _has_sequence(graph),
        "casts": any(meta.dtype == COMPUTE for meta in graph.batch.values()),
        "predicted_step_s": float(f"{plan.predicted.step_time:.4g}"),
        "batch": _dict_text(tokens.made),
        "objective": tokens.objective,
        "objective_text": OBJECTIVE_TEXTS[tokens.objective].format(share=share),
        "masks": share > 0,
        "mask_share": share,
        "starts": tokens.starts,
        "stages": stages,
        "has_weights": has_weights,
        "blocks": blocks_method(graph),
    }


def _has_sequence(graph: ModelGraph) -> bool:
    """Whether some tensor of the batch has a value for each position."""
    return any(SEQ in meta.shape for meta in graph.batch.values())


def _gathered(plan: Plan, names: list[str]) -> list[str]:
    """Source text of the names of the blocks that stay gathered under zero 3, those of a list of modules together."""
    blocks = (block for run in plan.gathered_runs() for block in range(run.start, run.stop))
    places = [names[block].rpartition(".") for block in blocks]
    texts: list[str] = []
    first = before = ""
    for parent, _, own in places:
        if texts and own.isdigit() and (parent, str(int(own) - 1)) == (first.rpartition(".")[0], before):
            start = first.rpartition(".")[2]
            span = f"{int(own) + 1}" if start == "0" else f"{start}, {int(own) + 1}"
            texts[-1] = f'*(f"{parent}.{{i}}" for i in range({span}))'
        else:
            first = f"{parent}.{own}" if parent else own
            texts.append(f'"{first}"')
        before = own
    return texts


def _dict_text(entries: dict[str, str]) -> str:
    """A dict of expressions, returned from a function of train.py: on one line if it fits."""
    pairs = [f'"{key}": {value}' for key, value in entries.items()]
    line = f"{{{', '.join(pairs)}}}"
    return (
        line if len(line) <= 120 - len("    return ") else "{\n" + "".join(f"        {p},\n" for p in pairs) + "    }"
    )


def _span(names: list[str], first: int, last: int) -> str:
    return names[first] if first == last else f"{names[first]} to {names[last]}"


def _save_weights(graph: ModelGraph, weights: Mapping[str, Tensor], path: Path) -> None:
    groups = {group[0]: group for group in graph.tied}
    chosen = {}
    for name in graph.parameters:
        held = next((key for key in groups.get(name, (name,)) if key in weights), None)
        if held is None:
            raise BadInputError(f"no weight named {name} was given for {graph.name}; give all of them or none")
        chosen[name] = weights[held].detach().cpu().clone()
    _save(chosen, path)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    import torch

    torch.save(dict(tensors), path)


def check_target(out: Path) -> None:
    """Raise BadInputError if ``out`` is a file, or a folder with something in it that autopar did not write."""
    if out.exists() and not out.is_dir():
        raise BadInputError(f"cannot write the folder {out}: it is a file; name another place")
    if out.is_dir() and any(out.iterdir()) and not _is_emitted(out):
        raise BadInputError(f"{out} holds files that autopar did not write; name an empty or a new folder")


def _is_emitted(folder: Path) -> bool:
    try:
        data = json.loads((folder / "plan.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "fingerprint" in data


def _move_in(new: Path, out: Path) -> None:
    """Put ``new`` in the place of ``out``, taking along what the user has put there."""
    if not out.exists():
        new.rename(out)
        return
    written = {path.name for path in new.iterdir()} | {WEIGHTS_FILE, "__pycache__"}
    for path in out.iterdir():
        if path.name not in written:
            os.replace(path, new / path.name)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.old.") as old:
        out.rename(Path(old) / "out")
        new.rename(out)
