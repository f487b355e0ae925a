"""MODEL strings, the catalog of architectures, and the cache of traced graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from autopar.errors import BadInputError
from autopar.graph.cache import _held, cache_dir
from autopar.models import ARCHITECTURES, build_config, catalog_names, load, load_model, model_graph

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}

# Parameter counts as published with the models (model cards; GPT-2: the released checkpoints).
PARAMETERS = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3": 671_026_404_352,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path / "cache"))


def cached_files() -> list[Path]:
    return sorted((cache_dir() / "graphs").glob("*"))


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SMALL))
    return path


def test_catalog_has_the_published_models():
    assert set(catalog_names()) == set(PARAMETERS)
    for name, count in PARAMETERS.items():
        model = load_model(name)
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        assert yaml.safe_load((ARCHITECTURES / f"{name}.yaml").read_text())["source"].startswith(
            "https://huggingface.co/"
        )


def test_config_file_and_its_folder(config):
    model = load_model(str(config))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert load(str(config.parent)).name == load(str(config)).name == "small"
    assert build_config(str(config), num_hidden_layers=5).config.num_hidden_layers == 5


def test_a_configuration_file_as_transformers_writes_it(tmp_path):
    path = tmp_path / "state_space.json"
    path.write_text(transformers.Mamba2Config(num_heads=4, head_dim=8, hidden_size=16).to_json_string(use_diff=False))
    assert '"__float__": "Infinity"' in path.read_text()
    assert load_model(str(path)).config.time_step_limit[1] == float("inf")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("llama3-8", r"unknown model 'llama3-8': did you mean llama3-8b or .*\? A model is a catalog name"),
        ("zzz", r"unknown model 'zzz': A model is"),
        ("nowhere/config.json", r"cannot read .*config.json: No such file"),
        ("nowhere.py:f", r"no file nowhere.py"),
    ],
)
def test_unknown_models(spec, message):
    with pytest.raises(BadInputError, match=message):
        model_graph(spec)


def test_bad_config_files(tmp_path):
    path = tmp_path / "config.json"
    for text, message in [
        ("{", "is not JSON"),
        ("[]", "no model_type"),
        ('{"model_type": "nothing"}', "transformers cannot build"),
        ('{"model_type": "llama", "hidden_size": "many"}', "transformers cannot build"),
    ]:
        path.write_text(text)
        with pytest.raises(BadInputError, match=message):
            load_model(str(path))


MODULE = """
import torch
import transformers
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, WIDTH)
    def forward(self, x):
        return self.linear(x)

WIDTH = 3

def loss(y, batch):
    return y.square().mean()

def net():
    return Net(), {"x": torch.zeros(4)}, loss

def bare():
    return Net()

def number():
    return 5

def broken():
    raise RuntimeError("no luck")
"""


def test_python_functions(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    graph = model_graph(f"{path}:net")
    assert graph.name == "net"
    assert graph.parameters["linear.weight"].shape == (3, 4)
    path.write_text(MODULE.replace("WIDTH = 3", "WIDTH = 5"))
    assert model_graph(f"{path}:net").parameters["linear.weight"].shape == (5, 4)
    assert model_graph(f"{path}:bare", inputs={"x": torch.zeros(4)}, loss=load(f"{path}:net").loss).name == "bare"
    for function, message in [
        ("number", "must return"),
        ("broken", "failed: RuntimeError: no luck"),
        ("nix", "no function"),
    ]:
        with pytest.raises(BadInputError, match=message):
            load_model(f"{path}:{function}")
    assert cached_files() == []


def test_cache_holds_what_tracing_gave(config):
    first = model_graph(str(config))
    (file,) = cached_files()
    written = file.stat().st_mtime_ns
    assert model_graph(str(config)) == first
    assert cached_files() == [file]
    assert file.stat().st_mtime_ns == written


def test_cache_key_follows_the_content(config):
    model_graph(str(config))
    config.write_text(json.dumps({**SMALL, "intermediate_size": 40}))
    assert model_graph(str(config)).parameters["model.layers.0.mlp.up_proj.weight"].shape == (40, 16)
    assert len(cached_files()) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', '{"version": -1}'])
def test_corrupt_cache_is_traced_again(config, text):
    first = model_graph(str(config))
    (file,) = cached_files()
    file.write_text(text)
    _held.clear()  # as in another process
    assert model_graph(str(config)) == first
    assert json.loads(file.read_text())["version"] == 2


def test_cache_that_cannot_be_written_is_done_without(config, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("AUTOPAR_CACHE", str(blocked))
    assert len(model_graph(str(config)).blocks) == 4


def test_cached_model_needs_no_transformers(config):
    model_graph(str(config))
    code = f"""
        import sys
        from autopar.models import model_graph
        graph = model_graph({str(config)!r})
        assert len(graph.blocks) == 4
        assert "transformers" not in sys.modules and "torch.export" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env={**os.environ}, timeout=60)


def test_missing_transformers_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInputError, match=r"pip install autopar\[hf\]"):
        model_graph(str(config))


def test_transformers_gives_no_advice_while_tracing(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path))
    import transformers

    transformers.logging.set_verbosity_warning()
    model_graph("gpt2")
    assert capfd.readouterr().err == ""
