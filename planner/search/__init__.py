"""Search algorithms, one file each."""

from meshwright.planner.search.base import RankedPlan, Search, SearchRequest, SearchResult
from meshwright.planner.search.exhaustive import ExhaustiveSearch

__all__ = ["SEARCHES", "RankedPlan", "Search", "SearchRequest", "SearchResult"]

SEARCHES: dict[str, Search] = {"exhaustive": ExhaustiveSearch()}
