"""``meshwright place``: the comparison, the files, the JSON, and one message for every bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest

from meshwright.planner.placement.safetensors_bytes import (
    RawTensor,
    SafetensorsFile,
    read_safetensors,
    write_safetensors,
)
from meshwright.planner.placement.synthetic import SyntheticRouting, draw_routing

MIXTRAL = ("--model", "mixtral-8x7b", "--cluster", "dgx-h100:2")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("routing") / "trace.npz"
    routing = draw_routing(32, 8, 2, 1200, 0, SyntheticRouting(topic_strength=3.0, persistence=0.9))
    np.savez(path, tokens=routing.tokens)
    return path


@pytest.fixture
def loads(folder):
    path = folder / "loads.csv"
    np.savetxt(path, np.random.default_rng(0).lognormal(4, 0.8, (32, 8)), delimiter=",")
    return path


def test_loads_to_a_placement_file(meshwright, loads, folder):
    outcome = meshwright(
        "place", "--loads", loads, *MIXTRAL, "--ep", 4, "--engine", "trtllm", "--out", "placement"
    )
    assert outcome.code == 0, outcome.stderr
    assert "Certificates" in outcome.stdout
    assert "no gain is claimed" in outcome.stdout
    assert (folder / "placement" / "moe_load_balancer.yaml").read_text().startswith("num_slots: 8\n")
    report = json.loads((folder / "placement" / "report.json").read_text())
    assert report["is_gain_claimed"] is False
    assert report["certificates"][0]["gap"] < 0.05


def test_a_trace_is_judged_on_held_out_tokens_and_simulated(meshwright, trace):
    outcome = meshwright(
        "place",
        "--routing",
        trace,
        *MIXTRAL,
        "--redundant-experts",
        8,
        "--objective",
        "traffic",
        "--simulate",
        "--json",
    )
    assert outcome.code == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    assert report["is_gain_claimed"] is True
    assert report["dispatch"] == "deduplicated"
    assert report["held_out"]["remote_nodes_per_token"] < report["eplb_held_out"]["remote_nodes_per_token"]
    times = report["layer_times"]["placements"]
    assert set(times) == {"EPLB, any copy", "EPLB, nearest copy", "this placement"}
    assert times["this placement"]["dispatch"] < times["EPLB, any copy"]["dispatch"]
    for row in times.values():
        assert (
            max(row["experts"], row["dispatch"])
            < row["layer"]
            <= row["experts"] + row["dispatch"] + row["combine"] + 1e-9
        )


def test_synthetic_routing_is_labelled_everywhere(meshwright):
    words = (
        "place",
        *MIXTRAL,
        "--ep",
        4,
        "--synthetic",
        "strong",
        "--synthetic-tokens",
        2000,
        "--engine",
        "exflow",
    )
    text = meshwright(*words)
    assert text.code == 0, text.stderr
    assert text.stdout.count("SYNTHETIC") >= 2
    assert "Warning: synthetic routing" in text.stdout
    report = json.loads(meshwright(*words, "--json").stdout)
    assert report["routing"]["is_synthetic"] is True
    assert report["is_gain_claimed"] is False
    assert report["held_out"]["locality"] > report["eplb_held_out"]["locality"]


def test_a_layout_is_chosen_then_placed(meshwright, trace, folder):
    words = (
        "place",
        "--routing",
        trace,
        *MIXTRAL,
        "--choose",
        "--tokens-per-gpu",
        1024,
        "--out",
        "placement",
    )
    outcome = meshwright(*words, "--json")
    assert outcome.code == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    best = report["choice"]["best"]
    assert report["num_ranks"] == best["ep"]
    assert report["num_slots"] == 8 + best["redundant_experts"]
    assert best in report["choice"]["candidates"]
    assert (folder / "placement" / "expert_location.json").exists()
    text = meshwright(*words[:-2], "--ep", 8, "--redundant-experts", 0)
    assert text.code == 0, text.stderr
    assert "Chosen: ep 8, 0 redundant experts (1 slots per rank), no capacity limit" in text.stdout
    assert "drops" in text.stdout


def test_tokens_are_grouped_and_ways_to_train_compared(meshwright, trace):
    words = ("place", "--routing", trace, *MIXTRAL, "--ep", 16, "--redundant-experts", 8)
    outcome = meshwright(*words, "--speculative-grouping", "--simulate", "--training", "--json")
    assert outcome.code == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    grouping = report["grouping"]
    assert grouping["num_homes"] == 2
    assert grouping["grouped"]["local_pairs"] > grouping["by_chance"]["local_pairs"]
    times = report["layer_times"]["placements"]
    assert times["this placement, tokens grouped"]["layer"] <= times["this placement"]["layer"]
    seconds = [each["layer_seconds"] for each in report["training_options"]]
    assert seconds == sorted(seconds)
    assert {each["name"] for each in report["training_options"]} >= {"1 copied to each rank", "groups of 8"}
    shown = meshwright(*words, "--speculative-grouping", "--training").stdout
    assert "Tokens grouped on 2 nodes" in shown
    assert "one layer forward and backward" in shown


def test_a_current_placement_says_what_moves(meshwright, loads, folder):
    words = ("place", "--loads", loads, *MIXTRAL, "--ep", 4, "--redundant-experts", 4, "--out", "placement")
    assert meshwright(*words).code == 0
    again = meshwright(*words, "--current", "placement/expert_location.json")
    assert again.code == 0, again.stderr
    assert "0 slots are filled anew" in again.stdout
    (folder / "placement" / "expert_location.json").write_text("mine")
    assert meshwright(*words).code == 2


def test_a_checkpoint_takes_the_order_of_the_placement(meshwright, loads, folder):
    def raw(value, shape):
        return RawTensor(
            dtype="F32", shape=shape, data=memoryview(np.full(shape, value, np.float32).tobytes())
        )

    tensors = {}
    for layer in range(32):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        rows = np.repeat(np.arange(8, dtype=np.float32)[:, None], 3, axis=1)
        tensors[f"{prefix}.gate.weight"] = RawTensor(
            dtype="F32", shape=(8, 3), data=memoryview(rows.tobytes())
        )
        for expert in range(8):
            tensors[f"{prefix}.experts.{expert}.w1.weight"] = raw(expert, (2, 3))
    (folder / "in").mkdir()
    write_safetensors(folder / "in" / "model.safetensors", SafetensorsFile(tensors=tensors, metadata={}))
    words = ("place", "--loads", loads, *MIXTRAL, "--ep", 4, "--engine", "exflow", "--dispatch", "full")
    outcome = meshwright(*words, "--permute-checkpoint", "in", "out", "--out", "placement")
    assert outcome.code == 0, outcome.stderr
    moved = read_safetensors(folder / "out" / "model.safetensors").tensors
    rank_of = [
        int(line.split(",")[1]) for line in (folder / "placement" / "placement.csv").read_text().split()[1:]
    ]
    for layer in (0, 31):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        gate = np.frombuffer(moved[f"{prefix}.gate.weight"].data, np.float32).reshape(8, 3)[:, 0].astype(int)
        experts = [
            int(np.frombuffer(moved[f"{prefix}.experts.{e}.w1.weight"].data, np.float32)[0]) for e in range(8)
        ]
        assert gate.tolist() == experts
        assert [rank_of[layer * 8 + e] for e in experts] == [0, 0, 1, 1, 2, 2, 3, 3]
    again = meshwright(*words, "--permute-checkpoint", "in", "out", "--out", "elsewhere")
    assert again.code == 2
    assert not (folder / "elsewhere").exists()


def bad_inputs(folder, trace):
    np.savez(folder / "other.npz", tokens=draw_routing(32, 16, 2, 200, 0).tokens)
    np.savez(folder / "padding.npz", tokens=np.tile([[[3, 4]]], (32, 100, 1)))
    (folder / "nan.csv").write_text("1,2,3,nan,5,6,7,8\n" * 32)
    (folder / "short.csv").write_text("1,2,3,4,5,6,7,8\n" * 5)
    return [
        (("--routing", "other.npz"), "another model"),
        (("--routing", "padding.npz"), "padding or warm-up"),
        (("--loads", "nan.csv"), "finite"),
        (("--loads", "short.csv"), "5 mixture-of-experts layers"),
        (("--loads", "missing.csv"), "no such file"),
        (("--routing", trace, "--ep", 5), "do not divide by 5 ranks"),
        (("--routing", trace, "--redundant-experts", 3), "--redundant-experts 8"),
        (("--routing", trace, "--ep", 64), "more than the 16 GPUs"),
        (("--routing", trace, "--engine", "sglan"), "did you mean 'sglang'"),
        (("--routing", trace, "--objective", "speed"), "unknown word 'speed'"),
        (
            ("--routing", trace, "--dispatch", "full", "--objective", "traffic", "--ep", 8),
            "only their balance",
        ),
        (("--routing", trace, "--choose", "--ep", 12), "does not fill whole nodes"),
        (("--routing", trace, "--speculative-grouping", "--objective", "balance"), "traffic and joint"),
        (("--routing", trace, "--loads", "nan.csv"), "give one of"),
        ((), "give one of"),
        (("--routing", trace, "--model", "llama-3-8b"), "has no experts"),
        (("--routing", trace, "--model", "qwen3-30b-a3b"), "another model"),
    ]


def test_every_bad_input_is_one_message_and_nothing_is_written(meshwright, trace, folder):
    for words, message in bad_inputs(folder, trace):
        base = ("place", *MIXTRAL, "--out", "placement") + (() if "--ep" in words else ("--ep", 8))
        if "--redundant-experts" in words:
            base = ("place", *MIXTRAL, "--out", "placement")
        outcome = meshwright(*base, *words)
        assert outcome.code == 2, (words, outcome.stdout, outcome.stderr)
        assert message in outcome.stderr, (words, outcome.stderr)
        assert outcome.stderr.count("\n") == 1
        assert outcome.stdout == ""
        assert not (folder / "placement").exists()
