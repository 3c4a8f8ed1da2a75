"""One rank's slice of embedding and head, and what is computed with it: a vocabulary split over pipeline stages.

The head's loss and gradients are those of algorithms 1 and 2 of Yeung et al. 2024 (arXiv 2411.05288, section 4): each
rank takes the softmax of its own logits, and corrects it when it knows the largest logits and the sums of the others.
None of it is differentiated by autograd: a micro-batch's gradient is there before its backward begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.profiler.executor.build import BuildContext
from meshwright.profiler.executor.linear import accumulate_gradient, cut, gradient_of
from meshwright.profiler.executor.weights import Role, set_role

__all__ = ["SliceLogits", "VocabularySlice", "combined_statistics", "vocabulary_rows"]


def vocabulary_rows(
    context: BuildContext, name: str, role: Role, index: int, parts: int, *, is_vector: bool = False
) -> nn.Parameter:
    """Return one of the equal parts of a table over the vocabulary, or of a vector, which is padded to them.

    Parameters
    ----------
    context : BuildContext
        Model and weights.
    name : str
        Of the whole tensor.
    role : Role
        How it is spread.
    index, parts : int
        Which part of how many.
    is_vector : bool
        One number for each token rather than a row.
    """
    model = context.model
    columns = () if is_vector else (model.hidden_size,)
    whole = context.source.normal(name, (model.vocab_size, *columns))
    missing = -model.vocab_size % parts
    padded = torch.cat([whole, whole.new_zeros((missing, *columns))]) if missing else whole
    return set_role(nn.Parameter(cut(padded, 0, index, parts)), role)


@dataclass(slots=True, kw_only=True)
class SliceLogits:
    """The softmax of one micro-batch over this rank's slice, until its gradients are done.

    Parameters
    ----------
    hidden : Tensor
        What entered the head, ``(sequence, batch, hidden)``.
    exponentials : Tensor
        Of the logits less the largest of the slice, single precision, ``(sequence, batch, rows)``.
    statistics : Tensor
        Largest logit of the slice, sum of the exponentials, and the target's logit or 0, ``(1, 3, sequence, batch)``.
    local, is_mine : Tensor
        Row of the target, and whether it is one of the slice, ``(sequence, batch)``.
    """

    hidden: Tensor
    exponentials: Tensor
    statistics: Tensor
    local: Tensor
    is_mine: Tensor


def combined_statistics(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return largest logit, sum of exponentials and loss of each token, ``(sequence, batch)``, of all slices.

    Parameters
    ----------
    gathered : Tensor
        The statistics of every slice, ``(slices, 3, sequence, batch)``.
    """
    largest = gathered[:, 0].amax(0)
    total = (gathered[:, 1] * (gathered[:, 0] - largest).exp()).sum(0)
    return largest, total, total.log() + largest - gathered[:, 2].sum(0)


class VocabularySlice(nn.Module):
    """Rows of the embedding and of the head; one table serves both where they are tied.

    Parameters
    ----------
    context : BuildContext
        Model, plan, groups and weights.
    num_tokens : int
        Tokens of a step on all ranks, over which the loss is the mean.
    """

    def __init__(self, context: BuildContext, num_tokens: int) -> None:
        super().__init__()
        model, mesh = context.model, context.mesh
        self._vocab_size, self.num_tokens = model.vocab_size, num_tokens
        index = mesh.at.pp * mesh.tp.size + mesh.tp.index

        def rows(name: str, *, is_vector: bool = False) -> nn.Parameter:
            role, parts = Role(is_split=True), context.plan.pp * mesh.tp.size
            return vocabulary_rows(context, name, role, index, parts, is_vector=is_vector)

        self.table = rows("embedding")
        self.head = None if model.has_tied_embeddings else rows("head")
        self.head_bias = rows("head_bias", is_vector=True) if model.has_head_bias else None
        self._first = index * self.table.shape[0]

    @property
    def _weight(self) -> nn.Parameter:
        return self.table if self.head is None else self.head

    @torch.no_grad()
    def embedded(self, tokens: Tensor) -> Tensor:
        """Return the rows of the tokens of this slice, and zeros for the others: the slices add up."""
        local, is_mine = self._local(tokens)
        return functional.embedding(local, self.table) * is_mine.unsqueeze(-1)

    @torch.no_grad()
    def add_embedding_gradient(self, tokens: Tensor, gradient: Tensor) -> None:
        """Add the gradient of a micro-batch's embedded tokens, ``(sequence, batch, hidden)``."""
        local, is_mine = self._local(tokens)
        collected = gradient_of(self.table)
        collected.index_add_(0, local[is_mine], gradient[is_mine].to(collected.dtype))

    @torch.no_grad()
    def logits(self, hidden: Tensor, targets: Tensor) -> SliceLogits:
        """Return the softmax over the slice as far as it is known alone."""
        logits = functional.linear(hidden, self._weight, self.head_bias).float()
        # Rows that fill the last slices up stand for no token.
        num_real = min(max(self._vocab_size - self._first, 0), logits.shape[-1])
        logits[..., num_real:] = torch.finfo(torch.float32).min
        local, is_mine = self._local(targets)
        picked = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1)
        largest = logits.amax(-1)
        exponentials = logits.sub_(largest.unsqueeze(-1)).exp_()
        exponentials[..., num_real:] = 0.0
        predicted = torch.where(is_mine, picked, torch.zeros_like(picked))
        return SliceLogits(
            hidden=hidden,
            exponentials=exponentials,
            statistics=torch.stack([largest, exponentials.sum(-1), predicted]).unsqueeze(0),
            local=local,
            is_mine=is_mine,
        )

    @torch.no_grad()
    def products(self, own: SliceLogits) -> tuple[Tensor, Tensor]:
        """Return two parts of the hidden states' gradient that need no other slice: the softmax's, the target's."""
        softmax = own.exponentials.to(own.hidden.dtype) @ self._weight
        target = functional.embedding(own.local, self._weight) * own.is_mine.unsqueeze(-1)
        return softmax.float(), target.float()

    @torch.no_grad()
    def rescaled(
        self, own: SliceLogits, parts: tuple[Tensor, Tensor], largest: Tensor, total: Tensor
    ) -> Tensor:
        """Return this slice's part of the hidden states' gradient from :meth:`products` and the sums of all slices."""
        softmax, target = parts
        scaled = softmax * self._correction(own, largest, total) - target
        return (scaled / self.num_tokens).to(own.hidden.dtype)

    @torch.no_grad()
    def logits_gradient(self, own: SliceLogits, largest: Tensor, total: Tensor) -> Tensor:
        """Return the gradient of the logits; what was kept of them is used up."""
        gradient = own.exponentials.mul_(self._correction(own, largest, total))
        gradient.scatter_add_(-1, own.local.unsqueeze(-1), -own.is_mine.float().unsqueeze(-1))
        return gradient.div_(self.num_tokens).to(own.hidden.dtype)

    @torch.no_grad()
    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        """Return this slice's part of the hidden states' gradient from that of the logits."""
        return gradient @ self._weight

    @torch.no_grad()
    def add_head_gradient(self, hidden: Tensor, gradient: Tensor) -> None:
        """Add the gradients of the head's weights from that of the logits."""
        rows = gradient.flatten(0, -2)
        accumulate_gradient(self._weight, rows.t() @ hidden.flatten(0, -2))
        if self.head_bias is not None:
            accumulate_gradient(self.head_bias, rows.sum(0))

    def _correction(self, own: SliceLogits, largest: Tensor, total: Tensor) -> Tensor:
        """Return what turns exponentials of the slice into probabilities."""
        return ((own.statistics[0, 0] - largest).exp() / total).unsqueeze(-1)

    def _local(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of tokens in this slice, and which tokens are in it."""
        rows = self.table.shape[0]
        local = tokens - self._first
        is_mine = (local >= 0) & (local < rows)
        return local.clamp(0, rows - 1), is_mine
