"""The sizes of a model read from its tensors, for files that have no config.json beside them; and whether parts fit together.

What shapes cannot tell (rotary axes, head counts, groups) is FLUX.1's.
"""

from collections.abc import Callable
from typing import Any

from ..errors import CheckpointError
from ..models.clip import CLIPConfig
from ..models.flux import FluxConfig
from ..models.t5 import T5Config
from ..models.vae import VAEConfig
from .formats import PARTS, Tensors
from .layouts import blocks
from .load import Checkpoint

_GROUP = 64  # of quantized layers whose width nothing else tells; what MLX and mflux choose


def sizes_of(part: str, tensors: Tensors, where: str) -> Any:
    """The config of one part from its canonical tensors; only shapes are looked at.

    Raises CheckpointError if a tensor that tells a size is missing, or for rotary axes we cannot know.
    """
    try:
        config = _SIZES[part](tensors, where)
        if any(size < 1 for size in vars(config).values() if isinstance(size, int)):
            raise IndexError
        return config
    except KeyError as error:
        raise CheckpointError(f"{where}: 1 tensor missing ({error.args[0]}); is this the whole, right model?") from None
    except (IndexError, ZeroDivisionError):
        raise CheckpointError(f"{where}: its tensors have shapes that no such model has; download it again") from None
    except ValueError as error:  # a config's word for sizes that no such model has
        raise CheckpointError(f"{where}: {error}; download it again") from None


def check_parts(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the transformer takes what the three other parts give, as parts of one model do."""
    flux, vae, clip, t5 = (checkpoint.config(part) for part in PARTS)
    for part, gives, takes in (
        ("vae", 4 * vae.latent_channels, flux.in_channels),
        ("text_encoder", clip.hidden_size, flux.pooled_projection_dim),
        ("text_encoder_2", t5.d_model, flux.joint_attention_dim),
    ):
        if gives != takes:
            raise CheckpointError(
                f"{checkpoint.where(part)}: the {PARTS[part]} gives vectors of {gives} numbers and the transformer in "
                f"{checkpoint.where('transformer')} takes {takes}; are these parts of one model?"
            )


def _columns(tensors: Tensors, name: str, group: int = _GROUP) -> int:
    """Inputs of a layer, quantized or not."""
    scales = tensors.get(f"{name}.scales")
    return tensors[f"{name}.weight"].shape[1] if scales is None else scales.shape[1] * group


def _transformer(tensors: Tensors, where: str) -> FluxConfig:
    default, attention = FluxConfig(), "double_blocks.0.img_attn"
    head = tensors[f"{attention}.norm.query_norm.scale"].shape[0]
    hidden = tensors["img_in.bias"].shape[0]
    if head != default.attention_head_dim:
        raise CheckpointError(
            f"{where}: heads are {head} wide, FLUX.1's {default.attention_head_dim}, and no tensor tells the rotary axes; "
            "give a folder with transformer/config.json: config=DIR or --config DIR"
        )
    scales = tensors.get(f"{attention}.qkv.scales")
    group = _GROUP if scales is None else hidden // scales.shape[1]
    return FluxConfig(
        in_channels=tensors["final_layer.linear.bias"].shape[0],
        num_layers=blocks(tensors, "double_blocks"),
        num_single_layers=blocks(tensors, "single_blocks"),
        attention_head_dim=head,
        num_attention_heads=hidden // head,
        joint_attention_dim=_columns(tensors, "txt_in", group),
        pooled_projection_dim=_columns(tensors, "vector_in.in_layer", group),
    )


def _vae(tensors: Tensors, where: str) -> VAEConfig:
    levels = range(blocks(tensors, "encoder.down"))
    return VAEConfig(
        in_channels=tensors["encoder.conv_in.weight"].shape[3],
        out_channels=tensors["decoder.conv_out.weight"].shape[0],
        latent_channels=tensors["decoder.conv_in.weight"].shape[3],
        block_out_channels=tuple(tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in levels),
        layers_per_block=blocks(tensors, "encoder.down.0.block"),
    )


def _clip(tensors: Tensors, where: str) -> CLIPConfig:
    hidden = tensors["text_model.final_layer_norm.weight"].shape[0]
    return CLIPConfig(
        vocab_size=tensors["text_model.embeddings.token_embedding.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=tensors["text_model.encoder.layers.0.mlp.fc1.bias"].shape[0],
        num_attention_heads=max(1, hidden // 64),
        num_hidden_layers=blocks(tensors, "text_model.encoder.layers"),
        max_position_embeddings=tensors["text_model.embeddings.position_embedding.weight"].shape[0],
    )


def _t5(tensors: Tensors, where: str) -> T5Config:
    attention, mlp = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    heads = _columns(tensors, f"{attention}.relative_attention_bias")
    return T5Config(
        vocab_size=tensors["shared.weight"].shape[0],
        d_model=tensors["encoder.final_layer_norm.weight"].shape[0],
        d_kv=tensors[f"{attention}.q.weight"].shape[0] // heads,
        d_ff=tensors[f"{mlp}.wi_0.weight"].shape[0],
        num_heads=heads,
        num_layers=blocks(tensors, "encoder.block"),
        relative_attention_num_buckets=tensors[f"{attention}.relative_attention_bias.weight"].shape[0],
    )


_SIZES: dict[str, Callable[[Tensors, str], Any]] = {
    "transformer": _transformer,
    "vae": _vae,
    "text_encoder": _clip,
    "text_encoder_2": _t5,
}
