"""What train.py trains on, told from the graph: next tokens, masked tokens, or whole samples from masked ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from plain_plans import plain_plan, small_bert, small_gpt2, small_llama, small_t5
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import autopar
from autopar.codegen.emit import emit
from autopar.codegen.loading import load_train
from autopar.codegen.prove import run_ranks
from autopar.codegen.runtime.data import mask_tokens
from autopar.codegen.tokens import DENOISING, MASKED, NEXT, token_batch, vocabulary_of
from autopar.models import model_graph

IDS = torch.zeros(24, dtype=torch.int64)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}


def bart() -> nn.Module:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartForConditionalGeneration(
        BartConfig(d_model=32, vocab_size=64, max_position_embeddings=64, **layers, **heads)
    )


def objective(model: nn.Module, keys: str = "") -> str:
    graph = model_graph(model, dict.fromkeys(keys.split(), IDS)) if keys else model_graph(model)
    return token_batch(graph).objective


@pytest.mark.parametrize("keys", ["", "input_ids attention_mask labels"])
def test_the_graph_tells_the_objective(keys: str) -> None:
    """With and without a mask of padding, which takes the place of ``is_causal``."""
    assert objective(small_llama(), keys) == objective(small_gpt2(), keys) == NEXT
    assert objective(small_bert(), keys) == MASKED
    assert objective(small_t5(), keys) == objective(bart(), keys) == DENOISING


def test_masks_and_attention_written_by_hand_are_read() -> None:
    assert objective(MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=3))) == NEXT
    assert objective(LlamaForCausalLM(LlamaConfig(**GROUPED, attn_implementation="eager"))) == NEXT


class Tagger(nn.Module):
    """Attention written out, and targets that are not shifted; ``causal``: positions see earlier ones alone."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.embed, self.head, self.causal = nn.Embedding(16, 8), nn.Linear(8, 16), causal

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        scores = x @ x.transpose(1, 2)
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        logits = self.head(scores.softmax(-1) @ x)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


def test_position_by_position_targets_are_next_tokens_or_masked_ones() -> None:
    causal, both = token_batch(model_graph(Tagger(True))), token_batch(model_graph(Tagger(False)))
    assert causal.made == {
        "input_ids": "ids",
        "labels": "torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-1)",
    }
    assert both.made == {"input_ids": "shown", "labels": "ids.masked_fill(~chosen, -1)"}


def test_targets_that_are_no_tokens_are_refused() -> None:
    graph = model_graph(BertForTokenClassification(BertConfig(**SMALL, num_labels=3)))
    with pytest.raises(autopar.AutoparError, match="tells 3 classes apart, but has 64 token ids"):
        token_batch(graph)


def test_token_types_are_not_token_ids() -> None:
    graph = model_graph(small_bert(), dict.fromkeys(("input_ids", "token_type_ids", "labels"), IDS))
    assert vocabulary_of(graph) == 256
    assert token_batch(graph).made["token_type_ids"] == "torch.zeros_like(ids)"
    report = autopar.verify(
        plain_plan(graph), small_bert(), dict.fromkeys(("input_ids", "token_type_ids", "labels"), IDS)
    )
    assert report.worst[1] < 1e-10


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_masked_tokens(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (400, 40), generator=generator)
    shown, chosen = mask_tokens(ids, list(range(400)), 7, share, 99, 90)
    assert chosen.sum(1).tolist() == [round(40 * share)] * 400
    assert torch.equal(shown[~chosen], ids[~chosen])
    masked, same = (shown[chosen] == 99).double().mean().item(), (shown == ids)[chosen].double().mean().item()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1 + 0.1 / 90, abs=0.03)
    assert chosen.double().mean(0).amin() > share / 2, "every position has its turn"
    assert mask_tokens(ids[:1, :2], [0], 7, share, 99, 90)[1].any(), "one at least"


def test_masks_belong_to_the_sample() -> None:
    """Whatever the step, the rank and the micro-batch that it is in; a later epoch of it is another sample."""
    ids = torch.arange(40).repeat(6, 1)
    whole = mask_tokens(ids, [4, 5, 6, 7, 8, 9], 1, 0.3, 99, 90)
    part = mask_tokens(ids[:2], [8, 5], 1, 0.3, 99, 90)
    for all_rows, some in zip(whole, part, strict=True):
        assert torch.equal(all_rows[[4, 1]], some)
    assert len({tuple(row) for row in whole[1].tolist()}) == 6
    assert not torch.equal(mask_tokens(ids, [4, 5, 6, 7, 8, 9], 2, 0.3, 99, 90)[1], whole[1])


def emitted(model: nn.Module, folder: Path, keys: str = "") -> ModuleType:
    graph = model_graph(model, dict.fromkeys(keys.split(), IDS)) if keys else model_graph(model)
    emit(plain_plan(graph), graph, folder)
    return load_train(folder)


def test_batches_of_the_emitted_script(tmp_path: Path) -> None:
    ids, indices = torch.randint(0, 200, (3, 16), generator=torch.Generator().manual_seed(0)), [3, 4, 5]
    train = emitted(small_bert(), tmp_path / "bert")
    assert train.MASK_ID == 255
    batch = train.make_batch(ids, indices, 0)
    shown, chosen = mask_tokens(ids, indices, 0, 0.15, 255, 256)
    assert torch.equal(batch["input_ids"], shown)
    assert torch.equal(batch["labels"], torch.where(chosen, ids, -100))

    batch = emitted(small_t5(), tmp_path / "t5").make_batch(ids, indices, 0)
    assert torch.equal(batch["input_ids"], mask_tokens(ids, indices, 0, 0.3, 255, 256)[0])
    assert torch.equal(batch["labels"], ids)

    train = emitted(small_t5(), tmp_path / "t5_ids", "input_ids decoder_input_ids labels")
    batch = train.make_batch(ids, indices, 0)
    assert torch.equal(batch["decoder_input_ids"][:, 1:], ids[:, :-1])
    assert batch["decoder_input_ids"][:, 0].tolist() == [train.START_ID] * 3

    assert list(emitted(small_gpt2(), tmp_path / "gpt2").make_batch(ids)) == ["input_ids", "labels"]
    told = {name: (tmp_path / name / "README.md").read_text() for name in ("bert", "t5", "gpt2")}
    assert "it learns masked tokens: 15% of each sample. Set `MASK_ID`" in told["bert"]
    assert "The encoder reads samples with 30% of their tokens masked" in told["t5"]
    assert "learns the next token at every position" in told["gpt2"]


@pytest.mark.proof
@pytest.mark.parametrize("build", [small_bert, small_t5])
def test_one_and_two_ranks_learn_the_same(build, tmp_path: Path) -> None:
    model = build()
    graph = model_graph(model)
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    job = autopar.Job(global_batch=16, seq_len=16, dtype="fp32")
    emit(plain_plan(graph, job=job, micro_batches=2, cluster="1x1:cpu"), graph, tmp_path / "one", model.state_dict())
    emit(plain_plan(graph, dp=2, zero=3, job=job, cluster="1x2:cpu"), graph, tmp_path / "two", model.state_dict())
    options = ["--data", "corpus.txt", "--token-dtype", "uint8", "--steps", "20", "--lr", "3e-3", "--warmup", "2"]
    losses = {}
    for name, ranks in (("one", 1), ("two", 2)):
        run_ranks([f"{name}/train.py", *options, "--metrics", f"{name}.jsonl"], ranks, 600, folder=tmp_path)
        losses[name] = [json.loads(line)["loss"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert len(losses["one"]) == 20
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-5)
    assert all(math.isfinite(loss) for loss in losses["one"])
    assert sum(losses["one"][-4:]) < 0.8 * sum(losses["one"][:4])
