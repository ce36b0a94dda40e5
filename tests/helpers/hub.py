"""A Hub on the loopback that takes uploads: the requests of huggingface_hub, and what it stores of them."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of_a_test"
OWNER = "tester"


@dataclass
class Repository:
    """A repository: its files at the head, and the commits that made them, as their messages."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256


class UploadHub(ThreadingHTTPServer):
    """`failing` maps the end of a path to a status that is answered in place of what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.failing: dict[str, int] = {}
        self.read_only: set[str] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UploadHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        size = int(self.headers.get("content-length", 0))
        body = self.rfile.read(size) if size else self.read_chunks()
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        status = next((each for end, each in self.server.failing.items() if path.endswith(end)), None)
        if status is None and self.headers.get("authorization") != f"Bearer {TOKEN}" and self.command != "PUT":
            status = 401
        if status is not None:
            self.send({"error": f"fails with {status}"}, status)
            return
        self.send(*self.route(path, body))

    def read_chunks(self) -> bytes:
        """Return a body that is sent in chunks, as files are."""
        if self.headers.get("transfer-encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def route(self, path: str, body: bytes) -> tuple[Any, int]:
        hub, parts = self.server, path.strip("/").split("/")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"warnings": [{"message": "a test's warning"}]}, 200
        if parts[:2] == ["api", "models"] and (name := "/".join(parts[2:4])) in hub.repositories:
            return self.of_repository(hub.repositories[name], name, parts[4:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(hub.repositories["/".join(parts[:2]).removesuffix(".git")], path, json.loads(body))
        if parts[0] == "lfs":
            assert hashlib.sha256(body).hexdigest() == parts[3]
            hub.repositories["/".join(parts[1:3])].objects[parts[3]] = body
            return {}, 200
        return {"error": f"nothing at {path}"}, 404

    def create(self, asked: dict[str, Any]) -> tuple[Any, int]:
        owner = asked.get("organization") or OWNER
        name = f"{owner}/{asked['name']}"
        if owner != OWNER:
            return {"error": "You don't have the rights to create a model under this namespace"}, 403
        url = {"url": f"{self.server.endpoint}/{name}"}
        if name in self.server.repositories:
            return {"error": "You already created this model repo", **url}, 409
        private = asked.get("private", asked.get("visibility") == "private")
        self.server.repositories[name] = Repository(private, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return url, 200

    def of_repository(self, repository: Repository, name: str, parts: list[str], body: bytes) -> tuple[Any, int]:
        if not parts or parts[0] == "revision":
            files = [{"rfilename": file} for file in repository.files]
            sha = f"{len(repository.commits):040x}"
            return {"id": name, "private": repository.private, "sha": sha, "siblings": files}, 200
        if name in self.server.read_only:
            return {"error": "Forbidden"}, 403
        if parts[0] == "auth-check":
            return {}, 200
        if parts[0] == "preupload":
            return {"files": [self.upload_mode(repository, file) for file in json.loads(body)["files"]]}, 200
        assert parts == ["commit", "main"], parts
        return self.commit(repository, name, [json.loads(line) for line in body.splitlines()])

    def upload_mode(self, repository: Repository, file: dict[str, Any]) -> dict[str, Any]:
        """Weights and large files are kept outside git; the id of what is there tells the client what is new."""
        large = file["path"].endswith(".safetensors")
        held = repository.files.get(file["path"])
        known = None if held is None else git_id(held) if not large else hashlib.sha256(held).hexdigest()
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known}

    def batch(self, repository: Repository, path: str, asked: dict[str, Any]) -> tuple[Any, int]:
        name = path.strip("/").partition(".git/")[0]
        objects = [
            dict(each)
            if each["oid"] in repository.objects
            else {**each, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{name}/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}, 200

    def commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> tuple[Any, int]:
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = repository.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.commits.append({line["key"]: line["value"] for line in lines if line["key"] == "header"}["header"])
        oid = f"{len(repository.commits):040x}"
        return {"commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}", "commitOid": oid}, 200

    def send(self, content: Any, status: int) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[UploadHub]:
    """Yield a Hub that answers until the block ends."""
    with UploadHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
