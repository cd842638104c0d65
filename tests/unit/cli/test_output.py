"""relay/cli/output.py and the operator's arguments."""

from __future__ import annotations

import pytest

from relay.cli.arguments import parse
from relay.cli.operator_arguments import COMMANDS
from relay.cli.output import Progress, duration, safe, table
from relay.core.model import EntryID


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (None, "-"),
        (0, "0 ms"),
        (999, "999 ms"),
        (1000, "1 s"),
        (3449, "3.4 s"),
        (59_000, "59 s"),
        (90_000, "1.5 min"),
        (3_600_000, "1 h"),
        (604_800_000, "7 d"),
    ],
)
def test_durations_are_short(ms: float | None, text: str) -> None:
    assert duration(ms) == text


def test_nothing_in_an_entry_can_move_the_cursor_or_forge_a_line() -> None:
    assert safe("a\nb\x1b[2J\x9b\u202eä\ud800") == "a\\nb\\x1b[2J\\x9b\\u202eä\\ud800"


def test_a_table_is_aligned_and_a_remark_goes_across(capsys: pytest.CaptureFixture[str]) -> None:
    table(("NAME", "N"), [["a", "1"], ["a remark that is long"], ["longer", "20"]], right=(1,))
    assert capsys.readouterr().out == (
        "NAME     N\na        1\na remark that is long\nlonger  20\n"
    )


def test_a_table_is_aligned_by_the_width_of_its_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "x" * 300
    table(("NAME", "N"), [["新闻", "1"], [long, "3"]])
    assert capsys.readouterr().out.splitlines() == [
        "NAME" + " " * 298 + "N",
        "新闻" + " " * 298 + "1",
        long + "  3",
    ]


def test_progress_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("keys")
    progress(1)
    progress.end()
    assert capsys.readouterr().err == ""


def test_arguments_by_name() -> None:
    options = parse(["tail", "news", "--after", "5", "--json", "--redis", "redis://h"])
    assert (options.after, options.json, options.redis) == (EntryID(5, 0), True, "redis://h")
    options = parse(["dead-letters", "drop", "1-1", "2"])
    assert (options.action, options.ids) == ("drop", [EntryID(1, 1), EntryID(2, 0)])
    options = parse(["publish", "c", "d", "--to", "a,b", "--to", "group:g"])
    assert options.to == ["a,b", "group:g"]
    assert parse(["streams"]).pattern == "*"


@pytest.mark.parametrize(
    "arguments",
    [
        ["tail", "c", "--after", "yesterday"],
        ["trim", "c", "--max-entries", "-1"],
        ["trim", "c", "--max-age", "nan"],
        ["status", "--max-lag", "inf"],
        ["status", "--min-workers", "1.5"],
        ["dead-letters"],
        ["dead-letters", "requeue"],
        ["dead-letters", "drop", "1-1", "--all"],
        ["publish", "c"],
        ["disconnect"],
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "dead-letters"])
def test_each_help_names_its_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse([command, "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0" in text
    assert "--json" in text
    assert "--redis URL" in text
