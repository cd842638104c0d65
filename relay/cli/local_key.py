"""The [jwt] key of a relay that nobody configured.

With the embedded Valkey and no key, one random key is made and kept beside the data, so that
`scripts/run` and `relay token` work together at once. With a Redis of one's own it stays empty,
and tokens are refused: other relays on that Redis would not know the key.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from pathlib import Path

from pydantic import SecretStr

from relay.config.loading import Config
from relay.core.errors import StartError
from relay.process.embedded import private_folder

_NAME = "jwt.key"


def data_folder(config: Config) -> Path:
    """Where the embedded Valkey keeps its data."""
    return Path(config.redis.embedded_dir or "data")


def uses_local_key(config: Config) -> bool:
    """No key is configured, and one made here would do."""
    return (
        config.redis.url == "embedded"
        and config.jwt.algorithm.startswith("HS")
        and not config.jwt.key.get_secret_value()
    )


def with_local_key(config: Config) -> Config:
    """`config` with the data folder's key where `uses_local_key`; it is made once."""
    if not uses_local_key(config):
        return config
    folder = data_folder(config)
    private_folder(folder)
    path = folder / _NAME
    try:
        key = _read_or_make(path)
    except OSError as exc:
        raise StartError(f"{path} cannot be read or written: {exc.strerror}") from exc
    jwt = config.jwt.model_copy(update={"key": SecretStr(key)})
    return dataclasses.replace(config, jwt=jwt)


def _read_or_make(path: Path) -> str:
    if not path.exists():
        # Complete before it has its name: another process may read it in the same moment.
        fresh = path.with_name(f"{_NAME}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(48) + "\n")
        try:
            # Unlike a rename, a link leaves alone what another process has put there first.
            os.link(fresh, path)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return path.read_text().strip()
