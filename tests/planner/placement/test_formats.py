"""Files of engines: each format back to the same placement, and a permuted checkpoint that computes the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from meshwright.errors import ExportError, SpecError
from meshwright.planner.placement.checkpoint import permute_checkpoint, permutes_groups
from meshwright.planner.placement.distinct import copies_apart
from meshwright.planner.placement.engines import ENGINES, placement_bundle, read_placement
from meshwright.planner.placement.formats.tables import LayerTable
from meshwright.planner.placement.formats.vllm import read_vllm_redundant_experts
from meshwright.planner.placement.safetensors_bytes import (
    RawTensor,
    SafetensorsFile,
    read_safetensors,
    write_safetensors,
)
from meshwright.simcore.domain.expert_placement import ExpertPlacement

TABLE = LayerTable(num_model_layers=5, moe_layers=(2, 3, 4), num_experts=8, num_ranks=4, ranks_per_node=2)


def placement_of(num_slots=12, seed=0):
    generator = np.random.default_rng(seed)
    rows = [
        generator.permutation(np.concatenate([np.arange(8), generator.integers(8, size=num_slots - 8)]))
        for _ in range(3)
    ]
    return ExpertPlacement(slots=np.asarray(rows), num_experts=8, num_ranks=4, ranks_per_node=2)


@pytest.mark.parametrize("engine", ["sglang", "trtllm", "vllm-ascend", "exflow"])
def test_every_format_reads_back_what_it_wrote(engine):
    placement = placement_of(8 if engine == "exflow" else 12)
    if engine == "exflow":  # says which rank, not which slot
        rows = np.sort(placement.slots.reshape(3, 4, 2), axis=2).reshape(3, 8)
        placement = ExpertPlacement(slots=rows, num_experts=8, num_ranks=4, ranks_per_node=2)
    if ENGINES[engine].has_copies_apart:
        placement = copies_apart(placement, np.ones((3, 8)))
    text = ENGINES[engine].write(placement, TABLE)
    again = read_placement(text, TABLE, "file")
    assert again.slots.tolist() == placement.slots.tolist()
    assert ENGINES[engine].write(again, TABLE) == text


def test_sglang_has_one_key_and_a_row_per_layer_of_the_model():
    document = json.loads(ENGINES["sglang"].write(placement_of(), TABLE))
    assert list(document) == ["physical_to_logical_map"]
    assert np.asarray(document["physical_to_logical_map"]).shape == (5, 12)
    assert document["physical_to_logical_map"][0] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]


def test_tensorrt_llm_keys_are_layers_of_the_model():
    document = yaml.safe_load(ENGINES["trtllm"].write(placement_of(), TABLE))
    assert document["num_slots"] == 12
    assert list(document["initial_global_assignments"]) == [2, 3, 4]
    assert all(set(row) == set(range(8)) for row in document["initial_global_assignments"].values())


def test_vllm_gets_the_number_of_copies():
    text = ENGINES["vllm"].write(placement_of(), TABLE)
    assert read_vllm_redundant_experts(text, "file") == 4


def test_a_bundle_names_the_options_that_use_it():
    bundle = placement_bundle(ENGINES["sglang"], placement_of(), TABLE, "{}")
    assert "--ep-num-redundant-experts 4" in bundle.launch_command
    assert [file.name for file in bundle.files] == ["expert_location.json", "report.json"]
    with pytest.raises(ExportError, match="one slot per expert"):
        placement_bundle(ENGINES["exflow"], placement_of(), TABLE, "{}")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ('{"a": 1}', "expected one key"),
        ('{"physical_to_logical_map": [[0, 1]]}', "1 layers"),
        (json.dumps({"physical_to_logical_map": [[0] * 8] * 3}), "no copy of expert 1"),
        (json.dumps({"physical_to_logical_map": [[*range(8), 9, 0, 0, 0]] * 3}), "experts are 0 to 7"),
        (json.dumps({"physical_to_logical_map": [[*range(7), "7"]] * 3}), "expert numbers only"),
        ('{"layer_list": [{"layer_id": 0}]}', "device_list"),
        ("Expert,Node\n0,9\n", "expert 0 on node 9"),
        ("Expert,Node\n0,1\n", "has no node"),
        ("num_slots: 8\ninitial_global_assignments:\n  2: [0]\n", "1 slots"),
        ("hello", "is no placement"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(text, match):
    with pytest.raises(SpecError, match=match) as caught:
        read_placement(text, TABLE, "file")
    assert "\n" not in str(caught.value)


def tensor(array):
    return RawTensor(dtype="F32", shape=array.shape, data=memoryview(np.ascontiguousarray(array).tobytes()))


def toy_checkpoint(folder, stacked):
    """Two mixture-of-experts layers of 8 experts over two files, the second one with some of the first's experts."""
    generator = np.random.default_rng(1)
    tensors = {"model.embed_tokens.weight": generator.normal(size=(4, 6))}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp"
        tensors[f"{prefix}.gate.weight"] = generator.normal(size=(8, 6))
        tensors[f"{prefix}.gate.e_score_correction_bias"] = generator.normal(size=8)
        tensors[f"{prefix}.shared_experts.up_proj.weight"] = generator.normal(size=(8, 6))
        if stacked:
            tensors[f"{prefix}.experts.up_proj"] = generator.normal(size=(8, 5, 6))
            tensors[f"{prefix}.experts.down_proj"] = generator.normal(size=(8, 6, 5))
        for expert in () if stacked else range(8):
            tensors[f"{prefix}.experts.{expert}.up_proj.weight"] = generator.normal(size=(5, 6))
            tensors[f"{prefix}.experts.{expert}.down_proj.weight"] = generator.normal(size=(6, 5))
    named = {name: tensor(array.astype(np.float32)) for name, array in tensors.items()}
    names = list(named)
    folder.mkdir()
    for number, part in enumerate((names[::2], names[1::2])):
        file = SafetensorsFile(tensors={name: named[name] for name in part}, metadata={"format": "pt"})
        write_safetensors(folder / f"model-{number}.safetensors", file)
    return folder


def arrays_of(folder):
    content = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, each in read_safetensors(path).tensors.items():
            content[name] = np.frombuffer(each.data, np.float32).reshape(each.shape)
    return content


def forward(weights, hidden, layer):
    """A top-2 layer with a router, a score correction and experts; adds experts in the order of their scores."""
    prefix = f"model.layers.{layer}.mlp"
    scores = hidden @ weights[f"{prefix}.gate.weight"].T
    corrected = scores + weights[f"{prefix}.gate.e_score_correction_bias"]
    output = np.zeros_like(hidden)
    for token, row in enumerate(corrected):
        for expert in np.argsort(-row, kind="stable")[:2]:
            if f"{prefix}.experts.up_proj" in weights:
                up, down = (weights[f"{prefix}.experts.{part}"][expert] for part in ("up_proj", "down_proj"))
            else:
                up, down = (
                    weights[f"{prefix}.experts.{expert}.{part}.weight"] for part in ("up_proj", "down_proj")
                )
            output[token] += scores[token, expert] * (down @ np.maximum(up @ hidden[token], 0.0))
    return (
        hidden
        + output
        + np.maximum(hidden @ weights[f"{prefix}.shared_experts.up_proj.weight"].T, 0.0)[:, :6]
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_a_permuted_checkpoint_computes_bit_for_bit_the_same(tmp_path, stacked):
    source = toy_checkpoint(tmp_path / "in", stacked)
    slots = np.array([np.random.default_rng(seed).permutation(8) for seed in (3, 4)])
    placement = ExpertPlacement(slots=slots, num_experts=8, num_ranks=4, ranks_per_node=2)
    permute_checkpoint(source, tmp_path / "out", placement, (0, 1))
    before, after = arrays_of(source), arrays_of(tmp_path / "out")
    assert before.keys() == after.keys()
    name = "model.layers.0.mlp.gate.weight"
    assert (after[name] == before[name][slots[0]]).all()
    assert not (after[name] == before[name]).all()
    hidden = np.random.default_rng(9).normal(size=(20, 6)).astype(np.float32)
    old, new = hidden, hidden
    for layer in (0, 1):
        old, new = forward(before, old, layer), forward(after, new, layer)
    assert (old == new).all()


def test_torch_reads_the_permuted_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    source = toy_checkpoint(tmp_path / "in", stacked=True)
    slots = np.array([np.arange(8)[::-1]] * 2)
    placement = ExpertPlacement(slots=slots, num_experts=8, num_ranks=4, ranks_per_node=2)
    permute_checkpoint(source, tmp_path / "out", placement, (0, 1))
    hidden = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    logits = [
        hidden @ torch.tensor(arrays_of(folder)["model.layers.1.mlp.gate.weight"]).T
        for folder in (source, tmp_path / "out")
    ]
    assert torch.equal(logits[0].flip(1), logits[1])


def test_what_a_permutation_cannot_do_is_refused(tmp_path):
    source = toy_checkpoint(tmp_path / "in", stacked=False)
    with pytest.raises(ExportError, match="one of each expert"):
        permute_checkpoint(source, tmp_path / "out", placement_of(), (0, 1, 2))
    mixed = np.array([[0, 2, 1, 3, 4, 5, 6, 7]] * 2)
    placement = ExpertPlacement(slots=mixed, num_experts=8, num_ranks=4, ranks_per_node=2)
    assert not permutes_groups(placement, 4)
    assert permutes_groups(placement, 2)
    with pytest.raises(ExportError, match="out of their 4 groups"):
        permute_checkpoint(source, tmp_path / "out", placement, (0, 1), 4)
    with pytest.raises(SpecError, match="layer 7"):
        permute_checkpoint(source, tmp_path / "out", placement, (0, 7))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExportError, match="not an empty folder"):
        permute_checkpoint(source, source, placement, (0, 1))
