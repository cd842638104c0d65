"""What v1.8.0's clients send and are answered, line by line; see `Transcript` for the signs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.centrifugo import Transcript, transcripts

FOLDER = Path(__file__).parent
ALL = [each for path in sorted(FOLDER.glob("*.txt")) for each in transcripts(path)]


@pytest.mark.parametrize("transcript", ALL, ids=lambda transcript: transcript.name)
async def test_the_door_answers_as_v1(transcript: Transcript) -> None:
    await transcript.replay()
