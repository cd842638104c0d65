"""Forms are parsed as in Go, in short steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import parse_qs, quote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocols.centrifugo.go_http import _multipart, _urlencoded


def read(body: bytes) -> dict[str, bytearray]:
    return asyncio.run(_urlencoded(bytearray(body)))


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.binary(min_size=1), max_size=5))
def test_parses_forms(fields: dict[str, bytes]) -> None:
    expected = {name.encode().decode("latin-1"): value for name, value in fields.items()}
    assert read(urlencode(fields).encode()) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"a",
        b"a=",
        b"=b",
        b"a=b=c&a=d",
        b"a=1&&b=2&",
        b"a=%C3%A9+%2B%26%3d%25",
        b"a=\xff\r\n_ \t ",
    ],
)
def test_parses_unusual_forms_like_urllib(body: bytes) -> None:
    found = parse_qs(body.decode("latin-1"), encoding="latin-1")
    assert read(body) == {name: values[0].encode("latin-1") for name, values in found.items()}


def test_parses_an_escape_at_any_position_of_a_large_form() -> None:
    for offset in range(4):
        value = b"x" * offset + b"%&=+" * 60_000
        assert read(b"data=" + quote_plus(value).encode()) == {"data": value}


def _url() -> Coroutine[Any, Any, dict[str, bytearray]]:
    return _urlencoded(bytearray(b"data=" + b"%41" * 2_900_000))


def _parts() -> Coroutine[Any, Any, dict[str, bytearray]]:
    field = b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\n'
    return _multipart(bytearray(field + b"A" * 8_700_000 + b"\r\n--x--"), b"x")


@pytest.mark.parametrize("form", [_url, _parts])
def test_a_large_form_does_not_block_the_loop(
    form: Callable[[], Coroutine[Any, Any, dict[str, bytearray]]],
) -> None:
    async def main() -> float:
        longest = 0.0
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(form())
            while not task.done():
                start = time.thread_time()
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - start)
        assert set(task.result()["data"]) == {65}
        return longest

    # About 6 ms; urllib takes 3 s.
    assert asyncio.run(main()) < 0.1


def test_too_many_fields_are_an_error() -> None:
    with pytest.raises(ValueError, match="too many"):
        read(b"&".join(b"a%d=1" % number for number in range(101)))


def test_multipart_forms() -> None:
    kind = b"Content-Type: text/plain\r\nContent-Disposition: form-data; "
    part = b"--x\r\n" + kind + b'name="%s"\r\n\r\n%s\r\n'
    body = (
        part % (b"data", b"1\r\n--\r\n2")
        + part % (b"sign", b"")
        + part % (b"data", b"3")
        + b"--x--\r\n"
    )

    def fields(text: bytes) -> dict[str, bytearray]:
        return asyncio.run(_multipart(bytearray(text), b"x"))

    assert fields(body) == {"data": b"1\r\n--\r\n2", "sign": b""}
    assert fields(b"preamble\r\n" + body) == {"data": b"1\r\n--\r\n2", "sign": b""}
    for wrong in (b"", b"--x", b"--x\r\n\r\n", body[:-5], part * 200):
        with pytest.raises(ValueError, match="no end"):
            fields(wrong)
