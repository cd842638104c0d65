"""scripts/ and .ci/run work with Debian's Python and an empty environment."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from relay import __version__
from tests.support.valkey import free_port

ROOT = Path(__file__).parents[2]
PATH = "/usr/bin:/bin:/usr/local/bin"


def run(
    *words: str | Path, cwd: Path, path: str = PATH, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={"HOME": str(home or cwd), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def shows(curl: str, line: str) -> bool:
    """Run curl, which stays connected, until it prints this line."""
    words = ["sh", "-c", f"exec {curl} --silent --max-time 40"]
    with subprocess.Popen(words, env={"PATH": PATH}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = any(each.rstrip("\n") == line for each in process.stdout)
        process.kill()
    return found


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Create a folder with the scripts and the lock file of a fresh clone, without a .venv."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copy(ROOT / "requirements.lock", root)
    return root


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Create a folder for PATH that has the programs that the scripts use, but no Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("sh", "dirname", "cmp", "rm", "cp", "flock", "sleep", "cat"):
        found = shutil.which(name, path=PATH)
        assert found, name
        (folder / name).symlink_to(found)
    return folder


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@contextmanager
def serving(cwd: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Run scripts/run as a process, and yield it with the lines that it prints when ready."""
    process = subprocess.Popen(
        [ROOT / "scripts" / "run", *arguments],
        cwd=cwd,
        env={"HOME": str(cwd), "PATH": PATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    lines: dict[str, str] = {}
    try:
        while "watch" not in lines:
            line = process.stdout.readline()
            assert line, "it ended before it was ready"
            if line.startswith("  "):
                name, text = line.split(None, 1)
                lines[name] = text.strip()
        yield process, lines
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a working folder. Stop its embedded Valkey at the end, also after a failure."""
    yield tmp_path
    with suppress(OSError, ValueError):
        os.kill(int((tmp_path / "data" / "valkey.pid").read_text()), signal.SIGTERM)


def test_run_hands_its_arguments_on(tmp_path: Path) -> None:
    done = run(ROOT / "scripts" / "run", "version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"relay {__version__}\n", "")
    assert run(ROOT / "scripts" / "run", "sing", cwd=tmp_path).returncode == 2


def test_paths_are_those_of_the_folder_where_the_user_stands(tmp_path: Path) -> None:
    (tmp_path / "my.ini").write_text("[server]\nport = abc\n")
    done = run(ROOT / "scripts" / "run", "checkconfig", "-c", "my.ini", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "relay: my.ini: [server] port = abc: a whole number from 0 to 65535\n"


@pytest.mark.redis
@pytest.mark.timeout(60)
def test_run_serves_and_its_lines_work_as_they_stand(folder: Path) -> None:
    settings = ["--set", f"redis.embedded_port={free_port()}", "--set", "node.drain_s=0"]
    with serving(folder, "serve", "--port", "0", *settings) as (process, lines):
        appended = run("sh", "-c", lines["append"], cwd=folder)
        assert re.fullmatch(r"\d+-\d+\n", appended.stdout), appended
        # If its output is a pipe, relay prints the command that creates a token, and no token.
        made = run("sh", "-c", lines["token"], cwd=folder)
        assert made.returncode == 0, made
        assert "eyJ" not in str(lines)
        watch = lines["watch"].replace("TOKEN", made.stdout.strip())
        resumed = watch.replace("?", "?last_event_id=0&")
        assert shows(resumed, 'data: {"hello":1}')
        with urllib.request.urlopen(lines["page"].partition("#")[0]) as page:  # noqa: S310
            assert b"<html" in page.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    data = folder / "data"
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert not (data / "valkey.pid").exists()


@pytest.mark.redis
@pytest.mark.timeout(60)
def test_a_relay_killed_at_once_starts_again_with_its_data(folder: Path) -> None:
    settings = ["--set", f"redis.embedded_port={free_port()}", "--set", "node.drain_s=0"]
    with serving(folder, "serve", "--port", "0", *settings) as (process, lines):
        run("sh", "-c", lines["append"], cwd=folder)
        process.kill()
    with serving(folder, "serve", "--port", "0", *settings) as (process, lines):
        # If its output is a pipe, relay prints the command that creates a token, and no token.
        made = run("sh", "-c", lines["token"], cwd=folder)
        assert made.returncode == 0, made
        assert "eyJ" not in str(lines)
        watch = lines["watch"].replace("TOKEN", made.stdout.strip())
        resumed = watch.replace("?", "?last_event_id=0&")
        assert shows(resumed, 'data: {"hello":1}')
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_without_python_the_line_says_what_to_install(
    clone: Path, tools: Path, tmp_path: Path
) -> None:
    # The script also looks for /usr/bin/python3. Replace this path by one that does not exist.
    setup = clone / "scripts" / "venv"
    setup.write_text(setup.read_text().replace("/usr/bin/python3", "/nowhere/python3"))
    script(tools / "python3", "exit 1")
    done = run(clone / "scripts" / "run", cwd=tmp_path, path=str(tools))
    assert done.returncode == 1
    assert done.stderr == (
        "relay: Python 3.11 or newer is missing; run: sudo apt install python3.11 python3.11-venv\n"
    )


def test_without_the_venv_module_the_line_says_what_to_install(
    clone: Path, tools: Path, tmp_path: Path
) -> None:
    script(tools / "python3.11", 'case "$2" in *ensurepip*) exit 1;; esac')
    done = run(clone / "scripts" / "test", cwd=tmp_path, path=str(tools))
    assert done.returncode == 1
    assert done.stderr == (
        "relay: python3.11 has no venv module; run: sudo apt install python3.11-venv\n"
    )


FAKE_PYTHON = """\
echo "$*" >> "$HOME/calls"
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
fi
case "$*" in *"-m pip"*) sleep 0.3; [ ! -e "$HOME/broken" ];; esac
"""


def test_the_venv_is_built_once_and_again_when_the_lock_changes_or_building_broke_off(
    clone: Path, tools: Path, tmp_path: Path
) -> None:
    """Use a fake Python that only records its arguments: a real installation takes a minute."""
    script(tools / "python3.11", FAKE_PYTHON)
    mkdir = shutil.which("mkdir", path=PATH)
    assert mkdir
    (tools / "mkdir").symlink_to(mkdir)
    calls = tmp_path / "calls"

    def installations(*words: str, returncode: int = 0) -> int:
        calls.unlink(missing_ok=True)
        done = run(clone / "scripts" / "run", *words, cwd=tmp_path, path=str(tools), home=tmp_path)
        assert done.returncode == returncode, done
        return calls.read_text().count("--require-hashes")

    assert installations() == 1
    assert calls.read_text().endswith("-m relay serve\n")
    assert installations("version") == 0
    assert calls.read_text() == "-m relay version\n"
    lock = clone / "requirements.lock"
    lock.write_text(lock.read_text() + "# new\n")
    assert installations() == 1
    lock.write_text(lock.read_text() + "# newer\n")
    (tmp_path / "broken").touch()
    assert installations(returncode=1) == 1
    (tmp_path / "broken").unlink()
    assert installations() == 1
    assert installations() == 0


def test_two_commands_at_once_build_the_venv_once(clone: Path, tools: Path, tmp_path: Path) -> None:
    script(tools / "python3.11", FAKE_PYTHON)
    mkdir = shutil.which("mkdir", path=PATH)
    assert mkdir
    (tools / "mkdir").symlink_to(mkdir)
    environment = {"HOME": str(tmp_path), "PATH": str(tools)}
    both = [
        subprocess.Popen([clone / "scripts" / "run"], env=environment, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait(timeout=30) for process in both] == [0, 0]
    assert (tmp_path / "calls").read_text().count("--require-hashes") == 1


@pytest.mark.parametrize("name", ["run", "test", "check", "fix"])
def test_scripts_are_plain_sh(name: str) -> None:
    path = ROOT / "scripts" / name
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/sh\n")
    for each in (path, ROOT / "scripts" / "venv"):
        subprocess.run(["/bin/sh", "-n", each], check=True)


def test_ci_installs_only_what_is_missing_and_ends_with_the_tests() -> None:
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    subprocess.run(["/bin/bash", "-n", path], check=True)
    assert path.read_text().splitlines()[-1] == 'scripts/test "$@" </dev/null'


def test_the_tests_themselves_run_on_the_locked_python() -> None:
    assert (
        Path(sys.prefix).joinpath("requirements.lock").read_bytes()
        == (ROOT / "requirements.lock").read_bytes()
    )
