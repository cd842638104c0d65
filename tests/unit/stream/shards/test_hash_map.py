"""stream/shards: hash tags, and the servers that rendezvous hashing chooses."""

from __future__ import annotations

from collections import Counter

import pytest

from relay.config.settings import RedisSettings
from relay.core.errors import ConfigError
from relay.core.model import Channel
from relay.process.embedded import redis_address
from relay.stream.connection.connect import cluster_seeds, describe, servers_of
from relay.stream.shards.hash_map import HashMap
from relay.stream.shards.making import keys_of, shard_map
from relay.stream.shards.shard import slot_of, tag_of

A, B, C, D = (f"redis://user:pw@{letter}:7000/0" for letter in "abcd")
CHANNELS = [Channel(f"room:{number}") for number in range(3000)]


def names(*urls: str) -> list[str]:
    """Return the server of each channel."""
    settings = RedisSettings(url=", ".join(urls))
    shards, keys = shard_map(settings), keys_of(settings)
    return [shards.shard_of(keys.stream(channel)).name for channel in CHANNELS]


@pytest.mark.parametrize(
    ("key", "tag"),
    [
        (b"relay:stream:{news}", b"news"),
        (b"relay:uid:{a}:{b}", b"a"),
        (b"no tag", b"no tag"),
        (b"empty {} tag {x}", b"empty {} tag {x}"),
        (b"open {", b"open {"),
        (b"{{a}}", b"{a"),
    ],
)
def test_tags(key: bytes, tag: bytes) -> None:
    assert tag_of(key) == tag


def test_slots_are_those_of_the_cluster_specification() -> None:
    assert slot_of(b"123456789") == 0x31C3
    assert slot_of(b"a{123456789}b") == 0x31C3


def test_servers_get_equal_shares_that_depend_only_on_their_names() -> None:
    found = names(A, B, C)
    assert all(800 < count < 1200 for count in Counter(found).values())
    assert found == names(C, A, B)
    others = [url.replace("user:pw", "someone:else") for url in (A, B, C)]
    assert found == names(*others)
    # These names are stored nowhere: a change of the hash would move all streams.
    assert "".join(name[0] for name in found[:24]) == "aaacacbcabbcbbabacbbabba"


def test_one_more_server_takes_its_share_only() -> None:
    before, after = names(A, B, C), names(A, B, C, D)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"d:7000"}
    assert 600 < len(moved) < 900
    for old, new in zip(before, names(A, C), strict=True):
        assert old == new or old == "b:7000"


def test_keys_of_no_channel_are_on_one_server() -> None:
    settings = RedisSettings(url=f"{A},{B},{C}")
    shards, keys = shard_map(settings), keys_of(settings)
    site = [keys.control, keys.nodes, keys.takers, keys.lease("x"), keys.store("y"), keys.node("z")]
    assert {shards.shard_of(key) for key in site} == {shards.home}
    single = RedisSettings(url=A)
    assert keys_of(single).control == b"relay:control"
    assert isinstance(shard_map(single), HashMap)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (f"{A}, redis://other:pw@a:7000", "twice"),
        (f"{A}, redis+cluster://b", "not a Redis Cluster"),
        (f"{A}, redis://:secret@b:port", "host:port"),
        ("redis+cluster://:secret@a/1", "one database"),
        ("sentinel://s:1/main, sentinel://s:2/main", "twice; Sentinels must monitor each"),
        ("redis://a,b", "redis://HOST1, redis://HOST2"),
        ("redis://a:1,b:2", "redis://HOST1, redis://HOST2"),
        ("redis://a, redis://b,", "redis://HOST1, redis://HOST2"),
        ("redis://:secret@a redis://b", "redis://HOST1, redis://HOST2"),
        ("redis://a;redis://b", "redis://HOST1, redis://HOST2"),
        ("redis://a, embedded", "redis://HOST1, redis://HOST2"),
        ("embedded, redis://a", "not the embedded one"),
        ("redis+cluster://a, redis://b", "not a Redis Cluster"),
        ("Redis+Cluster://a, redis+cluster://b", r"redis\+cluster://HOST1,HOST2"),
        ("redis+cluster://:secret@a,:secret@b", "user and password once"),
        ("sentinel://u:secret@s1,u:secret@s2/main", "user and password once"),
    ],
)
def test_wrong_lists(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        shard_map(RedisSettings(url=url))
    assert "secret" not in str(refused.value)
    assert ":pw" not in str(refused.value)


def test_ways_to_write_one_address() -> None:
    plain = HashMap(servers_of(RedisSettings(url="redis://a, redis://[2001:db8::1]:7000/2")))
    other = "rediss://[2001:DB8:0::0001]:7000/02,REDIS://u:p@A.:6379/"
    assert HashMap(servers_of(RedisSettings(url=other))).names() == plain.names()
    assert cluster_seeds(RedisSettings(url="Redis+Cluster://a"))
    settings = RedisSettings(url="sentinel://s1, s2/my%2Fmain/3, redis://a")
    assert describe(settings) == "primary my/main by Sentinel at s1:26379, s2:26379, a"
    with pytest.raises(ConfigError, match="contains a:6379/0 twice"):
        servers_of(RedisSettings(url="redis://a, redis://A"))


def test_sentinels_have_commas_of_their_own() -> None:
    settings = RedisSettings(url="sentinel://s1:1,s2:2/one/3,sentinel://s1:1,s2:2/two")
    assert [shard.name.split()[1] for shard in shard_map(settings).shards] == ["one", "two"]


def test_cluster_nodes() -> None:
    settings = RedisSettings(url="rediss+cluster://anna:p%40@a:1, b,[::1]:2")
    seeds = cluster_seeds(settings)
    assert [(seed.host, seed.port) for seed in seeds] == [("a", 1), ("b", 6379), ("::1", 2)]
    assert all(seed.tls and seed.username == "anna" and seed.password == "p@" for seed in seeds)
    assert describe(settings) == "cluster at a:1, b:6379, [::1]:2"
    assert keys_of(settings).control == b"relay:{site}control"


@pytest.mark.parametrize("port", [6379, 6399])
def test_the_embedded_server_has_one_name(port: int) -> None:
    settings = RedisSettings(url="embedded", embedded_port=port)
    # Workers use its address, commands that run beside them use the setting.
    assert describe(settings) == describe(redis_address(settings))
