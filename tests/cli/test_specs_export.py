"""``meshwright specs export``: networks of clusters for other simulators; and what ``specs show`` says of them."""

from __future__ import annotations

import json

import pytest
import yaml


def test_a_network_is_printed_and_written(meshwright, tmp_path):
    printed = meshwright("specs", "export", "eos", "--to", "astra-sim")
    assert printed.code == 0, printed.stderr
    path = tmp_path / "network.yml"
    written = meshwright("specs", "export", "eos", "--to", "astra-sim", "--out", str(path))
    assert written.code == 0, written.stderr
    assert path.read_text() == printed.stdout
    assert yaml.safe_load(printed.stdout)["npus_count"] == [8, 576]
    told = json.loads(meshwright("specs", "export", "eos", "--to", "astra-sim", "--json").stdout)
    assert told["text"] == printed.stdout


def test_only_our_own_files_are_replaced(meshwright, tmp_path):
    path = tmp_path / "topology.txt"
    path.write_text("mine")
    command = ("specs", "export", "dgx-h100:2", "--to", "simai", "--out", str(path))
    refused = meshwright(*command)
    assert refused.code == 2
    assert path.read_text() == "mine"
    assert meshwright(*command, "--force").code == 0
    assert path.read_text().startswith("27 8 2 9 40 H100\n")
    assert meshwright(*command).code == 0


def test_a_refusal_lists_the_reasons(meshwright):
    outcome = meshwright("specs", "export", "mi300x-8:2", "--to", "simai")
    assert outcome.code == 2
    assert "direct links" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_described_cluster_tells_its_all_reduce_and_a_flat_one_its_bisection(meshwright, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "node: dgx-h100\ncount: 2\ntopology:\n  tiers: [{name: leaf, nodes: 1, oversubscription: 2}]\n"
    )
    shown = meshwright("specs", "show", file).stdout
    links = json.loads(meshwright("specs", "show", file, "--json").stdout)["links"]
    # The leaves pass 200 GB/s: all that a ring gets; reduced inside first, half as much crosses for the same answer.
    by_algorithm = links["all_reduce_bus_bytes_per_second"]
    assert by_algorithm["ring"] == pytest.approx(200e9, rel=0.01)
    best = by_algorithm["pipelined_hierarchical"]
    assert best == pytest.approx(2.0 * 15 / 16 * 200e9, rel=0.01)
    assert f"# all-reduce of 1 GiB over all GPUs: {best / 1e9:.4g} GB/s bus bandwidth" in shown
    flat = json.loads(meshwright("specs", "show", "dgx-h100:4", "--json").stdout)["links"]
    assert flat == {"node_bandwidth_bytes_per_second": 400e9, "bisection_bytes_per_second": 800e9}
