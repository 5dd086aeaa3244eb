"""
One WebSocket: its SERVER span ends with the handshake, so that nothing hangs open for hours.

A short span tells of the close; a switch gives each received message a trace of its own.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanKind
from starlette.websockets import WebSocketDisconnect

from otel_correlation import guard, identity, logs, semconv
from otel_correlation.clocks import perf_counter_ns
from otel_correlation.edge._entry import enter
from otel_correlation.edge._http import spanned_receive, spanned_send
from otel_correlation.edge._record import call_hook, finish, leave
from otel_correlation.edge._response import with_ids
from otel_correlation.identity import detach
from otel_correlation.outcome import show
from otel_correlation.upstream.api import SPAN_KEY as _SPAN_KEY

if TYPE_CHECKING:
    import contextvars

    from opentelemetry.trace import Span

    from otel_correlation.edge._record import ASGIApp, Message, Receive, Record, Scope, Send, ServerConfig

# See clients/_seams.py: a test's report shows the user's frames.
__tracebackhide__ = True

_DENIAL: Final = "websocket.http.response"
_NO_CODE: Final = 1005  # RFC 6455: a close frame without a code
_NO_CLOSE: Final = 1006  # RFC 6455: the connection ended without a close frame
# Starlette's test client makes an exception of a denial response that lacks the close code which tests look for.
_TEST_CLIENT: Final = "testclient"


async def serve_websocket(config: ServerConfig, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """
    Run the application for one WebSocket; what it raises passes through unchanged.
    """
    try:
        logs.settle()
        record, context = enter(config, scope, scope.get("method", "GET"))
    except Exception:  # noqa: BLE001 - our failure is not the application's
        scope.pop(semconv.SCOPE_KEY, None)
        guard.report("edge.enter")
        await app(scope, receive, send)
        return
    token = otel_context.attach(context)
    if config.server_request_hook is not None and record.span is not None:
        call_hook(record.span, config.server_request_hook, scope)
    socket = _Socket(record, scope, receive, send, context)
    inner_receive: Receive = socket.receive
    inner_send: Send = socket.send
    if config.receive_spans:
        inner_receive = spanned_receive(config, record, scope, inner_receive)
    if config.send_spans:
        inner_send = spanned_send(config, record, scope, inner_send)
    try:
        await app(scope, inner_receive, inner_send)
    except BaseException as error:
        record.error = error
        identity.stash(error)
        raise
    finally:
        try:
            socket.finish()
        except Exception:  # noqa: BLE001 - our failure is not the application's
            guard.report("edge.finish")
        leave(record, scope, token)


class _Socket:
    """
    The messages of one WebSocket, in both directions.
    """

    def __init__(self, record: Record, scope: Scope, receive: Receive, send: Send, context: Context) -> None:
        self._record = record
        self._scope = scope
        self._receive = receive
        self._send = send
        self._context = context
        self._per_message = record.config.settings.websocket == "message"
        self._accepted = False
        self._handshake_over = False
        self._close_code: int | None = None
        self._gone: OSError | None = None
        self._message_span: Span | None = None
        self._message_token: Any = None
        # Where the token belongs, if that is not the context of the task that receives.
        self._waiting: contextvars.Context | None = None

    async def receive(self) -> Message:
        """
        Receive; in message mode the last message's span ends here and the next one's starts.
        """
        self._end_message()
        message = await self._receive()
        kind = message["type"]
        if kind == "websocket.disconnect":
            if self._close_code is None:
                code = message.get("code")
                self._close_code = _NO_CODE if code is None else code
        elif kind == "websocket.receive" and self._per_message:
            try:
                self._start_message()
            except Exception:  # noqa: BLE001 - our failure is not the application's
                guard.report("edge.message")
        return message

    async def send(self, message: Message) -> None:
        """
        Send; accept and refusal carry the request id and end the handshake.
        """
        body: Message | None = None
        if message["type"] == "websocket.close" and self._close_code is None:
            self._close_code = message.get("code", 1000)
        if not self._handshake_over:
            try:
                message, body = self._answer(message)
            except Exception:  # noqa: BLE001 - our failure is not the application's
                guard.report("edge.websocket")
        try:
            await self._send(message)
        except OSError as error:  # ASGI: the client is gone
            self._gone = error
            raise
        if body is not None:
            await self._send(body)
            _complete(self._send)

    def _answer(self, message: Message) -> tuple[Message, Message | None]:
        """
        End the handshake, if this message does; return what goes to the server for it.
        """
        record = self._record
        kind = message["type"]
        if kind == "websocket.accept":
            self._accepted = True
            message = with_ids(record, message)
            self._end_handshake(101)
        elif kind == "websocket.http.response.start":
            message = with_ids(record, message)
            self._end_handshake(message["status"])
        elif kind == "websocket.close":
            client = self._scope.get("client") or ("",)
            if _DENIAL in (self._scope.get("extensions") or {}) and client[0] != _TEST_CLIENT:
                # As a plain close, the server would make a 403 that has no headers.
                message = with_ids(record, {"type": f"{_DENIAL}.start", "status": 403, "headers": []})
                self._end_handshake(403)
                return message, {"type": f"{_DENIAL}.body", "body": b"", "more_body": False}
            self._end_handshake(403)
        return message, None

    def _end_handshake(self, status: int) -> None:
        record = self._record
        self._handshake_over = True
        record.status = status
        record.finished_ns = perf_counter_ns()
        finish(record, self._scope)

    def _start_message(self) -> None:
        record = self._record
        tracer = record.config.tracer
        handshake = record.span
        if tracer is None or handshake is None:
            return
        base = Context({key: value for key, value in self._context.items() if key != _SPAN_KEY})
        span = tracer.start(
            f"{record.span_name()} message",
            SpanKind.SERVER,
            base,
            {},
            links=[Link(handshake.get_span_context())] if handshake.get_span_context().is_valid else (),
        )
        self._message_span = span
        # The handler's own task awaits us, so what is attached here is current in it until its next receive().
        context = Context({**base, _SPAN_KEY: span})
        self._message_token = otel_context.attach(context)
        self._waiting = _waiting() if _WAITS_ASIDE else None
        if self._waiting is not None:
            self._message_token = self._waiting.run(otel_context.attach, context)

    def _end_message(self) -> None:
        if self._message_span is not None:
            self._message_span.end()
            self._message_span = None
            waiting, self._waiting = self._waiting, None
            if waiting is not None:
                try:
                    waiting.run(detach, self._message_token)
                    return
                except RuntimeError:  # it is the one that runs now
                    pass
            detach(self._message_token)

    def _is_own_end(self, error: BaseException) -> bool:
        """
        Tell whether an error says that this connection ended; the end of another that the handler sent to is a failure.
        """
        if isinstance(error, BaseExceptionGroup):
            return all(self._is_own_end(member) for member in error.exceptions)
        if not isinstance(error, WebSocketDisconnect):
            return False
        # Starlette raises it for what a send raised, or for the message that a receive got.
        sent = error.__context__
        return sent is self._gone if isinstance(sent, OSError) else self._close_code is not None

    def finish(self) -> None:
        """
        End what is open, and tell how the connection ended.
        """
        record = self._record
        error = record.error
        if error is not None and self._is_own_end(error):
            # The handler let the end of the connection pass through: that is how it ended, and no failure.
            error = record.error = None
        message_span = self._message_span
        if message_span is not None:
            show(message_span, error)
        self._end_message()
        if not self._handshake_over:
            record.disconnected = record.unsent = error is None and self._close_code is not None
            # Servers answer 500 for an application that neither accepts nor refuses.
            self._end_handshake(0 if record.disconnected else 500)
            return
        tracer = record.config.tracer
        if not self._accepted or tracer is None or record.span is None:
            return
        closing = tracer.start(
            f"{record.span_name()} close",
            SpanKind.INTERNAL,
            self._context,
            {
                semconv.WEBSOCKET_CLOSE_CODE: _NO_CLOSE if self._close_code is None else self._close_code,
                semconv.WEBSOCKET_DURATION: (perf_counter_ns() - record.finished_ns) / 1e9,
            },
        )
        if message_span is None:
            show(closing, error)
        closing.end()


# Before Python 3.12, asyncio.wait_for() runs what it waits for in a task, and so in a context, of its own.
_WAITS_ASIDE: Final = sys.version_info < (3, 12)


def _waiting() -> contextvars.Context | None:
    """
    Return the context of the code that waits for this task in ``asyncio.wait_for``, or None if none does.

    It is found in what wait_for leaves on the task: a callback that wakes a future of its own, which nobody but its
    caller awaits.
    """
    try:
        task: Any = asyncio.current_task()
    except RuntimeError:  # another kind of event loop
        return None
    for callback, _ in getattr(task, "_callbacks", None) or ():
        if isinstance(callback, functools.partial) and callback.func is getattr(asyncio.tasks, "_release_waiter", None):
            for _, context in getattr(callback.args[0], "_callbacks", None) or ():
                found: contextvars.Context = context
                return found
    return None


def _complete(send: Send) -> None:
    """
    Mark the handshake over in uvicorn's websockets-sansio, which forgets it after a denial response.

    It would report an ERROR, "ASGI callable returned without completing handshake.", for each refusal.

    See: uvicorn's pull request 3138.
    """
    protocol: Any = getattr(send, "__self__", None)
    if getattr(protocol, "handshake_complete", None) is False and getattr(protocol, "close_sent", None) is True:
        protocol.handshake_complete = True
