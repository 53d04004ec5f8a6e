"""Every kind of picture file ends as the right RGB pixels, or as one line that says why not."""

import io
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mlx_kontext import photo
from mlx_kontext.errors import ImageError
from mlx_kontext.photo import read_photo

NOISE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
GREY = NOISE[..., 0]
WHITE_NOTICE = "transparency flattened on white"
SIXTEEN_NOTICE = "16-bit reduced to 8"


def save(image: Image.Image, path: Path, format: str = "PNG", **options) -> Path:
    image.save(path, format, **options)
    return path


def pixels(source) -> np.ndarray:
    image = read_photo(source).image
    assert image.mode == "RGB" and image.info == {} and not image.getexif()
    return np.asarray(image)


def refusal(source) -> str:
    with pytest.raises(ImageError) as caught:
        read_photo(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return rgb * a + 255 * (1 - a)


# --- formats


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_are_read_exactly_whatever_the_name(tmp_path, format, options):
    path = save(PICTURE, tmp_path / "name.jpg", format, **options)
    assert np.array_equal(pixels(path), NOISE)
    assert np.array_equal(pixels(str(path)), NOISE)
    assert read_photo(path).notices == ()


@pytest.mark.parametrize("format", ["JPEG", "AVIF", "GIF"])
def test_lossy_formats(tmp_path, format):
    smooth = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    path = save(smooth, tmp_path / "a", format)
    assert np.abs(pixels(path).astype(int) - np.asarray(smooth)).max() <= 6
    assert read_photo(path).notices == ()


def test_a_plugin_we_did_not_ask_for_is_not_reached(tmp_path):
    for format in ("EPS", "PPM", "TGA", "ICO"):
        assert "is no PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF" in refusal(save(PICTURE, tmp_path / "a.png", format))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame(tmp_path, format):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    path = save(frames[0], tmp_path / "a", format, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(path).astype(int) - [255, 0, 0]).max() <= 2
    assert read_photo(path).notices == ("only the first frame used",)


def test_the_second_picture_of_a_phone_jpeg_is_no_animation(tmp_path):
    path = save(PICTURE, tmp_path / "a.jpg", "MPO", save_all=True, append_images=[PICTURE])
    assert read_photo(path).notices == ()


# --- orientation

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_all_orientations(tmp_path, format, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(PICTURE, tmp_path / "a", format, exif=exif, **options)
    expected = UPRIGHT[orientation](NOISE)
    assert np.array_equal(pixels(path), expected)
    assert np.array_equal(pixels(Image.open(path)), expected)
    assert read_photo(path).notices == (("turned as its EXIF says",) if orientation > 1 else ())


@pytest.mark.parametrize("orientation", [6, 8])
@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_orientation_of_lossy_formats(tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    found = pixels(save(ramp, tmp_path / "a", format, exif=exif))
    assert np.abs(found.astype(int) - UPRIGHT[orientation](np.asarray(ramp))).max() <= 6


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_a_bad_orientation_is_ignored(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(save(PICTURE, tmp_path / "a.png", exif=exif)), NOISE)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\xff\xff", b"\0" * 40, b"Exif\0\0II*\0\x08\0\0\0\xff"]
)
def test_broken_exif_is_ignored(tmp_path, exif):
    assert np.array_equal(pixels(save(PICTURE, tmp_path / "a.png", exif=exif)), NOISE)


# --- modes


def test_grey_palette_and_one_bit(tmp_path):
    grey = Image.fromarray(GREY)
    assert np.array_equal(pixels(save(grey, tmp_path / "l.png")), grey_to_rgb(GREY))
    bits = GREY > 127
    assert np.array_equal(pixels(save(Image.fromarray(bits), tmp_path / "1.png")), grey_to_rgb(bits * np.uint8(255)))
    palette = Image.fromarray(GREY // 8)
    palette.putpalette(NOISE.reshape(-1)[:96].tobytes())
    expected = NOISE.reshape(-1, 3)[:32][GREY // 8]
    for format in ("PNG", "GIF", "BMP", "TIFF"):
        assert np.array_equal(pixels(save(palette, tmp_path / "p", format)), expected), format


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, format):
    deep = np.linspace(0, 65535, 480).round().astype(np.uint16).reshape(20, 24)
    path = save(Image.fromarray(deep), tmp_path / "a", format)
    assert np.array_equal(pixels(path), grey_to_rgb(np.rint(deep / 257).astype(np.uint8)))
    assert read_photo(path).notices == (SIXTEEN_NOTICE,)
    wide = Image.fromarray(deep.astype(np.int32))
    assert wide.mode == "I"
    assert np.array_equal(pixels(wide), pixels(path))
    assert read_photo(wide).notices == (SIXTEEN_NOTICE,)


def png(ihdr: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    parts = [(b"IHDR", ihdr), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_16_bit_colour_and_16_bit_transparent_grey(tmp_path):
    deep = np.random.default_rng(1).integers(0, 65536, (20, 24, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    (tmp_path / "rgb.png").write_bytes(png(struct.pack(">IIBBBBB", 24, 20, 16, 2, 0, 0, 0), rows))
    assert np.abs(pixels(tmp_path / "rgb.png").astype(int) - deep / 257).max() < 1
    assert read_photo(tmp_path / "rgb.png").notices == (SIXTEEN_NOTICE,)

    grey = deep[..., 0].copy()
    grey[3, 4] = 777
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    header = struct.pack(">IIBBBBB", 24, 20, 16, 0, 0, 0, 0)
    (tmp_path / "grey.png").write_bytes(png(header, rows, (b"tRNS", struct.pack(">H", 777))))
    expected = np.rint(grey / 257)
    expected[grey == 777] = 255
    assert np.array_equal(pixels(tmp_path / "grey.png")[..., 0], expected)
    assert read_photo(tmp_path / "grey.png").notices == (SIXTEEN_NOTICE, WHITE_NOTICE)


def test_a_5_6_5_bitmap_is_not_called_16_bit(tmp_path):
    header = struct.pack("<2sIHHI", b"BM", 66 + 32 * 32 * 2, 0, 0, 66)
    header += struct.pack("<IiiHHIIiiII3I", 40, 32, 32, 1, 16, 3, 32 * 32 * 2, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
    (tmp_path / "a.bmp").write_bytes(header + struct.pack("<H", 0xF800) * 32 * 32)
    assert (pixels(tmp_path / "a.bmp") == [255, 0, 0]).all()
    assert read_photo(tmp_path / "a.bmp").notices == ()


def test_float_pictures(tmp_path):
    unit = np.linspace(0, 1, 480, dtype=np.float32).reshape(20, 24)
    path = save(Image.fromarray(unit), tmp_path / "unit.tif", "TIFF")
    assert np.array_equal(pixels(path)[..., 0], np.rint(unit * 255))
    assert read_photo(path).notices == ("float pixels, 0 taken as black and 1 as white",)

    wild = (unit * 8 - 2).astype(np.float32)
    wild[0, :3] = np.nan, np.inf, -np.inf
    found = pixels(save(Image.fromarray(wild), tmp_path / "wild.tif", "TIFF"))[..., 0]
    low = wild[0, 3]
    assert found[0, :4].tolist() == [0, 255, 0, 0]
    assert np.array_equal(found[1:], np.rint((wild[1:].astype(float) - low) * 255 / (6 - float(low))))
    assert read_photo(tmp_path / "wild.tif").notices == (f"pixel values stretched: {low:g} is black, 6 white",)
    extremes = np.array([[-3e38, 3e38] * 8] * 16, np.float32)
    assert pixels(Image.fromarray(extremes))[0, :2, 0].tolist() == [0, 255]
    for constant in (np.nan, -np.inf, -7.0, 1e-45):
        assert (pixels(Image.fromarray(np.full((16, 16), constant, np.float32))) == 0).all()


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX", "LAB"])
def test_other_modes_of_pil(mode):
    assert (
        np.abs(pixels(PICTURE.convert(mode)).astype(int) - np.asarray(PICTURE.convert(mode).convert("RGB"))).max() == 0
    )
    grey = Image.new("RGB", (16, 16), (128, 128, 128)).convert(mode)
    assert np.abs(pixels(grey).astype(int) - 128).max() <= 2


def test_lab_tiff(tmp_path):
    colours = np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128], [200, 60, 40]], np.uint8)
    picture = Image.fromarray(colours[np.arange(256).reshape(16, 16) % 4])
    path = save(picture.convert("LAB"), tmp_path / "a.tif", "TIFF")
    assert np.abs(pixels(path).astype(int) - np.asarray(picture)).max() <= 3  # 8-bit Lab is that coarse


# --- transparency


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_flattened_on_white(tmp_path, format):
    alpha = np.random.default_rng(2).integers(0, 256, (20, 24), dtype=np.uint8)
    alpha[0] = 0
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    path = save(Image.fromarray(np.dstack([NOISE, alpha])), tmp_path / "a", format, **options)
    assert np.abs(pixels(path) - over_white(NOISE, alpha)).max() <= 0.51
    assert (pixels(path)[0] == 255).all()  # the hidden colour stays hidden
    assert read_photo(path).notices == (WHITE_NOTICE,)


def test_other_kinds_of_transparency(tmp_path):
    alpha = np.random.default_rng(2).integers(0, 256, (20, 24), dtype=np.uint8)
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    expected = over_white(grey_to_rgb(GREY), alpha)
    assert np.abs(pixels(save(grey_alpha, tmp_path / "la.png")) - expected).max() <= 0.51
    assert np.abs(pixels(grey_alpha.convert("RGBA").convert("PA")) - expected).max() <= 0.51
    assert (
        np.abs(pixels(Image.fromarray(np.dstack([NOISE, alpha])).convert("RGBa")) - over_white(NOISE, alpha)).max() < 9
    )

    palette = Image.fromarray(GREY // 8)
    palette.putpalette(NOISE.reshape(-1)[:96].tobytes())
    colours, index = NOISE.reshape(-1, 3)[:32], GREY // 8
    one = np.where(index == 5, 0, 255)
    for format in ("PNG", "GIF"):
        found = pixels(save(palette, tmp_path / "p", format, transparency=5))
        assert np.array_equal(found, over_white(colours[index], one)), format
    many = np.arange(32, dtype=np.uint8) * 8
    found = pixels(save(palette, tmp_path / "p.png", transparency=many.tobytes()))
    assert np.abs(found - over_white(colours[index], many[index])).max() <= 0.51

    keyed = pixels(save(PICTURE, tmp_path / "key.png", transparency=tuple(NOISE[3, 4].tolist())))
    expected = NOISE.copy()
    expected[(NOISE[3, 4] == NOISE).all(axis=2)] = 255
    assert np.array_equal(keyed, expected)
    assert np.array_equal(
        pixels(save(Image.fromarray(GREY), tmp_path / "k.png", transparency=int(GREY[3, 4])))[3, 4], [255] * 3
    )


def test_opaque_alpha_is_not_worth_a_notice(tmp_path):
    path = save(PICTURE.convert("RGBA"), tmp_path / "a.png")
    assert read_photo(path).notices == ()
    assert np.array_equal(pixels(path), NOISE)


# --- colour


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """A small ICC profile, version 2."""
    tags = {b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": xyz(0.9642, 1, 0.8249), **tags}
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02400000, kind, space, pcs)
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def description(text: str) -> bytes:
    return b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text.encode() + bytes(1 + 4 + 4 + 2 + 1 + 67)


GAMMA = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256))
P3 = np.array([[0.51512, 0.2412, -0.00105], [0.29198, 0.69225, 0.04189], [0.1571, 0.06657, 0.78407]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]])


def wide_profile(name: str = "Display P3") -> bytes:
    """The primaries of Display P3 with a plain gamma of 2.2."""
    columns = {tag: xyz(*row) for tag, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3, strict=True)}
    return profile(b"RGB ", {b"desc": description(name), **columns, b"rTRC": GAMMA, b"gTRC": GAMMA, b"bTRC": GAMMA})


def srgb_encoded(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_wide_profile_is_converted_to_srgb(tmp_path):
    path = save(PICTURE, tmp_path / "a.png", icc_profile=wide_profile())
    expected = srgb_encoded((NOISE / 255) ** (round(2.2 * 256) / 256) @ P3 @ np.linalg.inv(SRGB))
    assert np.abs(pixels(path) - expected).max() <= 1.5
    assert np.abs(expected - NOISE).max() > 50
    assert read_photo(path).notices == ("colour profile 'Display P3' converted to sRGB",)
    opened = Image.open(path)
    assert np.array_equal(pixels(opened), pixels(path))  # a PIL image brings its profile along

    see_through = Image.fromarray(np.dstack([NOISE, np.full_like(GREY, 128)]))
    path = save(see_through, tmp_path / "b.png", icc_profile=wide_profile())
    assert np.abs(pixels(path) - over_white(expected, np.full_like(GREY, 128))).max() <= 1.5


def test_a_grey_profile(tmp_path):
    icc = profile(b"GRAY", {b"desc": description("Grey"), b"kTRC": GAMMA})
    expected = srgb_encoded((GREY / 255) ** (round(2.2 * 256) / 256))
    for image in (Image.fromarray(GREY), Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (24, 20), 255)])):
        path = save(image, tmp_path / "a.png", icc_profile=icc)
        assert np.abs(pixels(path) - grey_to_rgb(expected)).max() <= 1.5
        assert read_photo(path).notices == ("colour profile 'Grey' converted to sRGB",)


def test_an_srgb_profile_changes_nothing(tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image in (PICTURE, Image.fromarray(GREY)):
        path = save(image, tmp_path / "a.png", icc_profile=icc)
        assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))
        assert read_photo(path).notices == ()


@pytest.mark.parametrize(
    "icc",
    [b"junk" * 50, wide_profile()[:200], profile(b"CMYK", {}), profile(b"RGB ", {b"desc": description("no curves")})],
)
def test_a_broken_or_foreign_profile_is_ignored_with_a_notice(tmp_path, icc):
    path = save(PICTURE, tmp_path / "a.jpg", "TIFF", icc_profile=icc)
    assert np.array_equal(pixels(path), NOISE)
    assert read_photo(path).notices == ("unusable colour profile ignored",)


def test_the_name_of_a_profile_cannot_write_to_the_terminal(tmp_path):
    [notice] = read_photo(
        save(PICTURE, tmp_path / "a.png", icc_profile=wide_profile("x\x1b]52;c;eA==\x07\ny" + "z" * 200))
    ).notices
    assert notice.isprintable() and len(notice) < 120


CMYK = np.random.default_rng(3).integers(0, 256, (20, 24, 4), dtype=np.uint8)


def test_cmyk_without_a_profile(tmp_path):
    ink = CMYK.astype(int)
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    path = save(Image.fromarray(CMYK, "CMYK"), tmp_path / "a.tif", "TIFF")
    assert np.abs(pixels(path) - expected).max() <= 1
    assert read_photo(path).notices == ("converted from CMYK",)


def test_cmyk_with_a_profile_and_as_jpeg(tmp_path):
    """A profile whose paper is white, whose cyan is a middle grey and whose every other mixture is black."""
    cube = np.zeros((16, 3), np.uint8) + np.array([0, 128, 128], np.uint8)
    cube[0], cube[8] = [255, 128, 128], [128, 128, 128]  # Lab, 8 bits; cyan is the slowest index
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    icc = profile(
        b"CMYK",
        {b"desc": description("Press"), b"A2B0": table + ramp * 4 + cube.tobytes() + ramp * 3},
        b"prtr",
        b"Lab ",
    )
    flat = np.zeros((16, 48, 4), np.uint8)
    flat[:, 16:32, 0], flat[:, 32:, 3] = 255, 255
    for format, options in (("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": "4:4:4"})):
        path = save(Image.fromarray(flat, "CMYK"), tmp_path / "a", format, icc_profile=icc, **options)
        found = pixels(path)[8, [8, 24, 40]].astype(int)
        assert np.abs(found - [[255] * 3, [120] * 3, [0] * 3]).max() <= 2, format
        assert read_photo(path).notices == ("converted from CMYK", "colour profile 'Press' converted to sRGB")


# --- PIL images and arrays


def test_arrays():
    assert np.array_equal(pixels(NOISE), NOISE)
    assert np.array_equal(pixels(NOISE[::-1, ::-1]), NOISE[::-1, ::-1])
    assert np.array_equal(pixels(GREY), grey_to_rgb(GREY))
    alpha = np.full((20, 24, 1), 51, np.uint8)
    assert np.abs(pixels(np.concatenate([NOISE, alpha], axis=2)) - over_white(NOISE, alpha[..., 0])).max() <= 0.51


@pytest.mark.parametrize(
    "array",
    [NOISE.astype(np.float32), NOISE.astype(np.uint16), NOISE[None], NOISE[..., :2], NOISE.reshape(-1), GREY > 1],
)
def test_other_arrays_are_refused(array):
    assert "give uint8 [H, W], [H, W, 3] or [H, W, 4]" in refusal(array)


@pytest.mark.parametrize("source", [None, 7, b"a.png", ["a.png"]])
def test_other_things_are_refused(source):
    assert "give a path, a PIL image or a uint8 array" in refusal(source)


def test_what_the_caller_passed_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.dstack([NOISE, GREY])).save(file, "PNG", exif=exif, icc_profile=wide_profile())
    mine = Image.open(file)
    before = (mine.mode, mine.size, mine.tobytes(), dict(mine.info), dict(mine.getexif()))
    result = read_photo(mine).image
    assert (mine.mode, mine.size, mine.tobytes(), dict(mine.info), dict(mine.getexif())) == before
    plain = PICTURE.copy()
    result = read_photo(plain).image
    result.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(plain), NOISE)
    array = NOISE.copy()
    read_photo(array).image.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(array, NOISE)


def test_nothing_private_comes_through(tmp_path):
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = "SECRET", "SECRET"
    exif.get_ifd(0x8825)[1] = "N"
    path = save(PICTURE, tmp_path / "a.jpg", "JPEG", exif=exif, comment=b"SECRET", xmp=b"<x>SECRET</x>", dpi=(72, 72))
    assert path.read_bytes().count(b"SECRET") == 4
    out = io.BytesIO()
    read_photo(path).image.save(out, "JPEG")
    assert b"SECRET" not in out.getvalue()


# --- refusals


def test_places_that_hold_no_picture(tmp_path):
    assert refusal(tmp_path / "no.png").endswith("no.png does not exist; check the path")
    assert "is a folder; give one picture file" in refusal(tmp_path)
    assert "is no ordinary file" in refusal("/dev/zero")
    assert "cannot be opened" in refusal("a\0b.png")
    assert "cannot be opened" in refusal("n" * 5000)
    assert refusal(tmp_path / "two\nlines\x1b[2J.png").endswith("two·lines·[2J.png does not exist; check the path")
    (tmp_path / "empty.png").write_bytes(b"")
    assert "has 0 bytes" in refusal(tmp_path / "empty.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(photo.MAX_BYTES + 1)
    assert "a picture file has 1 to" in refusal(tmp_path / "huge.png")


@pytest.mark.parametrize(
    "content", [b"Dear diary", b"%PDF-1.7\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0", b"BM"]
)
def test_other_files_are_not_pictures(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert "a.png is no PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF picture" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((1, 1), "1x1 pixels; at least 16 a side"),
        ((15, 200), "at least 16 a side"),
        ((20000, 10), "20000x10 pixels; at least 16 a side"),
        ((20000, 100), "20 times as long as wide"),
        ((30001, 2000), "at most 64 megapixels, 30000 a side"),
        ((9400, 9400), "9400x9400 pixels; at most 64 megapixels"),
        ((50000, 50000), "more than 64 megapixels"),
    ],
)
def test_sizes_are_refused_from_the_header(tmp_path, size, words):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, b"\0" * 100))
    start = time.perf_counter()
    assert words in refusal(tmp_path / "a.png")
    assert time.perf_counter() - start < 0.5  # no pixel was decoded


def test_the_same_limits_for_images_and_arrays():
    assert "the image is 10x40 pixels; at least 16 a side" in refusal(Image.new("RGB", (10, 40)))
    assert "the array is 10x40 pixels; at least 16 a side" in refusal(np.zeros((40, 10, 3), np.uint8))
    assert "the array is 0x0 pixels" in refusal(np.zeros((0, 0), np.uint8))
    assert "at most 64 megapixels" in refusal(np.broadcast_to(np.uint8(0), (9000, 9000, 3)))


def test_the_smallest_and_longest_pictures_are_read():
    assert read_photo(Image.new("RGB", (16, 16))).image.size == (16, 16)
    assert read_photo(Image.new("RGB", (320, 16))).image.size == (320, 16)


def test_a_jpeg_over_the_limit_is_read_at_half_size(tmp_path, monkeypatch):
    monkeypatch.setattr(photo, "MAX_PIXELS", 60 * 40 - 1)
    monkeypatch.setattr(photo, "MAX_JPEG_PIXELS", 60 * 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.new("RGB", (60, 40), "red"), tmp_path / "a.jpg", "JPEG", exif=exif)
    found = read_photo(path)
    assert found.image.size == (20, 30)
    assert found.notices == ("large JPEG read at half size, 30x20", "turned as its EXIF says")
    assert "at most" in refusal(save(Image.new("RGB", (60, 40), "red"), tmp_path / "a.png"))


def test_a_camera_raw_file_is_not_taken_for_its_thumbnail(tmp_path):
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    tags[254] = 1  # NewSubfileType: a reduced version of another picture in this file, as in DNG and NEF
    assert "a.dng opens with a thumbnail" in refusal(save(PICTURE, tmp_path / "a.dng", "TIFF", tiffinfo=tags))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
def test_truncated_and_mutated_files_are_one_line_or_a_picture(tmp_path, format):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x"
    options = {} if format in ("BMP", "GIF") else {"exif": exif, "icc_profile": wide_profile()}
    whole = save(PICTURE, tmp_path / "whole", format, **options).read_bytes()
    rng = np.random.default_rng(4)
    damaged = [whole[: len(whole) * i // 8] for i in range(1, 8)]
    for _ in range(40):
        mutant = bytearray(whole)
        for position in rng.integers(0, min(len(whole), 600), rng.integers(1, 6)):
            mutant[position] = rng.integers(0, 256)
        damaged.append(bytes(mutant))
    refused = 0
    for content in damaged:
        (tmp_path / "a").write_bytes(content)
        try:
            assert read_photo(tmp_path / "a").image.mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            refused += 1
    assert refused >= 5


# --- HEIC

HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.mark.parametrize(
    ("head", "heic"),
    [
        (HEIC, True),
        (struct.pack(">I", 24) + b"ftypmif1\0\0\0\0mif1heic", True),
        (struct.pack(">I", 28) + b"ftypmif1\0\0\0\0mif1avifmiaf", False),
        (struct.pack(">I", 24) + b"ftypavif\0\0\0\0mif1miaf", False),
        (struct.pack(">I", 24) + b"ftypisom\0\0\0\0mp42avc1", False),
        (b"\x89PNG\r\n\x1a\n", False),
        (b"", False),
    ],
)
def test_heic_is_told_by_its_brand(head, heic):
    assert photo._is_heic(head) == heic


def test_heic_elsewhere_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC)
    assert refusal(tmp_path / "IMG_1.HEIC").endswith(
        "IMG_1.HEIC is a HEIC picture, which only macOS can open for us; convert it to JPEG or PNG"
    )


def test_heic_on_macos_goes_through_sips(tmp_path, monkeypatch):
    commands = []

    def sips(command, **options):
        commands.append((command, options))
        exif = Image.Exif()
        exif[0x0112] = 6
        PICTURE.save(command[-1], exif=exif)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("subprocess.run", sips)
    monkeypatch.chdir(tmp_path)
    Path("-o.heic").write_bytes(HEIC)
    assert np.array_equal(pixels("-o.heic"), np.rot90(NOISE, -1))
    [(command, options)] = commands
    assert command[:5] == ["/usr/bin/sips", "-s", "format", "png", str(tmp_path / "-o.heic")] and command[5] == "--out"
    assert options == {"check": True, "capture_output": True, "timeout": 60}
    assert not Path(command[-1]).parent.exists()
    monkeypatch.setattr("subprocess.run", lambda command, **options: Image.new("RGB", (9, 9)).save(command[-1]))
    assert refusal("-o.heic").startswith("-o.heic is 9x9 pixels")  # the user's name, not the temporary one


@pytest.mark.parametrize(
    "failure",
    [
        FileNotFoundError(2, "no sips"),
        subprocess.TimeoutExpired("sips", 60),
        subprocess.CalledProcessError(1, "sips"),
        None,
    ],
)
def test_heic_that_sips_cannot_convert(tmp_path, monkeypatch, failure):
    def sips(command, **options):
        if failure is not None:
            raise failure
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("subprocess.run", sips)
    (tmp_path / "a.heic").write_bytes(HEIC)
    assert refusal(tmp_path / "a.heic").endswith("that macOS could not convert; export it as JPEG or PNG")


def test_a_jpeg_named_heic_is_simply_read(tmp_path):
    assert read_photo(save(PICTURE, tmp_path / "a.heic", "JPEG")).image.size == (24, 20)
