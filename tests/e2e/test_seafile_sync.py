"""Debian's real sync client with a stand-in Seafile server, behind nginx as documented."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from relay.protocols.seafile.connection import ARRIVED_S
from tests.support.clients import native, until
from tests.support.nginx import nginx
from tests.support.relay import RelayProcess
from tests.support.seafile import KEY, Seafile, seafile
from tests.support.seafile_server import Library, StandIn, stand_in
from tests.support.sync_client import SyncClient, sync_client, unread_bytes
from tests.support.valkey import Server, free_port

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(180)]

# Without an event the client polls every 30 s. With one it takes 0.7 to 1.0 s (measured).
SOON_S = 20.0
# Interval of the client's own pings.
PING_S = 1.0
# A WebSocket ping without data.
PING_BYTES = 2


# Both as printed in the manual.
RECIPE = """
server {
    listen 80;
    location /notification {
        proxy_pass http://127.0.0.1:8083/;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection "upgrade";
    }
    location / {
        proxy_pass http://127.0.0.1:8000;
    }
}
"""


@dataclass(slots=True)
class Scene:
    """A client that has downloaded and subscribed to its library."""

    client: SyncClient
    server: StandIn
    library: Library
    folder: Path
    door: Seafile
    relay: RelayProcess
    url: str

    @property
    def port(self) -> int:
        """Return the port of nginx, to which the client is connected."""
        return urlsplit(self.url).port or 80

    async def announce(self, **files: bytes) -> None:
        """Create a commit, and post the event of seaf-server."""
        await self.door.commit(self.library.repo_id, self.library.commit(**files))

    async def follows(self, limit_s: float) -> None:
        """Wait until the client has subscribed, so that relay follows the library."""
        async with asyncio.timeout(limit_s), native(self.relay) as clients:
            while await clients.metric("relay_followed_streams") < 1:
                await asyncio.sleep(0.1)

    async def arrived(self, name: str, content: bytes, limit_s: float = SOON_S) -> None:
        """Wait until the file exists."""
        path = self.folder / name
        await until(lambda: path.exists() and path.read_bytes() == content, limit_s)

    async def hears_events(self) -> None:
        """Announce commits until one arrives, well before the client would poll or reconnect.

        While the client commits a change of its own, such as a lock, it ignores events.
        """
        async with asyncio.timeout(2 * SOON_S):
            for number in itertools.count():
                await self.announce(**{f"later{number}_txt": b"later"})
                with contextlib.suppress(TimeoutError):
                    await self.arrived(f"later{number}.txt", b"later", SOON_S / 3)
                    return

    def locks(self) -> list[str]:
        """Return the paths that the client has stored as locked by others."""
        path = self.client.folder / "seafile-data" / "filelocks.db"
        # Without locks: the client drops a change if its database is locked by a reader.
        database_uri = f"file:{path}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(database_uri, uri=True)) as database:
            return [name for (name,) in database.execute("SELECT path FROM ServerLockedFiles")]


@pytest.fixture
def door_port() -> int:
    """Return a free port for this protocol, as in a seafile.conf."""
    return free_port()


@pytest.fixture
def relay(valkey: Server, door_port: int) -> Iterator[RelayProcess]:
    settings = [f"protocol:seafile.key={KEY}", f"protocol:seafile.port={door_port}"]
    process = RelayProcess(valkey, settings=settings).start()
    yield process
    process.kill()


@asynccontextmanager
async def scene(relay: RelayProcess, door_port: int, folder: Path) -> AsyncIterator[Scene]:
    async with stand_in() as (server, server_port), sync_client(folder / "client") as client:
        library = server.library()
        library.commit(first_txt=b"first")
        recipe = RECIPE.replace("8083", str(door_port)).replace("8000", str(server_port))
        with nginx(folder, recipe, {}) as url:
            await client.call_server_pro(url)
            target = await client.download(url, library.repo_id)
            async with seafile(relay, door_port) as door:
                one = Scene(client, server, library, target, door, relay, url)
                await one.arrived("first.txt", b"first", 60)
                await one.follows(60)
                yield one


async def test_events_reach_the_real_client(
    relay: RelayProcess, door_port: int, tmp_path: Path
) -> None:
    async with scene(relay, door_port, tmp_path) as one:
        for number in range(3):
            await one.announce(**{f"file{number}_txt": b"content %d" % number})
            await one.arrived(f"file{number}.txt", b"content %d" % number)

        path = one.folder / "first.txt"
        assert path.stat().st_mode & stat.S_IWUSR
        await one.door.lock(one.library.repo_id, "first.txt")
        await until(lambda: not path.stat().st_mode & stat.S_IWUSR, SOON_S)
        assert one.locks() == ["first.txt"]
        await one.door.lock(one.library.repo_id, "first.txt", "unlocked")
        # On Linux this version deletes the lock and does not change the file.
        await until(lambda: not one.locks(), SOON_S)

        # Two pings are not answered for a while. Seafile's own server would stop serving this
        # client and never close its connection.
        one.client.stop()
        await until(lambda: unread_bytes(one.port) >= 2 * PING_BYTES, 30)
        one.client.go_on()
        await one.hears_events()


async def test_the_real_client_reconnects_after_a_kill(
    relay: RelayProcess, door_port: int, tmp_path: Path
) -> None:
    """It waits 60 seconds before it reconnects."""
    async with scene(relay, door_port, tmp_path) as one:
        await asyncio.to_thread(relay.kill)
        await asyncio.to_thread(relay.start)
        await one.follows(100)
        await one.announce(after_txt=b"after")
        await one.arrived("after.txt", b"after")


async def test_an_old_lock_is_not_repeated_when_the_real_client_restarts(
    relay: RelayProcess, door_port: int, tmp_path: Path
) -> None:
    """The expiry of a lock has no event: a repeated lock makes the file read-only permanently."""
    async with scene(relay, door_port, tmp_path) as one:
        path = one.folder / "first.txt"
        await one.door.lock(one.library.repo_id, "first.txt")
        await until(lambda: not path.stat().st_mode & stat.S_IWUSR, SOON_S)
        # Locks that were sent within this time are repeated, because they may not have arrived.
        await asyncio.sleep(ARRIVED_S + PING_S)
        for number in range(2):
            await one.client.restart()
            await one.client.call_server_pro(one.url)
            path.chmod(0o644)
            await one.follows(60)
            await one.announce(**{f"file{number}_txt": b"content %d" % number})
            await one.arrived(f"file{number}.txt", b"content %d" % number)
            assert path.stat().st_mode & stat.S_IWUSR
