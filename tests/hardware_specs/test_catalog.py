"""Finding hardware by name, cluster files of users, and clusters written into plans."""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright.hardware_specs as package
from meshwright.errors import SpecError
from meshwright.hardware_specs import (
    ClusterSpec,
    cluster_from_section,
    cluster_to_mapping,
    dump_yaml,
    exact_quantity,
    list_specs,
    load_cluster,
    load_gpu,
    load_node,
    parse_yaml,
    resolve_cluster,
)
from meshwright.units import parse_quantity

# The ids of the tables of measured runs, each with its spec.
TABLE_IDS = {
    "V100-32GB-SXM2": "v100-sxm2-32",
    "A100-40GB-SXM": "a100-sxm-40",
    "A100-80GB-SXM": "a100-sxm-80",
    "A100-80GB-PCIe": "a100-pcie-80",
    "A800-80GB": "a800-sxm-80",
    "H100-80GB-SXM": "h100-sxm-80",
    "H100-96GB-HBM2e-500W": "h100-sxm-96-hbm2e",
    "H800-80GB-SXM": "h800-sxm-80",
    "H200-141GB-SXM": "h200-sxm-141",
    "B200": "b200-sxm-180",
    "B300": "b300-sxm-270",
    "GB200": "gb200",
    "GB300": "gb300",
    "MI250X-GCD-64GB": "mi250x-gcd",
    "MI300X": "mi300x",
    "MI325X": "mi325x",
    "MI355X": "mi355x",
}
SHORT_NAMES = {
    "h100": "h100-sxm-80",
    "h100_sxm": "h100-sxm-80",
    "A100": "a100-sxm-80",
    "a100_sxm": "a100-sxm-80",
    "V100": "v100-sxm2-32",
    "NVIDIA H100 80GB HBM3": "h100-sxm-80",
    " h200 ": "h200-sxm-141",
    "4090": "rtx-4090",
}
CUSTOM = """\
node:
  gpu: h100-sxm-80
  num_gpus: 4
  topology: switch
  nic: {kind: roce, bandwidth: 200 Gbit/s, latency: 4 us}
  num_nics: 4
count: 16
"""
# (cluster file, the whole message after "c.yaml:")
BAD_CLUSTERS = {
    "no node": ("count: 8", "1: node: is required but missing"),
    "unknown node": (
        "node: dgx-h1OO\ncount: 8",
        "1: node: unknown node 'dgx-h1OO'; did you mean 'dgx-h100'? Run 'meshwright specs list' for all.",
    ),
    "unknown gpu": (
        CUSTOM.replace("h100-sxm-80", "h10O"),
        "2: node.gpu: unknown GPU 'h10O'; did you mean 'h100'? Run 'meshwright specs list' for all.",
    ),
    "unlike any gpu": (
        CUSTOM.replace("h100-sxm-80", "zzzzz"),
        "2: node.gpu: unknown GPU 'zzzzz'. Run 'meshwright specs list' for all.",
    ),
    "unknown fabric": (
        "node: dgx-h100\nfabric: infinband-ndr",
        "2: fabric: unknown fabric 'infinband-ndr'; did you mean 'infiniband-ndr'? Run 'meshwright specs list' for all.",
    ),
    "unknown preset": (
        "preset: selenee",
        "1: preset: unknown cluster 'selenee'; did you mean 'selene'? Run 'meshwright specs list' for all.",
    ),
    "preset and node": (
        "preset: selene\nnode: dgx-h100",
        "2: node: is given beside 'preset'; keep one of the two",
    ),
    "no nodes": ("node: dgx-h100\ncount: 0", "2: count: must be at least 1, not 0"),
    "negative nodes": ("node: dgx-h100\ncount: -3", "2: count: must be at least 1, not -3"),
    "absurd nodes": ("node: dgx-h100\ncount: 99999999", "2: count: must be at most 1000000, not 99999999"),
    "half a node": ("node: dgx-h100\ncount: 1.5", "2: count: expected a whole number, got the number 1.5"),
    "nan nodes": ("node: dgx-h100\ncount: .nan", "2: count: .nan is not a finite number"),
    "unknown key": ("node: dgx-h100\ncuont: 8", "2: cuont: unknown key; did you mean 'count'?"),
    "schema of the future": (
        "schema_version: 9\nnode: dgx-h100",
        "1: schema_version: this version reads schema 1, not 9",
    ),
    "zero bandwidth": (
        CUSTOM.replace("200 Gbit/s", "0 Gbit/s"),
        "5: node.nic.bandwidth: must be above zero",
    ),
    "negative bandwidth": (
        CUSTOM.replace("200 Gbit/s", "-5 Gbit/s"),
        "5: node.nic.bandwidth: '-5 Gbit/s' must be a finite quantity, not negative",
    ),
    "infinite bandwidth": (
        CUSTOM.replace("200 Gbit/s", "1e400 Gbit/s"),
        "5: node.nic.bandwidth: '1e400 Gbit/s' must be a finite quantity, not negative",
    ),
    "missing unit": (
        CUSTOM.replace("200 Gbit/s", "200"),
        "5: node.nic.bandwidth: '200' has no unit; write for example '3.35 TB/s or 400 Gbit/s'",
    ),
    "missing latency": (
        CUSTOM.replace(", latency: 4 us", ""),
        "5: node.nic.latency: is required but missing",
    ),
    "unknown topology": (
        CUSTOM.replace("switch", "swich"),
        "4: node.topology: unknown topology 'swich'; did you mean 'switch'?"
        " Known: switch, mesh, hybrid_cube_mesh, pcie.",
    ),
    "no gpus": (CUSTOM.replace("num_gpus: 4", "num_gpus: 0"), "3: node.num_gpus: must be at least 1, not 0"),
    "unknown node key": (
        CUSTOM.replace("num_nics", "num_nic"),
        "2: node.num_nics: is required but missing; is 'num_nic' meant to be it?",
    ),
    "gpu without a peak": (
        CUSTOM.replace("h100-sxm-80", "{architecture: hopper}"),
        "2: node.gpu.peak: is required but missing",
    ),
    "gpu with an empty peak": (
        CUSTOM.replace("h100-sxm-80", "{base: h100, peak: {bf16: 0 TFLOP/s}}"),
        "2: node.gpu.peak.bf16: must be above zero",
    ),
    "value without a number": (
        CUSTOM.replace("num_gpus: 4", "num_gpus: {value: many, source: me}"),
        "3: node.num_gpus.value: expected a whole number, got the text 'many'",
    ),
    "unknown key beside a value": (
        CUSTOM.replace("num_gpus: 4", "num_gpus: {value: 4, sauce: me}"),
        "3: node.num_gpus.sauce: unknown key; did you mean 'source'?",
    ),
    "undersubscribed": (
        "node: dgx-h100\nfabric: {base: roce, oversubscription: 0.5}",
        "2: fabric.oversubscription: must be at least 1.0, not 0.5",
    ),
    "unknown fabric kind": (
        "node: dgx-h100\nfabric: {kind: infinband, latency: 2 us}",
        "2: fabric.kind: unknown kind 'infinband'; did you mean 'infiniband'?"
        " Known: infiniband, roce, ethernet, efa, slingshot.",
    ),
    "unknown host key": (
        "node: {base: dgx-h100, host: {nvme_reed: 40 GB/s}}",
        "1: node.host.nvme_reed: unknown key; did you mean 'nvme_read'?",
    ),
    "host bandwidth without a unit": (
        "node: {base: dgx-h100, host: {memory_bandwidth: 600}}",
        "1: node.host.memory_bandwidth: '600' has no unit; write for example '3.35 TB/s or 400 Gbit/s'",
    ),
    "host without drives to read": (
        "node: {base: dgx-h100, host: {nvme: 0 TB}}",
        "1: node.host.nvme: must be above zero",
    ),
    "half a core": (
        "node: {base: dgx-h100, host: {num_cores: 0}}",
        "1: node.host.num_cores: must be at least 1, not 0",
    ),
    "a host that is a word": (
        "node: {base: dgx-h100, host: xeon}",
        "1: node.host: expected keys and values below it, got the text 'xeon'",
    ),
    "unknown default fabric": (
        "node: {base: dgx-h100, default_fabric: carrier-pigeon}",
        "1: node.default_fabric: unknown fabric 'carrier-pigeon'. Run 'meshwright specs list' for all.",
    ),
}


def _read(text: str) -> ClusterSpec:
    return cluster_from_section(parse_yaml(text, "c.yaml"))


@pytest.mark.parametrize(("name", "identity"), (TABLE_IDS | SHORT_NAMES).items())
def test_every_spelling_finds_its_gpu(name: str, identity: str) -> None:
    assert load_gpu(name).id == identity
    assert load_gpu(name.lower()).id == identity


@pytest.mark.parametrize(("text", "message"), BAD_CLUSTERS.values(), ids=BAD_CLUSTERS.keys())
def test_a_bad_cluster_file_is_refused_by_line_and_key(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        _read(text)
    assert str(caught.value) == "c.yaml:" + message


def test_an_unknown_gpu_gets_a_suggestion() -> None:
    with pytest.raises(SpecError) as caught:
        load_gpu("h10O")
    assert (
        str(caught.value) == "unknown GPU 'h10O'; did you mean 'h100'? Run 'meshwright specs list' for all."
    )


def test_a_cluster_may_be_named_in_four_ways(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("node: dgx-h100\ncount: 8\n", encoding="utf-8")
    assert resolve_cluster("dgx-h100:8") == resolve_cluster(str(path))
    assert resolve_cluster("dgx-h100:8").num_gpus == 64
    assert resolve_cluster("DGX_H100").num_nodes == 1
    assert resolve_cluster("eos") == load_cluster("eos")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dgx-h100:0",
            "cluster 'dgx-h100:0': the number of nodes is '0', not 1 to 1000000; write NODE:COUNT",
        ),
        ("dgx-h100:-1", "the number of nodes is '-1'"),
        ("dgx-h100:two", "the number of nodes is 'two'"),
        ("dgx-h100:", "the number of nodes is ''"),
        ("dgx-h100:9999999", "the number of nodes is '9999999'"),
        ("h100:8", "unknown node 'h100'; did you mean 'dgx-h100'?"),
        (
            "dgx-h10",
            "unknown cluster 'dgx-h10'; did you mean 'dgx-h100'? Write NODE:COUNT such as 'dgx-h100:8'",
        ),
        ("", "unknown cluster ''. Write NODE:COUNT"),
        ("missing.yaml", "missing.yaml: no such file; check the path"),
        ("../gpus/l4", "../gpus/l4: no such file; check the path"),
    ],
)
def test_a_cluster_that_cannot_be_found_is_explained(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_cluster(text)
    assert message in str(caught.value)


def test_an_inline_node_may_change_single_keys_of_a_base() -> None:
    cluster = _read(
        "node:\n  base: dgx-h100\n  gpu: {base: h100, power: 600 W, peak: {bf16: 900 TFLOP/s}}\n"
        "  nic: {bandwidth: 200 Gbit/s}\ncount: 4\nfabric: {base: infiniband-ndr, oversubscription: 2}\n"
    )
    base = load_node("dgx-h100")
    assert cluster.gpu.power_watts == 600
    assert cluster.gpu.peak("bf16") == 900e12
    assert cluster.gpu.peak("fp8") == base.gpu.peak("fp8")
    assert cluster.node.nic == replace(base.nic, bandwidth_bytes_per_second=25e9)
    assert cluster.fabric.oversubscription == 2
    assert "power" not in cluster.gpu.sources
    assert cluster.gpu.sources["memory"] == base.gpu.sources["memory"]
    assert cluster.node.id == "dgx-h100-custom"
    assert cluster.gpu.architecture == "hopper"


def test_null_removes_what_the_base_has() -> None:
    cluster = _read("node: {base: dgx-h100, gpu: {base: h100, scale_up: null, price: null}, topology: pcie}")
    assert cluster.gpu.scale_up is None
    assert cluster.gpu.price_dollars_per_hour is None
    assert cluster.node.intra_link == cluster.gpu.host_link


def test_a_host_changes_single_keys_of_its_base_and_null_removes_them() -> None:
    base = load_node("dgx-h100")
    assert base.host is not None
    cluster = _read("node: {base: dgx-h100, host: {num_cores: 96, nvme: null, gpus_per_link: 2}}")
    host = cluster.node.host
    assert host == replace(base.host, num_cores=96, nvme_bytes=None, gpus_per_link=2)
    assert cluster.node.host_link_bandwidth_per_gpu == 32e9
    assert "host.num_cores" not in cluster.node.sources
    assert "host.nvme" not in cluster.node.sources
    assert cluster.node.sources["host.memory_bandwidth"] == base.sources["host.memory_bandwidth"]


def test_a_host_may_be_left_out_removed_or_written_out() -> None:
    assert _read(CUSTOM).node.host is None
    removed = _read("node: {base: dgx-h100, host: null}").node
    assert removed.host is None
    assert not [key for key in removed.sources if key.startswith("host.")]
    assert removed.host_link_bandwidth_per_gpu == removed.gpu.host_link.bandwidth_bytes_per_second
    own = _read(
        CUSTOM.replace("count", "  host: {memory_bandwidth: 300 GB/s, link_bandwidth: 16 GB/s}\ncount")
    )
    assert own.node.host is not None
    assert own.node.host.memory_bandwidth_bytes_per_second == 300e9
    assert (own.node.host.num_cores, own.node.host.gpus_per_link) == (None, 1)
    assert own.node.host_link_bandwidth_per_gpu == 16e9
    assert _read(dump_yaml(cluster_to_mapping(own))) == own


def test_a_node_without_power_or_fabric_gets_sourced_estimates() -> None:
    cluster = _read(CUSTOM)
    assert cluster.node.power_watts == pytest.approx(1.4 * 4 * 700)
    assert cluster.node.sources["power"].startswith("estimate")
    assert cluster.fabric.id == "roce-v2"
    assert cluster.num_gpus == 64


def test_a_preset_may_be_resized() -> None:
    cluster = _read("{preset: eos, count: 16}")
    assert cluster.num_nodes == 16
    assert cluster.node == load_node("dgx-h100")


@pytest.mark.parametrize("name", [*list_specs("node"), *list_specs("cluster")])
def test_a_cluster_survives_being_written_and_read(name: str) -> None:
    cluster = resolve_cluster(name)
    assert _read(dump_yaml(cluster_to_mapping(cluster))) == cluster
    assert pickle.loads(pickle.dumps(cluster)) == cluster


def test_a_customised_cluster_survives_being_written_and_read() -> None:
    cluster = _read(CUSTOM)
    sources = {key: text for key, text in cluster.gpu.sources.items() if not key.startswith("scale_up")}
    gpu = replace(cluster.gpu, sources=sources, scale_up=None, memory_bytes=1e11 / 3, id="1e3", name="# 010")
    cluster = replace(cluster, node=replace(cluster.node, gpu=gpu), id="12")
    assert _read(dump_yaml(cluster_to_mapping(cluster))) == cluster


@given(st.floats(min_value=1e-12, max_value=1e20, allow_nan=False))
def test_exact_quantities_lose_no_bit(value: float) -> None:
    for kind in ("bytes", "bytes_per_second", "flops_per_second", "seconds", "watts", "dollars_per_hour"):
        assert parse_quantity(exact_quantity(value, kind), kind) == value


def test_listing_names_every_kind() -> None:
    assert "h100-sxm-80" in list_specs("gpu")
    assert "dgx-h100" in list_specs("node")
    assert list_specs("gpu") == tuple(sorted(list_specs("gpu")))


def test_the_public_surface_is_exactly_all() -> None:
    public = {name for name in vars(package) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(package, name)).__name__ == "module"}
    assert sorted(public - modules - {"annotations"}) == package.__all__


VALID = dump_yaml(cluster_to_mapping(resolve_cluster("dgx-h100:8")))
FRAGMENTS = ["", "-", ":", "{", "}", "[", "]", "&a ", "*a", "!!x ", '"', "'", "\n", "\t", "#", "|", "0", "-1", "1e999",
             ".nan", "null", "true", "GB", "{a: ", "\x00", "\ud800", "\ufeff", "\u2028", "---\n", "? ", "<<: ", "%"]  # fmt: skip


@st.composite
def _mutated(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from([VALID, CUSTOM, "node: dgx-h100\ncount: 8\n"]))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(st.sampled_from(FRAGMENTS) | st.text(max_size=4)) + text[stop:]
    return text


def _complaint(text: str) -> str:
    """Return what reading says, ``""`` when the text is a cluster."""
    try:
        _read(text)
    except SpecError as error:
        return str(error)
    return ""


@settings(max_examples=300, deadline=None)
@given(_mutated())
def test_a_mutated_cluster_file_is_read_or_refused_in_one_line(text: str) -> None:
    complaint = _complaint(text)
    assert complaint == "" or complaint.startswith("c.yaml:")
    assert len(complaint.splitlines()) <= 1
    assert len(complaint) < 600


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_name_is_found_or_refused(name: str) -> None:
    with contextlib.suppress(SpecError):
        assert resolve_cluster(name).num_nodes >= 1
