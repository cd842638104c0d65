"""IDs of polling sessions: workers find the owner, clients learn nothing from them."""

from __future__ import annotations

import pytest

from relay.transports.between_workers.session_ids import SessionIds

ADDRESS, OTHER = "5f0c9a31", "00ff00ff"
KEY = b"k" * 32


def ids(address: str = ADDRESS, *keys: bytes) -> SessionIds:
    return SessionIds(address, lambda: keys or (KEY,))


def test_every_worker_finds_the_owner() -> None:
    for address in (ADDRESS, OTHER):
        sid = ids(address).new()
        assert ids(OTHER).owner_of(sid) == address


def test_clients_cannot_tell_workers_apart() -> None:
    made = [ids().new() for _ in range(200)]
    assert len(set(made)) == 200
    assert len({sid.partition(".")[2] for sid in made}) == 200
    assert not any(ADDRESS in sid for sid in made)
    # Without the key, nothing is found.
    assert ids(ADDRESS, b"another key").owner_of(made[0]) is None


def test_the_key_before_is_accepted_too() -> None:
    sid = ids(ADDRESS, b"old").new()
    assert ids(OTHER, b"new", b"old").owner_of(sid) == ADDRESS
    assert ids(OTHER, b"new").owner_of(sid) is None


@pytest.mark.parametrize(
    "sid",
    [
        "",
        "~",
        "nonsense",
        f"~{'a' * 20}.{ADDRESS}",
        f"~{'a' * 20}.{'0' * 12}",
        f"~{'a' * 20}.{'z' * 12}",
        f"~{'ä' * 20}.{'0' * 12}",
        f"~{'a' * 20000}.{'0' * 12}",
        f"~{'a' * 20}.{'0' * 20000}",
    ],
)
def test_an_invented_id_names_no_worker(sid: str) -> None:
    assert ids().owner_of(sid) is None


def test_a_changed_id_names_no_other_worker() -> None:
    sid = ids().new()
    name, _, sealed = sid.partition(".")
    changed = f"{name}.{int(sealed, 16) ^ (1 << 40):012x}"
    assert ids().owner_of(changed) is None
