"""Every setting of the core: name, type, default, range, unit and why.

Pure declarations; `config.py` fills them from file, environment and command line. A field's
description is its comment line in config.example.ini. Doors declare theirs in their own folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change after the start.

    A door's section may have sections of its own, [protocol:DOOR:NAME]: `sections_by_name` is the
    field that gets them, as a mapping by NAME, and their class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)
    sections_by_name: ClassVar[tuple[str, type[Section]] | None] = None
    # Settings of a protocol that a reload cannot change.
    fixed: ClassVar[frozenset[str]] = frozenset({"enabled", "host", "port", "tls_cert", "tls_key"})
    # Setting -> section and setting of another section that it must equal; empty takes that value.
    same_as: ClassVar[Mapping[str, tuple[str, str]]] = {}

    @property
    def missing(self) -> str:
        """Return the setting of a protocol without which it cannot be served, '' if it is set."""
        return ""

    @property
    def is_open(self) -> bool:
        """Return True if the protocol is served."""
        return bool(getattr(self, "enabled", True)) and not self.missing

    @property
    def unservable(self) -> str:
        """Return why a protocol that somebody has configured cannot be served, '' if there is no
        such reason. A protocol of which nothing is set is not wanted."""
        if not self.model_fields_set or not getattr(self, "enabled", True) or not self.missing:
            return ""
        instead = ", or enabled = no" if "enabled" in type(self).model_fields else ""
        return f"{self.missing} is not set, so this protocol cannot be served. Set it{instead}"

    @classmethod
    def settings(cls) -> dict[str, FieldInfo]:
        """What can be set: every field but the one for the sections of its own."""
        own = cls.sections_by_name[0] if cls.sections_by_name else ""
        return {name: field for name, field in cls.model_fields.items() if name != own}


class NodeSettings(Section):
    """[node]: this process."""

    name: str = Field(
        "",
        max_length=100,
        pattern=r"^[A-Za-z0-9._-]*$",
        description="name in groups, metrics and logs; empty: hostname_port",
    )
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="processes that share the ports, each with its own part of the clients; about one a processor core",
    )
    pid_file: str = Field("", description="path; written at start, removed at stop; empty: none")
    drain_s: float = Field(
        5.0,
        ge=0,
        le=300,
        description="seconds over which clients are asked to reconnect at stop, so that they do not all come back at once",
    )


class ServerSettings(Section):
    """[server]: the shared listener of all doors."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes any free one")
    tls_cert: str = Field("", description="path of a PEM certificate chain; empty: no TLS")
    tls_key: str = Field("", description="path of its PEM private key")
    backlog: int = Field(
        4096,
        ge=1,
        le=65535,
        description="connections the kernel may hold until they are accepted; a reconnect storm needs many",
    )


class LogSettings(Section):
    """[log]: what is written, never a token or a payload."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level written"
    )
    format: Literal["plain", "json"] = Field(
        "plain", description="one line an event, for people or for machines"
    )
    file: str = Field("", description="path, opened again on SIGUSR1; empty: standard error")


class RedisSettings(Section):
    """[redis]: where the streams are."""

    url: str = Field(
        "embedded",
        description="embedded, redis://[user:pw@]host:port/db, rediss://..., unix:///path?db=0, or sentinel://[user:pw@]host:port,host:port/master-name/db",
    )
    password: SecretStr = Field(
        SecretStr(""),
        description="password where the URL has none (password_file: read it from a file)",
    )
    sentinel_password: SecretStr = Field(
        SecretStr(""), description="password of the Sentinels themselves"
    )
    tls_ca: str = Field(
        "",
        description="path of the PEM authorities that sign a rediss:// server; empty: the system's",
    )
    prefix: str = Field(
        "relay:", max_length=50, pattern=r"^[^\s{}]*$", description="start of every key"
    )
    connect_timeout_s: float = Field(
        2.0, gt=0, le=60, description="seconds for a connection and its greeting"
    )
    command_timeout_s: float = Field(
        5.0, gt=0, le=300, description="seconds for an answer before the connection is given up"
    )
    embedded_dir: str = Field(
        "", description="data folder of the embedded Valkey; empty: data in the working folder"
    )
    embedded_port: int = Field(
        6399, ge=1, le=65535, description="loopback port of the embedded Valkey, for redis-cli"
    )


class StreamSettings(Section):
    """[stream]: how streams are read."""

    page_bytes: int = Field(
        262144,
        ge=4096,
        le=16777216,
        description="target size of one read of a stream; until the sizes of its entries are known, catch-up reads at most 32 MiB at once",
    )
    max_entry_bytes: int = Field(
        4194304,
        ge=1024,
        le=67108864,
        description="bytes of one entry; a larger one goes to the dead letters",
    )
    sweep_s: float = Field(
        300.0,
        ge=1,
        le=86400,
        description="seconds over which every followed stream is read once without a wake-up, in case one was lost",
    )
    canary_s: float = Field(
        0.5,
        ge=0.1,
        le=10,
        description="seconds between two proofs that wake-ups arrive; /readyz turns false after three missing",
    )
    tracking: Literal["auto", "off"] = Field(
        "auto",
        description="auto uses client-side-caching invalidations where the server allows them; off always polls with blocking reads",
    )
    resume_concurrency: int = Field(
        4, ge=1, le=64, description="catch-up reads under way at once in one worker"
    )


class HubSettings(Section):
    """[hub]: clients, whatever their door."""

    client_buffer_bytes: int = Field(
        262144,
        ge=4096,
        le=67108864,
        description="bytes waiting for one client before it is served from the stream instead",
    )
    connections_per_user: int = Field(
        0, ge=0, le=1000000, description="connections of one user on all workers of all hosts; 0: no limit"
    )


class RightsSettings(Section):
    """[rights]: the application that is asked where a namespace lists http."""

    http_url: str = Field(
        "",
        description='URL asked with POST {user, channel, groups}; 200 with {"read": true} allows; empty: none',
    )
    http_timeout_ms: int = Field(
        1000, ge=10, le=60000, description="milliseconds for its answer; later is a refusal"
    )
    http_cache_s: float = Field(30.0, ge=1, le=86400, description="seconds an answer holds; the application may drop it at once")
    http_token: SecretStr = Field(
        SecretStr(""), description="sent as Authorization: Bearer to http_url"
    )


class JwtSettings(Section):
    """[jwt]: tokens of the native door."""

    algorithm: Literal[
        "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "EdDSA"
    ] = Field("HS256", description="the only algorithm accepted, whatever a token says")
    key: SecretStr = Field(
        SecretStr(""),
        description="secret (HS*) or PEM public key; several for rotation, separated by a line with ---; the first one signs; empty: tokens are refused",
    )
    audience: str = Field("", description="required aud; empty: not checked")
    issuer: str = Field("", description="required iss; empty: not checked")
    leeway_s: float = Field(
        0.0, ge=0, le=300, description="seconds of clock difference forgiven in exp and nbf"
    )


class MetricsSettings(Section):
    """[metrics]: /metrics, /healthz and /readyz."""

    host: str = Field("127.0.0.1", description="address of an own listener for the three")
    port: int = Field(0, ge=0, le=65535, description="its port; 0: they are on the shared listener. Of several workers the second has the next port, and so on")


class JobSettings(Section):
    """[jobs]: what one worker of the site does for all."""

    retention_s: float = Field(
        60.0,
        ge=1,
        le=86400,
        description="seconds between two trims of streams that others append to; 0 is not allowed, use a namespace without limits",
    )
    dead_nodes_s: float = Field(
        15.0,
        ge=1,
        le=3600,
        description="seconds between two looks for workers that died without removing their groups",
    )


class PublishSettings(Section):
    """[publish]: appends by the relay's own producers: HTTP, queue and command line."""

    uid_window_s: float = Field(
        600.0,
        ge=0,
        le=2592000,
        description="seconds in which an event with the uid of an earlier one of its channel is not appended again, and the producer gets the first one's ID; 0: it is appended again",
    )
    timeout_s: float = Field(
        2.0,
        gt=0,
        le=60,
        description="seconds for a connection to Redis, and then for its answer, before a producer gets an error",
    )


class QueueSettings(Section):
    """[producer:queue]: commands that others RPUSH, as Centrifugo v1's redis_api."""

    enabled: bool = Field(
        False,
        description="take commands from the queue; off, so that a Centrifugo on the same Redis keeps its own",
    )
    name: str = Field(
        "centrifugo.api",
        min_length=1,
        max_length=100,
        pattern=r"^[^\s{}]+$",
        description="key of the queue, without the relay's prefix",
    )
    shards: int = Field(
        0, ge=0, le=256, description="further queues NAME.0 to NAME.N-1; order holds within each"
    )
    batch: int = Field(
        256,
        ge=1,
        le=1000,
        description="commands carried out in one step; more is faster, and holds Redis up for longer",
    )


class NamespaceSettings(Section):
    """[namespace:NAME], and [namespace] for channels of every other namespace."""

    rights: str = Field(
        "door, claims, hash",
        pattern=r"^\s*((door|claims|hash|http|anonymous)(\s*,\s*(door|claims|hash|http|anonymous))*)?\s*$",
        description="who may read, any of: door (the rule of the door that the namespace belongs to, for who came in there), claims (the token names the channel), hash (the rights hash), http (the application), anonymous (everyone)",
    )
    retention_count: int = Field(
        10000, ge=0, le=1000000000, description="entries kept per stream, about; 0: no limit"
    )
    retention_age_s: int = Field(
        604800, ge=0, le=3153600000, description="seconds an entry is kept, about; 0: no limit"
    )
    wait_replicas: int = Field(
        0,
        ge=0,
        le=100,
        description="replicas that must confirm an append of the relay's own producers",
    )

    unique_uids: bool = Field(
        True,
        description="append only the first of several events that have the same uid within [publish] uid_window_s; off: the HTTP API and the queue append each of them, as Centrifugo v1 does",
    )

    def sources(self) -> frozenset[str]:
        """The rights sources as a set."""
        return frozenset(part.strip() for part in self.rights.split(",") if part.strip())
