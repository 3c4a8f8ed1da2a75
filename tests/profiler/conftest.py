"""Rows of a table of measured runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from meshwright.profiler.measured_runs import COLUMNS, MeasuredRun

MakeRun = Callable[..., MeasuredRun]

# Llama 3 8B on one DGX H100 under ZeRO-3, every dimension stated.
CELLS = {
    "id": "row-1",
    "source": "a paper",
    "source_kind": "read",
    "quality": "ok",
    "model": "some-8b",
    "n_layers": "32",
    "hidden": "4096",
    "ffn_hidden": "14336",
    "gated_mlp": "y",
    "n_heads": "32",
    "n_kv_heads": "8",
    "vocab": "128256",
    "tied_embeddings": "n",
    "seq_len": "8192",
    "gpu": "H100-80GB-SXM",
    "n_gpus": "16",
    "tp": "1",
    "pp": "1",
    "sharding": "zero3",
    "recompute": "full",
    "micro_batch": "1",
    "global_batch": "64",
    "precision": "bf16",
    "software": "torchtitan",
    "measured": "time",
    "measured_seconds": "10",
}


def build_run(**cells: object) -> MeasuredRun:
    """Return a complete row with some cells changed; every other cell is blank."""
    texts = dict.fromkeys(COLUMNS, "") | CELLS | {name: str(cell) for name, cell in cells.items()}
    seconds, memory = texts["measured_seconds"], texts["measured_memory_gib"]
    return MeasuredRun(
        id=texts["id"],
        source=texts["source"],
        quality=texts["quality"] or "ok",
        measured=texts["measured"] or "time",
        measured_seconds=float(seconds) if seconds else None,
        measured_memory_bytes=float(memory) * 2**30 if memory else None,
        cells=texts,
    )


@pytest.fixture(scope="session")
def make_run() -> MakeRun:
    return build_run
