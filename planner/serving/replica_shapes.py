"""Every way to spread one replica over GPUs, as columns, and the rules that forbid some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec, GpuSpec
from meshwright.planner.serving.limits import ServingLimits
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.serving import EngineName
from meshwright.simcore.domain.workload import Precision

__all__ = [
    "SHAPE_RULES",
    "ReplicaShapes",
    "ShapeRule",
    "all_shapes",
    "can_decode_alone",
    "has_units",
    "rule_numbers",
    "vendor_reason",
]

IntColumn = NDArray[np.int64]
BoolColumn = NDArray[np.bool_]
# Deeper pipelines only add latency: more stages are beyond any published deployment.
_MAX_STAGES = 8
# One scale per 128 x 128 weights (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): a shard holds whole blocks.
_FP8_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplicaShapes:
    """Degrees of replicas, one entry per shape; see :class:`meshwright.simcore.domain.serving.ServingPool`."""

    tp: IntColumn
    pp: IntColumn
    attention_dp: IntColumn
    moe_tp: IntColumn
    ep: IntColumn
    redundant_experts: IntColumn

    @property
    def num_gpus(self) -> IntColumn:
        """GPUs of each."""
        return self.tp * self.pp * self.attention_dp

    def __len__(self) -> int:
        """Number of shapes."""
        return len(self.tp)

    def kept(self, mask: BoolColumn) -> ReplicaShapes:
        """Return the shapes of a mask."""
        return ReplicaShapes(**{each.name: getattr(self, each.name)[mask] for each in fields(self)})

    def row(self, index: int) -> dict[str, int]:
        """Return the degrees of one shape by name; redundant experts only where there are any."""
        degrees = {each.name: int(getattr(self, each.name)[index]) for each in fields(self)}
        return {name: value for name, value in degrees.items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRule:
    """One rule of shapes.

    Parameters
    ----------
    name, sentence : str
        Name in reports, and what the rule demands.
    holds : Callable
        ``(model, cluster, engine, precision, shapes)`` to a mask.
    """

    name: str
    sentence: str
    holds: Callable[[ModelSpec, ClusterSpec, EngineName, Precision, ReplicaShapes], BoolColumn]


def all_shapes(
    model: ModelSpec,
    cluster: ClusterSpec,
    limits: ServingLimits,
    max_gpus: int,
    *,
    has_routing: bool = False,
) -> ReplicaShapes:
    """Return every combination of degrees of up to ``max_gpus`` GPUs, before any rule has spoken.

    Parameters
    ----------
    model : ModelSpec
        Dense models have neither expert ranks nor attention data parallel ranks: those would be replicas.
    cluster : ClusterSpec
        Its nodes' sizes are the natural degrees.
    limits : ServingLimits
        Degrees the user allows.
    max_gpus : int
        Most GPUs of one replica.
    has_routing : bool
        Recorded routing says what copies of experts are worth; without it none are tried unasked.
    """
    sizes = _degrees(cluster, max_gpus)
    wanted = {
        "tp": limits.numbers("tp", sizes),
        "pp": limits.numbers("pp", tuple(size for size in sizes if size <= _MAX_STAGES)),
        "attention_dp": limits.numbers("attention_dp", (1,) if model.moe is None else sizes),
        "ep": limits.numbers("ep", (1,) if model.moe is None else sizes),
        "redundant_experts": limits.numbers("redundant_experts", (0, *sizes[1:]) if has_routing else (0,)),
    }
    tp, pp, attention_dp, ep, redundant = (
        axis.ravel()
        for axis in np.meshgrid(*(np.array(axis, dtype=np.int64) for axis in wanted.values()), indexing="ij")
    )
    group = tp * attention_dp
    is_possible = (group * pp <= max_gpus) & (group % ep == 0)
    moe_tp = np.ones_like(tp) if model.moe is None else group // ep
    shapes = ReplicaShapes(
        tp=tp, pp=pp, attention_dp=attention_dp, moe_tp=moe_tp, ep=ep, redundant_experts=redundant
    )
    if "redundant_experts" not in limits.allowed:
        # One slot of every rank; a single rank holds each expert once.
        is_possible &= (redundant == 0) | ((redundant == ep) & (ep > 1))
    if "moe_tp" in limits.allowed:
        is_possible &= np.isin(moe_tp, limits.numbers("moe_tp", ()))
    return shapes.kept(is_possible)


def _degrees(cluster: ClusterSpec, max_gpus: int) -> tuple[int, ...]:
    """Return divisors of a node and multiples of it that powers of two or the number of nodes give."""
    per_node = cluster.node.num_gpus
    nodes = {*_divisors(cluster.num_nodes), *(2**power for power in range(cluster.num_nodes.bit_length()))}
    sizes = {*_divisors(per_node), *(per_node * count for count in nodes if count <= cluster.num_nodes)}
    return tuple(size for size in sorted(sizes) if size <= max_gpus)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _tensor_parallel(
    model: ModelSpec, cluster: ClusterSpec, engine: EngineName, precision: Precision, shapes: ReplicaShapes
) -> BoolColumn:
    groups = model.num_query_groups
    splits_heads = model.num_attention_heads % shapes.tp == 0
    # Fewer key/value heads than ranks are repeated; the latent of MLA always is.
    splits_groups = (groups % shapes.tp == 0) | (shapes.tp % groups == 0) | (model.mla is not None)
    in_node = shapes.tp <= cluster.node.num_gpus
    splits_mlp = model.ffn_hidden_size % shapes.tp == 0
    return np.asarray(splits_heads & splits_groups & in_node & splits_mlp)


def _pipeline(
    model: ModelSpec, cluster: ClusterSpec, engine: EngineName, precision: Precision, shapes: ReplicaShapes
) -> BoolColumn:
    return np.asarray(shapes.pp <= model.num_layers)


def _experts(
    model: ModelSpec, cluster: ClusterSpec, engine: EngineName, precision: Precision, shapes: ReplicaShapes
) -> BoolColumn:
    if model.moe is None:
        return np.asarray(shapes.ep == 1)
    num_experts, copies = model.moe.num_experts, shapes.redundant_experts
    divides = ((num_experts + copies) % shapes.ep == 0) & (copies <= num_experts * (shapes.ep - 1))
    return np.asarray(divides & (model.moe.moe_ffn_hidden_size % shapes.moe_tp == 0))


def _blocks(
    model: ModelSpec, cluster: ClusterSpec, engine: EngineName, precision: Precision, shapes: ReplicaShapes
) -> BoolColumn:
    if precision != "fp8_block":
        return np.ones(len(shapes), dtype=np.bool_)
    # Leading dense layers of a mixture split over all ranks of the attention.
    fits = (model.ffn_hidden_size // shapes.tp) % _FP8_BLOCK == 0
    if model.moe is None:
        return np.asarray(fits)
    experts = (model.moe.moe_ffn_hidden_size // shapes.moe_tp) % _FP8_BLOCK == 0
    return np.asarray(experts & (fits if model.moe.num_dense_layers else experts))


def _engine(
    model: ModelSpec, cluster: ClusterSpec, engine: EngineName, precision: Precision, shapes: ReplicaShapes
) -> BoolColumn:
    group = shapes.tp * shapes.attention_dp
    if model.moe is None:
        return np.asarray(shapes.attention_dp == 1)
    if engine == "vllm":
        # --enable-expert-parallel shares the experts out over all ranks, or none does.
        return np.asarray((shapes.ep == group) | (shapes.ep == 1))
    if engine == "trtllm":
        # enable_attention_dp makes every rank of the group hold the whole attention.
        return np.asarray((shapes.attention_dp == 1) | (shapes.tp == 1))
    # --enable-dp-attention of SGLang; its pipeline does not go with it.
    return np.asarray((shapes.attention_dp == 1) | (shapes.pp == 1))


SHAPE_RULES: tuple[ShapeRule, ...] = (
    ShapeRule(
        name="tensor_parallel",
        sentence="tp divides attention heads and MLP width, shares or repeats key/value heads evenly, and stays in a node",
        holds=_tensor_parallel,
    ),
    ShapeRule(name="pipeline", sentence="every pipeline stage has a layer", holds=_pipeline),
    ShapeRule(
        name="expert_parallel",
        sentence="ep divides the experts and their copies, moe_tp divides an expert's width; dense models have neither",
        holds=_experts,
    ),
    ShapeRule(
        name="quantisation",
        sentence=f"with fp8_block every shard of an MLP is a multiple of {_FP8_BLOCK} wide",
        holds=_blocks,
    ),
    ShapeRule(
        name="engine",
        sentence="the engine can launch it: vllm has ep 1 or over all ranks, trtllm attention_dp with tp 1, sglang "
        "attention_dp with pp 1; dense models have attention_dp 1",
        holds=_engine,
    ),
)


def can_decode_alone(engine: EngineName, degrees: Mapping[str, int]) -> bool:
    """Return whether the engine hands its cache from another pool to a replica of this shape.

    vLLM's NIXL connector counts transfers per rank of the receiver, which has one stage (``nixl_connector.py``, 0.33).
    """
    return engine != "vllm" or degrees["pp"] == 1


def vendor_reason(engine: str, gpu: GpuSpec) -> str | None:
    """Return why an engine does not run on a device of its vendor; None where it does."""
    if engine != "trtllm" or gpu.vendor.lower() == "nvidia":
        return None
    return f"trtllm (TensorRT-LLM) runs on NVIDIA GPUs only, and {gpu.id} is made by {gpu.vendor}; use vllm or sglang"


def has_units(model: ModelSpec, gpu: GpuSpec, precision: str) -> bool:
    """Return whether a device runs a model in a format: its units multiply in it, or widen narrow weights first."""
    if precision == "int4_wo" or (precision == "nvfp4" and model.has_attention_sinks):
        # Weight-only formats: GPT-OSS's 4 bits (arXiv 2508.10925, section 2.1) are widened where no unit takes them.
        return True
    try:
        gpu.peak(precision)
    except SpecError:
        return False
    return True


def rule_numbers(
    model: ModelSpec,
    cluster: ClusterSpec,
    engine: EngineName,
    precision: Precision,
    degrees: Mapping[str, int],
) -> list[str]:
    """Return what forbids one shape: a clause per broken rule, none when an engine can launch it."""
    numbers = {"redundant_experts": 0, **degrees}
    shape = ReplicaShapes(**{name: np.array([value], dtype=np.int64) for name, value in numbers.items()})
    text = ", ".join(f"{name} {value}" for name, value in degrees.items())
    return [
        f"{rule.name} ({rule.sentence}): {text} on {engine}, {precision}"
        for rule in SHAPE_RULES
        if not bool(rule.holds(model, cluster, engine, precision, shape)[0])
    ]
