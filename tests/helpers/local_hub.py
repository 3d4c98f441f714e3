"""A Hub on localhost for tests: the calls that pushing and loading a model make, over plain HTTP, in memory.

It follows the client's requests (huggingface_hub 1.27 to 2.4 with HF_HUB_DISABLE_XET=1): whoami, repos/create,
validate-yaml, preupload, LFS batch + PUT + verify, commit, model info, tree, resolve with HEAD and Range. Tokens map
to users; a user's repositories can be written by that user only, and private ones can be seen by nobody else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".model")
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class StoredFile:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub reports as the file's hash: SHA-256 of an LFS file, git's blob hash of any other."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    repo_id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    gated: bool = False  # its owner alone has accepted the conditions

    def add(self, title: str, files: dict[str, StoredFile]) -> Commit:
        sha = hashlib.sha1(f"{self.repo_id} {len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        for commit in reversed(self.commits):
            if revision in ("main", commit.sha):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Fault:
    """Answers the next `times` requests that match with `status`; 0 closes the connection after doing the work."""

    method: str
    pattern: str
    status: int
    times: int = 1


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, sha: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.sha = status, message, code, sha


class LocalHub:
    """The server's state. `users` maps tokens to user names; tokens in `read_only` may not write."""

    def __init__(self, users: dict[str, str], read_only: tuple[str, ...] = ()) -> None:
        self.users, self.read_only = users, read_only
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reset(self) -> None:
        self.repos.clear()
        self.blobs.clear()
        self.faults.clear()
        self.calls.clear()

    def text(self, repo_id: str, name: str) -> str:
        return self.repos[repo_id].at("main").files[name].data.decode()

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.pattern, path):
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        with self.hub.lock:
            self.hub.calls.append((self.command, path))
            fault = self.hub.take_fault(self.command, path)
            if fault and fault.status:
                return self.reply(fault.status, {"error": f"injected {fault.status}"})
            self.silent = fault is not None
            try:
                self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                self.user = self.hub.users.get(self.token)
                if self.token and not self.user:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                self.route(path)
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                if refusal.sha:
                    headers["X-Repo-Commit"] = refusal.sha
                self.reply(refusal.status, {"error": refusal.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def reply(self, status: int, payload: Any = b"", headers: dict[str, str] | None = None) -> None:
        if getattr(self, "silent", False):
            self.close_connection = True
            self.connection.close()
            return
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        kind = "application/octet-stream" if isinstance(payload, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def route(self, path: str) -> None:
        repo = r"(?P<repo>[^/]+/[^/]+)"
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("POST", r"/api/repos/create", self.create),
            ("POST", rf"/api/models/{repo}/preupload/(?P<revision>.+)", self.preupload),
            ("POST", rf"/api/models/{repo}/commit/(?P<revision>.+)", self.commit),
            ("GET", rf"/api/models/{repo}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", self.tree),
            ("GET", rf"/api/models/{repo}/revision/(?P<revision>.+)", self.info),
            ("GET", rf"/api/models/{repo}", self.info),
            ("POST", rf"/{repo}\.git/info/lfs/objects/batch", self.lfs_batch),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", self.lfs_put),
            ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", self.lfs_verify),
            ("GET", rf"/{repo}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", self.resolve),
            ("HEAD", rf"/{repo}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", self.resolve),
        ]
        for method, pattern, action in routes:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return action(**match.groupdict())
        raise Refusal(404, f"{self.command} {path} is not served by this Hub", "EntryNotFound")

    def signed_in(self) -> str:
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        return self.user

    def writable(self, namespace: str) -> None:
        if self.signed_in() != namespace or self.token in self.hub.read_only:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {namespace!r}")

    def find(self, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo_id.split("/")[0]):
            # What exists must not be told to those who may not see it.
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writable(repo_id.split("/")[0])
        return repo

    def whoami(self) -> None:
        user = self.signed_in()
        self.reply(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self) -> None:
        header = json.loads(self.body)["content"].split("---\n")[1]
        values, errors = yaml.safe_load(header), []
        for key in ("base_model", "datasets"):
            items = values.get(key) or []
            for item in [items] if isinstance(items, str) else items:
                if not REPO_ID.fullmatch(item):
                    errors.append({"message": f'"{key}" with value "{item}" is not a repo id'})
        for key in ("license", "pipeline_tag", "library_name"):
            if not isinstance(values.get(key, ""), str):
                errors.append({"message": f'"{key}" must be a string'})
        for item in values.get("model-index") or []:
            for result in item["results"]:
                if any(isinstance(metric["value"], (dict, list)) for metric in result["metrics"]):
                    errors.append({"message": "a metric's value must be a number"})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self) -> None:
        values = json.loads(self.body)
        namespace = values.get("organization") or self.signed_in()
        self.writable(namespace)
        repo_id = f"{namespace}/{values['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self.reply(409, {"error": "You already created this model repo", **answer})
        private = values.get("visibility") == "private" or bool(values.get("private"))
        repo = self.hub.repos[repo_id] = Repo(repo_id, private)
        repo.add("initial commit", {".gitattributes": StoredFile(b"*.safetensors filter=lfs\n", False)})
        self.reply(200, answer)

    def preupload(self, repo: str, revision: str) -> None:
        files = self.find(repo, write=True).at(revision).files
        answers = []
        for item in json.loads(self.body)["files"]:
            mode = "lfs" if item["path"].endswith(LFS_SUFFIXES) else "regular"
            answer = {"path": item["path"], "uploadMode": mode, "shouldIgnore": False}
            if item["path"] in files:
                answer["oid"] = files[item["path"]].oid
            answers.append(answer)
        self.reply(200, {"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.find(repo, write=True)
        objects: list[dict[str, Any]] = []
        for item in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this hash")
        self.hub.blobs[oid] = self.body
        self.reply(200)

    def lfs_verify(self, oid: str) -> None:
        self.reply(200 if len(self.hub.blobs.get(oid, b"")) == json.loads(self.body)["size"] else 422, {})

    def commit(self, repo: str, revision: str) -> None:
        target = self.find(repo, write=True)
        files = dict(target.at(revision).files)
        title = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                files[value["path"]] = StoredFile(self.hub.blobs[value["oid"]], True)
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        sha = target.add(title, files).sha
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.find(repo)
        commit = found.at(revision)
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        names = {"id": repo, "modelId": repo, "sha": commit.sha, "private": found.private, "gated": False}
        self.reply(200, {**names, "siblings": siblings, "tags": [], "downloads": 0, "disabled": False})

    def tree(self, repo: str, revision: str, folder: str) -> None:
        files = self.find(repo).at(revision).files
        entries = []
        for name, file in sorted(files.items()):
            if folder and not name.startswith(f"{folder}/"):
                continue
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(file.data), "oid": file.oid}
            if file.lfs:
                entry["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": 134}
            entries.append(entry)
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        self.reply(200, entries)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        found = self.find(repo)
        commit = found.at(revision)
        if found.gated and self.user != repo.split("/")[0]:
            raise Refusal(403 if self.user else 401, f"Access to model {repo} is restricted", "GatedRepo", commit.sha)
        file = commit.files.get(name)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", sha=commit.sha)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.reply(200, file.data, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(file.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        self.reply(206, file.data[first : last + 1], headers)
