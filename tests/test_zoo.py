"""The zoo: inputs derived from a model, one model's trouble kept from the others, and what its architectures taught."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import zoo  # noqa: E402
from zoo_inputs import NoInputsError, example_of, examples_of, squared  # noqa: E402
from zoo_pool import run_pool  # noqa: E402

from autopar.cluster import Cluster  # noqa: E402
from autopar.codegen.random_batches import random_batch  # noqa: E402
from autopar.codegen.verify import verify  # noqa: E402
from autopar.graph.ir import ModelGraph  # noqa: E402
from autopar.job import Job  # noqa: E402
from autopar.models import model_graph  # noqa: E402
from autopar.solver.fix import parse_fix  # noqa: E402
from autopar.solver.search import search  # noqa: E402

ZOO = zoo.load_zoo(BENCHMARKS / "zoo_models.py")


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in example_of(zoo.build(ZOO[name])).inputs.items()}


def test_inputs_follow_from_the_architecture():
    assert shapes("llama") == {"input_ids": (32,), "labels": (32,)}
    assert shapes("bert") == {"input_ids": (32,), "attention_mask": (32,), "labels": (32,)}
    assert shapes("bart") == {"input_ids": (32,), "attention_mask": (32,), "labels": (32,)}
    assert shapes("whisper") == {"input_features": (8, 64), "labels": (32,)}
    assert shapes("vit") == {"pixel_values": (3, 16, 16), "labels": ()}


def test_a_model_without_a_loss_gets_one_and_one_of_other_data_a_message():
    bare = example_of(zoo.build(("BertConfig", ZOO["bert"][1], None)))
    assert bare.loss is not None
    assert set(bare.inputs) == {"input_ids", "attention_mask"}

    class Strange(nn.Module):
        config = zoo.build(ZOO["llama"]).config

        def forward(self, spins: torch.Tensor) -> torch.Tensor:
            return spins

    with pytest.raises(NoInputsError, match=r"Strange\.forward takes spins"):
        example_of(Strange())


def test_one_model_cannot_stop_the_others(tmp_path, capsys):
    configs = tmp_path / "some.py"
    configs.write_text(
        "import os\n"
        "class Dies:\n"
        "    def keys(self): os._exit(7)\n"
        "ZOO = {\n"
        "    'dies': ('LlamaConfig', Dies(), None),\n"
        "    'unknown': ('NoSuchConfig', {}, None),\n"
        f"    'small': ('LlamaConfig', {ZOO['llama'][1] | {'num_hidden_layers': 2}!r}, 'AutoModelForCausalLM'),\n"
        "}\n"
    )
    out = tmp_path / "out.json"
    status = zoo.main(["--configs", str(configs), "--ranks", "2", "--plans", "tp,cp", "--json", str(out)])
    models = json.loads(out.read_text())["models"]
    assert status == 1
    assert models["dies"]["status"] == models["unknown"]["status"] == "failed"
    assert "exit status 7" in models["dies"]["message"]
    assert "NoSuchConfig" in models["unknown"]["message"]
    assert models["small"]["status"] == "ok"
    assert models["small"]["no_rule"] == []
    assert models["small"]["plans"].keys() == {"tp", "cp"}
    assert all(error < 1e-12 for error in models["small"]["plans"].values())
    assert "2 failed" in capsys.readouterr().out


def test_a_model_ended_at_its_limit_keeps_what_it_found():
    def found(tell):
        result = zoo.Result(nodes=3, plans={"dp": 1e-15}, doing="in plan tp")
        tell(result)
        time.sleep(60)

    def dies(tell):
        tell(zoo.Result(doing="while it was traced"))
        os._exit(7)

    def ends(tell):
        tell("its result")

    begin = time.monotonic()
    ended = dict(run_pool({"found": found, "dies": dies, "ends": ends}, jobs=2, limit=3.0))
    assert time.monotonic() - begin < 30
    assert ended["found"].why == "ended after 3 s"
    assert ended["found"].last.plans == {"dp": 1e-15}
    assert ended["dies"].why == "its process died (exit status 7)"
    assert ended["dies"].last.doing == "while it was traced"
    assert (ended["ends"].last, ended["ends"].why) == ("its result", "")


def test_no_task_outlives_its_pool(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from zoo_pool import run_pool\n"
        "def waits(tell):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "list(run_pool({'waits': waits}, 1, 60.0))\n"
    )
    pool = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert pool.stdout is not None
    task = int(pool.stdout.readline())
    pool.terminate()
    assert pool.wait(timeout=30) == 128 + signal.SIGTERM
    pool.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.kill(task, 0)


def test_the_row_of_a_model_ended_at_its_limit_says_what_was_kept(monkeypatch):
    def slow(entry, ranks, only, tell):
        tell(zoo.Result(plans={"dp": 1e-15, "zero3": 1e-15}, doing="in plan tp"))
        time.sleep(60)

    monkeypatch.setattr(zoo, "_examine_and_tell", slow)
    entry = ("LlamaConfig", {}, None)
    ((name, result),) = zoo.run_models({"slow": entry}, (4,), (), limit=2.0, jobs=1)
    assert (name, result.status) == ("slow", "failed")
    assert result.message == "ended after 2 s in plan tp; kept: dp, zero3"
    assert result.to_json()["plans"] == {"dp": 1e-15, "zero3": 1e-15}


def traced(name: str) -> ModelGraph:
    model = zoo.build(ZOO[name])
    example = example_of(model)
    return model_graph(model, example.inputs, example.loss)


PLANS = {
    "qwen2": ["tp", "tp+sp", "search"],
    "mixtral": ["ep"],
    "t5": ["cp", "pp"],
    "mamba2": ["zero3"],
    "resnet": ["dp"],
}
"""A part of `make zoo` that continuous integration runs: every kind of plan once, on models that differ most."""


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_a_few_architectures_compute_the_same(name):
    result = zoo.examine(ZOO[name], (4,), PLANS[name])
    assert (result.status, result.no_rule, result.message) == ("ok", [], "")
    assert list(result.plans) == PLANS[name]
    assert result.worst is not None
    assert result.worst < 1e-10


def test_a_model_that_can_have_no_plan_is_not_ok():
    result = zoo.examine(ZOO["resnet"], (4,), ["cp"])
    assert result.status == "unsupported"
    assert "traced for one sequence length only" in result.message


def test_constants_are_those_of_one_sample():
    """Masks of sliding windows, ALiBi repeated for (batch x heads), positions: all built at the batch size."""
    for name in ("mistral", "bloom", "opt"):
        graph = traced(name)
        metas = [graph.constants.nodes[output].meta for output in graph.constants.outputs]
        assert metas
        assert not any("b" in str(size) for meta in metas for size in meta.shape)


def test_masks_of_layers_that_differ_are_each_split():
    """Gemma 2: layers of one kind read one of two masks, and the first block reads a table before any activation."""
    name, arguments, head = ZOO["gemma2"]
    model = zoo.build((name, {**arguments, "num_hidden_layers": 2}, head))
    example = example_of(model)
    graph = model_graph(model, example.inputs, example.loss)
    plan = search(graph, Job(2, example.seq), Cluster.parse("1x2:h100"), parse_fix({"cp": 2}))
    assert verify(plan, model, example.inputs, graph=graph).worst[1] < 1e-12


def test_targets_are_drawn_from_the_classes_there_are():
    """A classifier of few classes over many tokens: labels are classes, not tokens."""
    name, arguments, _ = ZOO["bert"]
    model = zoo.build(
        (name, {**arguments, "num_hidden_layers": 2, "num_labels": 3}, "AutoModelForSequenceClassification")
    )
    example = example_of(model)
    graph = model_graph(model, example.inputs, example.loss)
    batch = random_batch(graph, example.inputs, 64, example.seq, torch.float64, 0)
    assert set(batch["labels"].tolist()) <= {0, 1, 2, -100}
    assert len(batch["labels"].unique()) > 2


def test_placeholders_stay_where_they_are():
    """Images are put where their token is: a batch that is drawn must have it there, and nowhere else."""
    model = zoo.build(ZOO["llava"])
    example = example_of(model)
    graph = model_graph(model, example.inputs, example.loss)
    batch = random_batch(graph, example.inputs, 4, example.seq, torch.float64, 0)
    marked = example.inputs["input_ids"] == 63
    assert marked.sum() == 16
    assert torch.equal(batch["input_ids"] == 63, marked.expand(4, -1))


def test_inputs_of_other_kinds_of_data():
    assert shapes("decision_transformer") == {
        "states": (32, 5),
        "actions": (32, 3),
        "rewards": (32, 1),
        "returns_to_go": (32, 1),
        "timesteps": (32,),
    }
    assert shapes("wav2vec2")["labels"] == (32,)  # of a CTC loss
    assert shapes("bert_answers").keys() == {"input_ids", "attention_mask", "start_positions", "end_positions"}
    video = {**ZOO["vit"][1], "num_frames": 4, "tubelet_size": [2, 4, 4]}
    made = example_of(zoo.build(("VivitConfig", video, "AutoModelForVideoClassification"))).inputs
    assert made["pixel_values"].shape == (4, 3, 16, 16)
    boxed = example_of(zoo.build(("LayoutLMConfig", ZOO["bert"][1], "AutoModelForMaskedLM"))).inputs["bbox"]
    assert boxed.shape == (32, 4)
    assert bool((boxed[:, :2] <= boxed[:, 2:]).all())


def test_inputs_of_codes_patches_and_noise():
    width = {"hidden_size": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2, "num_attention_heads": 2}
    parts = {
        "text_config": {**width, "num_layers": 1, "vocab_size": 64},
        "vision_config": {**width, "num_hidden_layers": 1, "patch_embed_hidden_size": 12, "seq_len": 16},
    }
    model = zoo.build(("Pix2StructConfig", parts, "AutoModelForImageTextToText"))
    patches = example_of(model).inputs["flattened_patches"]
    assert patches.shape == (9, 14)
    assert 0 <= patches.min() <= patches.max() < 16  # whatever is drawn of them is a row
    decoder = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    special = {"num_codebooks": 2, "pad_token_id": 64, "bos_token_id": 64}
    sung = zoo.build(("MusicgenDecoderConfig", {**decoder, **special}, "MusicgenForCausalLM"))
    example = example_of(sung)
    assert {key: tuple(value.shape) for key, value in example.inputs.items()} == {"labels": (32, 2)}
    assert example.loss is None
    sizes = {"model_in_channels": 8, "model_hidden_channels": 8, "kernel_predictor_hidden_channels": 8}
    sizes |= {"num_mel_bins": 16, "resblock_stride_sizes": [2, 2, 2]}
    voice = example_of(zoo.build(("UnivNetConfig", sizes, None))).inputs
    assert voice["noise_sequence"].shape == (len(voice["input_features"]), 8)


def test_images_go_with_text_of_another_length_before_text_alone():
    """A length that is also the image's is passed over; text of that length alone comes after all with images."""
    vision = {**ZOO["vit"][1], "image_size": 32}
    made = {"text_config": ZOO["bert"][1], "image_config": vision, "multimodal_config": ZOO["bert"][1]}
    book = {"hidden_size": 16, "vocab_size": 64, "num_blocks_per_group": 1}
    sizes = {"hidden_size": 64, "projection_dim": 32, "image_codebook_config": book}
    kinds = [set(example.inputs) for example in examples_of(zoo.build(("FlavaConfig", {**made, **sizes}, None)))]
    assert "pixel_values" in kinds[0]
    assert "pixel_values" not in kinds[-1]


def test_one_number_for_each_sample_is_no_output():
    """It may be a loss, of the whole batch."""

    class Codec(nn.Module):
        def forward(self, x):
            return x.mean().expand(len(x)), x * 2

    x = torch.zeros(2, 3)
    assert squared(Codec(), {"x": x[0]}, Codec()(x))(Codec()(x + 1.0), {}) == 2.25


def test_answers_are_not_where_a_mask_hides_them():
    """There scores are as low as a number can be, and the loss infinite."""
    name, arguments, _ = ZOO["bert"]
    model = zoo.build((name, {**arguments, "num_hidden_layers": 2}, "AutoModelForQuestionAnswering"))
    example = example_of(model)
    graph = model_graph(model, example.inputs, example.loss)
    batch = random_batch(graph, example.inputs, 64, example.seq, torch.float64, 0)
    for ends in ("start_positions", "end_positions"):
        assert batch["attention_mask"].gather(1, batch[ends][:, None]).all()


def test_text_alone_where_a_model_cannot_be_traced_with_images(monkeypatch):
    def refusing(model, inputs, loss):
        if "pixel_values" in inputs:
            raise zoo.AutoparError("images are beyond it")
        return inputs

    monkeypatch.setattr(zoo, "trace", refusing)
    result = zoo.Result()
    example, traced_with = zoo._traced(zoo.build(ZOO["llava"]), result)
    assert traced_with is example.inputs
    assert "pixel_values" not in example.inputs
    assert result.message == "with input_ids, labels alone; with more: images are beyond it"
