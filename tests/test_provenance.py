"""What made a picture is in its file, in standard places, and comes back from hostile files as data or one line."""

import io
import json
import os
import struct
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlx_kontext import __version__, provenance
from mlx_kontext.errors import ImageError, RequestError, ResourceError
from mlx_kontext.provenance import encode_image, read_record, save_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
FORMATS = {"a.png": "PNG", "a.jpg": "JPEG", "a.JPEG": "JPEG", "a.webp": "WEBP"}


def record(prompt: str = "make it snow", **request) -> dict:
    request = {"prompt": prompt, "image": "cat.jpg", "seed": 7, **request}
    return {"request": request, "width": 48, "height": 32, "model": {"name": "demo", "dtype": "float32"}}


PROMPTS = {
    "plain": "make it snow",
    "lines": "one\ntwo\r\n\tthree\0four\x1b[2J\x85\u2028five",
    "quotes": """say "hi" & 'bye' </rdf:RDF> ]]> {"request": 1} \\ \\u0041 %s""",
    "emoji": "gib der Katze einen Schal 🧣👩‍👩‍👧 你好 עברית",
    "lone surrogate": "half \ud83d an emoji",
    "50,000 letters": "snow " * 10_000,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_the_record_comes_back(tmp_path, name, prompt):
    path = tmp_path / name
    assert save_image(PICTURE, path, record(prompt), overwrite=False) == path
    assert read_record(path) == record(prompt)
    with Image.open(path) as picture:
        assert picture.format == FORMATS[name]
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_png_and_webp_hold_any_prompt(tmp_path, name):
    prompt = "🧣" * 50_000
    assert read_record(save_image(PICTURE, tmp_path / name, record(prompt), overwrite=False)) == record(prompt)


def test_a_record_that_fits_into_no_jpeg_is_refused_not_dropped(tmp_path):
    with pytest.raises(RequestError, match=r"does not fit into a JPEG file .* save it as \.png") as caught:
        save_image(PICTURE, tmp_path / "a.jpg", record("🧣" * 50_000), overwrite=False)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
    assert encode_image(PICTURE, "JPEG", record("🧣" * 4000))  # what the text encoders could ever read fits


@pytest.mark.parametrize(("format", "size"), [("JPEG", (65501, 1)), ("WEBP", (16384, 1))])
def test_a_picture_too_large_for_the_format(format, size):
    with pytest.raises(RequestError, match=r"save it as \.png"):
        encode_image(Image.new("RGB", size), format, record())


def test_pixels():
    assert Image.open(io.BytesIO(encode_image(PICTURE, "PNG", record()))).tobytes() == PICTURE.tobytes()
    smooth = Image.merge("RGB", [Image.linear_gradient("L").rotate(a) for a in (0, 90, 180)])
    for format in ("JPEG", "WEBP"):
        again = Image.open(io.BytesIO(encode_image(smooth, format, record())))
        assert np.abs(np.asarray(again.convert("RGB")).astype(int) - np.asarray(smooth)).mean() < 2
    jpeg = Image.open(io.BytesIO(encode_image(PICTURE, "JPEG", record())))
    assert {layer[1:3] for layer in jpeg.layer} == {(1, 1)}  # 4:4:4


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("source", ["image", "image_sha256", None])
def test_the_standard_places_say_that_a_model_made_it(format, source):
    values = record('evil" <x/> \n prompt é', **{"image": None})
    del values["request"]["image"]
    if source:
        values["request"][source] = "cat.jpg"
    picture = Image.open(io.BytesIO(encode_image(PICTURE, format, values)))
    exif = picture.getexif()
    kind = "img2img" if source else "txt2img"
    assert exif[0x0131] == f"AI generated;{kind};flux;mlx_kontext {__version__}"
    assert exif[0x010E] == 'evil" <x/> prompt ?'
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"ASCII\0\0\0" and json.loads(comment[8:]) == values

    xmp = picture.info["XML:com.adobe.xmp"].encode() if format == "PNG" else picture.info["xmp"]
    assert xmp.startswith(b"<?xpacket begin=") and xmp.endswith(b'<?xpacket end="w"?>') and b"evil" not in xmp
    namespaces = {"iptc": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/", "xmp": "http://ns.adobe.com/xap/1.0/"}
    root = ElementTree.fromstring(xmp)
    media = "compositeWithTrainedAlgorithmicMedia" if source else "trainedAlgorithmicMedia"
    assert root.findtext(".//iptc:DigitalSourceType", None, namespaces) == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/" + media
    )
    assert root.findtext(".//xmp:CreatorTool", None, namespaces) == f"mlx_kontext {__version__}"
    assert b"<rdf:RDF" in xmp and b"Iptc4xmpExt:DigitalSourceType" in xmp  # the prefixes that simple readers look for


def test_the_description_is_a_short_line_of_ascii():
    def describe(prompt: str) -> str:
        return Image.open(io.BytesIO(encode_image(PICTURE, "JPEG", record(prompt)))).getexif()[0x010E]

    assert describe(PROMPTS["lines"]) == "one two three?four?[2J five"
    assert describe("🧣 scarf") == "? scarf"
    assert describe("x" * 1000) == "x" * 1000
    assert describe("x" * 1001) == "x" * 997 + "..."


def test_png_carries_the_record_as_readable_text():
    data = encode_image(PICTURE, "PNG", record("你好"))
    assert json.dumps(record("你好"), ensure_ascii=False).encode() in data
    assert Image.open(io.BytesIO(data)).info["mlx_kontext"].lang == ""


@pytest.mark.parametrize("name", ["a", "a.gif", "a.png.txt", "a\n.bmp", ".png"])
def test_other_names_are_refused(tmp_path, name):
    with pytest.raises(RequestError, match=r"ends in none of \.png, \.jpg \(\.jpeg\) and \.webp") as caught:
        save_image(PICTURE, tmp_path / name, record(), overwrite=True)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_files_are_replaced_only_on_request_and_whole(tmp_path, monkeypatch):
    path = save_image(PICTURE, tmp_path / "a.png", record("one"), overwrite=False)
    with pytest.raises(RequestError, match="exists"):
        save_image(PICTURE, path, record("two"), overwrite=False)
    assert read_record(path) == record("one")
    save_image(PICTURE, path, record("two"), overwrite=True)
    assert read_record(path) == record("two")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_kontext.disk.sync", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        save_image(PICTURE, path, record("three"), overwrite=True)
    assert read_record(path) == record("two")


def test_what_the_caller_passed_is_left_alone():
    image = PICTURE.copy()
    image.info["comment"] = b"SECRET"
    values = record()
    for format in ("PNG", "JPEG", "WEBP"):
        encode_image(image, format, values)
    assert values == record() and image.info == {"comment": b"SECRET"} and not image.getexif()


# --- reading


def text_png(path, value: str, key: str = "mlx_kontext"):
    info = PngInfo()
    info.add_itxt(key, value)
    PICTURE.save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "7",
        "[]",
        "{}",
        '{"request": "x"}',
        '{"request": null}',
        "[" * 100_000,
        '{"request": ' * 100_000,
        "9" * 10_000,
        '{"request": {"prompt": "' + "x" * provenance._MAX_RECORD + '"}}',
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_record_is_one_line(tmp_path, text):
    with pytest.raises(ImageError, match=r"a\.png carries no mlx_kontext record") as caught:
        read_record(text_png(tmp_path / "a.png", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [b"", b"ASCII\0\0\0", b"UNICODE\0{}", b'ASCII\0\0\0\xff{"request": {}}', 7, "text"])
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
def test_another_programs_comment_is_no_record(tmp_path, value, format):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = value
    PICTURE.save(tmp_path / "a", format, exif=exif)
    with pytest.raises(ImageError, match="carries no mlx_kontext record"):
        read_record(tmp_path / "a")


def test_files_without_a_record(tmp_path):
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        PICTURE.save(tmp_path / "a", format)
        with pytest.raises(ImageError, match="carries no mlx_kontext record"):
            read_record(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"Dear diary")
    with pytest.raises(ImageError, match="is no PNG"):
        read_record(tmp_path / "a")
    with pytest.raises(ImageError, match="does not exist"):
        read_record(tmp_path / "b")


def test_a_png_whose_text_was_stripped_still_has_its_exif(tmp_path):
    data = encode_image(PICTURE, "PNG", record("你好"))
    start = data.index(b"mlx_kontext\0") - 8
    length = struct.unpack(">I", data[start : start + 4])[0]
    (tmp_path / "a.png").write_bytes(data[:start] + data[start + 12 + length :])
    assert read_record(tmp_path / "a.png") == record("你好")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_give_a_record_or_one_line(tmp_path, format):
    whole = encode_image(PICTURE, format, record())
    rng = np.random.default_rng(1)
    for i in range(80):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if i % 4 == 0 else whole)
        for position in rng.integers(0, min(len(damaged), 1200), rng.integers(1, 8)):
            damaged[position] = rng.integers(0, 256)
        (tmp_path / "a").write_bytes(damaged)
        try:
            assert isinstance(read_record(tmp_path / "a")["request"], dict)
        except ImageError as error:
            assert "\n" not in str(error)
