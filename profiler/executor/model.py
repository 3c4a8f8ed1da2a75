"""The planned transformer: layers, and the chunk of the model that a virtual stage is."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from meshwright.profiler.executor.attention import Attention, rotary_table
from meshwright.profiler.executor.build import BuildContext, recomputed
from meshwright.profiler.executor.experts import MixtureOfExperts
from meshwright.profiler.executor.latent_attention import LatentAttention
from meshwright.profiler.executor.linear import linear
from meshwright.profiler.executor.local_tensors import has_experts
from meshwright.profiler.executor.mlp import Mlp
from meshwright.profiler.executor.norms import Norm
from meshwright.profiler.executor.tensor_parallel import (
    enter_split,
    leave_split,
    vocabulary_cross_entropy,
)
from meshwright.profiler.executor.vocabulary import VocabularySlice, vocabulary_rows
from meshwright.profiler.executor.weights import Role, set_role

__all__ = ["Chunk", "Layer"]


class Layer(nn.Module):
    """One transformer layer on ``(sequence, batch, hidden)``.

    Parameters
    ----------
    context : BuildContext
        Model, plan, groups and weights.
    index : int
        From 0, in the whole model.
    is_recomputed : bool
        The whole layer is recomputed in backward.
    """

    def __init__(self, context: BuildContext, index: int, *, is_recomputed: bool) -> None:
        super().__init__()
        model, name = context.model, f"layers.{index}"
        self._context, self._index, self._is_recomputed = context, index, is_recomputed

        def norm() -> Norm:
            return Norm(context, model.hidden_size, context.scattered_role)

        self.attention_norm = norm()
        interval = model.full_attention_interval
        sees_all = interval is not None and (index + 1) % interval == 0
        self.attention: Attention | LatentAttention
        if model.mla is not None:
            self.attention = LatentAttention(context, f"{name}.attention")
        else:
            window = None if sees_all else model.sliding_window
            self.attention = Attention(context, f"{name}.attention", window)
        self.mlp_norm = norm() if model.norms_per_layer > 1 else None
        self.mlp: Mlp | None = None
        self.moe: MixtureOfExperts | None = None
        if has_experts(model, index):
            self.moe = MixtureOfExperts(context, f"{name}.moe")
        else:
            self.mlp = Mlp(
                context,
                f"{name}.mlp",
                model.ffn_hidden_size,
                context.mesh.tp,
                Role(is_split=True),
                context.scattered_role,
            )
        self.after_attention = norm() if model.norms_per_layer == 4 else None
        self.after_mlp = norm() if model.norms_per_layer == 4 else None

    def forward(self, x: Tensor, rotary: Any) -> Tensor:
        """Return the layer's output."""
        held = self._context.held
        with contextlib.nullcontext() if held is None else held.layer(self._index, rotary or ()):
            return self._pass(x, rotary)

    def _pass(self, x: Tensor, rotary: Any) -> Tensor:
        if not self._is_recomputed:
            return self._run(x, rotary)
        return recomputed(self._run, x, rotary)

    def _run(self, x: Tensor, rotary: Any) -> Tensor:
        context = self._context
        tp, is_split = context.mesh.tp, context.plan.sequence_parallel
        normed = context.recompute("layernorm", self.attention_norm, x)
        # Latent attention enters its split products itself, with its latents.
        is_latent = context.model.mla is not None
        whole = normed if is_latent else enter_split(normed, tp, is_sequence_split=is_split)
        attended = self.attention(whole, rotary)
        if context.model.has_parallel_block and self.mlp is not None:
            # One input, one sum, one residual.
            inner = context.recompute("mlp", self.mlp, self._parallel_input(x, whole))
            output = leave_split(attended + inner, tp, is_sequence_split=is_split)
            return x + self.mlp.add_bias(self.attention.output.add_bias(output))
        attended = self.attention.output.add_bias(leave_split(attended, tp, is_sequence_split=is_split))
        if self.after_attention is not None:
            attended = self.after_attention(attended)
        x = x + attended
        assert self.mlp_norm is not None
        normed = context.recompute("layernorm", self.mlp_norm, x)
        if self.moe is not None:
            output = context.recompute("moe", self.moe, normed)
        else:
            output = context.recompute("mlp", self._dense, normed)
        return x + (output if self.after_mlp is None else self.after_mlp(output))

    def _parallel_input(self, x: Tensor, whole: Tensor) -> Tensor:
        return whole if self.mlp_norm is None else self.mlp_norm(x)

    def _dense(self, normed: Tensor) -> Tensor:
        assert self.mlp is not None
        tp, is_split = self._context.mesh.tp, self._context.plan.sequence_parallel
        whole = enter_split(normed, tp, is_sequence_split=is_split)
        return self.mlp.add_bias(leave_split(self.mlp(whole), tp, is_sequence_split=is_split))


class Chunk(nn.Module):
    """A virtual stage: embedding, layers and head as far as it holds them.

    Parameters
    ----------
    context : BuildContext
        Model, plan, groups and weights.
    first_layer, num_layers : int
        Its layers in the whole model.
    has_embedding, has_head : bool
        It is the first, the last virtual stage.
    num_tokens : int
        Tokens of a step on all ranks, over which the loss is the mean.
    positions : Tensor
        Positions of the tokens of this context parallel rank, ``(sequence,)``.
    is_vocabulary_split : bool
        It holds a slice of the vocabulary like every other stage; embedded tokens enter the first, and final hidden
        states leave the last.

    Notes
    -----
    Parameters of the same role stand in the same order on all ranks that share them.
    """

    def __init__(
        self,
        context: BuildContext,
        *,
        first_layer: int,
        num_layers: int,
        has_embedding: bool,
        has_head: bool,
        num_tokens: int,
        positions: Tensor,
        is_vocabulary_split: bool = False,
    ) -> None:
        super().__init__()
        model, plan = context.model, context.plan
        self.vocabulary = VocabularySlice(context, num_tokens) if is_vocabulary_split else None
        self._context, self._num_tokens, self._positions = context, num_tokens, positions
        self.has_embedding, self.has_head = has_embedding, has_head
        is_tied = model.has_tied_embeddings
        self.table: nn.Parameter | None = None
        self.head: nn.Parameter | None = None
        self.position_table: nn.Parameter | None = None
        self.head_bias: nn.Parameter | None = None
        self.embedding_norm: Norm | None = None
        self.final_norm: Norm | None = None
        has_tables = not is_vocabulary_split
        if has_tables and (has_embedding or (has_head and is_tied)):
            self.table = self._vocabulary("embedding", Role(is_split=True, is_tied=is_tied))
        if has_embedding:
            if model.position_embedding == "learned":
                rows = model.max_position_embeddings + model.num_reserved_positions
                table = context.source.normal("positions", (rows, model.hidden_size))
                self.position_table = set_role(nn.Parameter(table), context.scattered_role)
            if model.has_embedding_norm:
                self.embedding_norm = Norm(context, model.hidden_size, context.scattered_role)
        if has_head:
            if has_tables and not is_tied:
                self.head = self._vocabulary("head", Role(is_split=True))
            if has_tables and model.has_head_bias:
                self.head_bias = self._vocabulary("head_bias", Role(is_split=True), is_vector=True)
            if model.has_final_norm:
                self.final_norm = Norm(context, model.hidden_size, context.scattered_role)
        recomputed_layers = (plan.recompute_layers or num_layers) if plan.recompute == "full" else 0
        self.layers = nn.ModuleList(
            Layer(context, first_layer + each, is_recomputed=each < recomputed_layers)
            for each in range(num_layers)
        )
        width = model.head_dim if model.mla is None else model.mla.qk_rope_head_dim
        self._rotary = rotary_table(positions, width) if model.position_embedding == "rope" else None

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return what the next virtual stage needs, or this rank's share of the loss.

        Parameters
        ----------
        x : Tensor
            Token numbers ``(sequence, batch)`` for the first virtual stage, else what the one before returned; embedded
            tokens for the first where the vocabulary is split over stages.
        targets : Tensor | None
            Token numbers to predict ``(sequence, batch)``, for the last.
        """
        if self.has_embedding:
            x = self._placed(self._embedded(x) if self.vocabulary is None else x, self._positions)
        for layer in self.layers:
            x = layer(x, self._rotary)
        if not self.has_head:
            return x
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.vocabulary is not None:
            return x
        assert targets is not None
        return self._loss(x, targets)

    def served(self, x: Tensor, first: int) -> Tensor:
        """Return what the next stage needs, or this rank's logits of the next token, ``(batch, vocabulary / tp)``.

        Parameters
        ----------
        x : Tensor
            Token numbers ``(sequence, batch)``, the same on all tensor parallel ranks, or what the stage before returned.
        first : int
            Position of the first of them; those before are in the layers' caches.
        """
        here = slice(first, first + x.shape[0])
        rotary = None if self._rotary is None else tuple(each[here] for each in self._rotary)
        if self.has_embedding:
            x = self._placed(self._embedded(x), self._positions[here])
        for layer in self.layers:
            x = layer(x, rotary)
        if not self.has_head:
            return x
        last = x[-1]
        if self.final_norm is not None:
            last = self.final_norm(last)
        weight = self.table if self.head is None else self.head
        assert weight is not None
        return linear(last, weight, self.head_bias, self._context.gradients)

    def _vocabulary(self, name: str, role: Role, *, is_vector: bool = False) -> nn.Parameter:
        tp = self._context.mesh.tp
        return vocabulary_rows(self._context, name, role, tp.index, tp.size, is_vector=is_vector)

    def _embedded(self, tokens: Tensor) -> Tensor:
        tp, is_split = self._context.mesh.tp, self._context.plan.sequence_parallel
        assert self.table is not None
        if tp.size == 1:
            return functional.embedding(tokens, self.table)
        rows = self.table.shape[0]
        local = tokens - tp.index * rows
        is_mine = (local >= 0) & (local < rows)
        found = functional.embedding(local.clamp(0, rows - 1), self.table)
        return leave_split(found * is_mine.unsqueeze(-1), tp, is_sequence_split=is_split)

    def _placed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return embedded tokens with what their positions add."""
        tp, is_split = self._context.mesh.tp, self._context.plan.sequence_parallel
        if self.position_table is not None:
            if is_split:
                positions = positions.view(tp.size, -1)[tp.index]
            reserved = self._context.model.num_reserved_positions
            x = x + functional.embedding(positions + reserved, self.position_table).unsqueeze(1)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        context = self._context
        tp = context.mesh.tp
        weight = self.table if self.head is None else self.head
        assert weight is not None
        whole = enter_split(x, tp, is_sequence_split=context.plan.sequence_parallel)
        logits = linear(whole, weight, self.head_bias, context.gradients)
        if tp.size == 1:
            losses = functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
            )
        else:
            first = tp.index * weight.shape[0]
            losses = vocabulary_cross_entropy(logits, targets, first, context.model.vocab_size, tp)
        return losses.sum() / self._num_tokens
