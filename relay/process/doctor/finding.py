"""Findings of the doctor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Level(Enum):
    """How serious a finding is. `relay doctor` fails if there is an error."""

    # Events are, or will be, lost, rejected or readable without permission.
    ERROR = "error"
    # It works now, but a restart, a failover, growth or an attack will break it.
    WARNING = "warning"
    # Something that could not be checked, or that only the operator can judge.
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault. `name` is stable, for scripts; the other texts are for people.

    `fix` is a command, a line of a configuration file, or both.
    """

    level: Level
    name: str
    what: str
    why: str
    fix: str

    @property
    def area(self) -> str:
        """The part of the installation: redis, host, data, configuration or proxy."""
        return self.name.partition(".")[0]

    def values(self) -> dict[str, str]:
        """Return the finding as JSON values."""
        return {
            "level": self.level.value,
            "area": self.area,
            "name": self.name,
            "what": self.what,
            "why": self.why,
            "fix": self.fix,
        }


def error(name: str, what: str, why: str, fix: str) -> Finding:
    """Return an error."""
    return Finding(level=Level.ERROR, name=name, what=what, why=why, fix=fix)


def warning(name: str, what: str, why: str, fix: str) -> Finding:
    """Return a warning."""
    return Finding(level=Level.WARNING, name=name, what=what, why=why, fix=fix)


def note(name: str, what: str, why: str, fix: str) -> Finding:
    """Return a note."""
    return Finding(level=Level.NOTE, name=name, what=what, why=why, fix=fix)


def of_server(finding: Finding, address: str) -> Finding:
    """Return a finding about one of several Redis servers: text and commands name the server."""
    what = finding.what if address in finding.what else f"{address}: {finding.what}"
    host, colon, port = address.rpartition(":")
    here = f"redis-cli -h {host.strip('[]')} -p {port} " if colon else "redis-cli "
    fix = finding.fix if "redis-cli -" in finding.fix else finding.fix.replace("redis-cli ", here)
    return replace(finding, what=what, fix=fix)


def quoted(text: str) -> str:
    """Return the text as one word of a shell command. Clients may choose the names of channels."""
    return "'" + text.replace("'", "'\\''") + "'"
