"""Messages that PHP sends on the private channel."""

from __future__ import annotations

import contextlib
import json
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.model import Channel
from relay.protocols.pydio.private_messages import (
    BROADCAST,
    InvalidMessage,
    Publication,
    read,
    workspace,
)
from tests.support.programs import program

TREE = "<tree><reload_bookmarks/></tree>"


def php(expression: str) -> bytes:
    """Return the output of PHP's own `serialize`."""
    binary = program("php", "php-cli")
    done = subprocess.run(
        [binary, "-r", f"echo serialize({expression});"], capture_output=True, check=True
    )
    return done.stdout


def test_reads_captured_messages_of_6_4_2() -> None:
    plain = (
        b'a:2:{s:7:"REPO_ID";s:1:"1";s:7:"CONTENT";'
        b's:44:"<tree><nodes_diff><add/></nodes_diff></tree>";}'
    )
    assert read(plain) == Publication(
        channel=Channel("pydio:1"), data=b"<tree><nodes_diff><add/></nodes_diff></tree>"
    )
    for_alice = (
        b'a:3:{s:7:"REPO_ID";s:1:"1";s:7:"CONTENT";s:32:"<tree><reload_bookmarks/></tree>";'
        b's:7:"USER_ID";s:5:"alice";}'
    )
    assert read(for_alice).to == ("user:alice",)
    for_all = (
        b'a:2:{s:7:"REPO_ID";s:19:"AJXP_REPO_SCOPE_ALL";s:7:"CONTENT";s:16:"<tree>all</tree>";}'
    )
    assert read(for_all).channel == BROADCAST


def test_reads_the_output_of_a_real_php() -> None:
    content = "<tree>Grüße – 日本</tree>"
    found = read(
        php(
            f"['REPO_ID' => 7, 'CONTENT' => '{content}', 'GROUP_PATH' => '/staff/ops',"
            " 'NODE_PATHES' => ['/a', '/ü/b'], 'NEW' => [null, true, 1.5]]"
        )
    )
    assert found == Publication(
        channel=Channel("pydio:7"),
        data=content.encode(),
        to=("group:/staff/ops",),
        extra={b"node_paths": '["/a","/ü/b"]'.encode()},
    )


def test_reads_the_same_message_as_json() -> None:
    body = {"REPO_ID": "*", "CONTENT": TREE, "USER_ID": None, "NODE_PATHES": {"1": "/x"}}
    assert read(b" " + json.dumps(body).encode()) == Publication(
        channel=BROADCAST, data=TREE.encode(), extra={b"node_paths": b'["/x"]'}
    )


def test_names_and_paths_may_have_the_encoding_of_the_server() -> None:
    message = (
        b'a:4:{s:7:"REPO_ID";s:1:"1";s:7:"CONTENT";s:15:"<tree>\xc3\xa9</tree>";'
        b's:10:"GROUP_PATH";s:3:"/\xe9b";s:11:"NODE_PATHES";a:2:{i:0;s:3:"/\xe9a";i:1;s:3:"/\xc3\xa9";}}'
    )
    assert read(message) == Publication(
        channel=Channel("pydio:1"),
        data="<tree>é</tree>".encode(),
        to=("group:/éb",),
        extra={b"node_paths": '["/éa","/é"]'.encode()},
    )


@pytest.mark.parametrize("group", ["''", "'0'", "0", "false", "null"])
def test_a_group_that_php_takes_for_none_is_everybody(group: str) -> None:
    body = php(f"['REPO_ID' => '1', 'CONTENT' => '{TREE}', 'GROUP_PATH' => {group}]")
    assert read(body).to is None
    found = json.loads(group.replace("'", '"'))
    text = json.dumps({"REPO_ID": "1", "CONTENT": TREE, "GROUP_PATH": found}).encode()
    assert read(text).to is None


def test_rejects_objects_at_any_depth() -> None:
    for expression in (
        "new ArrayObject()",
        f"['REPO_ID' => '1', 'CONTENT' => '{TREE}', 'X' => new DateTime()]",
        f"['REPO_ID' => '1', 'CONTENT' => '{TREE}', 'NODE_PATHES' => [[new stdClass()]]]",
    ):
        with pytest.raises(InvalidMessage):
            read(php(expression))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "neither"),
        (b"{", "neither"),
        (b"a:1:{", "neither"),
        (b'a:1:{a:0:{}s:1:"x";}', "neither"),
        (b"a:1:{" * 100_000, "neither"),
        (b'{"a":' * 100_000, "neither"),
        (b's:3:"abc";', "REPO_ID"),
        (b'{"CONTENT":"x"}', "REPO_ID"),
        (b'{"REPO_ID":true,"CONTENT":"x"}', "REPO_ID"),
        (b'{"REPO_ID":"%b","CONTENT":"x"}' % (b"x" * 256), "REPO_ID"),
        (b'{"REPO_ID":"\\ud800","CONTENT":"x"}', "neither"),
        (b'{"REPO_ID":"1"}', "CONTENT"),
        (b'{"REPO_ID":"1","CONTENT":["x"]}', "CONTENT"),
        (b'{"REPO_ID":"1","CONTENT":"\\ud800"}', "neither"),
        (b'{"REPO_ID":"1","CONTENT":"x","USER_ID":""}', "USER_ID"),
        (b'{"REPO_ID":"1","CONTENT":"x","GROUP_PATH":[]}', "GROUP_PATH"),
        (b'{"REPO_ID":"1","CONTENT":"x","NODE_PATHES":"/a"}', "NODE_PATHES"),
        (b'a:2:{s:7:"REPO_ID";s:1:"1";s:7:"CONTENT";s:2:"\xff\xfe";}', "CONTENT is not UTF-8"),
    ],
)
def test_rejects_a_message_with_the_reason(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidMessage, match=reason):
        read(body)


@given(st.binary(max_size=200))
def test_raises_no_other_error(body: bytes) -> None:
    for start in (b"", b"a:2:{", b"O:", b"{"):
        with contextlib.suppress(InvalidMessage):
            read(start + body)


def test_each_workspace_has_a_channel() -> None:
    assert workspace("9f2ab") == "pydio:9f2ab"
    assert workspace("*") == workspace("AJXP_REPO_SCOPE_ALL") == BROADCAST
