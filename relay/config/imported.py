"""Another server's configuration, put into our words by the door that takes that server's place.

A protocol's folder may have a module `imported` with a `FOREIGN` (`relay.protocols`). The command
line then accepts the other server's files with `-c`, its folder with an option of the protocol, or
its whole command line after a command of its name: `relay serve -c config.json`, `relay serve
--seafile-conf-dir DIR`, `relay centrifugo --port=8001`. These settings are the lowest layer of the
configuration: above the defaults, below our INI file, RELAY_ variables, --set and flags. The order
of the other server's own sources is decided in `Foreign.read`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One setting of ours, as the other configuration has it.

    `where` and `text` together begin the line of an error, as `config.json: port = ` and `x`.
    `why` is the comment that explains it where it is written into an INI file.
    """

    section: str
    key: str
    text: str
    where: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """All that one foreign configuration says.

    `notes` are lines for the operator: what is unknown or has no effect here. `missing` says that
    the file is not there, where the other server starts without it all the same; a reload and a
    check of the configuration fail with that line.
    """

    said: Sequence[Said] = ()
    notes: Sequence[str] = ()
    missing: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag of the other server's command line; a switch may stand without a value."""

    name: str
    about: str
    short: str = ""
    switch: bool = False


class Foreign(Protocol):
    """How a door reads what the server before it was configured with.

    `suffixes`: files with these endings are its, wherever a command takes `-c FILE`.
    `option`: further option of these commands that names its file or folder, as
    `--seafile-conf-dir`; '' where there is none. `option_about` is its help.
    `command`: `relay COMMAND` takes the other server's own command line, `flags` and `-c FILE`
    (without it: `default_path`), and serves; `COMMAND genconfig|checkconfig|version|help` too. ''
    where there is none. `version` is the other server's name and version.
    `by_environment`: it is read at every start, without a path too, since variables alone may
    configure it.
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
    ) -> Translation:
        """What is in the file or folder, the environment and the given flags.

        ConfigError where it cannot be read or asks for what must not be passed over.
        """

    def example(self, path: Path) -> str:
        """The smallest file of this ending to start with; ConfigError where there is none."""
