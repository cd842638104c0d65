"""relay/stream/read/groups.py: names."""

from __future__ import annotations

from relay.stream.read import groups


def test_a_group_leads_back_to_its_worker() -> None:
    assert groups.group_of("host_8000:0a1b2c3d") == b"relay:host_8000:0a1b2c3d"
    assert groups.instance_of(b"relay:host_8000:0a1b2c3d") == "host_8000:0a1b2c3d"
    assert groups.instance_of(groups.MARKER_GROUP) is None
    assert groups.instance_of(groups.FAILOVER_GROUP) is None
    assert groups.instance_of(b"mine") is None


def test_markers_fit_a_signed_number() -> None:
    assert all(0 < groups.new_marker() < 2**32 for _ in range(1000))
