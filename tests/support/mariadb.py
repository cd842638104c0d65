"""A real MariaDB server in its own folder, with Seafile's ccnet database."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.programs import program
from tests.support.valkey import free_port

USER, PASSWORD, DATABASE = "seafile", 'p%w#1;"x', "ccnet_db"
START_S = 60


class MariaDb:
    """One server. `port` is the same after a restart."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.socket = folder / "sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = ["--user=root"] if os.geteuid() == 0 else []

    def prepare(self) -> None:
        """Create the data folder. If MariaDB is missing, the test is skipped; in CI it fails."""
        install = program("mariadb-install-db", "mariadb-server")
        data = self._folder / "data"
        command = [install, "--no-defaults", f"--datadir={data}", *self._owner]
        command += ["--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(command, check=True, capture_output=True)
        self.start()
        self.run(
            f"CREATE DATABASE `{DATABASE}`; USE `{DATABASE}`;"
            # As Seafile's own setup creates it.
            "CREATE TABLE GroupUser (id BIGINT NOT NULL PRIMARY KEY AUTO_INCREMENT,"
            " group_id BIGINT, user_name VARCHAR(255), is_staff TINYINT,"
            " UNIQUE INDEX (group_id, user_name), INDEX (user_name)) ENGINE=INNODB;"
            f"CREATE USER '{USER}'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';"
            f"GRANT SELECT ON `{DATABASE}`.GroupUser TO '{USER}'@'127.0.0.1';"
        )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [
            *(
                program("mariadbd", "mariadb-server"),
                "--no-defaults",
                f"--datadir={self._folder / 'data'}",
            ),
            *(f"--port={self.port}", "--bind-address=127.0.0.1", f"--socket={self.socket}"),
            *(f"--pid-file={self._folder / 'pid'}", "--skip-name-resolve", *self._owner),
        ]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        end = time.monotonic() + START_S
        while self._client("SELECT 1").returncode != 0:
            assert time.monotonic() < end, (self._folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def stop(self) -> None:
        """Kill the server."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def run(self, statements: str, database: str = "mysql") -> None:
        """Run statements as the database's root user."""
        done = self._client(statements, database)
        assert done.returncode == 0, done.stderr.decode()

    def _client(
        self, statements: str, database: str = "mysql"
    ) -> subprocess.CompletedProcess[bytes]:
        command = ["mariadb", "--no-defaults", f"--socket={self.socket}", "-uroot", database]
        return subprocess.run(command, input=statements.encode(), capture_output=True, check=False)


@contextmanager
def mariadb(folder: Path) -> Iterator[MariaDb]:
    """Run a server with an empty GroupUser table."""
    server = MariaDb(folder)
    try:
        server.prepare()
        yield server
    finally:
        server.stop()
