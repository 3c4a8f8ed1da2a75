"""How many drafted tokens stand in a step of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.errors import SpecError

__all__ = ["Acceptance", "acceptance_reason"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """The chance of each drafted token, or the measured lengths of what a step yields.

    Parameters
    ----------
    rate : float
        Chance that a drafted token is accepted, given that those before it were.
    lengths : tuple[float, ...]
        Probability of 1, 2, ... tokens per step, where measured; overrides the rate. Of ``n`` numbers the longest draft
        measured has ``n - 1`` tokens.

    Raises
    ------
    SpecError
        If these are no probabilities.
    """

    rate: float = 0.7
    lengths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        reason = acceptance_reason(self.rate, self.lengths)
        if reason is not None:
            raise SpecError(f"{'acceptance_lengths' if self.lengths else 'acceptance_rate'}: {reason}")

    @property
    def longest_draft(self) -> int | None:
        """Most drafted tokens this says something of; None where a rate says it of all."""
        return len(self.lengths) - 1 if self.lengths else None

    def of_draft(self, num_speculative_tokens: int) -> Acceptance:
        """Return what this says of a shorter draft: a step that would have yielded more ends with the draft."""
        last = num_speculative_tokens
        if len(self.lengths) <= last + 1:
            return self
        return Acceptance(rate=self.rate, lengths=(*self.lengths[:last], sum(self.lengths[last:])))

    def step_token_probabilities(self, num_speculative_tokens: int) -> tuple[float, ...]:
        """Return the probabilities of 1, 2, ... tokens of one sequence in one decode step.

        A constant rate ``a`` accepts ``i`` of ``s`` drafted tokens or more with chance ``a^i`` (Leviathan et al. 2022, arXiv
        2211.17192, section 3.1).
        """
        if self.lengths:
            return self.of_draft(num_speculative_tokens).lengths
        rate, count = self.rate, num_speculative_tokens
        return (*(rate**i * (1.0 - rate) for i in range(count)), rate**count)

    def tokens_per_step(self, num_speculative_tokens: int) -> float:
        """Return the mean tokens a sequence gains in a step; of a constant rate ``(1 - a^(s+1)) / (1 - a)``.

        Source: Leviathan et al. 2022 (arXiv 2211.17192), equation 1.
        """
        shares = self.step_token_probabilities(num_speculative_tokens)
        return sum(share * (1 + index) for index, share in enumerate(shares))


def acceptance_reason(rate: float, lengths: tuple[float, ...]) -> str | None:
    """Return why these are no probabilities of acceptance, None where they are."""
    if lengths and (min(lengths) < 0.0 or abs(sum(lengths) - 1.0) > 1e-6):
        return (
            "list the probabilities of 1, 2, 3, ... tokens per step, none below 0, which sum to 1; "
            f"{', '.join(f'{share:g}' for share in lengths)} sum to {sum(lengths):g}"
        )
    if not 0.0 <= rate <= 1.0:
        return f"is a chance from 0 to 1, not {rate:g}"
    return None
