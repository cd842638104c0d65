"""Sessions over changing receivers: order, no repeats, bounded buffers, and the end."""

from __future__ import annotations

import json

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from relay.transports.socket.deadlines import Deadlines
from relay.transports.sockjs.frames import array_frame, element
from relay.transports.sockjs.session import SockJsSession

BUFFER = 200
LIMIT = 300


class DetachedSessions(Deadlines[SockJsSession]):
    """Sessions whose timeout is running. The test decides when it expires."""

    def __init__(self) -> None:
        super().__init__(1.0, SockJsSession.expire)
        self.running: set[SockJsSession] = set()

    def add(self, item: SockJsSession) -> None:
        self.running.add(item)

    def remove(self, item: SockJsSession) -> None:
        self.running.discard(item)


class FakeReceiver:
    """A poll, or a stream with a limit, without a socket.

    A frame that is longer than the limit fits into a stream that has sent nothing else.
    """

    carrier = None

    def __init__(self, *, poll: bool) -> None:
        self.poll = poll
        self.full = False
        self.finished = False
        self.ended = False
        self.refused = b""
        self.aborted = False
        self.frames: list[bytes] = []
        self.size = 0

    def send(self, frame: bytes) -> bool:
        assert not self.finished
        assert not self.ended
        if self.size > 1 and self.size + len(frame) > LIMIT and not self.poll:
            self.finished = True
            return False
        self.frames.append(frame)
        self.size += len(frame)
        self.finished = self.poll or self.size > LIMIT
        return True

    def send_messages(self, elements: bytes) -> bool:
        return self.send(array_frame(elements))

    def end(self) -> None:
        self.ended = True

    def refuse(self, frame: bytes) -> None:
        self.refused = frame

    def abort(self) -> None:
        self.aborted = True

    def waiting_bytes(self) -> int:
        return 0


class Client(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.detached = DetachedSessions()
        self.events: list[str] = []
        self.session = SockJsSession(
            transport="xhr", peer="", buffer_bytes=BUFFER, detached=self.detached
        )
        self.session.on_full = lambda: self.events.append("full")
        self.session.on_drained = lambda: self.events.append("drained")
        self.session.on_closed = lambda: self.events.append("closed")
        self.session.on_removed = lambda: self.events.append("gone")
        self.receiver: FakeReceiver | None = None
        self.said = 0
        self.got: list[int] = []
        self.opens = 0
        self.farewells = 0
        self.closing = False
        self.gone = False
        self.attached = False

    def look(self, receiver: FakeReceiver) -> None:
        """The received frames, and whether the receiver accepts more."""
        for frame in receiver.frames:
            match frame[:1]:
                case b"o":
                    self.opens += 1
                case b"a":
                    assert not self.farewells
                    self.got += [int(each[1:]) for each in json.loads(frame[1:])]
                case b"c":
                    self.farewells += 1
                case other:
                    assert other == b"h"
        receiver.frames.clear()
        if receiver.finished and self.receiver is receiver:
            self.receiver = None

    @rule(count=st.integers(1, 3), size=st.integers(0, 150))
    def write(self, count: int, size: int) -> None:
        data = b""
        for _ in range(count):
            # The text begins with a letter so that a number's zeros are its own.
            data += element(b"n%0*d" % (size, self.said))
            self.said += 1
        if self.closing or self.gone:
            self.said -= count
        self.session.write(data)
        if self.receiver is not None:
            self.look(self.receiver)

    @precondition(lambda self: not self.gone)
    @rule(poll=st.booleans(), full=st.booleans())
    def attach(self, poll: bool, full: bool) -> None:
        receiver = FakeReceiver(poll=poll)
        receiver.full = full and not poll
        had = self.receiver
        self.attached = True
        self.session.attach(receiver)
        if had is not None:
            assert receiver.refused[:2] == b"c["
            assert (b"2010" in receiver.refused) == (not self.closing)
            assert not receiver.frames
            return
        assert not receiver.refused
        self.receiver = receiver
        self.look(receiver)

    @precondition(lambda self: self.receiver is not None)
    @rule()
    def beat(self) -> None:
        assert self.receiver is not None
        if self.receiver.ended:
            return
        self.session.send_heartbeat(self.receiver)
        self.look(self.receiver)

    @precondition(lambda self: self.receiver is not None and not self.receiver.poll)
    @rule(full=st.booleans())
    def fill(self, full: bool) -> None:
        assert self.receiver is not None
        self.receiver.full = full
        (self.session.receiver_full if full else self.session.receiver_drained)()

    @precondition(lambda self: self.receiver is not None)
    @rule()
    def break_off(self) -> None:
        assert self.receiver is not None
        receiver, self.receiver = self.receiver, None
        self.session.receiver_lost(receiver, complete=receiver.ended)
        if not receiver.ended:
            self.gone = True

    @precondition(lambda self: self.receiver is None and not self.gone)
    @rule()
    def expire(self) -> None:
        assert self.session in self.detached.running
        self.detached.remove(self.session)
        self.session.expire()
        self.gone = True

    @precondition(lambda self: not self.gone)
    @rule()
    def close(self) -> None:
        self.session.close_with(3000, "bye")
        self.closing = True
        if self.receiver is not None:
            self.look(self.receiver)

    @invariant()
    def in_order_and_once(self) -> None:
        assert self.got == list(range(len(self.got)))
        assert self.opens <= 1
        assert self.opens == (1 if self.attached else 0)
        if self.receiver is not None and not self.gone:
            # Nothing is buffered while a receiver could accept it.
            assert len(self.got) == self.said
        if self.farewells:
            assert len(self.got) == self.said

    @invariant()
    def alone_or_not(self) -> None:
        alone = self.receiver is None and not self.gone
        assert (self.session in self.detached.running) == alone

    @invariant()
    def full_is_told_as_it_changes(self) -> None:
        told = [each for each in self.events if each in ("full", "drained")]
        assert told == ["full", "drained"] * (len(told) // 2) + ["full"] * (len(told) % 2)
        if not self.session.closing:
            assert self.session.full == (len(told) % 2 == 1)
            if self.receiver is None:
                assert self.session.full == (self.session.waiting_bytes() > BUFFER)
            else:
                assert self.session.full == self.receiver.full

    @invariant()
    def the_end_is_told_once(self) -> None:
        assert self.events.count("gone") == int(self.gone)
        assert self.events.count("closed") <= 1
        if self.gone:
            assert "closed" in self.events
            assert not self.session.waiting_bytes()
        if self.farewells and self.receiver is None:
            assert "closed" in self.events
        if not self.gone and not self.closing:
            assert "closed" not in self.events


TestClient = Client.TestCase
TestClient.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
