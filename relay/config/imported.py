"""Configuration of another server, converted to relay's settings by the protocol that replaces it.

A protocol's folder may have a module `imported` with an `IMPORT` (`relay.protocols`). The command
line then accepts the other server's files with `-c`, its folder with an option of the protocol, or
its whole command line after a command of its name: `relay serve -c config.json`, `relay serve
--seafile-conf-dir DIR`, `relay centrifugo --port=8001`. These settings are the lowest layer of the
configuration: above the defaults, below our INI file, RELAY_ variables, --set and flags. The order
of the other server's own sources is decided in `ConfigurationImport.read`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedSetting:
    """A setting of relay with the value from the other configuration.

    An error message begins with `where` and `text`, for example `config.json: port = ` and `x`.
    `why` is the comment above the setting when it is written to an INI file.
    """

    section: str
    key: str
    text: str
    where: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedConfiguration:
    """The settings from one configuration of another server.

    `notes` are warnings about options that are unknown or have no effect in relay. `missing` is
    the error message if the file does not exist although the other server would start without it.
    A start ignores it; a reload and `checkconfig` fail with it.
    """

    settings: Sequence[ImportedSetting] = ()
    notes: Sequence[str] = ()
    missing: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag of the other server's command line. A switch needs no value."""

    name: str
    about: str
    short: str = ""
    switch: bool = False


class ConfigurationImport(Protocol):
    """Reads the configuration of another server.

    Attributes:
        suffixes: `-c FILE` selects this reader if the file's name ends in one of them.
        option: An additional option that names the server's file or directory, for example
            `--seafile-conf-dir`; '' if there is none. `option_about` is its help.
        command: `relay COMMAND` accepts the other server's command line with `flags` and `-c FILE`
            (default: `default_path`) and serves. It also has the actions genconfig, checkconfig,
            version and help. '' if there is no such command.
        version: Name and version of the other server.
        by_environment: Read at every start even without a path, because environment variables
            alone may contain the configuration.
    """

    suffixes: Sequence[str]
    option: str
    option_about: str
    command: str
    flags: Sequence[Flag]
    default_path: str
    version: str
    by_environment: bool

    def read(
        self, path: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]
    ) -> ImportedConfiguration:
        """Return the settings from the file or directory, the environment and the flags.

        Raise ConfigError if the file cannot be read, or if it enables something that relay lacks
        and that must not be ignored.
        """

    def example(self, path: Path) -> str:
        """Return a minimal file of this type. Raise ConfigError if there is none."""
