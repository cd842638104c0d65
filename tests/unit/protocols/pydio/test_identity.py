"""Responses of `ws_authenticate`, built from the XML in Pydio's source."""

from __future__ import annotations

import pytest

from relay.core.errors import Unauthorized
from relay.protocols.pydio.identity import Identity, read
from relay.rights.application import InvalidResponse

HEAD = '<?xml version="1.0" encoding="UTF-8"?>'


def answer(user: str) -> bytes:
    return f"{HEAD}<tree >{user}</tree>".encode()


def test_reads_user_group_and_workspaces() -> None:
    xml = answer(
        '<user groupPath="/a &amp; b" id="ann"><active_repo id="1" write="1" read="1"/>'
        '<repositories><repo access_type="fs" id="1" repositorySlug="one" acl="rw"><label>One'
        '</label></repo><repo id="2" acl="r" hasMask="true" /><repo id="3" acl="w"/>'
        '<repo id="4" acl=""/><repo id="a b" acl="rw"/>'
        f'<repo id="{"x" * 256}" acl="rw"/><repo acl="rw"/></repositories>'
        '<preferences><pref name="x" value="1"/></preferences><special_rights is_admin="0" />'
        "</user>"
    )
    assert read(xml) == Identity(
        user="ann",
        group_path="/a & b",
        readable=frozenset({"1", "2", "4", "a b"}),
        masked=frozenset({"2"}),
    )


def test_an_installation_without_users() -> None:
    xml = answer('<user id="shared"><repositories><repo id="1"/></repositories></user>')
    assert read(xml) == Identity(user="shared", readable=frozenset({"1"}))


@pytest.mark.parametrize(
    "tree",
    [
        '<message type="ERROR">You must be logged in</message>',
        '<user id="ann"/><message type="ERROR">x</message>',
        "<require_auth/>",
        '<user id=""/>',
        "",
    ],
)
def test_rejects_a_response_without_a_user(tree: str) -> None:
    with pytest.raises(Unauthorized):
        read(answer(tree))


@pytest.mark.parametrize("text", [b"", b"<h1>Fatal error", b"\xff\xfe", b"{}", b"<?xml encoding?>"])
def test_rejects_a_response_that_is_not_xml(text: bytes) -> None:
    with pytest.raises(InvalidResponse):
        read(text)


def test_the_expansion_of_entities_is_limited() -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 20}">' for n in range(1, 12))
    bomb = f'<?xml version="1.0"?><!DOCTYPE t [<!ENTITY e0 "x">{entities}]><t>&e11;</t>'
    with pytest.raises(InvalidResponse):
        read(bomb.encode())
