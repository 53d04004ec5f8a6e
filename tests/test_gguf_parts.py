"""GGUF files of FLUX and T5: recognised, named as published, and T5's tokenizer rebuilt to the last field."""

import base64
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from mlx.utils import tree_flatten
from real_vocabulary import FIXTURE, check_vectors, write_folders

from mlx_kontext.errors import CheckpointError
from mlx_kontext.models.t5 import T5Config, T5Encoder
from mlx_kontext.text import t5_tokenizer
from mlx_kontext.weights.ggml import load
from mlx_kontext.weights.gguf import GGUF, GGUFTensor, read_gguf
from mlx_kontext.weights.gguf_parts import part_of, t5_from_gguf, t5_tokenizer_json, transformer_from_gguf
from mlx_kontext.weights.load import fill


def write(path: Path, tensors: dict[str, Any], kind: str = "F32", architecture: str = "flux", **settings: Any) -> GGUF:
    """A file of the gguf package's; `settings` are calls of its writer's methods."""
    writer = gguf.GGUFWriter(path, architecture)
    for method, arguments in settings.items():
        getattr(writer, method)(*arguments)
    for name, values in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(values, Kind[kind]), raw_dtype=Kind[kind])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return read_gguf(path)


# Whose model it is, and its names


def file(architecture: Any, *names: str) -> GGUF:
    tensors = {name: GGUFTensor(name, "F32", (1,), 0, 4, Path("a.gguf")) for name in names}
    return GGUF(Path("a.gguf"), {} if architecture is None else {"general.architecture": architecture}, tensors)


def test_parts_are_known_by_architecture_or_by_names() -> None:
    flux, t5 = "double_blocks.0.img_attn.qkv.weight", "enc.blk.0.attn_q.weight"
    for architecture in ("flux", None, "pig", "cow"):
        assert (
            part_of(file(architecture, flux))
            == part_of(file(architecture, f"model.diffusion_model.{flux}"))
            == "transformer"
        )
    for architecture in ("t5", "t5encoder", None, "pig"):
        assert part_of(file(architecture, t5)) == "text_encoder_2"
    assert part_of(file("cow", "encoder.block.0.layer.0.SelfAttention.q.weight")) == "text_encoder_2"


@pytest.mark.parametrize(
    "architecture", ["sd1", "sdxl", "sd3", "llama", "wan", "qwen_image", "\x1b[2J", 7, ("flux",), ""]
)
def test_other_architectures_are_refused_by_name(architecture: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        part_of(file(architecture, "double_blocks.0.img_attn.qkv.weight"))
    told = str(caught.value)
    assert f"a.gguf holds a model of architecture {architecture!r}; expected flux (take a GGUF of FLUX.1" in told
    assert told.isprintable()


@pytest.mark.parametrize("architecture", [None, "pig", "cow"])
def test_files_without_a_name_or_known_tensors_are_refused(architecture: Any) -> None:
    with pytest.raises(CheckpointError, match="names no architecture we know, nor tensors of one; expected flux"):
        part_of(file(architecture, "blk.0.attn_q.weight", "transformer_blocks.0.attn.to_q.weight"))


def test_transformer_names() -> None:
    names = ["img_in.weight", "double_blocks.0.img_attn.norm.query_norm.scale"]
    assert transformer_from_gguf({name: name for name in names}) == {name: name for name in names}
    prefixed = {f"model.diffusion_model.{name}": name for name in names}
    assert transformer_from_gguf(prefixed) == {name: name for name in names}
    with pytest.raises(CheckpointError, match=r"img_in\.weight is stored twice, once as img_in\.weight"):
        transformer_from_gguf(prefixed | {"img_in.weight": "another"})


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_t5_file_fills_our_t5(tmp_path: Path, kind: str) -> None:
    """Names go there by the gguf package's own table, so that it and ours must agree on every one."""
    mx.random.seed(0)
    model = T5Encoder(T5Config(vocab_size=40, d_model=32, d_kv=32, d_ff=96, num_heads=2, num_layers=3))
    values = {name: np.array(mx.random.normal(x.shape)) for name, x in dict(tree_flatten(model.parameters())).items()}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 3)
    theirs = {str(table.get_name(name, try_suffixes=(".weight",))): value for name, value in values.items()}
    assert len(theirs) == len(values) > 20 and "enc.blk.2.ffn_gate.weight" in theirs
    flat = {name: value for name, value in theirs.items() if value.shape[-1] % 32}
    assert kind == "F32" or set(flat) == {"enc.blk.0.attn_rel_b.weight"}
    found = write(
        tmp_path / "a.gguf", {n: v for n, v in theirs.items() if kind == "F32" or n not in flat}, kind, "t5encoder"
    )
    assert part_of(found) == "text_encoder_2"
    named = t5_from_gguf(found.tensors)
    assert named.keys() == {name for name in values if kind == "F32" or "relative_attention_bias" not in name}
    tensors = {name: load(tensor, mx.float32) for name, tensor in named.items()}
    for name, tensor in tensors.items():
        np.testing.assert_allclose(np.array(tensor), values[name], atol=0 if kind == "F32" else 0.02)
    if kind == "F32":
        fill(model, tensors, mx.float32, "a.gguf")


def test_a_t5_decoder_is_left_out_and_what_is_unknown_stays() -> None:
    names = ["dec.blk.0.attn_q.weight", "dec.output_norm.weight", "output.weight", "enc.blk.x.attn_q.weight"]
    names += ["enc.blk.1.other.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "scaled_fp8"]
    assert list(t5_from_gguf(dict.fromkeys(names, 0))) == names[3:]
    with pytest.raises(CheckpointError, match=r"shared\.weight is stored twice, once as shared\.weight"):
        t5_from_gguf({"token_embd.weight": 0, "shared.weight": 1})


# T5's tokenizer


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, Any]:
    return dict(json.loads(gzip.decompress(FIXTURE.read_bytes())))


@pytest.fixture(scope="module")
def t5_file(vocabulary: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> GGUF:
    """The real vocabulary as llama.cpp's converter writes it, filled up to the 32128 rows of the embedding."""
    t5 = vocabulary["t5"]
    vocab = t5["model"]["vocab"] + [[f"[PAD{i}]", -10000.0] for i in range(32100, 32128)]
    charsmap = t5["normalizer"]["normalizers"][0]["precompiled_charsmap"]
    return write(
        tmp_path_factory.mktemp("t5") / "t5.gguf",
        {"token_embd.weight": np.zeros((1, 1), "f4")},
        architecture="t5encoder",
        add_tokenizer_model=("t5",),
        add_token_list=([token for token, _ in vocab],),
        add_token_scores=([score for _, score in vocab],),
        add_token_types=([3, 3, 2] + [1] * (32100 - 3) + [5] * 28,),
        add_precompiled_charsmap=(base64.b64decode(charsmap),),
    )


def test_the_published_tokenizer_is_rebuilt(vocabulary: dict[str, Any], t5_file: GGUF, tmp_path: Path) -> None:
    """Every field of it, and so every token."""
    made = t5_tokenizer_json(t5_file)
    assert made == vocabulary["t5"]
    write_folders(vocabulary | {"t5": made}, tmp_path)
    check_vectors(tmp_path)


def changed(file: GGUF, **lists: Any) -> GGUF:
    return dataclasses.replace(file, metadata=file.metadata | {f"tokenizer.ggml.{n}": v for n, v in lists.items()})


def test_tokens_that_are_no_pieces(vocabulary: dict[str, Any], t5_file: GGUF, tmp_path: Path) -> None:
    """Those that fill up match nothing, added ones match as a whole; and neither makes unknown letters dearer."""
    tokens, scores, kinds = (list(t5_file.metadata[f"tokenizer.ggml.{n}"]) for n in ("tokens", "scores", "token_type"))
    tokens[4], scores[4], kinds[4] = "oncatenat", -10000.0, 5
    tokens[32099], scores[32099], kinds[32099] = "<extra_id_0>", -1000.0, 4
    made = t5_tokenizer_json(changed(t5_file, tokens=tuple(tokens), scores=tuple(scores), token_type=tuple(kinds)))
    published = vocabulary["t5"]["model"]["vocab"]
    assert min(score for _, score in made["model"]["vocab"]) == min(score for _, score in published) > -20
    assert [token["id"] for token in made["added_tokens"]] == [0, 1, 2, 32099]
    write_folders(vocabulary | {"t5": made}, tmp_path)
    check_vectors(tmp_path)
    ids, _ = t5_tokenizer(tmp_path / "tokenizer_2")("a cat concatenated cat <extra_id_0>", 64)
    assert 4 not in ids and 32099 in ids


def test_signed_bytes_are_the_same_character_map(t5_file: GGUF) -> None:
    signed = tuple(
        byte - 256 if byte > 127 else byte for byte in t5_file.metadata["tokenizer.ggml.precompiled_charsmap"]
    )
    assert min(signed) < 0 and t5_tokenizer_json(changed(t5_file, precompiled_charsmap=signed)) == t5_tokenizer_json(
        t5_file
    )


def cut(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("model", lambda _: "llama", "its tokenizer is 'llama'; expected t5"),
        ("model", lambda _: None, "its tokenizer is None"),
        ("tokens", lambda _: None, "its tokenizer.ggml.tokens is None; expected a list of str"),
        ("tokens", lambda _: "abc", "tokens is 'abc'; expected a list"),
        ("tokens", lambda old: cut(old, 9, 1), "expected a list of str"),
        ("tokens", lambda old: old[:-1], "32127 tokens, 32128 scores and 32128 token types"),
        ("tokens", lambda old: cut(old, 9, ""), "tokens that are empty"),
        ("tokens", lambda old: cut(old, 9, "a" * 257), "very long"),
        ("tokens", lambda old: cut(old, 0, "<PAD>"), "no control tokens <pad> and </s>"),
        ("scores", lambda old: cut(old, 9, float("nan")), "no finite score"),
        ("scores", lambda old: cut(old, 9, float("inf")), "no finite score"),
        ("scores", lambda old: cut(old, 9, 1), "expected a list of float"),
        ("scores", lambda _: (), "0 scores"),
        ("token_type", lambda old: cut(old, 9, 6), "of types [1, 2, 3, 5, 6]"),
        ("token_type", lambda old: cut(old, 9, 2), "one of type 2"),
        ("token_type", lambda old: cut(old, 2, 1), "one of type 2"),
        ("token_type", lambda old: cut(old, 1, 1), "no control tokens"),
        ("precompiled_charsmap", lambda old: cut(old, 5, 77), "its character map (237,539 bytes) is not T5's"),
        ("precompiled_charsmap", lambda _: (), "its character map (0 bytes) is not T5's"),
        ("precompiled_charsmap", lambda _: None, "expected a list of int"),
    ],
)
def test_other_tokenizers_are_refused(t5_file: GGUF, name: str, change: Any, told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        t5_tokenizer_json(changed(t5_file, **{name: change(t5_file.metadata[f"tokenizer.ggml.{name}"])}))
    assert told in str(caught.value) and str(caught.value).endswith(
        "; take tokenizer_2/ of the published FLUX.1 Kontext [dev]"
    )
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
