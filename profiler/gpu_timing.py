"""Timing on a GPU: pairs of events, caches made cold, and CUDA graphs for what is shorter than its launch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["capture", "event_times", "flush_buffer"]

_MIN_FLUSH_BYTES = 256_000_000


@functools.cache
def flush_buffer(l2_bytes: float) -> torch.Tensor:
    """Return the buffer whose zeroing evicts everything else from the caches, allocated once per process.

    Twice the last-level cache and at least 256 MB.
    """
    import torch

    return torch.empty(int(max(2.0 * l2_bytes, _MIN_FLUSH_BYTES)), dtype=torch.int8, device="cuda")


def event_times(call: Callable[[], object], num_repeats: int, buffer: torch.Tensor | None) -> list[float]:
    """Return the seconds of each of some calls on the current stream, by events around them.

    Parameters
    ----------
    call : Callable[[], object]
        Launches on the current stream.
    num_repeats : int
        Calls, queued one behind the other without waiting.
    buffer : torch.Tensor | None
        Zeroed before each call. Meanwhile the host queues the call, so that its launch is not timed.
    """
    import torch

    cuda: Any = torch.cuda  # partly typed
    pairs = []
    for _ in range(num_repeats):
        if buffer is not None:
            buffer.zero_()
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]  # torch gives milliseconds


def capture(function: Callable[[], object]) -> Callable[[], object] | None:
    """Return the replay of a function as a CUDA graph, None when it cannot be captured.

    What waits for the GPU, allocates pinned memory or works on a stream of its own cannot be.
    """
    import torch

    cuda: Any = torch.cuda  # partly typed
    graph = torch.cuda.CUDAGraph()
    try:
        stream = cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The CUDA Graph is empty")
            with torch.cuda.graph(graph, stream=stream):
                function()
        graph.replay()
        torch.cuda.synchronize()
    except (RuntimeError, UserWarning):
        # Raises again if the GPU is lost, not only the capture.
        torch.cuda.synchronize()
        return None
    return graph.replay
