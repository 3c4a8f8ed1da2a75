"""What one stage does for embedding and head where the vocabulary is split over the stages, in the order it is told.

A pass begins its collective over the stages and goes on; whoever needs the result waits for it
(:mod:`meshwright.profiler.executor.vocabulary_order`). ``interlaced`` waits at once. All stages begin the collectives in
the same order, as one communicator needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meshwright.profiler.executor.communication import Pending
from meshwright.profiler.executor.mesh import RankMesh
from meshwright.profiler.executor.pipeline_order import Operation
from meshwright.profiler.executor.recording import Recorder
from meshwright.profiler.executor.tokens import MicroBatches
from meshwright.profiler.executor.vocabulary import SliceLogits, VocabularySlice, combined_statistics
from meshwright.profiler.executor.vocabulary_order import (
    EMBEDDING,
    EMBEDDING_GRADIENT,
    GRADIENT_BROADCAST,
    HIDDEN_BROADCAST,
    LOGITS,
    LOGITS_GRADIENT,
    RESCALE,
)
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["VocabularyPasses"]

_ROWS, _HIDDEN, _STATISTICS = "embedding rows", "hidden states", "softmax statistics"
_HEAD_GRADIENT, _EMBEDDING_GRADIENT = "head's gradient", "embedding's gradient"
_FIRST, _LAST = 0, -1


class VocabularyPasses:
    """Runs the passes of one stage.

    Parameters
    ----------
    plan : ParallelPlan
        Which kind, and whether tensor parallel ranks split the tokens.
    mesh : RankMesh
        Groups.
    vocabulary : VocabularySlice
        This rank's rows.
    recorder : Recorder
        Notes phases and messages.
    message_shape : tuple[int, ...]
        Of what stages send each other.
    dtype : torch.dtype
        Of the same.
    """

    def __init__(
        self,
        plan: ParallelPlan,
        mesh: RankMesh,
        vocabulary: VocabularySlice,
        recorder: Recorder,
        message_shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self._tp, self._stages, self._slices = mesh.tp, mesh.vocabulary_stages, mesh.vocabulary_slices
        self._vocabulary, self._recorder = vocabulary, recorder
        self._shape, self._dtype = message_shape, dtype
        self._is_last = mesh.at.pp == plan.pp - 1
        self._waits_at_once = plan.vocab_parallel == "interlaced"
        self._rescales = plan.vocab_parallel == "vocab_2"
        # Otherwise every tensor parallel rank holds all tokens.
        self._splits_tokens = plan.sequence_parallel and plan.tp > 1
        self._run: dict[int, Callable[[int, MicroBatches], None]] = {
            EMBEDDING: self._embedding,
            HIDDEN_BROADCAST: self._hidden_broadcast,
            LOGITS: self._logits,
            RESCALE: self._rescale,
            LOGITS_GRADIENT: self._logits_gradient,
            GRADIENT_BROADCAST: self._gradient_broadcast,
            EMBEDDING_GRADIENT: self._embedding_gradient,
        }
        self.begin_step()

    def begin_step(self) -> None:
        """Begin with nothing under way."""
        self.loss = torch.zeros((), dtype=torch.float32, device=self._recorder.device)
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._own: dict[int, SliceLogits] = {}
        self._products: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._arriving: dict[tuple[str, int], tuple[str, int, Pending]] = {}
        self._unneeded: list[tuple[str, int, Pending]] = []

    def end_step(self) -> None:
        """Wait for what only other stages needed."""
        for each in self._unneeded:
            self._finish(*each)
        self._unneeded.clear()

    def run(self, operation: Operation, batches: MicroBatches) -> None:
        """Run a pass."""
        self._run[operation.kind](operation.micro_batch, batches)

    def embedded(self, micro_batch: int) -> Tensor:
        """Return what enters the first stage."""
        return self._summed(_ROWS, micro_batch, "forward")

    def keep_hidden(self, micro_batch: int, hidden: Tensor) -> None:
        """Take what leaves the last stage."""
        self._kept[_HIDDEN, micro_batch] = hidden.contiguous()

    def hidden_gradient(self, micro_batch: int) -> Tensor:
        """Return what enters the last stage's backward."""
        return self._summed(_HEAD_GRADIENT, micro_batch, "backward")

    def keep_embedding_gradient(self, micro_batch: int, gradient: Tensor) -> None:
        """Take what leaves the first stage's backward."""
        self._kept[_EMBEDDING_GRADIENT, micro_batch] = gradient.contiguous()

    def _embedding(self, micro_batch: int, batches: MicroBatches) -> None:
        with self._recorder.phase("forward"):
            rows = self._scattered(self._vocabulary.embedded(batches.inputs(micro_batch)))
        self._reduce(_ROWS, micro_batch, rows, _FIRST)

    def _hidden_broadcast(self, micro_batch: int, batches: MicroBatches) -> None:
        self._broadcast(_HIDDEN, micro_batch, _LAST)

    def _gradient_broadcast(self, micro_batch: int, batches: MicroBatches) -> None:
        self._broadcast(_EMBEDDING_GRADIENT, micro_batch, _FIRST)

    def _logits(self, micro_batch: int, batches: MicroBatches) -> None:
        hidden = self._wait(_HIDDEN, micro_batch)
        with self._recorder.phase("forward"):
            targets = batches.targets(micro_batch)
            own = self._vocabulary.logits(self._gathered(hidden), targets)
            if self._rescales:
                self._products[micro_batch] = self._vocabulary.products(own)
        self._own[micro_batch] = own
        mine = own.statistics
        all_slices = mine.new_empty((self._slices.size, *mine.shape[1:]))
        self._begin(_STATISTICS, micro_batch, self._slices.start_all_gather(all_slices, mine))

    def _rescale(self, micro_batch: int, batches: MicroBatches) -> None:
        self._take_statistics(micro_batch)
        with self._recorder.phase("backward"):
            own, sums = self._own[micro_batch], self._sums[micro_batch]
            parts = self._products.pop(micro_batch)
            gradient = self._scattered(self._vocabulary.rescaled(own, parts, *sums))
        self._reduce(_HEAD_GRADIENT, micro_batch, gradient, _LAST)

    def _logits_gradient(self, micro_batch: int, batches: MicroBatches) -> None:
        if not self._rescales:
            self._take_statistics(micro_batch)
        with self._recorder.phase("backward"):
            own = self._own.pop(micro_batch)
            of_logits = self._vocabulary.logits_gradient(own, *self._sums.pop(micro_batch))
            of_hidden = None
            if not self._rescales:
                of_hidden = self._scattered(self._vocabulary.hidden_gradient(of_logits))
        if of_hidden is not None:
            self._reduce(_HEAD_GRADIENT, micro_batch, of_hidden, _LAST)
        with self._recorder.phase("weight_gradient"):
            self._vocabulary.add_head_gradient(own.hidden, of_logits)

    def _embedding_gradient(self, micro_batch: int, batches: MicroBatches) -> None:
        gradient = self._wait(_EMBEDDING_GRADIENT, micro_batch)
        with self._recorder.phase("backward"):
            tokens = batches.inputs(micro_batch)
            self._vocabulary.add_embedding_gradient(tokens, self._gathered(gradient))

    def _take_statistics(self, micro_batch: int) -> None:
        """Wait for what the other slices found, and add the loss where it is counted."""
        gathered = self._wait(_STATISTICS, micro_batch)
        with self._recorder.phase("forward"):
            largest, total, losses = combined_statistics(gathered)
            self._sums[micro_batch] = largest, total
            if self._is_last:
                self.loss += losses.sum() / self._vocabulary.num_tokens

    def _reduce(self, what: str, micro_batch: int, part: Tensor, root: int) -> None:
        pending = self._stages.start_reduce(part, root)
        is_root = self._stages.index == root % self._stages.size
        self._begin(what, micro_batch, pending, is_needed=is_root)

    def _broadcast(self, what: str, micro_batch: int, root: int) -> None:
        tensor = self._kept.pop((what, micro_batch), None)
        if tensor is None:
            tensor = torch.empty(self._shape, dtype=self._dtype, device=self._recorder.device)
        self._begin(what, micro_batch, self._stages.start_broadcast(tensor, root))

    def _begin(self, what: str, micro_batch: int, pending: Pending, *, is_needed: bool = True) -> None:
        """Note a collective that has begun; ``pending`` holds its tensors, the result first, until it has ended."""
        if self._recorder.device.type == "cuda":
            self._unneeded = [each for each in self._unneeded if not each[2].work.is_completed()]
        under_way = what, micro_batch, pending
        if self._waits_at_once:
            self._finish(*under_way)
        if is_needed:
            self._arriving[what, micro_batch] = under_way
        elif not self._waits_at_once:
            self._unneeded.append(under_way)

    def _finish(self, what: str, micro_batch: int, pending: Pending) -> Tensor:
        self._recorder.say(
            f"wait for the {what} of micro-batch {micro_batch} over the stages ({pending.partners})"
        )
        with self._recorder.phase("wait"):
            # Not as time inside the collective: it counts as waiting for other stages.
            pending.work.wait()
        return pending.tensors[0]

    def _wait(self, what: str, micro_batch: int) -> Tensor:
        """Return the result of a collective."""
        under_way = self._arriving.pop((what, micro_batch))
        return under_way[2].tensors[0] if self._waits_at_once else self._finish(*under_way)

    def _summed(self, what: str, micro_batch: int, phase: str) -> Tensor:
        """Return what the slices of all stages, and of the tensor parallel ranks, add up to."""
        total = self._wait(what, micro_batch)
        if not self._splits_tokens:
            with self._recorder.phase(phase):
                self._tp.all_reduce(total)
        return total

    def _gathered(self, tokens: Tensor) -> Tensor:
        """Return all tokens of the micro-batch from those of this tensor parallel rank."""
        return self._tp.all_gather(tokens) if self._splits_tokens else tokens

    def _scattered(self, parts: Tensor) -> Tensor:
        """Return this tensor parallel rank's share of what its slice makes for all tokens."""
        return self._tp.reduce_scatter(parts) if self._splits_tokens else parts
