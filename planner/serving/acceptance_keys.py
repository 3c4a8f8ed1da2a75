"""How job and plan files state how many drafted tokens stand: a rate, or the distribution of tokens per step."""

from __future__ import annotations

from meshwright.hardware_specs.yaml_document import Section
from meshwright.simcore.domain.speculation import Acceptance, acceptance_reason

__all__ = ["acceptance_mapping", "acceptance_of_section", "acceptance_text"]


def acceptance_of_section(section: Section) -> Acceptance | None:
    """Return what ``acceptance_rate`` or ``acceptance_lengths`` says; None where neither is there.

    Raises
    ------
    SpecError
        If both are there, or it is no probability: file, line and key.
    """
    known = Acceptance()
    if section.has("acceptance_lengths"):
        if section.has("acceptance_rate"):
            raise section.error(
                "acceptance_lengths", "says all that 'acceptance_rate:' says; remove one of them"
            )
        key, rate, lengths = "acceptance_lengths", known.rate, section.numbers("acceptance_lengths")
        if not lengths:
            raise section.error(key, "list the probabilities of 1, 2, 3, ... tokens per step, or remove it")
    elif section.has("acceptance_rate"):
        key, rate, lengths = "acceptance_rate", section.number("acceptance_rate"), known.lengths
    else:
        return None
    reason = acceptance_reason(rate, lengths)
    if reason is not None:
        raise section.error(key, reason)
    return Acceptance(rate=rate, lengths=lengths)


def acceptance_mapping(acceptance: Acceptance) -> dict[str, object]:
    """Return the key that :func:`acceptance_of_section` reads back."""
    if acceptance.lengths:
        return {"acceptance_lengths": list(acceptance.lengths)}
    return {"acceptance_rate": acceptance.rate}


def acceptance_text(acceptance: Acceptance) -> str:
    """Return what is assumed of drafted tokens, after the word that."""
    if acceptance.lengths:
        shares = ", ".join(f"{share:.3g}" for share in acceptance.lengths)
        return f"a step yields 1, 2, ... tokens with the probabilities {shares}"
    return f"a drafted token is accepted with chance {acceptance.rate:g}"
