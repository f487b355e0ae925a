"""llama3.2-1b on 4 devices: pp=1 x dp=2 x tp=2.

Written by autopar; made to be read and changed. Tensors are what one rank holds of
them: its samples of a micro-batch, its part along the tensor-parallel axis tp.

How the ranks of tp hold a tensor: R replicated, I invariant (replicated and used
alike), P partial sums, S(d) split on dim d; see runtime/collectives.py.
"""

import torch
import torch.nn.functional as F
from runtime.collectives import all_gather, reduce_scatter, replicate, zero_pad
from runtime.operators import rotary, vocab_cross_entropy, vocab_embedding
from runtime.weights import New, Weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

MESH = {"pp": 1, "dp": 2, "cp": 1, "tp": 2}  # outermost first, in rank order
# Names of one and the same parameter.
TIED = (("model.embed_tokens.weight", "lm_head.weight"),)


class LlamaDecoderLayer(nn.Module):
    """model.layers.*, one micro-batch.

    hidden: arrives as tp:S(1)
    returns tp:S(1)
    predicted: 1.9 ms forward, 3.28 ms backward
    """

    def __init__(self, new: New) -> None:
        super().__init__()
        self.tp = new.axis("tp")
        self.input_layernorm = Weights(weight=new.whole(2048))
        self.self_attn = Weights(
            q_proj=Weights(weight=new.split(2048, 2048, tp=0)),
            k_proj=Weights(weight=new.split(512, 2048, tp=0)),
            v_proj=Weights(weight=new.split(512, 2048, tp=0)),
            o_proj=Weights(weight=new.split(2048, 2048, tp=1)),
        )
        self.post_attention_layernorm = Weights(weight=new.whole(2048))
        self.mlp = Weights(
            gate_proj=Weights(weight=new.split(8192, 2048, tp=0)),
            up_proj=Weights(weight=new.split(8192, 2048, tp=0)),
            down_proj=Weights(weight=new.split(2048, 8192, tp=1)),
        )

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = F.rms_norm(
            hidden,
            (2048,),
            replicate(self.input_layernorm.weight.to_local(), self.tp),
            eps=1e-5,
        )

        # tp all-gather, 33.6 MB per micro-batch, 61.5 us; backward: reduce-scatter
        normed = all_gather(normed, self.tp, 1)
        q = F.linear(normed, self.self_attn.q_proj.weight.to_local())
        q = q.unflatten(2, (-1, 64)).transpose(1, 2)
        k = F.linear(normed, self.self_attn.k_proj.weight.to_local())
        k = k.unflatten(2, (-1, 64)).transpose(1, 2)
        v = F.linear(normed, self.self_attn.v_proj.weight.to_local())
        v = v.unflatten(2, (-1, 64)).transpose(1, 2)
        q = rotary(q, cos, sin)
        k = rotary(k, cos, sin)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        merged = heads.transpose(1, 2).flatten(2, 3)
        o = F.linear(merged, self.self_attn.o_proj.weight.to_local())
        hidden = zero_pad(hidden, self.tp, 1) + o

        # tp reduce-scatter, 33.6 MB per micro-batch, 61.5 us; backward: all-gather
        hidden_2 = reduce_scatter(hidden, self.tp, 0)
        normed = F.rms_norm(
            hidden_2,
            (2048,),
            replicate(self.post_attention_layernorm.weight.to_local(), self.tp),
            eps=1e-5,
        )

        # tp all-gather, 33.6 MB per micro-batch, 61.5 us; backward: reduce-scatter
        normed = all_gather(normed, self.tp, 0)
        gate = F.linear(normed, self.mlp.gate_proj.weight.to_local())
        up = F.linear(normed, self.mlp.up_proj.weight.to_local())
        down = F.linear(F.silu(gate) * up, self.mlp.down_proj.weight.to_local())
        hidden = hidden + down

        # tp reduce-scatter, 33.6 MB per micro-batch, 61.5 us; backward: all-gather
        return reduce_scatter(hidden, self.tp, 1)


# Per stage, runs of equal blocks: module list, positions, class, recompute.
STAGES = [
    [
        ("model.layers", range(16), LlamaDecoderLayer, "none"),
    ],
]


class Stage(nn.Module):
    """The model, its parameters under the names they have there."""

    def __init__(self, index: int, new: New) -> None:
        super().__init__()
        self.index = index
        self.tp = new.axis("tp")
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict()
        for _, positions, block, _ in STAGES[index]:
            for i in positions:
                self.model.layers[str(i)] = block(new)
        self.model.embed_tokens = Weights(weight=new.split(128256, 2048, tp=0))
        self.model.norm = Weights(weight=new.whole(2048))

    def blocks(self) -> list[nn.Module]:
        """The blocks of this stage, in order."""
        return [*self.model.layers.values()]

    def forward(self, *, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.prologue(input_ids)
        cos, sin = shared_tables(input_ids.shape[1], hidden.dtype, input_ids.device)
        for block in self.blocks():
            hidden = block(hidden, cos, sin)
        return self.epilogue(hidden, labels)

    def prologue(self, input_ids: Tensor) -> Tensor:
        embed_tokens = vocab_embedding(
            input_ids,
            self.model.embed_tokens.weight.to_local(),
            self.tp,
        )

        # tp reduce-scatter, 33.6 MB per micro-batch, 61.5 us; backward: all-gather
        return reduce_scatter(embed_tokens, self.tp, 1)

    def epilogue(self, hidden: Tensor, labels: Tensor) -> Tensor:
        normed = F.rms_norm(
            hidden,
            (2048,),
            replicate(self.model.norm.weight.to_local(), self.tp),
            eps=1e-5,
        )

        # tp all-gather, 33.6 MB per micro-batch, 61.5 us; backward: reduce-scatter
        normed = all_gather(normed, self.tp, 1)
        logits = F.linear(normed, self.model.embed_tokens.weight.to_local())
        labels = F.pad(labels, (0, 1), value=-100)

        # tp all-reduce, 3 times 32.8 kB per micro-batch, 8.96 us each
        return vocab_cross_entropy(logits, labels[:, 1:], self.tp)


def shared_tables(
    seq: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """cos and sin: the same for all blocks and ranks."""
    inv_freq = torch.tensor(
        (
            1.0, 0.663601279258728, 0.44036662578582764, 0.2922278344631195,
            0.193922758102417, 0.12868738174438477, 0.08539710193872452,
            0.05666961893439293, 0.03760603070259094, 0.02495540864765644,
            0.016560440883040428, 0.010989529080688953, 0.00729266507551074,
            0.00483942124992609, 0.0032114461064338684, 0.0012905480107292533,
            0.000429556705057621, 9.708286233944818e-5, 1.9461638657958247e-5,
            1.291476746700937e-5, 8.570255886297673e-6, 5.687232260243036e-6,
            3.7740544485131977e-6, 2.504467147446121e-6, 1.6619674170215148e-6,
            1.1028836297555245e-6, 7.318749339901842e-7, 4.856731266045244e-7,
            3.2229328894572973e-7, 2.1387423032592778e-7, 1.4192720243499934e-7,
            9.418306490260875e-8,
        ),
        dtype=torch.float32,
        device=device,
    )  # fmt: skip
    positions = torch.arange(seq, device=device)
    angles = positions.unsqueeze(0).unsqueeze(2).float() * inv_freq
    angles = torch.cat((angles, angles), dim=2)
    sin = angles.sin().to(dtype).unsqueeze(1)
    return angles.cos().to(dtype).unsqueeze(1), sin


def build_stage(
    index: int,
    mesh: DeviceMesh | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    meta: bool = False,
) -> Stage:
    """Stage ``index`` with uninitialised parameters, without memory if ``meta``."""
    place = torch.device("meta") if meta else device
    return Stage(index, New(mesh, ("tp",), place, dtype))


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
