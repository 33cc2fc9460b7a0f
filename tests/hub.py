"""A Hub on loopback that speaks the protocol of the real client, and misbehaves where a test asks it to.

What the client 2.4 asks for and reads was taken from its source: repository and tree listings, `resolve` with its
headers, pre-upload, LFS batch and upload, and the commit in lines of JSON.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png")


class Hub:
    """Repositories with their commits, oldest first.

    Attributes:
        endpoint: what the client takes as its endpoint.
        commits: by repository, pairs of commit and files.
        tokens: what a request to a private repository, and every upload, must carry, by repository.
        faults: by file name: `"truncated"`, `"hangs"` (when asked for the content), `"silent"` (when asked at all).
        requests: method and path of each request.
    """

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.tokens: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.closing = threading.Event()
        self.endpoint = ""

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        """A further commit that adds these files; returns it."""
        history = self.commits.setdefault(repository, [])
        whole = {**(history[-1][1] if history else {}), **files}
        commit = hashlib.sha1(repr((len(history), sorted(whole.items()))).encode()).hexdigest()
        history.append((commit, whole))
        return commit

    def at(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        history = self.commits[repository]
        if revision == "main":
            return history[-1]
        return next((one for one in history if one[0] == revision), None)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(content=False)

    def do_GET(self) -> None:
        self._get(content=True)

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        self.hub.uploads[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer(200, b"")

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body, parts = self._body(), urlsplit(self.path).path.strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            data = json.loads(body)
            repository = f"{data.get('organization') or 'owner'}/{data['name']}"
            if not self._allowed(repository):
                return self._refuse(401)
            exists = repository in self.hub.commits
            self.hub.commits.setdefault(repository, [])
            self.hub.add(repository, {}) if not exists else None
            return self._json({"url": f"{self.hub.endpoint}/{repository}"}, 409 if exists else 200)
        if parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                one | {"actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        repository = "/".join(parts[2:4])
        if not self._allowed(repository):
            return self._refuse(401)
        if parts[4] == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        added: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                added[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                added[line["value"]["path"]] = self.hub.uploads[line["value"]["oid"]]
        commit = self.hub.add(repository, added)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{commit}", "commitOid": commit})

    def _get(self, content: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        listing = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if listing else parts[:2])
        if repository not in self.hub.commits or not self._allowed(repository, reading=True):
            return self._refuse(401)
        rest = parts[4:] if listing else parts[2:]
        found = self.hub.at(repository, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self._refuse(404, "RevisionNotFound")
        commit, files = found
        if listing and rest[:1] == ["tree"]:
            return self._json([_entry(name, data) for name, data in files.items()])
        if listing:
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        name = "/".join(rest[2:])
        if self.hub.faults.get(name) == "silent":
            self.hub.closing.wait()
            return None
        if name not in files:
            return self._refuse(404, "EntryNotFound", commit)
        self._file(name, files[name], commit, content)

    def _file(self, name: str, data: bytes, commit: str, content: bool) -> None:
        fault = self.hub.faults.get(name)
        self.send_response(200)
        self.send_header("ETag", f'"{_etag(name, data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not content:
            return
        self.wfile.write(data[: len(data) // 2] if fault in ("truncated", "hangs") else data)
        if fault == "hangs":
            self.wfile.flush()
            self.hub.closing.wait()
        if fault:
            self.close_connection = True

    def _allowed(self, repository: str, reading: bool = False) -> bool:
        token = self.hub.tokens.get(repository, None if reading else "write")
        return token is None or self.headers.get("Authorization") == f"Bearer {token}"

    def _refuse(self, status: int, code: str = "", commit: str = "") -> None:
        headers = {key: value for key, value in (("X-Error-Code", code), ("X-Repo-Commit", commit)) if value}
        self._answer(status, b"", headers)

    def _json(self, data: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


def _etag(name: str, data: bytes) -> str:
    """Large files are named by their SHA-256, others as git names them."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _etag(name, data)[:40]}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": _etag(name, data), "size": len(data), "pointerSize": 134}
    return entry
