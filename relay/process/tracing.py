"""Traces with OpenTelemetry: from a request or queue command through XADD to the first delivery.

The packages are those of the extra `relay[otel]`, and are imported only if `[tracing] otlp_url` is
set. The SDK's own environment variables apply, such as OTEL_TRACES_SAMPLER and
OTEL_EXPORTER_OTLP_HEADERS. Spans are exported by a thread of the SDK; if the collector is slow or
away, the SDK drops spans and relay is not affected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from aiohttp import web

from relay import __version__
from relay.core.errors import StartError
from relay.core.model import Event
from relay.core.tracing import FIELD, connection_id, is_valid
from relay.hub.session import SubscriptionMode
from relay.transports.socket.take_over import connection_of

if TYPE_CHECKING:
    from relay.config.settings import TracingSettings
    from relay.core.model import Channel, Record
    from relay.hub.feed import Feed

# A span takes about 50 us. Deliveries of all streams in one turn must not hold the loop for long.
_SPANS_OF_TURN = 50
_FLUSH_MS = 2000
# Clients that are searched for the only one that is live.
_SEARCHED = 100
_CONNECTION, _STATUS = "relay.connection_id", "http.response.status_code"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def tracing(settings: TracingSettings, node: str, *, check_only: bool) -> Tracing | None:
    """Return the tracing, or None if it is disabled. StartError if its packages are missing.

    `check_only`: start no thread, and return None.
    """
    if not settings.otlp_url:
        return None
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401

        return None if check_only else Tracing(settings.otlp_url, node)
    except ImportError as exc:
        raise StartError(
            f"[tracing] otlp_url needs the package {exc.name}; install them with:"
            " pip install 'relay[otel]'"
        ) from exc


class _Span:
    """One append."""

    def __init__(self, span: Any, problem: Any) -> None:
        context = span.get_span_context()
        ids = f"{context.trace_id:032x}-{context.span_id:016x}"
        self.traceparent = f"00-{ids}-{context.trace_flags:02x}".encode()
        self._span = span
        self._problem = problem

    def end(self, entry_id: str, problem: str = "") -> None:
        """See `relay.core.tracing.AppendSpan`."""
        if entry_id:
            self._span.set_attribute("messaging.message.id", entry_id)
        if problem:
            self._span.set_status(self._problem(problem))
        self._span.end()


class Tracing:
    """Creates the spans of one worker and exports them."""

    def __init__(self, url: str, node: str) -> None:
        """Start the SDK and its thread."""
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        attributes = {
            "service.name": "relay",
            "service.version": __version__,
            "service.instance.id": node,
        }
        # The SDK's own exit handler would wait for a collector that is away.
        self._provider = TracerProvider(
            resource=Resource.create(attributes), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("relay", __version__)
        self._context_of = TraceContextTextMapPropagator().extract
        self._trace = trace
        self._left = _SPANS_OF_TURN

    async def close(self) -> None:
        """Export the last spans, for at most two seconds."""
        await asyncio.to_thread(self._provider.force_flush, _FLUSH_MS)

    @property
    def middleware(self) -> Any:
        """The aiohttp middleware that begins a span for each POST of a producer."""

        @web.middleware
        async def traced(request: web.Request, handler: Handler) -> web.StreamResponse:
            # Clients connect with GET, and their connections last for hours.
            if request.method != "POST":
                return await handler(request)
            resource = request.match_info.route.resource
            if resource is None:
                # Scanners of the internet request any path.
                return await handler(request)
            with self._tracer.start_as_current_span(
                f"POST {resource.canonical}",
                context=self._context_of({"traceparent": request.headers.get("traceparent", "")}),
                kind=self._trace.SpanKind.SERVER,
                attributes={_CONNECTION: connection_of(request).id},
                record_exception=False,
                set_status_on_exception=False,
            ) as span:
                try:
                    response = await handler(request)
                except web.HTTPException as exc:
                    # An answer, not a fault: its traceback would cost more than the request.
                    span.set_attribute(_STATUS, exc.status)
                    raise
                except Exception as exc:
                    span.record_exception(exc)
                    span.set_status(self._trace.Status(self._trace.StatusCode.ERROR))
                    raise
                span.set_attribute(_STATUS, response.status)
                return response

        return traced

    def append(
        self, channel: Channel, parent: bytes | None = None, *, source: str = "publish"
    ) -> _Span:
        """See `relay.core.tracing.AppendTracer`."""
        span = self._tracer.start_span(
            "XADD",
            context=None if parent is None else self._parent(parent),
            kind=self._trace.SpanKind.PRODUCER,
            attributes={
                "messaging.system": "redis",
                "messaging.destination.name": channel,
                "relay.source": source,
            },
        )
        if connection := connection_id():
            span.set_attribute(_CONNECTION, connection)
        failed = self._trace.StatusCode.ERROR
        return _Span(span, lambda text: self._trace.Status(failed, text))

    def read(self, feed: Feed, records: Sequence[Record], offered: int) -> None:
        """Create a span for each entry with a traceparent that was offered to live clients."""
        if not offered:
            return
        of_all = {
            "messaging.system": "redis",
            "messaging.destination.name": feed.channel,
            "relay.deliveries_of_batch": offered,
        }
        if feed.live_count == 1 and (connection := _only_client(feed)):
            of_all[_CONNECTION] = connection
        for record in records:
            body = record.body
            if not isinstance(body, Event) or not body.extra:
                continue
            parent = body.extra.get(FIELD)
            if parent is None or not is_valid(parent):
                continue
            if not self._has_room():
                return
            self._tracer.start_span(
                "deliver",
                context=self._parent(parent),
                kind=self._trace.SpanKind.CONSUMER,
                attributes={**of_all, "messaging.message.id": str(record.id)},
            ).end()

    def _has_room(self) -> bool:
        """Count a span of a delivery. Return False if this turn of the loop has enough."""
        if self._left == _SPANS_OF_TURN:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._left -= 1
        return self._left >= 0

    def _next_turn(self) -> None:
        self._left = _SPANS_OF_TURN

    def _parent(self, traceparent: bytes) -> Any:
        return self._context_of({"traceparent": traceparent.decode("ascii", "replace")})


def _only_client(feed: Feed) -> str:
    """Return the connection ID of the only live client, or '' if it is not found at once."""
    for each in islice(feed.subscriptions(), _SEARCHED):
        if each.mode is SubscriptionMode.LIVE:
            info = each.session.info
            return "" if info is None else info.id
    return ""
