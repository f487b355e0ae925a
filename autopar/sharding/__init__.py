"""Sharding algebra: layouts, conversions between them, and one rule per operator.

layout       the types R, I, P, S(d) per mesh axis, and the order of axes on a dim
conversions  what takes a tensor from one type to another, forward and backward
factors      rules as factor tables, and the annotation strings they print as
rules/       the rule table by operator family, block splits, and the strategies that follow
decision     what the search decides inside a block; check: whether it is whole; data-parallel check
local        local shapes and arguments, cutting and joining
execute      runs a decision on simulated ranks, or on one rank (simulate, variants: what it stands on)
"""
