"""Attention of one layer: split projections, rotary positions, query and key norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meshwright.profiler.executor.build import BuildContext
from meshwright.profiler.executor.context import biased_attention, causal_attention, context_attention
from meshwright.profiler.executor.kv_cache import KvCache
from meshwright.profiler.executor.linear import Linear, cut
from meshwright.profiler.executor.norms import Norm
from meshwright.profiler.executor.weights import Role, set_role

__all__ = ["Attention", "alibi_slopes", "rotary_table", "rotate"]

_ROTARY_BASE = 10000.0


def rotary_table(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles, ``(sequence, head_dim / 2)`` (arXiv 2104.09864, section 3.2)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = torch.outer(positions.float(), _ROTARY_BASE**-exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Return heads turned by their positions; the halves of a head are the coordinates of its planes."""
    cosine, sine = (each.to(x.dtype) for each in table)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the slope of each head: powers of ``2^(-8 / n)``, for other n those of every second head of twice as many.

    ALiBi, arXiv 2108.12409, section 3, and its published code for numbers that are no power of two.

    Examples
    --------
    >>> alibi_slopes(8).tolist()[:3]
    [0.5, 0.25, 0.125]
    """
    whole = 1 << (num_heads.bit_length() - 1)
    first = 2.0 ** (-8.0 / whole * torch.arange(1, whole + 1))
    rest = 2.0 ** (-4.0 / whole * (1 + 2 * torch.arange(num_heads - whole)))
    return torch.cat([first, rest])


class Attention(nn.Module):
    """Query, key and value projections by column, the core, the output projection by row.

    Parameters
    ----------
    context : BuildContext
        Model, plan, groups and weights.
    name : str
        Of the layer, before the names of its weights.
    window : int | None
        Keys that each query sees; None is all before it.

    Attributes
    ----------
    cache : KvCache | None
        Where keys and values stay while a model is served; None trains.
    """

    def __init__(self, context: BuildContext, name: str, window: int | None) -> None:
        super().__init__()
        model, tp = context.model, context.mesh.tp
        self._context, self._window = context, window
        self.cache: KvCache | None = None
        self._heads = model.num_attention_heads // tp.size
        # Where there are fewer key/value heads than ranks, neighbours hold copies of one.
        copies = context.mesh.kv.size
        self._groups = model.num_query_groups * copies // tp.size
        self._head_dim = model.head_dim
        widths = {
            "query": model.num_attention_heads * model.head_dim,
            "key": model.num_query_groups * model.head_dim,
            "value": model.num_query_groups * model.head_dim,
        }
        split = Role(is_split=True)

        def projection(names: tuple[str, ...], role: Role) -> Linear:
            share = copies if role.is_copied else 1

            def drawn(suffix: str, *inputs: int) -> Tensor:
                wholes = [
                    context.source.normal(f"{name}.{each}.{suffix}", (widths[each], *inputs))
                    for each in names
                ]
                return torch.cat([cut(whole, 0, tp.index // share, tp.size // share) for whole in wholes])

            return Linear(
                drawn("weight", model.hidden_size),
                drawn("bias") if model.has_qkv_bias else None,
                role=role,
                gradients=context.gradients,
            )

        shared = ("key", "value") if copies > 1 else ()
        self.qkv = projection(tuple(each for each in widths if each not in shared), split)
        self.key_value = projection(shared, Role(is_split=True, is_copied=True)) if shared else None
        output = context.source.normal(f"{name}.output.weight", (model.hidden_size, widths["query"]))
        self.output = Linear(
            cut(output, 1, tp.index, tp.size),
            context.source.normal(f"{name}.output.bias", (model.hidden_size,))
            if model.has_attention_output_bias
            else None,
            role=split,
            bias_role=context.scattered_role,
            gradients=context.gradients,
        )
        self.sinks: nn.Parameter | None = None
        if model.has_attention_sinks:
            drawn_sinks = context.source.normal(f"{name}.sinks", (model.num_attention_heads,))
            self.sinks = set_role(nn.Parameter(cut(drawn_sinks, 0, tp.index, tp.size)), split)
        self._slopes: Tensor | None = None
        if model.position_embedding == "alibi":
            slopes = alibi_slopes(model.num_attention_heads).to(context.source.device)
            self._slopes = cut(slopes, 0, tp.index, tp.size)
        norm_role = Role(is_partial=tp.size > 1)
        self.query_norm = Norm(context, model.head_dim, norm_role) if model.has_qk_norm else None
        self.key_norm = Norm(context, model.head_dim, norm_role) if model.has_qk_norm else None

    def new_cache(self, batch: int, capacity: int) -> KvCache:
        """Serve from now on, with room for so many tokens of so many sequences; return the cache."""
        weight = self.output.weight
        self.cache = KvCache(
            batch=batch,
            groups=self._groups,
            capacity=capacity,
            head_dim=self._head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )
        return self.cache

    def forward(self, x: Tensor, rotary: Any) -> Tensor:
        """Return this rank's part of the output before its bias, from a whole input ``(sequence, batch, hidden)``."""
        length, batch, _ = x.shape
        width = self._head_dim
        projected = self.qkv(x)
        if self.key_value is not None:
            projected = torch.cat([projected, self.key_value(x)], dim=-1)
        projected = projected.view(length, batch, -1, width).permute(1, 2, 0, 3)
        query, key, value = projected.split([self._heads, self._groups, self._groups], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        attended = self._context.recompute("core_attn", self._core, query, key, value)
        return self.output.without_bias(attended.permute(2, 0, 1, 3).reshape(length, batch, -1))

    def _core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        plan = self._context.plan
        if self.cache is not None:
            key, value = self.cache.add(key, value)
        if self._slopes is not None or self.sinks is not None:
            return biased_attention(query, key, value, self._window, self._slopes, self.sinks)
        if self.cache is not None:
            return causal_attention(query, key, value, self._window)
        return context_attention(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            self._context.mesh.cp,
            plan.cp_method,
            self._window,
        )
