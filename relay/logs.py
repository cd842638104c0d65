"""Log lines, plain or JSON, to standard error or to a file that is opened again on SIGUSR1.

Promise: no line holds a token, whoever logs it. The code never logs one on purpose; the patterns
below are the last net, for exception texts and libraries.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import TextIO, cast

import orjson

from relay.errors import StartError
from relay.settings import LogSettings

_HIDDEN = "[hidden]"
_SECRETS = (
    # token=..., relay_token=..., "token": "...", also percent-encoded inside a quoted URL
    (
        re.compile(
            r"""(?ix) ( [\w-]* (?:token|password|passwd|secret|apikey|api[_-]key) [\w-]*
            ["']? \s* (?: = | : | %3D ) \s* ["']? ) [^\s&"'\#;,}]+"""
        ),
        rf"\g<1>{_HIDDEN}",
    ),
    # Authorization: Bearer ..., as a header line, in a dict's repr, or as a pair in a list of them
    (
        re.compile(
            r"""(?ix) ( authorization ["']? \s* [:=,] \s* b?["']? (?:[a-z]+\s+)? ) [^\s"',)}]+"""
        ),
        rf"\g<1>{_HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), rf"\g<1>{_HIDDEN}"),
    # A JWT: base64url of '{"'
    (re.compile(r"eyJ[\w-]{5,}(?:\.[\w-]*){0,4}"), _HIDDEN),
    # redis://user:password@host
    (re.compile(r"(://[^\s/:@]*:)[^\s/@]+@"), rf"\g<1>{_HIDDEN}@"),
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def redact(text: str) -> str:
    """`text` without what looks like a token or a password."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class _Formatter(logging.Formatter):
    def __init__(self, worker: int = 0) -> None:
        """`worker` is the number of this one of several, 0 of an only one."""
        super().__init__()
        self._worker = worker


class PlainFormatter(_Formatter):
    """`2026-11-21T05:44:34.123Z info relay.app: what happened`, a traceback below it.

    Of worker 2 it is `relay.app[2]`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line; control characters are escaped, so that no client can forge another."""
        text = _CONTROL.sub(lambda match: repr(match[0])[1:-1], redact(record.getMessage()))
        name = f"{record.name}[{self._worker}]" if self._worker else record.name
        line = f"{_when(record)} {record.levelname.lower()} {name}: {text}"
        trace = _trace(self, record)
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(_Formatter):
    """One JSON object a line: time, level, logger, message and, where there are any, worker and
    exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; it is always valid JSON."""
        fields = {
            "time": _when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if self._worker:
            fields["worker"] = str(self._worker)
        if trace := _trace(self, record):
            fields["exception"] = trace
        try:
            return orjson.dumps(fields).decode()
        except orjson.JSONEncodeError:
            # Half a surrogate pair, as os.fsdecode makes them, is no UTF-8.
            clean = {
                key: value.encode("utf-8", "backslashreplace").decode()
                for key, value in fields.items()
            }
            return orjson.dumps(clean).decode()


class FileHandler(logging.StreamHandler[TextIO]):
    """Appends to a file that another program may move away."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(self._open())

    def reopen(self) -> None:
        """From now on lines go to what the path names now; if that fails, where they went."""
        try:
            stream = self._open()
        except OSError as exc:
            logging.getLogger(__name__).error(
                "[log] file %s cannot be opened again: %s", self._path, exc.strerror
            )
            return
        with cast(TextIO, self.setStream(stream)):
            pass

    def close(self) -> None:
        """Closes the file too."""
        super().close()
        self.stream.close()

    def _open(self) -> TextIO:
        return self._path.open("a", encoding="utf-8", errors="backslashreplace")


def setup(settings: LogSettings, *, worker: int = 0) -> None:
    """All loggers write as `settings` say; what an earlier call set up is taken away.

    `worker` is in each line where it is not 0.

    StartError where the file cannot be opened.
    """
    handler: logging.Handler
    if settings.file:
        try:
            handler = FileHandler(Path(settings.file))
        except OSError as exc:
            raise StartError(
                f"[log] file {settings.file} cannot be opened: {exc.strerror};"
                " --set log.file= writes to standard error"
            ) from exc
    else:
        handler = logging.StreamHandler()
    handler.setFormatter((JsonFormatter if settings.format == "json" else PlainFormatter)(worker))
    root = logging.getLogger()
    for old in (each for each in root.handlers[:] if isinstance(each.formatter, _OURS)):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    set_level(settings.level)
    # It would print request lines, and native clients may have their token there.
    logging.getLogger("aiohttp.access").disabled = True


def set_level(level: str) -> None:
    """The lowest level written from now on: debug, info, warning or error."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    # Its jobs run every few seconds and it tells of each at info.
    logging.getLogger("apscheduler").setLevel(max(root.level, logging.WARNING))


def reopen() -> None:
    """Opens the log file again, for SIGUSR1; nothing where standard error is the log."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, FileHandler):
            handler.reopen()


_OURS = (PlainFormatter, JsonFormatter)


def _when(record: logging.LogRecord) -> str:
    # In UTC: lines of several hosts are read together.
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info and record.exc_info[0]:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return redact("\n".join(parts))
