"""Check the host: open files, accept queue, clock, certificates."""

from __future__ import annotations

import ctypes
import datetime
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from relay.process.doctor.finding import Finding, error, note, warning

if TYPE_CHECKING:
    from relay.config.loading import Config

# One descriptor for each client.
_FILES = 65536
# The kernel's default since Linux 5.4.
_BACKLOG = 4096
_SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
_EXPIRES_SOON = datetime.timedelta(days=14)
# <sys/timex.h>
_TIME_ERROR, _TIMEX_BYTES = 5, 512


def check(config: Config) -> list[Finding]:
    """Return what is wrong with this host."""
    return [*of_limits(), *_clock(), *of_certificates(config)]


def of_limits() -> Iterator[Finding]:
    """Yield the limits of this process that are too low for many clients."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _FILES:
        yield warning(
            "host.open_files",
            f"A process of this user may open {hard} files",
            f"Each worker serves at most about {max(hard - 100, 0)} clients; further connections"
            " are closed at once.",
            f"systemd: LimitNOFILE={_FILES} in the unit's [Service]; else: ulimit -Hn {_FILES}",
        )
    waiting = _number(_SOMAXCONN)
    if waiting is not None and waiting < _BACKLOG // 4:
        name = "net.core.somaxconn"
        yield warning(
            "host.backlog",
            f"The kernel keeps at most {waiting} connections that wait to be accepted ({name})",
            "When many clients reconnect at once, the kernel drops some of their connections,"
            " and they try again only after seconds.",
            f"sysctl -w {name}={_BACKLOG}; to keep it: echo {name}={_BACKLOG} >"
            " /etc/sysctl.d/relay.conf",
        )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _clock() -> Iterator[Finding]:
    """Ask the kernel whether its clock is synchronized (adjtimex). Containers see their host's."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return
    if state == _TIME_ERROR:
        yield note(
            "host.clock",
            "The clock of this host is not synchronized",
            "A clock that drifts accepts expired tokens or rejects valid ones.",
            "timedatectl set-ntp true; check with: timedatectl",
        )


def of_certificates(config: Config) -> Iterator[Finding]:
    """Yield each certificate that has expired or soon will."""
    sections = {
        "server": config.server,
        "redis": config.redis,
        "console": config.console,
        **config.doors,
    }
    seen: set[str] = set()
    for name, section in sections.items():
        path = str(getattr(section, "tls_cert", ""))
        if not path or path in seen:
            continue
        seen.add(path)
        yield from _certificate(f"[{name}] tls_cert", Path(path))


def _certificate(setting: str, path: Path) -> Iterator[Finding]:
    try:
        certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError):
        # `serve` rejects this file; that is another finding.
        return
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    fix = f"Renew {path} (for example: certbot renew), then restart relay"
    if left.total_seconds() <= 0:
        yield error(
            "host.certificate",
            f"The certificate in {path} ({setting}) expired on"
            f" {certificate.not_valid_after_utc:%Y-%m-%d}",
            "Clients refuse to connect.",
            fix,
        )
    elif left < _EXPIRES_SOON:
        yield warning(
            "host.certificate",
            f"The certificate in {path} ({setting}) expires in {max(left.days, 0)} days",
            "From then on, clients refuse to connect. relay reads a new certificate only at its"
            " start.",
            fix,
        )
