"""The settings of relay: name, type, default, range and description.

`relay.config.loading` reads their values from file, environment and command line. The description
is the comment in config.example.ini. Protocols declare their settings in their own folders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from typing_extensions import override

from relay.config.lists import split
from relay.core.client_address import TrustedProxies
from relay.core.durability import Durability

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:;/@\[\]?#]+)(:[0-9]{1,5})?")


class Section(BaseModel):
    """Base class of all sections. Unknown keys are errors, and values are immutable.

    A protocol may have subsections [protocol:PROTOCOL:NAME]. `sections_by_name` is the field that
    receives them as a mapping by NAME, and their class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)
    sections_by_name: ClassVar[tuple[str, type[Section]] | None] = None
    # Settings of a protocol that need a restart.
    fixed: ClassVar[frozenset[str]] = frozenset({"enabled", "host", "port", "tls_cert", "tls_key"})
    # Settings that replace others which an earlier source sets.
    instead_of: ClassVar[Mapping[str, frozenset[str]]] = {}
    # Settings of earlier versions, with the text of a note. They are accepted but not used.
    removed: ClassVar[Mapping[str, str]] = {}

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
        """Return the reason why a configured protocol cannot be served, '' if there is none.

        A protocol is configured if any of its settings is.
        """
        if not self.model_fields_set or not getattr(self, "enabled", True) or not self.missing:
            return ""
        instead = ", or enabled = no" if "enabled" in type(self).model_fields else ""
        return f"{self.missing} is not set, so this protocol cannot be served. Set it{instead}"

    @classmethod
    def from_removed(cls, values: Mapping[str, str]) -> Mapping[str, str]:  # noqa: ARG003
        """Return the settings that replace `values` of removed ones, unless they are set."""
        return {}

    @classmethod
    def settings(cls) -> dict[str, FieldInfo]:
        """Return the fields that are settings: all except the one for subsections."""
        own = cls.sections_by_name[0] if cls.sections_by_name else ""
        return {name: field for name, field in cls.model_fields.items() if name != own}


class ListenerSection(Section):
    """Section of a protocol, which may have a listener of its own."""

    host: str = Field("", description="Address of a separate listener for this protocol. Used only if port is set. Empty: the address of [server].")
    port: int = Field(0, ge=0, le=65535, description="Port of a separate listener for this protocol. 0: use the listener of [server].")
    tls_cert: str = Field("", description="PEM file with the certificate chain of the separate listener. Empty: the certificate of [server].")
    tls_key: str = Field("", description="PEM file with the private key of tls_cert.")


class NodeSettings(Section):
    """[node]: Process and workers."""

    name: str = Field(
        "",
        max_length=100,
        pattern=r"^[A-Za-z0-9._-]*$",
        description="Name of this process in consumer groups, metrics and logs. Empty: hostname_port.",
    )
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Number of worker processes that share the ports. Use about one per processor core.",
    )
    pid_file: str = Field("", description="File for the process ID, written at start and removed on shutdown. Empty: no file.")
    internal_address: str = Field(
        "",
        pattern=r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])?(:[0-9]{1,5})?$",
        description="Address, as host or host:port, at which workers of other hosts reach this one to pass on requests of their clients. With several workers, the second worker uses the next port, and so on. Without a port, the system chooses one. Empty: the local address of the connection to Redis if Redis runs on another host; otherwise no other host can pass on requests to this one.",
    )
    drain_per_s: int = Field(
        1000,
        ge=1,
        le=1000000,
        description="On shutdown, ask this many clients per second to reconnect, all workers of this relay together. The rest of the site must be able to accept them at this rate.",
    )
    drain_s: float = Field(
        60.0,
        ge=0,
        le=300,
        description="Maximum time for asking clients to reconnect. If there are more clients than drain_per_s times this number, they are asked faster. Set it below the time after which the service manager kills relay.",
    )


class ServerSettings(Section):
    """[server]: Listener that all protocols share."""

    removed: ClassVar[Mapping[str, str]] = {
        "backlog": "is no longer read; the kernel's net.core.somaxconn applies"
    }

    host: str = Field("127.0.0.1", description="Address to listen on, or several separated by commas. Use 0.0.0.0 for all IPv4 addresses and :: for all IPv4 and IPv6 addresses.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on. 0 selects a free port.")
    tls_cert: str = Field("", description="PEM file with the certificate chain. Empty: no TLS.")
    tls_key: str = Field("", description="PEM file with the private key of tls_cert.")
    trusted_proxies: str = Field(
        "",
        description="Proxies in front of relay, separated by commas: addresses, or networks such as 10.0.0.0/8. Their X-Forwarded-For is used as the client's address (limits per address, journal, log) and X-Forwarded-Proto for the console's cookie. Each of them must append to X-Forwarded-For and overwrite X-Forwarded-Proto.",
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, text: str) -> str:
        TrustedProxies(split(text))
        return text


class LogSettings(Section):
    """[log]: Logging. Tokens and payloads are never logged."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level that is logged.")
    format: Literal["plain", "json"] = Field(
        "plain", description="Log format: plain text for people, JSON for machines. Both have one line per event.")
    file: str = Field("", description="Log file, reopened on SIGUSR1. Empty: log to standard error.")


class JournalSettings(Section):
    """[journal]: Record of what happens to clients, for `relay events` and `relay explain`."""

    events: int = Field(
        10000,
        ge=0,
        le=10000000,
        description="Approximate number of the latest events that each worker keeps in Redis: connections, rejections, subscriptions, disconnections and notices. 0 disables the journal.",
    )


class RedisSettings(Section):
    """[redis]: Connection to Redis."""

    instead_of: ClassVar[Mapping[str, frozenset[str]]] = {
        "url": frozenset({"sentinels", "master_name"}),
        "sentinels": frozenset({"url"}),
        "master_name": frozenset({"url"}),
    }

    url: str = Field(
        "embedded",
        description="Redis server that holds the streams: embedded (relay starts its own Valkey), redis://[user:pw@]host:port/db, rediss://..., unix:///path?db=0, redis+sentinel://[user:pw@]host:port,host:port/master-name/db, or rediss+sentinel://... for TLS to Sentinels and servers. Several URLs, separated by commas: channels are distributed over these servers. redis+cluster://[user:pw@]host:port,host:port or rediss+cluster://... for a Redis Cluster: name some of its nodes.",
    )
    sentinels: str = Field(
        "",
        description="Sentinels to ask for the primary, as host:port, separated by commas. Used with master_name, instead of url.",
    )
    master_name: str = Field("", description="Name of the primary in the configuration of the Sentinels.")
    user: str = Field("", description="Redis user, used if the URL has none. Empty: the user default.")
    password: SecretStr = Field(
        SecretStr(""),
        description="Redis password, used if the URL has none. After a reload, new connections use the new one.",
    )
    db: int = Field(0, ge=0, le=1000000, description="Redis database number, used with sentinels. With url, set the database in the URL.")
    tls: bool = Field(False, description="Use TLS to the servers that the Sentinels name. With url, its scheme decides.")
    sentinel_user: str = Field("", description="User of the Sentinels. Empty: the user default.")
    sentinel_password: SecretStr = Field(
        SecretStr(""), description="Password of the Sentinels.")
    sentinel_tls: Literal["same", "yes", "no"] = Field(
        "same", description="Use TLS to the Sentinels: yes, no, or the same as to the servers that they name.")
    tls_ca: str = Field(
        "",
        description="PEM file with the certificate authorities for TLS. Empty: use the authorities of the system.",
    )
    tls_cert: str = Field(
        "",
        description="PEM file with a client certificate for TLS. Redis requires one unless tls-auth-clients is no.",
    )
    tls_key: str = Field("", description="PEM file with the private key of tls_cert. Empty: it is in tls_cert.")
    prefix: str = Field(
        "relay:", max_length=50, pattern=r"^[^\s{}]*$", description="Prefix of every Redis key.")
    connect_timeout_s: float = Field(
        2.0, gt=0, le=60, description="Timeout for connecting to Redis, including authentication.")
    command_timeout_s: float = Field(
        5.0, gt=0, le=300, description="Timeout for a reply from Redis. After it, the connection is closed and opened again.")
    embedded_dir: str = Field(
        "", description="Data directory of the embedded Valkey. Empty: the directory data in the working directory.")
    embedded_port: int = Field(
        6399, ge=1, le=65535, description="Port of the embedded Valkey on the loopback address, for redis-cli.")


    @model_validator(mode="after")
    def _url_from_sentinels(self) -> Self:
        """Express the settings for Sentinel as a URL, which is all that other code reads."""
        if not (self.sentinels or self.master_name):
            return self
        if not (self.sentinels and self.master_name):
            raise ValueError("sentinels and master_name must be set together")
        if self.url != "embedded":
            raise ValueError("set either url, or sentinels and master_name")
        addresses = split(self.sentinels)
        if not addresses:
            raise ValueError("sentinels must name at least one Sentinel")
        for address in addresses:
            if not _ADDRESS.fullmatch(address):
                raise ValueError(
                    f"sentinels: {address} must be host:port, with an IPv6 address in brackets"
                )
        scheme = "rediss+sentinel" if self.tls else "redis+sentinel"
        url = f"{scheme}://{','.join(addresses)}/{quote(self.master_name, '')}/{self.db}"
        # The section is frozen for its users.
        object.__setattr__(self, "url", url)
        return self


class StreamSettings(Section):
    """[stream]: Reading of streams."""

    removed: ClassVar[Mapping[str, str]] = {
        "resume_concurrency": "is no longer read; a worker reads 4 streams at a time for clients that catch up"
    }

    page_bytes: int = Field(
        262144,
        ge=4096,
        le=16777216,
        description="Target size of one read from a stream. Until the sizes of a stream's entries are known, a catch-up read may take up to 32 MiB.",
    )
    max_entry_bytes: int = Field(
        4194304,
        ge=1024,
        le=67108864,
        description="Maximum size of an entry. Larger entries are moved to the dead letters.",
    )
    sweep_s: float = Field(
        300.0,
        ge=1,
        le=86400,
        description="Read every followed stream at least once per this interval, in case an invalidation from Redis was lost.",
    )
    canary_s: float = Field(
        0.5,
        ge=0.1,
        le=10,
        description="Interval between checks that invalidations from Redis arrive. /readyz fails after three missed checks.",
    )
    tracking: Literal["auto", "off"] = Field(
        "auto",
        description="How to wait for new entries. auto uses client-side caching invalidations if the server supports them; off always polls with blocking reads.",
    )


class HubSettings(Section):
    """[hub]: Limits of clients of all protocols."""

    client_buffer_bytes: int = Field(
        262144,
        ge=4096,
        le=67108864,
        description="Maximum data queued for one client. A client that exceeds it is paused and catches up from the stream.",
    )
    connections_per_user: int = Field(
        0, ge=0, le=1000000, description="Maximum connections per user across all workers and hosts. 0 means unlimited.")


class RightsSettings(Section):
    """[rights]: Application that checks read access, for namespaces whose rights include http."""

    http_url: str = Field(
        "",
        description="URL of the application that decides who may read a channel, for namespaces whose rights include http. Relay sends POST {user, channel, groups}; status 200 with {\"read\": true} grants access. Empty: disabled.",
    )
    http_timeout_ms: int = Field(
        1000, ge=10, le=60000, description="Timeout for the application's answer. Access is denied after it.")
    http_cache_s: float = Field(30.0, ge=1, le=86400, description="Time for which an answer is cached. The application can invalidate it earlier.")
    http_token: SecretStr = Field(
        SecretStr(""), description="Token sent to http_url as Authorization: Bearer.")


class JwtSettings(Section):
    """[jwt]: Tokens of the native protocol."""

    algorithm: Literal[
        "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "EdDSA"
    ] = Field("HS256", description="Signature algorithm. Tokens that use any other are rejected.")
    key: SecretStr = Field(
        SecretStr(""),
        description="JWT signing secret for HS*, or PEM public key for RS*/ES*/EdDSA. Separate several keys with a line \"---\" to rotate them; relay signs with the first. Leave empty to reject all tokens.",
    )
    audience: str = Field("", description="Required audience (aud) of a token. Empty: not checked.")
    issuer: str = Field("", description="Required issuer (iss) of a token. Empty: not checked.")
    leeway_s: float = Field(
        0.0, ge=0, le=300, description="Clock difference that is tolerated when exp and nbf are checked.")


class MetricsSettings(Section):
    """[metrics]: Listener for /metrics, /healthz and /readyz."""

    host: str = Field("127.0.0.1", description="Address of a separate listener for /metrics, /healthz and /readyz. Used only if port is set.")
    port: int = Field(0, ge=0, le=65535, description="Port of the separate listener. With several workers, the second worker uses the next port, and so on; /metrics of each adds up all workers. 0: use the listener of [server].")


class TracingSettings(Section):
    """[tracing]: Traces with OpenTelemetry, which needs the packages of relay[otel]."""

    otlp_url: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="URL at which an OpenTelemetry collector receives traces (OTLP over HTTP), for example http://127.0.0.1:4318/v1/traces. The environment variables of the SDK apply, such as OTEL_TRACES_SAMPLER. Empty: no traces.",
    )


class ConsoleSettings(ListenerSection):
    """[console]: Operator console at /console, and its admin API."""

    fixed: ClassVar[frozenset[str]] = Section.fixed | {"redis_url"}

    password: SecretStr = Field(SecretStr(""), description="Password of the console. Leave empty to disable the console.")
    redis_url: SecretStr = Field(SecretStr(""), description="URL of the same Redis with a user that has the rights of an operator, for example to requeue dead letters and revoke rights (the user maintenance in docs/redis.md). Empty: the console uses relay's own connection, and Redis may reject such actions.")
    host: str = Field("", description="Address of a separate listener for the console. Used only if port is set. Empty: the address of [server].")
    port: int = Field(0, ge=0, le=65535, description="Port of a separate listener for the console. 0: use the listener of [server].")
    tls_cert: str = Field("", description="PEM file with the certificate chain of the separate listener. Empty: the certificate of [server].")
    tls_key: str = Field("", description="PEM file with the private key of tls_cert.")


class JobSettings(Section):
    """[jobs]: Periodic jobs that one worker runs for all workers."""

    retention_s: float = Field(
        60.0,
        ge=1,
        le=86400,
        description="Interval between trims of streams that other programs append to. To keep all entries, set the limits of a namespace to 0.",
    )
    dead_nodes_s: float = Field(
        15.0,
        ge=1,
        le=3600,
        description="Interval between searches for workers that died without removing their consumer groups.",
    )


class PublishSettings(Section):
    """[publish]: Events appended through relay: HTTP API, queue and command line."""

    uid_window_s: float = Field(
        600.0,
        ge=0,
        le=2592000,
        description="Time during which an event with the same uid on the same channel is not appended again; the producer receives the ID of the first one. 0 disables deduplication.",
    )
    timeout_s: float = Field(
        2.0,
        gt=0,
        le=60,
        description="Timeout for a connection to Redis, and again for its reply, before the producer receives an error.",
    )


class NamespaceSettings(Section):
    """[namespace:NAME]: Rules for channels NAME:...; [namespace] applies to all other channels."""

    removed: ClassVar[Mapping[str, str]] = {
        "wait_replicas": "was replaced by durability; wait_replicas = N is durability = replicated:N"
    }

    rights: str = Field(
        "door, claims, hash",
        pattern=r"^\s*((door|claims|hash|http|anonymous)(\s*,\s*(door|claims|hash|http|anonymous))*)?\s*$",
        description="Sources that can grant access to a channel, separated by commas: door (the rule of the protocol that the namespace belongs to, for its own clients), claims (the token names the channel), hash (the rights hash in Redis), http (the application), anonymous (everyone).",
    )
    retention_count: int = Field(
        10000, ge=0, le=1000000000, description="Approximate number of entries kept per stream. 0 means unlimited.")
    retention_age_s: int = Field(
        604800, ge=0, le=3153600000, description="Approximate time for which entries are kept. 0 means unlimited.")
    durability: str = Field(
        "fast",
        description="What must be true of an event appended through relay before its publisher receives a success: fast (appended), replicated:N:MS (N replicas have received it within MS milliseconds) or fsynced:N:MS (the primary and N replicas have written it to disk; Redis 7.2 or Valkey with an append-only file). Without N: 1 for replicated, 0 for fsynced. Without MS: most of [publish] timeout_s. A request can choose another durability.",
    )
    unique_uids: bool = Field(
        True,
        description="Append only the first of several events with the same uid within [publish] uid_window_s. When disabled, the HTTP API and the queue append all of them, as Centrifugo v1 does.",
    )

    @field_validator("durability")
    @classmethod
    def _is_durability(cls, text: str) -> str:
        Durability.parse(text)
        return text

    @classmethod
    @override
    def from_removed(cls, values: Mapping[str, str]) -> Mapping[str, str]:
        if "wait_replicas" not in values:
            return {}
        replicas = values["wait_replicas"].strip()
        return {"durability": "fast" if replicas.strip("0") == "" else f"replicated:{replicas}"}

    def sources(self) -> frozenset[str]:
        """Return the rights sources as a set."""
        return frozenset(split(self.rights))
