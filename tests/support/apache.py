"""A real Apache in front of relay, with a configuration from the documentation."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.programs import program
from tests.support.valkey import free_port

START_S = 60.0
_APACHE_MODULES = Path("/usr/lib/apache2/modules")


@contextmanager
def apache(folder: Path, *, server: str) -> Iterator[int]:
    """Run Apache with `server` in its virtual host, and yield its port."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    apache2 = program("apache2", "apache2")
    modules = ("mpm_event", "authz_core", "proxy", "proxy_http", "proxy_wstunnel", "rewrite")
    loads = "\n".join(
        f"LoadModule {name}_module {_APACHE_MODULES}/mod_{name}.so" for name in modules
    )
    configuration = folder / "apache.conf"
    configuration.write_text(
        f"ServerRoot {folder}\nServerName localhost\nPidFile {folder / 'pid'}\n"
        f"DefaultRuntimeDir {folder}\nErrorLog {folder / 'error.log'}\n{loads}\n"
        f"Listen 127.0.0.1:{port}\n<VirtualHost *:{port}>\n{server}\n</VirtualHost>\n"
    )
    command = [apache2, "-DFOREGROUND", "-f", str(configuration)]
    with _serving(command, port, folder / "error.log"):
        yield port


@contextmanager
def _serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + START_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > end:
                said = (
                    process.stderr.read() if process.poll() is not None and process.stderr else b""
                )
                kept = log.read_text() if log.exists() else ""
                raise RuntimeError(f"{command[0]} did not start: {said.decode()} {kept[-2000:]}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            # Don't wait for the connections of its workers, which are no longer needed.
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()
