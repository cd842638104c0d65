"""The client of the application without a server; tests/contract uses a real one."""

from __future__ import annotations

from typing import cast

import aiohttp
import pytest

from relay.config.settings import RightsSettings
from relay.core.errors import ConfigError
from relay.core.model import Channel, Principal
from relay.rights.http import HttpRights

SESSION = cast("aiohttp.ClientSession", object())


@pytest.mark.parametrize(
    "url", ["", "app/rights", "ftp://app/", "http://", "http://me:secret@app/", "http://[::1/"]
)
def test_a_url_that_cannot_be_asked_is_a_mistake_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"\[rights\] http_url") as caught:
        HttpRights(RightsSettings(http_url=url), SESSION)
    assert "secret" not in str(caught.value)


def test_nothing_is_known_before_the_first_question() -> None:
    rights = HttpRights(RightsSettings(http_url="https://app/rights"), SESSION)
    assert rights.cached(Principal(user="ann"), Channel("news")) is None
    assert rights.expires_in(Principal(user="ann"), Channel("news")) is None
    rights.drop()
