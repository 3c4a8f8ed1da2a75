"""What a steady state needs to know of a load: means of its lengths, and how spread they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LoadProfile", "load_profile"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadProfile:
    """Means over the requests of a load.

    Parameters
    ----------
    prompt_lengths : NDArray[np.float64]
        A sample of the prompts' lengths, ascending, ``(num_samples,)`` [tokens].
    mean_prompt, mean_output : float
        Mean lengths [tokens].
    mean_cached : float
        Prompt tokens of a request that a prefix cache holds once it is warm [tokens].
    decode_context : float
        Tokens before a decoding sequence, mean over decode steps [tokens].
    context_variation : float
        Standard deviation of that context over its mean.
    reserved_tokens : float
        Prompt and answer together, mean over decode steps [tokens].
    comes_in_groups : bool
        Requests may start together, again and again: clients of a closed loop whose requests finished together, bursts
        of a trace. Those of a Poisson process never do.
    """

    prompt_lengths: FloatArray
    mean_prompt: float
    mean_output: float
    mean_cached: float
    decode_context: float
    context_variation: float
    reserved_tokens: float
    comes_in_groups: bool = False

    def prompt_quantile(self, share: float) -> float:
        """Return the prompt length that ``share`` of the requests stay within [tokens]."""
        return float(np.quantile(self.prompt_lengths, share))


def load_profile(
    prompts: FloatArray,
    outputs: FloatArray,
    cached: FloatArray | None = None,
    *,
    comes_in_groups: bool = False,
) -> LoadProfile:
    """Return the means of a load.

    Parameters
    ----------
    prompts, outputs : NDArray[np.float64]
        Tokens of each request, ``(num_requests,)``.
    cached : NDArray[np.float64] | None
        Leading prompt tokens of each request that an earlier one had too; None is none.
    comes_in_groups : bool
        As in :class:`LoadProfile`.

    Notes
    -----
    A request of prompt ``p`` and answer ``o`` decodes ``o`` steps at contexts ``p`` to ``p + o``, so that a mean over
    steps weighs it by ``o``: mean ``sum o (p + o / 2) / sum o``, second moment ``sum o (p^2 + p o + o^2 / 3) / sum o``.
    """
    prompts, outputs = np.asarray(prompts, dtype=np.float64), np.asarray(outputs, dtype=np.float64)
    steps = float(outputs.sum())
    context = float((outputs * (prompts + outputs / 2.0)).sum()) / steps
    square = float((outputs * (prompts**2 + prompts * outputs + outputs**2 / 3.0)).sum()) / steps
    return LoadProfile(
        prompt_lengths=np.sort(prompts),
        mean_prompt=float(prompts.mean()),
        mean_output=float(outputs.mean()),
        mean_cached=0.0 if cached is None else float(np.asarray(cached, dtype=np.float64).mean()),
        decode_context=context,
        context_variation=float(np.sqrt(max(0.0, square - context**2))) / context,
        reserved_tokens=float((outputs * (prompts + outputs)).sum()) / steps,
        comes_in_groups=comes_in_groups,
    )
