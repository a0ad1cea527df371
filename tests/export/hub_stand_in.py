"""A small hub on 127.0.0.1: repositories, LFS objects and commits, all in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """``repos["user/name"]["branch"]`` is a dictionary of file names and bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.closed = {"someone/closed"}
        self.busy: dict[str, list[int]] = {}  # statuses that come first, by what is asked for
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self, body: object, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        path = urlparse(self.path).path.strip("/").split("/")
        if path[:2] == ["api", "models"]:
            name = "/".join(path[2:4])
            branch = path[5] if len(path) > 5 else "main"
            files = self.server.repos.get(name, {}).get(branch)
            if files is None:
                return self.answer({"error": "Repository not found"}, 404)
            if path[4:5] == ["tree"]:
                listing = [
                    {"type": "file", "path": file, "size": len(data), "oid": "0"}
                    for file, data in files.items()
                ]
                return self.answer(listing)
            siblings = [{"rfilename": file} for file in files]
            return self.answer({"id": name, "sha": "0" * 40, "siblings": siblings, "private": False})
        return self.answer({"error": f"unknown {self.path}"}, 404)

    def do_PUT(self) -> None:
        data = self.body()
        _, *name, oid = self.path.strip("/").split("/")
        if "/".join(name) in self.server.closed:
            return self.answer({"error": "the storage is closed"}, 403)
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.objects[oid] = data
        return self.answer({})

    def do_POST(self) -> None:
        data = self.body()
        path = urlparse(self.path).path.strip("/").split("/")
        busy = self.server.busy.get(path[-2] if path[4:5] == ["commit"] else path[-1])
        if busy:
            return self.answer({"error": "come back later"}, busy.pop(0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == ["api", "repos", "create"]:
            return self.create(json.loads(data))
        if path[-3:] == ["lfs", "objects", "batch"]:
            href = f"{self.server.endpoint}/lfs/{'/'.join(path[:2]).removesuffix('.git')}/"
            objects = json.loads(data)["objects"]
            ready = [{**item, "actions": {"upload": {"href": href + item["oid"]}}} for item in objects]
            return self.answer({"objects": ready, "transfer": "basic"})
        name, what, branch = "/".join(path[2:4]), path[4:5], path[-1]
        if path == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if what == ["branch"]:
            self.server.repos[name][branch] = dict(self.server.repos[name]["main"])
            return self.answer({})
        if what == ["preupload"]:
            files = [item["path"] for item in json.loads(data)["files"]]
            modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in files}
            return self.answer(
                {"files": [{"path": f, "uploadMode": modes[f], "shouldIgnore": False} for f in files]}
            )
        if what == ["commit"]:
            return self.commit(name, branch, [json.loads(line) for line in data.splitlines()])
        return self.answer({"error": f"unknown {self.path}"}, 404)

    def create(self, request: dict) -> None:
        name = f"{request['organization'] or 'someone'}/{request['name']}"
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repos:
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        self.server.repos[name] = {"main": {}}
        self.server.private[name] = request.get("private") is True or request.get("visibility") == "private"
        return self.answer({"url": url, "id": name, "name": name})

    def commit(self, name: str, branch: str, lines: list[dict]) -> None:
        files = self.server.repos[name][branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.server.endpoint}/{name}/commit/{'0' * 40}"
        return self.answer({"commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})
