"""A stand-in for a Seafile server, with the URLs that the real sync client requests.

It serves a first download and the periodic requests. Objects have the format of Seafile's version
1, because the client checks their IDs.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
import uuid
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.seafile import subscribe_token

USER = "alice@example.com"
_EMPTY = "0" * 40
_PAGE = Path(__file__).with_name("seahub_page.html")
_FILE_MODE = 0o100644


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@dataclass(slots=True)
class Library:
    """A library whose files are in one folder."""

    repo_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    blocks: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    locked: dict[str, int] = field(default_factory=dict)
    head: str = ""

    def commit(self, **files: bytes) -> str:
        """Add or change files. Return the ID of the new head. `_` in a name stands for a dot."""
        self.files |= {name.replace("_", "."): content for name, content in files.items()}
        parent = self.head or None
        root = self._folder() if self.files else _EMPTY
        commit_id = _sha1(f"{root}{parent}{time.time()}".encode())
        self.commits[commit_id] = {
            "commit_id": commit_id,
            "root_id": root,
            "repo_id": self.repo_id,
            "creator_name": USER,
            "creator": "0" * 40,
            "description": "a commit",
            "ctime": int(time.time()),
            "parent_id": parent,
            "second_parent_id": None,
            "repo_name": "library",
            "repo_desc": "",
            "repo_category": None,
            "version": 1,
        }
        self.head = commit_id
        return commit_id

    def _folder(self) -> str:
        entries = [
            {
                "id": self._file(content),
                "mode": _FILE_MODE,
                "modifier": USER,
                "mtime": int(time.time()),
                "name": name,
                "size": len(content),
            }
            # Seafile stores entries in descending order.
            for name, content in sorted(self.files.items(), reverse=True)
        ]
        return self._object({"dirents": entries, "type": 3, "version": 1})

    def _file(self, content: bytes) -> str:
        if not content:
            return _EMPTY
        block = _sha1(content)
        self.blocks[block] = content
        described = {"block_ids": [block], "size": len(content), "type": 1, "version": 1}
        return self._object(described)

    def _object(self, described: dict[str, Any]) -> str:
        text = json.dumps(described, sort_keys=True).encode()
        name = _sha1(text)
        self.objects[name] = text
        return name

    def ids(self, commit_id: str) -> list[str]:
        """Return the IDs of the objects of one commit."""
        root = self.commits[commit_id]["root_id"] if commit_id in self.commits else _EMPTY
        if root == _EMPTY:
            return []
        entries = json.loads(self.objects[root])["dirents"]
        return [root, *(each["id"] for each in entries if each["id"] != _EMPTY)]


class StandIn:
    """Serves libraries. `asked` stores the paths of the requests."""

    def __init__(self) -> None:
        self.libraries: dict[str, Library] = {}
        self.asked: list[str] = []
        self.page_token_s = 259_200
        app = web.Application(middlewares=[self._remember])
        repo = "/seafhttp/repo/{repo}"
        app.router.add_routes(
            [
                web.post("/api2/auth-token/", self._auth),
                web.get("/api2/repos/{repo}/download-info/", self._download_info),
                web.get("/seafhttp/protocol-version", self._version),
                web.post("/seafhttp/repo/head-commits-multi/", self._heads),
                web.post("/seafhttp/repo/head-commits-multi", self._heads),
                web.post("/seafhttp/repo/locked-files", self._locked),
                web.post("/seafhttp/repo/folder-perm", self._permissions),
                web.get(f"{repo}/commit/HEAD", self._head),
                web.get(f"{repo}/commit/{{commit}}", self._commit),
                web.get(f"{repo}/permission-check/", self._permitted),
                web.get(f"{repo}/fs-id-list/", self._ids),
                web.post(f"{repo}/pack-fs/", self._pack),
                web.get(f"{repo}/block/{{block}}", self._block),
                web.get(f"{repo}/jwt-token", self._jwt),
                # These URLs are for the page in the browser.
                web.get("/page", self._page),
                web.get("/files/{repo}", self._files),
                web.get("/api/v2.1/repos/{repo}/repo-notification-jwt-token/", self._page_jwt),
            ]
        )
        self.app = app

    def library(self) -> Library:
        """Add a library with an empty first commit."""
        library = Library()
        library.commit()
        self.libraries[library.repo_id] = library
        return library

    @web.middleware
    async def _remember(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(request.path)
        answer: web.StreamResponse = await handler(request)
        return answer

    def _of(self, request: web.Request) -> Library:
        return self.libraries[request.match_info["repo"]]

    async def _auth(self, _request: web.Request) -> web.Response:
        return web.json_response({"token": "a" * 40})

    async def _download_info(self, request: web.Request) -> web.Response:
        library = self._of(request)
        return web.json_response(
            {
                "relay_id": "0" * 40,
                "relay_addr": "127.0.0.1",
                "relay_port": "0",
                "email": USER,
                "token": "b" * 40,
                "repo_id": library.repo_id,
                "repo_name": "library",
                "repo_desc": "",
                "repo_size": 0,
                "repo_version": 1,
                "mtime": int(time.time()),
                "encrypted": "",
                "enc_version": None,
                "salt": None,
                "magic": None,
                "random_key": None,
                "permission": "rw",
                "head_commit_id": library.head,
            }
        )

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": 2})

    async def _head(self, request: web.Request) -> web.Response:
        return web.json_response({"is_corrupted": 0, "head_commit_id": self._of(request).head})

    async def _commit(self, request: web.Request) -> web.Response:
        return web.json_response(self._of(request).commits[request.match_info["commit"]])

    async def _permitted(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _ids(self, request: web.Request) -> web.Response:
        library = self._of(request)
        known = library.ids(request.query.get("client-head", ""))
        wanted = library.ids(request.query["server-head"])
        return web.json_response([each for each in wanted if each not in known])

    async def _pack(self, request: web.Request) -> web.Response:
        library, parts = self._of(request), []
        for name in json.loads(await request.read()):
            packed = zlib.compress(library.objects[name])
            parts.append(name.encode() + struct.pack("!I", len(packed)) + packed)
        return web.Response(body=b"".join(parts))

    async def _block(self, request: web.Request) -> web.Response:
        return web.Response(body=self._of(request).blocks[request.match_info["block"]])

    async def _jwt(self, request: web.Request) -> web.Response:
        token = subscribe_token(self._of(request).repo_id, USER)
        return web.json_response({"jwt_token": token})

    async def _page(self, _request: web.Request) -> web.Response:
        return web.Response(body=_PAGE.read_bytes(), content_type="text/html", charset="utf-8")

    async def _files(self, request: web.Request) -> web.Response:
        return web.json_response(sorted(self._of(request).files))

    async def _page_jwt(self, request: web.Request) -> web.Response:
        token = subscribe_token(self._of(request).repo_id, USER, ttl_s=self.page_token_s)
        return web.json_response({"token": token})

    async def _heads(self, request: web.Request) -> web.Response:
        wanted = json.loads(await request.read())
        heads = {name: self.libraries[name].head for name in wanted if name in self.libraries}
        return web.json_response(heads)

    async def _locked(self, request: web.Request) -> web.Response:
        wanted = json.loads(await request.read())
        now = int(time.time())
        return web.json_response(
            [
                {
                    "repo_id": each["repo_id"],
                    "ts": now,
                    "locked_files": self.libraries[each["repo_id"]].locked,
                }
                for each in wanted
            ]
        )

    async def _permissions(self, request: web.Request) -> web.Response:
        wanted = json.loads(await request.read())
        now = int(time.time())
        return web.json_response(
            [
                {"repo_id": each["repo_id"], "ts": now, "user_perms": [], "group_perms": []}
                for each in wanted
            ]
        )


@asynccontextmanager
async def stand_in() -> AsyncIterator[tuple[StandIn, int]]:
    """Run a stand-in, and yield it with its port."""
    server = StandIn()
    runner = web.AppRunner(server.app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield server, runner.addresses[0][1]
    finally:
        await runner.cleanup()
