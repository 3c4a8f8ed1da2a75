"""When each stage runs its part of embedding and head, where the vocabulary is split over the pipeline stages.

Every stage holds a slice of the vocabulary and works on every micro-batch: it looks rows of the embedding up before the
first stage's forward, and computes logits and their gradients between the last stage's forward and backward. The order
is that of a building block, the same for every micro-batch and one interval later each (Yeung et al. 2024, arXiv
2411.05288, section 5): every operation has a place in time, and a stage runs its operations by time. What depends on
something is later than that, and what all stages meet in has the same time on all: no order can deadlock.

``vocab_1`` meets twice between the last forward and backward, for the statistics of the softmax and for the gradient
(its algorithm 1), ``vocab_2`` once (algorithm 2): the backward is that many intervals later, and each stage holds that
many micro-batches more. ``interlaced`` computes head and embedding at once on all stages, which wait for each other; the
gradient then goes one stage back per interval, and stages hold half as many micro-batches again (Lin et al. 2024,
nnScaler, OSDI; the paper's section 6.1).
"""

from __future__ import annotations

from typing import Final

from meshwright.simcore.schedules import BACKWARD, FORWARD

__all__ = [
    "EMBEDDING",
    "EMBEDDING_GRADIENT",
    "GRADIENT_BROADCAST",
    "HIDDEN_BROADCAST",
    "KINDS_OVER_STAGES",
    "LOGITS",
    "LOGITS_GRADIENT",
    "RESCALE",
    "VOCABULARY_NAMES",
    "vocabulary_operations",
]

# Beside the kinds of meshwright.simcore.schedules; where times are equal the lower one is first.
EMBEDDING: Final = 10
HIDDEN_BROADCAST: Final = 11
LOGITS: Final = 12
RESCALE: Final = 13
LOGITS_GRADIENT: Final = 14
GRADIENT_BROADCAST: Final = 15
EMBEDDING_GRADIENT: Final = 16
VOCABULARY_NAMES = {
    EMBEDDING: "embedding rows",
    HIDDEN_BROADCAST: "broadcast of the hidden states",
    LOGITS: "logits",
    RESCALE: "rescaling of the head's gradient",
    LOGITS_GRADIENT: "gradient of the logits",
    GRADIENT_BROADCAST: "broadcast of the embedding's gradient",
    EMBEDDING_GRADIENT: "gradient of the embedding rows",
}
KINDS_OVER_STAGES = ("vocab_1", "vocab_2", "interlaced")
# An interval in which a stage runs one of each; a forward takes a third of it, a backward the rest.
_INTERVAL: Final = 6
_FORWARD: Final = 2
_BACKWARD: Final = 4
_HALF: Final = 3


def vocabulary_operations(
    vocab_parallel: str, num_stages: int, stage: int, num_micro_batches: int
) -> list[tuple[int, int]]:
    """Return kind and micro-batch of what a stage runs, in order.

    Parameters
    ----------
    vocab_parallel : str
        One of ``KINDS_OVER_STAGES``.
    num_stages, stage : int
        Stages, and the one that asks, from 0.
    num_micro_batches : int
        Of a step.

    Examples
    --------
    >>> [kind for kind, _ in vocabulary_operations("interlaced", 2, 1, 1)]
    [10, 0, 11, 12, 14, 1, 15, 16]
    """
    own, first = (_times(vocab_parallel, num_stages, each) for each in (stage, 0))
    later = {FORWARD: own, EMBEDDING: first}
    slot = _HALF if vocab_parallel == "interlaced" else _FORWARD
    timed = sorted(
        (
            time + _delay(micro_batch, later.get(kind), slot),
            # Passes that all stages meet in come first among equals.
            kind in (FORWARD, BACKWARD),
            kind,
            micro_batch,
        )
        for kind, time in own.items()
        for micro_batch in range(num_micro_batches)
    )
    return [(kind, micro_batch) for _, _, kind, micro_batch in timed]


def _delay(micro_batch: int, times: dict[int, int] | None, slot: int) -> int:
    """Return how much later than the first micro-batch another one is.

    Forwards that nothing has to make room for follow each other at once: those of the micro-batches that a stage holds
    before its first backward.
    """
    if times is not None:
        held = times[BACKWARD] + _INTERVAL - slot - times[FORWARD]
        if micro_batch * _INTERVAL < held:
            return micro_batch * slot
    return micro_batch * _INTERVAL


def _times(vocab_parallel: str, num_stages: int, stage: int) -> dict[int, int]:
    """Return the time of each kind of operation on the first micro-batch, as if many came before it."""
    if vocab_parallel == "interlaced":
        return _interlaced(num_stages, stage)
    return _apart(num_stages, stage, num_barriers=2 if vocab_parallel == "vocab_1" else 1)


def _apart(num_stages: int, stage: int, *, num_barriers: int) -> dict[int, int]:
    """Return the times of passes that run beside forwards and backwards.

    The logits follow the backward that follows the last forward, which the hidden states travel beside.
    """
    has_forward = num_stages * _FORWARD
    has_gradient = has_forward + num_barriers * _INTERVAL
    logits = has_forward + 1
    ended = has_gradient + num_stages * _BACKWARD
    times = {
        EMBEDDING: -_BACKWARD,
        FORWARD: stage * _FORWARD,
        HIDDEN_BROADCAST: has_forward,
        LOGITS: logits,
        LOGITS_GRADIENT: logits + _INTERVAL,
        BACKWARD: has_gradient + (num_stages - 1 - stage) * _BACKWARD,
        GRADIENT_BROADCAST: ended,
        EMBEDDING_GRADIENT: ended + _FORWARD,
    }
    if num_barriers == 1:
        times[RESCALE] = has_gradient - 2
    return times


def _interlaced(num_stages: int, stage: int) -> dict[int, int]:
    """Return the times of passes that stand between intervals: of a forward and a backward, or the other way round."""
    has_forward = num_stages * _HALF
    distance = num_stages - 1 - stage
    ended = has_forward + num_stages * _INTERVAL
    return {
        EMBEDDING: 0,
        FORWARD: stage * _HALF,
        HIDDEN_BROADCAST: has_forward,
        LOGITS: has_forward,
        LOGITS_GRADIENT: has_forward,
        BACKWARD: has_forward + distance * _INTERVAL + distance % 2 * _HALF,
        GRADIENT_BROADCAST: ended,
        EMBEDDING_GRADIENT: ended,
    }
