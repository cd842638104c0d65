"""Commands keep the bytes of data, and both parsers of a publish give the same result."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from relay.protocols.centrifugo import commands

SPACE = st.text(" \t\r\n", max_size=2)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@st.composite
def texts(draw: st.DrawFn, value: Any) -> str:
    """Return `value` as JSON in any notation."""
    pad = draw(SPACE)
    if isinstance(value, dict):
        inner = [f"{pad}{draw(texts(k))}{pad}:{pad}{draw(texts(v))}" for k, v in value.items()]
        return "{" + (",".join(inner) or pad) + pad + "}"
    if isinstance(value, list):
        return "[" + (",".join(pad + draw(texts(each)) for each in value) or pad) + pad + "]"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "1e999"
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    # An unpaired surrogate can be written as an escape only.
    return text if text.isprintable() else json.dumps(value)


VALUES = st.recursive(
    SCALARS, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3)
)
DATA = VALUES.flatmap(texts)
NAMES = st.text('abc:$é"\\', min_size=1, max_size=5)


@st.composite
def publishes(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """Return a publish as any program might write it, with its channel and data."""
    data, name = draw(DATA), draw(NAMES)
    members = [(draw(st.sampled_from(["data", "Data", "DATA"])), data)]
    members.append((draw(st.sampled_from(["channel", "Channel"])), json.dumps(name)))
    members += draw(st.lists(st.tuples(st.sampled_from("xyz"), DATA), max_size=2))
    outer = [("method", '"publish"'), ("params", draw(_object(members)))]
    return draw(_object(outer)), name, data.encode()


@st.composite
def _object(draw: st.DrawFn, members: list[tuple[str, str]]) -> str:
    pad = draw(SPACE)
    shuffled = draw(st.permutations(members))
    return "{" + ",".join(f'{pad}"{name}"{pad}:{pad}{text}{pad}' for name, text in shuffled) + "}"


@given(publishes())
def test_data_keeps_its_bytes_however_the_command_is_written(
    case: tuple[str, str, bytes],
) -> None:
    text, name, data = case
    command = commands.one(text.encode())
    assert commands.publish(command.params)[:2] == (name, data)
    (again,) = commands.many(f"[{text}]".encode())
    assert again == command
    for found in commands.read(f"[{text} , {text}]".encode()) + commands.read(text.encode()):
        if isinstance(found, commands.CentrifugoCommand):
            assert found == command
        else:
            assert found == commands.publish(command.params)


@given(publishes(), st.sampled_from(["", "\\ud800", "\\\\ud800\\udc00\\ud83d\\ude00"]))
def test_a_large_command_is_read_like_a_small_one(
    case: tuple[str, str, bytes], escapes: str
) -> None:
    text, name, data = case
    # Some of the escapes are unpaired surrogates. The member before the others has them too.
    padding = f',"pad":"{"x" * 20_000}{escapes}"}}'
    text = text.replace("{", f'{{"pad":"{escapes}",', 1)
    command = commands.one(text.encode())
    large = (text.rstrip().removesuffix("}") + padding).encode()
    assert commands.one(large) == command
    assert commands.queued(large) == [large]
    assert commands.many(b" [ %b , %b ] " % (large, text.encode())) == [command] * 2
    assert command.params is not None
    params = command.params.removesuffix("}") + padding
    assert commands.publish(params)[:2] == (name, data)
    for wrong in (large[:-1], large + b"x", large.replace(b"x", b"\xff", 1)):
        with contextlib.suppress(commands.InvalidCommand):
            raise AssertionError(commands.one(wrong))


@given(data=DATA, name=NAMES, after=st.sampled_from(["", " ", ',"uid":"u"', "}", "]", ',"x":{}']))
@settings(max_examples=300)
def test_the_short_way_agrees_with_the_long_one(data: str, name: str, after: str) -> None:
    escaped = json.dumps(name, ensure_ascii=False)
    text = f'{{"method":"publish","params":{{"channel":{escaped},"data":{data}{after}}}}}'.encode()
    short = commands.plain_publish(text)
    if short is not None:
        assert commands.publish(commands.one(text).params) == short
        assert short.data == data.encode()


@given(st.binary() | st.text('{}[]",:\\ 1etnul').map(str.encode))
def test_no_text_breaks_the_reader(text: bytes) -> None:
    for read in (commands.read, commands.many, commands.queued, commands.plain_publish):
        with contextlib.suppress(commands.InvalidCommand):
            read(text)
