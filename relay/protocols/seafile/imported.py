"""Import of Seafile's own configuration: `relay serve --seafile-conf-dir DIR`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from typing_extensions import override

from relay.config.imported import (
    ConfigurationImport,
    Flag,
    ImportedConfiguration,
    ImportedSetting,
)
from relay.core.errors import ConfigError
from relay.protocols.seafile import conf

_SECTION = "protocol:seafile"


class SeafileImport(ConfigurationImport):
    """Seafile's configuration folder and environment variables.

    The variables are also read without a folder, because Seafile 12 and later require no files.
    """

    suffixes: Sequence[str] = ()
    option = "--seafile-conf-dir"
    option_about = "folder with Seafile's seafile.conf, notification.conf, ccnet.conf and .env"
    command = ""
    flags: Sequence[Flag] = ()
    default_path = ""
    version = ""
    by_environment = True

    @override
    def read(
        self, path: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]
    ) -> ImportedConfiguration:
        del flags
        found = conf.read(path, environ)
        settings = [
            ImportedSetting(
                section=_SECTION, key=key, text=value, where=f"{found.where[key]} {key} = "
            )
            for key, value in found.settings.items()
        ]
        if found.log_level:
            where = "log level of Seafile's notification server = "
            settings.append(
                ImportedSetting(section="log", key="level", text=found.log_level, where=where)
            )
        notes = list(found.notes)
        if found.settings.get("enabled") == "no":
            notes.append(
                f"{found.where['enabled']} has enabled = false: the Seafile protocol is disabled"
            )
        return ImportedConfiguration(settings=settings, notes=notes)

    @override
    def example(self, path: Path) -> str:
        raise ConfigError(f"{path}: Seafile's setup script creates its configuration")


IMPORT = SeafileImport()
