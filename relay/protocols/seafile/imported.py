"""Seafile's own configuration as settings of ours: `relay serve --seafile-conf-dir DIR`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from relay.config.imported import Flag, ImportedConfiguration, ImportedSetting
from relay.core.errors import ConfigError
from relay.protocols.seafile import conf

_SECTION = "protocol:seafile"


class SeafileForeign:
    """Seafile's configuration folder and environment variables.

    The variables count without a folder too, because Seafile 12 and later need no more.
    """

    suffixes: Sequence[str] = ()
    option = "--seafile-conf-dir"
    option_about = "folder with Seafile's seafile.conf, notification.conf, ccnet.conf and .env"
    command = ""
    flags: Sequence[Flag] = ()
    default_path = ""
    version = ""
    by_environment = True

    def read(
        self, path: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]
    ) -> ImportedConfiguration:
        """Return the settings of the file, environment variables and flags."""
        del flags
        found = conf.read(path, environ)
        said = [
            ImportedSetting(
                section=_SECTION, key=key, text=value, where=f"{found.where[key]} {key} = "
            )
            for key, value in found.door.items()
        ]
        if found.log_level:
            where = "log level of Seafile's notification server = "
            said.append(
                ImportedSetting(section="log", key="level", text=found.log_level, where=where)
            )
        notes = list(found.notes)
        if found.door.get("enabled") == "no":
            notes.append(
                f"{found.where['enabled']} says enabled = false: the Seafile protocol is disabled"
            )
        return ImportedConfiguration(said=said, notes=notes)

    def example(self, path: Path) -> str:
        """Return a minimal file, or raise ConfigError if there is none."""
        raise ConfigError(f"{path}: Seafile's own set-up writes its configuration")


IMPORT = SeafileForeign()
