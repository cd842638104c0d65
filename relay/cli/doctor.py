"""`relay doctor`: print what is wrong with Redis, host, data, configuration and proxies."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

from relay.cli.configured import configuration
from relay.cli.local_key import with_local_key
from relay.cli.operator_context import operator_context
from relay.cli.output import emit, safe
from relay.core.errors import ConfigError
from relay.process.doctor.examination import examine, in_order, not_served
from relay.process.doctor.finding import Level

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.process.doctor.finding import Finding


def doctor(options: argparse.Namespace) -> int:
    """Print all findings. Return 1 if one of them is an error."""
    try:
        config = configuration(options, complete=True)
    except ConfigError as exc:
        found = [not_served(exc)]
    else:
        found = asyncio.run(_examine(config, options.url))
    for each in found:
        if options.json:
            emit(dict(each.values()))
        else:
            _show(each)
    if not options.json:
        counts = {level: sum(each.level is level for each in found) for level in Level}
        print(", ".join(f"{count} {level.value}s" for level, count in counts.items()))
    sys.stdout.flush()
    return 1 if any(each.level is Level.ERROR for each in found) else 0


async def _examine(config: Config, url: str | None) -> list[Finding]:
    async with operator_context(config) as site:
        found = await examine(config, site.clients, site.keys)
    if url:
        from relay.process.doctor import proxy_checks

        found += await proxy_checks.check(with_local_key(config), url)
    return in_order(found)


def _show(finding: Finding) -> None:
    print(f"{finding.level.value.upper()} {finding.name}: {safe(finding.what)}")
    print(f"  why: {safe(finding.why)}")
    first, *rest = finding.fix.splitlines()
    print(f"  fix: {safe(first)}")
    for line in rest:
        print(f"       {safe(line)}")
    print()
