"""Model FLOPs of a training step: the numerator of MFU, with its convention printed beside every figure."""

from __future__ import annotations

from typing import Literal

from meshwright.simcore.domain.model import ModelSpec

__all__ = ["FlopsConvention", "hardware_flops", "model_flops"]

FlopsConvention = Literal["causal", "full-attention"]


def _linear_flops_per_token(model: ModelSpec) -> float:
    """Forward FLOPs per token of all layers' matrix products with weights."""
    heads = model.num_attention_heads + 2 * model.num_query_groups
    attention = (
        model.hidden_size * heads * model.head_dim
        + model.num_attention_heads * model.head_dim * model.hidden_size
    )
    mlp = (3 if model.is_gated_mlp else 2) * model.hidden_size * model.ffn_hidden_size
    return 2.0 * model.num_layers * (attention + mlp)


def _attention_flops_per_token(model: ModelSpec, sequence_length: int, convention: FlopsConvention) -> float:
    """Forward FLOPs per token of scores and weighted sums: 4 s a d whole, half of it causal."""
    pairs = float(sequence_length) if convention == "full-attention" else sequence_length / 2.0
    if model.sliding_window is not None and model.sliding_window < sequence_length and convention == "causal":
        window = float(model.sliding_window)
        windowed = window - window * window / (2.0 * sequence_length)
        full_share = 1.0 / model.full_attention_interval if model.full_attention_interval else 0.0
        pairs = full_share * pairs + (1.0 - full_share) * windowed
    return 4.0 * model.num_layers * pairs * model.num_attention_heads * model.head_dim


def model_flops(
    model: ModelSpec, num_tokens: int, sequence_length: int, convention: FlopsConvention = "causal"
) -> float:
    """Return the FLOPs of forward and backward (twice forward) of ``num_tokens`` tokens.

    Logits are counted, recompute is not; the ``causal`` convention counts attention half (as Llama 3 and
    Megatron-Bridge do), ``full-attention`` whole (as PaLM, Korthikanti and llm-foundry do).

    Parameters
    ----------
    model : ModelSpec
        A dense model.
    num_tokens : int
        Tokens of the step.
    sequence_length : int
        Tokens of one sequence, for the attention term.
    convention : FlopsConvention
        How attention is counted.

    Returns
    -------
    float
        FLOPs of the whole cluster.
    """
    logits = 2.0 * model.hidden_size * model.vocab_size
    forward = (
        _linear_flops_per_token(model)
        + _attention_flops_per_token(model, sequence_length, convention)
        + logits
    )
    return 3.0 * forward * num_tokens


def hardware_flops(
    model: ModelSpec,
    num_tokens: int,
    sequence_length: int,
    recompute: str,
    convention: FlopsConvention = "causal",
    *,
    recomputes_operators: bool = False,
) -> float:
    """Return :func:`model_flops` plus what recompute runs again: the numerator of HFU.

    ``selective`` repeats the attention core, or half of the linear products where the software's policy is by
    operator (``recomputes_operators``).
    """
    attention = _attention_flops_per_token(model, sequence_length, convention)
    selective = 0.5 * _linear_flops_per_token(model) if recomputes_operators else attention
    again = {"none": 0.0, "selective": selective, "full": attention + _linear_flops_per_token(model)}[
        recompute
    ]
    return model_flops(model, num_tokens, sequence_length, convention) + again * num_tokens
