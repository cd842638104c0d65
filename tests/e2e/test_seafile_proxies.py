"""The proxy recipes of Seafile's manuals and of docs/seafile.md in real nginx and Apache.

Each passes the websocket, `/ping` and `/events`. Only ports and folders of logs are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.apache import apache
from tests.support.nginx import nginx, recipes
from tests.support.relay import ROOT, RelayProcess
from tests.support.seafile import KEY, new_library, seafile, sender_token, standing
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis

MAP = """\
map $http_upgrade $connection_upgrade {
default upgrade;
'' close;
}
"""
# 10.0, first version.
FIRST_NGINX = """\
    location /notification {
        proxy_pass http://127.0.0.1:8083/;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection "upgrade";
        access_log      /var/log/nginx/notif.access.log;
        error_log       /var/log/nginx/notif.error.log;
    }
"""
LATER_NGINX = (
    """\
    location /notification/ping {
        proxy_pass http://127.0.0.1:8083/ping;
        access_log      /var/log/nginx/notif.access.log;
        error_log       /var/log/nginx/notif.error.log;
    }

"""
    + FIRST_NGINX
)
# 13.0, "use other reverse proxy": without a slash at the end.
OTHER_NGINX = """\
    location /notification {
        proxy_pass http://127.0.0.1:8083;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection "upgrade";
        proxy_set_header Host $host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    }
"""
APACHE = """\
    ProxyPass /notification/ping  http://127.0.0.1:8083/ping/
    ProxyPassReverse /notification/ping  http://127.0.0.1:8083/ping/

    ProxyPass /notification  ws://127.0.0.1:8083/
    ProxyPassReverse /notification ws://127.0.0.1:8083/
"""
OURS, HEADING = "docs/seafile.md", "Configure nginx or Apache"

Front = Callable[[Path, int], AbstractContextManager[int]]


@contextmanager
def behind_nginx(block: str, folder: Path, port: int) -> Iterator[int]:
    text = block.replace("8083", str(port)).replace("/var/log/nginx", str(folder))
    recipe = f"{MAP}\nserver {{\nlisten 80;\n{text}\n}}"
    with nginx(folder, recipe, {}) as address:
        yield int(address.rstrip("/").rpartition(":")[2])


@contextmanager
def behind_our_nginx(recipe: str, folder: Path, port: int) -> Iterator[int]:
    with nginx(folder, recipe, {8083: port}) as address:
        yield int(address.rpartition(":")[2])


def apache_recipe(document: str) -> str:
    found = re.search(r"^```apache\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)
    assert found
    return found[1]


@contextmanager
def behind_apache(block: str, folder: Path, port: int) -> Iterator[int]:
    with apache(folder, server=block.replace("8083", str(port))) as own:
        yield own


FRONTS: dict[str, Front] = {
    "nginx-first": partial(behind_nginx, FIRST_NGINX),
    "nginx-later": partial(behind_nginx, LATER_NGINX),
    "nginx-other": partial(behind_nginx, OTHER_NGINX),
    "apache": partial(behind_apache, APACHE),
    "nginx-ours": partial(behind_our_nginx, recipes(OURS)[HEADING]),
    "apache-ours": partial(behind_apache, apache_recipe(OURS)),
}


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[tuple[RelayProcess, int]]:
    """Run relay with a port of this protocol, as with a seafile.conf."""
    port = free_port()
    settings = [f"protocol:seafile.key={KEY}", f"protocol:seafile.port={port}"]
    process = RelayProcess(valkey, settings=settings).start()
    yield process, port
    process.kill()


@pytest.mark.parametrize("name", FRONTS)
async def test_a_recipe_passes_all_three_routes(
    relay: tuple[RelayProcess, int], tmp_path: Path, name: str
) -> None:
    process, door_port = relay
    library = new_library()
    with FRONTS[name](tmp_path, door_port) as port:
        async with seafile(process, port) as front, seafile(process, door_port) as door:
            answer = await front.request("GET", "/notification/ping")
            assert (answer.status, answer.body) == (200, b'{"ret": "pong"}\n')
            client = await front.connect("/notification")
            await client.subscribe(library)
            await standing(door, client, library)
            headers = {"Authorization": f"Token {sender_token()}"}
            body = (
                b'{"type":"repo-update","content":{"repo_id":"%s","commit_id":"c"}}'
                % library.encode()
            )
            answer = await front.request("POST", "/notification/events", body, headers)
            assert answer.status == 200
            assert (await client.next())["content"]["commit_id"] == "c"
