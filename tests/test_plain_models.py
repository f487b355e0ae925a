"""Models in plain PyTorch, without transformers: written as people write them, traced, planned, proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar

WIDTH, HEADS, VOCABULARY, SEQ = 32, 4, 64, 16


class Attention(nn.Module):
    """As in nanoGPT: one projection for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (value.view(B, T, HEADS, C // HEADS).transpose(1, 2) for value in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MaskedAttention(Attention):
    """With the causal mask in a buffer, larger than the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(80, 80)).view(1, 1, 80, 80))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (value.view(B, T, HEADS, C // HEADS).transpose(1, 2) for value in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (C // HEADS) ** -0.5
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf")).softmax(-1)
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Tied embeddings, learned positions, loss in forward."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(SEQ, WIDTH)
        self.h = nn.ModuleList(Block(attention) for _ in range(3))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class MixerLayer(nn.Module):
    def __init__(self, patches: int) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(patches, 24), nn.GELU(), nn.Linear(24, patches))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.other(x))


class Mixer(nn.Module):
    """MLP-mixer: patches, mixed across and within, a class for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.layers = nn.ModuleList(MixerLayer(16) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.other = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.other(self.two(F.relu(self.norm(self.one(x))))))


class UNet(nn.Module):
    """Down by strides and pooling, up by transposed convolution and resizing, with skips; a value for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.top, self.middle = Residual(16), Residual(32)
        self.down = nn.Conv2d(16, 32, 2, stride=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Conv2d(48, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        top = self.top(self.stem(image))
        low = self.middle(self.down(top))
        pooled = F.interpolate(F.max_pool2d(top, 2), scale_factor=2, mode="nearest")
        return self.out(torch.cat([self.up(low), top, pooled], 1)).squeeze(1)


class DLRM(nn.Module):
    """Embeddings of categories and a network over numbers, all pairs of which interact; a click or none."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 16) for rows in (40, 24, 16))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.over = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, 1))
        self.register_buffer("pairs", torch.tensor([0 * 4 + 1, 2, 3, 4 + 2, 4 + 3, 8 + 3]))

    def forward(self, numbers: Tensor, user: Tensor, item: Tensor, place: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        looked_up = [table(ids) for table, ids in zip(self.tables, (user, item, place), strict=True)]
        vectors = torch.stack([dense, *looked_up], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return self.over(torch.cat([dense, products[:, self.pairs]], 1)).squeeze(1)


class Recurrent(nn.Module):
    """An LSTM under a GRU, next tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 24, num_layers=2, batch_first=True)
        self.gru = nn.GRU(24, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x, _ = self.lstm(self.embed(input_ids))
        x, last = self.gru(x)
        logits = self.head(x + last.transpose(0, 1).flatten(1).unsqueeze(1))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Two(nn.Module):
    """Two streams in, two results out."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.signal = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.classes, self.value = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor, signal: Tensor) -> dict[str, Tensor]:
        x = self.text(ids) + self.signal(signal)
        for layer in self.layers:
            x = layer(x)
        return {"classes": self.classes(x), "value": self.value(x).squeeze(-1)}


def classes(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch["label"])


def squares(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(outputs, batch["target"])


def clicks(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (F.softplus(outputs) - outputs * batch["clicked"]).mean()


def both(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(outputs["value"], batch["target"]) + 0.5 * outputs["classes"].square().sum(-1).mean()


ids, real, one = torch.zeros(SEQ, dtype=torch.int64), torch.randn, torch.tensor(1)
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor] | None, Any]] = {
    "nanogpt": (NanoGPT, {"idx": ids, "targets": ids}, None),
    "mask in a buffer": (lambda: NanoGPT(MaskedAttention), {"idx": ids, "targets": ids}, None),
    "mixer": (Mixer, {"image": real(3, 16, 16), "label": one}, classes),
    "unet": (UNet, {"image": real(3, 8, 8), "target": real(8, 8)}, squares),
    "dlrm": (DLRM, {"numbers": real(8), "user": one, "item": one, "place": one, "clicked": torch.tensor(1.0)}, clicks),
    "recurrent": (Recurrent, None, None),
    "two": (Two, {"ids": ids, "signal": real(SEQ, 6), "target": real(SEQ)}, both),
}
PLANS = {"dp": {"dp": 2, "tp": 1, "pp": 1}, "tp": {"tp": 2}, "search": {}}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_single_devices(name: str, plan: str) -> None:
    build, inputs, loss = MODELS[name]
    torch.manual_seed(0)
    model = build()
    job = autopar.Job(global_batch=8, seq_len=SEQ)
    found = autopar.search(model, job, autopar.Cluster.parse("1x2:h100"), inputs, loss, fix=PLANS[plan])
    assert autopar.verify(found, model, inputs, loss).worst[1] < 1e-11
