"""Each rule of the contract fails for a protocol that breaks it, and names the fault."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support import contract
from tests.support.contract import RULES, Driver, Site, load
from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]

# Longer than relay needs for any reply, even on a busy machine.
LIMIT_S = 5.0
CAUGHT = [
    (contract.connects, "delivers nothing", "'nothing' == 0"),
    (contract.rejects_bad_credentials, "accepts anybody", "'subscribed' == 'error unauthorized'"),
    (contract.receives_in_order, "repeats events", "At index"),
    (contract.resumes, "forgets positions", "At index 0 diff: 15 != 5"),
    (contract.reports_gap, "conceals gaps", "4 == 'notice gap'"),
    (contract.reports_reset, "conceals resets", "1 == 'notice reset'"),
    (contract.reports_revocation, "conceals revocations", "'nothing' == 'notice revoked'"),
    (contract.survives_a_full_socket, "ignores a full socket", "relay_catch_up_clients stays at 0"),
    (contract.leaks_nothing, "leaks sessions", "relay_subscriptions"),
    (contract.leaks_nothing, "leaks connections", "relay_connections"),
    (contract.ends_at_shutdown, "ignores the shutdown", "== 'close 1001'"),
]


@pytest.fixture(scope="module")
def driver() -> Driver:
    """Return the native driver, because the clients of the broken protocol are the same."""
    return load("native")


@pytest.fixture(scope="module")
def broken(valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """Run a relay that has the broken protocol in relay/protocols/."""
    root: Path = tmp_path_factory.mktemp("tree")
    protocols = root / "relay" / "protocols"
    (protocols / "broken").mkdir(parents=True)
    (protocols / "broken" / "__init__.py").touch()
    source = Path(__file__).with_name("broken_protocol.py")
    shutil.copy(source, protocols / "broken" / "routes.py")
    settings = "from relay.protocols.native.settings import NativeSettings as SETTINGS\n"
    (protocols / "broken" / "settings.py").write_text(settings)
    for original, copy in ((ROOT, root), (ROOT / "relay", root / "relay")):
        for path in original.iterdir():
            if path.name in ("relay", "protocols", "tests") or path.name.startswith("."):
                continue
            (copy / path.name).symlink_to(path)
    for path in (ROOT / "relay" / "protocols").iterdir():
        (protocols / path.name).symlink_to(path)
    process = RelayProcess(valkey, settings=["protocol:native.enabled=no"], root=root).start()
    yield process
    process.kill()


@pytest.mark.parametrize(
    ("rule", "fault", "message"), CAUGHT, ids=[fault for _, fault, _ in CAUGHT]
)
async def test_a_broken_rule_is_caught(
    broken: RelayProcess,
    driver: Driver,
    rule: Callable[[Site], Awaitable[None]],
    fault: str,
    message: str,
) -> None:
    async with aiohttp.ClientSession() as session:
        await (await session.get(f"{broken.url}/fault", params={"name": fault})).read()
    # The broken protocol has the same connection metrics as the native one.
    async with driver.clients(broken) as clients:
        site = Site("native", driver, broken, clients, limit_s=LIMIT_S)
        with pytest.raises(AssertionError) as caught:
            await rule(site)
    assert message in str(caught.value)


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, _, _ in CAUGHT} == set(RULES)
