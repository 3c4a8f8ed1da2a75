"""Ask every client about every export and every broken plan, and count."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conformance_broken import BROKEN, reasons_of, unchecked_bundle
from conformance_clients import ask, launched
from conformance_corpus import CorpusPlan, corpus, takers
from conformance_questions import question

from meshwright.planner.export import EXPORTERS

__all__ = ["PACKAGES", "Row", "Verdict", "absent", "client_paths", "exported_plans", "row"]

#: Client -> the package that it imports.
PACKAGES = {
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
    "megatron_core": "megatron.core",
    "megatron_lm": "megatron.training",
    "torchtitan": "torchtitan",
}
Paths = Sequence[str | Path]


class Verdict(NamedTuple):
    """What was asked about, and the client's error; None where it accepts."""

    name: str
    error: str | None


class Row(NamedTuple):
    """One client on one target.

    Parameters
    ----------
    target, client : str
        Export target and the framework that was asked.
    exports : tuple[Verdict, ...]
        Every plan of the corpus that the target takes.
    broken : tuple[str, ...]
        Rules of the plans that must be refused.
    missed : tuple[str, ...]
        Those that Meshwright does not refuse.
    asked : tuple[Verdict, ...]
        The client's verdict on those of which files can be written at all.
    answers : tuple[dict[str, Any], ...]
        All that the client said of the exports and, after them, of the questions added to theirs.
    """

    target: str
    client: str
    exports: tuple[Verdict, ...]
    broken: tuple[str, ...]
    missed: tuple[str, ...]
    asked: tuple[Verdict, ...]
    answers: tuple[dict[str, Any], ...]

    @property
    def num_accepted(self) -> int:
        """Exports that the client accepts."""
        return sum(verdict.error is None for verdict in self.exports)

    @property
    def num_refused_by_client(self) -> int:
        """Broken plans that the client refuses."""
        return sum(verdict.error is not None for verdict in self.asked)


def absent(client: str, paths: Mapping[str, Paths], target: str | None = None) -> str | None:
    """Return why a client cannot be asked, None when it can."""
    package = PACKAGES[client]
    if client_paths(client, target, paths):
        return None
    if client == "torchtitan" and target == "torchtitan-0.2":
        return "torchtitan 0.2.1 is not given"
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"{package} is neither installed nor given"


def client_paths(client: str, target: str | None, paths: Mapping[str, Paths]) -> Paths:
    """Return where a client is imported from, empty for what is installed."""
    return paths.get(target if client == "torchtitan" and target is not None else client, ())


def exported_plans(target: str) -> list[CorpusPlan]:
    """Return the plans of the corpus that a target takes."""
    return [item for item in corpus() if target in takers(item.job, item.plan)]


def row(
    target: str,
    client: str,
    paths: Mapping[str, Paths],
    more: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
) -> Row:
    """Return a client's verdict on every plan of the corpus that a target takes, and on its broken plans.

    Parameters
    ----------
    target, client : str
        Export target and client.
    paths : Mapping[str, Paths]
        Where clients are imported from that are not installed.
    more : Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None
        Makes further questions of those about the exports, while their files exist.
    """
    own = [item for item in BROKEN if item.target == target]
    exported = exported_plans(target)
    bundles = [EXPORTERS[target].export(item.job, item.plan, "torchrun") for item in exported]
    written = [(item, bundle) for item in own if (bundle := unchecked_bundle(item)) is not None]
    plans = [(item.job, item.plan) for item in exported] + [item.build() for item, _ in written]
    with tempfile.TemporaryDirectory() as folder:
        launches = launched([*bundles, *(bundle for _, bundle in written)], Path(folder))
        questions = [
            question(client, target, job, plan, launch)
            for (job, plan), launch in zip(plans, launches, strict=True)
        ]
        added = [] if more is None else more(questions[: len(exported)])
        answers = ask(client, [*questions, *added], paths=client_paths(client, target, paths))
    names = [item.name for item in exported] + [item.rule for item, _ in written]
    verdicts = [Verdict(name, answer["error"]) for name, answer in zip(names, answers, strict=False)]
    return Row(
        target=target,
        client=client,
        exports=tuple(verdicts[: len(exported)]),
        broken=tuple(item.rule for item in own),
        missed=tuple(item.rule for item in own if not reasons_of(item)),
        asked=tuple(verdicts[len(exported) :]),
        answers=(*answers[: len(exported)], *answers[len(questions) :]),
    )
