"""The encoder of T5 v1.1: the words FLUX reads, one vector a token.

Names are Hugging Face's. What is unusual: no positions but a learned bias on relative distance, shared by all layers and
stored in the first; attention without the usual 1/sqrt(d); and no mask, FLUX was trained to read the padding too.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..backend import mx, nn


@dataclass(frozen=True)
class T5Config:
    """Sizes as in `text_encoder_2/config.json`; the defaults are T5 v1.1 XXL."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    REQUIRED: ClassVar[dict[str, Any]] = {"feed_forward_proj": "gated-gelu"}

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no T5 has."""
        if self.num_layers > 256 or self.num_heads * self.d_kv > 2**16 or not self.layer_norm_epsilon > 0:
            raise ValueError(
                f"{self.num_layers} layers of {self.num_heads} heads {self.d_kv} wide, layer_norm_epsilon "
                f"{self.layer_norm_epsilon}; T5 v1.1 XXL has 24 layers of 64 heads 64 wide"
            )
        if not 4 <= self.relative_attention_num_buckets <= 256:  # which bucket is a matter of powers of this order
            raise ValueError(f"relative_attention_num_buckets is {self.relative_attention_num_buckets}; T5 has 32")


class Attention(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv  # need not equal d_model
        self.heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        B, L, _ = x.shape
        q, k, v = (f(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=bias)
        return self.o(out.transpose(0, 2, 1, 3).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.wo(nn.gelu_approx(self.wi_0(x)) * self.wi_1(x))


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool):
        super().__init__()
        self.SelfAttention = Attention(config, has_bias)
        self.layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class MLPLayer(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = GatedMLP(config)
        self.layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool):
        super().__init__()
        self.layer = [AttentionLayer(config, has_bias), MLPLayer(config)]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        attention, mlp = self.layer
        return mlp(attention(x, bias))


class Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = [Block(config, has_bias=i == 0) for i in range(config.num_layers)]
        self.final_layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Token ids [B, L], padding included, to states [B, L, d_model]."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    def __call__(self, ids: mx.array) -> mx.array:
        # a quantized table gives rows in the dtype of its scales
        x = self.shared(ids).astype(self.encoder.final_layer_norm.weight.dtype)
        buckets = mx.array(relative_buckets(ids.shape[1], self.config))
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(buckets).transpose(2, 0, 1)[None]  # [1, heads, L, L]
        return self.encoder(x, bias.astype(x.dtype))


def relative_buckets(length: int, config: T5Config) -> np.ndarray:
    """Which learned bias each query (row) uses for each key (column): [L, L] int32.

    Half of the buckets are for keys after the query. In each half the near distances have one each, the rest share
    the remainder logarithmically; the thresholds are compared in whole numbers, so no logarithm can round across one.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    far, rest = config.relative_attention_max_distance, half - exact
    # bucket exact + k starts where (n / exact) ** rest >= (far / exact) ** k
    bucket_of = [
        n if n < exact else exact + sum(n**rest * exact**k >= far**k * exact**rest for k in range(1, rest))
        for n in range(length)
    ]
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    return (np.where(distance > 0, half, 0) + np.array(bucket_of)[np.abs(distance)]).astype(np.int32)
