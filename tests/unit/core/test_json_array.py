"""An array with any content is divided between its elements, in slices of time."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.json_array import divide

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.lists(values), st.integers(1, 60), st.sampled_from([None, 1]))
def test_the_parts_together_are_the_array(
    elements: list[object], part_bytes: int, indent: int | None
) -> None:
    text = json.dumps({"a": {"b": "[,", "c": elements, "d": [1, 2]}}, indent=indent).encode()
    found = asyncio.run(divide(text, 3, part_bytes))
    parts = [json.loads(b"[%b]" % text[begin:end]) for begin, end in found.parts]
    assert [each for part in parts for each in part] == elements
    emptied = json.loads(text[: found.begin] + text[found.end :])
    assert emptied == {"a": {"b": "[,", "c": [], "d": [1, 2]}}


@pytest.mark.parametrize(
    "text", [b"", b"{}", b'{"a":[1]}', b"[[[1,2", b'[[["1,2]]]', b"[[[1,]]]", b'[["]]]"]]']
)
def test_what_has_no_such_array_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match="array|string"):
        asyncio.run(divide(text, 3, 1))


async def test_a_long_text_leaves_the_loop_to_others() -> None:
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(count)

    asyncio.get_running_loop().call_soon(count)
    await divide(b"[" + b"{}," * 200_000 + b"0]", 1, 4096)
    assert turns > 10
