"""Draws small models: source text of plain PyTorch, and an example of what they take."""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from autopar.graph.ir import ModelGraph
from autopar.graph.size import BATCH, SEQ
from autopar.graph.trace import trace
from fuzz import moves
from fuzz.steps import STEPS
from fuzz.writing import BS, Body, Dim, Draw, Members, Value, text

assert moves  # its steps are among STEPS
LENGTH = 12
"""Positions in the example that is traced."""

VOCABULARIES = (12, 16, 11, 13)

_HEAD = """\
import torch
import torch.nn.functional as F
from torch import nn

def rotary(x):
    steps = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angles = torch.outer(steps, 0.1 ** torch.arange(x.shape[-1] // 2, device=x.device, dtype=torch.float32))
    cos, sin = (f(torch.cat((angles, angles), -1)).to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
"""


@dataclass(frozen=True)
class Drawn:
    """A model as text; ``inputs``: its arguments, and the shapes and kinds of one sample's tensors."""

    source: str
    inputs: tuple[tuple[str, tuple[int, ...], str], ...]

    def __repr__(self) -> str:
        told = "".join(f"# {name}: {kind} {list(shape)} a sample\n" for name, shape, kind in self.inputs)
        return f"\n{told}{self.source.removeprefix(_HEAD).strip()}\n"


def drawn_model(pick: Draw[Any]) -> Drawn:
    """A model of any make; ``pick`` chooses one of several things."""
    skeleton = pick((_tokens, _tokens, _tokens, _features, _image))
    return skeleton(pick)


def _steps(body: Body, count: int, start: Value) -> Value:
    """That many steps, each on the latest value, or now and then on an earlier one."""
    x = start
    for _ in range(count):
        if body.values and body.pick((False, False, False, True)):
            x = body.pick(body.values)
        if x.rank > 5 or any(isinstance(size, int) and size > 64 for size in x.shape):
            x = start
        fitting = [step for step in STEPS.values() if step.applies(body, x)]
        body.pick(fitting).write(body, x)
        x = body.values[-1]
    return x


def _brought(body: Body, x: Value, lead: tuple[Dim, ...], width: int) -> Value:
    """``x`` in the shape [*lead, width], by way of means over what that has no place for."""
    if x.shape == (*lead, width):
        return x
    if x.shape[: len(lead)] != lead:
        dims = [dim for dim, size in enumerate(x.shape) if dim and not isinstance(size, int)]
        for dim in reversed(dims):
            x = body.aside(f"{x}.mean({dim})", *x.shape[:dim], *x.shape[dim + 1 :])
        for place, size in enumerate(lead[1:], 1):
            grown = ", ".join(text(size) if dim == place else "-1" for dim in range(x.rank + 1))
            x = body.aside(f"{x}.unsqueeze({place}).expand({grown})", *x.shape[:place], size, *x.shape[place:])
    count = len(lead)
    rest = x.shape[count:]
    for dim in reversed([count + place for place, size in enumerate(rest) if not isinstance(size, int)]):
        x = body.aside(f"{x}.mean({dim})", *x.shape[:dim], *x.shape[dim + 1 :])
    if x.rank == count:
        x = body.aside(f"{x}.unsqueeze(-1)", *x.shape, 1)
    if x.rank > count + 1:
        total: Dim = 1
        for size in x.shape[count:]:
            total = total * size
        x = body.aside(f"{x}.flatten({count})", *x.shape[:count], total)
    if x.last != width:
        made = body.members.module(f"Linear({x.last}, {width})")
        x = body.aside(f"{made}({x})", *x.shape[:-1], width)
    return x


def _layers(pick: Any, members: Members, classes: list[str], body: Body, x: Value) -> Value:
    """A few equal layers, each adding to what it takes, or one value after another without them."""
    count = pick((0, 2, 2, 3))
    if not count:
        return _steps(body, pick((1, 2, 3, 4, 5)), x)
    extra = pick((False, False, True)) and body.ids != "" and x.shape[:2] == (BATCH, SEQ)
    shared = pick((False,) * 5 + (True,))
    inner = Members(pick)
    sizes = frozenset(name for name, size in (("b", BATCH), ("s", SEQ)) if size in x.shape)
    layer = Body(pick, inner, sizes, "ids" if extra else "")
    start = Value("x", x.shape)
    layer.values.append(start)
    made = _brought(layer, _steps(layer, pick((1, 2, 3, 4)), start), x.shape[:-1], _width(x))
    arguments = "x, ids" if extra else "x"
    lines = [f"{name} = x.shape[{x.shape.index(size)}]" for name, size in (("b", BATCH), ("s", SEQ)) if name in sizes]
    norm = pick((f"self.norm({made})", str(made)))
    if "norm" in norm:
        inner.lines.append(f"self.norm = nn.LayerNorm({_width(x)})")
    classes.append(_class("Layer", inner.lines, arguments, [*lines, *layer.lines, f"return x + {norm}"]))
    given = "Layer()"
    members.lines.append(
        f"shared = {given}\nself.layers = nn.ModuleList([shared] * {count})"
        if shared
        else f"self.layers = nn.ModuleList({given} for _ in range({count}))"
    )
    call = f"layer({x}, {body.ids})" if extra else f"layer({x})"
    body.lines += ["for layer in self.layers:", f"    {x} = {call}"]
    return x


def _width(x: Value) -> int:
    assert isinstance(x.last, int)
    return x.last


def _tokens(pick: Any) -> Drawn:
    """Token ids, and targets for each of them."""
    members = Members(pick)
    classes: list[str] = []
    body = Body(pick, members, frozenset("bs"), "input_ids")
    vocabulary, width = pick(VOCABULARIES), pick((8, 4, 12, 16, 6))
    members.lines.append(f"self.embed = nn.Embedding({vocabulary}, {width})")
    body.lines.append("b, s = input_ids.shape")
    x = body.emit("self.embed(input_ids)", BATCH, SEQ, width)
    inputs: list[tuple[str, tuple[int, ...], str]] = [("input_ids", (LENGTH,), "ids")]
    if pick((False, False, True)):
        members.lines.append(f"self.positions = nn.Embedding(64, {width})")
        x = body.emit(f"{x} + self.positions(torch.arange(s, device={x}.device))", BATCH, SEQ, width)
    if pick((False, False, False, True)):
        inputs.append(("features", (LENGTH, 5), "real"))
        x = body.emit(f"{x} + {members.module(f'Linear(5, {width})')}(features)", BATCH, SEQ, width)
    if pick((False, True)):
        x = _brought(body, _steps(body, pick((1, 2)), x), BS, width)
    x = _layers(pick, members, classes, body, x)
    if pick((False, True)):
        x = _steps(body, pick((1, 2)), x)
    x = _brought(body, x, BS, width)
    loss = pick(("head", "tied", "head", "sine", "target"))
    if loss in ("head", "tied"):
        inputs.append(("labels", (LENGTH,), "ids"))
        bias = pick(("", ", bias=False"))
        members.lines.append(f"self.head = nn.Linear({width}, {vocabulary}{bias})")
        if loss == "tied":
            members.lines.append("self.head.weight = self.embed.weight")
        shift = pick((False, False, True))
        logits, labels = ("logits[:, :-1]", "labels[:, 1:]") if shift else ("logits", "labels")
        body.lines.append(f"logits = self.head({x})")
        body.lines.append(f"return F.cross_entropy({logits}.flatten(0, 1), {labels}.flatten())")
    elif loss == "sine":
        body.lines.append(f"return ({x} + 0.3).sin().{pick(('mean', 'sum'))}()")
    else:
        inputs.append(("target", (LENGTH, width), "real"))
        body.lines.append(f"return F.{pick(('mse_loss', 'l1_loss'))}({x}, target)")
    return _drawn(members, classes, body, inputs)


def _features(pick: Any) -> Drawn:
    """A vector or a matrix for each sample, and one target."""
    members = Members(pick)
    classes: list[str] = []
    body = Body(pick, members, frozenset("b"))
    shape = pick(((8,), (4, 6), (6, 8), (3, 4, 4)))
    body.lines.append("b = features.shape[0]")
    x = Value("features", (BATCH, *shape))
    body.values.append(x)
    x = _steps(body, pick((1, 2, 3, 4)), x)
    width = pick((8, 4, 6))
    x = _brought(body, x, (BATCH,), width)
    x = _layers(pick, members, classes, body, x)
    return _ended(pick, members, classes, body, x, [("features", shape, "real")])


def _image(pick: Any) -> Drawn:
    """Channels of an image for each sample, and one target."""
    members = Members(pick)
    classes: list[str] = []
    body = Body(pick, members, frozenset("b"))
    shape = pick(((4, 4, 4), (3, 6, 4), (8, 2, 2)))
    body.lines.append("b = image.shape[0]")
    x = Value("image", (BATCH, *shape))
    body.values.append(x)
    for _ in range(pick((1, 2, 3))):
        if STEPS["image"].applies(body, x):
            STEPS["image"].write(body, x)
            x = body.values[-1]
        if pick((True, False)):
            x = _steps(body, 1, x)
    return _ended(pick, members, classes, body, x, [("image", shape, "real")])


def _ended(pick: Any, members: Members, classes: list[str], body: Body, x: Value, inputs: list[Any]) -> Drawn:
    n = pick((8, 12, 5))
    x = _brought(body, x, (BATCH,), n)
    members.lines.append(f"self.last = nn.Parameter(torch.randn({n}))")  # something trains
    x = body.aside(f"{x} + self.last", *x.shape)
    if pick((True, False)):
        inputs.append(("labels", (), "ids"))
        body.lines.append(f"return F.cross_entropy({x}, labels)")
    else:
        inputs.append(("target", (n,), "real"))
        body.lines.append(f"return F.mse_loss({x}, target)")
    return _drawn(members, classes, body, inputs)


def _drawn(members: Members, classes: list[str], body: Body, inputs: list[Any]) -> Drawn:
    names = ", ".join(name for name, _, _ in inputs)
    classes.append(_class("Model", members.lines, names, body.lines))
    return Drawn("\n\n".join([_HEAD, *classes]), tuple(inputs))


def _class(name: str, members: Sequence[str], arguments: str, lines: Sequence[str]) -> str:
    init = [line for member in members for line in member.splitlines()]
    return "\n".join(
        [
            f"class {name}(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in init),
            "",
            f"    def forward(self, {arguments}):",
            *(f"        {line}" for line in lines),
        ]
    )


@lru_cache(maxsize=64)
def built(drawn: Drawn) -> tuple[nn.Module, dict[str, Tensor], ModelGraph]:
    """The model with seeded weights, the example of one sample, and its trace."""
    path = f"<drawn {abs(hash(drawn)):x}>"
    linecache.cache[path] = (len(drawn.source), None, drawn.source.splitlines(keepends=True), path)
    space: dict[str, Any] = {"__name__": "drawn"}
    exec(compile(drawn.source, path, "exec"), space)
    torch.manual_seed(0)
    model = space["Model"]().double()
    inputs = {
        name: torch.randint(0, 5, shape) if kind == "ids" else torch.randn(shape) for name, shape, kind in drawn.inputs
    }
    return model, inputs, trace(model, inputs)
