"""Every built-in YAML file: well formed, sourced, and physically plausible."""

from __future__ import annotations

import importlib.resources

import pytest
import yaml

from meshwright.hardware_specs import (
    SpecKind,
    list_specs,
    load_cluster,
    load_fabric,
    load_gpu,
    load_node,
)

FOLDERS: dict[SpecKind, str] = {"gpu": "gpus", "node": "nodes", "fabric": "fabrics", "cluster": "clusters"}
FILES = [(kind, identity) for kind in FOLDERS for identity in list_specs(kind)]
# A host processor is a device to walk the tool's paths with; the ranges below are those of accelerators.
GPUS = [identity for identity in list_specs("gpu") if load_gpu(identity).architecture != "cpu"]
NODES = [identity for identity in list_specs("node") if load_node(identity).gpu.id in GPUS]
ARCHITECTURES = {
    "volta",
    "ampere",
    "ada",
    "hopper",
    "blackwell",
    "cdna2",
    "cdna3",
    "cdna4",
    "gaudi",
    "ascend",
}

# FLOP per clock and SM (dense bf16, fp16 on Volta) and boost clock [GHz], from the vendors' whitepapers.
SM_RATES = {
    "v100-sxm2-32": (1024, 1.53),
    "a100-sxm-80": (2048, 1.41),
    "a100-sxm-40": (2048, 1.41),
    "h100-sxm-80": (4096, 1.83),
    "h100-pcie-80": (4096, 1.62),
    "h200-sxm-141": (4096, 1.83),
    "l4": (1024, 2.04),
    "a10": (1024, 1.695),
    "a10g": (512, 1.71),
    "a40": (1024, 1.74),
    "rtx-4090": (512, 2.52),
    "rtx-5090": (512, 2.407),
    "mi250x-gcd": (1024, 1.7),
    "mi300x": (2048, 2.1),
    "mi325x": (2048, 2.1),
    "mi355x": (4096, 2.4),
    "gaudi3": (256 * 256 * 2, 1.6),
}
# Sparse (2:4) headlines of the vendors [TFLOP/s]; a dense figure may not exceed half of them.
SPARSE_BF16 = {
    "a100-sxm-80": 624,
    "h100-sxm-80": 1979,
    "h100-nvl-94": 1671,
    "h100-pcie-80": 1513,
    "h200-sxm-141": 1979,
    "h20-sxm-96": 296,
    "b200-sxm-180": 4500,
    "gb200": 5000,
    "l4": 242,
    "l40s": 733,
    "a10": 250,
}
# Links of a device and the bandwidth of one per direction [GB/s].
LINKS = {
    "v100-sxm2-32": (6, 25),
    "a100-sxm-80": (12, 25),
    "a800-sxm-80": (8, 25),
    "h100-sxm-80": (18, 25),
    "h800-sxm-80": (8, 25),
    "h20-sxm-96": (18, 25),
    "b200-sxm-180": (18, 50),
    "gb300": (18, 50),
    "mi300x": (7, 64),
    "mi355x": (7, 76.8),
    "gaudi3": (21, 25),
    "ascend-910b": (7, 28),
}


def _raw(kind: SpecKind, identity: str) -> dict[str, object]:
    folder = importlib.resources.files("meshwright.hardware_specs").joinpath(FOLDERS[kind])
    loaded: dict[str, object] = yaml.safe_load(
        folder.joinpath(f"{identity}.yaml").read_text(encoding="utf-8")
    )
    return loaded


def _bare_numbers(node: object, path: str) -> list[str]:
    """Return the paths of numbers and quantities that stand without a source."""
    if isinstance(node, dict):
        if "value" in node:
            source = node.get("source")
            return [] if isinstance(source, str) and len(source) > 10 else [path]
        return [found for key, child in node.items() for found in _bare_numbers(child, f"{path}.{key}")]
    is_number = isinstance(node, int | float) and not isinstance(node, bool)
    return [path] if is_number and path != ".schema_version" else []


@pytest.mark.parametrize(("kind", "identity"), FILES)
def test_every_number_of_a_file_has_a_source(kind: SpecKind, identity: str) -> None:
    raw = _raw(kind, identity)
    assert raw["schema_version"] == 1
    assert raw["id"] == identity
    assert _bare_numbers(raw, "") == []


@pytest.mark.parametrize("identity", list_specs("gpu"))
def test_every_number_of_a_gpu_keeps_its_source(identity: str) -> None:
    gpu = load_gpu(identity)
    keys = {
        "memory",
        "memory_bandwidth",
        "num_sms",
        "l2",
        "power",
        "host_link.bandwidth",
        "host_link.latency",
    }
    keys |= {f"peak.{precision}" for precision in gpu.peak_flops_per_second}
    assert keys <= set(gpu.sources)


@pytest.mark.parametrize("identity", GPUS)
def test_gpu_is_plausible(identity: str) -> None:
    gpu = load_gpu(identity)
    assert gpu.architecture in ARCHITECTURES
    half = gpu.peak("fp16")
    assert gpu.peak("fp32") < half
    assert gpu.peak_flops_per_second.get("bf16", half) == half
    assert ("bf16" not in gpu.peak_flops_per_second) == (gpu.architecture == "volta")
    assert 35 <= half / gpu.memory_bandwidth_bytes_per_second <= 600
    assert gpu.peak_flops_per_second.get("fp8", half) <= 2.03 * half
    assert gpu.peak_flops_per_second.get("mxfp8") in (None, gpu.peak_flops_per_second.get("fp8"))
    assert 15e9 < gpu.memory_bytes < 320e9
    assert 200e9 < gpu.memory_bandwidth_bytes_per_second <= 8.1e12
    assert 4e6 < gpu.l2_bytes < 300e6
    assert 50 < gpu.power_watts <= 1500
    assert 0.1e12 < half / gpu.power_watts < 6e12
    assert gpu.scale_up is None or gpu.scale_up.bandwidth_bytes_per_second >= 100e9
    assert gpu.price_dollars_per_hour is None or 0.2 < gpu.price_dollars_per_hour < 20


@pytest.mark.parametrize("identity", SM_RATES)
def test_peak_is_sm_count_times_clock(identity: str) -> None:
    flops_per_clock, gigahertz = SM_RATES[identity]
    gpu = load_gpu(identity)
    assert gpu.peak("fp16") == pytest.approx(gpu.num_sms * flops_per_clock * gigahertz * 1e9, rel=0.01)


@pytest.mark.parametrize("identity", SPARSE_BF16)
def test_peak_is_dense(identity: str) -> None:
    assert load_gpu(identity).peak("bf16") <= SPARSE_BF16[identity] / 2 * 1e12


@pytest.mark.parametrize("identity", LINKS)
def test_scale_up_bandwidth_is_links_times_one_link(identity: str) -> None:
    count, each = LINKS[identity]
    link = load_gpu(identity).scale_up
    assert link is not None
    assert link.bandwidth_bytes_per_second == pytest.approx(count * each * 1e9)


# Hosts whose memory channels are known: sockets x channels x transfers per second [GT/s] x 8 bytes.
MEMORY_CHANNELS = {
    "dgx-1v": (2, 4, 2.133),
    "dgx-a100": (2, 8, 3.2),
    "dgx-h100": (2, 8, 4.4),
    "dgx-b300": (2, 8, 5.2),
    "aws-p4d": (2, 6, 2.933),
    "aws-p5": (2, 8, 3.2),
    "aws-p5en": (2, 8, 4.8),
    "aws-p6-b200": (2, 8, 5.6),
    "azure-ndm-a100-v4": (2, 8, 3.2),
    "azure-nd-h200-v5": (2, 8, 4.8),
    "frontier": (1, 8, 3.2),
    "mi300x-8": (2, 12, 4.8),
    "mi355x-8": (2, 12, 6.0),
}
HOSTS = [identity for identity in NODES if load_node(identity).host is not None]


@pytest.mark.parametrize("identity", HOSTS)
def test_host_is_plausible(identity: str) -> None:
    node = load_node(identity)
    host = node.host
    assert host is not None
    assert host.memory_bandwidth_bytes_per_second is not None
    assert node.host_memory_bytes is not None
    assert host.num_sockets is not None
    # One socket has 4 to 12 memory channels of DDR4-2133 to DDR5-6400, or the LPDDR5X of a Grace.
    assert 68e9 <= host.memory_bandwidth_bytes_per_second / host.num_sockets <= 614.4e9
    assert host.num_cores is None or 18 <= host.num_cores / host.num_sockets <= 96
    assert node.num_gpus % host.gpus_per_link == 0
    assert 4e9 <= node.host_link_bandwidth_per_gpu <= node.gpu.host_link.bandwidth_bytes_per_second
    assert host.nvme_bytes is None or 1e12 <= host.nvme_bytes <= 300e12
    # Read and write bandwidth come together and with a capacity; drives read faster than they write.
    assert (host.nvme_read_bytes_per_second is None) == (host.nvme_write_bytes_per_second is None)
    if host.nvme_read_bytes_per_second and host.nvme_write_bytes_per_second:
        assert host.nvme_bytes is not None
        assert 1.0 < host.nvme_read_bytes_per_second / host.nvme_write_bytes_per_second <= 3.0
        assert 0.1 <= host.nvme_bytes / host.nvme_read_bytes_per_second / 1000.0 <= 2.0


@pytest.mark.parametrize("identity", HOSTS)
def test_every_number_of_a_host_keeps_its_source(identity: str) -> None:
    node = load_node(identity)
    named = _raw("node", identity)["host"]
    assert isinstance(named, dict)
    assert {f"host.{key}" for key in named} <= set(node.sources)


@pytest.mark.parametrize("identity", MEMORY_CHANNELS)
def test_host_memory_bandwidth_is_channels_times_transfers(identity: str) -> None:
    sockets, channels, transfers = MEMORY_CHANNELS[identity]
    host = load_node(identity).host
    assert host is not None
    assert host.memory_bandwidth_bytes_per_second == pytest.approx(
        sockets * channels * transfers * 8e9, rel=1e-3
    )


def test_gpus_behind_one_switch_share_its_link() -> None:
    # DGX A100: two GPUs on one PCIe 4.0 x16 uplink; p4d: on a PCIe 3.0 one; DGX H100: one x16 each.
    assert load_node("dgx-a100").host_link_bandwidth_per_gpu == 16e9
    assert load_node("aws-p4d").host_link_bandwidth_per_gpu == 8e9
    assert load_node("dgx-h100").host_link_bandwidth_per_gpu == 64e9
    assert load_node("h100-96-8").host_link_bandwidth_per_gpu == 64e9
    assert load_node("gb200-nvl72").gpu.host_link.kind == "nvlink-c2c"
    assert load_node("gh200-1").host_link_bandwidth_per_gpu == 450e9


@pytest.mark.parametrize("identity", NODES)
def test_node_is_plausible(identity: str) -> None:
    node = load_node(identity)
    assert node.num_gpus in (1, 4, 8, 72)
    assert (node.topology == "pcie") == (node.gpu.scale_up is None)
    assert 1e9 <= node.nic_bandwidth_per_gpu <= 100e9
    assert 1.0 <= node.power_watts / (node.num_gpus * node.gpu.power_watts) <= 2.5
    assert node.host_memory_bytes is None or 256e9 <= node.host_memory_bytes <= 20e12
    assert node.price_dollars_per_hour is None or 0.5 < node.price_dollars_per_hour / node.num_gpus < 20
    fabric = load_fabric(node.default_fabric)
    assert fabric.kind == node.nic.kind
    assert fabric.latency == node.nic.latency


def test_the_host_processor_is_the_only_device_that_is_no_accelerator() -> None:
    assert set(list_specs("gpu")) - set(GPUS) == {"cpu-host"}
    assert set(list_specs("node")) - set(NODES) == {"cpu-host-1"}
    host = load_node("cpu-host-1")
    assert (host.num_gpus, host.topology, host.gpu.scale_up) == (1, "pcie", None)
    assert host.gpu.peak("fp32") == host.gpu.peak("fp16") < host.gpu.peak("bf16") <= 2e12
    assert all(
        source.startswith("estimate: ") for source in (*host.sources.values(), *host.gpu.sources.values())
    )
    fabric = load_fabric(host.default_fabric)
    assert (fabric.kind, fabric.latency) == (host.nic.kind, host.nic.latency)


@pytest.mark.parametrize("identity", list_specs("fabric"))
def test_fabric_is_plausible(identity: str) -> None:
    fabric = load_fabric(identity)
    assert 1e-6 <= fabric.latency <= 50e-6
    assert fabric.oversubscription == 1.0


@pytest.mark.parametrize("identity", list_specs("cluster"))
def test_cluster_joins_its_nodes_by_a_fabric_of_their_nics(identity: str) -> None:
    cluster = load_cluster(identity)
    assert cluster.id == identity
    assert cluster.num_gpus == cluster.num_nodes * cluster.node.num_gpus
    assert cluster.fabric.kind == cluster.node.nic.kind or identity == "llama3-16k"


def test_spellings_name_one_file_each() -> None:
    for kind in FOLDERS:
        seen: dict[str, str] = {identity: identity for identity in list_specs(kind)}
        for identity in list_specs(kind):
            aliases = _raw(kind, identity).get("aliases", [])
            assert isinstance(aliases, list)
            for alias in aliases:
                spelling = str(alias).lower().replace("_", "-").replace(" ", "-")
                assert seen.setdefault(spelling, identity) == identity, f"{spelling} names two {kind}s"
