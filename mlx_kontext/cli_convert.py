"""`mlx-kontext convert`, and the options by which commands take the parts of a model from places of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from .terminal import safe_text, say

if TYPE_CHECKING:
    from .convert import Conversion
    from .pipeline import KontextPipeline
    from .quantize import Scheme
    from .report import Comparison


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Parts of a model from places of their own; the keys are those of `KontextPipeline.from_pretrained`."""
    about = {
        ("--transformer", "transformer"): "The transformer: safetensors (bf16, fp8, MLX), GGUF, or a folder.",
        ("--vae", "vae"): "The VAE, such as ae.safetensors.",
        ("--t5", "text_encoder_2"): "T5, such as t5xxl_fp16.safetensors or a GGUF.",
        ("--clip", "text_encoder"): "CLIP, such as clip_l.safetensors.",
        ("--tokenizers", "tokenizers"): "A folder with tokenizer/ and tokenizer_2/.",
        ("--config", "config"): "A folder with diffusers' config.json files, for other sizes than FLUX.1's.",
    }
    for (option, name), text in reversed(about.items()):
        kind = "DIR" if option in ("--tokenizers", "--config") else "F"
        command = click.option(option, name, metavar=kind, help=text)(command)
    return command


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The edit by which a quantized model and its original are compared."""
    image = click.option("--report-image", metavar="F", help="Picture that the report edits. Default: a drawn one.")
    prompt = click.option("--report-prompt", metavar="T", help='What it asks for. Default: "make the circle green".')
    return image(prompt(command))


@click.command()
@click.argument("places", nargs=-1, metavar="[SRC] DST")
@click.option(
    "-q", "--quantize", metavar="SCHEME", help="none (default), q8, q6, q4m (mixed), q4, or a number of bits."
)
@click.option("--q-bits", type=int, metavar="N", help="Bits of the blocks' layers, as in mlx-lm. Default: 4.")
@click.option("--q-group-size", type=int, metavar="N", help="Weights that share a scale. Default: 64.")
@click.option("--q-mode", metavar="M", help="affine (default), mxfp4, mxfp8 or nvfp4.")
@click.option("--dtype", metavar="D", help="float32, float16 or bfloat16, of what is not packed. Default: as stored.")
@click.option("--lora", multiple=True, metavar="FILE[:SCALE]", help="Add a LoRA for good; repeat for several.")
@source_options
@click.option("--dry-run", is_flag=True, help="Print sizes, formats, disk and memory; write nothing.")
@click.option("--verify", is_flag=True, help="Read the result again and compare it with the source.")
@click.option("--report", "reported", is_flag=True, help="Compare with the source: layers, one step, an edit by both.")
@report_options
@click.option("--upload-repo", metavar="R", help="Then put it on the hub as YOU/NAME, with card, licence and notice.")
@click.option("--public", is_flag=True, help="With --upload-repo: public, gated by the licence. Default: private.")
@click.option("--yes", is_flag=True, help="With --upload-repo: do not ask.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def convert(
    places: tuple[str, ...],
    quantize: str | None,
    q_bits: int | None,
    q_group_size: int | None,
    q_mode: str | None,
    dtype: str | None,
    lora: tuple[str, ...],
    dry_run: bool,
    verify: bool,
    reported: bool,
    report_image: str | None,
    report_prompt: str | None,
    upload_repo: str | None,
    public: bool,
    yes: bool,
    as_json: bool,
    **sources: str | None,
) -> None:
    """Write the model SRC as a folder DST of ours, quantized if asked for; prints DST.

    SRC is a folder, a single file (safetensors of BFL, ComfyUI or MLX, GGUF) or a hub id that is on this machine; it may be
    left out where --transformer, --vae, --t5 and --clip give all four parts. Memory stays under 2 GB for the real model, but
    --report edits with both models, one after the other. The same command again goes on where it was stopped.
    """
    if len(places) not in (1, 2):
        raise click.UsageError("Name a source and a new folder: mlx-kontext convert SRC DST.")
    if len(places) == 1 and not all(sources[part] for part in ("transformer", "vae", "text_encoder", "text_encoder_2")):
        raise click.UsageError("Without SRC all parts are needed: --transformer, --vae, --t5 and --clip.")
    if (public or yes) and not upload_repo:
        raise click.UsageError("--public and --yes belong to --upload-repo.")
    if not (report_image is report_prompt is None or reported):
        raise click.UsageError("--report-image and --report-prompt belong to --report.")
    if reported and dry_run:
        raise click.UsageError(
            "--dry-run writes nothing to report on; try mlx-kontext inspect SRC -q q8 --against SRC."
        )
    if upload_repo and not yes and not sys.stdin.isatty():
        raise click.UsageError("--upload-repo asks first and this is no terminal; pass --yes.")
    from .convert import plan_conversion

    scheme = wanted_scheme(quantize, q_bits, q_group_size, q_mode)
    source = places[0] if len(places) == 2 else None
    conversion = plan_conversion(
        source, places[-1], quantize=scheme, dtype=dtype, loras=lora, local_files_only=True, **sources
    )
    say(conversion.page())
    for note in conversion.notes:
        say(f"note: {note}")
    if dry_run:
        conversion.check_room()
        if as_json:
            click.echo(json.dumps(conversion.to_json()))
        return
    report = conversion.to_json()
    original = open_original(source, report_image, report_prompt, **sources) if reported else None
    if conversion.done:
        say(f"{conversion.folder} is there already, whole")
    else:
        conversion.check_room()
        if conversion.begun:
            say("going on where it was stopped")
        with bar(conversion, "converting") as progress:
            conversion.run(progress)
    if verify:
        with bar(conversion, "verifying") as progress:
            errors = conversion.verify(progress)
        told = "; ".join(f"{part} {error:.4f}" for part, error in errors.items())
        say("verified: every number is what the source gives" + (f"; largest relative errors: {told}" if told else ""))
        report["relative_errors"] = errors
    if original:
        comparison = compared(original, str(conversion.folder), report_image, report_prompt, loras=lora)
        say(comparison.page())
        report["report"] = comparison.to_json()
    if upload_repo:
        report["address"] = put_on_hub(conversion, upload_repo, public, yes)
    click.echo(json.dumps(report) if as_json else safe_text(str(conversion.folder)))


def wanted_scheme(name: str | None, bits: int | None, group_size: int | None, mode: str | None) -> Scheme | str | None:
    """A scheme by name, or by its numbers as in mlx-lm."""
    if bits is None and group_size is None and mode is None:
        return name
    if name is not None:
        raise click.UsageError(
            "-q names a scheme, --q-bits, --q-group-size and --q-mode describe one; give one or the other."
        )
    from .quantize import FP_MODES, Scheme

    sizes = FP_MODES.get(mode or "", (64, 4))
    return Scheme(bits or sizes[1], group_size or sizes[0], mode or "affine")


def open_original(model: str | None, image: str | None, prompt: str | None, **options: Any) -> KontextPipeline:
    """The model to compare with; if it cannot be, or picture or prompt are bad, that is told before the work and not after.

    options: as for `KontextPipeline.from_pretrained`.
    """
    from .edit import EditRequest
    from .photo import read_photo
    from .pipeline import KontextPipeline
    from .report import check_original

    if image is not None:
        read_photo(image)
    if prompt is not None:
        EditRequest(prompt)
    original = KontextPipeline.from_pretrained(model or "", local_files_only=True, **options)
    check_original(original)
    return original


def compared(
    original: KontextPipeline,
    model: str,
    image: str | None,
    prompt: str | None,
    *,
    loras: tuple[str, ...] = (),
    **options: Any,
) -> Comparison:
    """A model beside its original; options: as for `KontextPipeline.from_pretrained`."""
    from .pipeline import KontextPipeline
    from .report import PROMPT, compare

    quantized = KontextPipeline.from_pretrained(model, local_files_only=True, **options)
    return compare(original, quantized, image, PROMPT if prompt is None else prompt, loras=loras, told=say)


@contextmanager
def bar(conversion: Conversion, word: str) -> Iterator[Callable[[int], object]]:
    """A progress bar over the bytes of the source, with the time left. Ctrl-C keeps what is whole."""
    from tqdm import tqdm

    options: dict[str, Any] = {"total": conversion.source_bytes, "unit": "B", "unit_scale": True, "leave": False}
    try:
        with tqdm(disable=not sys.stderr.isatty(), desc=word, **options) as progress:
            yield progress.update
    except KeyboardInterrupt:
        say("interrupted; finished files are kept, type the same command again to go on")
        raise click.exceptions.Exit(130) from None


def put_on_hub(conversion: Conversion, repo: str, public: bool, yes: bool) -> str:
    from .hub import upload

    def ask(question: str) -> bool:
        say(question)
        return yes or click.confirm("Upload?", err=True)

    address = upload(conversion.folder, repo, ask=ask, private=not public)
    if address is None:
        say("nothing was uploaded")
        raise click.exceptions.Exit(1)
    say(address)
    return address
