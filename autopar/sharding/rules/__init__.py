"""The rule table, and the strategies that follow from it.

``RULES`` has one entry per operator, grouped by family in this folder. `rule_of` is the factor table of one call and
prints as its annotation string; `strategies_of` lists what may be done with it on one mesh axis; `divides` says
whether a strategy's factor divides by the axis.
"""

from autopar.sharding.rules.blocks import blocks_of
from autopar.sharding.rules.strategies import Strategy, divides, has_rule, ring_axis, strategies_of, strategy_of
from autopar.sharding.rules.table import RULES, rule_of

__all__ = [
    "RULES",
    "Strategy",
    "blocks_of",
    "divides",
    "has_rule",
    "ring_axis",
    "rule_of",
    "strategies_of",
    "strategy_of",
]
