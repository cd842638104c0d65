"""Run one command. An expected error becomes one line on standard error and an exit code."""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
from collections.abc import Callable, Sequence

from relay import __version__
from relay.cli.arguments import parse
from relay.cli.operator_arguments import COMMANDS as OPERATOR_COMMANDS
from relay.core.errors import RelayError
from relay.process.start_signals import release_signals
from relay.protocols import find_imports

OK, FAILED = 0, 1

_Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Escape letters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments, find_imports())
    if options.command != "serve" and not hasattr(options, "imported"):
        release_signals()
    try:
        return _run(options.command, options)
    except RelayError as exc:
        return _failed(exc, options)
    except BaseExceptionGroup as group:
        # Raised by a task of a TaskGroup.
        expected, rest = group.split(RelayError)
        if rest is not None or expected is None:
            raise
        return _failed(_first(expected), options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `relay genconfig | head`. Without this, Python reports the closed pipe again when it
        # flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _run(command: str, options: argparse.Namespace) -> int:
    """Run the command with garbage collections that skip the imported modules."""
    run = _runner(command)
    gc.freeze()
    gc.enable()
    return run(options)


def _runner(command: str) -> _Command:
    """Return the function that runs the command.

    Only the modules that the command needs are imported: aiohttp, redis-py, PyJWT and pydantic
    take most of a second together.
    """
    match command:
        case "version":
            return _version
        case "serve":
            from relay.cli.serving import serve

            return serve
        case "upgrade":
            from relay.cli.upgrade import upgrade

            return upgrade
        case "genconfig" | "checkconfig" | "convert-config":
            from relay.cli import configured

            return configured.COMMANDS[command]
        case "token" | "revoke" | "grant":
            from relay.cli import access

            return access.COMMANDS[command]
        case "doctor":
            from relay.cli import doctor

            return doctor.doctor
        case _ if command in OPERATOR_COMMANDS:
            from relay.cli import operate

            return operate.run
        case _:
            return _imported


def _imported(options: argparse.Namespace) -> int:
    """Run a command of another server's command line, as `relay centrifugo`."""
    match options.action:
        case "version":
            print(f"{options.imported.version} (relay {__version__})")
            return OK
        case "help":
            options.print_help()
            return OK
        case action:
            if action not in (None, "serve"):
                release_signals()
            return _run(action or "serve", options)


def _version(_options: argparse.Namespace) -> int:
    print(f"relay {__version__}")
    return OK


def _first(group: BaseExceptionGroup[RelayError]) -> BaseException:
    each: BaseException = group
    while isinstance(each, BaseExceptionGroup):
        each = each.exceptions[0]
    return each


def _failed(exc: BaseException, options: argparse.Namespace) -> int:
    from relay.core.worker_memory import Worker
    from relay.process import logs

    line = logs.redact(" ".join(str(exc).split()))
    if getattr(options, "worker", None):
        # All workers fail for the same reason. Their supervisor prints it once.
        Worker.report_error(line)
    else:
        sys.stderr.write(f"relay: {line}\n")
    return FAILED
