"""Memory of a serving rank: weights, KV cache per token, and how many tokens the cache holds."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.costmodels.operators import element_bytes
from meshwright.costmodels.serving.constants import EngineConstants
from meshwright.costmodels.serving.formats import ServingFormats
from meshwright.errors import InfeasiblePlanError
from meshwright.hardware_specs.specs import GpuSpec
from meshwright.simcore.domain import model_parameters
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.serving import ServingPool

__all__ = ["ServingMemory", "kv_bytes_per_token", "serving_memory", "weight_bytes_per_gpu"]

_GIB = 2.0**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMemory:
    """Where a rank's memory goes.

    Parameters
    ----------
    weight_bytes : float
        Weights of the fullest rank [B].
    overhead_bytes : float
        Activations, graphs, communicators [B].
    kv_cache_bytes : float
        What is left for the cache within the engine's share of the device [B].
    kv_bytes_per_token : float
        Cache of one token on one rank, all its layers [B].
    """

    weight_bytes: float
    overhead_bytes: float
    kv_cache_bytes: float
    kv_bytes_per_token: float

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens the cache holds (per attention data parallel rank)."""
        return int(self.kv_cache_bytes / self.kv_bytes_per_token)


def weight_bytes_per_gpu(model: ModelSpec, formats: ServingFormats, pool: ServingPool) -> float:
    """Return the weights of the fullest rank [B]; multi-token-prediction modules are loaded only with speculation.

    Embedding, head, attention and dense MLP are split by tp, experts and their copies by ``moe_tp * ep``; attention data
    parallel ranks repeat what they do not split, and MLA's down-projections are repeated by every rank.
    """
    layers, moe_layers = model.num_layers, model.num_moe_layers
    tables = model.num_embedding_parameters + model.num_head_parameters
    attention = model_parameters.qkv_parameters(model) + model_parameters.output_projection_parameters(model)
    repeated = 0.0
    if model.mla is not None:
        mla = model.mla
        repeated = float(
            model.hidden_size * ((mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_rope_head_dim)
        )
    total = tables * element_bytes(formats.head) / pool.tp
    total += layers * ((attention - repeated) / pool.tp + repeated) * element_bytes(formats.attention)
    linear = model.num_linear_layers * model_parameters.linear_attention_difference(model)
    total += linear / pool.tp * element_bytes(formats.attention)
    total += (
        (layers - moe_layers)
        * model_parameters.mlp_parameters(model, model.ffn_hidden_size)
        * (element_bytes(formats.mlp) / pool.tp)
    )
    if model.moe is not None:
        split = pool.moe_tp * pool.ep
        shared = model_parameters.mlp_parameters(model, model.moe.shared_ffn_hidden_size)
        total += moe_layers * shared * element_bytes(formats.shared_experts) / pool.tp
        experts = float(model.num_expert_parameters * (model.moe.num_experts + pool.redundant_experts))
        total += moe_layers * experts * element_bytes(formats.experts) / split
        total += moe_layers * float(model.moe.num_experts * model.hidden_size) * 2.0
    # The fullest stage holds a rounded-up share of the layers.
    return total / pool.pp


def kv_bytes_per_token(model: ModelSpec, formats: ServingFormats, pool: ServingPool) -> float:
    """Return the cache of one token on one rank [B].

    MLA keeps one latent and one rotary key that every rank repeats (DeepSeek-V2, arXiv 2405.04434, section 2.1); other
    attention keeps its rank's KV heads, at least one. Windowed layers are counted whole: the engines' hybrid allocators
    differ, and only long contexts tell.
    """
    width = 1.0 if formats.kv_cache == "fp8" else 2.0
    if model.mla is not None:
        per_layer = float(model.mla.kv_lora_rank + model.mla.qk_rope_head_dim)
    else:
        per_layer = 2.0 * max(1.0, model.num_query_groups / pool.tp) * model.head_dim
    return width * per_layer * (model.num_layers - model.num_linear_layers) / pool.pp


def serving_memory(
    model: ModelSpec,
    formats: ServingFormats,
    pool: ServingPool,
    gpu: GpuSpec,
    constants: EngineConstants,
) -> ServingMemory:
    """Return how a rank's memory is spent.

    Raises
    ------
    InfeasiblePlanError
        If weights and overhead leave no room for one block of cache; says how much is missing.
    """
    weights = weight_bytes_per_gpu(model, formats, pool)
    per_token = kv_bytes_per_token(model, formats, pool)
    budget = gpu.memory_bytes * constants.memory_fraction
    left = budget - weights - constants.overhead_bytes
    needed = pool.block_size * per_token
    if left < needed:
        raise InfeasiblePlanError(
            f"{model.name} does not fit on {gpu.id} with tp {pool.tp}, pp {pool.pp}, ep {pool.ep}: weights "
            f"{weights / _GIB:.1f} GiB and overhead {constants.overhead_bytes / _GIB:.1f} GiB leave the KV cache "
            f"{(needed - left) / _GIB:.1f} GiB short of {budget / _GIB:.1f} GiB usable; raise tp or ep, or use a "
            "narrower precision",
            {"memory": 1},
        )
    return ServingMemory(
        weight_bytes=weights,
        overhead_bytes=constants.overhead_bytes,
        kv_cache_bytes=left,
        kv_bytes_per_token=per_token,
    )
