"""``meshwright specs``: what is known, under every name it goes by."""

from __future__ import annotations

import json

import pytest
import yaml


def test_every_kind_is_listed(meshwright):
    outcome = meshwright("specs", "list")
    assert outcome.code == 0
    for words in ("gpu (", "node (", "fabric (", "cluster (", "model (", "h100-sxm-80", "llama-3-70b"):
        assert words in outcome.stdout


def test_one_kind_can_be_listed_as_json(meshwright):
    listed = json.loads(meshwright("specs", "list", "--kind", "fabric", "--json").stdout)
    assert listed["schema_version"] == 1
    assert list(listed["specs"]) == ["fabric"]
    assert listed["specs"]["fabric"] == sorted(listed["specs"]["fabric"])


@pytest.mark.parametrize(
    ("name", "kind", "identity"),
    [
        ("h100-sxm-80", "gpu", "h100-sxm-80"),
        ("H100-80GB-SXM", "gpu", "h100-sxm-80"),
        ("dgx-h100", "node", "dgx-h100"),
        ("infiniband-ndr", "fabric", "infiniband-ndr"),
        ("eos", "cluster", "eos"),
        ("Llama-3-70B", "model", "llama-3-70b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "model", "llama-3.2-1b"),
        ("deepseek-v3", "model", "deepseek-v3"),
    ],
)
def test_a_spec_is_shown_under_its_id_and_its_aliases(meshwright, name, kind, identity):
    outcome = meshwright("specs", "show", name)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.startswith(f"# {kind}\n")
    shown = yaml.safe_load(outcome.stdout)
    assert shown.get("id", shown.get("name")) == identity


def test_every_listed_spec_can_be_shown(meshwright):
    listed = json.loads(meshwright("specs", "list", "--json").stdout)["specs"]
    for kind, names in listed.items():
        for name in names:
            outcome = meshwright("specs", "show", name, "--json")
            assert outcome.code == 0, outcome.stderr
            assert json.loads(outcome.stdout)["kind"] == kind


def test_numbers_are_shown_with_their_source(meshwright):
    shown = json.loads(meshwright("specs", "show", "h100-sxm-80", "--json").stdout)["spec"]
    assert shown["memory_bandwidth"]["value"] == "3.35 TB/s"
    assert "data sheet" in shown["memory_bandwidth"]["source"]


def test_a_model_is_shown_with_its_parameter_count(meshwright):
    shown = json.loads(meshwright("specs", "show", "llama-3.2-1b", "--json").stdout)["spec"]
    # Hugging Face meta-llama/Llama-3.2-1B states 1,235,814,400 parameters.
    assert shown["parameters"] == 1_235_814_400


def test_a_config_json_is_shown_by_path(meshwright, folder):
    config = {
        "model_type": "gpt2",
        "n_layer": 48,
        "n_embd": 1600,
        "n_head": 25,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    (folder / "config.json").write_text(json.dumps(config))
    outcome = meshwright("specs", "show", folder / "config.json", "--json")
    # GPT-2 XL has 1,557,611,200 parameters (Hugging Face openai-community/gpt2-xl).
    assert json.loads(outcome.stdout)["spec"]["parameters"] == 1_557_611_200
    assert meshwright("specs", "show", folder, "--json").stdout == outcome.stdout


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("h100-sxm-90", "h100-sxm-80"),
        ("dgx-h10", "dgx-h100"),
        ("llama-3-7b", "llama-3-70b"),
        ("h10O", "h100"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(meshwright, name, guess):
    outcome = meshwright("specs", "show", name)
    assert outcome.code == 2
    assert f"'{name}'; did you mean '{guess}'?" in outcome.stderr


LINKS = "source,destination,bandwidth,latency\na,b,40 GB/s,5 us\nb,a,20 GB/s,6 us\n"


def test_measured_links_become_a_cluster_that_is_shown_with_its_bottleneck(meshwright, tmp_path):
    (tmp_path / "links.csv").write_text(LINKS)
    out = tmp_path / "cluster.yaml"
    outcome = meshwright("specs", "import", tmp_path / "links.csv", "--node", "dgx-h100", "--out", out)
    assert outcome.code == 0, outcome.stderr
    assert "Guessed: directions of a pair differ" in outcome.stdout
    assert out.read_text().startswith("# written by meshwright from a CSV of links")
    shown = meshwright("specs", "show", out).stdout
    assert "# 2 x dgx-h100: 8 GPUs, 8 NICs, 400 GB/s per node" in shown
    assert "# bottleneck: b to a" in shown
    assert (
        json.loads(meshwright("specs", "show", out, "--json").stdout)["links"][
            "slowest_pair_bytes_per_second"
        ]
        == 20e9
    )
    # Ours is replaced; somebody else's is not.
    assert meshwright("specs", "import", tmp_path / "links.csv", "--node", "dgx-h100", "--out", out).code == 0
    out.write_text("mine")
    assert meshwright("specs", "import", tmp_path / "links.csv", "--node", "dgx-h100", "--out", out).code == 2
    assert out.read_text() == "mine"


def test_a_file_no_importer_knows_is_refused(meshwright, tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    outcome = meshwright("specs", "import", tmp_path / "note.txt")
    assert outcome.code == 2
    assert "Known: NCCL's topology XML" in outcome.stderr
