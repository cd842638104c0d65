"""Fixtures for tests of the protocol without sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.centrifugo_config import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(text: str, suffix: str = "json") -> Path:
        path = tmp_path / f"config.{suffix}"
        path.write_text(text, encoding="utf-8")
        return path

    return file
