"""Producers are found by what they offer; nothing else names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from producers.__main__ import main
from producers.registry import find_producers, producer_settings
from relay.config.settings import Section


def test_every_producer_has_its_section_and_is_off_or_on_by_its_own_settings() -> None:
    found = find_producers()
    assert "queue" in found
    for name, producer in found.items():
        assert producer.name == name
        assert producer.summary
        assert producer.argument in {"", *producer.settings.model_fields}
        assert issubclass(producer.settings, Section)
        assert producer.wanted(producer.settings()) in (False, True)
    assert set(producer_settings()) == {f"producer:{name}" for name in found}


def test_a_producer_alone_needs_a_redis_of_the_sites_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["queue"]) == 1
    assert "needs the address of a Redis" in capsys.readouterr().err


def test_an_unknown_producer_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["nonsense"])
    assert left.value.code == 2
    assert "queue" in capsys.readouterr().err


def test_a_word_behind_the_name_is_for_those_that_take_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["queue", "word"])
    assert left.value.code == 2
    assert "queue takes no 'word'" in capsys.readouterr().err
    for words in (["spool"], ["spool", str(tmp_path / "missing" / "file")]):
        assert main([*words, "--redis", "redis://127.0.0.1:1/0"]) == 1
        assert "[producer:spool] path" in capsys.readouterr().err
