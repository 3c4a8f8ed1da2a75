"""How long the requests of a serving job get, which engines want to know before they start."""

from __future__ import annotations

import math

from meshwright.simcore.domain.serving import LengthDistribution, ServingJob

__all__ = ["longest_request", "max_model_length"]

# Chat templates and benchmark clients add a few tokens to a prompt; an engine rejects a request that is one too long.
_TEMPLATE_TOKENS = 256


def longest_request(job: ServingJob) -> int | None:
    """Return the tokens of the longest request, prompt and answer; None where lengths have no upper end.

    The prompt of a session's last turn holds all earlier prompts and answers.
    """
    workload = job.workload
    ends = [_upper_end(length) for length in (workload.input_length, workload.output_length)]
    if None in ends:
        return None
    return sum(end for end in ends if end is not None) * workload.num_turns


def max_model_length(job: ServingJob) -> int:
    """Return the longest request an engine has to accept [tokens], at most the model's positions."""
    positions = job.model.max_position_embeddings
    longest = longest_request(job)
    return positions if longest is None else min(positions, longest + _TEMPLATE_TOKENS)


def _upper_end(length: LengthDistribution | None) -> int | None:
    if length is None or length.kind == "lognormal":
        return None
    return math.ceil(length.mean)
