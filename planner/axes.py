"""The choices of each axis of the plan space: what is tried for a degree, a schedule, a memory lever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.partition import balanced_ends
from meshwright.costmodels.plan_columns import LAYER_FIELDS, V_SHAPED, layer_counts, module_mask
from meshwright.hardware_specs.specs import NodeSpec
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.plan import (
    CP_METHODS,
    OFFLOADS,
    RECOMPUTES,
    SCHEDULES_KNOWN,
    SHARDINGS,
    VOCAB_PARALLELS,
    can_partition,
    partition_layers,
    partition_with_ends,
)
from meshwright.simcore.schedules import SCHEDULES

__all__ = [
    "Axis",
    "context_axis",
    "context_degrees",
    "divisors",
    "expert_axis",
    "expert_blocks",
    "layout_axis",
    "micro_batch_axis",
    "offload_axis",
    "overlap_degrees",
    "recompute_axis",
    "sequence_axis",
    "sharding_axis",
    "word_axis",
]

# Schedules with one chunk per stage, or with the model twice; the others have two in a V, or interleave.
_SINGLE_CHUNK = ("gpipe", "1f1b", "zb_h1", "zb_h2", "dualpipe")
# Shares of a stage's layers that full recompute may cover; 1 is all.
_RECOMPUTE_SHARES = (0.25, 0.5, 0.75, 1.0)
_OFFLOAD_SHARES = (0.25, 0.5, 0.75, 1.0)
# Chunks of the expert exchange, as Tutel tries them (arXiv 2206.03382, section 3.3).
_OVERLAP_DEGREES = (1, 2, 4, 8)
# Fewer tokens per rank leave attention and products too small to be worth a sequence split.
_LEAST_TOKENS_PER_RANK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One choice of a plan: column values by name, all of one length, entry ``i`` of each is option ``i``."""

    columns: Mapping[str, NDArray[np.generic]]

    def __len__(self) -> int:
        """Return the number of options."""
        return len(next(iter(self.columns.values())))


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _axis(**columns: Sequence[object]) -> Axis:
    return Axis(columns={name: np.array(values) for name, values in columns.items()})


def word_axis(name: str, words: Sequence[str], known: Sequence[str]) -> Axis:
    """Return an axis over words of a plan field, as column codes."""
    return _axis(**{name: [known.index(word) for word in words]})


def micro_batch_axis(global_batch_size: int, dp: int) -> Axis:
    """Return every micro-batch that divides a replica's share of the batch; 1 where dp does not divide it."""
    sizes = divisors(global_batch_size // dp) if global_batch_size % dp == 0 else [1]
    return _axis(micro_batch_size=sizes)


def sequence_axis(tp: int) -> Axis:
    """Return sequence parallelism off, and on where there are ranks to split over."""
    return _axis(sequence_parallel=[False, True] if tp > 1 else [False])


def context_axis(cp: int, tp: int, gpus_per_node: int) -> Axis:
    """Return the ways context parallel ranks exchange; hierarchical only where the group spans nodes."""
    if cp == 1:
        return word_axis("cp_method", ["ring"], CP_METHODS)
    methods = [name for name in CP_METHODS if name != "hierarchical" or tp * cp > gpus_per_node]
    return word_axis("cp_method", methods, CP_METHODS)


def context_degrees(sequence_length: int, ranks: int) -> list[int]:
    """Return the context parallel degrees worth trying: divisors that leave every rank enough tokens."""
    return [d for d in divisors(ranks) if d == 1 or sequence_length >= d * _LEAST_TOKENS_PER_RANK * 2]


def expert_axis(model: ModelSpec, ranks: int, tp: int) -> Axis:
    """Return grids of expert ranks: ep divides the experts, etp the tensor ranks, both together those of a stage."""
    grids = [(1, 1)]
    if model.moe is not None:
        experts = divisors(model.moe.num_experts)
        grids = [(ep, etp) for etp in divisors(tp) for ep in experts if ranks % (ep * etp) == 0]
    return _axis(ep=[ep for ep, _ in grids], etp=[etp for _, etp in grids])


def overlap_degrees(context: CostContext, named: Sequence[int | str | bool] | None) -> list[int]:
    """Return the chunks in which experts and their exchange overlap, ascending: those named, else what may pay.

    No export target writes more than one, so that more are tried unasked only where the workload says what routing
    comes to on each ep, and with it what the exchange takes.
    """
    if context.model.moe is None:
        return [1]
    if named is not None:
        return sorted({int(degree) for degree in named})
    return list(_OVERLAP_DEGREES if context.workload.routing_by_ep else _OVERLAP_DEGREES[:1])


def expert_blocks(experts: Axis, degrees: Sequence[int]) -> list[tuple[Axis, Axis]]:
    """Return axes of experts and of overlap: grids without an exchange apart, as nothing overlaps there."""
    exchanges = experts.columns["ep"].astype(np.int64) * experts.columns["etp"].astype(np.int64) > 1
    if len(degrees) == 1 or not exchanges.any():
        return [(experts, _axis(expert_overlap=degrees[:1]))]
    return [
        (
            Axis(columns={name: values[kept] for name, values in experts.columns.items()}),
            _axis(expert_overlap=own),
        )
        for kept, own in ((~exchanges, degrees[:1]), (exchanges, degrees))
        if kept.any()
    ]


def sharding_axis(dp: int, cp: int, tp: int, gpus_per_node: int) -> Axis:
    """Return shardings with their groups: all of dp, and for HSDP whole nodes and upwards.

    Context parallel ranks hold the same weights and share them out as well, so one replica on several shards too.
    """
    choices = [("none", 1)]
    if dp * cp > 1:
        choices = [(name, dp) for name in SHARDINGS if name != "hsdp"]
        group = max(2, gpus_per_node // tp)
        while group < dp:
            if dp % group == 0:
                choices.append(("hsdp", group))
            group *= 2
    return _axis(
        sharding=[SHARDINGS.index(name) for name, _ in choices], sharding_group=[g for _, g in choices]
    )


def recompute_axis(model: ModelSpec) -> Axis:
    """Return recompute policies: none, the software's selective, lists of modules, and full for a share of the layers.

    ``recompute_share`` becomes a number of layers once a stage's are known; ``recompute_share_below`` is the next
    smaller share, which may come to the same number.
    """
    modules: list[tuple[str, ...]] = [("layernorm",)]
    if model.moe is None:
        modules += [("layernorm", "mlp")]
    else:
        latent = ("mla_up_proj",) if model.mla else ()
        modules += [("layernorm", "moe_act", *latent), ("layernorm", "moe", *latent)]
    none, selective, full = (RECOMPUTES.index(word) for word in RECOMPUTES)
    options = [(none, 0, 1.0), (selective, 0, 1.0)]
    options += [(selective, module_mask(names), 1.0) for names in modules]
    options += [(full, 0, share) for share in _RECOMPUTE_SHARES]
    kinds, masks, shares = zip(*options, strict=True)
    below = dict(zip(_RECOMPUTE_SHARES, (0.0, *_RECOMPUTE_SHARES), strict=False))
    return _axis(
        recompute=kinds,
        recompute_modules=masks,
        recompute_share=shares,
        recompute_share_below=[below[share] for share in shares],
    )


def offload_axis(node: NodeSpec, allows_nvme: bool) -> Axis:
    """Return what rests off the device: nothing, shares of the optimizer states, activations, ZeRO-3's weights too.

    A node that does not say what its host has offers nothing.
    """
    options: list[tuple[str, float, str, bool]] = [("none", 1.0, "none", False)]
    if node.host is not None and node.host_memory_bytes is not None:
        options.append(("none", 1.0, "none", True))
        for has_activations in (False, True):
            options += [("cpu", share, "none", has_activations) for share in _OFFLOAD_SHARES]
            options.append(("cpu", 1.0, "cpu", has_activations))
        if allows_nvme:
            options += [
                ("nvme", 1.0, "none", False),
                ("nvme", 1.0, "cpu", False),
                ("nvme", 1.0, "nvme", False),
            ]
    return _axis(
        optimizer_offload=[OFFLOADS.index(option[0]) for option in options],
        optimizer_offload_fraction=[option[1] for option in options],
        parameter_offload=[OFFLOADS.index(option[2]) for option in options],
        activation_offload=[option[3] for option in options],
    )


def layout_axis(
    context: CostContext, pp: int, boundary: tuple[float, float], vocab_words: Sequence[str]
) -> Axis:
    """Return pipelines: schedule, chunks and layers per stage as one choice.

    Every schedule; for interleaved ones every number of chunks that leaves layers even, or even but for embedding
    and loss at the ends. Each with the frameworks' own split of the layers and, where it differs, the one that makes
    the slowest stage fastest.

    Parameters
    ----------
    context : CostContext
        Job.
    pp : int
        Stages.
    boundary : tuple[float, float]
        What embedding and head take, in layers.
    vocab_words : Sequence[str]
        Kinds of vocabulary parallelism to try.
    """
    num_layers = context.model.num_layers
    pipelines = [("none", 1)]
    if pp > 1:
        chunks = sorted({d for d in (*divisors(num_layers), *divisors(num_layers + 2)) if d > 1})
        pipelines = [
            *((name, 1) for name in _SINGLE_CHUNK if name in SCHEDULES),
            *((name, 2) for name in V_SHAPED if name in SCHEDULES),
            *(("interleaved_1f1b", count) for count in chunks),
        ]
    names = ("schedule", "vpp", "vocab_parallel", *LAYER_FIELDS)
    rows: list[tuple[int, ...]] = []
    for schedule, vpp in pipelines:
        for layers in _layouts(num_layers, pp * vpp, boundary):
            counts = layer_counts(layers, pp, schedule) if layers else (0,) * len(LAYER_FIELDS)
            for word in vocab_words if pp > 1 else ("none",):
                code = VOCAB_PARALLELS.index(word)
                rows.append((SCHEDULES_KNOWN.index(schedule), vpp, code, *counts))
    return _axis(**dict(zip(names, zip(*rows, strict=True), strict=True)))


def _layouts(num_layers: int, num_stages: int, boundary: tuple[float, float]) -> list[tuple[int, ...]]:
    """Return the frameworks' split and the balanced one where it is another; an empty one where none exists."""
    if not can_partition(num_layers, num_stages):
        return [()]
    own = partition_layers(num_layers, num_stages)
    if num_stages == 1:
        return [own]
    ends = balanced_ends(num_layers, num_stages, *boundary)
    if ends == (own[0], own[-1]):
        return [own]
    return [own, partition_with_ends(num_layers, num_stages, *ends)]
