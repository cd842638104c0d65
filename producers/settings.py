"""The settings of producers: sections [producer:NAME]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, SecretStr

from relay.config.settings import Section


class EmitterSettings(Section):
    """[producer:socketio_emitter]: Events of socket.io-emitter, @socket.io/redis-emitter and the streams emitter."""

    redis_host: str = Field(
        "",
        description="Host of the Redis server that the emitters publish to. The producer is disabled if both this and redis_url are empty.",
    )
    redis_port: int = Field(6379, ge=1, le=65535, description="Port of redis_host.")
    redis_url: str = Field(
        "",
        description="URL of the Redis server, instead of redis_host: redis://[user:pw@]host:port/db, rediss:// or sentinel://. It may be the same server as in [redis].",
    )
    redis_password: SecretStr = Field(SecretStr(""), description="Redis password, used if the URL has none.")
    same_as: ClassVar[Mapping[str, tuple[str, str]]] = {
        "namespace": ("protocol:socketio", "namespace")
    }

    namespace: str = Field(
        "",
        max_length=100,
        pattern=r"^(/[^\s,?#]*)?$",
        description="Namespace of the emitters. Emits to other namespaces are ignored. Must equal [protocol:socketio] namespace, which is used if this is empty.",
    )
    key: str = Field(
        "socket.io",
        min_length=1,
        max_length=100,
        pattern=r"^[^\s#]+$",
        description="Prefix of the emitters' Redis channels, the emitters' option key.",
    )
    streams: str = Field(
        "socket.io",
        max_length=1000,
        description="Redis streams of the streams emitter, separated by commas. Empty: none.",
    )

    def source(self) -> str:
        """The URL to listen to; empty: none."""
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return self.redis_url or (host and f"redis://{host}:{self.redis_port}/0")

    def stream_names(self) -> list[str]:
        """Each of them."""
        return [name.strip() for name in self.streams.split(",") if name.strip()]


class SeafHooksSettings(Section):
    """[producer:seaf_hooks]: Commits that Seafile's seafevents publishes to the Redis channel repo_update."""

    redis_url: str = Field(
        "",
        description="URL of Seafile's Redis server, for example redis://host:port/0. If it is the server of [redis], its user needs &repo_update. Leave empty to disable this producer.",
    )
    redis_password: SecretStr = Field(
        SecretStr(""), description="Redis password, used if the URL has none."
    )


class SpoolSettings(Section):
    """[producer:spool]: Delivery of events that other programs on this host have spooled."""

    path: str = Field(
        "",
        description="Spool file of the events that the producers on this host could not send. Leave empty to disable this producer.",
    )


class QueueSettings(Section):
    """[producer:queue]: Queue of commands that other programs RPUSH, as redis_api of Centrifugo v1."""

    enabled: bool = Field(
        False,
        description="Read commands from the queue. Leave it off while a Centrifugo server on the same Redis reads them.",
    )
    name: str = Field(
        "centrifugo.api",
        min_length=1,
        max_length=100,
        pattern=r"^[^\s{}]+$",
        description="Redis key of the queue, without the prefix of [redis].",
    )
    shards: int = Field(
        0, ge=0, le=256, description="Number of additional queues, NAME.0 to NAME.N-1. Order is kept within each queue.")
    batch: int = Field(
        256,
        ge=1,
        le=1000,
        description="Maximum commands executed in one step. More is faster, but blocks Redis longer.",
    )
