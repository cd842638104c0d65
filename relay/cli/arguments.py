"""The arguments of the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from relay.cli import imported_arguments
from relay.cli import operator_arguments as operate
from relay.cli.operator_arguments import Commands
from relay.config.imported import ConfigurationImport

_EXIT_CODES = (
    "Exit codes: 0 done; 1 configuration or start error (one line on standard error has the"
    " reason); 2 usage."
)
OPERATOR_EXIT_CODES = (
    "Exit codes: 0 done; 1 failed: configuration error, Redis unreachable, no permission, or not"
    " found (one line on standard error has the reason); 2 usage."
)


def parse(
    arguments: Sequence[str] | None, imports: Sequence[ConfigurationImport] = ()
) -> argparse.Namespace:
    """Parse the command line. Exit with code 2 if it is not valid.

    `imports` read the configurations of other servers; their options and commands are included.
    """
    configured = partial(_configured, imports=imports)
    parser = argparse.ArgumentParser(
        prog="relay",
        description="Delivers events from Redis streams to websocket and SSE clients.",
        epilog=_EXIT_CODES,
        # Otherwise --inse would be accepted for --insecure.
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = _command(commands, "serve", "run relay until it receives SIGTERM or SIGINT")
    configured(serve)
    serve.add_argument("--host", help="address to listen on, [server] host")
    serve.add_argument("--port", metavar="N", help="TCP port, [server] port; default 8000")
    serve.add_argument(
        "--workers", metavar="N", help="processes that share the port, [node] workers; default 1"
    )
    # The supervisor of several workers gives each of them its number and descriptors.
    serve.add_argument("--worker", help=argparse.SUPPRESS)
    _redis(serve)
    _strict(serve)
    serve.add_argument(
        "--insecure",
        action="store_true",
        help="allow anyone to read all channels over SSE and WebSocket; for development only",
    )

    generate = _command(
        commands, "genconfig", "print config.example.ini: every setting with its default"
    )
    generate.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help="write to a new file; a suffix of another server selects a minimal file for it",
    )
    convert = _command(
        commands, "convert-config", "print another server's configuration as an INI file"
    )
    configured(convert)
    check = _command(commands, "checkconfig", "check the configuration as `serve` does")
    configured(check)
    replace = _command(
        commands, "upgrade", "replace the running relay by the installed version; needs a PID file"
    )
    configured(replace)
    _command(commands, "version", "print the version")

    token = _command(commands, "token", "print a token signed with the first [jwt] key")
    configured(token)
    token.add_argument("--user", required=True, metavar="U", help="the user of the token")
    token.add_argument(
        "--channel",
        required=True,
        nargs="+",
        action="extend",
        metavar="C",
        help="channel names or patterns; * matches any characters",
    )
    token.add_argument("--group", nargs="+", action="extend", default=[], metavar="G")
    token.add_argument(
        "--ttl",
        type=_ttl_s,
        default=86400.0,
        metavar="S",
        help="seconds until the token expires (default 86400, one day); 0: never",
    )

    for name, about in (
        ("revoke", "revoke USER's right to read CHANNEL; overrides all other rights until `grant`"),
        ("grant", "end a revocation: token, protocol, application and rights hash decide again"),
    ):
        change = _command(commands, name, about)
        configured(change)
        _redis(change)
        change.add_argument("channel", metavar="CHANNEL")
        change.add_argument("user", metavar="USER")
        change.add_argument("--json", action="store_true", help="print one JSON object")
    operate.add(commands, partial(_operator, configured=configured))
    imported_arguments.add_commands(commands, imports, _command, _serving)
    options = parser.parse_args(arguments)
    operate.check(options, parser)
    return options


def _operator(
    commands: Commands,
    name: str,
    about: str,
    exit_codes: str = OPERATOR_EXIT_CODES,
    *,
    configured: Callable[[argparse.ArgumentParser], None],
) -> argparse.ArgumentParser:
    """Add the parser of an operator's command, with the options that all of them have."""
    parser = _command(commands, name, about, exit_codes)
    configured(parser)
    _redis(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    return parser


def _command(
    commands: Commands, name: str, about: str, exit_codes: str = _EXIT_CODES
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=about, description=about, epilog=exit_codes, allow_abbrev=False
    )


def _configured(parser: argparse.ArgumentParser, *, imports: Sequence[ConfigurationImport]) -> None:
    suffixes = ", ".join(suffix for each in imports for suffix in each.suffixes)
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help="INI file; see config.example.ini"
        + (f". Other servers' files are recognized by suffix: {suffixes}" if suffixes else ""),
    )
    imported_arguments.add_options(parser, imports)
    _overrides(parser)


def _serving(parser: argparse.ArgumentParser) -> None:
    """Add the options of relay to another server's command line."""
    _overrides(parser)
    _strict(parser)
    parser.add_argument(
        "--workers", metavar="N", help="processes that share the port, [node] workers; default 1"
    )


def _strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail if the environment has an unknown RELAY_ variable",
    )


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="override a setting of file or environment; can be repeated",
    )


def _redis(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--redis", metavar="URL", help="[redis] url; default embedded")


def _ttl_s(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError("must be a number of seconds, 0 for never")
    return seconds
