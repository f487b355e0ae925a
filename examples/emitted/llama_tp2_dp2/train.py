"""Trains llama3.2-1b on 4 devices: pp=1 x dp=2 x tp=2.

    ./launch.sh --data tokens.bin --steps 1000

Written by autopar from plan.json; made to be read and changed. module.py has the model with its
communication, runtime/ the parts that PyTorch does not bring along. Needs PyTorch 2.11 or newer and nothing else.
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import module
import torch
from runtime import checkpoint, launch, parameters
from runtime.data import RandomTokens, Tokens, sample_indices
from runtime.metrics import Metrics
from runtime.pipeline import stages_of_rank
from runtime.sharding import compile_blocks, shard_stage
from runtime.step import Step
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

# The plan.
MESH = module.MESH  # pp=1 x dp=2 x tp=2: pipeline, data and tensor-parallel ranks
DEVICE_TYPE = "cuda"
DEVICES_PER_NODE = 4
GLOBAL_BATCH = 64  # samples per optimizer step = dp * MICRO_BATCH * MICRO_BATCHES
MICRO_BATCH = 2  # samples per data rank that go through the model at once
MICRO_BATCHES = 16  # per optimizer step, one after another
SEQ_LEN = 4096
SCHEDULE = "none"  # one stage
STAGES_PER_RANK = 1
ZERO = 3  # parameters, gradients and optimizer state are sharded; a block's parameters are gathered as it runs
GATHERED = [  # blocks whose parameters stay gathered through the step; those of the others are freed after each use
    *(f"model.layers.{i}" for i in range(16)),
]
FSDP = 2  # ranks of dp in a shard group
OFFLOAD = False  # everything stays on the device
COMPUTE_DTYPE = torch.bfloat16
MASTER_DTYPE = torch.float32  # parameters, gradient reduction, optimizer state
VOCABULARY = 128256
PREDICTED_STEP_S = 1.673


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, help="file of token ids, folder of text (byte-level), or 'random'")
    data.add_argument("--token-dtype", choices=("uint8", "uint16", "int32"), default="uint16", help="of the file")
    data.add_argument("--pattern", default="*.txt", help="which files of a folder")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--steps", type=int, default=1000, help="optimizer steps, counted from the very first")
    optimization.add_argument("--lr", type=float, default=3e-4)
    optimization.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="after warm-up")
    optimization.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    optimization.add_argument("--min-lr", type=float, default=0.1, help="end of the cosine, as a fraction of --lr")
    optimization.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
    optimization.add_argument("--eps", type=float, default=1e-8)
    optimization.add_argument("--weight-decay", type=float, default=0.1)
    optimization.add_argument("--clip", type=float, default=1.0, help="global gradient norm; 0 does not clip")
    optimization.add_argument("--seed", type=int, default=0, help="of initial weights, sample order and dropout")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--weights",
        type=Path,
        help="initial values, saved by torch.save({name: tensor}); default: drawn from the seed",
    )
    files.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"))
    files.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; 0 saves none")
    files.add_argument("--keep", type=int, default=3, help="checkpoints to keep")
    files.add_argument("--resume", type=Path, nargs="?", const=Path("latest"), help="a checkpoint; alone: the latest")
    files.add_argument("--metrics", type=Path, help="append one JSON object per reported step to this file")
    running = parser.add_argument_group("running")
    running.add_argument("--log-every", type=int, default=1)
    running.add_argument("--compile", action="store_true", help="torch.compile every block")
    running.add_argument("--any-topology", action="store_true", help="do not insist on the plan's devices per node")
    return parser.parse_args()


def parallelize(mesh: DeviceMesh, fsdp_mesh: DeviceMesh, device: torch.device, compile: bool = False) -> Step:
    """This rank's stages of the model, sharded and wrapped, and how to run them. Parameters are still to be filled."""
    stages = {}
    for index in stages_of_rank(SCHEDULE, mesh["pp"].get_local_rank(), MESH["pp"], STAGES_PER_RANK):
        stage = module.build_stage(index, mesh, device, MASTER_DTYPE, meta=True)
        shard_stage(stage, stage.blocks(), fsdp_mesh, ZERO, COMPUTE_DTYPE, OFFLOAD, gathered=GATHERED)
        parameters.allocate(stage, torch.device("cpu") if OFFLOAD else device)
        if compile:
            compile_blocks(stage.blocks())
        stages[index] = stage
    return Step(stages, mesh, device, SCHEDULE, MICRO_BATCHES, module.count_targets, ZERO, module.TIED)


def read_data(args: argparse.Namespace) -> Tokens | RandomTokens:
    if args.data == "random":
        return RandomTokens(SEQ_LEN, VOCABULARY, args.seed)
    return Tokens(Path(args.data), SEQ_LEN, VOCABULARY, args.token_dtype, args.pattern, args.seed)


def make_batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that the model takes, from token ids [samples, SEQ_LEN]."""
    return {"input_ids": ids, "labels": ids}


def make_optimizer(
    args: argparse.Namespace, weights: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        weights,
        lr=args.lr,
        betas=tuple(args.betas),
        eps=args.eps,
        weight_decay=args.weight_decay,
        **({"fused": True} if device.type == "cuda" and not OFFLOAD else {"foreach": True}),
    )


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then constant or a cosine down to ``min_lr`` of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":
        return args.lr
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (args.min_lr + (1 - args.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def main() -> None:
    args = parse_args()
    launch.check_launch(MESH, DEVICES_PER_NODE, args.any_topology)
    data = read_data(args)
    mesh, fsdp_mesh, device = launch.start(MESH, FSDP, DEVICE_TYPE)
    data_rank, data_ranks = mesh["dp"].get_local_rank(), mesh["dp"].size()
    # Ranks that share samples share their random numbers; the others must not.
    torch.manual_seed(args.seed * 1_000_003 + mesh["pp"].get_local_rank() * data_ranks + data_rank)

    step = parallelize(mesh, fsdp_mesh, device, args.compile)
    optimizer = make_optimizer(args, step.stage.parameters(), device)
    start = 0
    if args.resume:
        path = args.checkpoint_dir if args.resume == Path("latest") else args.resume
        start = checkpoint.resume(path, step, optimizer, module.TIED)
    elif args.weights:
        parameters.load_weights(step.stage, args.weights, module.TIED)
    else:
        parameters.initialise(step.stage, module.init_parameter, args.seed, module.TIED)

    metrics = Metrics(GLOBAL_BATCH * SEQ_LEN, PREDICTED_STEP_S, device, args.metrics)
    for index in range(start, args.steps):
        rate = learning_rate(args, index)
        for group in optimizer.param_groups:
            group["lr"] = rate
        samples = data.samples(sample_indices(index, data_rank, data_ranks, MICRO_BATCH, MICRO_BATCHES))
        loss = step.forward_backward(make_batch(samples.to(device)))
        norm = step.clip_gradients(args.clip or None)
        optimizer.step()
        optimizer.zero_grad()
        done = index + 1
        if done % args.log_every == 0 or done == args.steps:
            metrics.report(done, loss.item(), norm.item(), rate)
        if args.save_every and (done % args.save_every == 0 or done == args.steps):
            checkpoint.save(args.checkpoint_dir, done, step, optimizer, module.TIED, args.keep)
    launch.stop()


if __name__ == "__main__":
    try:
        main()
    except launch.InputError as error:
        launch.refuse(str(error))
    launch.leave()
