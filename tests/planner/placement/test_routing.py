"""Routing data: what is counted, what is removed as padding, every file format, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.planner.placement.routing import (
    drop_padding,
    routing_from_loads,
    routing_from_tokens,
    split_held_out,
    token_transitions,
)
from meshwright.planner.placement.routing_files import read_loads, read_routing
from meshwright.planner.placement.safetensors_bytes import RawTensor, SafetensorsFile, write_safetensors
from meshwright.planner.placement.synthetic import SyntheticRouting, draw_routing

LAYERS, EXPERTS, TOP_K = (1, 2, 3), 6, 2
MODEL_LAYERS = 4


def read(path):
    return read_routing(Path(path), EXPERTS, LAYERS, MODEL_LAYERS)


@pytest.fixture(scope="module")
def tokens():
    generator = np.random.default_rng(0)
    return np.argsort(generator.random((3, 200, EXPERTS)), axis=2)[:, :, :TOP_K]


def test_loads_and_transitions_are_counted(tokens):
    routing = routing_from_tokens(tokens, EXPERTS, "trace")
    assert routing.loads.sum(axis=1).tolist() == [400.0] * 3
    transitions = token_transitions(routing.tokens, EXPERTS)
    by_hand = np.zeros((EXPERTS, EXPERTS))
    for left, right in zip(tokens[0], tokens[1], strict=True):
        for e in left:
            for f in right:
                by_hand[e, f] += 1 / TOP_K
    assert transitions[0] == pytest.approx(by_hand)
    assert transitions.sum(axis=2) == pytest.approx(routing.loads[:-1])


def test_padding_warm_up_and_uniform_weights_are_removed(tokens):
    padded = np.concatenate([tokens, np.full((3, 5, TOP_K), -1), np.tile([[[4, 5]]], (3, 40, 1))], axis=1)
    kept, notes = drop_padding(padded, "trace")
    assert (kept == tokens).all()
    assert len(notes) == 2
    weights = np.random.default_rng(1).random(tokens.shape)
    weights[:, :7] = 0.5
    kept, notes = drop_padding(tokens, "trace", weights)
    assert kept.shape[1] == 193
    assert "uniform" in notes[0]


@pytest.mark.parametrize("row", [[-1, -1], [3, 4]])
def test_a_trace_of_padding_alone_is_refused(row):
    with pytest.raises(SpecError, match="padding or warm-up"):
        drop_padding(np.tile(row, (3, 50, 1)), "trace")


def test_the_last_tokens_are_held_out(tokens):
    first, last = split_held_out(routing_from_tokens(tokens, EXPERTS, "trace"), 0.25)
    assert (first.tokens == tokens[:, :150]).all()
    assert (last.tokens == tokens[:, 150:]).all()
    assert split_held_out(routing_from_loads(np.ones((2, 4)), "loads"))[1] is None
    windows = np.ones((4, 2, 4))
    early, late = split_held_out(routing_from_loads(windows.sum(axis=0), "loads", windows=windows))
    assert len(early.windows) == len(late.windows) == 2


def test_the_generator_is_seeded_labelled_and_limited_to_groups():
    first, again = (draw_routing(2, 64, 4, 500, 7) for _ in range(2))
    assert (first.tokens == again.tokens).all()
    assert first.is_synthetic
    grouped = draw_routing(1, 64, 4, 500, 7, None, 8, 2).tokens[0] // 8
    assert max(len(set(row)) for row in grouped.tolist()) <= 2
    with pytest.raises(SpecError, match="cannot draw"):
        draw_routing(1, 4, 5, 10, 0)
    with pytest.raises(SpecError, match="probability"):
        SyntheticRouting(persistence=1.5)


def test_stronger_affinity_shows_in_transitions():
    strong = SyntheticRouting(topic_strength=3.0, persistence=0.9)
    weak, tight = (
        token_transitions(draw_routing(2, 32, 2, 4000, 0, spec).tokens, 32)[0] for spec in (None, strong)
    )
    assert (tight**2).sum() > 1.5 * (weak**2).sum()


def test_npz_holds_tokens_transitions_or_loads(tmp_path, tokens):
    path = tmp_path / "trace.npz"
    np.savez(path, tokens=tokens, num_experts=EXPERTS)
    assert (read(path).tokens == tokens).all()
    dense = np.concatenate([tokens[:1] * 0, tokens])
    np.savez(path, tokens=dense)
    assert (read(path).tokens == tokens).all()
    np.savez(path, transitions=token_transitions(tokens.astype(np.int16), EXPERTS))
    assert read(path).transitions.shape == (2, EXPERTS, EXPERTS)
    np.savez(path, loads=np.ones((5, 3, EXPERTS)))
    assert read(path).windows.shape == (5, 3, EXPERTS)


def test_parquet_in_any_order_of_rows(tmp_path, tokens):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    layer, token = (each.ravel() for each in np.indices(tokens.shape[:2]))
    shuffled = np.random.default_rng(0).permutation(len(layer))
    table = {
        "layer": layer[shuffled],
        "token": token[shuffled],
        "experts": tokens.reshape(-1, TOP_K)[shuffled].tolist(),
    }
    parquet.write_table(pa.table(table), tmp_path / "trace.parquet")
    assert (read(tmp_path / "trace.parquet").tokens == tokens).all()


def test_csv_with_and_without_header_and_layer_numbers(tmp_path):
    path = tmp_path / "loads.csv"
    path.write_text(
        "layer," + ",".join(map(str, range(EXPERTS))) + "\n" + "".join(f"{n},1,2,3,4,5,6\n" for n in range(3))
    )
    assert read_loads(path, EXPERTS, LAYERS, MODEL_LAYERS).loads.tolist() == [[1, 2, 3, 4, 5, 6]] * 3
    path.write_text("1,2,3,4,5,6\n" * MODEL_LAYERS)
    assert read(path).num_layers == 3


def test_sglang_counts_as_json_drop_dense_layers_and_idle_steps(tmp_path):
    counts = np.ones((3, MODEL_LAYERS, EXPERTS))
    counts[:, 0] = 0.0
    counts[1] = 0.0
    path = tmp_path / "recorded.json"
    path.write_text(json.dumps({"rank": 0, "logical_count": counts.tolist()}))
    routing = read(path)
    assert routing.windows.shape == (2, 3, EXPERTS)
    assert "1 of 3 windows" in routing.notes[0]


@pytest.mark.parametrize("per_token", [False, True])
def test_sglang_recordings_of_torch_are_read_without_torch(tmp_path, tokens, per_token):
    torch = pytest.importorskip("torch")
    path = tmp_path / "recorded.pt"
    if per_token:
        ids = torch.tensor(np.concatenate([tokens[:1], tokens]), dtype=torch.int32)
        parts = [
            {"forward_pass_id": n, "topk_ids_of_layer": ids[:, n * 100 : n * 100 + 100]} for n in range(2)
        ]
        torch.save({"records": parts, "last_physical_to_logical_map": torch.arange(6)}, path)
    else:
        torch.save(
            {"rank": 0, "logical_count": torch.ones(2, MODEL_LAYERS, EXPERTS, dtype=torch.int32)}, path
        )
    code = (
        "import sys; from pathlib import Path\n"
        "from meshwright.planner.placement.routing_files import read_routing\n"
        f"r = read_routing(Path({str(path)!r}), {EXPERTS}, {LAYERS}, {MODEL_LAYERS})\n"
        "print(r.num_tokens, float(r.loads.sum()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == (["200", "1200.0", "False"] if per_token else ["0", "36.0", "False"])


def test_a_torch_file_that_would_run_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"logical_count": Path("x")}, tmp_path / "evil.pt")
    with pytest.raises(SpecError, match="refused"):
        read(tmp_path / "evil.pt")


def test_tensorrt_llm_statistics_are_summed_over_ranks(tmp_path):
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": 2}))
    counts = np.arange(EXPERTS, dtype=np.int32)
    for rank in range(2):
        tensors = {
            f"{iteration}_{layer}": RawTensor(
                dtype="I32", shape=(EXPERTS,), data=memoryview(counts.tobytes())
            )
            for iteration in (10, 11)
            for layer in LAYERS
        }
        write_safetensors(tmp_path / f"rank{rank}.safetensors", SafetensorsFile(tensors=tensors, metadata={}))
    routing = read(tmp_path)
    assert routing.windows.shape == (2, 3, EXPERTS)
    assert routing.loads.tolist() == [(4.0 * counts).tolist()] * 3


def test_bad_files_are_refused_in_one_sentence(tmp_path, tokens):
    def refuse(name, match):
        with pytest.raises(SpecError, match=match) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)

    refuse("missing.npz", "no such file")
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    refuse("a.npz", "not a numpy")
    np.savez(tmp_path / "b.npz", tokns=tokens)
    refuse("b.npz", "did you mean 'tokens'")
    np.savez(tmp_path / "c.npz", tokens=tokens, num_experts=8)
    refuse("c.npz", "model with 8 experts")
    np.savez(tmp_path / "d.npz", tokens=tokens + 3)
    refuse("d.npz", "another model")
    np.savez(tmp_path / "e.npz", tokens=tokens[:2])
    refuse("e.npz", "2 mixture-of-experts layers")
    np.savez(tmp_path / "f.npz", tokens=tokens[0])
    refuse("f.npz", "shape")
    np.savez(tmp_path / "p.npz", tokens=np.zeros((3, 90, 2), int))
    refuse("p.npz", "padding")
    (tmp_path / "g.csv").write_text("1,2,nan,4,5,6\n" * 3)
    refuse("g.csv", "nan")
    (tmp_path / "h.csv").write_text("1,2\n1,x\n")
    refuse("h.csv", "one number per expert")
    (tmp_path / "i.csv").write_text("1,2,3,4,5,6\n0,0,0,0,0,0\n1,2,3,4,5,6\n")
    refuse("i.csv", "no load at all")
    (tmp_path / "j.json").write_text("{}")
    refuse("j.json", "logical_count")
    (tmp_path / "k.xlsx").write_text("")
    refuse("k.xlsx", "unknown kind")
    (tmp_path / "folder").mkdir()
    refuse("folder", "meta_info.json")
    (tmp_path / "l.pt").write_bytes(b"no zip")
    refuse("l.pt", "torch.save")
