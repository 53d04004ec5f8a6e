"""Model folders: our own round trip, diffusers' layout, and every way in which a folder can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_kontext import CheckpointError, KontextPipeline, RequestError
from mlx_kontext.hub import demo_folder
from mlx_kontext.weights import save as saving
from mlx_kontext.weights import shards
from mlx_kontext.weights.formats import FORMATS
from mlx_kontext.weights.load import Checkpoint

SAMPLE = Path(__file__).parent.parent / "assets" / "sample.png"
SHARD = "transformer/model-00001-of-00002.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model to damage."""
    return Path(shutil.copytree(demo_folder(), tmp_path / "model"))


def edited(folder: Path) -> np.ndarray:
    return np.array(KontextPipeline.from_pretrained(folder)(image=SAMPLE, prompt="make the circle green", seed=1).image)


def test_save_and_load_are_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10**6)  # so that several shards are written
    pipe = KontextPipeline.from_pretrained("demo")
    pipe.save_pretrained(tmp_path / "copy")
    copy = Checkpoint.open(tmp_path / "copy")
    assert copy.format.name == "mlx_kontext folder" and copy.index["resolutions"] == [[96, 96], [96, 64], [64, 96]]
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = copy.tensors(part), pipe.checkpoint.tensors(part)
        assert ours.keys() == theirs.keys()
        assert all(ours[n].dtype == theirs[n].dtype and mx.array_equal(ours[n], theirs[n]) for n in ours)
    assert np.array_equal(edited(tmp_path / "copy"), edited(demo_folder()))

    files = copy.files("transformer")
    assert len(files) > 3 and all(path.stat().st_size < 1.3e6 for path in files)
    for path in files:
        assert len({shards.is_modulation(name) for name in mx.load(str(path))}) == 1  # modulation lies apart
    with pytest.raises(RequestError, match="not empty"):
        pipe.save_pretrained(tmp_path / "copy")


def test_an_interrupted_save_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        KontextPipeline.from_pretrained("demo").save_pretrained(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        Checkpoint.open(tmp_path / "copy")


def rewrite(path: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    tensors = mx.load(str(path))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(path), tensors)


def rejson(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def index_without(folder: Path, name: str) -> None:
    path = folder / "transformer" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop(name, None)
    path.write_text(json.dumps(index))


def one_tensor_less(folder: Path) -> None:
    rewrite(folder / SHARD, lambda t: t.pop("img_in.weight"))
    index_without(folder, "img_in.weight")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (lambda f: (f / SHARD).unlink(), "model-00001-of-00002"),
    "tensor missing": (one_tensor_less, r"1 missing \(img_in\.weight\)"),
    "tensor misshaped": (
        lambda f: rewrite(f / SHARD, lambda t: t.update({"img_in.bias": mx.zeros((127,))})),
        r"1 misshaped \(img_in\.bias \(127,\) instead of \(128,\)\)",
    ),
    "VAE end missing": (
        lambda f: rewrite(f / "vae/model.safetensors", lambda t: t.pop("encoder.conv_in.weight")),
        "encoder.conv_in",
    ),
    "tensor unexpected": (
        lambda f: rewrite(f / "vae/model.safetensors", lambda t: t.update({"extra": mx.zeros((1,))})),
        r"1 unexpected \(extra\)",
    ),
    "wrong dtype": (
        lambda f: rewrite(f / SHARD, lambda t: t.update({"img_in.weight": mx.zeros((128, 64), mx.uint8)})),
        r"img_in\.weight is U8; this version reads F32, F16, BF16",
    ),
    "shard truncated": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-100]), "model-00001-of-00002"),
    "shard empty": (lambda f: (f / SHARD).write_bytes(b""), "empty"),
    "no weights": (lambda f: shutil.rmtree(f / "vae") or (f / "vae").mkdir(), "vae"),
    "config missing": (lambda f: (f / "vae/config.json").unlink(), r"vae/config\.json is missing"),
    "config not JSON": (lambda f: (f / "vae/config.json").write_text("{"), "not readable JSON"),
    "config of another kind": (lambda f: (f / "vae/config.json").write_text("[1]"), "expected a JSON object"),
    "config nonsense": (lambda f: rejson(f / "transformer/config.json", num_layers="many"), "num_layers is 'many'"),
    "config too deep": (lambda f: rejson(f / "transformer/config.json", num_layers=10**9), "num_layers"),
    "schnell": (
        lambda f: rejson(f / "transformer/config.json", guidance_embeds=False),
        "guidance_embeds is False.*another model",
    ),
    "other VAE": (lambda f: rejson(f / "vae/config.json", use_quant_conv=True), "use_quant_conv"),
    "other T5": (lambda f: rejson(f / "text_encoder_2/config.json", feed_forward_proj="relu"), "feed_forward_proj"),
    "other scheduler": (
        lambda f: rejson(f / "scheduler/scheduler_config.json", use_dynamic_shifting=False),
        "use_dynamic_shifting",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"no model_index\.json"),
    "other pipeline": (lambda f: rejson(f / "model_index.json", _class_name="FluxPipeline"), "holds a FluxPipeline"),
    "bad sizes": (lambda f: rejson(f / "model_index.json", resolutions=[[63, 64]]), "resolutions"),
    "bad defaults": (lambda f: rejson(f / "model_index.json", defaults={"steps": 3}), "defaults"),
    "zero default": (
        lambda f: rejson(f / "model_index.json", defaults={"num_inference_steps": 0}),
        "num_inference_steps",
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "tokenizers swapped": (
        lambda f: (
            (f / "tokenizer").rename(f / "t")
            and (f / "tokenizer_2").rename(f / "tokenizer")
            and (f / "t").rename(f / "tokenizer_2")
        ),
        "swapped",
    ),
    "traversal": (
        lambda f: rejson(f / "transformer/model.safetensors.index.json", weight_map={"x": "../../../etc/passwd"}),
        "transformer/model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_in_one_line(model: Path, name: str) -> None:
    damage, told = DAMAGE[name]
    damage(model)
    with pytest.raises(CheckpointError, match=told) as caught:
        edited(model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("shape", [(6, 4), (8, 5)])
def test_projections_that_do_not_join_are_told(tmp_path: Path, shape: tuple[int, int]) -> None:
    """diffusers' split q, k, v are joined before the strict check can see their shapes."""
    tensors = {f"transformer_blocks.0.attn.to_{x}.weight": mx.zeros((8, 4)) for x in "kv"}
    tensors["transformer_blocks.0.attn.to_q.weight"] = mx.zeros(shape)
    (tmp_path / "transformer").mkdir()
    mx.save_safetensors(str(tmp_path / "transformer/model.safetensors"), tensors)
    diffusers = next(form for form in FORMATS if form.name == "diffusers folder")
    checkpoint = Checkpoint(tmp_path, diffusers, {})
    if shape[1] == 4:  # joins, and is left to the strict check
        assert checkpoint.tensors("transformer")["double_blocks.0.img_attn.qkv.weight"].shape == (22, 4)
        return
    with pytest.raises(CheckpointError, match="do not fit together") as caught:
        checkpoint.tensors("transformer")
    assert "\n" not in str(caught.value)


def test_places_that_cannot_be_saved_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "model", tmp_path / ("n" * 300)):
        with pytest.raises(RequestError):
            KontextPipeline.from_pretrained("demo").save_pretrained(place)


@pytest.mark.parametrize("spelling", ["with prefix", "embed_tokens only", "both embeddings", "decoder along"])
def test_spellings_of_text_encoders(spelling: str) -> None:
    from mlx_kontext.weights.formats import clip_canonical, t5_canonical

    x = mx.zeros((1,))
    if spelling == "with prefix":
        names = ["final_layer_norm.weight", "embeddings.position_ids", "embeddings.token_embedding.weight"]
        expected = {"text_model.final_layer_norm.weight", "text_model.embeddings.token_embedding.weight"}
        assert clip_canonical(dict.fromkeys(names, x)).keys() == expected
        prefixed = dict.fromkeys([f"text_model.{n}" for n in names] + ["text_projection.weight", "logit_scale"], x)
        assert clip_canonical(prefixed).keys() == expected
    else:
        names = {
            "embed_tokens only": ["encoder.embed_tokens.weight"],
            "both embeddings": ["shared.weight", "encoder.embed_tokens.weight"],
        }
        given = names.get(spelling, ["shared.weight", "decoder.block.0.x", "lm_head.weight"])
        assert t5_canonical(dict.fromkeys(given, x)).keys() == {"shared.weight"}
