"""[protocol:seafile]: the door of Seafile's clients and servers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr

from relay.config.settings import Section


class SeafileSettings(Section):
    """[protocol:seafile]: Seafile's notification server, versions 10 to 13."""

    enabled: bool = Field(True, description="off: none of its paths exist")
    key: SecretStr = Field(SecretStr(""), description="jwt_private_key of seafile.conf, or JWT_PRIVATE_KEY of conf/.env: signs what servers and clients send; several for rotation, separated by a line with ---; with neither this nor notification_token none of its paths exist")
    notification_token: SecretStr = Field(SecretStr(""), description="shared secret of the first 10.0 servers, sent to /events as it is; empty: only signed tokens count")
    host: str = Field("", description="address of a listener of its own; empty: the one of [server]; counts only with a port")
    port: int = Field(0, ge=0, le=65535, description="port of a listener of its own, with Seafile 8083; 0: the shared listener of [server]")
    tls_cert: str = Field("", description="path of a PEM certificate chain for a listener of its own; empty: that of [server]")
    tls_key: str = Field("", description="path of its PEM private key")
    client_tokens_post: bool = Field(False, description="on: as upstream, a token that a client got for subscribing also lets it post events to /events")
    events_max_bytes: int = Field(1048576, ge=1024, le=67108864, description="bytes of one request to /events; a larger one is answered with 413")
    message_max_bytes: int = Field(8388608, ge=4096, le=67108864, description="bytes of one message from a client; a larger one closes with 1009. A library takes about 400")
    ping_s: float = Field(1.0, ge=0.2, le=3600, description="seconds of silence after which a client is sent a ping; the sync clients send their own each second, and need none")
    pong_timeout_s: float = Field(15.0, ge=1, le=3600, description="seconds a client may be silent after a ping before it is closed, so that it comes back")
    missed_s: int = Field(86400, ge=0, le=31536000, description="seconds for which it is remembered what a user's client has seen of each library; when it comes back it is sent what it missed; 0: nothing is. Browsers are never sent any")
    missed_events: int = Field(100, ge=1, le=10000, description="newest events of a library that are looked through for what a client missed: the last repo-update and all of locks and permissions")
    groups: Literal["redis", "database"] = Field("redis", description="where a group's members are: redis has a set <prefix>group:seafile:<id> of user names, database is Seafile's ccnet database. If they are not known, an event for the group is not delivered, and the log says so")
    groups_cache_s: float = Field(30.0, ge=0, le=86400, description="seconds for which a group's members are remembered")
    db_host: str = Field("127.0.0.1", description="host of the ccnet database (MySQL, MariaDB)")
    db_port: int = Field(3306, ge=1, le=65535, description="its port")
    db_socket: str = Field("", description="path of its Unix socket; empty: host and port")
    db_user: str = Field("seafile", description="a user that may SELECT from GroupUser there")
    db_password: SecretStr = Field(SecretStr(""), description="that user's password")
    db_name: str = Field("ccnet_db", description="name of the ccnet database")
    db_tls: bool = Field(False, description="on: connect with TLS; the server's certificate is not checked, as Seafile does not")

    @property
    def missing(self) -> str:
        """See `Section`. Without a key anyone could sign."""
        secrets = self.key, self.notification_token
        if any(secret.get_secret_value() for secret in secrets):
            return ""
        return "key (jwt_private_key in seafile.conf, JWT_PRIVATE_KEY in conf/.env or the environment)"


SETTINGS = SeafileSettings
