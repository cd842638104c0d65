"""`relay serve`: run relay, alone, as the supervisor of several workers or as one of them."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import sys
from pathlib import Path

from relay.cli import configured
from relay.cli.banner import banner
from relay.cli.configured import configuration
from relay.cli.local_key import uses_local_key, with_local_key
from relay.config.loading import Config
from relay.core.worker_memory import Worker
from relay.process import app, logs, supervisor
from relay.rights.token import TokenReader

_log = logging.getLogger(__name__)


def serve(options: argparse.Namespace) -> int:
    """Serve until a signal arrives and return the exit code."""
    if getattr(options, "worker", None):
        return _work(Worker.parse(options.worker))

    def reload() -> Config:
        config = with_local_key(configuration(options, complete=True))
        app.check(config)
        return config

    given = configuration(options)
    # A configuration of another server is not for trying relay out.
    local = uses_local_key(given) and not configured.is_foreign(options)
    config = with_local_key(given)
    logs.setup(config.log)
    for note in config.notes:
        _log.warning("%s", note)

    def on_ready(port: int, redis_address: str) -> None:
        # Show a token only if relay made the key itself, for trying it out: a token of the
        # operator's key does not belong on a screen. No token belongs in a journal or a pipe.
        token = None
        if local and sys.stdout.isatty():
            token = TokenReader(config.jwt).sign("me", ["*"], [], 86400.0)
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
            # The disk is full, or the reader of the pipe has closed it. Serve all the same.
            _log.warning("Could not print the banner: %s", exc.strerror)
            # Otherwise Python fails again at exit, when it flushes the buffered text.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    run = supervisor.run if config.node.workers > 1 else app.run
    return run(config, reload=reload, on_ready=on_ready)


def _work(worker: Worker) -> int:
    """Serve as one of several workers. The supervisor sends the configuration."""
    # Trusted: written by the supervisor of this worker.
    config: Config = pickle.loads(Worker.first_message())  # noqa: S301
    logs.setup(config.log, worker=worker.number)
    return app.run(
        config, reload=lambda: config, on_ready=lambda *_: Worker.report_ready(), worker=worker
    )


def _launcher() -> list[str]:
    """Return the words that run this relay's command line from any folder."""
    root = Path(__file__).parents[2]
    run = root / "scripts" / "run"
    # Outside this .venv, scripts/run would set up another one.
    if Path(sys.prefix) == root / ".venv" and run.exists():
        return [str(run)]
    return [sys.executable, "-m", "relay"]
