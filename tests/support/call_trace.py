"""Run a module and record the calls of functions in relay/: `call_trace.py PYTHON -m MODULE ARGS`.

SIGRTMIN ends the recording and writes one line per call, file and function, to $RELAY_CALLS.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

FOLDER = f"{Path.cwd()}/"
calls: list[str] = []


def _record(frame: FrameType, event: str, _argument: object) -> None:
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(f"{FOLDER}relay/"):
        calls.append(f"{code.co_filename.removeprefix(FOLDER)} {code.co_qualname}")


def _write(*_: object) -> None:
    sys.setprofile(None)
    Path(os.environ["RELAY_CALLS"]).write_text("\n".join(calls))


if __name__ == "__main__":
    signal.signal(signal.SIGRTMIN, _write)
    sys.argv = sys.argv[3:]
    # Modules in this folder have common names and must not hide others.
    del sys.path[0]
    sys.setprofile(_record)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
