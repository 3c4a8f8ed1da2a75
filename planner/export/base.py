"""What an exporter is, and what it hands back: the files that start a plan on one framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

from meshwright.errors import UnsupportedByTargetError
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.serving import ServingJob, ServingPlan

__all__ = [
    "LAUNCHERS",
    "ExportBundle",
    "ExportFile",
    "Exporter",
    "Launcher",
    "ServingExporter",
    "raise_if_unsupported",
    "raise_reasons",
]

Launcher = Literal["torchrun", "slurm", "kubernetes"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)


class ExportFile(NamedTuple):
    """One file of a bundle.

    Parameters
    ----------
    name : str
        Plain file name, without any folder.
    text : str
        Contents.
    is_executable : bool
        Whether the file is a script to be started.
    """

    name: str
    text: str
    is_executable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportBundle:
    """Everything one framework needs to run a plan.

    Parameters
    ----------
    target, target_version : str
        The framework, and the release whose option names are used.
    files : tuple[ExportFile, ...]
        ``(relative name, text, is_executable)``, in the order they are read.
    launch_command : str
        What to type in the folder of the files: on every node (torchrun, serving engines) or once (slurm, kubernetes).
    notes : tuple[str, ...]
        What the files assume and the user should know, one sentence each.
    """

    target: str
    target_version: str
    files: tuple[ExportFile, ...]
    launch_command: str
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """Turns a plan into the files of one framework; refuses what the framework cannot express."""

    @property
    def target(self) -> str:
        """Id of the framework, as users type it."""
        ...

    @property
    def target_version(self) -> str:
        """Release whose option names and rules apply."""
        ...

    @property
    def search_limits(self) -> Mapping[str, tuple[int | str | bool, ...]]:
        """Values of plan fields outside which every plan is unsupported, so that a search need not ask."""
        ...

    @property
    def expresses(self) -> Mapping[str, str]:
        """What of a plan the target can express, in its own words, by topic."""
        ...

    def unsupported(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        """Return every reason why the target cannot run the plan, one sentence each; empty when it can."""
        ...

    def export(self, job: TrainingJob, plan: ParallelPlan, launcher: Launcher) -> ExportBundle:
        """Return the files that run the plan.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        ...


class ServingExporter(Protocol):
    """Turns a serving plan into the files of one engine or orchestrator; refuses what it cannot express."""

    @property
    def target(self) -> str:
        """Id of the target, as users type it."""
        ...

    @property
    def target_version(self) -> str:
        """Release whose option names and rules apply."""
        ...

    @property
    def expresses(self) -> Mapping[str, str]:
        """What of a plan the target can express, in its own words, by topic."""
        ...

    def unsupported(self, job: ServingJob, plan: ServingPlan) -> tuple[str, ...]:
        """Return every reason why the target cannot run the plan, one sentence each; empty when it can."""
        ...

    def export(self, job: ServingJob, plan: ServingPlan) -> ExportBundle:
        """Return the files that run the plan.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        ...


def raise_if_unsupported(exporter: Exporter, job: TrainingJob, plan: ParallelPlan) -> None:
    """Raise when the target cannot express the plan.

    Raises
    ------
    UnsupportedByTargetError
        Lists every reason.
    """
    raise_reasons(exporter.target, exporter.target_version, exporter.unsupported(job, plan))


def raise_reasons(target: str, target_version: str, reasons: tuple[str, ...]) -> None:
    """Raise when there are reasons against an export.

    Raises
    ------
    UnsupportedByTargetError
        Lists every reason.
    """
    if reasons:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise UnsupportedByTargetError(f"{target} {target_version} cannot run this plan:\n{listed}")
