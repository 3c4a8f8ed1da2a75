from __future__ import annotations

import pytest

from meshwright.errors import SpecError
from meshwright.profiler.layer_samples import layer_samples
from meshwright.profiler.records import SampleRecord

WIDTHS = {"hidden_size": 128, "ffn_hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}


def record(name: str, seconds: float, **shape: float) -> tuple[str, SampleRecord]:
    sample = SampleRecord(
        suite="layer",
        operator="layer",
        precision="bf16",
        shape={"name": name, **WIDTHS, **shape},
        status="ok",
        seconds=seconds,
    )
    return "a.jsonl:7", sample


def test_repeated_layers_become_their_median_apart_by_step_and_compiler() -> None:
    tokens = {"batch_size": 1, "sequence_length": 64}
    rows = [record("forward", seconds, **tokens, compiled=0) for seconds in (1e-3, 5e-3, 2e-3)]
    rows += [record("forward", 8e-4, **tokens, compiled=1), record("optimizer", 4e-4)]
    rows += [record("decode", 7e-4, batch_size=4, context_length=128, compiled=0), record("prologue", 1.0)]
    found = {(each.step, each.is_compiled): each for each in layer_samples(rows)}
    assert {key: each.seconds for key, each in found.items()} == {
        ("forward", False): 2e-3,
        ("forward", True): 8e-4,
        ("optimizer", False): 4e-4,
        ("decode", False): 7e-4,
    }
    assert found["decode", False].shape == {**WIDTHS, "batch_size": 4, "context_length": 128}


@pytest.mark.parametrize("shape", [{"batch_size": 1}, {"batch_size": 1, "sequence_length": 0}])
def test_a_layer_without_its_sizes_is_refused_with_its_line(shape: dict[str, float]) -> None:
    message = r"^a\.jsonl:7: shape: sequence_length of layer must be a number above 0$"
    with pytest.raises(SpecError, match=message):
        layer_samples([record("forward", 1e-3, **shape)])
