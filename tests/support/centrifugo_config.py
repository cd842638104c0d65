"""Helpers that read Centrifugo's files, variables and flags as relay does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from relay.config.imported import ImportedConfiguration
from relay.config.loading import Config, load
from relay.core.errors import ConfigError
from relay.protocols import door_settings
from relay.protocols.centrifugo.imported import CentrifugoImport
from relay.protocols.centrifugo.settings import CentrifugoSettings

IMPORT = CentrifugoImport()
Write = Callable[..., Path]


def translate(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    **flags: str,
) -> ImportedConfiguration:
    return IMPORT.read(path, environ or {}, flags)


def configured(translation: ImportedConfiguration) -> Config:
    return load(
        None, environ={}, overrides=[], flags={}, doors=door_settings(), imported=[translation]
    )


def door(translation: ImportedConfiguration) -> CentrifugoSettings:
    section = configured(translation).doors["protocol:centrifugo"]
    assert isinstance(section, CentrifugoSettings)
    return section


def error(write: Write, text: str, suffix: str = "json") -> str:
    path = write(text, suffix)
    with pytest.raises(ConfigError) as caught:
        configured(translate(path))
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(path), path.name)
