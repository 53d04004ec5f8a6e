"""`mlx-kontext models`: what is on this machine, fetch it, remove it, check it. The only commands that go online are here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from .disk import gigabytes
from .errors import RequestError
from .terminal import safe_text, say

REPO = "black-forest-labs/FLUX.1-Kontext-dev"


@click.group()
def models() -> None:
    """List, download, remove and check models. Only `pull` goes online."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a model.")
def list_(as_json: bool) -> None:
    """Print the models on this machine: name, size, revision, whether complete."""
    from .hub import local_models

    for model in local_models():
        if as_json:
            click.echo(json.dumps(model.to_json()))
            continue
        state = "complete" if not model.missing else f"incomplete, {len(model.missing)} missing"
        revision = (
            f"{model.revision} {model.commit[:8]}".strip() if model.revision != model.commit else model.commit[:8]
        )
        click.echo(safe_text(f"{model.model:45} {gigabytes(model.bytes):>9}  {revision:15} {state}".rstrip()))


@models.command()
@click.argument("repo", default=REPO)
@click.option("--revision", metavar="R", help="A branch, tag or commit. Default: main.")
@click.option("--dry-run", is_flag=True, help="Print the files and their sizes, download nothing.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def pull(repo: str, revision: str | None, dry_run: bool, as_json: bool) -> None:
    """Download REPO (default: FLUX.1 Kontext [dev], 34 GB) and print its folder.

    What was stopped goes on where it stopped. The token is the one of `hf auth login`, or HF_TOKEN.
    """
    for name in ("TELEMETRY", "UPDATE_CHECK"):  # before huggingface_hub is imported
        os.environ.setdefault(f"HF_HUB_DISABLE_{name}", "1")
    from tqdm import tqdm

    from . import cached, hub

    listing = hub.look_up(repo, revision)
    here = f", {gigabytes(listing.here)} of it here already" if listing.here else ""
    say(f"{repo} at {listing.commit[:8]}: {len(listing.files)} files, {gigabytes(listing.bytes)}{here}")
    if dry_run:
        say(f"{gigabytes(hub.check_room(listing))} are free in {cached.cache_folder()}; nothing was downloaded")
        if as_json:
            click.echo(json.dumps(listing.to_json()))
        for file in () if as_json else listing.files:
            click.echo(safe_text(f"{gigabytes(file.bytes):>9}  {file.path}"))
        return
    options = {"total": listing.bytes, "initial": listing.here, "unit": "B", "unit_scale": True, "leave": False}
    try:
        with tqdm(disable=not sys.stderr.isatty(), **options) as bar:
            folder = hub.pull(listing, progress=bar.update)
    except KeyboardInterrupt:
        say("interrupted; what has come is kept, type the same command again to go on")
        raise click.exceptions.Exit(130) from None
    if as_json:
        report = {"model": repo, "revision": revision or "main", "commit": listing.commit, "path": str(folder)}
        click.echo(json.dumps(report | {"files": len(listing.files), "bytes": listing.bytes}))
    else:
        click.echo(safe_text(str(folder)))


@models.command()
@click.argument("repo")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def rm(repo: str, yes: bool, as_json: bool) -> None:
    """Remove REPO from the hub's cache, every revision of it. Folders of your own are never touched."""
    from . import cached

    refuse_others(repo, "removed")
    place = cached.entry(repo)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("models rm asks first and this is no terminal; pass --yes.")
        if not click.confirm(safe_text(f"Remove {place}?"), err=True):
            say("nothing was removed")
            raise click.exceptions.Exit(1)
    freed = cached.remove(repo)
    say(f"removed {repo}, {gigabytes(freed)} are free again")
    click.echo(json.dumps({"model": repo, "freed": freed}) if as_json else str(freed))


@models.command()
@click.argument("repo", default=REPO)
@click.option("--revision", metavar="R", help="A branch, tag or commit. Default: main.")
@click.option("--discard", is_flag=True, help="Delete damaged files, so that `pull` fetches only them again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a file.")
def verify(repo: str, revision: str | None, discard: bool, as_json: bool) -> None:
    """Check every file of REPO against its checksum; print the damaged ones, exit 1 if there are any."""
    from tqdm import tqdm

    from . import cached

    refuse_others(repo, "checked: the hub knows checksums of its own files only")
    files = []
    with tqdm(disable=not sys.stderr.isatty(), unit=" files", leave=False) as bar:
        for file in cached.verify(repo, revision):
            bar.update()
            files.append(file)
            if as_json:
                click.echo(json.dumps(vars(file)))
            elif file.sound is False:
                click.echo(safe_text(file.path))
    damaged = [file for file in files if file.sound is False]
    unknown = sum(file.sound is None for file in files)
    if not damaged:
        told = f", {unknown} without a known checksum" if unknown else ""
        say(f"{len(files)} files, {gigabytes(sum(file.bytes for file in files))}: all sound{told}")
        return
    again = f"mlx-kontext models pull {repo}" + (f" --revision {revision}" if revision else "")
    if discard:
        cached.discard(repo, revision, damaged)
        say(f"error: {len(damaged)} of {len(files)} files were damaged or missing and are gone; type: {again}")
    else:
        say(
            f"error: {len(damaged)} of {len(files)} files are damaged or missing; verify it with --discard, then: {again}"
        )
    raise click.exceptions.Exit(1)


def refuse_others(repo: str, told: str) -> None:
    """Only the cache's own entries, neither the demo nor somebody's folder."""
    if repo == "demo":
        raise RequestError(f"the demo is part of this program and not {told}")
    if Path(repo).is_dir() and repo.startswith((".", "/", "~")):
        raise RequestError(f"{repo} is a folder of yours and not {told}")
