"""Which host runs which part of a plan, where links between hosts differ."""

from meshwright.planner.mapping.problem import MappingProblem, Traffic, grid_problem, order_cost
from meshwright.planner.mapping.search import MappingResult, search_order

__all__ = ["MappingProblem", "MappingResult", "Traffic", "grid_problem", "order_cost", "search_order"]
