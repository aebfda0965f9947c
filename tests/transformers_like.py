"""BERT and DistilBERT as torch modules of our own, with random weights: no hub, no package beyond torch."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn


@dataclass(frozen=True)
class Size:
    """Of a network. ``types`` 0: without token types and pooler, as DistilBERT."""

    vocabulary: int = 1000
    width: int = 128
    layers: int = 2
    heads: int = 4
    feed: int = 512
    positions: int = 128
    types: int = 2


BASE = Size(30522, 768, 12, 12, 3072, 512, 2)
DISTILLED = Size(30522, 768, 6, 12, 3072, 512, 0)


class Attention(nn.Module):
    """Several heads; ``fused``: by torch's scaled_dot_product_attention, else written out."""

    def __init__(self, size: Size, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = size.heads, fused
        self.query, self.key, self.value = (nn.Linear(size.width, size.width) for _ in range(3))
        self.output = nn.Linear(size.width, size.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, width], mask [batch, 1, 1, tokens] to add."""
        n, s, c = x.shape
        q, k, v = (
            layer(x).view(n, s, self.heads, c // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(n, 1, s, s))
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(c // self.heads) + mask
            mixed = scores.softmax(-1) @ v
        return self.output(mixed.transpose(1, 2).reshape(n, s, c))


class Layer(nn.Module):
    """Attention and feed-forward, each added to its input and normalised."""

    def __init__(self, size: Size, fused: bool) -> None:
        super().__init__()
        self.attention = Attention(size, fused)
        self.norm, self.last_norm = nn.LayerNorm(size.width, 1e-12), nn.LayerNorm(size.width, 1e-12)
        self.up, self.down = nn.Linear(size.width, size.feed), nn.Linear(size.feed, size.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Shape of x."""
        x = self.norm(self.attention(x, mask) + x)
        return self.last_norm(self.down(nn.functional.gelu(self.up(x))) + x)


class Bert(nn.Module):
    """ids, mask and types [batch, tokens] (int64) → hidden states, and the pooled first token where there are types."""

    def __init__(self, size: Size, fused: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.positions, size.width)
        self.types = nn.Embedding(size.types, size.width) if size.types else None
        self.norm = nn.LayerNorm(size.width, 1e-12)
        self.layers = nn.ModuleList([Layer(size, fused) for _ in range(size.layers)])
        self.pooler = nn.Linear(size.width, size.width) if size.types else None

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> Any:
        """(hidden states, pooled) or hidden states."""
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])[None])
        if self.types is not None:
            x = x + self.types(token_type_ids)
        x = self.norm(x)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return x if self.pooler is None else (x, torch.tanh(self.pooler(x[:, 0])))


def bert_model(
    size: Size, batch: int, tokens: int, fused: bool = False, dynamic: bool = False, opset: int | None = None
) -> onnx.ModelProto:
    """As torch exports it; ``dynamic`` leaves batch and tokens free."""
    torch.manual_seed(0)
    model = Bert(size, fused).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms that are not trivial
            parameter.data += 0.1 * torch.randn_like(parameter)
    names = ["input_ids", "attention_mask", "token_type_ids"][: 3 if size.types else 2]
    inputs = tuple(torch.ones(batch, tokens, dtype=torch.int64) for _ in names)
    free = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("tokens", min=2, max=size.positions)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=names,
            dynamic_shapes=tuple(free for _ in names) if dynamic else None,
        )
    assert program is not None
    return program.model_proto


def bert_feeds(size: Size, batch: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random ids, every sentence of another length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(tokens // 2, tokens + 1, batch)
    feeds = {
        "input_ids": rng.integers(0, size.vocabulary, (batch, tokens)),
        "attention_mask": (np.arange(tokens) < lengths[:, None]).astype(np.int64),
    }
    if size.types:
        feeds["token_type_ids"] = rng.integers(0, size.types, (batch, tokens))
    return feeds
