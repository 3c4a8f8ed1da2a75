"""One rank's pipeline: the operations of the predicted schedule, in exactly its order, with sends that block nobody.

A message is received in the order in which its sender sends, so that the two ends of a communicator agree without tags
(NCCL has none), and asked for one operation ahead of its need, so that it travels beside compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from meshwright.profiler.executor.data_parallel import Optimizer
from meshwright.profiler.executor.linear import WeightGradients
from meshwright.profiler.executor.mesh import RankMesh
from meshwright.profiler.executor.pipeline_order import Message, Operation, PipelineOrder
from meshwright.profiler.executor.recording import Recorder
from meshwright.profiler.executor.tokens import MicroBatches
from meshwright.profiler.executor.vocabulary_order import VOCABULARY_NAMES
from meshwright.profiler.executor.vocabulary_passes import VocabularyPasses
from meshwright.simcore.schedules import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT

__all__ = ["PipelineRank"]

_PHASES = {0: "forward", 1: "backward", 2: "backward", 3: "weight_gradient"}


class PipelineRank:
    """Runs the operations of one stage.

    Parameters
    ----------
    order : PipelineOrder
        Operations and messages.
    mesh : RankMesh
        Groups.
    chunks : list[Any]
        Modules of this stage's chunks.
    gradients : WeightGradients
        Where their weight gradients go when put off.
    optimizer : Optimizer
        Told when a backward begins and a chunk is done.
    recorder : Recorder
        Notes phases and sends.
    message_shape : tuple[int, ...]
        Of what stages send each other.
    dtype : torch.dtype
        Of the same.
    vocabulary : VocabularyPasses | None
        What runs embedding and head where the vocabulary is split over the stages; None where the first and the last
        chunk hold them.
    """

    def __init__(
        self,
        order: PipelineOrder,
        mesh: RankMesh,
        chunks: list[Any],
        gradients: WeightGradients,
        optimizer: Optimizer,
        recorder: Recorder,
        message_shape: tuple[int, ...],
        dtype: torch.dtype,
        vocabulary: VocabularyPasses | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._order, self._mesh, self._chunks = order, mesh, chunks
        self._gradients, self._optimizer, self._recorder = gradients, optimizer, recorder
        self._shape, self._dtype = message_shape, dtype
        self.stage = mesh.at.pp
        self._operations = order.operations(self.stage)
        self._last = {}
        for index, operation in enumerate(self._operations):
            if operation.kind != FORWARD:
                self._last[operation.chunk] = index
        senders = [sender for sender, receiver in order.edges() if receiver == self.stage]
        self._arriving = {sender: order.arriving(sender, self.stage) for sender in senders}
        self._sender = {
            message: sender for sender, messages in self._arriving.items() for message in messages
        }

    def run(self, batches: MicroBatches) -> Tensor:
        """Run one step's forwards and backwards; return this rank's share of the loss."""
        self._inputs: dict[tuple[int, int], Tensor | None] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._put_off: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._local: dict[Message, Tensor] = {}
        self._posted: dict[Message, tuple[Tensor, Any]] = {}
        self._num_posted = dict.fromkeys(self._arriving, 0)
        self._num_sent: dict[int, int] = {}
        self._sends: list[tuple[Any, Tensor]] = []
        if self._vocabulary is not None:
            self._vocabulary.begin_step()
        self._loss = torch.zeros((), dtype=torch.float32, device=self._recorder.device)
        for index, operation in enumerate(self._operations):
            for ahead in self._operations[index : index + 2]:
                self._ask_for(self._order.needed(ahead))
            received = self._entering(operation)
            self._recorder.say(operation.text)
            if operation.kind in VOCABULARY_NAMES:
                assert self._vocabulary is not None
                self._vocabulary.run(operation, batches)
            else:
                with self._recorder.phase(_PHASES[operation.kind]):
                    result = self._run_operation(operation, received, batches)
                self._send(operation, result)
            self._recorder.step.operations.append(
                (operation.kind, operation.micro_batch, operation.virtual_stage)
            )
            if self._last.get(operation.chunk) == index:
                with self._recorder.phase("gradient_sync"):
                    self._optimizer.chunk_done(operation.chunk)
        with self._recorder.phase("wait"):
            for work, _ in self._sends:
                self._recorder.say("wait for sends to other stages")
                work.wait()
        self._sends.clear()
        if self._vocabulary is not None:
            self._vocabulary.end_step()
            self._loss += self._vocabulary.loss
        return self._loss

    def _entering(self, operation: Operation) -> Tensor | None:
        """Return what an operation works on, from another stage or from the slices of the vocabulary."""
        if self._vocabulary is not None:
            if operation.kind == FORWARD and self._order.has_embedding(operation.virtual_stage):
                return self._vocabulary.embedded(operation.micro_batch)
            if operation.kind == BACKWARD and self._order.has_head(operation.virtual_stage):
                return self._vocabulary.hidden_gradient(operation.micro_batch)
        return self._received(self._order.needed(operation))

    def _run_operation(
        self, operation: Operation, received: Tensor | None, batches: MicroBatches
    ) -> Tensor | None:
        key = operation.micro_batch, operation.chunk
        if operation.kind == FORWARD:
            return self._forward(operation, received, batches)
        if operation.kind == WEIGHT_GRADIENT:
            with torch.no_grad():
                for gradient in self._put_off.pop(key):
                    gradient()
            return None
        self._optimizer.before_backward(operation.chunk, operation.micro_batch)
        if operation.kind == INPUT_GRADIENT:
            self._gradients.put_off()
        torch.autograd.backward(self._outputs.pop(key), received)
        if operation.kind == INPUT_GRADIENT:
            self._put_off[key] = self._gradients.take()
        entered = self._inputs.pop(key)
        result = None if entered is None else entered.grad
        if self._vocabulary is not None and self._order.has_embedding(operation.virtual_stage):
            assert result is not None
            self._vocabulary.keep_embedding_gradient(operation.micro_batch, result)
        return result

    def _forward(self, operation: Operation, received: Tensor | None, batches: MicroBatches) -> Tensor:
        key, virtual = (operation.micro_batch, operation.chunk), operation.virtual_stage
        chunk = self._chunks[operation.chunk]
        entered = received if received is None else received.requires_grad_()
        self._inputs[key] = entered
        x = batches.inputs(operation.micro_batch) if entered is None else entered
        output: Tensor
        if not self._order.has_head(virtual):
            output = chunk(x)
        elif self._vocabulary is None:
            output = chunk(x, batches.targets(operation.micro_batch))
            self._loss += output.detach()
        else:
            output = chunk(x)
            self._vocabulary.keep_hidden(operation.micro_batch, output.detach())
        self._outputs[key] = output
        return output.detach()

    def _ask_for(self, message: Message | None) -> None:
        """Post what is to be received up to a message, in the order of its sender."""
        if message is None or message in self._posted or message not in self._sender:
            return
        sender = self._sender[message]
        arriving = self._arriving[sender]
        while message not in self._posted:
            number = self._num_posted[sender]
            buffer = torch.empty(self._shape, dtype=self._dtype, device=self._recorder.device)
            work = distributed.irecv(
                buffer,
                src=self._mesh.stages[sender],
                group=self._mesh.channels[sender, self.stage],
                tag=number,
            )
            self._posted[arriving[number]] = buffer, work
            self._num_posted[sender] = number + 1

    def _received(self, message: Message | None) -> Tensor | None:
        if message is None:
            return None
        if message in self._local:
            return self._local.pop(message)
        buffer, work = self._posted.pop(message)
        what = "activation" if message.is_forward else "gradient"
        self._recorder.say(
            f"wait for the {what} of micro-batch {message.micro_batch}, virtual stage {message.virtual_stage},"
            f" from rank {self._mesh.stages[self._sender[message]]}"
        )
        with self._recorder.phase("wait"):
            work.wait()
        return buffer

    def _send(self, operation: Operation, result: Tensor | None) -> None:
        sent = self._order.sent(operation)
        if sent is None:
            return
        assert result is not None
        receiver, message = sent
        if receiver == self.stage:
            self._local[message] = result
            return
        result = result.contiguous()
        number = self._num_sent.get(receiver, 0)
        self._num_sent[receiver] = number + 1
        to = self._mesh.stages[receiver]
        with self._recorder.sending("pp", "send", result.numel() * result.element_size(), f"rank {to}"):
            work = distributed.isend(
                result, dst=to, group=self._mesh.channels[self.stage, receiver], tag=number
            )
        if self._recorder.device.type == "cuda":
            self._sends = [each for each in self._sends if not each[0].is_completed()]
        self._sends.append((work, result))
