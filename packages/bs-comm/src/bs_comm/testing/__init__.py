"""Oracles, strategies and real processes for testing code that plans or runs an exchange. Needs hypothesis."""

from .attention import dense_attention, ring_attention
from .links import slow_links
from .model import all_transfers, model_matchings_hold, model_needs, model_work
from .ranks import RankError, RankPool
from .strategies import layouts, owners, plan_cases

__all__ = [
    "RankError",
    "RankPool",
    "all_transfers",
    "dense_attention",
    "layouts",
    "model_matchings_hold",
    "model_needs",
    "model_work",
    "owners",
    "plan_cases",
    "ring_attention",
    "slow_links",
]
