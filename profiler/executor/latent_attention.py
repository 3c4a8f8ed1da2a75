"""Multi-head latent attention of one layer (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The down projections are whole on every tensor parallel rank and work on the tokens at hand; their latents enter the split
up projections (Megatron-Core, ``transformer/multi_latent_attention.py``). Where queries have no latent the hidden state
itself enters with the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meshwright.profiler.executor.attention import rotate
from meshwright.profiler.executor.build import BuildContext
from meshwright.profiler.executor.context import causal_attention
from meshwright.profiler.executor.kv_cache import LatentCache
from meshwright.profiler.executor.linear import Linear, cut
from meshwright.profiler.executor.norms import Norm
from meshwright.profiler.executor.tensor_parallel import enter_split
from meshwright.profiler.executor.weights import Role

__all__ = ["LatentAttention"]


class LatentAttention(nn.Module):
    """Latents of queries, and of keys and values together; rotary parts beside them.

    Parameters
    ----------
    context : BuildContext
        Model, plan, groups and weights.
    name : str
        Of the layer, before the names of its weights.

    Attributes
    ----------
    cache : LatentCache | None
        Where latents and rotary keys stay while a model is served; None trains.
    """

    def __init__(self, context: BuildContext, name: str) -> None:
        super().__init__()
        model, mla, tp = context.model, context.model.mla, context.mesh.tp
        assert mla is not None
        self._context, self._mla = context, mla
        self.cache: LatentCache | None = None
        self._heads = model.num_attention_heads // tp.size
        source, hidden, heads = context.source, model.hidden_size, model.num_attention_heads
        split, whole = Role(is_split=True), context.scattered_role

        def down(suffix: str, width: int) -> Linear:
            return Linear(
                source.normal(f"{name}.{suffix}.weight", (width, hidden)),
                source.normal(f"{name}.{suffix}.bias", (width,)) if model.has_qkv_bias else None,
                role=whole,
                gradients=context.gradients,
            )

        def up(suffix: str, width: int, inputs: int) -> Linear:
            drawn = source.normal(f"{name}.{suffix}.weight", (heads * width, inputs))
            return Linear(cut(drawn, 0, tp.index, tp.size), None, role=split, gradients=context.gradients)

        query_width = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        self.query_down: Linear | None = None
        self.query_norm: Norm | None = None
        if mla.q_lora_rank is not None:
            self.query_down = down("query_down", mla.q_lora_rank)
            self.query_norm = Norm(context, mla.q_lora_rank, whole)
        self.query_up = up("query_up", query_width, mla.q_lora_rank or hidden)
        self.key_value_down = down("key_value_down", mla.kv_lora_rank + mla.qk_rope_head_dim)
        self.key_value_norm = Norm(context, mla.kv_lora_rank, whole)
        self.key_value_up = up("key_value_up", mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
        output = source.normal(f"{name}.output.weight", (hidden, heads * mla.v_head_dim))
        self.output = Linear(
            cut(output, 1, tp.index, tp.size),
            source.normal(f"{name}.output.bias", (hidden,)) if model.has_attention_output_bias else None,
            role=split,
            bias_role=whole,
            gradients=context.gradients,
        )

    def new_cache(self, batch: int, capacity: int) -> LatentCache:
        """Serve from now on, with room for so many tokens of so many sequences; return the cache."""
        weight = self.output.weight
        self.cache = LatentCache(
            batch=batch,
            capacity=capacity,
            width=self._mla.kv_lora_rank + self._mla.qk_rope_head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )
        return self.cache

    def forward(self, x: Tensor, rotary: Any) -> Tensor:
        """Return this rank's part of the output before its bias, from the tokens at hand ``(sequence, batch, hidden)``."""
        context, mla = self._context, self._mla
        query = x
        if self.query_down is not None and self.query_norm is not None:
            query = self.query_norm(self.query_down(x))
        latent, rotary_key = torch.split(
            self.key_value_down(x), [mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1
        )
        latents = torch.cat([query, self.key_value_norm(latent), rotary_key], dim=-1)
        latents = enter_split(latents, context.mesh.tp, is_sequence_split=context.plan.sequence_parallel)
        length, batch = latents.shape[:2]
        if self.cache is not None:
            attended = self._served(self.cache, latents, rotary)
        else:
            query, key, value = context.recompute("mla_up_proj", self._up, latents, rotary).unbind(0)
            attended = context.recompute("core_attn", self._core, query, key, value)
        return self.output.without_bias(attended.permute(2, 0, 1, 3).reshape(length, batch, -1))

    def _served(self, cache: LatentCache, latents: Tensor, rotary: Any) -> Tensor:
        """Return the attention of new tokens to all so far, ``(batch, heads, tokens, v_head_dim)``.

        A whole prompt attends as in training. The query of a single token is taken into the space of the latents, and
        what it finds there out of it, so that no key or value is made of the cache (the paper's section 2.1.2).
        """
        mla = self._mla
        is_prompt = cache.is_empty
        query, latent, rotary_key = self._parts(latents)
        shared = rotary_key.permute(1, 0, 2)
        if rotary is not None:
            shared = rotate(shared, rotary)
        held = cache.add(torch.cat([latent.permute(1, 0, 2), shared], dim=-1)).unsqueeze(1)
        if is_prompt:
            return self._core(*self._up(latents, rotary).unbind(0))
        plain, turning = self._queries(query, rotary)
        weight = self.key_value_up.weight.view(self._heads, -1, mla.kv_lora_rank)
        of_keys, of_values = torch.split(weight, [mla.qk_nope_head_dim, mla.v_head_dim], dim=1)
        found = nn.functional.scaled_dot_product_attention(
            torch.cat([plain @ of_keys, turning], dim=-1),
            held,
            held[..., : mla.kv_lora_rank],
            scale=self._scale,
            enable_gqa=True,
        )
        return found @ of_values.transpose(1, 2)

    @property
    def _scale(self) -> float:
        return float((self._mla.qk_nope_head_dim + self._mla.qk_rope_head_dim) ** -0.5)

    def _parts(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Return what queries are made of, the latent of keys and values, and the rotary key."""
        mla = self._mla
        width = latents.shape[-1] - mla.kv_lora_rank - mla.qk_rope_head_dim
        return torch.split(latents, [width, mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self._heads, -1).permute(1, 2, 0, 3)

    def _queries(self, query: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return the plain and the turned channels of the queries, ``(batch, heads, sequence, width)`` each."""
        mla = self._mla
        plain, turning = torch.split(
            self._by_head(self.query_up(query)), [mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1
        )
        return plain, turning if rotary is None else rotate(turning, rotary)

    def _up(self, latents: Tensor, rotary: Any) -> Tensor:
        """Return queries, keys and values, filled up to one width, ``(3, batch, heads, sequence, width)``."""
        mla = self._mla
        query, latent, rotary_key = self._parts(latents)
        plain, turning = self._queries(query, rotary)
        key, value = torch.split(
            self._by_head(self.key_value_up(latent)), [mla.qk_nope_head_dim, mla.v_head_dim], dim=-1
        )
        shared = rotary_key.permute(1, 0, 2).unsqueeze(1)
        if rotary is not None:
            shared = rotate(shared, rotary)
        shared = shared.expand(-1, self._heads, -1, -1)
        parts = [torch.cat([plain, turning], dim=-1), torch.cat([key, shared], dim=-1), value]
        widest = max(part.shape[-1] for part in parts)
        return torch.stack([nn.functional.pad(part, (0, widest - part.shape[-1])) for part in parts])

    def _core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The padding of one width adds nothing to the scores, but would change their scale.
        return causal_attention(query, key, value, scale=self._scale)[..., : self._mla.v_head_dim]
