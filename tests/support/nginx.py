"""A real nginx with a configuration from the documentation."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.programs import program
from tests.support.relay import ROOT
from tests.support.valkey import free_port

START_S = 60.0
_LOG_CHARS = 10_000


def recipes(document: str) -> dict[str, str]:
    """Return the ```nginx blocks of a document by heading. The second under a heading has ` 2`."""
    found: dict[str, str] = {}
    heading = ""
    text = (ROOT / document).read_text()
    for part in re.finditer(r"^#+ ([^\n]*)$|^```nginx\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if part[1] is not None:
            heading = part[1]
        else:
            found[heading if heading not in found else f"{heading} 2"] = part[2]
    return found


@contextmanager
def nginx(folder: Path, recipe: str, ports: Mapping[int, int]) -> Iterator[str]:
    """Run nginx with `recipe` and yield its address. `ports` replace the ports of its upstreams.

    It listens on the loopback interface, on a free port instead of 80.
    """
    binary = program("nginx", "nginx")
    port = free_port()
    assert recipe.count("listen 80;") == 1
    recipe = recipe.replace("listen 80;", f"listen 127.0.0.1:{port};")
    for old, new in ports.items():
        assert f"127.0.0.1:{old};" in recipe
        recipe = recipe.replace(f"127.0.0.1:{old};", f"127.0.0.1:{new};")
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    head = [
        "daemon off;",
        *(["user root;"] if os.geteuid() == 0 else []),
        f"pid {folder}/nginx.pid;",
        "error_log stderr warn;",
        "events { worker_connections 512; }",
        "http {",
        "access_log off;",
        *(f"{name}_temp_path {folder}/nginx-{name};" for name in paths),
    ]
    config = folder / "nginx.conf"
    config.write_text("\n".join([*head, recipe, "}"]))
    # A file, because nginx would stop at a full pipe.
    log = (folder / "nginx.log").open("w+")
    process = subprocess.Popen(
        [binary, "-e", "stderr", "-p", str(folder), "-c", str(config)],
        stdin=subprocess.DEVNULL,
        stderr=log,
    )
    try:
        _wait(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(START_S)
        with log:
            log.seek(0)
            # pytest prints this output if the test fails.
            sys.stderr.write(log.read()[-_LOG_CHARS:])


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
