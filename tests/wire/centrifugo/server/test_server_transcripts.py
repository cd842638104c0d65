"""Transcripts of v1.8.0's backends and administrators."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.centrifugo import Transcript, transcripts
from tests.support.centrifugo_server import ServerTranscript

FOLDER = Path(__file__).parent
ALL = [
    each for path in sorted(FOLDER.glob("*.txt")) for each in transcripts(path, ServerTranscript)
]


@pytest.mark.parametrize("transcript", ALL, ids=lambda transcript: transcript.name)
async def test_replies_are_those_of_v1(transcript: Transcript) -> None:
    await transcript.replay()
