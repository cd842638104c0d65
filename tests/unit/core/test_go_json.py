from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import go_json
from relay.core.go_json import compact, text

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.text())
def test_a_text_is_the_same_text_and_safe_in_a_page(value: str) -> None:
    written = text(value)
    assert json.loads(written) == value
    assert not set("<>&\u2028\u2029") & set(written.decode())


def test_half_a_surrogate_pair_is_a_replacement_character() -> None:
    assert json.loads(text("a\ud800b")) == "a\ufffdb"


@given(values, st.sampled_from([None, 1, "\t"]))
def test_compact_json_means_the_same_and_has_no_space_between(
    value: object, indent: int | str | None
) -> None:
    written = json.dumps(value, indent=indent, ensure_ascii=False).encode(errors="replace")
    found = compact(written)
    assert json.loads(found) == json.loads(written)
    assert found == compact(found)
    assert len(found) >= len(json.dumps(value, separators=(",", ":"), ensure_ascii=False))


@given(st.lists(st.text() | st.integers()), st.integers(1, 40))
def test_long_json_is_made_compact_in_parts(value: list[object], part_bytes: int) -> None:
    written = json.dumps(value, indent=1).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(go_json, "_PART_BYTES", part_bytes)
        found = compact(written)
        assert asyncio.run(go_json.compact_in_slices(written)) == found
    assert json.loads(found) == value
    assert found == compact(json.dumps(value, separators=(",", ":")).encode())


def test_numbers_keep_their_spelling() -> None:
    assert compact(b"[ 1.0, 12345678901234567890 , 1E5 ]") == b"[1.0,12345678901234567890,1E5]"
