"""BYTES -> HTTP. uvicorn's HTTP/1.1 connection, which waits for nobody and refuses in our form."""

from asyncio import BaseTransport, TimerHandle

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from xverse.server.refusals import Refusal

HEAD_S = 30.0  # to send a request's headers; who is slower holds a connection for nothing


class Connection(H11Protocol):
    """One connection. What is no HTTP is answered with 400, headers that never end with 408."""

    _late: TimerHandle | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        """A client is there, and has to say something."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Bytes came: of headers, of a body, or of what is neither."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        self._forgive()

    def on_response_complete(self) -> None:
        """One answer is out; the next request may have come with the last."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Called where what came is no HTTP."""
        self._refuse(Refusal(400, msg, code="invalid_http"))

    def _watch(self) -> None:
        """Give headers that have begun, or are still to begin, so long and no longer."""
        waits = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if not waits:
            self._forgive()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_S, self._too_late)

    def _forgive(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        why = f"The headers did not arrive within {HEAD_S:g} s."
        self._refuse(Refusal(408, why, code="request_timeout"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer, if an answer can still be given, and hang up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = refusal.response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            head = h11.Response(
                status_code=refusal.status,
                headers=headers,
                reason=STATUS_PHRASES[refusal.status],
            )
            events = (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage())
            for event in events:
                self.transport.write(self.conn.send(event))
        if self.cycle is not None:  # whoever is at work on it has nobody to answer any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
