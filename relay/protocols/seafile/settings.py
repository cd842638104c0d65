"""Settings of the Seafile protocol."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr
from typing_extensions import override

from relay.config.settings import ListenerSection


class SeafileSettings(ListenerSection):
    """[protocol:seafile]: Notification server for Seafile 10 to 13."""

    enabled: bool = Field(True, description="Enable this protocol. When disabled, its URLs return 404.")
    key: SecretStr = Field(SecretStr(""), description="Secret that signs the tokens of Seafile's server and clients: jwt_private_key in seafile.conf or JWT_PRIVATE_KEY in conf/.env. Separate several keys with a line \"---\" to rotate them. The protocol is disabled if both this and notification_token are empty.")
    notification_token: SecretStr = Field(SecretStr(""), description="Shared secret that early 10.0 servers send to /events in plain text. Empty: accept only signed tokens.")
    client_tokens_post: bool = Field(False, description="Allow clients to post events to /events with the token for subscribing, as Seafile's own server does.")
    events_max_bytes: int = Field(1048576, ge=1024, le=67108864, description="Maximum size of one request to /events. Larger requests are rejected with status 413.")
    message_max_bytes: int = Field(8388608, ge=4096, le=67108864, description="Maximum size of one message from a client. A larger message closes the connection with code 1009. Each library takes about 400 bytes.")
    ping_s: float = Field(1.0, ge=0.2, le=3600, description="Send a ping to a client that has been silent for this time. Sync clients send their own ping every second.")
    pong_timeout_s: float = Field(15.0, ge=1, le=3600, description="Close a client's connection if it stays silent for this time after a ping, so that it reconnects.")
    missed_s: int = Field(86400, ge=0, le=31536000, description="Time for which relay stores what a sync client has seen of each library, to send missed events when it reconnects. 0 disables it. Browsers do not receive missed events.")
    missed_events: int = Field(100, ge=1, le=10000, description="Number of recent events per library that are searched for missed ones: the last repo-update and all locks and permissions.")
    groups: Literal["redis", "database"] = Field("redis", description="Source of group members. redis reads the set <prefix>group:seafile:<id> of user names; database reads Seafile's ccnet database. If the members are unknown, events for the group are not delivered, and the log reports it.")
    groups_cache_s: float = Field(30.0, ge=0, le=86400, description="Time for which the members of a group are cached.")
    db_host: str = Field("127.0.0.1", description="Host of the ccnet database (MySQL or MariaDB).")
    db_port: int = Field(3306, ge=1, le=65535, description="Port of the ccnet database.")
    db_socket: str = Field("", description="Unix socket of the ccnet database. Empty: use db_host and db_port.")
    db_user: str = Field("seafile", description="Database user with the SELECT privilege on GroupUser.")
    db_password: SecretStr = Field(SecretStr(""), description="Password of db_user.")
    db_name: str = Field("ccnet_db", description="Name of the ccnet database.")
    db_tls: bool = Field(False, description="Connect to the database with TLS. The server's certificate is not verified, as in Seafile.")

    @property
    @override
    def missing(self) -> str:
        # Without a key, anyone could sign tokens.
        secrets = self.key, self.notification_token
        if any(secret.get_secret_value() for secret in secrets):
            return ""
        return "key (jwt_private_key in seafile.conf, JWT_PRIVATE_KEY in conf/.env or the environment)"


SETTINGS = SeafileSettings
