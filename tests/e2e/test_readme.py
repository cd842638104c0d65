"""Every command and code block of README.md works as printed, apart from the ports."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.support.browser import chromium
from tests.support.relay import ROOT
from tests.support.valkey import Server, free_port

# Each test starts several processes while other tests use the machine.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
LIMIT_S = 40.0
TEXT = (ROOT / "README.md").read_text()
# These are all code blocks of README.md in order. A new block needs a name and a test here.
(
    (_, START),
    (_, PUBLISH),
    (_, PAGE),
    (_, SERVE),
    (_, SERVE_PAGE),
    (_, TOKEN),
    (_, WATCH),
    (_, PROGRAM),
    (_, RUN_PROGRAM),
    (_, REVOKE),
    (_, INSTALL),
) = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
REPLACED_SERVERS = re.findall(r"^\| [^|]+ \| `(scripts/run [^`]+)` \|", TEXT, re.MULTILINE)
READY = "relay is ready on http://127.0.0.1:8000\n"
ENTRY_ID = re.compile(r"^\d{13}-\d+$", re.MULTILINE)


class Folder:
    """A working copy of relay in which the tests run commands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.port, self.page_port, self.redis_port = free_port(), free_port(), free_port()
        for name in ("scripts", ".venv", "relay", "producers", "requirements.lock"):
            (path / name).symlink_to(ROOT / name)
        self._environment = {
            "HOME": str(path),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RELAY_SERVER_PORT": str(self.port),
            "RELAY_REDIS_EMBEDDED_PORT": str(self.redis_port),
            "RELAY_NODE_DRAIN_S": "0",
        }

    def text(self, printed: str) -> str:
        """Replace the ports in a text of README.md by those of this test."""
        ports = {"8000": self.port, "8080": self.page_port, "8084": self.port}
        ports["6399"] = self.redis_port
        return re.sub(rf"\b({'|'.join(ports)})\b", lambda found: str(ports[found[0]]), printed)

    def write(self, name: str, printed: str) -> None:
        (self.path / name).write_text(self.text(printed))

    def run(self, printed: str, **environment: str) -> str:
        """Run the lines in a shell that stops at the first error. Return their output."""
        done = subprocess.run(
            ["sh", "-eu", "-c", self.text(printed)],
            cwd=self.path,
            env=self._environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def running(self, printed: str, ready: str, **environment: str) -> Iterator[Output]:
        """Run one command until the context ends. Wait first until it has printed `ready`."""
        process = subprocess.Popen(
            ["sh", "-c", f"exec {self.text(printed)}"],
            cwd=self.path,
            env=self._environment | {"PYTHONUNBUFFERED": "1"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output = Output(process)
        try:
            output.wait_for(self.text(ready))
            yield output
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(LIMIT_S)
            finally:
                process.kill()
                output.close()

    def serving(self, printed: str = SERVE) -> AbstractContextManager[Output]:
        return self.running(printed, READY)

    def token(self) -> str:
        """Return the token that README.md's command creates."""
        return self.run(TOKEN.splitlines()[0] + '\necho "$TOKEN"').strip()


class Output:
    """The output of a running process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._text = ""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._text += line
                self._changed.notify_all()

    def wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self._text, LIMIT_S), self._text

    def close(self) -> None:
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def folder_in(path: Path) -> Iterator[Folder]:
    yield Folder(path)
    # The embedded Valkey continues to run if relay is killed.
    with suppress(OSError, ValueError):
        os.kill(int((path / "data" / "valkey.pid").read_text()), signal.SIGTERM)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """Return a folder without a running relay."""
    with folder_in(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Folder, Output]]:
    """Run one relay for all tests that do not stop it. Return its folder and output."""
    with folder_in(tmp_path_factory.mktemp("served")) as made, made.serving() as output:
        yield made, output


def lines(block: str) -> list[str]:
    return block.splitlines()


def until(is_so: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_start_and_publish(folder: Folder) -> None:
    run, test = (line.split()[0] for line in lines(START))
    assert os.access(ROOT / test, os.X_OK)
    with folder.running(run, READY) as output:
        output.wait_for(f"http://127.0.0.1:{folder.port}/#")
        ids = ENTRY_ID.findall(folder.run(PUBLISH))
        assert len(ids) == 2


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def test_the_page_shows_events_and_what_it_missed(folder: Folder, browser: Chrome) -> None:
    folder.write("first.html", PAGE)
    token, echo, publish = lines(TOKEN)

    def shown() -> list[str]:
        text = browser.find_element(By.ID, "events").text
        return [line.split(" ", 1)[1] for line in text.splitlines()]

    with folder.running(SERVE_PAGE, "Serving HTTP on"):
        with folder.serving():
            browser.get(folder.run(f"{token}\n{echo}").strip())
            until(lambda: connections(folder) == 1, "the page's connection")
            folder.run(publish)
            until(lambda: shown() == ['{"hello":3}'], "the event in the page")
        with folder.serving():
            folder.run(publish.replace("3", "4"))
            until(lambda: shown() == ['{"hello":3}', '{"hello":4}'], "what the page missed")


def test_a_page_of_an_origin_that_is_not_allowed_is_named(
    served: tuple[Folder, Output], browser: Chrome
) -> None:
    folder, relay = served
    folder.write("first.html", PAGE)
    token, echo, _ = lines(TOKEN)
    other = str(free_port())
    with folder.running(SERVE_PAGE.replace("8080", other), "Serving HTTP on"):
        browser.get(folder.run(f"{token}\n{echo.replace('8080', other)}").strip())
        relay.wait_for(f"Pages of origin 'http://127.0.0.1:{other}' cannot read /sse")
        relay.wait_for("add the origin to [protocol:native] allowed_origins")


def test_watch_revoke_and_grant(served: tuple[Folder, Output]) -> None:
    folder, _ = served
    revoke, grant = lines(REVOKE)
    token = folder.token()
    with folder.running(WATCH, "retry:", TOKEN=token) as watching:
        folder.run(lines(TOKEN)[-1])
        watching.wait_for('data: {"hello":3}')
        folder.run(revoke)
        watching.wait_for("event: relay:revoked")
    folder.run(grant)
    with folder.running(WATCH, "retry:", TOKEN=token) as watching:
        folder.run(lines(TOKEN)[-1])
        watching.wait_for('data: {"hello":3}')


def test_publish_from_python(served: tuple[Folder, Output]) -> None:
    folder, _ = served
    folder.write("first.py", PROGRAM)
    assert ENTRY_ID.search(folder.run(RUN_PROGRAM))


@pytest.mark.slow
def test_publish_from_a_project_with_relay_installed(
    served: tuple[Folder, Output], tmp_path: Path
) -> None:
    folder, _ = served
    install = re.search(r"`(pip install /path/to/relay)`", TEXT)
    assert install
    source, project = tmp_path / "source", tmp_path / "project"
    project.mkdir()
    for name in ("relay", "producers"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Don't install relay's dependencies, because the environment of the tests has them.
    command = install[1].replace("/path/to/relay", f"--no-deps --target {project} {source}")
    folder.run(f"{sys.executable} -m {command}")
    (project / "first.py").write_text(folder.text(PROGRAM))
    # Python imports packages from the folder of the program.
    assert ENTRY_ID.search(folder.run(f"cd {project}; {sys.executable} first.py"))


def test_the_commands_that_replace_other_servers_serve(folder: Folder, tmp_path: Path) -> None:
    centrifugo, seafile = REPLACED_SERVERS
    port = free_port()
    secret = "a secret that is long enough for HS256"
    (tmp_path / "config.json").write_text(json.dumps({"secret": secret, "port": str(port)}))
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "seafile.conf").write_text(
        f"[notification]\nenabled = true\nport = {port}\njwt_private_key = {secret}\n"
    )
    for command in (centrifugo, seafile.replace("/opt/seafile/conf", "conf")):
        with folder.running(command, f"http://127.0.0.1:{port}"):
            pass


def test_install_with_another_redis(folder: Folder, valkey: Server) -> None:
    generate, check, serve = lines(INSTALL)
    folder.run(f"{generate}\n{check}")
    serve = serve.replace("redis://host:6379/0", valkey.url("relay"))
    with folder.serving(serve):
        pass


def connections(folder: Folder) -> int:
    """Return how many clients the native protocol has."""
    with urllib.request.urlopen(f"http://127.0.0.1:{folder.port}/metrics") as answer:
        found = re.search(
            r'^relay_connections\{[^}]*protocol="native"[^}]*\} (\d+)', answer.read().decode(), re.M
        )
    return int(found[1]) if found else 0
