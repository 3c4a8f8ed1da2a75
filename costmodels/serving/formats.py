"""Number formats of a checkpoint's parts: what a quantisation leaves in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.simcore.domain.model import ModelSpec

__all__ = ["ServingFormats", "serving_formats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingFormats:
    """Formats of the parts of a served model, as operators are named.

    Parameters
    ----------
    attention, mlp, shared_experts, experts : str
        Projections of the attention, dense MLP, shared and routed experts.
    head : str
        LM head and embedding; no published recipe quantises them.
    kv_cache : str
        KV cache.
    """

    attention: str
    mlp: str
    shared_experts: str
    experts: str
    kv_cache: str
    head: str = "bf16"


def serving_formats(
    model: ModelSpec,
    precision: str,
    kv_precision: str,
    *,
    expert_precision: str = "",
    architecture: str = "hopper",
    engine: str = "vllm",
) -> ServingFormats:
    """Return the formats of the published checkpoint that ``precision`` stands for.

    GPT-OSS is natively MXFP4 in its experts and 16 bits elsewhere (arXiv 2508.10925, section 2.1), whatever the
    label. ``int4_wo`` and ``nvfp4`` mixtures of experts keep attention and shared experts in 16 bits
    (``hf_quant_config.json`` of nvidia/DeepSeek-V3.1-NVFP4, nvidia/Kimi-K2.6-NVFP4, nvidia/MiniMax-M2.5-NVFP4,
    nvidia/Qwen3.5-397B-A17B-NVFP4: ``exclude_modules``). DeepSeek, MiniMax, GLM and Qwen publish fp8 mixtures in
    blocks of 128 (their ``quantization_config``: ``weight_block_size``).

    Parameters
    ----------
    model : ModelSpec
        The model.
    precision, kv_precision : str
        What the plan says.
    expert_precision : str
        Format of the experts where the plan names one of its own.
    architecture, engine : str
        Of the device; the engine's kernel of MXFP4 weights depends on both.
    """
    kv_cache = "fp8" if "fp8" in kv_precision else "bf16"
    if model.moe is None:
        return ServingFormats(
            attention=precision, mlp=precision, shared_experts=precision, experts=precision, kv_cache=kv_cache
        )
    experts = expert_precision or precision
    if model.has_attention_sinks:
        is_wide = architecture != "blackwell" or engine == "vllm"
        return ServingFormats(
            attention="bf16",
            mlp="bf16",
            shared_experts="bf16",
            experts="w4a16_mxfp4" if is_wide else "w4a8_mxfp4_mxfp8",
            kv_cache=kv_cache,
        )
    if experts in ("int4_wo", "nvfp4"):
        return ServingFormats(
            attention="bf16", mlp="bf16", shared_experts="bf16", experts=experts, kv_cache=kv_cache
        )
    if "fp8" in experts:
        experts = "fp8_block"
    wide = "fp8_block" if "fp8" in precision else precision
    return ServingFormats(attention=wide, mlp=wide, shared_experts=wide, experts=experts, kv_cache=kv_cache)
