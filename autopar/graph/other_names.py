"""Operators that are others by another name, or several at once: what an import makes of them."""

from __future__ import annotations

SAME = frozenset({"alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "resolve_conj"})
CASTS = frozenset({"to", "_to_copy", "type_as"})
LISTS = frozenset({"split", "split_with_sizes", "chunk", "unbind", "tensor_split", "broadcast_tensors", "meshgrid"})
SHAPED_AS = {"reshape_as": "reshape", "view_as": "reshape", "expand_as": "expand"}
"""Operators that take a shape from another tensor."""
NEW = {"new_zeros": 0, "new_ones": 1, "new_full": 0}
"""Operators that take a dtype from another tensor and nothing else, and what they are full of."""
LIKE = frozenset({"zeros_like", "ones_like", "full_like", "empty_like"})
"""Operators that take shape and dtype from another tensor, but for the dtype where one is named."""
RENAMED = {
    "view": "reshape",
    "_unsafe_view": "reshape",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "concat": "cat",
    "concatenate": "cat",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "special_expit": "sigmoid",
    "conj": "conj_physical",
    "_conj": "conj_physical",
}
"""Other names of one operator."""
PROMOTING = frozenset({"add", "sub", "mul", "div", "addcmul", "addcdiv", "pow"})
"""Operators that give the widest dtype of their operands."""
OF_TWO = {"max.other": "maximum", "min.other": "minimum"}
"""Overloads that compute something else than their namesakes."""
