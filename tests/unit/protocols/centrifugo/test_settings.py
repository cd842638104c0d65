from __future__ import annotations

import pytest
from pydantic import SecretStr, ValidationError

from relay.protocols.centrifugo.settings import CentrifugoNamespace, CentrifugoSettings


def test_a_namespace_inherits_nothing() -> None:
    chat = CentrifugoNamespace(publish=True)
    settings = CentrifugoSettings(anonymous=True, history_size=5, namespaces={"chat": chat})
    assert settings.namespace("") is settings
    assert settings.namespace("chat") is chat
    assert not chat.anonymous
    assert chat.history_size == 0
    assert settings.namespace("news") is None


@pytest.mark.parametrize(
    "name", ["a", "", "a b", "a:b", "ä" * 3, "aa\n", "seafile", "pydio", "axr"]
)
def test_rejects_invalid_and_reserved_names(name: str) -> None:
    with pytest.raises(ValidationError):
        CentrifugoSettings(namespaces={name: CentrifugoNamespace()})


@pytest.mark.parametrize("name", ["aa", "-_", "Public9", "SEAFILE"])
def test_accepts_valid_names(name: str) -> None:
    assert CentrifugoSettings(namespaces={name: CentrifugoNamespace()}).namespace(name)


@pytest.mark.parametrize(
    ("size", "lifetime", "kept"), [(0, 0, False), (1, 0, False), (0, 1, False), (1, 1, True)]
)
def test_history_needs_size_and_lifetime(size: int, lifetime: int, kept: bool) -> None:
    assert CentrifugoNamespace(history_size=size, history_lifetime=lifetime).has_history is kept


def test_served_only_with_a_secret_or_an_insecure_mode() -> None:
    secret = SecretStr("s")
    assert not CentrifugoSettings().is_open
    assert not CentrifugoSettings(insecure_admin=True, admin=True).is_open
    assert CentrifugoSettings(secret=secret).is_open
    assert CentrifugoSettings(insecure=True).is_open
    assert CentrifugoSettings(insecure_api=True).is_open
    assert not CentrifugoSettings(secret=secret, enabled=False).is_open


@pytest.mark.parametrize("prefix", ["/a?b", "a", "/a b", "//", "/{a}"])
def test_rejects_a_prefix_that_is_not_a_path(prefix: str) -> None:
    with pytest.raises(ValidationError):
        CentrifugoSettings(http_prefix=prefix)
