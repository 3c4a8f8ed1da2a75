"""Copies between a device and host memory, each counted; on a CPU both are the same memory.

On a GPU they go to and from pinned memory on a stream of their own, beside compute: the device waits for what it needs,
and nothing else does (vDNN, Rhu et al. 2016, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from meshwright.profiler.executor.recording import Recorder

__all__ = ["HeldActivations", "HeldLayer", "HostCopies"]


class HostCopies:
    """Copies of one rank.

    Parameters
    ----------
    recorder : Recorder
        Counts them, and knows the device.
    axis : str
        Under which they are counted.
    """

    def __init__(self, recorder: Recorder, axis: str = "host") -> None:
        self._recorder, self._axis = recorder, axis
        self._stream: Any = None
        if recorder.device.type == "cuda":
            self._stream = torch.cuda.Stream(recorder.device)  # type: ignore[no-untyped-call]  # torch leaves it so

    @property
    def device(self) -> torch.device:
        """The rank's device."""
        return self._recorder.device

    def room(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return host memory that copies reach without a detour, ``(size,)``."""
        return torch.empty(size, dtype=dtype, pin_memory=self._stream is not None)

    def to_host(self, tensor: Tensor) -> Tensor:
        """Begin to copy a vector to host memory; :meth:`finish` before the host reads it."""
        target = self.room(tensor.numel(), tensor.dtype)
        with self._counted("to_host", tensor):
            self._begin(target, tensor.detach(), on_device=tensor)
        return target

    def to_device(self, target: Tensor, source: Tensor) -> Any:
        """Begin to fill a vector of the device from one in host memory, in the device's precision.

        Returns what :meth:`settle` takes before the device reads it.
        """
        if source.dtype != target.dtype:
            narrowed = self.room(source.numel(), target.dtype)
            narrowed.copy_(source.detach())
            source = narrowed
        with self._counted("from_host", target):
            self._begin(target, source.detach(), on_device=target)
        return None if self._stream is None else self._stream.record_event()

    def settle(self, event: Any) -> None:
        """Have the device wait for a copy before what it does next."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self) -> None:
        """Have the host wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()

    def _begin(self, target: Tensor, source: Tensor, *, on_device: Tensor) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        on_device.record_stream(self._stream)

    def _counted(self, operation: str, tensor: Tensor) -> Any:
        num_bytes = tensor.numel() * tensor.element_size()
        return self._recorder.sending(self._axis, operation, num_bytes, "host memory")


class HeldActivations:
    """What layers keep for their backward, on the host meanwhile.

    Parameters
    ----------
    recorder : Recorder
        Counts the copies.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._copies = HostCopies(recorder, "activations")
        self._last: HeldLayer | None = None

    def layer(self, index: int, shared: tuple[Tensor, ...]) -> HeldLayer:
        """Return the context of one layer's forward.

        Parameters
        ----------
        index : int
            The layer: backward comes to it after the one with the next number, beside which it is fetched.
        shared : tuple[Tensor, ...]
            Tables that all layers keep, which stay.
        """
        before = self._last if self._last is not None and self._last.index == index - 1 else None
        self._last = HeldLayer(self._copies, index, shared, before)
        return self._last


class HeldLayer:
    """Context in which all that autograd keeps, but weights and shared tables, rests on the host until backward.

    A storage is copied once, however many views of it are kept. All of a layer come back together, those of the layer
    before with them, so that the way of the one lies beside the backward of the other.
    """

    def __init__(
        self, copies: HostCopies, index: int, shared: tuple[Tensor, ...], before: HeldLayer | None
    ) -> None:
        self.index = index
        self._copies, self._before = copies, before
        self._shared = {each.untyped_storage().data_ptr() for each in shared}
        # By address; the storage itself as well, so that no other comes to its address while the layer runs.
        self._seen: dict[int, tuple[_Block, Any]] = {}
        self._blocks: list[_Block] = []
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._seen.clear()

    def fetch(self) -> None:
        """Begin to bring back everything that has not come back yet."""
        blocks, self._blocks = self._blocks, []
        for block in blocks:
            block.fetch(self._copies)

    def _pack(self, saved: Tensor) -> Any:
        storage = saved.untyped_storage()
        address = storage.data_ptr()
        stays = isinstance(saved, nn.Parameter) or address in self._shared or not storage.nbytes()
        if stays or saved.device.type != self._copies.device.type:
            return saved
        if address not in self._seen:
            flat = torch.empty(0, dtype=torch.uint8, device=saved.device).set_(storage)
            block = _Block(self._copies.to_host(flat))
            self._seen[address] = block, storage
            self._blocks.append(block)
        view = saved.size(), saved.stride(), saved.storage_offset()
        return _Kept(self._seen[address][0], self, saved.dtype, view)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        assert isinstance(packed, _Kept)
        layer = packed.layer
        layer.fetch()
        before, layer._before = layer._before, None
        if before is not None:
            before.fetch()
        flat = packed.block.returned(self._copies)
        size, stride, offset = packed.view
        back = torch.empty(0, dtype=packed.dtype, device=flat.device)
        return back.set_(flat.untyped_storage(), offset, size, stride)


@dataclass(slots=True, eq=False)
class _Block:
    """A storage on the host, and its copy on the device once it is on its way back."""

    on_host: Tensor
    back: Tensor | None = None
    event: Any = None

    def fetch(self, copies: HostCopies) -> None:
        if self.back is None:
            self.back = torch.empty(self.on_host.numel(), dtype=torch.uint8, device=copies.device)
            self.event = copies.to_device(self.back, self.on_host)

    def returned(self, copies: HostCopies) -> Tensor:
        self.fetch(copies)
        assert self.back is not None
        copies.settle(self.event)
        return self.back


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """What autograd holds in place of a tensor."""

    block: _Block
    layer: HeldLayer
    dtype: torch.dtype
    view: tuple[Any, ...]
