"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as its own client needs here.

with serve() as hub:                       # the client of this process talks to it, with a fresh connection
    method.push_to_hub("me/heads")
    hub.files("me/heads")["steer.json"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants

Files = dict[str, bytes]


class LocalHub(ThreadingHTTPServer):
    """Repositories in memory: name -> branch or commit -> files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, tuple[str, Files]]] = {}  # name -> revision -> (commit, files)
        self.created: dict[str, dict[str, Any]] = {}  # name -> what the client asked for
        self.messages: list[str] = []

    def files(self, repo_id: str, revision: str = "main") -> Files:
        return self.repos[repo_id][revision][1]

    def commit(self, repo_id: str, revision: str, files: Files) -> str:
        """A commit whose files replace those of the same names; its hash."""
        repo = self.repos[repo_id]
        merged = {**repo.get(revision, ("", {}))[1], **files}
        digest = hashlib.sha1(repr((len(self.messages), sorted(merged.items()))).encode()).hexdigest()
        repo[revision] = repo[digest] = (digest, merged)
        return digest


class Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"] or 0))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name'].split('/')[-1]}"
            answer = {"url": f"{self.server.url}/{name}", "name": name}
            if name in self.server.repos:
                return self._json(answer, 409)
            self.server.repos[name], self.server.created[name] = {}, asked
            self.server.commit(name, "main", {".gitattributes": b""})
            return self._json(answer)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        _, _, _, owner, short, what, *rest = path.split("/")
        repo_id, revision = f"{owner}/{short}", unquote(rest[0])
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in asked]
            return self._json({"files": modes})
        if what == "branch":
            repo = self.server.repos[repo_id]
            if revision in repo:
                return self._json({"error": "exists"}, 409)
            repo[revision] = repo["main"]
            return self._json({})
        assert what == "commit", path
        lines = [json.loads(line) for line in body.decode().splitlines()]
        self.server.messages.append(lines[0]["value"]["summary"])
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        as_request = "create_pr=1" in urlsplit(self.path).query
        digest = self.server.commit(repo_id, "refs/pr/1" if as_request else revision, files)
        answer = {"commitUrl": f"{self.server.url}/{repo_id}/commit/{digest}", "commitOid": digest}
        if as_request:
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/1"
        return self._json({"success": True, **answer})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api, parts = parts[:2] == ["api", "models"], parts[2:] if parts[0] == "api" else parts
        repo_id, (what, revision, *rest) = "/".join(parts[:2]), parts[2:] or ["revision", "main"]
        if repo_id not in self.server.repos:
            return self._error(401, "RepoNotFound")
        if revision not in self.server.repos[repo_id]:
            return self._error(404, "RevisionNotFound")
        digest, files = self.server.repos[repo_id][revision]
        if api and what == "revision":
            return self._json({"id": repo_id, "sha": digest, "siblings": [{"rfilename": name} for name in files]})
        if api and what == "tree":
            return self._json(
                [{"type": "file", "path": n, "size": len(data), "oid": _etag(data)} for n, data in files.items()]
            )
        name = "/".join(rest)
        if name not in files:
            return self._error(404, "EntryNotFound")
        headers = {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": digest}
        self._answer(200, files[name], "application/octet-stream", headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b"{}", "application/json", {"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve() -> Iterator[LocalHub]:
    """The server, to which this process's Hub client talks meanwhile."""
    with LocalHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        close_session()
        with (
            patch.dict("os.environ", {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}),
            patch.object(constants, "ENDPOINT", hub.url),
            patch.object(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            ),
            patch.object(constants, "HF_HUB_OFFLINE", False),
        ):
            try:
                yield hub
            finally:
                close_session()
                hub.shutdown()
                thread.join()
