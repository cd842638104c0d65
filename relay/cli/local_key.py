"""Generate a [jwt] key for a relay without configuration.

With the embedded Valkey and without a key, a random key is stored beside the data, so that
`scripts/run` and `relay token` work without configuration. With an external Redis the key stays
empty and tokens are rejected, because other relays on that Redis do not have the key.
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
    """Return the data directory of the embedded Valkey."""
    return Path(config.redis.embedded_dir or "data")


def uses_local_key(config: Config) -> bool:
    """Return True if no key is configured and a generated key can be used."""
    return (
        config.redis.url == "embedded"
        and config.jwt.algorithm.startswith("HS")
        and not config.jwt.key.get_secret_value()
    )


def with_local_key(config: Config) -> Config:
    """Return `config` with the generated key if `uses_local_key`. It is generated once."""
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
        # Write the file before linking its name: another process may read it at the same time.
        fresh = path.with_name(f"{_NAME}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(48) + "\n")
        try:
            # Unlike a rename, a link does not replace the key of another process.
            os.link(fresh, path)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return path.read_text().strip()
