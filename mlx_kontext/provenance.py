"""What made a picture, written into its file and read back. No MLX here.

EXIF and XMP say in the standard places that a model made the picture, as the licence and the EU's AI act ask; the
record itself (`EditResult.to_json()`) lies beside them as JSON, so that an edit can be repeated from its file.
"""

import json
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from .disk import check_free, write_atomic
from .errors import ImageError, RequestError
from .photo import open_picture, printable

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_KEY = "mlx_kontext"
_CHARSET = b"ASCII\0\0\0"  # how an EXIF UserComment starts
_MAX_RECORD = 4 * 2**20
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}


def save_image(image: Image.Image, path: Path, record: dict[str, Any], *, overwrite: bool) -> Path:
    """Write PNG, JPEG or WebP by the suffix of `path`, whole or not at all, with `record` inside; returns `path`.

    Raises RequestError for another suffix, a name that is taken (unless `overwrite`), an unwritable place or a
    picture or record too large for the format; ResourceError on a full disk.
    """
    check_path(path, overwrite=overwrite)
    write_atomic(path, encode_image(image, _FORMATS[path.suffix.lower()], record), overwrite=overwrite)
    return path


def check_path(path: Path, *, overwrite: bool) -> None:
    """Raises RequestError now for what `save_image` would refuse after the work is done: suffix, folder, a taken name."""
    if path.suffix.lower() not in _FORMATS:
        raise RequestError(f"{printable(str(path))} ends in none of .png, .jpg (.jpeg) and .webp; choose one of these")
    check_free(path, overwrite=overwrite)


def encode_image(image: Image.Image, format: str, record: dict[str, Any]) -> bytes:
    """The bytes of a "PNG", "JPEG" or "WEBP" file of `image`, with `record` inside.

    Raises RequestError where a JPEG (record below 64 kB, sides to 65500 pixels) or WebP (16383) cannot hold it.
    """
    options: dict[str, Any] = {"exif": _exif(record)}
    if format == "PNG":
        text = PngInfo()
        # A lone surrogate, which UTF-8 cannot write, becomes the very \udXXX by which JSON knows it.
        text.add_itxt(_KEY, json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode())
        text.add_itxt("XML:com.adobe.xmp", _xmp(record).decode())
        options["pnginfo"] = text
    elif format == "JPEG":
        options |= {"xmp": _xmp(record), "quality": 95, "subsampling": "4:4:4"}
    else:
        # Lossy: whoever wants every pixel has PNG. WebP then halves the colour resolution, whatever its quality.
        options |= {"xmp": _xmp(record), "quality": 95}
    out = BytesIO()
    try:
        image.save(out, format, **options)
    except (ValueError, OSError) as error:
        raise RequestError(
            f"the picture or its record does not fit into a {format} file ({error}); save it as .png"
        ) from None
    return out.getvalue()


def read_record(path: Path) -> dict[str, Any]:
    """The record `save_image` wrote into a file. Raises ImageError if it is no picture or carries none we can read."""
    with open_picture(path) as picture:
        text = picture.info.get(_KEY)
        if text is None:
            comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
            text = comment[len(_CHARSET) :] if isinstance(comment, bytes) and comment.startswith(_CHARSET) else ""
    try:
        record = json.loads(text) if len(text) <= _MAX_RECORD else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("request"), dict):
        found = f"{printable(str(path))} carries no mlx_kontext record"
        raise ImageError(f"{found}; only a file saved by mlx_kontext and not re-saved by another program does")
    return record


def _exif(record: dict[str, Any]) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = f"AI generated;{'img2img' if _is_edit(record) else 'txt2img'};flux;{_creator()}"
    # EXIF text is ASCII on one line. This is a courtesy for file browsers; the whole prompt is in the record.
    prompt = printable(" ".join(record["request"]["prompt"].split())).encode("ascii", "replace").decode()
    exif[ExifTags.Base.ImageDescription] = prompt if len(prompt) <= 1000 else prompt[:997] + "..."
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _CHARSET + json.dumps(record).encode("ascii")
    return exif


def _xmp(record: dict[str, Any]) -> bytes:
    """An XMP packet: made by which program, and that the picture is a model's (IPTC's digital source type)."""
    for prefix, uri in _NAMESPACES.items():
        ElementTree.register_namespace(prefix, uri)
    rdf, xmp, iptc = (f"{{{_NAMESPACES[prefix]}}}" for prefix in ("rdf", "xmp", "Iptc4xmpExt"))
    root = ElementTree.Element(f"{{{_NAMESPACES['x']}}}xmpmeta")
    body = ElementTree.SubElement(ElementTree.SubElement(root, f"{rdf}RDF"), f"{rdf}Description", {f"{rdf}about": ""})
    kind = "compositeWithTrainedAlgorithmicMedia" if _is_edit(record) else "trainedAlgorithmicMedia"
    ElementTree.SubElement(body, f"{iptc}DigitalSourceType").text = _SOURCE_TYPE + kind
    ElementTree.SubElement(body, f"{xmp}CreatorTool").text = _creator()
    packet = ElementTree.tostring(root)
    return b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>' + packet + b'<?xpacket end="w"?>'


def _is_edit(record: dict[str, Any]) -> bool:
    return not record["request"].keys().isdisjoint({"image", "image_sha256"})


def _creator() -> str:
    from . import __version__

    return f"mlx_kontext {__version__}"
