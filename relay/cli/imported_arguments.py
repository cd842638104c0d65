"""Options and commands for the configurations of other servers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relay.cli.operator_arguments import Commands
from relay.config.imported import ConfigurationImport

# Prefix of the other servers' flags, because relay has flags with the same names.
_DEST = "imported:"
_ACTIONS = ("genconfig", "checkconfig", "version", "help")


def add_options(parser: argparse.ArgumentParser, imports: Sequence[ConfigurationImport]) -> None:
    """Add an option for each directory or file that cannot be passed as `-c`."""
    for imported in imports:
        if imported.option:
            parser.add_argument(
                imported.option,
                type=Path,
                metavar="PATH",
                dest=_DEST + imported.option,
                help=imported.option_about,
            )


def add_commands(
    commands: Commands,
    imports: Sequence[ConfigurationImport],
    command: Callable[[Commands, str, str], argparse.ArgumentParser],
    process: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add `relay COMMAND` with the flags of the other server.

    `command` creates a parser, and `process` adds the options of `serve`.
    """
    for imported in imports:
        if not imported.command:
            continue
        parser = command(
            commands, imported.command, f"serve as {imported.version} does, with its command line"
        )
        parser.set_defaults(imported=imported, print_help=parser.print_help)
        parser.add_argument(
            "action",
            nargs="?",
            choices=_ACTIONS,
            help=f"instead of serving: write a new {imported.default_path}, check it, print the"
            " version, or print this help",
        )
        parser.add_argument(
            "-c",
            "--config",
            type=Path,
            metavar="FILE",
            default=Path(imported.default_path),
            help=f"ends in {', '.join(imported.suffixes)}; default {imported.default_path}",
        )
        for flag in imported.flags:
            names = [f"-{flag.short}"] if flag.short else []
            parser.add_argument(
                *names,
                f"--{flag.name}",
                dest=_DEST + flag.name,
                metavar="BOOL" if flag.switch else "VALUE",
                help=flag.about,
                **({"nargs": "?", "const": "true"} if flag.switch else {}),  # type: ignore[arg-type]
            )
        process(parser)


def flags_of(options: argparse.Namespace) -> Mapping[str, str]:
    """Return the flags of the other server's command line that were passed, by name."""
    flags = {name: text for name, text in vars(options).items() if name.startswith(_DEST)}
    return {name.removeprefix(_DEST): text for name, text in flags.items() if text is not None}


def path_of(options: argparse.Namespace, imported: ConfigurationImport) -> Path | None:
    """Return the path that was passed with the import's option, or None."""
    path: Path | None = getattr(options, _DEST + imported.option, None)
    return path
