"""The part of the Hugging Face Hub's HTTP protocol that pushing and loading models and data sets needs, on loopback, in memory.

For tests with the real `huggingface_hub` client, which is what the routes were read from (2.4.0). Uploads go the way they went before Xet:
pre-upload, LFS batch, LFS upload, commit. A commit is atomic: until it is made, nothing of it can be seen. `Hub.uploads_left` and
`Hub.takes_commits` let the server die in the middle of an upload: from then on, it drops every connection until `revive()`.
"""

import base64
import binascii
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_token"
USER = "me"
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet")
_REPO = r"/(?P<id>[\w.-]+/[\w.-]+)"
_API = r"/api/(?P<kind>models|datasets)" + _REPO


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
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}")
        return "".join(f"{line}\n" for line in lines).encode()


@dataclass
class Repo:
    private: bool
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded to LFS, whether committed or not
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        state = json.dumps(
            [len(self.commits), branch, message, sorted((path, file.oid) for path, file in files.items())]
        )
        oid = hashlib.sha1(state.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid


class Hub:
    """The server and what it holds; a context, in which it runs."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lock = threading.Lock()
        self.requests: list[str] = []  # method and path of each
        self.uploads_left: int | None = None  # LFS uploads until it dies
        self.takes_commits = True  # or dies before one
        self.dead = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def revive(self) -> None:
        self.dead, self.uploads_left, self.takes_commits = False, None, True

    def files(self, repo_id: str, kind: str = "models", branch: str = "main") -> dict[str, bytes]:
        """What a repository shows."""
        repo = self.repos[kind, repo_id]
        return {path: file.data for path, file in repo.commits[repo.branches[branch]].items()}


class _Refused(Exception):  # noqa: N818
    def __init__(self, status: int, code: str = "", message: str = "", **body):
        self.status, self.code, self.message, self.body = status, code, message or code, body


class _Died(Exception):  # noqa: N818
    pass


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (_Died, ConnectionError):
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.dead:
            self._die()
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for wanted, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and wanted == method:
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

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _die(self) -> None:
        self.hub.dead = True
        self.connection.shutdown(socket.SHUT_RDWR)
        raise _Died

    # ------------------------------------------------------------------------------------------------ who may do what

    def _check_writer(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(401, message="Invalid username or password.")

    def _repo(self, kind: str, id: str, writes: bool = False) -> Repo:
        """A repository; a private one is not there for others, as on the Hub."""
        repo = self.hub.repos.get((kind, id))
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not authorized):
            raise _Refused(404 if authorized else 401, "RepoNotFound", "Repository not found")
        if writes:
            self._check_writer()
        return repo

    def _commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    # ------------------------------------------------------------------------------------------------ repositories

    def create_repo(self, body):
        self._check_writer()
        asked = json.loads(body)
        kind, id = f"{asked.get('type', 'model')}s", f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id}"
        if (kind, id) in self.hub.repos:
            raise _Refused(409, message="You already created this repo", url=url)
        repo = self.hub.repos[kind, id] = Repo(private=asked.get("visibility") == "private")
        repo.commit(
            "main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial commit"
        )
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
        text = files["README.md"].data.decode() if "README.md" in files else ""
        card = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {
            "id": id,
            "sha": oid,
            "private": repo.private,
            "siblings": siblings,
            "tags": card.get("tags", []),
            "cardData": card,
        }

    def refs(self, body, kind, id):
        branches = self._repo(kind, id).branches.items()
        found = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return {"branches": found, "converts": [], "tags": []}

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
            path = asked["path"]
            in_lfs = (
                path.endswith(_LFS_SUFFIXES) or asked["size"] > 10**7 or b"\0" in base64.b64decode(asked["sample"])
            )
            oid = (there[path].sha256 or there[path].oid) if path in there else None
            files.append(
                {"path": path, "uploadMode": "lfs" if in_lfs else "regular", "shouldIgnore": False, "oid": oid}
            )
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
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, message="The content is not what its name says")
        self.hub.repos["datasets" if prefix else "models", id].objects[oid] = body
        if self.hub.uploads_left is not None:
            self.hub.uploads_left -= 1
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
                if value.get("parentCommit") not in (None, repo.branches[revision]):
                    raise _Refused(412, message="A commit has happened since")
            elif key == "file":
                try:
                    files[path] = File(base64.b64decode(value["content"], validate=True))
                except binascii.Error as error:
                    raise _Refused(400, message=f"{path} is not base64") from error
            elif key == "lfsFile":
                data = repo.objects.get(value["oid"])
                if data is None or len(data) != value["size"]:
                    raise _Refused(400, message=f"{path} was not uploaded to LFS")
                files[path] = File(data, value["oid"])
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise _Refused(400, message=f"{key} is not implemented here")
        oid = repo.commit(revision, files, message)
        return {"commitUrl": f"{self.hub.url}/{id}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}

    # ------------------------------------------------------------------------------------------------ downloads

    def tree(self, body, kind, id, revision, folder):
        _, files = self._commit(self._repo(kind, id), revision)
        start = f"{folder}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(start)}
        if folder and not inside:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        parents = {path[: match.start()] for path in inside for match in re.finditer("/", path)} - {folder}
        folders = {path for path in parents if path.startswith(start)}
        shown = sorted(path for path in [*inside, *folders] if deep or "/" not in path[len(start) :])
        return [_entry(path, files.get(path)) for path in shown]

    def paths_info(self, body, kind, id, revision):
        _, files = self._commit(self._repo(kind, id), revision)
        asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        folders = {path[: match.start()] for path in files for match in re.finditer("/", path)}
        return [_entry(path, files.get(path)) for path in asked["paths"] if path in files or path in folders]

    def resolve(self, body, prefix, id, revision, path):
        oid, files = self._commit(self._repo("datasets" if prefix else "models", id), revision)
        if path not in files:
            return b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}, 404
        data, headers = files[path].data, {"X-Repo-Commit": oid, "ETag": f'"{files[path].sha256 or files[path].oid}"'}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            return data, headers, 200
        first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        return data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, 206


def _entry(path: str, file: File | None) -> dict:
    if file is None:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    entry = {"type": "file", "path": path, "oid": file.oid, "size": len(file.data)}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return entry


_PREFIX = r"/(?P<prefix>datasets/)?"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", _API + "/branch/(?P<revision>[^/]+)", _Handler.create_branch),
    ("POST", _API + "/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _API + "/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", _API + "/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", _API + "/refs", _Handler.refs),
    ("GET", _API + "/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET", _API + "(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("POST", _PREFIX + _REPO[1:] + r"\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs" + _PREFIX + _REPO[1:] + "/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("GET", _PREFIX + _REPO[1:] + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
