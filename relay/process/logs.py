"""Write log lines, plain or JSON, to standard error or to a file that is reopened on SIGUSR1.

Log lines never contain tokens. Relay's own code does not log them; the patterns below remove them
from the texts of exceptions and libraries.

Repeated lines are counted instead of written, so that no peer can flood the log: see
`RepeatLimiter`. Callers log every occurrence and keep no counters of their own.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, cast

import orjson
from typing_extensions import override

from relay.config.settings import LogSettings
from relay.core.errors import StartError

_HIDDEN = "[hidden]"
_SECRETS = (
    # All patterns take linear time, because peers choose parts of the text. A name is matched from
    # its first character only.
    # token=..., relay_token=..., "token": "...", also percent-encoded inside a quoted URL
    (
        re.compile(
            r"""(?ix) ( (?<![\w-]) [\w-]*
            (?:token|password|passwd|secret|apikey|api[_-]key) [\w-]{0,64}
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
# Peers choose some of the values in a line.
_MESSAGE_CHARS = 4000
_TRACE_CHARS = 20000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def redact(text: str) -> str:
    """Replace parts of `text` that look like tokens or passwords."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class _Formatter(logging.Formatter):
    def __init__(self, worker: int = 0) -> None:
        """`worker` is the number of this worker, or 0 if there is only one."""
        super().__init__()
        self._worker = worker


class PlainFormatter(_Formatter):
    """Lines such as `2026-11-21T05:44:34.123Z info relay.process.app: what happened`.

    A traceback follows in further lines. The logger of worker 2 is `relay.process.app[2]`.
    """

    @override
    def format(self, record: logging.LogRecord) -> str:
        # Escape control characters, so that a client cannot forge another line.
        text = _CONTROL.sub(lambda match: repr(match[0])[1:-1], _message(record))
        name = f"{record.name}[{self._worker}]" if self._worker else record.name
        line = f"{_when(record)} {record.levelname.lower()} {name}: {text}"
        trace = _trace(self, record)
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(_Formatter):
    """One JSON object per line: time, level, logger, message, and worker and exception if any."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if self._worker:
            fields["worker"] = str(self._worker)
        if trace := _trace(self, record):
            fields["exception"] = trace
        try:
            return orjson.dumps(fields).decode()
        except orjson.JSONEncodeError:
            # Unpaired surrogates, which os.fsdecode may return, cannot be encoded as UTF-8.
            clean = {
                key: value.encode("utf-8", "backslashreplace").decode()
                for key, value in fields.items()
            }
            return orjson.dumps(clean).decode()


class FileHandler(logging.StreamHandler[TextIO]):
    """Appends to a file that another program may rename."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(self._open())

    def reopen(self) -> None:
        """Open the path again. If that fails, continue with the old file."""
        try:
            stream = self._open()
        except OSError as exc:
            logging.getLogger(__name__).error(
                "[log] file %s cannot be opened again: %s", self._path, exc.strerror
            )
            return
        with cast(TextIO, self.setStream(stream)):
            pass

    @override
    def close(self) -> None:
        super().close()
        self.stream.close()

    def _open(self) -> TextIO:
        return self._path.open("a", encoding="utf-8", errors="backslashreplace")


# A line of level info is not the result of an attack; this limit only stops a runaway loop.
_INFO_LINES = 100
# Warnings and errors from one place in the code with different values, such as names of channels.
_DISTINCT_LINES = 5
# Limit of the texts that are remembered while the same call keeps logging.
_REMEMBERED_LINES = 50


@dataclass(slots=True)
class _Window:
    """The lines from one place in the code since `began`."""

    began: float
    # Lines that this window may still write.
    left: int
    written: set[int] = field(default_factory=set)
    suppressed: int = 0
    same: bool = True
    latest: logging.LogRecord | None = None


class RepeatLimiter(logging.Handler):
    """Writes a repeated line once, and then at most once per window with the number of repeats.

    Records count as repeats if they come from the same place in the code: the same logger, level,
    call and message template. Records with a traceback must also have the same exception type,
    raised in the same line.

    - Level warning and above: an identical text is written once per series. At most 5 different
      texts per window are written, so that operators see distinct faults even if a peer chooses the
      values. A traceback is written once.
    - Level info: at most 100 lines per window.
    - Level debug: everything is written.

    The first record is always written at once. The number of suppressed records is written when the
    window ends, together with the latest text, and when the handler is closed.
    """

    def __init__(
        self,
        target: logging.Handler,
        *,
        window_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.target = target
        self._window_s = window_s
        self._clock = clock
        self._windows: dict[tuple[object, ...], _Window] = {}
        self._timer: threading.Timer | None = None

    @override
    def emit(self, record: logging.LogRecord) -> None:
        # Write the record, or count it. The caller holds the handler's lock.
        if record.levelno < logging.INFO:
            self.target.handle(record)
            return
        now = self._clock()
        self._end_windows(now)
        key = _origin(record)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(now, self._allowance(record))
        text = record.getMessage()
        if self._may_write(window, record, text):
            window.left -= 1
            self.target.handle(record)
            return
        window.suppressed += 1
        if window.latest is not None and window.latest.msg != text:
            window.same = False
        # Without arguments and traceback: they may keep large objects alive.
        kept = {"msg": text, "args": None, "exc_info": None, "exc_text": None}
        window.latest = logging.makeLogRecord({**record.__dict__, **kept})
        if self._timer is None:
            self._start_timer(window.began + self._window_s - now)

    @override
    def flush(self) -> None:
        # Write the counts of windows that have ended.
        self.acquire()
        try:
            self._end_windows(self._clock())
        finally:
            self.release()
        self.target.flush()

    @override
    def close(self) -> None:
        # Write all counts and close the target too.
        self.acquire()
        try:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            for window in self._windows.values():
                self._write_count(window, self._clock())
            self._windows.clear()
        finally:
            self.release()
        super().close()
        self.target.close()

    @staticmethod
    def _allowance(record: logging.LogRecord) -> int:
        return _DISTINCT_LINES if record.levelno >= logging.WARNING else _INFO_LINES

    @staticmethod
    def _may_write(window: _Window, record: logging.LogRecord, text: str) -> bool:
        if window.left <= 0:
            return False
        if record.levelno < logging.WARNING:
            return True
        # Records with a traceback are the same even if the values in their texts differ.
        same = hash("" if record.exc_info else text)
        if same in window.written:
            return False
        window.written.add(same)
        return True

    def _end_windows(self, now: float) -> None:
        over = [key for key, each in self._windows.items() if now - each.began >= self._window_s]
        for key in over:
            window = self._windows[key]
            if not window.suppressed or window.latest is None:
                del self._windows[key]
                continue
            allowance = self._allowance(window.latest)
            self._write_count(window, now)
            # Start the next window of the series, which still suppresses texts already written.
            known = window.written if len(window.written) <= _REMEMBERED_LINES else set()
            self._windows[key] = _Window(now, allowance, known)

    def _write_count(self, window: _Window, now: float) -> None:
        latest = window.latest
        if latest is None:
            return
        span = f"in the last {max(1, round(now - window.began))} s"
        count = f"{window.suppressed:,} time{'s' if window.suppressed > 1 else ''}"
        verb = "repeated" if window.same else "and similar lines, logged"
        latest.msg = f"{latest.msg} ({verb} {count} {span})"
        latest.created = time.time()
        latest.msecs = int(latest.created % 1 * 1000)
        self.target.handle(latest)
        window.suppressed, window.latest, window.same = 0, None, True

    def _start_timer(self, delay_s: float) -> None:
        # A thread, because logging has no event loop: counts must appear even if nothing else is
        # logged. It only runs while lines are being suppressed.
        self._timer = threading.Timer(max(0.0, delay_s), self._on_timer)
        self._timer.daemon = True
        self._timer.start()

    def _on_timer(self) -> None:
        self.acquire()
        try:
            if self._timer is None:
                return
            self._timer = None
            now = self._clock()
            self._end_windows(now)
            waiting = [each.began for each in self._windows.values() if each.suppressed]
            if waiting:
                self._start_timer(min(waiting) + self._window_s - now)
        finally:
            self.release()


def _origin(record: logging.LogRecord) -> tuple[object, ...]:
    """Return the key of a record. Records with the same key are repeats of one line."""
    # Without arguments, the caller may have formatted the text.
    template = record.msg if record.args else None
    place = (record.name, record.levelno, record.pathname, record.lineno, template)
    if not record.exc_info or record.exc_info[0] is None:
        return place
    kind, _, trace = record.exc_info
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised = (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace else None
    return (record.name, record.levelno, record.pathname, record.lineno, kind, raised)


def open_error(path: str, problem: str) -> str:
    """Return the line for a log file that cannot be opened."""
    return (
        f"[log] file {path} cannot be opened: {problem}; --set log.file= writes to standard error"
    )


def setup(settings: LogSettings, *, worker: int = 0) -> None:
    """Configure logging, replacing the configuration of an earlier call.

    `worker` is the number of this worker, or 0 if there is only one.

    Raises:
        StartError: The log file cannot be opened.
    """
    handler: logging.Handler
    if settings.file:
        try:
            handler = FileHandler(Path(settings.file))
        except OSError as exc:
            raise StartError(open_error(settings.file, exc.strerror or str(exc))) from exc
    else:
        handler = logging.StreamHandler()
    handler.setFormatter((JsonFormatter if settings.format == "json" else PlainFormatter)(worker))
    root = logging.getLogger()
    for old in (each for each in root.handlers[:] if isinstance(each, RepeatLimiter)):
        root.removeHandler(old)
        old.close()
    root.addHandler(RepeatLimiter(handler))
    set_level(settings.level)
    # It would log request lines, which may contain tokens.
    logging.getLogger("aiohttp.access").disabled = True


def set_level(level: str) -> None:
    """Set the lowest level to write: debug, info, warning or error."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    # APScheduler logs each run of a job at level info. At level warning it logs skipped runs, which
    # relay logs itself.
    logging.getLogger("apscheduler").setLevel(max(root.level, logging.ERROR))


def reopen() -> None:
    """Open the log file again, for SIGUSR1. Do nothing if the log is standard error."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RepeatLimiter) and isinstance(handler.target, FileHandler):
            handler.target.reopen()


def _when(record: logging.LogRecord) -> str:
    # UTC, because lines of several hosts are read together.
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if len(text) > _MESSAGE_CHARS:
        text = f"{text[:_MESSAGE_CHARS]}... ({len(text) - _MESSAGE_CHARS:,} characters omitted)"
    return redact(text)


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info and record.exc_info[0]:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    # Keep the end, which contains the exception.
    return redact("\n".join(parts)[-_TRACE_CHARS:])
