"""Tables of positions, as models keep them in buffers: computed where they are read."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoids(
    rows: int, width: int, blank: int | None = None, *, dtype: torch.dtype, device: torch.device | None
) -> Tensor:
    """Sinusoidal positions (arXiv 1706.03762, section 3.5), sines before cosines; row ``blank`` is zero.

    In float32 whatever ``dtype`` is: the numbers are those of the model's own table.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, device=device).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(rows, device=device).float().unsqueeze(1) * rates
    table = F.pad(torch.cat((angles.sin(), angles.cos()), 1), (0, width % 2))
    if blank is not None:
        table[blank] = 0
    return table.to(dtype)


ANGLE_FORMS = {
    "cos": 1,
    "sin": 1,
    "cos halves": 2,
    "sin halves": 2,
    "cos twice": 2,
    "sin twice": 2,
    "sin then cos": 2,
    "cos then sin": 2,
    "waves": 2,
    "pairs": 2,
    "pairs polar": 2,
}
"""Forms of `angle_table`, and how many numbers a row has for each rate."""


def angle_table(
    rows: int, rates: int, base: float, form: str, rising: bool, *, dtype: torch.dtype, device: torch.device | None
) -> Tensor:
    """Rotary positions (arXiv 2104.09864, section 3.2.2), or sinusoidal ones.

    Of the angles ``row * base ** -(i / rates)`` the cosines or sines, once or two of each (one after the other, or as
    two halves of a row); both, as two halves of a row, or in turn ("waves"); or (cosine, sine) [rows, rates, 2], as the
    parts of complex numbers ("pairs").

    ``rising``: the rates are made by an exponential. In float32 whatever ``dtype`` is: the numbers are those of the
    model's own table.
    """
    places = torch.arange(0, 2 * rates, 2, device=device).float()
    each = torch.exp(places * (-math.log(base) / (2 * rates))) if rising else 1.0 / base ** (places / (2 * rates))
    turned = torch.arange(rows, device=device).float().unsqueeze(1) * each
    if form == "pairs polar":
        return torch.view_as_real(torch.polar(torch.ones_like(turned), turned)).to(dtype)
    if form in ("pairs", "waves"):
        parts = (turned.cos(), turned.sin()) if form == "pairs" else (turned.sin(), turned.cos())
        table = torch.stack(parts, -1)
        return (table if form == "pairs" else table.flatten(1)).to(dtype)
    table = turned.cos() if form.startswith("cos") else turned.sin()
    if "then" in form:
        table = torch.cat((table, turned.sin() if form.startswith("cos") else turned.cos()), -1)
    if form.endswith("halves"):
        table = torch.cat((table, table), -1)
    return (table.repeat_interleave(2, -1) if form.endswith("twice") else table).to(dtype)
