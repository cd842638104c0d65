"""Transcripts of v1.8.0's clients. `Transcript` describes their format."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.centrifugo import Transcript, transcripts

FOLDER = Path(__file__).parent
ALL = [each for path in sorted(FOLDER.glob("*.txt")) for each in transcripts(path)]


@pytest.mark.parametrize("transcript", ALL, ids=lambda transcript: transcript.name)
async def test_replies_are_those_of_v1(transcript: Transcript) -> None:
    await transcript.replay()
