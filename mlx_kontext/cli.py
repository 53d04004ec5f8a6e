"""The command line: parse, one library call, print. With cli_models, the only library file that prints or exits.

stdout carries results only; progress, notices and errors go to stderr. Whatever costs time to import is imported where it
is used, so that --help is instant.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .cli_convert import compared, convert, open_original, report_options, source_options
from .cli_models import models
from .cli_sessions import one_line, photo_paths, session_edit, sessions
from .errors import KontextError, RequestError
from .terminal import safe_text, say

if TYPE_CHECKING:
    from .edit import EditRequest, EditResult, Step
    from .pipeline import KontextPipeline

INTERRUPTED = 130
SOURCES = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizers", "config")


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, message="%(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Edit pictures by written instruction with FLUX.1 Kontext [dev], on this machine.

    \b
    mlx-kontext edit cat.jpg "give it a red scarf" -o scarf.png
    mlx-kontext edit cat.jpg "make it snow" -o snow.png --model demo

    Exit codes: 0 ok, 1 failure, 2 usage, 3 model missing, 4 memory or disk, 5 bad picture, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(convert)
cli.add_command(models)
cli.add_command(sessions)


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `edit` and `generate` have in common. No defaults here: what is not typed may come from a record or the model."""
    options = [
        click.option("-o", "--output", metavar="OUT", help="PNG, JPEG or WebP; {seed} is filled in; - is stdout."),
        click.option(
            "-m", "--model", metavar="M", help="demo, a folder, a file, or a hub id. Default: see `mlx-kontext config`."
        ),
        click.option(
            "--seed", type=int, multiple=True, metavar="N", help="Repeat for several results. Default: drawn, and told."
        ),
        click.option(
            "--steps", "--num-inference-steps", type=int, metavar="N", help="Denoising steps. Default: the model's, 28."
        ),
        click.option(
            "--guidance", "--guidance-scale", type=float, metavar="G", help="How closely to follow. Default: 2.5."
        ),
        click.option("--negative-prompt", metavar="T", help="What to avoid; needs --true-cfg."),
        click.option(
            "--true-cfg",
            "--true-cfg-scale",
            type=float,
            metavar="C",
            help="Above 1: weight against the negative prompt.",
        ),
        click.option("--size", metavar="S", help="WxH exactly, an aspect like 16:9, or match (the input's, default)."),
        click.option(
            "--max-sequence-length", type=int, metavar="N", help="T5 tokens of the prompt. Default: the model's, 512."
        ),
        click.option(
            "--draft", is_flag=True, default=None, help="A quick preview: a quarter of the pixels, fewer steps."
        ),
        click.option(
            "--lora", multiple=True, metavar="FILE[:SCALE]", help="A LoRA file of FLUX.1; repeat for several. Scale: 1."
        ),
        click.option(
            "-q",
            "--quantize",
            metavar="SCHEME",
            help="Pack weights while loading: q8, q6, q4m, q4, or a number of bits.",
        ),
        click.option("--dtype", metavar="D", help="float32, float16 or bfloat16. Default: what suits this machine."),
        click.option("--overwrite", is_flag=True, help="Replace OUT if it exists."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object a result on stdout."),
    ]
    command = source_options(command)
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("image", required=False)
@click.argument("prompt", required=False)
@click.option("--from", "source", metavar="PICTURE", help="Repeat what made PICTURE; options typed here win.")
@click.option(
    "--no-auto-resize", "no_auto_resize", is_flag=True, help="Keep the input's own size instead of its bucket."
)
@click.option("--session", metavar="DIR", help="Keep the results in DIR: begins with IMAGE, later goes on (no IMAGE).")
@click.option("--at", type=int, metavar="N", help="With --session: edit its picture N (0: the first), not the current.")
@shared_options
def edit(
    image: str | None,
    prompt: str | None,
    source: str | None,
    no_auto_resize: bool,
    session: str | None,
    at: int | None,
    **options: Any,
) -> None:
    """Edit IMAGE as PROMPT says (- reads the prompt from stdin).

    \b
    mlx-kontext edit cat.jpg "give it a red scarf" -o scarf.png
    mlx-kontext edit cat.jpg "give it a red scarf" --session cats     begins a session
    mlx-kontext edit "make it snow" --session cats                    goes on from the last result
    """
    if session is None and image is None:
        raise click.UsageError("Missing argument 'IMAGE'.")
    if session is None and at is not None:
        raise click.UsageError("--at needs --session.")
    values: dict[str, Any] = {}
    made_with: dict[str, str] = {}
    if source is not None:
        from .provenance import read_record

        record = read_record(Path(source))
        made_with = model_of(record)
        values = {k: v for k, v in record["request"].items() if k not in ("image", "image_sha256")}
    elif prompt is None and session is None:
        raise click.UsageError("Missing argument 'PROMPT'; say what to change, or repeat a picture's with --from.")
    if no_auto_resize:
        values["auto_resize"] = False
    if session is None:
        run(image, prompt, values, made_with, **options)
        return
    with session_edit(session, at, image, prompt, repeats=source is not None) as place:
        run(place.start, place.prompt, values, made_with or place.made_with, keep=place.keep, **options)


@cli.command()
@click.argument("prompt")
@shared_options
def generate(prompt: str, **options: Any) -> None:
    """Make a picture from PROMPT alone (- reads it from stdin)."""
    if options["size"] == "match":
        raise click.UsageError("--size match needs an input picture; give WxH or an aspect like 16:9.")
    run(None, prompt, {}, {}, **options)


@cli.command("run")
@click.argument("recipe")
@click.argument("photos", metavar="PHOTO...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the pictures go, under the photos' names.")
@click.option("-m", "--model", metavar="M", help="As of `edit`. Default: the recipe's.")
@source_options
@click.option("-q", "--quantize", metavar="SCHEME", help="As of `edit`.")
@click.option("--dtype", metavar="D", help="As of `edit`.")
@click.option("--overwrite", is_flag=True, help="Replace pictures that exist.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a picture on stdout.")
def run_recipe(
    recipe: str,
    photos: tuple[str, ...],
    output: str,
    model: str | None,
    quantize: str | None,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
    **sources: Any,
) -> None:
    """Repeat the edits of RECIPE, which `sessions export SESSION -o RECIPE.toml` writes, on every PHOTO."""
    from .config import settings
    from .recipes import Recipe

    edits = Recipe.read(recipe)
    paths = photo_paths(photos, output, overwrite)
    configured = settings()
    model = model or reusable_name({"name": edits.model}) or configured["model"].value
    pipe = open_model(model, dtype or configured["dtype"].value or None, quantize, sources)
    for photo, path in paths.items():
        *_, last = results(edits.stream(pipe, photo), len(edits.steps))
        last.save(path, overwrite=overwrite)
        say(f"{photo}: {len(edits.steps)} edits")
        about = last.to_json() | {"photo": photo, "path": str(path)}
        click.echo(json.dumps(about) if as_json else one_line(str(path)))


def run(
    image: Any,
    prompt: str | None,
    values: dict[str, Any],
    made_with: dict[str, str],
    *,
    keep: Callable[[EditResult], dict[str, Any]] | None = None,
    output: str | None,
    model: str | None,
    size: str | None,
    dtype: str | None,
    quantize: str | None,
    overwrite: bool,
    as_json: bool,
    **typed: Any,
) -> None:
    """One request from the words typed over the values of a record, then every result as it is ready.

    keep: adds a result to a session and returns what the JSON line should say of it; then `output` may be None.
    """
    if output is None and keep is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from .config import settings
    from .edit import EditRequest

    sources = {key: typed.pop(key) for key in SOURCES}
    names = {
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "true_cfg": "true_cfg_scale",
        "lora": "loras",
    }
    values |= {names.get(k, k): v for k, v in typed.items() if v not in (None, ())}
    if prompt is not None:
        # bytes, so that a locale or invalid text is EditRequest's to judge and not a traceback
        values["prompt"] = sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if prompt == "-" else prompt
    aspect = read_size(size, values)
    request = EditRequest.from_json(values, image=image)
    # drawn here and not later, so that the names of the outputs are known before any work is done
    request = dataclasses.replace(request, seed=request.seeds or (secrets.randbelow(2**32),))
    paths = output_paths(output, request.seeds, overwrite, as_json) if output is not None else {}
    if isinstance(image, str):
        from .photo import read_photo

        read_photo(image)  # a bad picture is told before gigabytes of model are opened

    configured = settings()
    model = model or reusable_name(made_with) or configured["model"].value
    pipe = open_model(model, dtype or configured["dtype"].value or None, quantize, sources)
    if "transformer" in made_with and made_with["transformer"] != pipe.checkpoint.identity["transformer"]:
        say(f"note: the record was made with {made_with.get('name')}, this is another model")
    if aspect:
        request = with_aspect(request, pipe, aspect)

    for result in results(pipe.stream(request), len(request.seeds)):
        kept = keep(result) if keep is not None else {}
        path = write(result, paths[result.seed], overwrite) if paths else kept["path"]
        say(f"seed {result.seed}, {result.seconds:.1f} s")
        if as_json:
            record = (
                result.to_json()
                | kept
                | {
                    "path": path,
                    "seconds": round(result.seconds, 3),
                    "notices": list(result.notices),
                }
            )
            click.echo(json.dumps(record))
        elif path != "-":
            click.echo(safe_text(path))


def results(steps: Iterator[Step], edits: int) -> Iterator[EditResult]:
    """Take the steps of so many edits under a progress bar; Ctrl-C ends them after the present one, a second one at once."""
    from tqdm import tqdm

    told: set[str] = set()
    with interruptible() as interrupted, tqdm(disable=not sys.stderr.isatty(), unit="step", leave=False) as bar:
        for step in steps:
            for notice in step.notices:  # at the first step, while Ctrl-C still saves the minutes of an edit
                if notice not in told:
                    bar.clear()
                    say(f"note: {notice}")
                    told.add(notice)
            bar.total = step.total * edits
            bar.set_postfix_str(f"seed {step.seed}", refresh=False)
            bar.update()
            if step.result is not None:
                bar.clear()
                yield step.result
            if interrupted() and step.eta > 0:  # leaving the loop closes the stream
                raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Say at the first Ctrl-C that the present step will be the last; leave at once at the second.

    Python's own handler would not run before MLX comes back from a step, which may take a minute. So the bytes that a
    signal writes to a pipe are read by a thread, which MLX lets run while it computes.
    """
    pressed = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while os.read(reader, 1):
            if pressed.is_set():
                os._exit(INTERRUPTED)
            pressed.set()
            say("\nstopping after this step; Ctrl-C again stops at once")

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield pressed.is_set
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        os.close(writer)  # ends the thread's read
        listener.join()
        os.close(reader)


def open_model(model: str, dtype: str | None, quantize: str | None, sources: dict[str, Any]) -> KontextPipeline:
    """The model from this machine; the command line never downloads by surprise."""
    say(f"opening {' '.join([model, *(f'{key}={value}' for key, value in sources.items() if value)])}")
    from .pipeline import KontextPipeline

    return KontextPipeline.from_pretrained(model, dtype=dtype, local_files_only=True, quantize=quantize, **sources)


def model_of(record: dict[str, Any]) -> dict[str, str]:
    """The record's words on its model, none if they are not what we write: the file may come from anybody."""
    model = record.get("model")
    return {str(k): str(v) for k, v in model.items()} if isinstance(model, dict) else {}


def reusable_name(made_with: dict[str, str]) -> str | None:
    """The recorded model if its name means the same everywhere: the demo or a hub id, not somebody's folder."""
    name = made_with.get("name", "")
    return name if name == "demo" or "/" in name else None


def read_size(size: str | None, values: dict[str, Any]) -> tuple[int, int] | None:
    """Put an exact size into `values`; return an aspect, which only the model's list of sizes can turn into pixels."""
    if size is None:
        return None
    values.pop("width", None)
    values.pop("height", None)
    if size == "match":
        return None
    if exact := re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", size):
        values["width"], values["height"] = int(exact[1]), int(exact[2])
        return None
    if (aspect := re.fullmatch(r"(\d{1,3}):(\d{1,3})", size)) and int(aspect[1]) and int(aspect[2]):
        return int(aspect[1]), int(aspect[2])
    raise RequestError(f"size is {size!r}; expected WxH such as 1024x768, an aspect such as 16:9, or match")


def with_aspect(request: EditRequest, pipe: KontextPipeline, aspect: tuple[int, int]) -> EditRequest:
    from .image import nearest_size

    width, height = nearest_size(*aspect, pipe.sizes, 1)
    return dataclasses.replace(request, width=width, height=height)


def output_paths(output: str, seeds: Sequence[int], overwrite: bool, as_json: bool) -> dict[int, str]:
    """Seed -> path, checked before any work is done for them."""
    if output == "-":
        if len(seeds) > 1 or as_json:
            raise RequestError("-o - is one picture on stdout; give one seed and no --json")
        if sys.stdout.isatty():
            raise RequestError("-o - writes a PNG to stdout and this is a terminal; redirect it, or name a file")
        return {seeds[0]: "-"}
    if len(seeds) > 1 and "{seed}" not in output:
        raise RequestError(f"{len(seeds)} seeds need {{seed}} in the name, for example -o out-{{seed}}.png")
    paths = {seed: output.replace("{seed}", str(seed)) for seed in seeds}
    from .provenance import check_path

    for path in paths.values():
        check_path(Path(path), overwrite=overwrite)
    return paths


def write(result: EditResult, path: str, overwrite: bool) -> str:
    if path != "-":
        return os.fspath(result.save(path, overwrite=overwrite))
    from .provenance import encode_image

    sys.stdout.buffer.write(encode_image(result.image, "PNG", result.to_json()))
    sys.stdout.buffer.flush()
    return path


@cli.command()
@click.argument("image")
@click.option("--json", "as_json", is_flag=True, help="The record as it is stored.")
def show(image: str, as_json: bool) -> None:
    """Print what made IMAGE: prompt, seed, parameters, model."""
    from .provenance import read_record

    record = read_record(Path(image))
    if as_json:
        click.echo(json.dumps(record))
        return
    model = model_of(record)
    rows = dict(record["request"])
    rows |= {"size": f"{record.get('width')}x{record.get('height')}", "model": " ".join(str(v) for v in model.values())}
    for name, value in rows.items():
        click.echo(f"{name:20} {safe_text(str(value))}")


@cli.command()
@click.argument("path", metavar="[MODEL|LORA]", required=False)
@source_options
@click.option("-q", "--quantize", metavar="SCHEME", help="Count memory as if quantized so: q8, q6, q4m, q4, bits.")
@click.option("--dtype", metavar="D", help="Count memory for this dtype. Default: what suits this machine.")
@click.option("--against", metavar="ORIGINAL", help="Compare with the unquantized model instead, by an edit with both.")
@report_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def inspect(
    path: str | None,
    quantize: str | None,
    dtype: str | None,
    against: str | None,
    report_image: str | None,
    report_prompt: str | None,
    as_json: bool,
    **sources: str | None,
) -> None:
    """Print a model's format, parts, parameters and quantization, the memory an edit needs, and whether it fits here.

    Of a LoRA file: its format, ranks, the layers it changes, and parts that are not applied.

    With --against: errors of the layers, of one step and of a finished picture, and sizes; -q tries a scheme, and nothing is
    written.
    """
    from .config import settings
    from .inspection import inspect_adapter, inspect_model, is_adapter

    if path is None and not any(sources.values()):
        raise click.UsageError("Missing argument 'MODEL|LORA'.")
    if not (report_image is report_prompt is None or against):
        raise click.UsageError("--report-image and --report-prompt belong to --against.")
    configured = settings()
    model, dtype = path or configured["model"].value, dtype or configured["dtype"].value or None
    if path is not None and is_adapter(path):
        if against:
            raise click.UsageError("--against compares models and this is a LoRA; try convert --lora FILE --report.")
        report: Any = inspect_adapter(path)
    elif against:
        original = open_original(against, report_image, report_prompt, dtype=dtype)
        options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, **sources}
        report = compared(original, model, report_image, report_prompt, **options)
    else:
        report = inspect_model(model, dtype, quantize, **sources)
    click.echo(json.dumps(report.to_json()) if as_json else safe_text(report.page()))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def config(as_json: bool) -> None:
    """Print every setting, its value and where it comes from."""
    from .config import ABOUT, settings, user_file

    found = settings()
    if as_json:
        click.echo(json.dumps({name: vars(setting) for name, setting in found.items()}))
        return
    for name, setting in found.items():
        click.echo(safe_text(f"{name:8} {setting.value or '(automatic)'}    from {setting.origin}"))
        click.echo(f"{'':8} {ABOUT[name]}")
    click.echo(f"\nfiles: {user_file()}, mlx-kontext.toml in the working folder; variables: MLX_KONTEXT_MODEL, ...")


@cli.command()
@click.option(
    "--selftest", is_flag=True, help="Run the demo model, every dtype and every kernel on each device there is."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(selftest: bool, as_json: bool) -> None:
    """Describe this machine and check the installation, on one page to paste into a report."""
    from .doctor import diagnose

    report = diagnose(selftest)
    click.echo(json.dumps(report.to_json()) if as_json else report.page())
    if not report.ok:
        raise click.exceptions.Exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `mlx-kontext`: run a command and turn deliberate errors into one line and an exit code."""
    try:
        code = cli.main(arguments, prog_name="mlx-kontext", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except KontextError as error:
        say("error: " + " ".join(str(error).split()))
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; nothing was written for the step under way")
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout left, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
