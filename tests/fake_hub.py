"""A small server on 127.0.0.1 that plays the hub's API for huggingface_hub: look-ups, downloads, gates, uploads.

Large files (.safetensors) are redirected to another host name, as the real one does, and serve ranges.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from mlx_kontext.hub import demo_folder

UNWANTED = [".gitattributes", "flux1-kontext-dev.safetensors", "ae.safetensors", "teaser.png", "docs/more.md"]
UNWANTED += ["transformer/model.bin", "transformer/old/model.safetensors"]
LICENCE = """# FLUX.1 \\[dev\\] Non-Commercial License

b. You must display the following notice (the “Attribution Notice”): “The FLUX.1 \\[dev\\] Model is licensed by Black
Forest Labs Inc. under the FLUX.1 \\[dev\\] Non-Commercial License. Copyright Black Forest Labs Inc.

IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM ARISING FROM USE OF THIS MODEL.”
"""
COMMIT = "c0ffee" + "0" * 34
GOOD, OTHER = "hf_goodgoodgoodgoodgoodgood", "hf_otherotherotherotherother"  # with access; logged in, without


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def visibility(values: dict[str, Any]) -> str:
    """As newer and older versions of huggingface_hub say it."""
    return values.get("visibility") or ("private" if values["private"] else "public")


@dataclass
class FakeHub:
    """repos: name -> path -> content. gated: names that need GOOD. cut: path -> bytes after which the line goes dead, once.

    broken: status of every answer. dead: large files never come. no_ranges: they come whole only.
    seen: (method, path) of every request, ranges: (path, Range header) of every download of a large file.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    slow: float = 0.0
    broken: int = 0
    dead: bool = False
    no_ranges: bool = False
    seen: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[tuple[str, str | None]] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def paths(self, method: str = "GET") -> list[str]:
        return [path for verb, path in self.seen if verb == method]


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None: ...  # a client that was killed

    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.seen.append((self.command, path))
        if self.hub.broken:
            return self.answer(self.hub.broken, b"broken")
        if path.startswith("/cdn/"):
            if self.headers.get("Authorization"):
                self.hub.leaked.append(path)
            return self.large(path.removeprefix("/cdn/"))
        if path.startswith("/api/models/"):
            return self.api(path.removeprefix("/api/models/").split("/"))
        owner, name, _, revision, *rest = path.lstrip("/").split("/")
        return self.resolve(f"{owner}/{name}", revision, "/".join(rest))

    do_HEAD = do_GET

    def api(self, parts: list[str]) -> None:
        repo, rest = "/".join(parts[:2]), parts[2:]
        if not self.may(repo, listing=True):
            return None
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        rows = []
        for path, data in self.hub.repos[repo].items():
            large = {"sha256": sha256(data), "oid": sha256(data), "size": len(data), "pointerSize": 134}
            row: dict[str, Any] = {"type": "file", "path": path, "rfilename": path, "size": len(data)}
            row |= {"oid": git_sha1(data), "blobId": git_sha1(data)}
            rows.append(row | ({"lfs": large} if path.endswith(".safetensors") else {}))
        if rest[:1] == ["tree"]:
            return self.json(rows)
        private = self.hub.settings.get(repo, {}).get("visibility") == "private"
        return self.json({"id": repo, "sha": COMMIT, "siblings": rows, "private": private, "tags": []})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not self.may(repo):
            return
        data = self.hub.repos[repo].get(path)
        if data is None:
            return self.refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_sha1(data)}"'}
        if path.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            port = self.server.server_address[1]
            return self.answer(302, b"", headers | {"Location": f"http://localhost:{port}/cdn/{repo}/{path}"})
        return self.answer(200, data, headers)

    def large(self, name: str) -> None:
        owner, repo, *rest = name.split("/")
        path = "/".join(rest)
        data, wanted = self.hub.repos[f"{owner}/{repo}"][path], self.headers.get("Range")
        if self.command == "GET":
            self.hub.ranges.append((path, wanted))
        if self.hub.no_ranges:
            wanted = None
        if self.hub.dead and self.command == "GET":
            self.close_connection = True
            return
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = self.hub.cut.pop(path, len(data))
        self.wfile.write(data[start:stop])
        self.wfile.flush()
        if stop < len(data):
            threading.Event().wait(self.hub.slow)  # the line is dead, then gone
            self.close_connection = True

    def may(self, repo: str, listing: bool = False) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (GOOD, OTHER):
            self.refuse(401, None, "Invalid credentials in Authorization header")
        elif repo not in self.hub.repos:
            self.refuse(404 if token else 401, "RepoNotFound")
        elif repo in self.hub.gated and token != GOOD and not listing:  # anybody may see the names of the files
            self.refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        else:
            return True
        return False

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.seen.append((self.command, path))
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {GOOD}":
            return self.refuse(403, None, "You don't have the rights to create a model under this namespace")
        if path == "/api/repos/create":
            values = json.loads(body)
            repo = f"{values['organization']}/{values['name']}"
            if repo in self.hub.repos:
                return self.json({"url": f"{self.hub.url}/{repo}"}, 409)
            self.hub.repos[repo], self.hub.settings[repo] = {}, {"visibility": visibility(values)}
            return self.json({"url": f"{self.hub.url}/{repo}"})
        if path.endswith("/info/lfs/objects/batch"):
            rows = json.loads(body)["objects"]
            href = f"{self.hub.url}/lfs/"
            return self.json({"objects": [r | {"actions": {"upload": {"href": href + r["oid"]}}} for r in rows]})
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            modes = [
                (f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular")
                for f in json.loads(body)["files"]
            ]
            return self.json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            if row["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.objects[value["oid"]]
        return self.json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}"})

    def do_PUT(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        self.hub.seen.append((self.command, path))
        if path.startswith("/lfs/"):
            self.hub.objects[path.removeprefix("/lfs/")] = body
        else:
            values = json.loads(body)
            self.hub.settings["/".join(path.split("/")[3:5])] |= {
                "visibility": visibility(values),
                "gated": values["gated"],
            }
        self.json({})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def refuse(self, status: int, code: str | None, message: str = "no") -> None:
        self.answer(status, b"", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

    def json(self, values: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def client_of(hub: FakeHub, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """huggingface_hub in this process talks to `hub` and keeps its files in `cache`; nobody is logged in."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with serve(hub):
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_TOKEN", raising=False)
        yield hub
        close_session()


def kontext_repo() -> dict[str, bytes]:
    """The demo model as the real one's repository is laid out, and everything in there that nobody should download."""
    demo = demo_folder()
    files = {path.relative_to(demo).as_posix(): path.read_bytes() for path in demo.rglob("*") if path.is_file()}
    files = {path: data for path, data in files.items() if not path.startswith(("selftest", "__"))}
    return files | {"LICENSE.md": LICENCE.encode()} | dict.fromkeys(UNWANTED, b"unwanted")
