"""Each protocol folder in relay/protocols fulfils each rule of the contract."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import pytest

from relay.protocols import protocol_names
from tests.support.contract import DRIVERS, RULES, Driver, Site, load
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]
PROTOCOLS = protocol_names()


@pytest.fixture(scope="module", params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    """Return the name of a protocol."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def driver(protocol: str) -> Driver:
    """Return the protocol's driver. Fail if it has none."""
    try:
        return load(protocol)
    except LookupError as exc:
        pytest.fail(str(exc))


@pytest.fixture(scope="module")
def serving(driver: Driver, valkey: Server) -> Iterator[RelayProcess]:
    """Run a relay that serves the protocol."""
    process = RelayProcess(valkey, settings=driver.settings).start()
    yield process
    process.kill()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
async def test_contract(
    protocol: str,
    driver: Driver,
    serving: RelayProcess,
    rule: Callable[[Site], Awaitable[None]],
) -> None:
    async with driver.clients(serving) as clients:
        await rule(Site(protocol, driver, serving, clients))


def test_a_protocol_without_a_driver_is_reported() -> None:
    with pytest.raises(LookupError, match=r"write tests/contract/drivers/poll\.py"):
        load("poll")


def test_every_driver_belongs_to_a_protocol() -> None:
    assert sorted(path.stem for path in DRIVERS.glob("[a-z]*.py")) == PROTOCOLS
