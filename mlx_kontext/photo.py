"""Any picture file, PIL image or array -> one upright 8-bit sRGB RGB picture without metadata. No MLX here."""

import platform
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from .errors import ImageError, KontextError

# Only these of Pillow's 47 plugins: EPS alone would start Ghostscript. MPO (stereo and HDR JPEGs) comes with JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64_000_000
MAX_JPEG_PIXELS = 128_000_000  # above MAX_PIXELS a JPEG is decoded at half size, which its format does for free
MIN_SIDE, MAX_SIDE, MAX_ASPECT = 16, 30_000, 20

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Photo:
    """A picture ready to edit, and what had to be done to it."""

    image: Image.Image
    """RGB, 8 bits, sRGB, upright; a new object that carries no EXIF, profile or comment."""
    notices: tuple[str, ...] = ()
    """What a careful user would want to know, such as "transparency flattened on white"."""


def read_photo(source: str | PathLike[str] | Image.Image | np.ndarray | Photo) -> Photo:
    """Read a file, a PIL image (left as it was) or a uint8 array [H, W], [H, W, 3] or [H, W, 4]; a Photo is returned as it is.

    Raises ImageError for whatever is missing, damaged, of another format, or too small, large or long.
    """
    if isinstance(source, Photo):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise ImageError(
                f"the array is {source.dtype} {list(source.shape)}; give uint8 [H, W], [H, W, 3] or [H, W, 4], 0 to 255"
            )
        _check_size("the array", source.shape[1], source.shape[0], MAX_PIXELS)
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        with _in_words("the image"):
            _check_size("the image", source.width, source.height, MAX_PIXELS)
            return _normalise(source)
    if not isinstance(source, (str, PathLike)):
        raise ImageError(f"the image is a {type(source).__name__}; give a path, a PIL image or a uint8 array")
    with open_picture(Path(source)) as picture:
        return _normalise(picture)


@contextmanager
def open_picture(path: Path, name: str = "") -> Iterator[Image.Image]:
    """The picture in a file: its header is read and its size within our limits, its pixels are not decoded yet.

    Whatever Pillow raises inside the `with` block leaves it as an ImageError, about `name` or else the path.
    """
    name = name or printable(str(path))
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be opened ({_reason(error)}); check the path") from None
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
        raise ImageError(f"{name} is {found}; give one picture file")
    if not 0 < status.st_size <= MAX_BYTES:
        raise ImageError(f"{name} has {status.st_size} bytes; a picture file has 1 to {MAX_BYTES}")
    with _in_words(name), open(path, "rb") as file:
        if _is_heic(file.read(64)):
            with (
                tempfile.TemporaryDirectory() as folder,
                open_picture(_heic_to_png(path, Path(folder)), name) as picture,
            ):
                yield picture
            return
        with Image.open(file, formats=FORMATS) as picture:
            largest = MAX_JPEG_PIXELS if picture.format in ("JPEG", "MPO") else MAX_PIXELS
            _check_size(name, picture.width, picture.height, largest)
            if picture.format == "TIFF" and picture.getexif().get(ExifTags.Base.NewSubfileType) == 1:
                raise ImageError(f"{name} opens with a thumbnail, as camera raw files do; develop it to JPEG or PNG")
            yield picture


@contextmanager
def _in_words(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata and the like; what matters becomes a notice or an error
            yield
    except (KontextError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is no PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF picture, whatever its name; convert it to PNG"
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more than {MAX_PIXELS // 10**6} megapixels; scale it down first") from None
    except Exception as error:  # Pillow's decoders raise anything on a damaged file: OSError, struct.error, KeyError...
        raise ImageError(
            f"{name} cannot be decoded ({_reason(error)}); get a fresh copy of it or convert it to PNG"
        ) from error


def _check_size(name: str, width: int, height: int, largest: int) -> None:
    short, long = sorted((width, height))
    found = f"{name} is {width}x{height} pixels"
    if short < MIN_SIDE:
        raise ImageError(f"{found}; at least {MIN_SIDE} a side are needed")
    if long > MAX_SIDE or width * height > largest:
        raise ImageError(f"{found}; at most {largest // 10**6} megapixels, {MAX_SIDE} a side; scale it down first")
    if long > MAX_ASPECT * short:
        raise ImageError(f"{found}; a picture may be {MAX_ASPECT} times as long as wide; crop it first")


def _normalise(picture: Image.Image) -> Photo:
    """Decode, convert to sRGB, flatten, turn, in this order; `picture` itself keeps its pixels and metadata."""
    notices = []
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # MPO: the other frames are the same scene
        notices.append("only the first frame used")
    # `tile` tells how the file stores its pixels; a BMP's ";16" means 5 + 6 + 5 bits.
    if ";16" in picture.mode or (picture.format in ("PNG", "TIFF") and ";16" in str(getattr(picture, "tile", ""))):
        notices.append("16-bit reduced to 8")
    if picture.width * picture.height > MAX_PIXELS:  # only JPEGs get here
        picture.draft(None, (picture.width // 2, picture.height // 2))
        notices.append(f"large JPEG read at half size, {picture.width}x{picture.height}")
    turned = _orientation(picture) in _TURNS
    picture.load()
    turn = _TURNS.get(_orientation(picture))  # Pillow has turned a TIFF by now, and says so
    if turned:
        notices.append("turned as its EXIF says")

    flat, alpha = _split_alpha(picture, notices)
    rgb = _to_srgb(flat, picture.info.get("icc_profile"), notices)
    if alpha is not None and alpha.getextrema() != (255, 255):
        # After the colour conversion: this white is sRGB's. Dropping alpha instead would bring up hidden colours.
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
        notices.append("transparency flattened on white")
    if turn is not None:
        rgb = rgb.transpose(turn)
    # Pillow's operations hand `info` on, and with it comments and positions; a picture made from bytes has none.
    return Photo(Image.frombytes("RGB", rgb.size, rgb.tobytes()), tuple(notices))


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF is no reason to refuse good pixels
        return 1
    return value if isinstance(value, int) else 1


def _split_alpha(picture: Image.Image, notices: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """The picture without transparency, 8 bits a channel, and its alpha channel in mode L if it has one."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        key = picture.info.get("transparency")
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return Image.fromarray(_eight_bits(values, notices)), alpha
    if picture.has_transparency_data:
        grey = picture.mode in ("1", "L", "LA", "La")  # kept grey, for a grey profile
        with_alpha = picture.convert("LA" if grey else "RGBA")
        return with_alpha.convert("L" if grey else "RGB"), with_alpha.getchannel("A")
    return picture, None


def _eight_bits(values: np.ndarray, notices: list[str]) -> np.ndarray:
    """Grey values [H, W] of 16 or 32 bits or float -> uint8. Pillow's own conversion clips at 255: 27 levels left."""
    if values.dtype.kind != "f" and values.min() >= 0 and values.max() <= 65535:
        if "16-bit reduced to 8" not in notices:
            notices.append("16-bit reduced to 8")
        return ((np.arange(65536) + 128) // 257).astype(np.uint8)[values]
    grey = values.astype(np.float64)
    finite = np.isfinite(grey)
    low, high = grey.min(where=finite, initial=np.inf), grey.max(where=finite, initial=-np.inf)
    if low >= 0 and high <= 1:
        notices.append("float pixels, 0 taken as black and 1 as white")
        low, high = 0.0, 1.0
    else:
        notices.append(f"pixel values stretched: {low:g} is black, {high:g} white")
    np.nan_to_num(grey, copy=False, nan=low, posinf=high, neginf=low)
    grey -= low
    grey *= 255 / (high - low) if high > low else 0
    return np.rint(grey, out=grey).astype(np.uint8)


def _to_srgb(picture: Image.Image, icc: bytes | None, notices: list[str]) -> Image.Image:
    """Mode RGB in sRGB from any mode without alpha; without a usable profile RGB is taken to be sRGB already."""
    if picture.mode == "CMYK":
        notices.append("converted from CMYK")
    elif picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode not in ("L", "RGB"):
        icc = None if picture.mode == "LAB" else icc  # Lab needs no profile
        picture = picture.convert("RGB")
    if not icc:
        return picture.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(icc))
        mode = _PROFILE_MODES[profile.profile.xcolor_space]
        if (picture.mode, mode) == ("L", "RGB"):
            picture = picture.convert("RGB")
        if mode != picture.mode:
            raise ValueError("a profile for other channels")
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(profile, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        if mode == "RGB" and _is_identity(transform):
            return picture  # some writing of sRGB: a conversion would only add rounding
        converted = transform.apply(picture)
        name = printable(ImageCms.getProfileDescription(profile).strip())[:60]
    except Exception:  # as for EXIF: lcms and Pillow raise many things on a broken profile
        notices.append("unusable colour profile ignored")
        return picture.convert("RGB")
    notices.append(f"colour profile '{name}' converted to sRGB")
    return converted


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    after = np.asarray(transform.apply(Image.fromarray(cube)), np.int16)
    return int(np.abs(after - cube).max()) <= 2


def _is_heic(head: bytes) -> bool:
    """Whether the first bytes are an `ftyp` box with a HEIC brand and no AVIF one."""
    length = int.from_bytes(head[:4], "big")
    brands = {head[i : i + 4] for i in (8, *range(16, min(length, len(head)), 4))}
    return head[4:8] == b"ftyp" and bool(brands & _HEIC_BRANDS) and not brands & _AVIF_BRANDS


def _heic_to_png(path: Path, folder: Path) -> Path:
    """Convert HEIC, the iPhone's own format, with the `sips` that comes with macOS; Pillow cannot read it."""
    name = printable(str(path))
    if platform.system() != "Darwin":
        raise ImageError(f"{name} is a HEIC picture, which only macOS can open for us; convert it to JPEG or PNG")
    png = folder / "photo.png"
    command = ["/usr/bin/sips", "-s", "format", "png", str(path.absolute()), "--out", str(png)]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    if not png.is_file():  # sips may report success and write nothing
        raise ImageError(f"{name} is a HEIC picture that macOS could not convert; export it as JPEG or PNG")
    return png


def printable(text: str) -> str:
    """Names and descriptions from outside, without line breaks and terminal control bytes."""
    return "".join(c if c.isprintable() else "·" for c in text)


def _reason(error: Exception) -> str:
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(words.split()))[:200]
