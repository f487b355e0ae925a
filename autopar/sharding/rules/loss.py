"""Cross-entropy summed over targets: split by target it is a partial sum, split by vocabulary it is invariant.

CTC losses, one for each sample: samples go apart.
"""

from __future__ import annotations

from autopar.sharding.factors import Inner, Variant
from autopar.sharding.layout import I
from autopar.sharding.rules.entry import Call, Entry


def _split_vocabulary(call: Call) -> dict[str, Variant]:
    """Each rank holds part of the classes; maximum, sum of exponentials and target logit are each all-reduced.

    Every rank then has the whole loss, and from its whole gradient the gradient of its own logits: the loss is I.
    (Megatron-LM, arXiv 1909.08053, section 3.)
    """
    positions = call.shapes[0][:-1]
    inner = Inner("all_reduce", positions, "float32")
    return {"v": Variant("vocab", I, (inner, inner, inner))}


ENTRIES = [
    Entry("autopar.cross_entropy", ("...+ v, ...+ -> ()",), variants=_split_vocabulary, uneven="v"),
    Entry("autopar.ctc_loss", ("t^ b c^, b s^, b, b -> b",)),
]
