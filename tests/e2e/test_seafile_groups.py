"""Group permissions with a real ccnet database that is running, stopped and restarted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.clients import until
from tests.support.mariadb import DATABASE, PASSWORD, USER, MariaDb, mariadb
from tests.support.relay import RelayProcess
from tests.support.seafile import KEY, Client, Seafile, followed, new_library, seafile
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(120)]
ALICE, BOB = "alice@example.com", "bob@example.com"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDb]:
    with mariadb(tmp_path_factory.mktemp("mariadb")) as server:
        server.run(
            "INSERT INTO GroupUser (group_id, user_name) VALUES"
            " (7, 'bob@example.com'), (7, 'carol@example.com'), (8, 'alice@example.com')",
            DATABASE,
        )
        yield server


@pytest.fixture(scope="module")
def relay(valkey: Server, database: MariaDb) -> Iterator[RelayProcess]:
    section = {
        "key": KEY,
        "groups": "database",
        "groups_cache_s": "0",
        "db_port": str(database.port),
        "db_user": USER,
        "db_password": PASSWORD,
        "db_name": DATABASE,
    }
    settings = [f"protocol:seafile.{name}={value}" for name, value in section.items()]
    process = RelayProcess(valkey, settings=settings).start()
    yield process
    process.kill()


@pytest.fixture
async def door(relay: RelayProcess) -> AsyncIterator[Seafile]:
    async with seafile(relay) as one:
        yield one


async def permit(door: Seafile, library: str, path: str, group: int) -> None:
    content = {"repo_id": library, "path": path, "user": "", "group": group, "perm": "r"}
    assert (await door.post("folder-perm-changed", content)).status == 200


async def paths(door: Seafile, client: Client, library: str) -> list[str]:
    """Return the paths in the permissions that arrive before a commit."""
    await door.commit(library, new_library())
    found: list[str] = []
    while (message := await client.next())["type"] != "repo-update":
        if message["type"] == "folder-perm-changed":
            found.append(message["content"]["path"])
    return found


async def test_only_members_receive_the_event(door: Seafile) -> None:
    library = new_library()
    alice = await followed(door, library)
    bob = await followed(door, library, user=BOB)
    for group in (7, 8, 9, -1):
        await permit(door, library, f"/{group}", group)
    await door.commit(library, "end")
    assert await paths(door, bob, library) == ["/7", "/-1"]
    assert await paths(door, alice, library) == ["/8", "/-1"]


async def test_while_the_database_is_down_only_group_events_are_not_delivered(
    door: Seafile, database: MariaDb
) -> None:
    library = new_library()
    bob = await followed(door, library, user=BOB)
    database.stop()
    try:
        await permit(door, library, "/down", 7)
        assert await paths(door, bob, library) == []
        assert await until(
            lambda: any(
                "Could not read the members of Seafile group 7" in line for line in door.relay.log
            )
        )
    finally:
        database.start()

    async def again() -> list[str]:
        await permit(door, library, "/up", 7)
        return await paths(door, bob, library)

    # A failure is cached for a second.
    while not (found := await again()):
        pass
    assert found == ["/up"]
    assert not any(PASSWORD in line for line in door.relay.log)


async def test_relay_works_without_a_database(valkey: Server) -> None:
    settings = [f"protocol:seafile.key={KEY}", "protocol:seafile.groups=database"]
    settings += ["protocol:seafile.db_socket=/nonexistent"]
    process = RelayProcess(valkey, settings=settings).start()
    library = new_library()
    try:
        async with seafile(process) as door:
            bob = await followed(door, library, user=BOB)
            await permit(door, library, "/7", 7)
            await door.lock(library, "f")
            assert (await bob.next())["type"] == "file-lock-changed"
    finally:
        process.kill()
