"""A small hub on 127.0.0.1 that models are downloaded from; it keeps a list of what was asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlparse

TOKEN = "hf_reader"

Files = dict[str, bytes]


class Request(NamedTuple):
    """One request: method, path below the server, and the token that came with it."""

    method: str
    path: str
    token: str


class HubToRead(ThreadingHTTPServer):
    """``repos["org/name"]["branch"]`` holds files; repositories in ``gated`` and ``private`` need the token.

    Whoever has the token may read private repositories; nobody may read gated ones.
    """

    def __init__(self, repos: dict[str, dict[str, Files]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.broken: set[str] = set()
        self.busy: dict[str, list[int]] = {}  # statuses that come first, for requests about a repository
        self.requests: list[Request] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def downloaded(self, repo: str) -> set[str]:
        """Names of the files of ``repo`` whose content was sent."""
        marks = [one.path.partition(f"/{repo}/resolve/") for one in self.requests if one.method == "GET"]
        return {rest.partition("/")[2] for start, _, rest in marks if not start and rest}


def commit_of(repo: str, branch: str) -> str:
    """The commit that ``branch`` stands for."""
    return hashlib.sha1(f"{repo}@{branch}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubToRead
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.requests.append(Request(self.command, path, token))
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        branches = self.server.repos.get(name)
        if is_api and self.server.busy.get(name):
            return self.fail(self.server.busy[name].pop(0), "", "Come back later", {"Retry-After": "1"})
        if name in self.server.broken:
            return self.fail(500, "", "Internal error")
        if branches is None or (name in self.server.private and token != TOKEN):
            return self.fail(404 if token else 401, "RepoNotFound", "Repository not found")
        rest = parts[4:] if is_api else parts[2:]  # revision/REV, tree/REV or resolve/REV/FILE
        wanted = rest[1] if len(rest) > 1 else "main"
        branch = next((b for b in branches if wanted in (b, commit_of(name, b))), None)
        if branch is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {wanted}")
        if not is_api:
            if name in self.server.gated:
                return self.fail(403, "GatedRepo", "Access to this model is restricted")
            return self.send_file(name, branch, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            return self.send([_entry(file, data) for file, data in branches[branch].items()])
        siblings = [{"rfilename": file} for file in branches[branch]]
        return self.send({"id": name, "sha": commit_of(name, branch), "siblings": siblings, "private": False})

    def send_file(self, name: str, branch: str, file: str) -> None:
        data = self.server.repos[name][branch].get(file)
        if data is None:
            return self.fail(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": commit_of(name, branch)}
        return self.reply(200, data, "application/octet-stream", headers)

    def send(self, body: object) -> None:
        self.reply(200, json.dumps(body).encode(), "application/json", {})

    def fail(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": message}
        self.reply(status, b"", "application/json", said | (headers or {}))

    def reply(self, status: int, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(file: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}
