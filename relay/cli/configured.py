"""Load the configuration of a command line; `genconfig`, `checkconfig` and `convert-config`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from producers.registry import producer_settings
from relay.cli.imported_arguments import flags_of, path_of
from relay.config.imported import ConfigurationImport, ImportedConfiguration
from relay.config.ini_text import example, ini
from relay.config.loading import FLAGS, SECTIONS, Config, load
from relay.core.errors import ConfigError
from relay.protocols import door_settings, find_imports


def configuration(
    options: argparse.Namespace, *, complete: bool = False, strict: bool = False
) -> Config:
    """Load the configuration from file, environment and command line.

    Args:
        complete: Raise ConfigError if another server's file is missing. Otherwise add a note.
        strict: Raise ConfigError for an unknown RELAY_ variable instead of adding a note.
    """
    imported = _translations(options)
    for each in imported:
        if complete and each.missing:
            raise ConfigError(each.missing)
    flags = {flag: text for flag in FLAGS if (text := getattr(options, flag, None)) is not None}
    if getattr(options, "insecure", False):
        flags["insecure"] = "yes"
    return load(
        options.config if _imported_file(options) is None else None,
        environ=os.environ,
        overrides=options.overrides,
        flags=flags,
        doors=door_settings(),
        producers=producer_settings(),
        imported=imported,
        strict=strict or getattr(options, "strict", False),
    )


def is_imported(options: argparse.Namespace) -> bool:
    """Return True if the configuration includes another server's."""
    return any(each.settings or each.missing for each in _translations(options))


def token_options(options: argparse.Namespace) -> list[str]:
    """Return the options with which `relay token` uses the configuration of this command line.

    Secrets are replaced by `...`.
    """
    words = ["-c", str(options.config)] if options.config else []
    for imported in find_imports():
        path = path_of(options, imported)
        if path is not None:
            words += [imported.option, str(path)]
    for override in options.overrides:
        name, _, _ = override.partition("=")
        if name.strip() in ("jwt.key", "redis.password"):
            words += ["--set", f"{name.strip()}=..."]
        elif name.strip().startswith(("jwt.", "redis.embedded_")):
            words += ["--set", override]
    return words


def _genconfig(options: argparse.Namespace) -> int:
    """Print all settings, or write a new file. An existing file is never overwritten."""
    path: Path | None = options.config
    imported = _imported_file(options) if path else None
    every = {**SECTIONS, **door_settings(), **producer_settings()}
    text = imported.example(path) if imported and path else example(every)
    if path is None:
        sys.stdout.write(text)
        return 0
    try:
        # The file will contain secrets.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"output config file already exists: {path}") from None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be written: {exc.strerror}") from exc
    with os.fdopen(file, "w", encoding="utf-8") as out:
        out.write(text)
    return 0


def _checkconfig(options: argparse.Namespace) -> int:
    """Raise the same errors as `serve`, and print notes to standard error."""
    # Import them here, because the other commands don't need the server's modules.
    from relay.process import app
    from relay.process.addresses import check_addresses
    from relay.process.embedded import check_port
    from relay.process.internal_address import check_internal

    config = configuration(options, complete=True, strict=True)
    listeners = app.check(config)
    running = check_addresses(config, listeners, accept_running=True)
    check_internal(config.node)
    if not running:
        check_port(config.redis)
    _print_notes(config)
    if running:
        sys.stderr.write(f"relay: {running}\n")
    if _commanded(options) is None:
        paths = [options.config, *(path_of(options, each) for each in find_imports())]
        sources = ", ".join(str(path) for path in paths if path is not None)
        print(f"{sources or 'defaults, environment and options'}: the configuration is valid")
    return 0


def _convert_config(options: argparse.Namespace) -> int:
    """Print another server's configuration as an INI file for relay."""
    translations = [each for each in _translations(options) if each.settings or each.missing]
    if not translations or (options.config and _imported_file(options) is None):
        suffixes = [suffix for imported in find_imports() for suffix in imported.suffixes]
        raise ConfigError(
            f"{options.config or '-c FILE'} must be another server's configuration, a file with one"
            f" of the suffixes {', '.join(suffixes)}"
        )
    # Print nothing unless the whole configuration is valid.
    config = configuration(options, complete=True)
    text = ini([setting for each in translations for setting in each.settings])
    _print_notes(config)
    sys.stdout.write(text)
    return 0


def _print_notes(config: Config) -> None:
    for note in config.notes:
        sys.stderr.write(f"relay: {note}\n")


def _commanded(options: argparse.Namespace) -> ConfigurationImport | None:
    """Return the reader of the other server's command line, or None."""
    imported: ConfigurationImport | None = getattr(options, "imported", None)
    return imported


def _imported_file(options: argparse.Namespace) -> ConfigurationImport | None:
    """Return the reader for the file of `-c`, or None if it is an INI file or missing."""
    path: Path | None = options.config
    commanded = _commanded(options)
    if path is None:
        return commanded
    suffix = path.suffix.lower()
    if commanded is not None:
        if suffix not in commanded.suffixes:
            raise ConfigError(
                f"{path}: must have one of the suffixes {', '.join(commanded.suffixes)}; for an INI"
                " file use `relay serve -c`"
            )
        return commanded
    return next((each for each in find_imports() if suffix in each.suffixes), None)


def _translations(options: argparse.Namespace) -> list[ImportedConfiguration]:
    owner = _imported_file(options)
    commanded = _commanded(options)
    found: list[ImportedConfiguration] = []
    for imported in find_imports():
        path = options.config if imported is owner else path_of(options, imported)
        if path is not None or imported.by_environment:
            flags = flags_of(options) if imported is commanded else {}
            found.append(imported.read(path, os.environ, flags))
    return found


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "genconfig": _genconfig,
    "checkconfig": _checkconfig,
    "convert-config": _convert_config,
}
