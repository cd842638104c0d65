"""Table of all options of Centrifugo v1.8.0, and how relay handles them.

Sources for names, types, flags and variables: centrifugo/main.go, libcentrifugo/config.go and
engineredis of v1.8.0, and its documentation. docs/centrifugo.md has the same table, and a test
compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

_DOOR = "protocol:centrifugo"


class OptionHandling(Enum):
    """How relay handles an option. The values are used in docs/centrifugo.md."""

    MAPPED = "mapped"
    IGNORED = "no effect"
    REFUSED = "refused"


class OptionKind(Enum):
    """Type of an option. The values are used in error messages."""

    SWITCH = "true or false"
    NUMBER = "a number"
    TEXT = "text"
    LIST = "a list of objects"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One of Centrifugo's options.

    `to` are relay's settings, SECTION.KEY. If there are several, or `made` is set, `imported.py`
    computes them. `flag` is the help text, or '' if the option has no flag. `env` is True if the
    option can be set as CENTRIFUGO_NAME.
    """

    name: str
    kind: OptionKind
    handling: OptionHandling = OptionHandling.MAPPED
    to: tuple[str, ...] = ()
    made: bool = False
    env: bool = False
    flag: str = ""
    short: str = ""


def _own(name: str, kind: OptionKind, *, env: bool = False, flag: str = "", short: str = "") -> Option:
    return Option(name=name, kind=kind, to=(f"{_DOOR}.{name}",), env=env, flag=flag, short=short)


def _made(name: str, kind: OptionKind, *to: str, env: bool = False, flag: str = "", short: str = "") -> Option:
    return Option(name=name, kind=kind, to=to, made=True, env=env, flag=flag, short=short)


def _ignored(name: str, kind: OptionKind, *, env: bool = False, flag: str = "") -> Option:
    return Option(name=name, kind=kind, handling=OptionHandling.IGNORED, env=env, flag=flag)


_SWITCH, _NUMBER, _TEXT = OptionKind.SWITCH, OptionKind.NUMBER, OptionKind.TEXT

CHANNEL_OPTIONS: Mapping[str, OptionKind] = {
    "watch": _SWITCH,
    "publish": _SWITCH,
    "anonymous": _SWITCH,
    "presence": _SWITCH,
    "join_leave": _SWITCH,
    "recover": _SWITCH,
    "history_size": _NUMBER,
    "history_lifetime": _NUMBER,
    "history_drop_inactive": _SWITCH,
}
_REDIS_URL = ("redis.url", "redis.password")

_ALL = (
    _own("secret", _TEXT, env=True),
    _own("connection_lifetime", _NUMBER, env=True),
    *(_own(name, kind, env=True) for name, kind in CHANNEL_OPTIONS.items()),
    _made("namespaces", OptionKind.LIST, f"{_DOOR}:NAME"),
    _own("insecure", _SWITCH, env=True, flag="start in insecure client mode"),
    _own("insecure_api", _SWITCH, env=True, flag="accept requests to /api/ without a signature"),
    _own("insecure_admin", _SWITCH, env=True, flag="open the admin socket without a password"),
    _own("max_channel_length", _NUMBER),
    _own("private_channel_prefix", _TEXT),
    _own("namespace_channel_boundary", _TEXT),
    _own("user_channel_boundary", _TEXT),
    _own("user_channel_separator", _TEXT),
    _own("client_channel_boundary", _TEXT),
    _own("user_connection_limit", _NUMBER),
    _own("client_channel_limit", _NUMBER),
    _own("client_request_max_size", _NUMBER),
    _own("client_queue_max_size", _NUMBER),
    _ignored("client_queue_initial_capacity", _NUMBER),
    _own("client_message_write_timeout", _NUMBER),
    _own("ping_interval", _NUMBER),
    _ignored("presence_ping_interval", _NUMBER),
    _ignored("presence_expire_interval", _NUMBER),
    _own("stale_connection_close_delay", _NUMBER),
    _own("expired_connection_close_delay", _NUMBER),
    _own("node_ping_interval", _NUMBER),
    _own("node_metrics_interval", _NUMBER),
    _own("sockjs_url", _TEXT),
    _own("sockjs_heartbeat_delay", _NUMBER),
    _own("websocket_compression", _SWITCH),
    _own("websocket_compression_min_size", _NUMBER),
    _own("websocket_compression_level", _NUMBER),
    _ignored("websocket_read_buffer_size", _NUMBER),
    _ignored("websocket_write_buffer_size", _NUMBER),
    _made("name", _TEXT, "node.name", flag="name of this node", short="n"),
    _made("address", _TEXT, f"{_DOOR}.host", env=True, flag="address to listen on (default: all interfaces)", short="a"),
    _made("port", _NUMBER, f"{_DOOR}.port", env=True, flag="port to listen on (default 8000)", short="p"),
    _own("api_port", _NUMBER, env=True, flag="port of a separate listener for /api/"),
    _own("admin_port", _NUMBER, env=True, flag="port of a separate listener for the admin paths"),
    _made("http_prefix", _TEXT, f"{_DOOR}.http_prefix"),
    _own("admin", _SWITCH, env=True, flag="open the admin socket"),
    _own("admin_password", _TEXT, env=True),
    _own("admin_secret", _TEXT, env=True),
    _made("web", _SWITCH, f"{_DOOR}.web", env=True, flag="open the console, the admin socket and /auth/", short="w"),
    Option(name="web_path", kind=_TEXT, handling=OptionHandling.REFUSED, env=True, flag="not supported together with --web"),
    _ignored("insecure_web", _SWITCH, env=True),
    _own("debug", _SWITCH, env=True, flag="open /debug/", short="d"),
    _made("ssl", _SWITCH, f"{_DOOR}.tls_cert", f"{_DOOR}.tls_key", env=True, flag="enable TLS; requires --ssl_cert and --ssl_key"),
    _made("ssl_cert", _TEXT, f"{_DOOR}.tls_cert", env=True, flag="file with the TLS certificate"),
    _made("ssl_key", _TEXT, f"{_DOOR}.tls_key", env=True, flag="file with the key of the TLS certificate"),
    Option(name="ssl_autocert", kind=_SWITCH, handling=OptionHandling.REFUSED),
    _ignored("ssl_autocert_host_whitelist", _TEXT),
    _ignored("ssl_autocert_cache_dir", _TEXT),
    _ignored("ssl_autocert_email", _TEXT),
    _ignored("ssl_autocert_force_rsa", _SWITCH),
    _ignored("ssl_autocert_server_name", _TEXT),
    _ignored("ssl_autocert_http", _SWITCH),
    _ignored("ssl_autocert_http_addr", _TEXT),
    _made("engine", _TEXT, "redis.url", env=True, flag="memory (the embedded Valkey) or redis", short="e"),
    _made("redis_host", _TEXT, *_REDIS_URL, env=True, flag="host of Redis (default 127.0.0.1)"),
    _made("redis_port", _TEXT, *_REDIS_URL, env=True, flag="port of Redis (default 6379)"),
    _made("redis_password", _TEXT, "redis.password", flag="password of Redis"),
    _made("redis_db", _TEXT, "redis.url", flag="database number of Redis (default 0)"),
    _made("redis_url", _TEXT, *_REDIS_URL, env=True, flag="redis://:PASSWORD@HOST:PORT/DB, overrides the other Redis options"),
    _made("redis_master_name", _TEXT, "redis.url", flag="name of the primary that Redis Sentinel monitors"),
    _made("redis_sentinels", _TEXT, "redis.url", flag="HOST:PORT of Redis Sentinels, separated by commas"),
    _made("redis_prefix", _TEXT, "producer:queue.name", "redis.prefix"),
    _made("redis_api", _SWITCH, "producer:queue.enabled", flag="execute commands from the Redis queue"),
    _made("redis_api_num_shards", _NUMBER, "producer:queue.shards", flag="number of additional queues, named .0 to .N-1"),
    _made("redis_connect_timeout", _NUMBER, "redis.connect_timeout_s"),
    _made("redis_read_timeout", _NUMBER, "redis.command_timeout_s"),
    _ignored("redis_write_timeout", _NUMBER),
    _ignored("redis_pool", _NUMBER, flag="no effect"),
    _ignored("redis_pubsub_num_workers", _NUMBER),
    _made("log_level", _TEXT, "log.level", flag="trace, debug, info, error, critical, fatal or none"),
    Option(name="log_file", kind=_TEXT, to=("log.file",), flag="log file (default: standard error)"),
    Option(name="pid_file", kind=_TEXT, to=("node.pid_file",), flag="file for the process ID"),
    _ignored("gomaxprocs", _NUMBER),
)

OPTIONS: Mapping[str, Option] = {option.name: option for option in _ALL}
