"""gpt2 on 4 devices: pp=2 x dp=2 x tp=1.

Written by autopar; made to be read and changed. Tensors are what one rank holds of
them: its samples of a micro-batch.
"""

import torch
import torch.nn.functional as F
from runtime.operators import cross_entropy
from runtime.weights import New, Weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

MESH = {"pp": 2, "dp": 2, "cp": 1, "tp": 1}  # outermost first, in rank order
# Names of one and the same parameter.
TIED = (("transformer.wte.weight", "lm_head.weight"),)


class GPT2Block(nn.Module):
    """transformer.h.*, one micro-batch.

    predicted: 0.469 ms forward, 1.06 ms backward
    """

    def __init__(self, new: New) -> None:
        super().__init__()
        self.ln_1 = Weights(weight=new.whole(768), bias=new.whole(768))
        self.attn = Weights(
            c_attn=Weights(weight=new.whole(768, 2304), bias=new.whole(2304)),
            c_proj=Weights(weight=new.whole(768, 768), bias=new.whole(768)),
        )
        self.ln_2 = Weights(weight=new.whole(768), bias=new.whole(768))
        self.mlp = Weights(
            c_fc=Weights(weight=new.whole(768, 3072), bias=new.whole(3072)),
            c_proj=Weights(weight=new.whole(3072, 768), bias=new.whole(768)),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.layer_norm(
            hidden,
            (768,),
            self.ln_1.weight,
            self.ln_1.bias,
            eps=1e-5,
        )
        c_attn = F.linear(normed, self.attn.c_attn.weight.t(), self.attn.c_attn.bias)
        c_attn = c_attn.unflatten(2, (3, -1))
        q = c_attn[:, :, 0].unflatten(2, (-1, 64)).transpose(1, 2)
        k = c_attn[:, :, 1].unflatten(2, (-1, 64)).transpose(1, 2)
        v = c_attn[:, :, 2].unflatten(2, (-1, 64)).transpose(1, 2)
        heads = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=0.1 if self.training else 0.0,
            is_causal=True,
        )
        merged = heads.transpose(1, 2).flatten(2, 3)
        c_proj = F.linear(merged, self.attn.c_proj.weight.t(), self.attn.c_proj.bias)
        hidden = F.dropout(c_proj, 0.1, self.training) + hidden
        normed = F.layer_norm(
            hidden,
            (768,),
            self.ln_2.weight,
            self.ln_2.bias,
            eps=1e-5,
        )
        c_fc = F.linear(normed, self.mlp.c_fc.weight.t(), self.mlp.c_fc.bias)
        c_fc = F.gelu(c_fc, approximate="tanh")
        c_proj = F.linear(c_fc, self.mlp.c_proj.weight.t(), self.mlp.c_proj.bias)
        return hidden + F.dropout(c_proj, 0.1, self.training)


# Per stage, runs of equal blocks: module list, positions, class, recompute.
STAGES = [
    [
        ("transformer.h", range(3), GPT2Block, "none"),
    ],
    [
        ("transformer.h", range(3, 6), GPT2Block, "none"),
    ],
    [
        ("transformer.h", range(6, 12), GPT2Block, "none"),
    ],
    [],
]


class Stage(nn.Module):
    """One pipeline stage, its parameters under the names they have in the model."""

    def __init__(self, index: int, new: New) -> None:
        super().__init__()
        self.index = index
        self.transformer = nn.Module()
        self.transformer.h = nn.ModuleDict()
        for _, positions, block, _ in STAGES[index]:
            for i in positions:
                self.transformer.h[str(i)] = block(new)
        if index == 0:
            self.transformer.wte = Weights(weight=new.whole(50257, 768))
            self.transformer.wpe = Weights(weight=new.whole(1024, 768))
        if index == 3:
            self.transformer.ln_f = Weights(weight=new.whole(768), bias=new.whole(768))
            self.transformer.wte = Weights(weight=new.whole(50257, 768))

    def blocks(self) -> list[nn.Module]:
        """The blocks of this stage, in order."""
        return [*self.transformer.h.values()]

    def forward(
        self,
        hidden: Tensor | None = None,
        *,
        input_ids: Tensor,
        labels: Tensor,
    ) -> Tensor:
        positions = shared_tables(input_ids.shape[1], input_ids.device)
        if self.index == 0:
            hidden = self.prologue(input_ids, positions)
        for block in self.blocks():
            hidden = block(hidden)
        if self.index == 3:
            return self.epilogue(hidden, labels)
        return hidden

    def prologue(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        wpe = F.embedding(positions, self.transformer.wpe.weight)
        hidden = F.embedding(input_ids, self.transformer.wte.weight) + wpe
        return F.dropout(hidden, 0.1, self.training)

    def epilogue(self, hidden: Tensor, labels: Tensor) -> Tensor:
        normed = F.layer_norm(
            hidden,
            (768,),
            self.transformer.ln_f.weight,
            self.transformer.ln_f.bias,
            eps=1e-5,
        )
        logits = F.linear(normed, self.transformer.wte.weight)
        labels = F.pad(labels, (0, 1), value=-100)
        return cross_entropy(logits, labels[:, 1:])


def shared_tables(seq: int, device: torch.device) -> Tensor:
    """positions: the same for all blocks and ranks."""
    positions = torch.arange(seq, device=device)
    return positions.unsqueeze(0)


def build_stage(
    index: int,
    mesh: DeviceMesh | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    meta: bool = False,
) -> Stage:
    """Stage ``index`` with uninitialised parameters, without memory if ``meta``."""
    place = torch.device("meta") if meta else device
    return Stage(index, New(mesh, (), place, dtype))


def count_targets(batch: dict[str, Tensor]) -> Tensor:
    """How many targets ``batch`` has: what its summed loss is divided by."""
    labels = batch["labels"]
    labels = F.pad(labels, (0, 1), value=-100)
    return (labels[:, 1:] != -100).sum()


@torch.no_grad()
def init_parameter(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Fill a whole parameter: scales 1, biases 0, everything else normal, deviation 0.02."""
    if name.endswith("bias"):
        weight.zero_()
    elif weight.ndim < 2:
        weight.fill_(1.0)
    else:
        weight.normal_(0.0, 0.02, generator=generator)
