"""stream/connection/connect.py: parsing of URLs; no error or log contains a password."""

from __future__ import annotations

import pytest
from pydantic import SecretStr
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

from relay.config.settings import RedisSettings
from relay.core.errors import ConfigError, RedisUnavailable
from relay.stream.connection.connect import (
    CommandRefused,
    RedisEndpoint,
    command,
    discover,
    redis_client,
    translated,
)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("embedded", RedisEndpoint(host="127.0.0.1", port=6399)),
        ("redis://cache", RedisEndpoint(host="cache", password="fallback")),
        ("redis://cache:7000/2", RedisEndpoint(host="cache", port=7000, db=2, password="fallback")),
        ("redis://[::1]:7000", RedisEndpoint(host="::1", port=7000, password="fallback")),
        ("redis://[::1]/1", RedisEndpoint(host="::1", db=1, password="fallback")),
        ("redis://:p%40ss@h", RedisEndpoint(host="h", password="p@ss")),
        ("redis://anna:pw@h/", RedisEndpoint(host="h", username="anna", password="pw")),
        ("unix:///run/r.sock", RedisEndpoint(path="/run/r.sock", password="fallback")),
        ("unix://a:b@/r?db=4", RedisEndpoint(path="/r", db=4, username="a", password="b")),
    ],
)
async def test_urls(url: str, endpoint: RedisEndpoint) -> None:
    assert await discover(RedisSettings(url=url, password=SecretStr("fallback"))) == (
        endpoint if url != "embedded" else RedisEndpoint(host="127.0.0.1", port=6399)
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@h",
        "redis://:secret@h:port",
        "redis://:secret@h:99999",
        "redis://:secret@",
        "redis://:secret@h/name",
        "redis://:secret@h?db=1",
        "unix://:secret@relative",
        "unix://",
        "sentinel://:secret@h:1",
        "sentinel://:secret@h:1,/main",
        "sentinel://:secret@h:1/main/db",
    ],
)
async def test_a_wrong_url_is_one_line_without_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^\[redis\] url: ") as refused:
        await discover(RedisSettings(url=url))
    assert "secret" not in str(refused.value)


async def test_authorities_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="tls_ca"):
        await discover(RedisSettings(url="rediss://h", tls_ca="/nowhere/ca.pem"))


async def test_tls_checks_the_servers_name() -> None:
    endpoint = await discover(RedisSettings(url="rediss://h"))
    assert endpoint.tls is not None
    assert endpoint.tls.check_hostname


def test_an_endpoint_is_shown_without_its_password() -> None:
    endpoint = RedisEndpoint(host="::1", port=5, username="anna", password="secret")
    assert str(endpoint) == "[::1]:5"
    assert "secret" not in repr(endpoint)


async def test_redis_py_errors_leave_as_ours() -> None:
    with pytest.raises(CommandRefused) as refused, translated():
        raise ResponseError("WRONGTYPE Operation against a key")
    assert refused.value.code == "WRONGTYPE"
    with pytest.raises(RedisUnavailable), translated():
        raise RedisConnectionError("gone")
    with pytest.raises(RedisUnavailable), translated():
        raise ReadOnlyError("You can't write against a read only replica.")


async def test_sentinels_that_cannot_be_reached_are_named_without_a_repr() -> None:
    settings = RedisSettings(url="sentinel://127.0.0.1:1,127.0.0.1:2/main", connect_timeout_s=1)
    expected = r"^no Sentinel at 127.0.0.1:1, 127.0.0.1:2 returned a primary named main: [^<>]*$"
    with pytest.raises(RedisUnavailable, match=expected):
        await discover(settings)
    async with redis_client(settings) as client:
        with pytest.raises(
            RedisUnavailable,
            match=r"127.0.0.1:1 cannot be reached \(ConnectionError\); 127.0.0.1:2 cannot",
        ):
            await command(client, "PING")
