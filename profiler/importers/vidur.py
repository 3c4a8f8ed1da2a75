"""Profiling data of the simulator Vidur (github.com/microsoft/vidur, ``data/profiling``, MIT), read where they lie.

``compute/DEVICE/MODEL/mlp.csv`` holds the layers of one tensor-parallel rank, ``network/DEVICE/all_reduce.csv`` and
``send_recv.csv`` hold collectives. As found in the data and their profilers: times are milliseconds, ``size`` is the
bytes of the buffer, everything ran in fp16. Norms and activations are read of models with gated feed-forward networks
only: the others have LayerNorm and GELU.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.profiler.measurements import CollectiveSamples, Measurements, OperatorSamples

__all__ = ["read_vidur"]

_WIDTH = 2.0  # bytes of fp16
_COLLECTIVES: Mapping[str, str] = {"all_reduce": "all_reduce", "send_recv": "send"}
_SIZES = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "num_tokens", "num_tensor_parallel_workers")
_NETWORK = ("num_workers", "size", "devices_per_node")
_FIELDS = {"gemm": ("m", "n", "k"), "rms_norm": ("num_bytes",), "swiglu": ("num_bytes",)}
_PROJECTIONS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
_OPERATORS: Mapping[str, str] = {
    **dict.fromkeys(_PROJECTIONS, "gemm"),
    "input_layernorm": "rms_norm",
    "post_attention_layernorm": "rms_norm",
    "mlp_act": "swiglu",
}

_Shape = tuple[float, ...]
_Times = dict[_Shape, list[float]]


def read_vidur(folder: Path, gpu: str) -> Measurements:
    """Return matrix products, norms, activations and collectives inside one node from Vidur's profiling data.

    Of devices named by the folders only those of the GPU's family are read, and of several of its networks the one of
    its form: ``_dgx`` for SXM modules, the other one for cards. Equal shapes count by their median.

    Parameters
    ----------
    folder : Path
        ``data/profiling`` or any folder in it; or one that holds ``mlp.csv``, ``all_reduce.csv`` or ``send_recv.csv``.
    gpu : str
        Device id of the specs.

    Raises
    ------
    SpecError
        If the folder holds no such tables of this GPU, or one of them cannot be read: names the line and the column.
    """
    paths = _tables(folder, gpu)
    operators: dict[str, _Times] = {}
    collectives: dict[tuple[str, int], _Times] = {}
    inputs = []
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
        if path.name == "mlp.csv":
            count = _read_layers(path, content, operators)
        else:
            count = _read_collective(path, content, collectives)
        inputs.append((path.relative_to(folder).as_posix(), hashlib.sha256(content).hexdigest(), count))
    if not operators and not collectives:
        names = ", ".join(name for name, _, _ in inputs)
        raise SpecError(
            f"{folder}: no times above zero, nor of a group inside one node, in {names}; name other tables"
        )
    places = dict.fromkeys(_place(path) for path in paths)
    source = f"Vidur profiling data (MIT): {', '.join(place for place in places if place) or folder.name}"
    kernels = (["sarathi-serve"] if operators else []) + (["nccl"] if collectives else [])
    return Measurements(
        gpu=gpu,
        kernels=", ".join(kernels),
        operators=tuple(_operator(name, operators[name], source) for name in sorted(operators)),
        collectives=tuple(_collective(*key, collectives[key], source) for key in sorted(collectives)),
        attribution="Vidur profiling data, Microsoft",
        licence="MIT",
        inputs=tuple(inputs),
    )


def _place(path: Path) -> str:
    """Return ``compute/DEVICE`` or ``network/DEVICE`` of a file, empty where its folders do not say."""
    parts = path.absolute().parts
    kind, depths = (
        ("compute", (4, 5)) if path.name == "mlp.csv" else ("network", (3,))
    )  # MAKER/MODEL or MODEL
    return next((f"{kind}/{parts[1 - depth]}" for depth in depths if parts[-depth:][0] == kind), "")


def _tables(folder: Path, gpu: str) -> list[Path]:
    """Return the tables of a GPU below a folder."""
    if not folder.is_dir():
        raise SpecError(
            f"{folder}: no such folder; name data/profiling of a copy of github.com/microsoft/vidur"
        )
    names = ("mlp.csv", *(f"{name}.csv" for name in _COLLECTIVES))
    found = {path: _place(path) for path in sorted(folder.rglob("*.csv")) if path.name in names}
    if not found:
        raise SpecError(f"{folder}: no {', '.join(names)} there; name data/profiling of a copy of Vidur")
    family = re.split(r"[-_]", gpu.lower())[0]
    mine = {
        path: place
        for path, place in found.items()
        if not place or re.split(r"[-_]", place.partition("/")[2].lower())[0] == family
    }
    if not mine:
        raise SpecError(
            f"{folder}: tables of {', '.join(sorted(set(found.values())))}, none of {gpu}; name a folder with its tables"
        )
    networks = sorted({place for place in mine.values() if place.startswith("network/")})
    if len(networks) > 1:
        chosen = [place for place in networks if place.endswith("_dgx") == ("sxm" in gpu.lower())]
        if len(chosen) != 1:
            raise SpecError(
                f"{folder}: several networks of {gpu}: {', '.join(networks)}; name one of these folders"
            )
        mine = {path: place for path, place in mine.items() if place not in networks or place in chosen}
    return list(mine)


def _rows(path: Path, content: bytes, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Return the line numbers and cells of a table that must have some columns."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise SpecError(f"{path}:1: not a table of Vidur: column(s) {', '.join(missing)} are missing")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise SpecError(f"{path}:{reader.line_num}: the row has more or fewer cells than the header")
            rows.append((reader.line_num, row))
    except UnicodeDecodeError:
        raise SpecError(f"{path}: is not UTF-8 text; fetch it again") from None
    except csv.Error as error:
        raise SpecError(f"{path}: is not a CSV table ({error})") from None
    if not rows:
        raise SpecError(f"{path}: the table has no rows; fetch it again")
    return rows


def _count(where: str, row: Mapping[str, str], column: str) -> int:
    text = row[column].strip()
    if not re.fullmatch(r"0*[1-9]\d*(\.0*)?", text):
        raise SpecError(f"{where}: {column} must be a whole number above zero, not '{text}'")
    return int(float(text))


def _seconds(where: str, row: Mapping[str, str], column: str) -> float | None:
    """Return a time [s], None where the cell is blank or zero: not measured."""
    text = row[column].strip()
    try:
        value = float(text or "0")
    except ValueError:
        raise SpecError(f"{where}: {column}: '{text}' is not a number") from None
    if not 0.0 <= value < math.inf:
        raise SpecError(f"{where}: {column} must be a finite number of milliseconds, not {text}")
    return value * 1e-3 or None


def _read_layers(path: Path, content: bytes, operators: dict[str, _Times]) -> int:
    """Add the layers of a table to the times by operator and shape, and return its number of rows."""
    rows = _rows(
        path, content, ("use_gated_mlp", *_SIZES, *(f"time_stats.{name}.median" for name in _PROJECTIONS))
    )
    for line, row in rows:
        where = f"{path}:{line}"
        for name, shape in _shapes(where, row).items():
            column = f"time_stats.{name}.median"
            seconds = _seconds(where, row, column) if column in row else None
            if seconds is not None:
                operators.setdefault(_OPERATORS[name], {}).setdefault(shape, []).append(seconds)
    return len(rows)


def _shapes(where: str, row: Mapping[str, str]) -> dict[str, _Shape]:
    """Return what each layer of a row computes on one rank, in the fields of its operator."""
    gated = row["use_gated_mlp"].strip()
    if gated not in ("True", "False"):
        raise SpecError(f"{where}: use_gated_mlp must be True or False, not '{gated}'")
    heads, kv_heads, hidden, ffn, tokens, tp = (_count(where, row, column) for column in _SIZES)
    if hidden % heads or hidden % tp or heads % tp or kv_heads % tp or ffn % tp:
        raise SpecError(
            f"{where}: heads, n_embd or n_expanded_embd do not divide by num_tensor_parallel_workers ({tp}), "
            "or n_embd by n_head; fetch the table again"
        )
    queries, keys = hidden // tp, hidden // heads * kv_heads // tp
    shapes: dict[str, _Shape] = {
        "attn_pre_proj": (tokens, queries + 2 * keys, hidden),
        "attn_post_proj": (tokens, hidden, queries),
        "mlp_up_proj": (tokens, (2 if gated == "True" else 1) * ffn // tp, hidden),
        "mlp_down_proj": (tokens, hidden, ffn // tp),
    }
    if gated == "True":
        norm = (2.0 * _WIDTH * tokens * hidden,)
        act = (3.0 * _WIDTH * tokens * ffn / tp,)  # gate and up are read, their product is written
        shapes |= {"input_layernorm": norm, "post_attention_layernorm": norm, "mlp_act": act}
    return shapes


def _read_collective(path: Path, content: bytes, collectives: dict[tuple[str, int], _Times]) -> int:
    """Add the rows of groups inside one node to the times by collective, ranks and size; return the number of rows."""
    column = f"time_stats.{path.stem}.median"
    rows = _rows(path, content, (*_NETWORK, column))
    for line, row in rows:
        where = f"{path}:{line}"
        ranks, size, per_node = (_count(where, row, name) for name in _NETWORK)
        seconds = _seconds(where, row, column)
        if 1 < ranks <= per_node and seconds is not None:
            times = collectives.setdefault((_COLLECTIVES[path.stem], ranks), {})
            times.setdefault((float(size),), []).append(seconds)
    return len(rows)


def _operator(name: str, times: _Times, source: str) -> OperatorSamples:
    shapes = np.array(sorted(times), dtype=np.float64)
    return OperatorSamples(
        operator=name,
        precision="fp16",
        shape=dict(zip(_FIELDS[name], shapes.T, strict=True)),
        seconds=_medians(times),
        source=source,
    )


def _collective(name: str, ranks: int, times: _Times, source: str) -> CollectiveSamples:
    sizes = np.array(sorted(times), dtype=np.float64)[:, 0]
    return CollectiveSamples(
        collective=name, ranks=ranks, num_bytes=sizes, seconds=_medians(times), source=source
    )


def _medians(times: _Times) -> NDArray[np.float64]:
    return np.array([np.median(times[shape]) for shape in sorted(times)], dtype=np.float64)
