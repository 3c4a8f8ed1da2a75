"""Mixture-of-experts layers: router, all-to-all to the experts and back, experts one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from meshwright.profiler.executor.build import BuildContext
from meshwright.profiler.executor.communication import Group
from meshwright.profiler.executor.linear import Linear
from meshwright.profiler.executor.mlp import Mlp
from meshwright.profiler.executor.tensor_parallel import enter_split, leave_split
from meshwright.profiler.executor.weights import Role

__all__ = ["Experts", "MixtureOfExperts"]


class _Exchange(Function):
    """Rows travel to other ranks; their gradients travel back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sent: list[int], received: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return group.all_to_all(x, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.group.all_to_all(gradients[0], ctx.received, ctx.sent), None, None, None


class Experts(nn.Module):
    """The routed experts that this rank holds.

    Parameters
    ----------
    context : BuildContext
        Model, plan, groups and weights.
    name : str
        Of the layer, before the names of its weights.
    """

    def __init__(self, context: BuildContext, name: str) -> None:
        super().__init__()
        moe = context.model.moe
        assert moe is not None
        held = moe.num_experts // context.plan.ep
        first = context.mesh.ep.index * held
        role = Role(is_expert=True)
        self.experts = nn.ModuleList(
            Mlp(
                context,
                f"{name}.experts.{first + each}",
                moe.moe_ffn_hidden_size,
                context.mesh.etp,
                role,
                role,
            )
            for each in range(held)
        )

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Return the experts' outputs for rows that stand expert by expert."""
        parts = torch.split(rows, counts)
        return torch.cat(
            [expert.with_bias(part) for expert, part in zip(self.experts, parts, strict=True)]  # type: ignore[operator]
        )


class MixtureOfExperts(nn.Module):
    """Router, routed experts, and shared experts with their gate.

    Parameters
    ----------
    context : BuildContext
        Model, plan, groups and weights.
    name : str
        Of the layer, before the names of its weights.
    """

    def __init__(self, context: BuildContext, name: str) -> None:
        super().__init__()
        model, moe = context.model, context.model.moe
        assert moe is not None
        self._context, self._top_k, self._num_experts = context, moe.top_k, moe.num_experts
        self._groups = moe.num_expert_groups, moe.top_k_groups
        source, hidden = context.source, model.hidden_size
        self.router = Linear(
            source.normal(f"{name}.router.weight", (moe.num_experts, hidden)),
            source.normal(f"{name}.router.bias", (moe.num_experts,)) if moe.has_router_bias else None,
            role=context.scattered_role,
            gradients=context.gradients,
        )
        self.experts = Experts(context, name)
        self.shared = (
            Mlp(
                context,
                f"{name}.shared",
                moe.shared_ffn_hidden_size,
                context.mesh.tp,
                Role(is_split=True),
                context.scattered_role,
            )
            if moe.shared_ffn_hidden_size
            else None
        )
        self.gate = (
            Linear(
                source.normal(f"{name}.shared_gate.weight", (1, hidden)),
                None,
                role=context.scattered_role,
                gradients=context.gradients,
            )
            if moe.has_shared_expert_gate and self.shared is not None
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the tokens at hand, ``(sequence, batch, hidden)``."""
        if self._context.is_served:
            return self._served(x)
        routed = self._routed(x.reshape(-1, x.shape[-1])).view_as(x)
        if self.shared is None:
            return routed
        shared = self._context.recompute("shared_experts", self._shared, x)
        if self.gate is not None:
            shared = torch.sigmoid(self.gate(x)) * shared
        return routed + shared

    def _allowed(self, logits: Tensor) -> Tensor:
        """Return the logits of the experts in the groups that a token may reach: those of the highest logits.

        DeepSeek-V2, arXiv 2405.04434, section 2.2.2.
        """
        groups, reached = self._groups
        if reached == groups:
            return logits
        best = torch.unflatten(logits, -1, (groups, -1)).amax(-1)
        chosen = best.topk(reached, dim=-1).indices
        is_allowed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, value=True)
        by_expert = is_allowed.repeat_interleave(logits.shape[-1] // groups, dim=-1)
        return logits.masked_fill(~by_expert, -torch.inf)

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        is_split, tp = self._context.plan.sequence_parallel, self._context.mesh.tp
        whole = enter_split(x, tp, is_sequence_split=is_split)
        return self.shared.add_bias(leave_split(self.shared(whole), tp, is_sequence_split=is_split))

    def _chosen(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight and the expert of each copy of each row."""
        # The softmax over all experts, normalised over the chosen ones; the others then get no gradient at all.
        logits, chosen = self._allowed(self.router(rows).float()).topk(self._top_k, dim=-1)
        return functional.softmax(logits, dim=-1).reshape(-1), chosen.reshape(-1)

    def _served(self, x: Tensor) -> Tensor:
        """Return the layer's output where ranks hold different experts, or parts of them, and no rank holds copies.

        Attention data parallel ranks gather their tokens and scatter the sums; tensor parallel ranks hold the same tokens.
        """
        mesh = self._context.mesh
        rows = mesh.dp.all_gather(x.reshape(-1, x.shape[-1]))
        weights, flat = self._chosen(rows)
        held = len(self.experts.experts)
        first = mesh.ep.index * held
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self._num_experts).tolist()
        begin = sum(counts[:first])
        counts = counts[first : first + held]
        order = order[begin : begin + sum(counts)]
        source = order // self._top_k
        output = self.experts(rows[source], counts) * weights[order].unsqueeze(1).to(rows.dtype)
        total = mesh.dp.reduce_scatter(torch.zeros_like(rows).index_add(0, source, output)).view_as(x)
        if self.shared is not None:
            shared = self.shared(x)
            # Once in the sum.
            shared = self.shared.add_bias(shared) if mesh.tp.index == 0 else shared
            total = total + (shared if self.gate is None else torch.sigmoid(self.gate(x)) * shared)
        return mesh.tp.all_reduce(total)

    def _routed(self, rows: Tensor) -> Tensor:
        weights, flat = self._chosen(rows)
        # Copies of the rows, expert by expert: that is rank by rank too.
        order = torch.argsort(flat, stable=True)
        source = order // self._top_k
        group = self._context.mesh.ep
        counts = torch.bincount(flat, minlength=self._num_experts)
        arriving = group.all_to_all(counts).view(group.size, -1)
        sent = counts.view(group.size, -1).sum(1).tolist()
        received = arriving.sum(1).tolist()
        dispatched: Tensor = _Exchange.apply(rows[source], group, sent, received)  # type: ignore[no-untyped-call]
        output = self._computed(dispatched, arriving)
        combined: Tensor = _Exchange.apply(output, group, received, sent)  # type: ignore[no-untyped-call]
        scaled = combined * weights[order].unsqueeze(1).to(combined.dtype)
        return torch.zeros_like(rows).index_add(0, source, scaled)

    def _computed(self, rows: Tensor, arriving: Tensor) -> Tensor:
        """Return the experts' outputs for rows that stand rank by rank, expert by expert.

        Where experts are split the rows of all that split them are gathered before, and their outputs summed after.
        Both are uneven, and so all-to-alls: gloo gathers equal parts alone.
        """
        group, own = self._context.mesh.etp, rows.shape[0]
        everyones = group.all_gather(arriving)
        parts = everyones.view(group.size, -1).sum(1).tolist()
        mine = [own] * group.size
        if group.size > 1:
            rows = _Exchange.apply(rows.repeat(group.size, 1), group, mine, parts)  # type: ignore[no-untyped-call]
        expert_of_row = torch.arange(arriving.shape[1], device=rows.device).repeat(everyones.shape[0])
        by_expert = torch.argsort(expert_of_row.repeat_interleave(everyones.reshape(-1)), stable=True)
        output = self.experts(rows[by_expert], everyones.sum(0).tolist())
        output = torch.empty_like(output).index_copy(0, by_expert, output)
        if group.size > 1:
            output = _Exchange.apply(output, group, parts, mine)  # type: ignore[no-untyped-call]
            output = output.view(group.size, own, -1).sum(0)
        result: Tensor = output
        return result
