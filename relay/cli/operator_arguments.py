"""The arguments of operators' commands, which inspect and change running workers."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Protocol

from relay.core.model import EntryID

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse.Action

COMMANDS = (
    "publish",
    "tail",
    "streams",
    "reshard",
    "workers",
    "dead-letters",
    "status",
    "trim",
    "connections",
    "connection",
    "events",
    "explain",
    "disconnect",
    "unsubscribe",
)

_TAIL_EXIT_CODES = (
    "Stop with Ctrl-C, or by closing its output. Exit codes: 0 stopped; 1 configuration error, no"
    " permission, or Redis unreachable at the start (one line on standard error has the reason);"
    " 2 usage."
)
_DOCTOR_EXIT_CODES = (
    "Exit codes: 0 no errors; 1 errors, or a configuration that is not valid; 2 usage."
)
_STATUS_EXIT_CODES = (
    "Exit codes: 0 no problem; 1 a problem or configuration error (lines on standard error have"
    " the reasons); 2 usage."
)


class Operator(Protocol):
    """Adds the parser of one command with the options that all of them have."""

    def __call__(
        self, commands: Commands, name: str, about: str, exit_codes: str = ...
    ) -> argparse.ArgumentParser:
        """Return the parser, to add the arguments of this command."""


def add(commands: Commands, operator: Operator) -> None:
    """Add all operators' commands."""
    publish = operator(commands, "publish", "append an event to CHANNEL and print its ID")
    publish.add_argument("channel", metavar="CHANNEL")
    publish.add_argument("data", metavar="DATA", help="JSON or any text; -: standard input")
    publish.add_argument("--type", metavar="T", help="type of the event for clients")
    publish.add_argument(
        "--uid",
        metavar="ID",
        help="unique ID of your choice: within [publish] uid_window_s the event is appended once;"
        " repeating the command prints the first entry ID again",
    )
    publish.add_argument(
        "--to",
        action="append",
        metavar="NAMES",
        help="recipients, separated by commas: user:U, group:G, client:C or a user's name; can be"
        " repeated; default: all",
    )
    publish.add_argument("--client", metavar="C", help="ID of the client that caused the event")
    publish.add_argument(
        "--durability",
        metavar="D",
        help="wait until the event is replicated:REPLICAS:MS or fsynced:REPLICAS:MS, or do not wait"
        " (fast); default: [namespace] durability",
    )

    tail = operator(
        commands,
        "tail",
        "follow CHANNEL: ID, type, client and data of each event",
        _TAIL_EXIT_CODES,
    )
    tail.add_argument("channel", metavar="CHANNEL")
    tail.add_argument(
        "--after",
        type=_entry_id,
        metavar="ID",
        help="begin after this ID (0: at the oldest entry); default: only new events",
    )

    streams = operator(
        commands, "streams", "list streams with length, age, retention and progress of the workers"
    )
    streams.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help="pattern of channel names with * ? [abc]",
    )
    reshard = operator(
        commands,
        "reshard",
        "move streams after servers were added to [redis] url or removed from it; stop all workers"
        " first",
    )
    reshard.add_argument(
        "--dry-run", action="store_true", help="show what would be moved, and move nothing"
    )
    reshard.add_argument(
        "--removed",
        metavar="URLS",
        default="",
        help="servers that are no longer in [redis] url; all their streams are moved",
    )
    operator(commands, "workers", "list all workers with uptime, connections, streams and lag")
    _dead_letters(commands, operator)

    status = operator(
        commands,
        "status",
        "check the health of Redis and all workers, lag and dead letters",
        _STATUS_EXIT_CODES,
    )
    status.add_argument(
        "--min-workers",
        type=_count,
        default=1,
        metavar="N",
        help="report a problem if fewer workers are alive (default 1)",
    )
    status.add_argument(
        "--max-lag",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="report a problem if the lag is larger, in seconds (default 10)",
    )
    status.add_argument(
        "--max-dead-letters",
        type=_count,
        metavar="N",
        help="report a problem if there are more dead letters (default: no limit)",
    )

    doctor = operator(
        commands,
        "doctor",
        "find faults of Redis, host, data, configuration and proxies; run it with relay's own"
        " configuration",
        _DOCTOR_EXIT_CODES,
    )
    doctor.add_argument(
        "--url",
        metavar="URL",
        help="also check the proxies in front of relay, by its public URL; takes half a minute",
    )

    trim = operator(
        commands,
        "trim",
        "remove old entries of CHANNEL; default limits: those of its namespace",
    )
    trim.add_argument("channel", metavar="CHANNEL")
    trim.add_argument("--max-entries", type=_count, metavar="N", help="keep the newest N")
    trim.add_argument("--max-age", type=_seconds, metavar="S", help="keep those of the last S s")

    connections = operator(
        commands,
        "connections",
        "list the connections on all workers, by user, channel, protocol or address",
    )
    connections.add_argument("--user", metavar="USER", help="of this user; '': without a user")
    connections.add_argument(
        "--channel", metavar="CHANNEL", help="subscribed to this channel, or a pattern with * ? [a]"
    )
    connections.add_argument(
        "--protocol", "--door", metavar="NAME", help="native, centrifugo, socketio, seafile, pydio"
    )
    connections.add_argument(
        "--address", metavar="A", help="address, or that in X-Forwarded-For, begins with A"
    )
    connections.add_argument(
        "--limit", type=_count, default=100, metavar="N", help="list at most N (default 100)"
    )
    connections.add_argument(
        "--after", default="", metavar="ID", help="continue after the last ID of a list"
    )
    operator(commands, "connection", "show one connection with its subscriptions").add_argument(
        "id", metavar="ID"
    )

    events = operator(
        commands,
        "events",
        "show what happened to clients: connections, rejections, subscriptions, notices",
    )
    events.add_argument("--user", metavar="USER", help="of this user; '': without a user")
    events.add_argument("--connection", metavar="ID", help="of this connection")
    events.add_argument("--channel", metavar="CHANNEL", help="of this channel")
    events.add_argument("--protocol", "--door", metavar="NAME", help="of this protocol")
    events.add_argument(
        "--event",
        metavar="KIND",
        help="connected, disconnected, subscribed, unsubscribed, rejected, gap or reset",
    )
    events.add_argument(
        "--limit", type=_count, default=100, metavar="N", help="the newest N (default 100)"
    )
    events.add_argument("--follow", action="store_true", help="print new events until Ctrl-C")

    explain = operator(
        commands,
        "explain",
        "say whether and when USER received the event ID of CHANNEL, or why not",
    )
    explain.add_argument("user", metavar="USER")
    explain.add_argument("channel", metavar="CHANNEL")
    explain.add_argument("id", type=_entry_id, metavar="ID")

    disconnect = operator(
        commands, "disconnect", "close all connections of USER, on all workers and in all protocols"
    )
    disconnect.add_argument("user", metavar="USER")
    unsubscribe = operator(
        commands,
        "unsubscribe",
        "end USER's subscriptions to CHANNEL; use `revoke` to end the right to read it",
    )
    unsubscribe.add_argument("channel", metavar="CHANNEL")
    unsubscribe.add_argument("user", metavar="USER")


def _dead_letters(commands: Commands, operator: Operator) -> None:
    about = "entries that could not be delivered: list, show, requeue, drop"
    letters = commands.add_parser(
        "dead-letters", help=about, description=about, allow_abbrev=False
    ).add_subparsers(dest="action", required=True, metavar="ACTION")
    operator(letters, "list", "list dead letters with ID, channel, age and reason")
    operator(letters, "show", "show one dead letter with all fields").add_argument(
        "id", type=_entry_id, metavar="ID"
    )
    for name, about in (
        ("requeue", "append the original fields to their stream again and remove the dead letter"),
        ("drop", "remove dead letters; the entries stay in their streams"),
    ):
        parser = operator(letters, name, about)
        parser.add_argument("ids", nargs="*", type=_entry_id, metavar="ID")
        parser.add_argument("--all", action="store_true", help="all existing dead letters")


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Check combinations of arguments. Exit with code 2 if one is not valid."""
    if getattr(options, "ids", None) is not None and bool(options.ids) == options.all:
        parser.error(f"dead-letters {options.action}: specify IDs or --all")


def _entry_id(text: str) -> EntryID:
    try:
        return EntryID.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:50]!r} is not an entry ID such as 1795240520120-0"
        ) from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError("must be an integer of at least 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError("must be a number of seconds of at least 0")
    return seconds
