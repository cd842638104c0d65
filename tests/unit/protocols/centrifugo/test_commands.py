from __future__ import annotations

import pytest

from relay.protocols.centrifugo import commands
from relay.protocols.centrifugo.commands import (
    CentrifugoCommand,
    InvalidCommand,
    NamespaceNotFound,
    PublishParams,
    UndeliverableEvent,
)


def published(text: str) -> PublishParams:
    command = commands.one(text.encode())
    assert command.method == "publish"
    return commands.publish(command.params)


@pytest.mark.parametrize(
    "data",
    [
        "[]",
        "{}",
        "12345678901234567890",
        "1.0",
        "1e400",
        '"\\u00e9\\/"',
        '{ "b":1,\t"a" : [ ] }',
        "null",
        "1" * 5000,
        '"}}"',
        '{"a":{"channel":"x","data":1}}',
    ],
)
def test_data_keeps_its_bytes(data: str) -> None:
    text = '{"method":"publish","params":{"channel":"news","data":%s}}'
    wanted = PublishParams(commands.checked_channel("news"), data.encode())
    assert published(text % data) == wanted
    # The fast path does not parse numbers that are not floats.
    assert commands.plain_publish((text % data).encode()) in (wanted, None)
    assert published(text % f" {data}\n ") == wanted
    assert commands.plain_publish((text % f" {data}\n").encode()) in (wanted, None)


def test_names_match_as_go_matches_them() -> None:
    # Go matches U+017F with s.
    text = '{"METHOD":"publish","Param\u017f":{"CHANNEL":"a","x":[1],"data":1,"Data":2,"uid":"u"}}'
    assert published(text) == ("a", b"2", None, "u", None, None, None, None)


def test_null_does_not_change_a_string() -> None:
    params = '{"channel":"a","data":null,"client":null,"to":null,"type":null}'
    text = f'{{"method":"publish","method":null,"uid":null,"params":{params}}}'
    assert commands.one(text.encode()).uid == ""
    assert published(text) == ("a", b"null", None, None, None, None, None, None)


def test_half_a_surrogate_pair_is_replaced_as_in_go() -> None:
    assert published('{"method":"publish","params":{"channel":"\\ud800x","data":1}}')[0] == "�x"


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (None, "no params"),
        ("null", "publish without channel"),
        ("[]", "not an object"),
        ('{"data":1}', "publish without channel"),
        ('{"channel":"","data":1}', "publish without channel"),
        ('{"channel":"a"}', "publish without data"),
        ('{"channel":5,"data":1}', "channel is not a string"),
        ('{"channel":"a","data":1,"client":{}}', "client is not a string"),
        ('{"channel":"a","data":1,"uid":true}', "uid is not a string"),
        ('{"channel":"a","data":1,"type":1}', "type is not a string"),
        ('{"channel":"a","data":1,"type":"relay:gap"}', "reserved type"),
        ('{"channel":"a","data":1,"to":{}}', "to is not a string"),
        ('{"channel":"a","data":1,"to":["bob",null]}', "to is not a string"),
        ('{"channel":"a","data":1,"to":[]}', "to has no recipients"),
        ('{"channel":"a","data":1,"to":""}', "to has no recipients"),
        ('{"channel":"a","data":1,"to":"[1]"}', "to is not a list of names"),
    ],
)
def test_rejects_a_publish_with_the_reason(params: str | None, reason: str) -> None:
    with pytest.raises(InvalidCommand, match=f"^{reason}$"):
        commands.publish(params)


@pytest.mark.parametrize("name", ["seafile:1", "pydio:x", "axr:r", "$axr:r"])
def test_rejects_channels_of_other_protocols(name: str) -> None:
    with pytest.raises(NamespaceNotFound):
        commands.checked_channel(name)
    text = b'{"method":"publish","params":{"channel":"%s","data":1}}' % name.encode()
    with pytest.raises(NamespaceNotFound):
        commands.plain_publish(text)


@pytest.mark.parametrize("name", ["", "x" * 256, "\ud800"])
def test_rejects_invalid_channel_names(name: str) -> None:
    with pytest.raises(UndeliverableEvent):
        commands.checked_channel(name)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"{",
        b"}",
        b"{}x",
        b'{"method":"publish",}',
        b'{"method" "publish"}',
        b'{"a":01}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":"\n"}',
        b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b"{}\x0c",
    ],
)
def test_rejects_text_that_is_not_json(text: bytes) -> None:
    for read in (commands.one, commands.many, commands.queued):
        with pytest.raises(InvalidCommand):
            read(text)
    assert commands.plain_publish(text) is None


def test_parses_an_array_of_commands() -> None:
    text = b'[ {"method":"a"} ,{"uid":"2","params":[ 1 ]}, null,{}]'
    assert commands.many(text) == [
        CentrifugoCommand("a", None, ""),
        CentrifugoCommand("", "[ 1 ]", "2"),
        CentrifugoCommand("", None, ""),
        CentrifugoCommand("", None, ""),
    ]
    assert commands.many(b"[]") == []
    for wrong in (b"[1]", b"{}", b'[{"method":1}]'):
        with pytest.raises(InvalidCommand):
            commands.many(wrong)


def test_parses_the_queue_format_of_before_1_6() -> None:
    item = b' {"data":[{"method":"a"},{"method":"b"}]} '
    assert commands.queued(item) == [b'{"method":"a"}', b'{"method":"b"}']
    assert commands.queued(b'{"method":"a"}') == [b'{"method":"a"}']
    with pytest.raises(InvalidCommand):
        commands.queued(b'[{"method":"a"}]')


def test_parses_a_broadcast() -> None:
    found = commands.broadcast('{"Channels":["a",null,"b"],"data":{"x": 1},"client":"c"}')
    assert found == (["a", "", "b"], b'{"x": 1}', "c", None, None, None, None)
    assert commands.broadcast('{"channels":null}') == ([], b"", None, None, None, None, None)
    for wrong in ('{"channels":"a"}', '{"channels":[1]}', '{"channels":["a"],"data":1,"to":[]}'):
        with pytest.raises(InvalidCommand):
            commands.broadcast(wrong)
    found = commands.broadcast('{"channels":["a"],"data":1,"type":"t","to":"bob"}')
    assert found.publication("a") == ("a", b"1", None, None, "t", ("user:bob",), None, None)


@pytest.mark.parametrize(
    ("to", "names"),
    [
        ('"bob, group:kitchen"', ("group:kitchen", "user:bob")),
        ('["Anna Li","group:kitchen"]', ("group:kitchen", "user:Anna Li")),
        ('"[\\"Anna Li\\"]"', ("user:Anna Li",)),
        ('["\\ud800"]', ("user:\ufffd",)),
    ],
)
def test_recipients_have_the_format_of_entries(to: str, names: tuple[str, ...]) -> None:
    params = f'{{"channel":"a","data":1,"TO":{to},"type":"chat"}}'
    text = f'{{"method":"publish","params":{params}}}'
    assert published(text) == ("a", b"1", None, None, "chat", names, None, None)
    assert commands.plain_publish(text.encode()) is None


def test_the_fast_path_has_the_same_result() -> None:
    text = '{"method":"publish","params":{"channel":"a","data":1,"client":"c"}}'
    assert commands.plain_publish(text.encode()) is None
    assert published(text) == ("a", b"1", "c", None, None, None, None, None)


def test_a_boolean_is_true_false_or_missing() -> None:
    assert commands.fields('{"Recover":true}', bools=("recover",)) == {"recover": True}
    assert commands.fields('{"recover":null}', bools=("recover",)) == {}
    with pytest.raises(InvalidCommand, match="recover is not a boolean"):
        commands.fields('{"recover":"true"}', bools=("recover",))


def test_durability_is_parsed_and_checked() -> None:
    text = '{"method":"publish","params":{"channel":"a","data":1,"durability":"replicated:2:50"}}'
    assert published(text).durability == ("replicated", 2, 50)
    params = '{"channels":["a"],"data":1,"durability":"fsynced"}'
    assert commands.broadcast(params).publication("a").durability == ("fsynced", 0, 0)
    for wrong in ("", "slow", "replicated:0", "fast:1", "replicated:1:0", "fsynced:1:2:3"):
        params = f'{{"channel":"a","data":1,"durability":"{wrong}"}}'
        if not wrong:
            assert commands.publish(params).durability is None
            continue
        with pytest.raises(commands.UndeliverableEvent, match="durability must be fast"):
            commands.publish(params)
