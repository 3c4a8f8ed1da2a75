"""Search algorithms, one file each."""

from meshwright.planner.search.base import RankedPlan, Search, SearchRequest, SearchResult
from meshwright.planner.search.exhaustive import ExhaustiveSearch
from meshwright.planner.search.layerwise import LayerwiseSearch

__all__ = ["SEARCHES", "RankedPlan", "Search", "SearchRequest", "SearchResult"]

SEARCHES: dict[str, Search] = {"exhaustive": ExhaustiveSearch(), "layerwise": LayerwiseSearch()}
