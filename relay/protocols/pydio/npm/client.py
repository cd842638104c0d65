"""The Socket.IO connection of one npm client: authentication, namespace and closing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from relay.core.errors import ClientError, RelayError, Unauthorized, Unavailable
from relay.doorkit.recoverable_sessions import SavedSession, new_pid
from relay.protocols.pydio.npm.browser import NpmBrowser, channels_of
from relay.transports.socketio.connection import Acknowledge, SocketIoConnection

if TYPE_CHECKING:
    from relay.core.model import Channel, Position
    from relay.doorkit.contract import DoorContext
    from relay.doorkit.engineio_clients import EngineIoClients
    from relay.doorkit.recoverable_sessions import RecoverableSessions
    from relay.hub.session import Session
    from relay.protocols.pydio.accounts import Account, Accounts
    from relay.protocols.pydio.credentials import CredentialsReader
    from relay.protocols.pydio.npm.encoders import Encoders, NpmEncoder
    from relay.protocols.pydio.registration import BrowserServices
    from relay.transports.engineio.engine import Engine
    from relay.transports.socket.exchange import HttpRequest

_CONNECT_S = 45.0
_GOODBYE_S = 1.0


class NpmClientServices(Protocol):
    """State and functions that the npm clients of this worker share."""

    context: DoorContext
    accounts: Accounts
    browser_services: BrowserServices
    namespace: str
    encoders: Encoders
    # Their state is the workspace that the client has registered for.
    sessions: RecoverableSessions[str | None]
    reader: Callable[[], CredentialsReader]
    clients: EngineIoClients[NpmClient]


class NpmClient:
    """The Socket.IO connection of one client."""

    def __init__(self, service: NpmClientServices, engine: Engine, request: HttpRequest) -> None:
        self.service = service
        self.engine = engine
        self.connection = SocketIoConnection(engine, self)
        self.pid = ""
        self.sid = ""
        self._request = request
        self._rejected = False
        self._browser: NpmBrowser | None = None
        engine.on_message = self.connection.on_message
        engine.on_closed = self.connection.on_closed
        self._timer: asyncio.TimerHandle | None = None
        self._expect_join()

    # ---- from the client --------------------------------------------------------------------

    def connecting(self, namespace: str, auth: Mapping[str, Any], query: str) -> None:
        """Ask Pydio for the user, then join. Nothing is sent to the client before that."""
        del query
        if namespace == self.service.namespace:
            # A client that was rejected cannot try again on the same connection: each attempt is a
            # request to Pydio.
            if not self._rejected:
                _ = self.service.context.spawn(self._join(dict(auth)), name="pydio join")
        else:
            self.connection.answer_other(namespace)

    def event(
        self, namespace: str, name: str, args: list[Any], acknowledge: Acknowledge | None
    ) -> None:
        """Handle `register` and `unregister`; ignore other events."""
        browser = self._browser
        if namespace != self.service.namespace or browser is None or not browser.is_open:
            return
        if not browser.within_rate():
            self.server_disconnect()
        elif name == "register":
            repository = args[0] if args else None
            if isinstance(repository, int) and not isinstance(repository, bool):
                repository = str(repository)
            if isinstance(repository, str):
                browser.request(repository, acknowledge)
            elif acknowledge is not None:
                acknowledge({"ok": False})
        elif name == "unregister":
            browser.request(None, acknowledge)

    def left(self, namespace: str) -> None:
        """End the session for good, because the client has left."""
        if namespace != self.service.namespace:
            return
        self._forget()
        self.end()
        if self.connection.is_idle:
            self.engine.close()
        else:
            self._expect_join()

    def closed(self) -> None:
        """End the session in the hub. The saved session can be resumed for a while."""
        self._stop_timer()
        self.end()
        self.service.clients.remove(self)

    # ---- joining ----------------------------------------------------------------------------

    async def _join(self, auth: dict[str, Any]) -> None:
        service = self.service
        try:
            request = self._request
            credentials = service.reader().read(request.headers, request.query, auth)
            async with service.accounts.connecting(credentials) as account:
                await self._join_as(account, auth)
        except RelayError as exc:
            self.end()
            self._reject(exc)

    async def _join_as(self, account: Account, auth: dict[str, Any]) -> None:
        service, connection = self.service, self.connection
        if self.engine.closing:
            raise Unavailable("the client has disconnected")
        user = account.identity.user
        kept = await service.sessions.find(auth, user) if connection.version == 4 else None
        browser = self._browser = NpmBrowser(account, service.browser_services, self)
        encoder = browser.encoder(account.identity.masked)
        session = await service.context.open(
            account.principal, encoder, browser, info=self.engine.info
        )
        if self._browser is not browser:
            session.end()
            raise Unavailable("the client has disconnected")
        browser.session = session
        account.members.add(browser)
        if not account.valid:
            raise Unauthorized("Pydio session expired")
        record: SavedSession[str | None] | None = None
        positions: dict[Channel, Position] = {}
        if kept is not None:
            record = kept[1]
            if record.state is not None and not account.may_read(record.state):
                record = None
            else:
                found = record.positions(auth, channels_of(record.state))
                positions, record = (found, record) if found is not None else ({}, None)
        if record is not None and kept is not None:
            service.sessions.take_over(kept[0], record)
            self.pid, self.sid = kept[0], record.sid
        else:
            self.sid = secrets.token_urlsafe(15)
        await browser.enter(record.state if record else None, positions)
        await self._begin(session, browser, record)

    async def _begin(
        self, session: Session, browser: NpmBrowser, record: SavedSession[str | None] | None
    ) -> None:
        service, connection = self.service, self.connection
        if record is None and connection.version == 4:
            self.pid = new_pid()
        if self.pid and not await service.sessions.save_first(self.pid, self._saved(browser)):
            self.pid = ""
        if self.engine.closing or session.closed or not connection.wants(service.namespace):
            raise Unavailable("the client has disconnected")
        self._stop_timer()
        self.engine.authorize()
        connection.out = session.reply
        connection.accept(service.namespace, self.sid, **({"pid": self.pid} if self.pid else {}))
        self.engine.on_full, self.engine.on_drained = session.pause, session.resume
        service.sessions.joined(self)
        session.attach(self.engine)
        if self.engine.full:
            session.pause()

    def _reject(self, error: RelayError) -> None:
        if self.engine.closing:
            return
        service, connection = self.service, self.connection
        if not isinstance(error, ClientError):
            # Temporary errors must not be sent as CONNECT_ERROR: a client would stop reconnecting.
            self.engine.close()
            return
        service.browser_services.count_rejection(error.code)
        service.context.turned_away(self.engine.info, "pydio", error.code, str(error))
        connection.refuse(service.namespace, str(error), {"code": error.code})
        connection.server_disconnect(service.namespace)
        self._close_soon()

    # ---- ending -----------------------------------------------------------------------------

    def server_disconnect(self) -> None:
        """Disconnect the client for good: it does not reconnect (`io server disconnect`)."""
        self._forget()
        browser = self._browser
        if browser is not None and browser.is_open:
            self.connection.leave(self.service.namespace)
        self.end()
        self._close_soon()

    def close_superseded(self) -> None:
        """Close the connection: its client has resumed the session on another one."""
        self.pid = ""
        self.end()
        self.engine.close()

    def saved_session(self) -> SavedSession[str | None] | None:
        """Return what another worker needs to resume this session, None if it has ended."""
        browser = self._browser
        return None if browser is None else self._saved(browser)

    def _saved(self, browser: NpmBrowser) -> SavedSession[str | None]:
        return SavedSession(
            sid=self.sid,
            user=browser.account.identity.user,
            worker=self.service.context.bus.address,
            state=browser.repository,
            start=browser.start(),
        )

    def encoder(self, masked: frozenset[str]) -> NpmEncoder:
        """Return the encoder for a user with path masks on these workspaces."""
        return self.service.encoders.get(self.connection.version, masked)

    def subscriptions_changed(self) -> None:
        """Save the session again, because its channels or positions have changed."""
        self.service.sessions.changed(self)

    def stop(self) -> None:
        """Close the connection, so that the client reconnects to another worker."""
        self.end()
        self.engine.close()

    def end(self) -> None:
        """Send what is pending and end the session in the hub."""
        browser, self._browser = self._browser, None
        if browser is None:
            return
        self.service.sessions.left(self)
        browser.close()
        session = browser.session
        if session is not None and not session.closed:
            session.write_out()
            session.end()
        # The session refers to the browser: without this, only the garbage collector frees them.
        browser.session = None
        self.connection.out = self.engine.write

    def _forget(self) -> None:
        pid, self.pid = self.pid, ""
        if pid:
            self.service.sessions.forget(pid)

    def _close_soon(self) -> None:
        # A 4.x client handles packets one turn after the end of its transport, and would miss a
        # packet that is followed by the end at once.
        self._rejected = True
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(_GOODBYE_S, self.engine.dismiss)

    def _expect_join(self) -> None:
        """Close the connection if the client does not join the namespace in time."""
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(_CONNECT_S, self.engine.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
