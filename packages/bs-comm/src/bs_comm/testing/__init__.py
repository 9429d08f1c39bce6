"""Oracles, strategies and factories for testing code that plans or runs an exchange. Needs hypothesis."""

from .model import model_matchings_hold, model_needs, model_work
from .strategies import layouts, owners, plan_cases

__all__ = ["layouts", "model_matchings_hold", "model_needs", "model_work", "owners", "plan_cases"]
