"""Routing data from files: traces, loads, transitions, and what SGLang and TensorRT-LLM record."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError, did_you_mean
from meshwright.planner.placement.routing import (
    RoutingData,
    drop_padding,
    routing_from_loads,
    routing_from_tokens,
    routing_from_transitions,
)
from meshwright.planner.placement.safetensors_bytes import read_safetensors, tensor_array
from meshwright.planner.placement.torch_pickle import read_torch_file

__all__ = ["read_loads", "read_routing"]

_MAX_BYTES = 8_000_000_000
_TRACE_KEYS = ("tokens", "transitions", "loads", "weights", "num_experts", "origin")
_KEY = re.compile(r"(\d+)_(\d+)")


def read_routing(
    path: Path, num_experts: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    """Return the routing data of a file or folder, by what it is.

    ``.npz``: ``tokens`` (layers, tokens, top_k) with optional ``weights``, or ``transitions`` (layers - 1, E, E), or
    ``loads`` (layers, E) or (windows, layers, E). ``.parquet``: one row per layer and token with ``layer`` and
    ``experts`` (or ``expert_0``, ``expert_1``, ...) and optional ``token``. ``.csv``: loads, one row per layer.
    ``.json`` and ``.pt``: SGLang's recorded expert distribution. A folder with ``meta_info.json``: TensorRT-LLM's
    expert statistics. Rows of the model's dense layers are left out.

    Parameters
    ----------
    path : Path
        The file or folder.
    num_experts : int
        Routed experts of a layer of the model.
    moe_layers : tuple[int, ...]
        Index of each mixture-of-experts layer in the model.
    num_model_layers : int
        All layers of the model.

    Raises
    ------
    SpecError
        If it cannot be read, is malformed, is of another model, or holds nothing but padding.
    """
    if not path.exists():
        raise SpecError(f"{path}: no such file; check the path")
    if path.is_dir():
        routing = _read_trtllm(path, moe_layers)
    else:
        if path.stat().st_size > _MAX_BYTES:
            raise SpecError(f"{path}: is larger than {_MAX_BYTES // 10**9} GB; record fewer tokens")
        readers = {
            ".npz": _read_npz,
            ".parquet": _read_parquet,
            ".csv": _read_csv,
            ".json": _read_sglang_json,
            ".pt": _read_sglang_torch,
        }
        suffix = path.suffix.lower()
        if suffix not in readers:
            guess = did_you_mean(suffix, readers) or "."
            raise SpecError(f"{path}: unknown kind of file{guess} Known: {', '.join(readers)}, or a folder.")
        routing = readers[suffix](path, num_experts, moe_layers, num_model_layers)
    _check_model(routing, num_experts, moe_layers, path)
    return routing


def read_loads(
    path: Path, num_experts: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    """Return the loads of a CSV file; other kinds of file are read for their loads alone; see :func:`read_routing`."""
    routing = read_routing(path, num_experts, moe_layers, num_model_layers)
    return routing_from_loads(routing.loads, routing.origin, windows=routing.windows, notes=routing.notes)


def _check_model(routing: RoutingData, num_experts: int, moe_layers: tuple[int, ...], path: Path) -> None:
    if routing.num_experts != num_experts:
        raise SpecError(
            f"{path}: has {routing.num_experts} experts per layer, the model {num_experts}: is it of another model?"
        )
    if routing.num_layers != len(moe_layers):
        raise SpecError(
            f"{path}: has {routing.num_layers} mixture-of-experts layers, the model {len(moe_layers)}: is it of "
            "another model?"
        )


def _only_moe(
    array: NDArray[np.generic], axis: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> NDArray[np.generic]:
    """Return the rows of the mixture-of-experts layers where the file has one per layer of the model."""
    if array.shape[axis] == num_model_layers != len(moe_layers):
        return np.take(array, moe_layers, axis=axis)
    return array


def _read_npz(
    path: Path, num_experts: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        raise SpecError(f"{path}: is not a numpy .npz file without pickled objects") from None
    unknown = [key for key in content if key not in _TRACE_KEYS]
    if unknown:
        guess = did_you_mean(unknown[0], _TRACE_KEYS) or "."
        raise SpecError(f"{path}: unknown array '{unknown[0][:60]}'{guess} Known: {', '.join(_TRACE_KEYS)}.")
    if not any(key in content for key in ("tokens", "transitions", "loads")):
        raise SpecError(f"{path}: holds none of the arrays tokens, transitions, loads")
    for key in ("tokens", "transitions", "loads", "weights", "num_experts"):
        if key in content and content[key].dtype.kind not in "iuf":
            raise SpecError(f"{path}: '{key}' holds no numbers")
    if "num_experts" in content and int(content["num_experts"]) != num_experts:
        raise SpecError(
            f"{path}: is a trace of a model with {int(content['num_experts'])} experts; this one has {num_experts}"
        )
    is_synthetic = "origin" in content and str(content["origin"]).startswith("synthetic")
    if "tokens" in content:
        tokens = content["tokens"]
        if tokens.ndim != 3 or tokens.dtype.kind not in "iu":
            raise SpecError(
                f"{path}: 'tokens' must be whole numbers of the shape (layers, tokens, experts per token)"
            )
        tokens = _only_moe(tokens, 0, moe_layers, num_model_layers)
        weights = content.get("weights")
        if weights is not None:
            weights = _only_moe(weights, 0, moe_layers, num_model_layers)
        kept, notes = drop_padding(tokens, str(path), weights)  # type: ignore[arg-type]
        return routing_from_tokens(kept, num_experts, str(path), is_synthetic=is_synthetic, notes=notes)
    if "transitions" in content:
        return routing_from_transitions(content["transitions"].astype(np.float64), str(path))
    return _from_counts(content["loads"], str(path), moe_layers, num_model_layers)


def _from_counts(
    counts: NDArray[np.generic], origin: str, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    """Return the routing of counts (layers, E) or (windows, layers, E); windows without any load are dropped."""
    array = np.asarray(counts, dtype=np.float64)
    if array.ndim not in (2, 3) or not array.size:
        raise SpecError(
            f"{origin}: counts have the shape {array.shape}; expected (layers, experts) or (windows, ...)"
        )
    array = np.asarray(_only_moe(array, array.ndim - 2, moe_layers, num_model_layers), dtype=np.float64)
    if array.ndim == 2:
        return routing_from_loads(array, origin)
    if not np.isfinite(array).all() or array.min() < 0.0:
        raise SpecError(f"{origin}: counts must be finite and 0 or more")
    busy = (array.sum(axis=2) > 0.0).all(axis=1)
    notes = [] if busy.all() else [f"removed: {int((~busy).sum())} of {len(array)} windows without tokens"]
    if not busy.any():
        raise SpecError(f"{origin}: no window has tokens in every layer; record more")
    return routing_from_loads(array[busy].sum(axis=0), origin, windows=array[busy], notes=notes)


def _read_parquet(
    path: Path, num_experts: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise SpecError(
            f"{path}: parquet needs pyarrow (pip install pyarrow), or give the trace as .npz"
        ) from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError):
        raise SpecError(f"{path}: is not a parquet file") from None
    names = table.column_names
    columns = sorted(
        (name for name in names if re.fullmatch(r"expert_\d+", name)), key=lambda each: int(each[7:])
    )
    if "layer" not in names or ("experts" not in names and not columns):
        raise SpecError(
            f"{path}: expected the columns 'layer' and 'experts' (a list), or 'layer' and 'expert_0', ..."
        )
    try:
        layer = table["layer"].to_numpy().astype(np.int64)
        if "experts" in names:
            rows = np.asarray(table["experts"].to_pylist(), dtype=np.int64)
        else:
            rows = np.column_stack([table[name].to_numpy() for name in columns]).astype(np.int64)
        order = table["token"].to_numpy() if "token" in names else np.arange(len(layer))
    except (ValueError, TypeError, OverflowError):
        raise SpecError(
            f"{path}: rows differ in their number of experts, or hold something else than numbers"
        ) from None
    if rows.ndim != 2 or not len(rows):
        raise SpecError(f"{path}: has no rows of experts")
    layers, counts = np.unique(layer, return_counts=True)
    if len(set(counts.tolist())) != 1:
        raise SpecError(f"{path}: the layers have different numbers of tokens")
    sequence = np.lexsort((order, layer))
    tokens = rows[sequence].reshape(len(layers), int(counts[0]), -1)
    kept, notes = drop_padding(
        np.asarray(_only_moe(tokens, 0, moe_layers, num_model_layers), dtype=np.int64), str(path)
    )
    return routing_from_tokens(kept, num_experts, str(path), notes=notes)


def _read_csv(
    path: Path, num_experts: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise SpecError(f"{path}: cannot be read as UTF-8 text") from None
    rows: list[list[float]] = []
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        try:
            rows.append([float(cell) for cell in cells])
        except ValueError:
            if rows or number > 1:
                raise SpecError(f"{path}:{number}: expected one number per expert") from None
            continue  # the header
        if rows and len(rows[-1]) != len(rows[0]):
            raise SpecError(f"{path}:{number}: has {len(rows[-1])} columns; the first row has {len(rows[0])}")
    if not rows:
        raise SpecError(f"{path}: has no loads; give one row per layer and one column per expert")
    loads = np.asarray(rows)
    if loads.shape[1] == num_experts + 1:
        loads = loads[:, 1:]  # numbered layers
    of_moe = np.asarray(_only_moe(loads, 0, moe_layers, num_model_layers), dtype=np.float64)
    return routing_from_loads(of_moe, str(path))


def _read_sglang_json(
    path: Path, num_experts: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise SpecError(f"{path}: is not JSON text") from None
    return _sglang_counts(document, path, num_experts, moe_layers, num_model_layers)


def _read_sglang_torch(
    path: Path, num_experts: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    document = read_torch_file(path)
    if isinstance(document, dict) and "records" in document:
        return _sglang_records(document["records"], path, num_experts, moe_layers, num_model_layers)
    return _sglang_counts(document, path, num_experts, moe_layers, num_model_layers)


def _sglang_counts(
    document: object, path: Path, num_experts: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    """Return ``logical_count``: (layers, E), or (steps, layers, E) as the ``stat`` recorder writes it."""
    if not isinstance(document, dict) or "logical_count" not in document:
        raise SpecError(f"{path}: holds no 'logical_count'; give a recorded expert distribution of SGLang")
    try:
        counts = np.asarray(document["logical_count"], dtype=np.float64)
    except (TypeError, ValueError):
        raise SpecError(f"{path}: 'logical_count' is no table of numbers") from None
    del num_experts
    return _from_counts(counts, str(path), moe_layers, num_model_layers)


def _sglang_records(
    records: object, path: Path, num_experts: int, moe_layers: tuple[int, ...], num_model_layers: int
) -> RoutingData:
    """Return the trace of the ``per_token`` recorder: ``topk_ids_of_layer`` (layers, tokens, top_k) per pass."""
    passes = [
        np.asarray(record["topk_ids_of_layer"], dtype=np.int64)
        for record in (records if isinstance(records, list) else [])
        if isinstance(record, dict) and "topk_ids_of_layer" in record
    ]
    passes = [each for each in passes if each.ndim == 3 and each.size]
    if not passes or len({(each.shape[0], each.shape[2]) for each in passes}) != 1:
        raise SpecError(
            f"{path}: holds no tokens; record with --expert-distribution-recorder-mode per_token or stat"
        )
    tokens = np.asarray(
        _only_moe(np.concatenate(passes, axis=1), 0, moe_layers, num_model_layers), dtype=np.int64
    )
    kept, notes = drop_padding(tokens, str(path))
    return routing_from_tokens(kept, num_experts, str(path), notes=notes)


def _read_trtllm(path: Path, moe_layers: tuple[int, ...]) -> RoutingData:
    """Return TensorRT-LLM's expert statistics: ``ITERATION_LAYER`` counts in ``rank*.safetensors``, summed over ranks.

    The folder is that of ``EXPERT_STATISTIC_PATH`` (examples/ep_load_balancer, load_expert_statistic).
    """
    files = sorted(path.glob("rank*.safetensors"))
    if not files or not (path / "meta_info.json").is_file():
        raise SpecError(f"{path}: is a folder without meta_info.json and rank*.safetensors of TensorRT-LLM")
    try:
        num_experts = int(json.loads((path / "meta_info.json").read_text())["num_experts"])
    except (OSError, ValueError, KeyError, TypeError):
        raise SpecError(f"{path / 'meta_info.json'}: expected an object with num_experts") from None
    counts: dict[tuple[int, int], NDArray[np.float64]] = {}
    for file in files:
        for name, tensor in read_safetensors(file).tensors.items():
            match = _KEY.fullmatch(name)
            values = tensor_array(tensor, f"{file}: {name}").astype(np.float64)
            if match is None or values.shape != (num_experts,):
                raise SpecError(
                    f"{file}: '{name[:60]}' is no count of {num_experts} experts named ITERATION_LAYER"
                )
            key = (int(match[1]), int(match[2]))
            counts[key] = counts.get(key, np.zeros(num_experts)) + values
    iterations = sorted({iteration for iteration, _ in counts})
    layers = sorted({layer for _, layer in counts})
    if set(layers) >= set(moe_layers):
        layers = list(moe_layers)
    if not all((iteration, layer) in counts for iteration in iterations for layer in layers):
        raise SpecError(f"{path}: some iterations lack layers; record the same range on every rank")
    windows = np.asarray([[counts[iteration, layer] for layer in layers] for iteration in iterations])
    return _from_counts(windows, str(path), tuple(range(len(layers))), len(layers))
