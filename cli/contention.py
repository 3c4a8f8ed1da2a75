"""The flags of ``simulate`` about links that are shared, slow, failed or busy, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, cast

import click

if TYPE_CHECKING:
    from meshwright.costmodels.contention import ContentionOutcome
    from meshwright.costmodels.context import CostContext
    from meshwright.simcore.domain.plan import ParallelPlan
    from meshwright.simcore.network.fabric import Fabric

__all__ = ["ContentionFlags", "asked_contention", "contention_options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentionFlags:
    """What the flags said; anything but the defaults asks for contention."""

    is_asked: bool
    routing: str | None
    slow_links: tuple[str, ...]
    failed_links: tuple[str, ...]
    background: tuple[str, ...]
    checkpoint: str | None

    @property
    def given(self) -> dict[str, object]:
        """The flags by name, for commands that know none of them."""
        return {
            "--contention": self.is_asked,
            "--routing": self.routing,
            "--slow-link": self.slow_links,
            "--failed-link": self.failed_links,
            "--background": self.background,
            "--checkpoint": self.checkpoint,
        }


def contention_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags and pass them on as one ``contention`` argument."""

    @click.option(
        "--contention",
        "is_asked",
        is_flag=True,
        help="Let communication that shares links slow each other down.",
    )
    @click.option(
        "--routing",
        type=click.Choice(["adaptive", "ecmp"]),
        help="Contention: spread flows over all cables, or hash each onto one (--seed).",
    )
    @click.option(
        "--slow-link",
        "slow_links",
        multiple=True,
        metavar="LINK=LOST",
        help="Contention: bandwidth a link lost, e.g. 'rail up 3=50%'.",
    )
    @click.option(
        "--failed-link",
        "failed_links",
        multiple=True,
        metavar="LINK",
        help="Contention: a link that is down, e.g. 'leaf up 3'.",
    )
    @click.option(
        "--background",
        multiple=True,
        metavar="KIND=SHARE",
        help="Contention: what other jobs take of all links of a kind, e.g. 'leaf up=30%'.",
    )
    @click.option(
        "--checkpoint",
        metavar="BANDWIDTH",
        help="Contention: write a checkpoint meanwhile, every node at e.g. '5 GB/s'.",
    )
    @wraps(command)
    def wrapped(
        *,
        is_asked: bool,
        routing: str | None,
        slow_links: tuple[str, ...],
        failed_links: tuple[str, ...],
        background: tuple[str, ...],
        checkpoint: str | None,
        **arguments: Any,
    ) -> None:
        others = (routing, slow_links, failed_links, background, checkpoint)
        flags = ContentionFlags(
            is_asked=is_asked or any(others),
            routing=routing,
            slow_links=slow_links,
            failed_links=failed_links,
            background=background,
            checkpoint=checkpoint,
        )
        command(contention=flags, **arguments)

    return wrapped


def asked_contention(
    context: CostContext,
    plan: ParallelPlan,
    flags: ContentionFlags,
    slow_ranks: tuple[tuple[int, float], ...],
    seed: int,
) -> ContentionOutcome | None:
    """Return the iteration with the contention that the flags ask for; None where they ask for none.

    Raises
    ------
    SpecError
        If a flag names what does not exist, or a failed link cuts GPUs of the plan off.
    """
    if not flags.is_asked:
        return None
    from meshwright.costmodels.contention import simulate_contention
    from meshwright.costmodels.traffic import NetworkConditions, described_fabric

    routing = cast("Literal['adaptive', 'ecmp']", flags.routing or "adaptive")
    fabric = _with_faults(described_fabric(context, routing, seed), flags)
    conditions = NetworkConditions(fabric=fabric, checkpoint_bandwidth=_checkpoint(flags.checkpoint))
    return simulate_contention(context, plan, conditions, slow_ranks)


def _with_faults(fabric: Fabric, flags: ContentionFlags) -> Fabric:
    from meshwright.errors import SpecError

    loaded: set[str] = set()
    for text in flags.background:
        kind, share = _named_share("--background", "KIND=SHARE", "leaf up=30%", text)
        if kind in loaded:
            raise SpecError(f"--background: '{kind}' is given twice; add the shares up and give it once")
        loaded.add(kind)
        try:
            fabric = fabric.with_background(kind, share)
        except SpecError as error:
            raise SpecError(f"--background: {error}") from None
    factors: dict[int, float] = {}
    for text in flags.slow_links:
        name, lost = _named_share("--slow-link", "LINK=LOST", "rail up 3=50%", text)
        _set_once(factors, _link("--slow-link", fabric, name), 1.0 - lost, f"--slow-link: '{name}'")
    for name in flags.failed_links:
        _set_once(factors, _link("--failed-link", fabric, name), 0.0, f"--failed-link: '{name}'")
    return fabric.with_capacity_factors(factors) if factors else fabric


def _set_once(factors: dict[int, float], link: int, factor: float, where: str) -> None:
    from meshwright.errors import SpecError

    if link in factors:
        raise SpecError(f"{where} is slowed or failed by another flag already; give each link once")
    factors[link] = factor


def _link(flag: str, fabric: Fabric, name: str) -> int:
    from meshwright.errors import SpecError

    try:
        return fabric.link_number(name)
    except SpecError as error:
        raise SpecError(f"{flag}: {error}") from None


def _named_share(flag: str, form: str, example: str, text: str) -> tuple[str, float]:
    """Return name and share of ``rail up 3=50%``; the share is below 1."""
    from meshwright.errors import SpecError
    from meshwright.units import parse_quantity

    name, _, share_text = text.rpartition("=")
    if not name.strip() or not share_text.strip():
        raise SpecError(f"{flag}: '{text}' is not {form}; write for example '{example}'")
    try:
        share = parse_quantity(share_text, "fraction")
    except SpecError as error:
        raise SpecError(f"{flag}: {error}") from None
    if share >= 1.0:
        instead = f", or --failed-link '{name.strip()}'" if flag == "--slow-link" else ""
        raise SpecError(f"{flag}: '{text}' leaves nothing; write less than 100%{instead}")
    return name.strip(), share


def _checkpoint(text: str | None) -> float | None:
    from meshwright.errors import SpecError
    from meshwright.units import parse_quantity

    if text is None:
        return None
    try:
        bandwidth = parse_quantity(text, "bytes_per_second")
    except SpecError as error:
        raise SpecError(f"--checkpoint: {error}") from None
    if bandwidth <= 0.0:
        raise SpecError(f"--checkpoint: '{text}' writes nothing; write for example '5 GB/s'")
    return bandwidth
