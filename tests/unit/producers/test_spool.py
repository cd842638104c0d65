"""The spool file, also after a process died while it wrote or delivered."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path

import pytest

from producers.outgoing import OutgoingEvent, PublishFailed, outgoing_event
from producers.spool import BATCH_LINES, Spool


def event(number: int) -> OutgoingEvent:
    return outgoing_event("news", number, uid=f"u{number}", type="t", to="ann", client="c")


def spool(path: Path, *, limit_s: float = 2.0, limit_bytes: int = 1 << 20) -> Spool:
    return Spool(path / "spool", limit_s=limit_s, limit_bytes=limit_bytes)


def taken(kept: Spool) -> list[int]:
    """Deliver everything and return the events' data in order."""
    found = []
    while lines := (batch := kept.batch()).lines:
        found += [int(line.event.data) for line in lines if line.event is not None]
        kept.mark_delivered(batch, len(lines))
    return found


def test_lines_come_back_as_they_were_in_order_and_the_file_is_empty_after(tmp_path: Path) -> None:
    kept = spool(tmp_path)
    assert not kept.pending()
    for number in range(BATCH_LINES + 5):
        kept.append(event(number))
    first = kept.batch().lines[0]
    assert first.event == event(0)
    assert json.loads(first.text) == {
        "uid": "u0",
        "channel": "news",
        "data": "0",
        "type": "t",
        "to": ["user:ann"],
        "client": "c",
    }
    assert kept.path.stat().st_mode & 0o777 == 0o600
    assert taken(kept) == list(range(BATCH_LINES + 5))
    assert not kept.pending()


def test_a_part_that_was_delivered_is_not_sent_again_by_another_process(tmp_path: Path) -> None:
    kept = spool(tmp_path)
    for number in range(5):
        kept.append(event(number))
    kept.mark_delivered(kept.batch(), 3)
    assert taken(spool(tmp_path)) == [3, 4]


def test_a_late_answer_to_a_batch_does_not_hide_newer_lines(tmp_path: Path) -> None:
    slow, fast = spool(tmp_path), spool(tmp_path)
    for number in range(4):
        slow.append(event(number))
    late = slow.batch()
    assert taken(fast) == [0, 1, 2, 3]
    for number in range(4, 8):
        fast.append(event(number))
    slow.mark_delivered(late, 4)
    assert taken(fast) == [4, 5, 6, 7]


def test_a_removed_file_hides_no_newer_lines(tmp_path: Path) -> None:
    kept = spool(tmp_path)
    for number in range(3):
        kept.append(event(number))
    kept.mark_delivered(kept.batch(), 2)
    kept.path.unlink()
    for number in range(3, 6):
        kept.append(event(number))
    assert taken(kept) == [3, 4, 5]


def test_a_last_line_without_its_end_is_cut_off(tmp_path: Path) -> None:
    kept = spool(tmp_path)
    kept.append(event(1))
    with kept.path.open("ab") as file:
        file.write(b'{"uid": "half' + b"x" * 200_000)
    kept.append(event(2))
    assert taken(kept) == [1, 2]


def test_invalid_lines_have_a_reason_and_do_not_stop_the_others(tmp_path: Path) -> None:
    kept = spool(tmp_path)
    kept.append(event(1))
    with kept.path.open("ab") as file:
        file.write(b'oops\n{"uid":"u","channel":"","data":"1"}\n{"channel":"a","data":"1"}\n[]\n')
    kept.append(event(2))
    batch = kept.batch()
    reasons = [line.reason for line in batch.lines]
    assert not reasons[0]
    assert not reasons[5]
    assert all(reason.startswith("invalid spool line") for reason in reasons[1:5])
    kept.reject(batch.lines[1], reasons[1])
    (refused,) = (tmp_path / "spool.refused").read_text().splitlines()
    assert json.loads(refused) == {"reason": reasons[1], "line": "oops"}
    assert taken(kept) == [1, 2]


def test_a_full_spool_and_a_full_disk_are_errors_that_leave_it_whole(tmp_path: Path) -> None:
    kept = spool(tmp_path, limit_bytes=250)
    kept.append(event(1))
    kept.append(event(2))
    with pytest.raises(PublishFailed, match="full"):
        kept.append(event(3))
    size = kept.path.stat().st_size
    roomy = spool(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, old[1]))
    try:
        with pytest.raises(PublishFailed, match="spool"):
            roomy.append(event(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert taken(roomy) == [1, 2]


def test_a_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PublishFailed, match="No such file"):
        spool(tmp_path / "missing").append(event(1))


def test_waiting_for_the_lock_has_a_time_limit(tmp_path: Path) -> None:
    kept = spool(tmp_path, limit_s=0.1)
    kept.append(event(1))
    with (tmp_path / "spool.state").open("rb") as state:
        fcntl.flock(state, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(PublishFailed, match="locked"):
            kept.append(event(2))
        assert time.monotonic() - began < 1


def _fill(path: Path, first: int) -> None:
    kept = spool(path, limit_s=10)
    for number in range(first, first + 50):
        kept.append(event(number))


def test_processes_that_append_at_once_lose_nothing_and_keep_their_own_order(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fill, args=(tmp_path, first)) for first in (0, 1000, 2000)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = taken(spool(tmp_path))
    assert len(found) == 150
    for first in (0, 1000, 2000):
        own = [number for number in found if first <= number < first + 50]
        assert own == list(range(first, first + 50))
    assert os.path.getsize(tmp_path / "spool") == 0
