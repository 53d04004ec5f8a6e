"""The text tower of CLIP ViT-L/14: one pooled vector that says what the prompt is about.

Names are Hugging Face's, with the prefix `text_model.` of the published files.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..backend import mx, nn


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes as in `text_encoder/config.json`; the defaults are CLIP-L."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_hidden_layers: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5

    REQUIRED: ClassVar[dict[str, Any]] = {"hidden_act": "quick_gelu"}

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no CLIP has."""
        if self.num_hidden_layers > 256 or self.hidden_size % self.num_attention_heads or not self.layer_norm_eps > 0:
            raise ValueError(
                f"{self.num_hidden_layers} layers {self.hidden_size} wide of {self.num_attention_heads} heads, layer_norm_eps "
                f"{self.layer_norm_eps}; CLIP-L has 12 layers 768 wide of 12 heads"
            )
        if self.max_position_embeddings < 77:
            raise ValueError(f"max_position_embeddings is {self.max_position_embeddings}; CLIP reads 77 tokens")


class Embeddings(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.token_embedding(ids) + self.position_embedding(mx.arange(ids.shape[1]))


class Attention(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        B, L, _ = x.shape
        q, k, v = (
            f(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
        return self.out_proj(out.transpose(0, 2, 1, 3).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.gelu_fast_approx(self.fc1(x)))  # x * sigmoid(1.702 x), which CLIP calls quick_gelu


class Layer(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class TextModel(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embeddings(ids).astype(self.final_layer_norm.weight.dtype)  # packed tables have a dtype of their own
        return self.final_layer_norm(self.encoder(x))


class CLIPText(nn.Module):
    """Token ids [B, L], from start to end token, to the pooled vector [B, hidden_size] at the end token.

    No padding is needed: attention is causal, so nothing after the end token can reach it.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.text_model(ids)[:, -1]
