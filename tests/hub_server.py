"""A local server that speaks what the Hub's own client asks of it: models, LFS, Xet's storage."""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "s" * 20 + "secret" + "t" * 10


@dataclass
class Repo:
    """One model: its visibility, commits newest last, and the files of the last one."""

    visibility: str
    commits: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, str] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return f"{len(self.commits):040x}"


class Server(ThreadingHTTPServer):
    """Every repository, every large file that was stored, and what was asked, in order.

    `refuse` maps the start of a path to a status and a message, `cut` counts the uploads of large
    files that are taken before the connection breaks.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.xorbs: list[str] = []
        self.asked: list[str] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.cut: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that is cut is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.body()
        hub.asked.append(f"{self.command} {path}")
        for start, (status, message) in hub.refuse.items():
            if f"{self.command} {path}".startswith(start):
                self.send(status, {"error": message}, {"X-Error-Message": message})
                return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "validate-yaml"]:
            self.validate(json.loads(body))
            return
        if parts[0] == "lfs":
            self.put_large(parts[1], body)
            return
        if parts[0] == "v1" and parts[1] == "xorbs":
            self.put_large(parts[-1], body)
            return
        if path == "/v1/shards":
            self.send(200, {"result": 1})
            return
        if parts[0] in ("v1", "v2"):
            # What Xet can do without: known chunks, grants, figures of its own.
            self.send(404, {})
            return
        if "resolve" in parts:
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            return
        # What changes something, or is private, needs whoever is logged in.
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid username or password."})
            return
        if parts[:3] == ["api", "repos", "create"]:
            self.create(json.loads(body))
            return
        if path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(body))
            return
        if parts[:2] == ["api", "models"]:
            repo_id = "/".join(parts[2:4])
            repo = hub.repos.get(repo_id)
            if repo is None:
                missing = {"X-Error-Code": "RepoNotFound"}
                self.send(404, {"error": "Repository not found"}, missing)
                return
            what = parts[4] if parts[4:] else "info"
            getattr(self, what.replace("-", "_"))(repo_id, repo, body)
            return
        self.send(404, {})
        return

    def body(self) -> bytes:
        """The body, in chunks where the client streams it."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def info(self, repo_id: str, repo: Repo, _: bytes) -> None:
        siblings = []
        for name, content in repo.files.items():
            one: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git(content)}
            if name in repo.large:
                one["lfs"] = {"sha256": repo.large[name], "size": len(content), "pointerSize": 130}
            siblings.append(one)
        private = repo.visibility == "private"
        about = {"id": repo_id, "sha": repo.sha, "private": private, "siblings": siblings}
        self.send(200, about)

    def preupload(self, _: str, repo: Repo, body: bytes) -> None:
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs"
                if one["path"].endswith((".safetensors", ".gguf"))
                else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(body)["files"]
        ]
        self.send(200, {"files": files})

    def xet_write_token(self, *_: object) -> None:
        found = {"X-Xet-Cas-Url": self.server.url, "X-Xet-Access-Token": "xet"}
        found["X-Xet-Token-Expiration"] = "4000000000"
        self.send(200, {"accessToken": "xet", "exp": 4000000000, "casUrl": self.server.url}, found)

    def commit(self, repo_id: str, repo: Repo, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repo.sha) != repo.sha:
            self.send(412, {"error": "A commit has happened since."})
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
                repo.large.pop(value["path"], None)
            elif line["key"] == "lfsFile":
                if not self.server.xorbs and value["oid"] not in self.server.stored:
                    self.send(400, {"error": f"{value['path']}: its content is missing"})
                    return
                repo.files[value["path"]] = self.server.stored.get(value["oid"], b"")
                repo.large[value["path"]] = value["oid"]
            else:
                del repo.files[value["path"]]
                repo.large.pop(value["path"], None)
        repo.commits.append(header)
        url = f"{self.server.url}/{repo_id}/commit/{repo.sha}"
        self.send(200, {"success": True, "commitOid": repo.sha, "commitUrl": url})

    def create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.server.repos:
            self.send(409, {"error": "You already created this model repo"})
            return
        made = Repo(asked.get("visibility", "public"), [{"summary": "initial commit"}])
        made.files[".gitattributes"] = b"*.safetensors filter=lfs\n"
        self.server.repos[repo_id] = made
        self.send(200, {"url": f"{self.server.url}/{repo_id}", "id": repo_id})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            found: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server.stored:
                found["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
            objects.append(found)
        self.send(200, {"transfer": "basic", "objects": objects})

    def put_large(self, oid: str, body: bytes) -> None:
        if self.server.cut is not None:
            if self.server.cut == 0:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.server.cut -= 1
        if self.path.startswith("/lfs"):
            assert hashlib.sha256(body).hexdigest() == oid
            self.server.stored[oid] = body
            self.send(200, {})
        else:
            self.server.xorbs.append(oid)
            self.send(200, {"was_inserted": True})

    def validate(self, asked: dict[str, str]) -> None:
        """As the Hub does, in small: the front matter is YAML with a licence of its list."""
        import yaml

        front = yaml.safe_load(asked["content"].split("---\n")[1])
        if front.get("license") not in ("apache-2.0", "mit", "other"):
            message = '"license" must be one of [apache-2.0, mit, ...]'
            self.send(400, {"errors": [{"message": message}]})
            return
        self.send(200, {"errors": [], "warnings": []})

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None or name not in repo.files:
            code = "EntryNotFound" if repo else "RepoNotFound"
            self.send(404, {}, {"X-Error-Code": code})
            return
        content = repo.files[name]
        headers = {"X-Repo-Commit": repo.sha, "ETag": f'"{git(content)}"'}
        self.send(200, content, headers)

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def served() -> Iterator[Server]:
    """A server while the body runs."""
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
