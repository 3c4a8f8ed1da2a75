"""Suites of microbenchmarks, one file each; a suite is imported, and torch with it, when it is loaded."""

from meshwright.profiler.suites.base import Case, Suite, load_suite

__all__ = ["SUITES", "Case", "Suite", "load_suite"]

# In the order of their constants: what heats the device comes last.
SUITES: dict[str, str] = {
    "gemm": "meshwright.profiler.suites.gemm",
    "attention": "meshwright.profiler.suites.attention",
    "grouped_gemm": "meshwright.profiler.suites.grouped_gemm",
    "elementwise": "meshwright.profiler.suites.elementwise",
    "optimizer": "meshwright.profiler.suites.optimizer",
    "copies": "meshwright.profiler.suites.copies",
    "launch": "meshwright.profiler.suites.launch",
    "contention": "meshwright.profiler.suites.contention",
    "layer": "meshwright.profiler.suites.layer",
    "collectives": "meshwright.profiler.suites.collectives",
    "sustained": "meshwright.profiler.suites.sustained",
}
