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
    "workers",
    "dead-letters",
    "status",
    "trim",
    "disconnect",
    "unsubscribe",
)

_TAIL_EXIT_CODES = (
    "Ends with ^C, or when nobody reads its output any more. Exit codes: 0 ended so; 1 Redis away"
    " at the start, no rights, configuration (one line on standard error says which); 2 usage."
)
_STATUS_EXIT_CODES = (
    "Exit codes: 0 good; 1 not good, or configuration (a line on standard error says why); 2 usage."
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
    publish.add_argument("--type", metavar="T", help="a word for clients")
    publish.add_argument(
        "--uid",
        metavar="ID",
        help="your own name for the event: within [publish] uid_window_s it is appended once, and"
        " its first ID is printed again",
    )
    publish.add_argument(
        "--to",
        action="append",
        metavar="WHO",
        help="only these receive it: user:U, group:G, client:C or a user's name; commas between"
        " several; may be repeated",
    )
    publish.add_argument("--client", metavar="C", help="who caused it")

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
        help="begin after this ID (0: with the oldest entry); without: with what comes from now on",
    )

    streams = operator(
        commands, "streams", "length, age and retention of streams, and how far workers have read"
    )
    streams.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="of channels: * ? [abc]"
    )
    operator(commands, "workers", "the workers of the site: since when, connections, streams, lag")
    _dead_letters(commands, operator)

    status = operator(
        commands,
        "status",
        "is the site good? Redis, workers, lag, dead letters",
        _STATUS_EXIT_CODES,
    )
    status.add_argument(
        "--min-workers", type=_count, default=1, metavar="N", help="fewer are not good; default 1"
    )
    status.add_argument(
        "--max-lag",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="a larger lag is not good; default 10",
    )
    status.add_argument(
        "--max-dead-letters",
        type=_count,
        metavar="N",
        help="more are not good; default: any number",
    )

    trim = operator(
        commands,
        "trim",
        "remove old entries of CHANNEL now; without a limit: those of its namespace",
    )
    trim.add_argument("channel", metavar="CHANNEL")
    trim.add_argument("--max-entries", type=_count, metavar="N", help="keep the newest N")
    trim.add_argument("--max-age", type=_seconds, metavar="S", help="keep those of S seconds")

    disconnect = operator(
        commands, "disconnect", "close every connection of USER, on all workers, in all protocols"
    )
    disconnect.add_argument("user", metavar="USER")
    unsubscribe = operator(
        commands,
        "unsubscribe",
        "end USER's subscriptions to CHANNEL; the rights stay, `revoke` takes them",
    )
    unsubscribe.add_argument("channel", metavar="CHANNEL")
    unsubscribe.add_argument("user", metavar="USER")


def _dead_letters(commands: Commands, operator: Operator) -> None:
    about = "entries that could not be delivered: list, show, requeue, drop"
    letters = commands.add_parser(
        "dead-letters", help=about, description=about, allow_abbrev=False
    ).add_subparsers(dest="action", required=True, metavar="ACTION")
    operator(letters, "list", "ID, channel, reason and age of each")
    operator(letters, "show", "one of them with all its fields").add_argument(
        "id", type=_entry_id, metavar="ID"
    )
    for name, what in (
        ("requeue", "append the original fields to their stream again and remove the letter"),
        ("drop", "remove letters; the entries themselves stay where they are"),
    ):
        parser = operator(letters, name, what)
        parser.add_argument("ids", nargs="*", type=_entry_id, metavar="ID")
        parser.add_argument("--all", action="store_true", help="all that are there now")


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Check combinations of arguments. Exit with code 2 if one is not valid."""
    if getattr(options, "ids", None) is not None and bool(options.ids) == options.all:
        parser.error(f"dead-letters {options.action}: give IDs, or --all")


def _entry_id(text: str) -> EntryID:
    try:
        return EntryID.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:50]!r} is no ID; one looks like 1795240520120-0"
        ) from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError("a whole number, 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError("seconds, 0 or more")
    return seconds
