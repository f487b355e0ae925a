"""Clusters: parsing, files, round trips, refusals, and the catalog's sources."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from autopar.catalog.devices_file import FOLDER, device_names, figures_of, load_group, read_device
from autopar.cluster import LINK_FIGURES, Cluster, Device, Link
from autopar.errors import BadInputError

CATALOG = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def contents(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def test_parse():
    cluster = Cluster.parse("8x4:h100")
    assert (cluster.nodes, cluster.devices_per_node, cluster.devices) == (8, 4, 32)
    assert (cluster.device.name, str(cluster)) == ("h100", "8x4:h100")
    assert cluster == Cluster.parse(" 8 X 4 : h100 ")
    assert hash(cluster) == hash(Cluster.parse("8x4:h100"))
    assert Cluster.parse("2x8:h100+6x8:h100") == Cluster.parse("8x8:h100")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8:h100", ["'8:h100'", "NODESxDEVICES_PER_NODE:DEVICE"]),
        ("h100", ["'h100'", "8x8:h100"]),
        ("", ["''"]),
        ("8x8:h900", ["'h900'", "a100-80g", "cpu", "h100"]),
        ("0x8:h100", ["'0x8:h100'", "0 nodes"]),
        ("8x-1:h100", ["'8x-1:h100'", "-1 devices"]),
        ("4x8:h100+4x8:a100-80g", ["'h100'", "'a100-80g'", "mixes"]),
        ("4x8:h100+4x4:h100", ["4x8:h100", "4x4:h100", "devices_per_node"]),
    ],
)
def test_parse_refuses(text, says):
    with pytest.raises(BadInputError) as error:
        Cluster.parse(text)
    assert all(part in str(error.value) for part in says)


@pytest.mark.parametrize("name", CATALOG)
def test_json_carries_every_figure(name, monkeypatch):
    cluster = Cluster.parse(f"2x8:{name}")
    text = json.dumps(cluster.to_json())
    monkeypatch.setattr("autopar.catalog.devices_file.FOLDER", None)  # a plan must not need the catalog again
    assert Cluster.from_json(json.loads(text)) == cluster


@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
def test_file_round_trip(tmp_path, suffix):
    cluster = Cluster.parse("2x8:h100").with_links(inter_node=Link(1e9, 1e-5, 0.5, 4))
    path = tmp_path / f"cluster.{suffix}"
    cluster.save(path)
    assert Cluster.load(path) == cluster


TOML = """
device = "h100"
nodes = 2
devices_per_node = 4
memory_bytes = 60e9
[inter_node]
bandwidth = 25e9
shared_by = 2
"""


def test_file_overrides(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    cluster = Cluster.load(path)
    plain = Cluster.parse("2x4:h100")
    assert (cluster.devices, cluster.device.memory_bytes) == (8, 60_000_000_000)
    assert cluster.inter_node.device_bandwidth == pytest.approx(25e9 * plain.inter_node.efficiency / 2)
    assert cluster.inter_node.latency_s == plain.inter_node.latency_s
    assert cluster.intra_node == plain.intra_node
    assert cluster.inter_node.sources["bandwidth"] == cluster.device.sources["memory_bytes"] == "cluster file mine.toml"
    assert cluster.inter_node.sources["latency_s"] == plain.inter_node.sources["latency_s"]


def test_file_formats_agree(tmp_path):
    (tmp_path / "c.toml").write_text(TOML)
    (tmp_path / "c.yaml").write_text(
        "device: h100\nnodes: 2\ndevices_per_node: 4\nmemory_bytes: 60e9\ninter_node: {bandwidth: 25e9, shared_by: 2}\n"
    )
    one, two = (Cluster.load(tmp_path / name) for name in ("c.toml", "c.yaml"))
    assert one.inter_node.device_bandwidth == two.inter_node.device_bandwidth
    assert one.device.memory_bytes == two.device.memory_bytes


OWN = json.dumps({"device": load_group("h100", 1, 8).device.to_json(), "nodes": 1, "devices_per_node": 2})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", 'device = "h100"\nnodes = 2\n', ["a.toml", "'devices_per_node' is missing"]),
        ("a.toml", TOML + "bandwith = 3\n", ["unknown key 'inter_node.bandwith'", "bandwidth"]),
        ("a.toml", "cores = 3\n" + TOML, ["unknown key 'cores'", "devices_per_node"]),
        ("a.toml", TOML.replace("nodes = 2", 'nodes = "two"'), ["'nodes'", "'two'"]),
        ("a.toml", TOML.replace("nodes = 2", "nodes = 0"), ["'nodes'", "0"]),
        ("a.toml", TOML.replace("25e9", "-1"), ["a.toml", "bandwidth", "-1"]),
        ("a.toml", TOML.replace("60e9", "1e9"), ["a.toml", "memory_bytes", "reserve_bytes"]),
        ("a.toml", TOML.replace("h100", "h101"), ["a.toml", "'h101'", "h100"]),
        ("a.toml", "device = [", ["a.toml", "TOML"]),
        ("a.yaml", "device: [", ["a.yaml", "YAML"]),
        ("a.json", "{", ["a.json", "JSON"]),
        ("a.json", "[]", ["a.json", "devices_per_node"]),
        ("a.json", '{"groups": []}', ["a.json", "no nodes"]),
        ("a.json", OWN, ["a.json", "'intra_node.bandwidth' is missing"]),
        ("a.json", OWN.replace('"backend"', '"bakend"'), ["a.json", "unknown key 'device.bakend'", "backend"]),
        ("a.json", OWN.replace('"cuda"', '"tpu"'), ["a.json", "unknown backend 'tpu'"]),
        ("a.ini", "x", ["a.ini: unknown format '.ini'", ".toml, .yaml or .json"]),
    ],
)
def test_file_refuses(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadInputError) as error:
        Cluster.load(path)
    assert all(part in str(error.value) for part in says), error.value


def test_missing_file(tmp_path):
    with pytest.raises(BadInputError, match=r"none\.toml.*No such file"):
        Cluster.load(tmp_path / "none.toml")
    with pytest.raises(BadInputError, match=r"\.ini.*\.toml"):
        Cluster.parse("1x1:h100").save(tmp_path / "c.ini")


def test_groups_must_be_alike():
    nodes = load_group("h100", 1, 8)
    with pytest.raises(BadInputError, match="nodes must be a positive integer, not 0"):
        replace(nodes, nodes=0)
    with pytest.raises(BadInputError, match="no nodes"):
        Cluster(())
    with pytest.raises(BadInputError, match="differ in inter_node"):
        Cluster((nodes, replace(nodes, inter_node=Link(1e9, 0.0))))
    with pytest.raises(BadInputError, match="differ in figures of the device"):
        Cluster((nodes, replace(nodes, device=replace(nodes.device, launch_s=1e-6))))


@pytest.mark.parametrize("field", ["memory_bandwidth", "processors", "matmul_efficiency"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "7", True])
def test_device_figures_are_positive(field, value):
    data = load_group("h100", 1, 8).device.to_json()
    with pytest.raises(BadInputError, match=f"h100.*{field}"):
        Device.from_json({**data, field: value})


def test_peak_names_dtypes():
    device = load_group("h100", 1, 8).device
    assert device.peak("bf16") == pytest.approx(989.4e12)
    with pytest.raises(BadInputError, match=r"h100.*fp64.*bf16"):
        device.peak("fp64")


def test_peaks_below_16_bits():
    peaks = {name: load_group(name, 1, 8).device.peak_flops for name in CATALOG}
    with_fp8 = {name for name in CATALOG if "fp8" in peaks[name]}
    assert {"h100", "h200", "b200", "gb300"} <= with_fp8
    assert all(peaks[name]["fp8"] == pytest.approx(2 * peaks[name]["bf16"], rel=0.03) for name in with_fp8)
    assert all(peaks[name]["fp4"] > 1.9 * peaks[name]["fp8"] for name in CATALOG if "fp4" in peaks[name])
    assert load_group("a100-80g", 1, 8).device.peak_flops.keys() == {"bf16", "fp16", "fp32"}
    with pytest.raises(BadInputError, match=r"a100-40g.*no fp8 matmul rate.*bf16.*another device"):
        load_group("a100-40g", 1, 8).device.peak("fp8")


def test_v100_has_no_bf16():
    device = load_group("v100-32g", 1, 8).device
    assert device.peak("fp16") == pytest.approx(125e12)
    with pytest.raises(BadInputError, match=r"v100-32g.*no bf16 matmul rate; it has fp16, fp32 \(choose one of these"):
        device.peak("bf16")


def test_links_without_nvlink_are_slower():
    """Cards on PCIe share 32 GB/s each way with their host; NVLink and Infinity Fabric move more."""
    inside = {name: load_group(name, 1, 8).intra_node.bandwidth for name in CATALOG}
    assert {name for name, bandwidth in inside.items() if bandwidth <= 64e9} == {"l4", "l40s", "rtx4090"}


def test_peaks_of_unknown_dtypes_are_refused(tmp_path):
    saved = tmp_path / "mine.json"
    Cluster.parse("1x8:b200").save(saved)
    assert Cluster.load(saved) == Cluster.parse("1x8:b200")
    saved.write_text(saved.read_text().replace('"fp8"', '"float8"'))
    with pytest.raises(BadInputError, match=r"mine\.json.*peak_flops.*unknown dtype 'float8'.*bf16, fp16, fp8"):
        Cluster.load(saved)


@pytest.mark.parametrize("name", CATALOG)
def test_every_figure_has_a_source(name):
    nodes = load_group(name, 1, 8)
    figures = figures_of(contents(name))
    links = {f"{tier}.{key}" for tier in ("intra_node", "inter_node") for key in getattr(nodes, tier).sources}
    assert set(figures) == {*nodes.device.sources, *links}
    assert all(f"{tier}.{key}" in links for tier in ("intra_node", "inter_node") for key in LINK_FIGURES)
    for field in Device.__dataclass_fields__:
        if field in ("name", "title", "backend", "origin", "sources", "measured", "matmul_efficiencies"):
            continue
        keys = [key for key in figures if key == field or key.startswith(field + ".")]
        assert keys, f"{field} of {name} has no figure"
    for key, figure in figures.items():
        assert len(figure["source"]) > 20, key
        if figure["source"].startswith("model constant"):
            assert figure["low"] <= figure["value"] <= figure["high"], key


def test_matmuls_of_a_dtype_have_an_efficiency_of_their_own():
    device = load_group("gb200", 1, 8).device
    assert device.sustained("fp8") == device.peak("fp8") * device.matmul_efficiencies["fp8"]
    assert device.sustained("bf16") == device.peak("bf16") * device.matmul_efficiency
    assert Device.from_json(device.to_json()) == device
    with pytest.raises(BadInputError, match=r"matmul_efficiencies\.fp8"):
        replace(device, matmul_efficiencies={"fp8": 0.0})


def test_sustained_rates_of_a_chip_grow_with_its_power():
    """The catalog's Blackwells are one chip: what one held is taken by watt for the others."""
    devices = [load_group(name, 1, 8).device for name in ("b200", "b300", "gb200", "gb300")]
    for dtype in ("bf16", "fp8", "fp4"):
        each = [device.sustained(dtype) / device.power_w for device in devices]
        assert max(each) == pytest.approx(min(each), rel=0.005)


def test_catalog_refuses_unsourced_and_implausible():
    for change, says in (
        ({"source": ""}, "launch_s: no source"),
        ({"value": 1.0}, "launch_s: 1.0 is outside"),
        ({"value": "4e6"}, "launch_s: '4e6' is not a number"),
        ({"unit": "s"}, "launch_s: unknown entry 'unit'"),
    ):
        data = contents("h100")
        data["launch_s"].update(change)
        with pytest.raises(BadInputError, match=says):
            read_device("h100", data)


def test_names_and_order():
    assert "cpu" in device_names()
    assert list(device_names()) == sorted(device_names())


def test_parsing_needs_no_torch():
    code = "import sys; from autopar.cluster import Cluster; Cluster.parse('8x8:h100'); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
