"""The ACL rules of docs/redis.md are sufficient for each user and contain nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from relay.stream.connection.connect import command
from tests.support.valkey import DEFAULT_OFF, DOCUMENT, Flavour, Server, User, acl_lines, running

pytestmark = pytest.mark.redis
STREAM = "relay:stream:{news}"
RIGHTS = "relay:rights:{news}"
UID = "relay:uid:{news}:7d1f"
GROUP = "relay:web1:5f0c9a31"

# The commands of each user: relay's lines are those of relay/stream, the others' those of the page.
# In a Redis Cluster.
CLUSTER = ["CLUSTER SLOTS", "CLUSTER INFO", "SPUBLISH relay:ephemeral:{news} 1"]
SENT: dict[User, list[str]] = {
    "producer": [
        f"XADD {STREAM} MAXLEN ~ 1000 * data 1",
        "PUBLISH relay:ephemeral:{news} 1",
        "WAIT 0 1",
        "PING",
        "SELECT 0",
        f"EVAL script 2 {STREAM} {UID} 1000 * data 1",
        f"EVALSHA sha 2 {STREAM} {UID} 1000 * data 1",
        f"GET {UID}",
        f"SET {UID} 1-1 PX 1000",
        *CLUSTER,
    ],
    "relay": [
        *CLUSTER,
        "COMMAND",
        "ASKING",
        "SSUBSCRIBE relay:{site}bus:5f0c9a31",
        "SUNSUBSCRIBE relay:{site}bus:5f0c9a31",
        "PUBSUB SHARDCHANNELS relay:ephemeral:{*}",
        "PUBSUB SHARDNUMSUB relay:ephemeral:{news}",
        "XADD relay:{site}control * command disconnect",
        "RPUSH relay:taken:{centrifugo.api} 1",
        "HSET relay:applied:{news}:centrifugo.api batch 1",
        "CLIENT TRACKING ON",
        "INFO replication",
        "SELECT 0",
        "PING",
        "TIME",
        f"XLEN {STREAM}",
        "XLEN relay:control",
        "XLEN relay:canary:web1:5f0c9a31",
        f"XREADGROUP GROUP {GROUP} w NOACK STREAMS {STREAM} >",
        f"XREAD STREAMS {STREAM} $",
        f"XRANGE {STREAM} - +",
        "XREVRANGE relay:control + - COUNT 1",
        f"XADD {STREAM} * data 1",
        "XADD relay:control * command disconnect",
        "XADD relay:dead-letters * id 1-1",
        f"XTRIM {STREAM} MAXLEN 5",
        f"XGROUP CREATE {STREAM} {GROUP} $ MKSTREAM",
        f"XGROUP SETID {STREAM} {GROUP} $",
        f"XGROUP DESTROY {STREAM} {GROUP}",
        f"XINFO STREAM {STREAM}",
        f"XINFO GROUPS {STREAM}",
        f"MEMORY USAGE {STREAM} SAMPLES 0",
        f"HMGET {RIGHTS} anna",
        "MULTI",
        "EXEC",
        f"WATCH {STREAM}",
        "UNWATCH",
        "SUBSCRIBE relay:ephemeral:{news}",
        "PUBLISH relay:ephemeral:{news} 1",
        "PUBSUB CHANNELS relay:ephemeral:{*}",
        "PUBSUB NUMSUB relay:ephemeral:{news}",
        "SUBSCRIBE relay:bus:web1:5f0c9a31",
        "PUBLISH relay:bus:web2:b7e2d604 1",
        "SET relay:store:door:session:1 web1:5f0c9a31 NX GET PX 1000",
        "GET relay:store:door:session:1",
        "DEL relay:store:door:session:1",
        "UNSUBSCRIBE relay:ephemeral:{news}",
        "SET relay:dead-letter:{news}:1-1 w NX EX 5",
        "SET relay:node:web1:5f0c9a31 x EX 15",
        "SET relay:lease:retention x NX",
        "SET relay:canary:web1:5f0c9a31 1 EX 15",
        "GET relay:node:web1:5f0c9a31",
        "GET relay:servers",
        "SET relay:servers redis1:6379/0 NX",
        "GET relay:lease:retention",
        "DEL relay:canary:web1:5f0c9a31",
        f"DEL {STREAM}",
        "SADD relay:nodes x",
        "SREM relay:nodes x",
        "SMEMBERS relay:nodes",
        "SMEMBERS relay:group:seafile:7",
        "SCAN 0",
        "HSET relay:presence:{news} c1 web1:5f0c9a31",
        "HDEL relay:presence:{news} c1",
        "HGETALL relay:presence:{news}",
        "EXISTS relay:node:web1:5f0c9a31",
        "SADD relay:present:web1:5f0c9a31 news",
        "SREM relay:present:web1:5f0c9a31 news",
        "SCARD relay:present:web1:5f0c9a31",
        "SMEMBERS relay:present:web1:5f0c9a31",
        "DEL relay:present:web1:5f0c9a31",
        "HSET relay:users:web1:5f0c9a31 anna 1",
        "HDEL relay:users:web1:5f0c9a31 anna",
        "HGET relay:users:web2:b7e2d604 anna",
        "EXPIRE relay:users:web1:5f0c9a31 6",
        "DEL relay:users:web1:5f0c9a31",
        "EVALSHA 0 2 relay:stream:{news} relay:uid:{news}:7d1f 1",
        "EVALSHA 0 3 centrifugo.api.0 relay:queue:centrifugo.api.0 relay:dead-letters 1",
        "EVALSHA 0 2 relay:takers relay:lease:queue:centrifugo.api 1",
        "ZADD relay:takers 1 x",
        "ZREM relay:takers x",
        "ZREMRANGEBYSCORE relay:takers -inf 1",
        "ZCARD relay:takers",
        "EXPIRE relay:takers 2",
        "SCRIPT LOAD 1",
        "INCRBY relay:queue:centrifugo.api 1",
        "LRANGE centrifugo.api 0 9",
        "LINDEX centrifugo.api 0",
        "LLEN centrifugo.api",
        "LTRIM centrifugo.api 9 -1",
        "GET relay:queue:centrifugo.api",
        "GET relay:uid:{news}:7d1f",
        "SET relay:uid:{news}:7d1f 1-1 PX 5",
        "WAIT 1 5",
        "PSUBSCRIBE socket.io#/axr#*",
        "SUBSCRIBE socket.io-request#/axr#",
        "XREAD COUNT 9 STREAMS socket.io 0-0",
        "XREVRANGE socket.io + - COUNT 1",
        "GET relay:tap:socketio_emitter",
        "SET relay:tap:socketio_emitter x",
        "EVALSHA 0 2 relay:tap:socketio_emitter relay:stream:{axr:allusers} x",
    ],
    "maintenance": [
        f"DUMP {STREAM}",
        f"RESTORE {STREAM} 0 dumped",
        f"PTTL {STREAM}",
        f"WATCH {STREAM}",
        "UNWATCH",
        f"XGROUP SETID {STREAM} {GROUP} $",
        *CLUSTER,
        "COMMAND",
        "ASKING",
        "SSUBSCRIBE relay:{site}bus:5f0c9a31",
        "INFO",
        "SELECT 0",
        "PING",
        "TIME",
        "MULTI",
        f"HSET {RIGHTS} anna -",
        f"HDEL {RIGHTS} anna",
        f"XADD {STREAM} * revoke anna",
        "EXEC",
        "EVAL return 2 relay:uid:{news}:7d1f " + STREAM,
        "EVAL return 2 relay:requeued:{news}:1-1 " + STREAM,
        "SET relay:uid:{news}:7d1f 1-1 EX 3600",
        "WAIT 1 1000",
        "XDEL relay:dead-letters 1-1",
        f"XLEN {STREAM}",
        f"XRANGE {STREAM} - +",
        f"XREVRANGE {STREAM} + -",
        f"XREAD STREAMS {STREAM} 0",
        f"XINFO STREAM {STREAM}",
        f"XINFO GROUPS {STREAM}",
        f"HGET {RIGHTS} anna",
        f"HGETALL {RIGHTS}",
        "GET relay:lease:retention",
        "SMEMBERS relay:nodes",
        "ZRANGE relay:takers 0 -1",
        f"EXISTS {STREAM}",
        "TTL relay:lease:retention",
        f"TYPE {STREAM}",
        "SCAN 0",
        f"XTRIM {STREAM} MAXLEN 5",
        f"XGROUP DESTROY {STREAM} {GROUP}",
        "SREM relay:nodes x",
        f"DEL {STREAM}",
        "PUBLISH relay:ephemeral:{news} 1",
        "PUBSUB NUMSUB relay:ephemeral:{news}",
        "PUBSUB CHANNELS",
        "SUBSCRIBE relay:bus:5f0c9a31",
        "UNSUBSCRIBE relay:bus:5f0c9a31",
    ],
}
REFUSED: dict[User, list[str]] = {
    "producer": [
        f"XRANGE {STREAM} - +",
        f"DEL {STREAM}",
        f"XTRIM {STREAM} MAXLEN 0",
        f"XREAD STREAMS {STREAM} 0",
        "XADD relay:control * command disconnect",
        f"HSET {RIGHTS} anna rw",
        f"HGETALL {RIGHTS}",
        "SUBSCRIBE relay:ephemeral:{news}",
        f"SET {STREAM} x",
        f"GET {STREAM}",
        f"XADD {UID} * data 1",
        f"EVAL script 1 {RIGHTS}",
        "EVAL script 1 relay:control",
        "SCRIPT FLUSH",
    ],
    "relay": [
        f"HSET {RIGHTS} anna rw",
        f"DEL {RIGHTS}",
        f"SET {RIGHTS} x",
        "SADD relay:group:seafile:7 anna",
        "GET other",
        "XADD other * data 1",
        "SUBSCRIBE other",
        "CONFIG GET *",
        "FLUSHALL",
        "ACL LIST",
        "CLIENT KILL ID 1",
        "EVAL 1 0",
        "EVALSHA 0 1 relay:rights:{news} 1",
        "LRANGE other 0 9",
        "RPUSH centrifugo.api 1",
        "SCRIPT FLUSH",
    ],
    "maintenance": [
        "GET other",
        "CONFIG GET *",
        "FLUSHALL",
        "ACL LIST",
        "EVAL return 1 other",
        "KEYS *",
    ],
}


async def dry_run(admin: Redis, user: User, line: str) -> bytes:
    answer: bytes = await command(admin, "ACL", "DRYRUN", user, *line.split())
    return answer


@pytest.mark.parametrize(("user", "line"), [(u, line) for u in SENT for line in SENT[u]])
async def test_what_a_user_sends_is_allowed(admin: Redis, user: User, line: str) -> None:
    assert await dry_run(admin, user, line) == b"OK"


@pytest.mark.parametrize(("user", "line"), [(u, line) for u in REFUSED for line in REFUSED[u]])
async def test_what_a_user_must_not_send_is_refused(admin: Redis, user: User, line: str) -> None:
    assert b"no permissions" in await dry_run(admin, user, line)


@pytest.mark.parametrize("user", list(SENT))
def test_no_rule_is_for_nothing(user: User) -> None:
    (rules,) = [line.split() for line in acl_lines() if line.split()[1] == user]
    words = [rule.strip("()") for rule in rules]  # of a selector
    allowed = {word[1:] for word in words if word.startswith("+")}
    sent = [line.lower().split() for line in SENT[user]]
    assert allowed == {
        rule
        for first, *rest in sent
        for rule in (first, f"{first}|{rest[0]}" if rest else "")
        if rule in allowed
    }


@pytest.mark.parametrize("key", ["event", "scripted"])
def test_transactions_are_loaded_again_while_the_default_user_is_off(
    tmp_path: Path, flavour: Flavour, key: str
) -> None:
    """Redis checks them against the rights of `default`, and a script's writes are one."""
    assert f"`{DEFAULT_OFF}`" in DOCUMENT.read_text()
    server = Server(tmp_path, flavour)
    with running(server):
        with server.client() as client:
            if key == "event":
                client.pipeline().set(key, 1).set("other", 1).execute()
            else:
                words = "redis.call('SET', KEYS[1], 1) redis.call('SET', KEYS[2], 1)"
                client.eval(words, 2, key, "other")
        server.restart()
        with server.client() as client:
            assert client.get(key) == b"1"
