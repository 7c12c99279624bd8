"""The Hugging Face Hub's HTTP protocol, as far as pushing and loading models and data sets needs it, in memory.

For tests with the real `huggingface_hub` client, which the routes were read from (2.4.0). Uploads go the way they went
before Xet: pre-upload, LFS batch, LFS upload, commit. A commit is atomic: until it is made, nothing of it can be seen.
`Hub.uploads_left` and `Hub.takes_commits` let the server die in the middle of an upload: from then on, it drops every
connection until `revive()`.
"""

import base64
import hashlib
import importlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import yaml
from loopback import LoopbackServer, QuietHandler


USER, TOKEN = "me", "hf_token"
_HTTPX = importlib.import_module("httpx" if huggingface_hub.__version__.startswith("1.") else "httpx2")
DIED = (_HTTPX.TransportError, RuntimeError)  # what the client raises then; the latter says which of several files
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet")
_REPO = r"/(?P<id>[\w.-]+/[\w.-]+)"
_API = r"/api/(?P<kind>models|datasets)" + _REPO
_PLAIN = r"/(?P<prefix>datasets/)?" + _REPO[1:]


@dataclass
class File:
    data: bytes
    sha256: str | None = None  # of files in LFS

    @property
    def oid(self) -> str:
        """What git calls the file, or, in LFS, the pointer to it."""
        text = self.pointer if self.sha256 else self.data
        return hashlib.sha1(f"blob {len(text)}\0".encode() + text).hexdigest()

    @property
    def pointer(self) -> bytes:
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()


@dataclass
class Repo:
    private: bool
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded to LFS, whether committed or not
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        oid = os.urandom(20).hex()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid


class Hub(LoopbackServer):
    """The server and what it holds; a context, in which it runs."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lock = threading.Lock()
        self.requests: list[str] = []  # method and path of each
        self.uploads_left: int | None = None  # LFS uploads until it dies
        self.takes_commits = True  # or dies before one
        self.dead = False
        super().__init__(_Handler, "hub")
        self.url = self.host

    def revive(self) -> None:
        self.dead, self.uploads_left, self.takes_commits = False, None, True

    def files(self, repo_id: str, kind: str = "models", branch: str = "main") -> dict[str, bytes]:
        """What a repository shows."""
        repo = self.repos[kind, repo_id]
        return {path: file.data for path, file in repo.commits[repo.branches[branch]].items()}


class _Refused(Exception):  # noqa: N818
    def __init__(self, status: int, code: str = "", message: str = "", **body):
        self.status, self.code, self.message, self.body = status, code, message or code, body


class _Handler(QuietHandler):
    hub: Hub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.dead:
            self._die()
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for wanted, pattern, answer in _ROUTES:
                if wanted == method and (found := re.fullmatch(pattern, path)):
                    with self.hub.lock:
                        values = {name: unquote(value or "") for name, value in found.groupdict().items()}
                        result = answer(self, body, **values)
                    break
            else:
                raise _Refused(404, message=f"{method} {path} is not implemented here")
        except _Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            result = json.dumps({"error": error.message, **error.body}).encode(), headers, error.status
        data, headers, status = result if isinstance(result, tuple) else (json.dumps(result).encode(), {}, 200)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _die(self) -> None:
        self.hub.dead = True
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    # ------------------------------------------------------------------------------------------------ who may do what

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, kind: str, id: str, writes: bool = False) -> Repo:
        """A repository; a private one is not there for others, as on the Hub."""
        repo = self.hub.repos.get((kind, id))
        if repo is None or (repo.private and not self._authorized()):
            raise _Refused(404 if self._authorized() else 401, "RepoNotFound", "Repository not found")
        if writes and not self._authorized():
            raise _Refused(401, message="Invalid username or password.")
        return repo

    def _commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    # ------------------------------------------------------------------------------------------------ repositories

    def create_repo(self, body):
        if not self._authorized():
            raise _Refused(401, message="Invalid username or password.")
        asked = json.loads(body)
        kind, id = f"{asked.get('type', 'model')}s", f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id}"
        if (kind, id) in self.hub.repos:
            raise _Refused(409, message="You already created this repo", url=url)
        repo = self.hub.repos[kind, id] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "start")
        return {"url": url}

    def create_branch(self, body, kind, id, revision):
        repo = self._repo(kind, id, writes=True)
        if revision in repo.branches:
            raise _Refused(409, message="Reference already exists")
        repo.branches[revision] = self._commit(repo, json.loads(body or b"{}").get("startingPoint", "main"))[0]
        return {}

    def info(self, body, kind, id, revision):
        repo = self._repo(kind, id)
        oid, files = self._commit(repo, revision or "main")
        return {"id": id, "sha": oid, "private": repo.private, "siblings": [{"rfilename": path} for path in files]}

    # ------------------------------------------------------------------------------------------------ uploads

    def validate_yaml(self, body):
        parts = json.loads(body)["content"].split("---\n")
        try:
            if len(parts) < 3 or parts[0] or not isinstance(yaml.safe_load(parts[1]), dict):
                raise ValueError("no metadata")
        except (yaml.YAMLError, ValueError) as error:
            raise _Refused(400, message="Bad metadata", errors=[{"message": str(error)}], warnings=[]) from error
        return {"errors": [], "warnings": []}

    def preupload(self, body, kind, id, revision):
        _, there = self._commit(self._repo(kind, id, writes=True), revision)
        files = []
        for asked in json.loads(body)["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            mode = "lfs" if path.endswith(_LFS_SUFFIXES) or asked["size"] > 10**7 or b"\0" in sample else "regular"
            oid = (there[path].sha256 or there[path].oid) if path in there else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, body, prefix, id):
        repo = self._repo("datasets" if prefix else "models", id, writes=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            to = {"upload": {"href": f"{self.hub.url}/lfs/{prefix}{id}/{asked['oid']}"}}
            objects.append(asked if asked["oid"] in repo.objects else {**asked, "actions": to})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body, prefix, id, oid):
        if self.hub.uploads_left == 0:
            self._die()
        if self.hub.uploads_left:
            self.hub.uploads_left -= 1
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, message="The content is not what its name says")
        self.hub.repos["datasets" if prefix else "models", id].objects[oid] = body
        return {}

    def commit(self, body, kind, id, revision):
        repo = self._repo(kind, id, writes=True)
        if not self.hub.takes_commits:
            self._die()
        if revision not in repo.branches:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, message = dict(self._commit(repo, revision)[1]), ""
        for line in body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            path = value.get("path", "")
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[path] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise _Refused(400, message=f"{path} was not uploaded to LFS")
                files[path] = File(repo.objects[value["oid"]], value["oid"])
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise _Refused(400, message=f"{key} is not implemented here")
        oid = repo.commit(revision, files, message)
        return {"commitUrl": f"{self.hub.url}/{id}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}

    # ------------------------------------------------------------------------------------------------ downloads

    def tree(self, body, kind, id, revision, folder):
        files = self._commit(self._repo(kind, id), revision)[1]
        start = f"{folder}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(start)}
        if folder and not inside:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        deep = self.query.get("recursive") in (["true"], ["True"])
        parents = {path[: match.start()] for path in inside for match in re.finditer("/", path)} - {folder}
        folders = {path for path in parents if path.startswith(start)}
        shown = sorted(path for path in [*inside, *folders] if deep or "/" not in path[len(start) :])
        return [_entry(path, files.get(path)) for path in shown]

    def resolve(self, body, prefix, id, revision, path):
        oid, files = self._commit(self._repo("datasets" if prefix else "models", id), revision)
        if path not in files:
            return b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}, 404
        file = files[path]
        return file.data, {"X-Repo-Commit": oid, "ETag": f'"{file.sha256 or file.oid}"'}, 200


def _entry(path: str, file: File | None) -> dict:
    if file is None:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    entry = {"type": "file", "path": path, "oid": file.oid, "size": len(file.data)}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return entry


_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", _API + "/branch/(?P<revision>[^/]+)", _Handler.create_branch),
    ("POST", _API + "/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _API + "/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", _API + "/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET", _API + "(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("POST", _PLAIN + r"\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs" + _PLAIN + "/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("GET", _PLAIN + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
