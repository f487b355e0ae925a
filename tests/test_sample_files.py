"""Training scripts of models that take other things than token ids: samples from a file of tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.codegen.prove import run_ranks
from autopar.codegen.runtime.launch import InputError
from autopar.codegen.runtime.samples import RandomSamples, Samples

JOB = autopar.Job(global_batch=4, seq_len=4, dtype="fp32", optimizer="sgd")
SAMPLE = {"image": torch.zeros(2, 4, 4), "group": torch.tensor(1), "label": torch.tensor(1)}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.group = nn.Conv2d(2, 8, 2, stride=2), nn.Embedding(6, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor, group: Tensor, label: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).mean(-1) + self.group(group)
        for layer in self.layers:
            x = x + layer(x)
        return F.cross_entropy(self.head(x), label)


def batch_of(count: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(count, 2, 4, 4, generator=drawn),
        "group": torch.randint(6, (count,), generator=drawn),
        "label": torch.randint(3, (count,), generator=drawn),
    }


def emitted(folder: Path, **fix: object) -> Path:
    model = Classifier()
    plan = autopar.search(model, JOB, autopar.Cluster.parse("1x2:cpu"), SAMPLE, fix=fix)
    autopar.emit(plan, model, folder, SAMPLE)
    return folder


PROVED = [pytest.param({"tp": 2}, marks=pytest.mark.proof), pytest.param({"pp": 2}, marks=pytest.mark.proof)]


@pytest.mark.parametrize("fix", [{"dp": 2, "zero": 3}, *PROVED], ids=str)
def test_steps_are_those_of_one_device(tmp_path: Path, fix: dict[str, object]) -> None:
    emitted(tmp_path / "out", **fix)
    data = batch_of(4)
    torch.save(data, tmp_path / "samples.pt")
    options = ["--data", "samples.pt", "--steps", "2", "--lr", "0.1", "--momentum", "0", "--schedule", "constant"]
    run_ranks(["out/train.py", *options, "--clip", "0", "--metrics", "metrics.jsonl"], 2, 300, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    model = Classifier()
    for row in rows:
        loss = model(**data)
        assert abs(row["loss"] - loss.item()) < 1e-5
        assert row["samples_per_second"] > 0
        for weight, gradient in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
            weight.data -= 0.1 * gradient


def test_what_the_file_must_hold(tmp_path: Path) -> None:
    text = (emitted(tmp_path / "out", dp=2) / "train.py").read_text()
    assert '"image": ((2, 4, 4), torch.float32, 0)' in text
    assert '"group": ((), torch.int64, 6)' in text
    assert '"label": ((), torch.int64, 3)' in text
    assert "SEQ_LEN" not in text
    kinds = {"image": ((2, 4, 4), torch.float32, 0), "group": ((), torch.int64, 6), "label": ((), torch.int64, 3)}
    path = tmp_path / "samples.pt"

    def refused(what: str, held: object = None) -> None:
        if held is not None:
            torch.save(held, path)
        with pytest.raises(InputError, match=what):
            Samples(path, kinds, 0).samples([0, 1])

    refused("is no file")
    path.write_text("image")
    refused("was not written by torch.save")
    refused("holds a list", [1])
    good = batch_of(3)
    refused("no tensor label", {"image": good["image"], "group": good["group"]})
    refused(r"image .* has shape \(3, 2, 4\), not \[samples, 2, 4, 4\]", {**good, "image": good["image"][..., 0]})
    refused("not one number above 0", {**good, "label": good["label"][:2]})
    refused("group .* has 9, but the model knows 6 values", {**good, "group": torch.full((3,), 9)})
    torch.save(good, path)
    both = Samples(path, kinds, 0)
    assert sorted(both.samples([0, 1, 2])["group"].tolist()) == sorted(good["group"].tolist())
    drawn = RandomSamples(kinds, 0).samples([5, 6])
    assert drawn["image"].shape == (2, 2, 4, 4)
    assert torch.equal(RandomSamples(kinds, 0).samples([6])["image"][0], drawn["image"][1])


SCRIPT = """
import torch, autopar
from test_sample_files import Classifier, JOB, SAMPLE, batch_of
model = Classifier()
job = autopar.Job(global_batch=4, seq_len=4, dtype="bf16")
plan = autopar.search(model, job, autopar.Cluster.parse("1x1:cpu"), SAMPLE)
step = autopar.parallelize(model, plan, SAMPLE).training_step
print("loss", abs(step.forward_backward(batch_of(4)).item() - model(**batch_of(4)).item()) < 0.05)
"""


@pytest.mark.proof
def test_numbers_in_float32_are_cast_for_the_model() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--no-python"]
    run = subprocess.run(
        [*command, sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, env=environment
    )
    assert "loss True" in run.stdout, run.stderr
