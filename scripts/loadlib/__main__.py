"""Benchmarks of relay and of the servers it is compared with. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol

import uvloop

from scripts.loadlib.fanout import Fanout
from scripts.loadlib.followed import Followed
from scripts.loadlib.idle import Idle
from scripts.loadlib.pings import Pings
from scripts.loadlib.plan import Limits, Traffic
from scripts.loadlib.plan_check import PlanCheck
from scripts.loadlib.processes import LoadError
from scripts.loadlib.produce import Produce
from scripts.loadlib.report import finish
from scripts.loadlib.servers import ROOT, Cores, RelayOptions
from scripts.loadlib.slow import Slow
from scripts.loadlib.storm import Storm


class _Measurement(Protocol):
    async def run(self, folder: Path) -> list[dict[str, Any]]: ...


def _numbers(text: str) -> list[int]:
    return [int(part.replace("_", "")) for part in text.split(",")]


def _names(*allowed: str) -> Any:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(allowed):
            raise argparse.ArgumentTypeError(
                f"expected one or more of {', '.join(allowed)}, separated by commas"
            )
        return found

    return names


def _traffic(text: str) -> Traffic:
    events, _, followers = text.partition(":")
    return Traffic(name=text, events_per_s=float(events), followers=float(followers))


def _arguments() -> argparse.Namespace:
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--bench-dir", type=Path, default=ROOT.parent / "shared" / "bench",
                       help="folder that contains wsink.c and sendloop.c")  # fmt: skip
    every.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                       help="set a setting of relay; can be repeated")  # fmt: skip
    every.add_argument("--workers", type=int, default=1,
                       help="number of relay's workers, all on the server's core")  # fmt: skip
    every.add_argument("--relay-command", default="",
                       help="command to run instead of `python -m relay serve`")  # fmt: skip
    every.add_argument(
        "--out", default="", help="write the JSON to this file (default: standard output)"
    )
    parser = argparse.ArgumentParser(prog="scripts/load", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("fanout", parents=[every], help="CPU per delivery and latency")
    one.add_argument("--rate", type=_numbers, default=[20_000, 50_000], dest="rates",
                     help="deliveries per second; separate several with commas")  # fmt: skip
    one.add_argument("--clients", type=int, default=1000)
    allowed = _names("relay", "centrifugo", "socketio", "socket.io", "nchan", "c")
    one.add_argument("--server", type=allowed, dest="servers", default=["relay", "nchan", "c"],
                     help="servers, separated by commas; socketio is relay's Socket.IO protocol, "
                     "socket.io is the server from npm")  # fmt: skip
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--seconds", type=float, default=20)

    one = commands.add_parser("idle", parents=[every], help="memory per idle client")
    one.add_argument("--clients", type=int, default=5000)
    one.add_argument("--server", type=_names("relay", "nchan"), dest="servers",
                     default=["relay", "nchan"])  # fmt: skip
    one.add_argument("--own-channels", action="store_true", help="use one channel per two clients")

    one = commands.add_parser(
        "followed", parents=[every], help="CPU and latency with many workspaces"
    )
    one.add_argument("--workspaces", type=_numbers, default=[100, 20_000])
    one.add_argument("--rate", type=int, default=2000, help="events per second")
    one.add_argument("--seconds", type=float, default=20)
    one.add_argument("--idle-seconds", type=float, default=30)
    one.add_argument("--channels-per-connection", type=int, default=1000)

    one = commands.add_parser(
        "slow", parents=[every], help="effects of a client that stops reading"
    )
    one.add_argument(
        "--megabytes", type=int, default=200, help="data published while the client does not read"
    )
    one.add_argument("--seconds", type=float, default=30)
    one.add_argument("--entry-bytes", type=int, default=10_000)
    one.add_argument(
        "--others", type=int, default=20, help="number of reading clients on each of two channels"
    )
    one.add_argument("--rounds", type=int, default=2)

    one = commands.add_parser(
        "pings", parents=[every], help="CPU and memory of clients that ping each second"
    )
    one.add_argument("--clients", type=int, default=5000)
    one.add_argument("--seconds", type=float, default=20)
    one.add_argument("--rounds", type=int, default=3)

    one = commands.add_parser(
        "plan", parents=[every],
        help="compute hosts, memory and Redis servers, and compare the costs with measurements",
    )  # fmt: skip
    one.add_argument("--clients", type=_numbers, default=[10_000, 100_000, 1_000_000, 10_000_000],
                     help="separate several numbers with commas")  # fmt: skip
    one.add_argument("--traffic", type=_traffic, action="append", default=[],
                     metavar="EVENTS_PER_S:FOLLOWERS",
                     help="events per second on channels with so many followers each; can be "
                     "repeated (default: the traffic of docs/scaling.md)")  # fmt: skip
    one.add_argument("--payload", type=int, default=150, help="bytes of an event")
    one.add_argument("--workers-per-host", type=int, default=8)
    one.add_argument("--no-check", action="store_true", help="only compute")
    one.add_argument("--factor", type=float, default=3,
                     help="exit with 1 if a measurement differs by more than this")  # fmt: skip
    one.add_argument("--seconds", type=float, default=10, help="duration of a measurement")

    one = commands.add_parser(
        "storm", parents=[every], help="all clients return at once and have missed events"
    )
    one.add_argument("--clients", type=int, default=10_000)
    one.add_argument("--channels", type=int, default=50)
    one.add_argument("--missed", type=int, default=5, help="events that each client has missed")
    one.add_argument("--rounds", type=int, default=1)

    one = commands.add_parser(
        "produce", parents=[every], help="cost of publishing by queue and HTTP API"
    )
    one.add_argument(
        "--commands",
        type=int,
        default=100_000,
        help="commands per method; a quarter of them for single HTTP requests",
    )
    one.add_argument(
        "--connections", type=int, default=32, help="number of parallel HTTP connections"
    )
    one.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def _measurement(options: argparse.Namespace, cores: Cores) -> _Measurement:
    shared: dict[str, Any] = {
        "cores": cores,
        "bench": options.bench_dir.resolve(),
        "relay": RelayOptions(
            command=options.relay_command,
            settings=[*options.set, f"node.workers={options.workers}"],
        ),
    }
    match options.command:
        case "fanout":
            return Fanout(
                rates=options.rates, clients=options.clients, servers=options.servers,
                rounds=options.rounds, seconds=options.seconds, **shared,
            )  # fmt: skip
        case "idle":
            return Idle(
                clients=options.clients, servers=options.servers,
                own_channels=options.own_channels, **shared,
            )  # fmt: skip
        case "followed":
            return Followed(
                workspaces=options.workspaces, rate=options.rate, seconds=options.seconds,
                idle_seconds=options.idle_seconds,
                per_connection=options.channels_per_connection, **shared,
            )  # fmt: skip
        case "pings":
            shared.pop("bench")
            return Pings(
                clients=options.clients, seconds=options.seconds, rounds=options.rounds, **shared
            )
        case "plan":
            shared.pop("bench")
            return PlanCheck(
                clients=options.clients, traffic=options.traffic, payload_bytes=options.payload,
                limits=Limits(workers_per_host=options.workers_per_host),
                check=not options.no_check, factor=options.factor, seconds=options.seconds,
                **shared,
            )  # fmt: skip
        case "storm":
            shared.pop("bench")
            return Storm(
                clients=options.clients, channels=options.channels, missed=options.missed,
                rounds=options.rounds, **shared,
            )  # fmt: skip
        case "produce":
            return Produce(
                commands=options.commands, connections=options.connections,
                rounds=options.rounds, **shared,
            )  # fmt: skip
        case _:
            return Slow(
                megabytes=options.megabytes, seconds=options.seconds, others=options.others,
                entry_bytes=options.entry_bytes, rounds=options.rounds, **shared,
            )  # fmt: skip


async def _stoppable(
    measuring: Coroutine[Any, Any, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    # On SIGTERM, cancel the benchmark, so that it stops the servers that it has started.
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await measuring


def main() -> int:
    """Run one benchmark and return the exit code.

    The code is 1, with an error message, if the benchmark cannot run, and 130 if interrupted.
    """
    options = _arguments()
    try:
        cores = Cores.of_this_machine()
        measurement = _measurement(options, cores)
        # The publisher and the Python clients run in this process.
        os.sched_setaffinity(0, {cores.clients})
        with tempfile.TemporaryDirectory(prefix="relay-load-") as folder:
            rows = uvloop.run(_stoppable(measurement.run(Path(folder))))
    except LoadError as exc:
        sys.stderr.write(f"scripts/load: {exc}\n")
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 130
    hidden = {"command", "bench_dir", "out", "relay_command"}
    shown = {
        name: str(value) if name == "traffic" else value
        for name, value in vars(options).items()
        if name not in hidden
    }
    finish(options.command, shown, rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
