"""Producers, their sections and their command line."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from producers.__main__ import main
from producers.settings import PRODUCERS, EmitterSettings, ProducerSection


@pytest.mark.parametrize("section", PRODUCERS.values())
def test_a_producer_s_section_names_its_module_and_its_settings(
    section: type[ProducerSection],
) -> None:
    assert callable(import_module(f"producers.{section.module}").build)
    assert section.summary
    assert section.argument in {"", *section.model_fields}
    assert not section().is_enabled
    assert section.model_validate({section.enabled_by: "yes"}).is_enabled


def test_the_emitters_host_and_port_are_a_url() -> None:
    convert = EmitterSettings.from_removed
    assert convert({"redis_host": "::1"}) == {"redis_url": "redis://[::1]:6379/0"}
    assert convert({"redis_host": "r", "redis_port": "7"}) == {"redis_url": "redis://r:7/0"}
    assert convert({"redis_port": "7", "namespace": "/axr"}) == {}


def test_a_separate_producer_process_needs_the_address_of_redis(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["queue"]) == 1
    assert "needs the address of Redis" in capsys.readouterr().err


def test_an_unknown_producer_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["nonsense"])
    assert left.value.code == 2
    assert "queue" in capsys.readouterr().err


def test_an_argument_after_the_name_is_accepted_only_by_producers_that_have_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["queue", "word"])
    assert left.value.code == 2
    assert "queue has no argument: 'word'" in capsys.readouterr().err
    for words in (["spool"], ["spool", str(tmp_path / "missing" / "file")]):
        assert main([*words, "--redis", "redis://127.0.0.1:1/0"]) == 1
        assert "[producer:spool] path" in capsys.readouterr().err
