"""The same model with its experts in another order: a placement for engines that read no placement file.

Engines such as Megatron-LM, DeepSpeed and vLLM give consecutive experts to consecutive ranks. Renaming the experts of
a layer, that is permuting their weights, the router's rows and its biases alike, changes nothing but who is next to
whom, so that any placement without copies can be had by a permuted checkpoint. Tensors are moved as bytes.

Known layouts: Hugging Face checkpoints with one tensor per expert (``...experts.N.up_proj.weight``), or all experts of
a layer stacked along the first axis (``...experts.gate_up_proj``); routers named ``gate`` or ``router`` with their
bias or score correction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import ExportError, SpecError
from meshwright.planner.placement.safetensors_bytes import (
    RawTensor,
    SafetensorsFile,
    read_safetensors,
    write_safetensors,
)
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["permute_checkpoint", "permute_tensors", "permutes_groups"]

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.layers\.\d+\..*?experts\.)(\d+)(\..+)$|^(layers\.\d+\..*?experts\.)(\d+)(\..+)$")
_STACKED = re.compile(r"(?:^|\.)layers\.\d+\..*?experts\.(?!\d+\.)")
_SHARED = re.compile(r"shared_experts?\b")
_ROUTER = re.compile(r"\.(?:mlp|block_sparse_moe|moe|feed_forward|ffn)\.(?:gate|router)\.[a-z_.]+$")


def permute_checkpoint(
    source: Path, target: Path, placement: ExpertPlacement, moe_layers: tuple[int, ...], num_groups: int = 1
) -> tuple[Path, ...]:
    """Write the safetensors files of a checkpoint with the experts of each layer in the order of the slots.

    Files that are not safetensors (configuration, tokenizer) are not copied. An index is, with the names it has.

    Parameters
    ----------
    source, target : Path
        Folder to read, and a new or empty folder to write.
    placement : ExpertPlacement
        Without copies; its slots are the new order of the experts.
    moe_layers : tuple[int, ...]
        Index of each mixture-of-experts layer in the model.
    num_groups : int
        Groups of group-limited routing: the order must keep each together.

    Returns
    -------
    tuple[Path, ...]
        Files written.

    Raises
    ------
    ExportError
        If the placement has copies or breaks groups, or the target is not empty.
    SpecError
        If a file is damaged, or an expert or router of a layer is missing.
    """
    _check_order(placement, num_groups)
    if not source.is_dir():
        raise SpecError(f"{source}: no such folder; name the folder of the checkpoint's .safetensors files")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise SpecError(f"{source}: holds no .safetensors files")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target}: exists and is not an empty folder; choose another")
    order = dict(zip(moe_layers, placement.slots, strict=True))
    read = {file.name: read_safetensors(file) for file in files}
    home = {name: file for file, content in read.items() for name in content.tensors}
    everything = {name: tensor for content in read.values() for name, tensor in content.tensors.items()}
    moved = permute_tensors(everything, order, placement.num_experts, str(source))
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for file, content in read.items():
        tensors = {name: moved[name] for name in content.tensors if home[name] == file}
        path = target / file
        write_safetensors(path, SafetensorsFile(tensors=tensors, metadata=content.metadata))
        written.append(path)
    index = source / "model.safetensors.index.json"
    if index.is_file():
        (target / index.name).write_bytes(index.read_bytes())
        written.append(target / index.name)
    return tuple(written)


def permute_tensors(
    tensors: Mapping[str, RawTensor], order: Mapping[int, NDArray[np.int64]], num_experts: int, where: str
) -> dict[str, RawTensor]:
    """Return the tensors under their names, experts and router rows of each layer in a new order.

    Parameters
    ----------
    tensors : Mapping[str, RawTensor]
        All tensors of the checkpoint.
    order : Mapping[int, NDArray[np.int64]]
        By layer of the model: the old number of each new expert, ``(num_experts,)``.
    num_experts : int
        Routed experts of a layer.
    where : str
        Named in messages.

    Raises
    ------
    SpecError
        If an expert or the router of a layer is missing, or shapes do not fit.
    """
    result = dict(tensors)
    has_router: set[int] = set()
    has_experts: set[int] = set()
    for name, tensor in tensors.items():
        match = _LAYER.search(name)
        layer = int(match[1]) if match else -1
        if layer not in order or _SHARED.search(name):
            continue
        expert = _EXPERT.match(name)
        if expert:
            head, number, tail = (part for part in expert.groups() if part is not None)
            old = f"{head}{int(order[layer][int(number)])}{tail}" if int(number) < num_experts else ""
            if old not in tensors or tensors[old].shape != tensor.shape or tensors[old].dtype != tensor.dtype:
                raise SpecError(f"{where}: '{name}' has no counterpart '{old}' of the same shape and format")
            result[name] = tensors[old]
            has_experts.add(layer)
        elif _STACKED.search(name) or _ROUTER.search(name):
            if not tensor.shape or tensor.shape[0] != num_experts:
                raise SpecError(
                    f"{where}: '{name}' has the shape {tensor.shape}; expected {num_experts} rows"
                )
            result[name] = _take_rows(tensor, order[layer])
            (has_router if _ROUTER.search(name) else has_experts).add(layer)
    for layer in order:
        if layer not in has_router or layer not in has_experts:
            part = "router" if layer not in has_router else "experts"
            raise SpecError(
                f"{where}: found no {part} of layer {layer}; the checkpoint's names are not known"
            )
    return result


def _take_rows(tensor: RawTensor, order: NDArray[np.int64]) -> RawTensor:
    """Return a tensor with its rows, as bytes, in a new order."""
    rows = np.frombuffer(tensor.data, dtype=np.uint8).reshape(len(order), -1)
    return RawTensor(dtype=tensor.dtype, shape=tensor.shape, data=memoryview(rows[order].tobytes()))


def permutes_groups(placement: ExpertPlacement, num_groups: int) -> bool:
    """Return whether each group of consecutive slots holds exactly one group of experts, in any order."""
    size = placement.num_experts // num_groups
    groups = placement.slots.reshape(placement.num_layers, num_groups, size) // size
    return bool((groups == groups[:, :, :1]).all())


def _check_order(placement: ExpertPlacement, num_groups: int) -> None:
    if placement.num_slots != placement.num_experts:
        raise ExportError("a permuted checkpoint has one of each expert; leave out --redundant-experts")
    if num_groups > 1 and not permutes_groups(placement, num_groups):
        raise ExportError(
            f"the placement takes experts out of their {num_groups} groups, among which routing chooses; a permuted "
            "checkpoint would route otherwise: use an engine that reads placements"
        )
