"""Options and commands for the configurations of other servers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relay.cli.operator_arguments import Commands
from relay.config.imported import ConfigurationImport

# A prefix, because their flags have the same names as ours with other meanings.
_DEST = "foreign:"
_ACTIONS = ("genconfig", "checkconfig", "version", "help")


def add_options(parser: argparse.ArgumentParser, foreigns: Sequence[ConfigurationImport]) -> None:
    """Add an option for each directory or file that cannot be passed as `-c`."""
    for foreign in foreigns:
        if foreign.option:
            parser.add_argument(
                foreign.option,
                type=Path,
                metavar="PATH",
                dest=_DEST + foreign.option,
                help=foreign.option_about,
            )


def add_commands(
    commands: Commands,
    foreigns: Sequence[ConfigurationImport],
    command: Callable[[Commands, str, str], argparse.ArgumentParser],
    process: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add `relay COMMAND` with the flags of the other server.

    `command` creates a parser, and `process` adds the options of `serve`.
    """
    for foreign in foreigns:
        if not foreign.command:
            continue
        parser = command(
            commands, foreign.command, f"serve as {foreign.version} does, with its command line"
        )
        parser.set_defaults(foreign=foreign, print_help=parser.print_help)
        parser.add_argument(
            "action",
            nargs="?",
            choices=_ACTIONS,
            help=f"instead of serving: write a new {foreign.default_path}, check it, say the"
            " version, or these lines",
        )
        parser.add_argument(
            "-c",
            "--config",
            type=Path,
            metavar="FILE",
            default=Path(foreign.default_path),
            help=f"ends in {', '.join(foreign.suffixes)}; default {foreign.default_path}",
        )
        for flag in foreign.flags:
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
    """Return the given flags of the other server's command line by name."""
    given = {name: text for name, text in vars(options).items() if name.startswith(_DEST)}
    return {name.removeprefix(_DEST): text for name, text in given.items() if text is not None}


def path_of(options: argparse.Namespace, foreign: ConfigurationImport) -> Path | None:
    """Return the path that was passed with the import's option, or None."""
    path: Path | None = getattr(options, _DEST + foreign.option, None)
    return path
