"""stream/format/entry.py: decoding reverses encoding, and invalid entries have a reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.model import Broken, Channel, EntryID, Event, Grant, Record, Revocation
from relay.stream.format import entry

NEWS = Channel("news")
ID = EntryID(1700000000000, 3)
texts = st.text(st.characters(codec="utf-8"))
types = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])).filter(
    lambda text: not text.startswith("relay:")
)
jsons = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=5,
).map(lambda value: json.dumps(value, ensure_ascii=False).encode())
names = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda name: name not in ("user:", "group:", "client:")
)


def read(fields: list[bytes], max_bytes: int = 1 << 20) -> Record:
    return entry.decode(NEWS, ID, fields, max_bytes)


def reason(*fields: bytes, max_bytes: int = 1 << 20) -> str:
    body = read(list(fields), max_bytes).body
    assert isinstance(body, Broken), body
    assert body.id == ID
    assert [part for pair in body.fields for part in pair] == list(fields)
    return body.reason


def event(*fields: bytes) -> Event:
    body = read(list(fields)).body
    assert isinstance(body, Event), body
    return body


@given(
    data=texts.map(str.encode) | jsons,
    kind=st.none() | types,
    uid=st.none() | texts,
    to=st.none() | st.lists(names, min_size=1),
    client=st.none() | texts,
    info=st.none() | jsons,
)
def test_decode_gives_back_what_was_encoded(
    data: bytes,
    kind: str | None,
    uid: str | None,
    to: list[str] | None,
    client: str | None,
    info: bytes | None,
) -> None:
    fields = entry.encode(data, type=kind, uid=uid, to=to, client=client, info=info)
    record = read(fields)
    body = record.body
    assert isinstance(body, Event)
    assert (body.channel, body.id, body.data) == (NEWS, ID, data)
    assert (body.type, body.uid, body.client, body.info) == (kind, uid, client, info)
    if to is None:
        assert body.to is None
    else:
        kinds = ("user:", "group:", "client:")
        named = {name if name.startswith(kinds) else f"user:{name}" for name in to}
        assert body.to == frozenset(named)
    assert record.digest == entry.digest(fields) < 1 << 16
    assert record.size == entry.size(fields)


@given(
    fields=st.lists(
        st.binary() | st.sampled_from([b"data", b"to", b"v", b"revoke", b"grant", b"type"])
    )
)
def test_any_fields_are_an_event_or_a_change_of_rights_or_a_reason(fields: list[bytes]) -> None:
    body = read(fields).body
    assert isinstance(body, Event | Revocation | Grant) or body.reason


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":"\\ud800"}',
        b'["\\udc00\\ud800", "\\\\ud800"]',
        b'"\\uD83D"',
        b'{"a":1e999,"b":-1E+400}',
        b"1" * 5000,
    ],
)
def test_json_that_orjson_rejects_is_json_all_the_same(data: bytes) -> None:
    body = event(b"data", data, b"info", data)
    assert body.is_json
    assert (body.data, body.info) == (data, data)


@pytest.mark.parametrize(
    "data", [b'{"a":"\\ud800"', b'["\\ud800",NaN]', b'"\\ud80"', b'["\\ud800",01]', b"[" * 2000]
)
def test_what_only_looks_like_it_is_text(data: bytes) -> None:
    assert not event(b"data", data).is_json


@given(data=jsons)
def test_json_is_seen_as_json_and_kept_as_it_is(data: bytes) -> None:
    body = event(b"data", data)
    assert body.is_json
    assert body.data == data


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<a/>", "grüß".encode(), b"{", b"nan", b"[1,]", b"\x00"]
)
def test_other_text_is_text(data: bytes) -> None:
    assert not event(b"data", data).is_json


@pytest.mark.parametrize(
    ("to", "selectors"),
    [
        (b"anna", {"user:anna"}),
        (b"anna, ben  group:staff,", {"user:anna", "user:ben", "group:staff"}),
        (b'["Anna Li","client:c,1"]', {"user:Anna Li", "client:c,1"}),
        (b"mail:anna", {"user:mail:anna"}),
    ],
)
def test_recipients(to: bytes, selectors: set[str]) -> None:
    assert event(b"data", b"1", b"to", to).to == frozenset(selectors)


@pytest.mark.parametrize("to", [b"", b" , ", b"[]", b'[""]', b"user:", b"anna,group:"])
def test_recipients_that_name_nobody_are_broken(to: bytes) -> None:
    assert reason(b"data", b"1", b"to", to) == "to has no recipients"


def test_reasons() -> None:
    assert reason(b"text", b"1") == "no data"
    assert reason() == "no data"
    assert reason(b"data", b"1", b"v", b"2") == "unknown schema 2"
    assert reason(b"data", b"x" * 20, max_bytes=24) == "too large: 25 bytes"
    assert reason(b"data", b"1", b"type", b"relay:gap") == "reserved type"
    assert reason(b"data", b"1", b"type", b"a\nid: 5") == "type contains a control character"
    assert reason(b"data", b"\xff") == "field data is not UTF-8"
    assert reason(b"data", b'{"a":"\xff"}') == "field data is not UTF-8"
    assert reason(b"data", b"1", b"uid", b"\xff") == "field uid is not UTF-8"
    assert reason(b"data", b"1", b"to", b"[1]") == "to is not a list of names"
    assert reason(b"data", b"1", b"to", b"[anna]") == "to is not a list of names"
    assert reason(b"data", b"1", b"info", b"x") == "info is not JSON"
    assert reason(b"revoke", b"") == "revoke has no user"


def test_unknown_fields_and_schema_one_are_accepted() -> None:
    assert event(b"data", b"1", b"v", b"1", b"trace", b"\xff").data == b"1"


def test_a_revocation_is_seen_whatever_else_is_in_the_entry() -> None:
    assert read(entry.encode_revocation("anna")).body == Revocation(ID, "anna")
    fields = [b"v", b"9", b"data", b"x" * 100, b"revoke", b"anna"]
    assert read(fields, max_bytes=10).body == Revocation(ID, "anna")


def test_encode_refuses_what_decode_would_call_broken() -> None:
    with pytest.raises(ValueError, match="reserved type"):
        entry.encode(b"1", type="relay:x")
    with pytest.raises(ValueError, match="to has no recipients"):
        entry.encode(b"1", to=[])
    with pytest.raises(ValueError, match="field data is not UTF-8"):
        entry.encode(b"\xff")
    with pytest.raises(ValueError, match="field uid is not UTF-8"):
        entry.encode(b"1", uid="\ud800")
    with pytest.raises(ValueError, match="info is not JSON"):
        entry.encode(b"1", info=b"x")
    with pytest.raises(ValueError, match="revoke has no user"):
        entry.encode_revocation("")


def test_a_grant_is_no_event_and_one_with_data_is() -> None:
    assert read(entry.encode_grant("anna")).body == Grant(ID, "anna")
    assert reason(b"grant", b"") == "grant has no user"
    # A field beyond the schema in an event, as before grants were added.
    body = read([b"data", b"1", b"grant", b"anna"]).body
    assert isinstance(body, Event)
    assert body.extra == {b"grant": b"anna"}
    # A second field cannot undo a revocation.
    assert read([b"grant", b"anna", b"revoke", b"ben"]).body == Revocation(ID, "ben")
    with pytest.raises(ValueError, match="grant has no user"):
        entry.encode_grant("")
