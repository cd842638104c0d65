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
from relay.core.errors import RelayError
from relay.core.worker_memory import Worker
from relay.process import app, logs, supervisor
from relay.process.handover import inheritance
from relay.process.service_manager import notify
from relay.rights.token import TokenReader

_log = logging.getLogger(__name__)


def serve(options: argparse.Namespace) -> int:
    """Serve until a signal arrives and return the exit code."""
    if getattr(options, "worker", None):
        return _work(Worker.parse(options.worker))
    # Now, because the old relay of an upgrade reads the standard error until then.
    inherited = inheritance()
    try:
        return _serve(options)
    except (RelayError, BaseExceptionGroup) as exc:
        if inherited.failed(exc):
            # The old relay logs it.
            return 1
        raise


def _serve(options: argparse.Namespace) -> int:
    def reload() -> Config:
        config = with_local_key(configuration(options, complete=True))
        app.check(config)
        return config

    loaded = configuration(options)
    # With the configuration of another server, relay is not just being tried out.
    local = uses_local_key(loaded) and not configured.is_imported(options)
    config = with_local_key(loaded)
    logs.setup(config.log)
    for note in config.notes:
        _log.warning("%s", note)

    def on_ready(port: int, redis_address: str) -> None:
        # Print a token only if relay has generated the key itself, for a trial. Tokens of an
        # operator's key must not be shown, and no token must be written to a journal or pipe.
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
        notify(READY=1)
        try:
            print(text, flush=True)
        except OSError as exc:
            # The disk is full or the pipe is closed. Continue to serve.
            _log.warning("Could not print the banner: %s", exc.strerror)
            # Otherwise Python fails again at exit, when it flushes the buffered text.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    run = supervisor.run if config.node.workers > 1 else app.run
    return run(config, reload=reload, on_ready=on_ready)


def _work(worker: Worker) -> int:
    """Serve as one of several workers. The supervisor sends the configuration."""
    # The data is trusted, because the supervisor of this worker has written it.
    config: Config = pickle.loads(Worker.first_message())  # noqa: S301
    logs.setup(config.log, worker=worker.number)
    return app.run(
        config, reload=lambda: config, on_ready=lambda *_: Worker.report_ready(), worker=worker
    )


def _launcher() -> list[str]:
    """Return the words that run this relay's command line from any folder."""
    root = Path(__file__).parents[2]
    run = root / "scripts" / "run"
    # Outside this .venv, scripts/run would create another one.
    if Path(sys.prefix) == root / ".venv" and run.exists():
        return [str(run)]
    return [sys.executable, "-m", "relay"]
