"""Commands print the lines that the "Troubleshooting" table of docs/operators.md quotes."""

from __future__ import annotations

import re

import pytest

from tests.support.cli import Cli
from tests.support.relay import ROOT
from tests.support.valkey import Server, User, free_port

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
PAGE = ROOT / "docs" / "operators.md"


def quoted() -> list[re.Pattern[str]]:
    """Return the lines of the table as patterns; `...` stands for anything."""
    table = PAGE.read_text().partition("## Troubleshooting")[2].partition("\n### ")[0]
    lines = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    return [re.compile(".+".join(map(re.escape, line.split("...")))) for line in lines]


async def test_each_line_of_the_table_is_printed(valkey: Server) -> None:
    nobody = ("--redis", f"redis://127.0.0.1:{free_port()}")
    stranger = ("--redis", f"redis://maintenance:wrong@127.0.0.1:{valkey.port}")
    commands: list[tuple[User, tuple[str, ...]]] = [
        ("maintenance", ("status", *nobody)),
        ("maintenance", ("publish", "news", "1", *nobody)),
        ("producer", ("streams",)),
        ("maintenance", ("streams", *stranger)),
        ("maintenance", ("trim", "ghost", "--max-entries", "1")),
        ("maintenance", ("publish", "news", "1", "--set", "namespace.durability=replicated")),
    ]
    rows = quoted()
    assert len(rows) == len(commands)
    for row, (user, words) in zip(rows, commands, strict=True):
        done = await Cli(valkey, user).run(*words)
        assert done.returncode == 1
        assert row.match(done.stderr), (row.pattern, done.stderr)
        assert done.stderr.count("\n") == 1
