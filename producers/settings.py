"""The list of producers and their settings: sections [producer:NAME].

Commands that only read the configuration import this module, but not the producers' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, SecretStr
from typing_extensions import override

from relay.config.lists import split
from relay.config.settings import Section


class ProducerSection(Section):
    """Section of a producer. `producers.<module>` has its `build` (`producers.registry`).

    Relay runs the producer in its own process if the setting `enabled_by` is set. `summary` is the
    producer's line in the help of `python -m producers`. `argument` is the setting that its second
    command-line argument sets; '' if it has no such argument.
    """

    module: ClassVar[str]
    enabled_by: ClassVar[str]
    summary: ClassVar[str]
    argument: ClassVar[str] = ""

    @property
    def is_enabled(self) -> bool:
        """Return True if relay runs the producer in its own process."""
        return bool(getattr(self, self.enabled_by))


class EmitterSettings(ProducerSection):
    """[producer:socketio_emitter]: Events of socket.io-emitter, @socket.io/redis-emitter and the streams emitter."""

    module = "socketio_emitter"
    enabled_by = "redis_url"
    summary = "events of Node's Socket.IO emitters"
    removed: ClassVar[Mapping[str, str]] = {
        "redis_host": "is no longer a separate setting; set redis_url = redis://HOST:PORT/0, which relay uses now",
        "redis_port": "is no longer a separate setting; set redis_url = redis://HOST:PORT/0, which relay uses now",
        "namespace": "is no longer read; [protocol:socketio] namespace applies",
    }

    redis_url: str = Field(
        "",
        description="URL of the Redis server that the emitters publish to: redis://[user:pw@]host:port/db, rediss:// or sentinel://. It may be the same server as in [redis]. Leave empty to disable this producer.",
    )
    redis_password: SecretStr = Field(SecretStr(""), description="Redis password, used if the URL has none.")
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

    @classmethod
    @override
    def from_removed(cls, values: Mapping[str, str]) -> Mapping[str, str]:
        host, port = values.get("redis_host", ""), values.get("redis_port", "6379")
        host = f"[{host}]" if ":" in host else host
        return {"redis_url": f"redis://{host}:{port}/0"} if host else {}

    def stream_names(self) -> list[str]:
        """Return the names in `streams`."""
        return split(self.streams)


class SeafHooksSettings(ProducerSection):
    """[producer:seaf_hooks]: Commits that Seafile's seafevents publishes to the Redis channel repo_update."""

    module = "seaf_hooks"
    enabled_by = "redis_url"
    summary = "Seafile's commits from the Redis channel repo_update"

    redis_url: str = Field(
        "",
        description="URL of Seafile's Redis server, for example redis://host:port/0. If it is the server of [redis], its user needs &repo_update. Leave empty to disable this producer.",
    )
    redis_password: SecretStr = Field(
        SecretStr(""), description="Redis password, used if the URL has none."
    )


class SpoolSettings(ProducerSection):
    """[producer:spool]: Delivery of events that other programs on this host have spooled."""

    module = "spool_delivery"
    enabled_by = "path"
    summary = "events that other programs on this host have spooled"
    argument = "path"

    path: str = Field(
        "",
        description="Spool file of the events that the producers on this host could not send. Leave empty to disable this producer.",
    )


class QueueSettings(ProducerSection):
    """[producer:queue]: Queue of commands that other programs RPUSH, as redis_api of Centrifugo v1."""

    module = "api_queue"
    enabled_by = "enabled"
    summary = "commands from the lists that [producer:queue] names"

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

    def names(self) -> list[str]:
        """Return the Redis keys of all queues."""
        return [self.name, *(f"{self.name}.{number}" for number in range(self.shards))]


PRODUCERS: Mapping[str, type[ProducerSection]] = {
    "queue": QueueSettings,
    "seaf_hooks": SeafHooksSettings,
    "socketio_emitter": EmitterSettings,
    "spool": SpoolSettings,
}
