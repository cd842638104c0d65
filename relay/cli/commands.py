"""One function a command; errors become one line on standard error and an exit code."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relay import __version__
from relay.cli import configured
from relay.cli.arguments import parse
from relay.cli.banner import banner
from relay.cli.configured import configuration
from relay.cli.local_key import uses_local_key, with_local_key
from relay.cli.operator_arguments import COMMANDS as OPERATOR_COMMANDS
from relay.config.imported import Foreign
from relay.config.loading import Config
from relay.core.errors import RelayError
from relay.core.worker_memory import Worker
from relay.process import logs
from relay.process.reloading import release_signals
from relay.protocols import find_foreign
from relay.rights.token import TokenReader

OK, FAILED = 0, 1
_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = parse(arguments, find_foreign())
    if options.command in _COMMANDS and options.command != "serve":
        release_signals()
    try:
        return _COMMANDS.get(options.command, _foreign)(options)
    except RelayError as exc:
        return _failed(exc, options)
    except BaseExceptionGroup as group:
        # A part that runs in a TaskGroup found that it cannot start.
        expected, rest = group.split(RelayError)
        if rest is not None or expected is None:
            raise
        return _failed(_first(expected), options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `relay genconfig | head`: nobody reads on. Python would say so once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _first(group: BaseExceptionGroup[RelayError]) -> BaseException:
    each: BaseException = group
    while isinstance(each, BaseExceptionGroup):
        each = each.exceptions[0]
    return each


def _failed(exc: BaseException, options: argparse.Namespace) -> int:
    line = logs.redact(" ".join(str(exc).split()))
    if getattr(options, "worker", None):
        # Several workers have the same to say; their supervisor says it once.
        Worker.say_error(line)
    else:
        sys.stderr.write(f"relay: {line}\n")
    return FAILED


def _serve(options: argparse.Namespace) -> int:
    # Here, not above: the other commands need none of the server's modules.
    from relay.process import app, supervisor

    if getattr(options, "worker", None):
        return _work(Worker.parse(options.worker))

    def reload() -> Config:
        config = with_local_key(configuration(options, complete=True))
        app.check(config)
        return config

    given = configuration(options)
    # A site that another server's configuration describes is not one for trying things out.
    local = uses_local_key(given) and not configured.is_foreign(options)
    config = with_local_key(given)
    logs.setup(config.log)
    for note in config.notes:
        _log.warning("%s", note)

    def on_ready(port: int, redis_address: str) -> None:
        # A token for every channel is shown only where the relay made the key itself, for trying
        # things out; one of the operator's key does not belong on a screen or in a journal.
        # Nor does any token belong into a journal or a pipe.
        shown = local and sys.stdout.isatty()
        token = _sign(config, "me", ["*"], [], 86400.0) if shown else None
        text = banner(
            config,
            port=port,
            redis_address=redis_address,
            token=token,
            options=configured.token_options(options),
            launcher=_launcher(),
        )
        try:
            print(text, flush=True)
        except OSError as exc:
            # A full disk, or a reader that has gone: relay serves all the same.
            _log.warning("The lines to try it cannot be printed: %s", exc.strerror)
            # What is still buffered would fail once more when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    serve = supervisor.run if config.node.workers > 1 else app.run
    return serve(config, reload=reload, on_ready=on_ready)


def _work(worker: Worker) -> int:
    """Serve as one of several workers, as the supervisor's messages say."""
    from relay.process import app

    # The supervisor's own process made it.
    config: Config = pickle.loads(Worker.first_message())  # noqa: S301
    logs.setup(config.log, worker=worker.number)
    return app.run(
        config, reload=lambda: config, on_ready=lambda *_: Worker.say_ready(), worker=worker
    )


def _launcher() -> list[str]:
    """Return the words that run this relay's command line from the same folder."""
    root = Path(__file__).parents[2]
    run = root / "scripts" / "run"
    # It works in every folder, unlike `python -m relay`, but would set up a .venv of its own.
    if Path(sys.prefix) == root / ".venv" and run.exists():
        return [str(run)]
    return [sys.executable, "-m", "relay"]


def _genconfig(options: argparse.Namespace) -> int:
    configured.genconfig(options)
    return OK


def _checkconfig(options: argparse.Namespace) -> int:
    configured.checkconfig(options)
    return OK


def _convert_config(options: argparse.Namespace) -> int:
    configured.convert_config(options)
    return OK


def _foreign(options: argparse.Namespace) -> int:
    """Another server's command line."""
    foreign: Foreign = options.foreign
    match options.action:
        case "genconfig":
            return _genconfig(options)
        case "checkconfig":
            return _checkconfig(options)
        case "version":
            print(f"{foreign.version} (relay {__version__})")
            return OK
        case "help":
            options.print_help()
            return OK
        case _:
            return _serve(options)


def _version(options: argparse.Namespace) -> int:
    del options
    print(f"relay {__version__}")
    return OK


def _token(options: argparse.Namespace) -> int:
    config = with_local_key(configuration(options))
    print(_sign(config, options.user, options.channel, options.group, options.ttl or None))
    return OK


def _sign(
    config: Config, user: str, channels: list[str], groups: list[str], ttl_s: float | None
) -> str:
    return TokenReader(config.jwt).sign(user, channels, groups, ttl_s)


def _revoke(options: argparse.Namespace) -> int:
    from relay.cli.site import channel_of, user_of
    from relay.process.app import revoke

    config = configuration(options)
    channel, user = channel_of(options.channel), user_of(options.user)
    entry_id = asyncio.run(revoke(config.redis, channel, user))
    print(f"{user} reads nothing of {channel} after {entry_id} (Redis: {_where(config)})")
    return OK


def _grant(options: argparse.Namespace) -> int:
    from relay.cli.site import channel_of, user_of
    from relay.process.app import grant

    config = configuration(options)
    channel, user = channel_of(options.channel), user_of(options.user)
    entry_id = asyncio.run(grant(config.redis, channel, user))
    where = f"(Redis: {_where(config)})"
    if entry_id is None:
        raise RelayError(f"{user} is not revoked on {channel} {where}: nothing changed")
    print(
        f"the revocation of {user} on {channel} ended at {entry_id} {where};"
        f" {user} reads it again as far as token, protocol, application or rights hash allow"
    )
    return OK


def _where(config: Config) -> str:
    # Here, not above: redis-py is slow to import.
    from relay.stream.connection.connect import describe

    return describe(config.redis)


def _operate(options: argparse.Namespace) -> int:
    # Here, not above: redis-py is slow to import, and `relay version` needs none of it.
    from relay.cli import operate

    return operate.run(options, configuration(options))


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "serve": _serve,
    "genconfig": _genconfig,
    "checkconfig": _checkconfig,
    "convert-config": _convert_config,
    "version": _version,
    "token": _token,
    "revoke": _revoke,
    "grant": _grant,
    **dict.fromkeys(OPERATOR_COMMANDS, _operate),
}
