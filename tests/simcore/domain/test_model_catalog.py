"""Presets, aliases and paths."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from meshwright.errors import SpecError
from meshwright.hardware_specs.yaml_document import parse_yaml
from meshwright.simcore.domain.model_catalog import (
    list_models,
    load_model,
    model_from_section,
    model_to_mapping,
)

FOLDER = files("meshwright.simcore.domain") / "models"


def _text(model_id: str) -> str:
    return (FOLDER / f"{model_id}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("model_id", list_models())
def test_preset_is_complete(model_id: str) -> None:
    document = yaml.safe_load(_text(model_id))
    model = load_model(model_id)
    assert model.name == document["name"] == model_id == model_id.lower()
    assert document["schema_version"] == 1
    assert document["source"]
    if "published_parameters" in document:
        assert model.num_parameters == document["published_parameters"]
    else:
        text = document["published_size"]
        size = float(text[:-1]) * {"B": 1e9, "T": 1e12}[text[-1]]
        assert model.num_main_parameters == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("model_id", list_models())
def test_mapping_round_trips_exactly(model_id: str) -> None:
    model = load_model(model_id)
    text = yaml.safe_dump(model_to_mapping(model))
    assert model_from_section(parse_yaml(text, "plan.yaml")) == model


def test_aliases_are_lower_case_and_unambiguous() -> None:
    names = Counter(list_models())
    for model_id in list_models():
        names.update(yaml.safe_load(_text(model_id)).get("aliases", []))
    assert [name for name, count in names.items() if count > 1] == []
    assert [name for name in names if name != name.lower() or "_" in name or "/" in name] == []


def test_list_is_sorted_and_long() -> None:
    assert list(list_models()) == sorted(list_models())
    assert len(list_models()) >= 30


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("Llama-3-70B", "llama-3-70b"),
        ("meta-llama/Meta-Llama-3-70B", "llama-3-70b"),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "llama-3-70b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("LLAMA3_8B", "llama-3-8b"),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "llama-3.1-8b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("Qwen/Qwen3-235B-A22B-FP8", "qwen3-235b-a22b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("Megatron-1T", "gpt-1t"),
    ],
)
def test_published_names_find_their_preset(name: str, model_id: str) -> None:
    assert load_model(name) == load_model(model_id)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "llama-3-7b",
            "unknown model 'llama-3-7b'; did you mean 'llama-3-.*b'\\? Run 'meshwright specs list' for all",
        ),
        ("zzz", "unknown model 'zzz'. Run 'meshwright specs list' for all"),
        ("", "unknown model ''. Run"),
        ("-instruct", "unknown model '-instruct'"),
        ("x" * 5000, "unknown model 'x{80}'. Run"),
        ("a\0b", "unknown model 'a.x00b'"),
        ("../models/llama-3-8b", "is neither a .json nor a .yaml file|cannot be read"),
        ("./none.yaml", "none.yaml: no such file"),
        ("none.json", "none.json: cannot be read"),
    ],
)
def test_unknown_model_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_paths_load_configs_presets_and_directories(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "n_positions": 32,
        "vocab_size": 99,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.yaml").write_text(_text("gemma-2-9b"))
    assert load_model(str(tmp_path)) == load_model(str(tmp_path / "config.json"))
    assert load_model(str(tmp_path / "mine.yaml")) == load_model("gemma-2-9b")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(SpecError, match=r"weights\.bin: is neither a \.json nor a \.yaml file"):
        load_model(str(tmp_path / "weights.bin"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_layers: 32", "num_layer: 32", r"m\.yaml:\d+: num_layers: is required but missing"),
        ("num_layers: 32", "num_layers: 0", r"m\.yaml:\d+: num_layers: must be at least 1, not 0"),
        ("num_layers: 32", "num_layers: 32\nnum_layer: 3", r"m\.yaml:\d+: num_layer: unknown key"),
        ("num_query_groups: 8", "num_query_groups: 3", r"m\.yaml:\d+: .*multiple of num_query_groups 3"),
        ("schema_version: 1", "schema_version: 2", r"m\.yaml:1: schema_version: is 2; this release reads 1"),
        ("head_dim: 128", "head_dim: 128\nnormalization: batch", r"m\.yaml:\d+: normalization: unknown"),
        ("  top_k: 2", "  top_k: 9", r"m\.yaml:\d+: moe\.top_k 9 is more than moe\.num_experts 8"),
        ("  top_k: 2", "  top_k: 2\n  topk: 2", r"m\.yaml:\d+: moe\.topk: unknown key"),
    ],
)
def test_bad_preset_names_file_line_and_key(old: str, new: str, message: str) -> None:
    text = _text("mixtral-8x7b")
    assert old in text
    with pytest.raises(SpecError, match=message):
        model_from_section(parse_yaml(text.replace(old, new), "m.yaml"))


def test_loading_by_id_reads_one_file_quickly() -> None:
    load_model("llama-3-8b")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        load_model("llama-3-8b")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.005


def test_import_brings_no_heavy_package() -> None:
    code = "import sys, meshwright.simcore.domain.model_catalog; print(*sys.modules)"
    source = str(Path(__file__).parents[3] / "src")
    result = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"numpy", "pandas", "networkx", "numba", "torch", "transformers"}.isdisjoint(result.stdout.split())
