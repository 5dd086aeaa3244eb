"""
Where httpx and httpx2 are entered: one private method for every client, and the transports for what repeats below it.

``Client._send_single_request`` is the one place that every attempt of every client passes, whatever its transport,
mounts, redirects and authentication. Where the client's transport holds another one (a cache, a retry), nothing has
been sent there yet: each use of the innermost transport is an attempt, and an answer without one has no span. A
transport whose inner one we do not find is an attempt itself; if it sends by one of httpx's own, the first use of that
belongs to it, and each further one is an attempt of its own. Connection attempts inside ``HTTPTransport(retries=...)``
send nothing and stay inside one span.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import WeakSet

from otel_correlation import guard
from otel_correlation.clients._attempt import Call, ask_again, begin, forget_sends, remember
from otel_correlation.upstream.api import RUNTIME_CONTEXT as _RUNTIME_CONTEXT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextvars import Token
    from types import ModuleType

    from otel_correlation.clients._attempt import Attempt, ClientConfig

# What a user's exception passes through here is nothing that a test's report should show (pytest reads this name).
__tracebackhide__ = True

# On a client: what it was told, or OFF.
CONFIG: Final = "_otel_correlation_config"
OFF: Final[Any] = object()

# The attempt that runs here, for a transport that sends again; the call, where its transport has sent nothing yet;
# _BUSY inside one of httpx's own transports, and where there is no attempt on purpose.
_BUSY: Final[Any] = object()
_running: ContextVar[Any] = ContextVar("otel_correlation_attempt", default=None)

_SYNC_TRANSPORTS: Final = ("HTTPTransport", "MockTransport", "WSGITransport")
_ASYNC_TRANSPORTS: Final = ("AsyncHTTPTransport", "MockTransport", "ASGITransport")
# Transports of transports of transports; and the classes of others that we patch.
_MAX_DEPTH: Final = 8
_MAX_ADOPTED: Final = 64

# What a client's transport is: one of httpx's own, or treated as one; one that sends by another; one that sends itself.
_OWN: Final = 0
_AROUND: Final = 1
_FOREIGN: Final = 2


def is_running() -> bool:
    """
    Tell whether an attempt of ours is under way here.
    """
    return _running.get() is not None


def running() -> Attempt | None:
    """
    Return the attempt that no transport of httpx's own carries yet, or None.
    """
    found = _running.get()
    return None if found is _BUSY or type(found) is Call else found


def call_around() -> Call | None:
    """
    Return the call that has sent nothing here yet, or None.
    """
    found = _running.get()
    return found if type(found) is Call else None


def _is_sending(request: Any) -> bool:
    """
    Tell whether this very request is under way already: somebody patched between two patches of ours.
    """
    return getattr(_running.get(), "request", None) is request


class _Inside:
    """
    Make an attempt current, and whatever was before again.
    """

    __slots__ = ("_attached", "_set")

    def __init__(self, attempt: Attempt, state: Any) -> None:
        self._set: Token[Any] = _running.set(state)
        self._attached: Any = None if attempt.context is attempt.outer else _RUNTIME_CONTEXT.attach(attempt.context)

    def leave(self) -> None:
        try:
            if self._attached is not None:
                _RUNTIME_CONTEXT.detach(self._attached)
            _running.reset(self._set)
        except ValueError:
            # A coroutine that was abandoned and is closed by the event loop, in another context: nothing to restore.
            return


def call_hook(hook: Callable[..., object] | None, *arguments: object) -> None:
    if hook is not None:
        with guard.never_raise("client.hook"):
            hook(*arguments)


async def await_hook(hook: Callable[..., Any] | None, *arguments: object) -> None:
    if hook is not None:
        with guard.never_raise("client.hook"):
            await hook(*arguments)


def send(
    config: ClientConfig,
    call: Callable[[Any], Any],
    request: Any,
    stream: Any,
    state: Any,
    again: Attempt | Call | None = None,
    *,
    nested: bool = False,
) -> Any:
    """
    Send a request as an attempt of its own.

    Args:
        config: What the client was told.
        call: Sends the request.
        request: The request.
        stream: The class that wraps the response's body.
        state: What transports below see; the attempt itself if None.
        again: The attempt that this one repeats, or the call that it belongs to.
        nested: Whether it is sent by a transport that is none of httpx's.
    """
    attempt = begin(config, request, again, nested=nested)
    if attempt is None:
        token = _running.set(_BUSY)
        try:
            return call(request)
        finally:
            _reset(token)
    inside = _Inside(attempt, state or attempt)
    try:
        call_hook(config.on_request, attempt.span, request)
        response = call(request)
    except BaseException as error:
        attempt.fail(error)
        raise
    finally:
        inside.leave()
    _respond(attempt, response, stream)
    return response


def _respond(attempt: Attempt, response: Any, stream: Any) -> None:
    if attempt.observe(response):
        call_hook(attempt.config.on_response, attempt.span, attempt.request, response)
        attempt.release(response, stream)


async def send_async(
    config: ClientConfig,
    call: Callable[[Any], Any],
    request: Any,
    stream: Any,
    state: Any,
    again: Attempt | Call | None = None,
    *,
    nested: bool = False,
) -> Any:
    """
    Send a request as an attempt of its own; the arguments are those of ``send``.
    """
    attempt = begin(config, request, again, nested=nested)
    if attempt is None:
        token = _running.set(_BUSY)
        try:
            return await call(request)
        finally:
            _reset(token)
    inside = _Inside(attempt, state or attempt)
    try:
        await await_hook(config.on_async_request, attempt.span, request)
        response = await call(request)
    except BaseException as error:
        attempt.fail(error)
        raise
    finally:
        inside.leave()
    await _respond_async(attempt, response, stream)
    return response


async def _respond_async(attempt: Attempt, response: Any, stream: Any) -> None:
    if attempt.observe(response):
        if attempt.config.on_async_response is not None:
            await await_hook(attempt.config.on_async_response, attempt.span, attempt.request, response)
        attempt.release(response, stream)


def _sync_stream(base: type) -> type:
    """
    Return the class of bodies that end their attempt, for one of the two libraries.
    """

    class Body(base):  # type: ignore[misc]
        def __init__(self, inner: Any, attempt: Attempt) -> None:  # pyright: ignore[reportMissingSuperCall]
            self._inner = inner
            self._attempt = attempt

        def __iter__(self) -> Iterator[bytes]:
            try:
                yield from self._inner
            except GeneratorExit:
                # The reader went away; the response can still be closed.
                raise
            except BaseException as error:
                self._attempt.fail(error)
                raise
            self._attempt.end()

        def close(self) -> None:
            try:
                self._inner.close()
            except BaseException as error:
                self._attempt.fail(error)
                raise
            self._attempt.end()

        def __getattr__(self, name: str) -> Any:
            # httpx2 reads response.elapsed from here.
            return getattr(self.__dict__["_inner"], name)

        def __del__(self) -> None:
            attempt = self.__dict__.get("_attempt")
            if attempt is not None:
                attempt.drop()

    Body.base = base
    return Body


def _async_stream(base: type) -> type:
    class AsyncBody(base):  # type: ignore[misc]
        def __init__(self, inner: Any, attempt: Attempt) -> None:  # pyright: ignore[reportMissingSuperCall]
            self._inner = inner
            self._attempt = attempt

        async def __aiter__(self) -> AsyncIterator[bytes]:
            chunks = self._inner.__aiter__()
            try:
                async for chunk in chunks:
                    yield chunk
            except GeneratorExit:
                raise
            except BaseException as error:
                self._attempt.fail(error)
                raise
            finally:
                if isinstance(chunks, AsyncGenerator):
                    await chunks.aclose()
            self._attempt.end()

        async def aclose(self) -> None:
            try:
                await self._inner.aclose()
            except BaseException as error:
                self._attempt.fail(error)
                raise
            self._attempt.end()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["_inner"], name)

        def __del__(self) -> None:
            attempt = self.__dict__.get("_attempt")
            if attempt is not None:
                attempt.drop()

    AsyncBody.base = base
    return AsyncBody


@functools.lru_cache(maxsize=64)
def _is_test_client(kind: type) -> bool:
    """
    Tell whether a client is Starlette's for tests: it calls the application, and no service calls another by it.
    """
    return any(base.__name__ == "TestClient" and base.__module__ == "starlette.testclient" for base in kind.__mro__)


def _held(transport: Any, base: type) -> list[Any]:
    """
    Return the transports that this one holds, alone or in a list or a mapping.
    """
    values = [*getattr(transport, "__dict__", {}).values()]
    for kind in type(transport).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        values += [getattr(transport, name, None) for name in ((slots,) if isinstance(slots, str) else slots)]
    found: list[Any] = []
    for value in values:
        if isinstance(value, base):
            found.append(value)
        elif isinstance(value, dict | list | tuple):
            inside = value.values() if isinstance(value, dict) else value
            found += [each for each in inside if isinstance(each, base)]
    return found


@functools.lru_cache(maxsize=256)
def _calls(kind: type, name: str, own: tuple[type, ...]) -> bool | None:
    """
    Tell whether a subclass of one of httpx's transports calls its ``name``; None where it does not override it.
    """
    classes = kind.__mro__[: next(place for place, each in enumerate(kind.__mro__) if each in own)]
    if not any(name in each.__dict__ for each in classes):
        return None
    members = [inspect.unwrap(value) for each in classes for value in vars(each).values() if callable(value)]
    return any(_names(member.__code__, name) for member in members if isinstance(member, FunctionType))


def _names(code: CodeType, name: str) -> bool:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return name in code.co_names or any(_names(each, name) for each in inner)


class Library:
    """
    httpx or httpx2: what its clients were told, and what of it is patched.

    Attributes:
        everywhere: What holds for every client that was told nothing of its own; None switches them off.
        clients: The clients that were told something of their own.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.everywhere: ClientConfig | None = None
        self.clients: WeakSet[Any] = WeakSet()
        self.body = _sync_stream(module.SyncByteStream)
        self.async_body = _async_stream(module.AsyncByteStream)
        self._patched: list[tuple[type, str, Any, Any]] = []
        self._own = tuple(
            {getattr(module, name) for name in (*_SYNC_TRANSPORTS, *_ASYNC_TRANSPORTS) if hasattr(module, name)}
        )
        self._own_set = frozenset(self._own)
        self._adopted: set[tuple[type, str]] = set()
        # Reentrant: what a signal handler or a finalizer closes may settle, too.
        self._lock = threading.RLock()

    def settle(self) -> None:
        """
        Patch what is needed, or nothing where nobody is instrumented; idempotent.
        """
        wanted = self.everywhere is not None or bool(self.clients)
        with self._lock:
            if wanted and not self._patched:
                self._patch()
            elif not wanted and self._patched:
                self._restore()

    def _patch(self) -> None:
        module = self.module
        seams: list[tuple[type | None, str, Callable[[Any], Any]]] = [
            (module.Client, "_send_single_request", self._single),
            (module.AsyncClient, "_send_single_request", self._single_async),
            (module.Client, "send", self._send),
            (module.AsyncClient, "send", self._send_async),
            *((getattr(module, name, None), "handle_request", self._transport) for name in _SYNC_TRANSPORTS),
            *(
                (getattr(module, name, None), "handle_async_request", self._transport_async)
                for name in _ASYNC_TRANSPORTS
            ),
        ]
        # One class behind both clients; httpx copies our headers to the next hop there.
        redirecting = next(
            (kind for kind in module.Client.__mro__ if "_build_redirect_request" in kind.__dict__), module.Client
        )
        seams.append((redirecting, "_build_redirect_request", self._redirect))
        for owner, name, wrapper in seams:
            original = None if owner is None else getattr(owner, name, None)
            if owner is None or original is None:
                guard.logger.warning(
                    "%s %s has no %s; some of its requests go without a span", module.__name__, owner, name
                )
                continue
            self._replace(owner, name, functools.wraps(original)(wrapper(original)))

    def _replace(self, owner: type, name: str, replacement: Any) -> None:
        own = owner.__dict__.get(name)
        setattr(owner, name, replacement)
        self._patched.append((owner, name, own, replacement))

    def _restore(self) -> None:
        for owner, name, own, replacement in reversed(self._patched):
            # Somebody who patched after us keeps what they did; ours is inert below.
            if owner.__dict__.get(name) is not replacement:
                continue
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._patched.clear()
        self._adopted.clear()

    def _way(self, client: Any, request: Any, base: str, name: str) -> int:
        """
        Tell what the transport is that a client sends a request by.
        """
        try:
            own = self._own_set
            if type(client._transport) in own:
                for mounted in client._mounts.values():
                    if mounted is not None and type(mounted) not in own:
                        break
                else:
                    return _OWN
            transport = client._transport_for_url(request.url)
            return self._look_at(transport, getattr(self.module, base), name)
        except Exception:  # noqa: BLE001 - private names of httpx's, or a transport that is odd; its requests have a span
            guard.report("client.transport")
            return _OWN

    def _look_at(self, transport: Any, base: type, name: str, depth: int = _MAX_DEPTH) -> int:
        kind = type(transport)
        # Contrib's transport is asked for a span by whoever puts it around another one.
        if kind in self._own_set or kind.__module__.startswith("opentelemetry."):
            return _OWN
        calls = _calls(cast("Any", kind), name, self._own) if isinstance(transport, self._own) else False
        held = _held(transport, base) if depth else []
        if not held:
            return _OWN if calls is None else _AROUND if calls else _FOREIGN
        for each in held:
            if self._look_at(each, base, name, depth - 1) == _FOREIGN and not self._adopt(type(each), name):
                return _OWN
        return _AROUND

    def _adopt(self, kind: type, name: str) -> bool:
        """
        Patch the class of a transport that sends by itself, so that it is seen below others; tells whether it is.
        """
        with self._lock:
            if (kind, name) in self._adopted:
                return True
            if len(self._adopted) >= _MAX_ADOPTED:
                return False
            wrapper = self._transport if name == "handle_request" else self._transport_async
            original = getattr(kind, name)
            try:
                self._replace(kind, name, functools.wraps(original)(wrapper(original, nested=True)))
            except TypeError:  # a class that is not written in Python
                return False
            self._adopted.add((kind, name))
            return True

    def _config_of(self, client: Any) -> ClientConfig | None:
        found = client.__dict__.get(CONFIG)
        return self.everywhere if found is None else found

    def _single(self, original: Any) -> Any:
        def _send_single_request(client: Any, request: Any) -> Any:
            config = self._config_of(client)
            if config is None or _is_sending(request):
                return original(client, request)
            if config is OFF:
                token = _running.set(_BUSY)
                try:
                    return original(client, request)
                finally:
                    _reset(token)
            kind: Any = type(client)
            if _is_test_client(kind):
                config = config.without_spans()
            way = self._way(client, request, "BaseTransport", "handle_request")
            if way == _AROUND:
                token = _running.set(Call(config, request))
                try:
                    return original(client, request)
                finally:
                    _reset(token)
            call = functools.partial(original, client)
            return send(config, call, request, self.body, None, nested=way == _FOREIGN)

        return _send_single_request

    def _single_async(self, original: Any) -> Any:
        async def _send_single_request(client: Any, request: Any) -> Any:
            config = self._config_of(client)
            if config is None or _is_sending(request):
                return await original(client, request)
            if config is OFF:
                token = _running.set(_BUSY)
                try:
                    return await original(client, request)
                finally:
                    _reset(token)
            way = self._way(client, request, "AsyncBaseTransport", "handle_async_request")
            if way == _AROUND:
                token = _running.set(Call(config, request))
                try:
                    return await original(client, request)
                finally:
                    _reset(token)
            call = functools.partial(original, client)
            return await send_async(config, call, request, self.async_body, None, nested=way == _FOREIGN)

        return _send_single_request

    def _transport(self, original: Any, *, nested: bool = False) -> Any:
        def handle_request(transport: Any, request: Any) -> Any:
            attempt = _running.get()
            if attempt is _BUSY or (attempt is None and self.everywhere is None):
                return original(transport, request)
            if attempt is None or attempt.used:
                config: Any = self.everywhere if attempt is None else attempt.config
                call = functools.partial(original, transport)
                return send(config, call, request, self.body, _BUSY, attempt, nested=nested)
            attempt.used = True
            if attempt.checked is not None or (attempt.url is not None and attempt.url is not request.url):
                ask_again(attempt, request)
            token = _running.set(_BUSY)
            try:
                response = original(transport, request)
            except BaseException as error:
                attempt.fail(error)
                raise
            finally:
                _reset(token)
            _respond(attempt, response, self.body)
            return response

        return handle_request

    def _transport_async(self, original: Any, *, nested: bool = False) -> Any:
        async def handle_async_request(transport: Any, request: Any) -> Any:
            attempt = _running.get()
            if attempt is _BUSY or (attempt is None and self.everywhere is None):
                return await original(transport, request)
            if attempt is None or attempt.used:
                config: Any = self.everywhere if attempt is None else attempt.config
                call = functools.partial(original, transport)
                return await send_async(config, call, request, self.async_body, _BUSY, attempt, nested=nested)
            attempt.used = True
            if attempt.checked is not None or (attempt.url is not None and attempt.url is not request.url):
                ask_again(attempt, request)
            token = _running.set(_BUSY)
            try:
                response = await original(transport, request)
            except BaseException as error:
                attempt.fail(error)
                raise
            finally:
                _reset(token)
            await _respond_async(attempt, response, self.async_body)
            return response

        return handle_async_request

    @staticmethod
    def _send(original: Any) -> Any:
        def send(client: Any, request: Any, *arguments: Any, **options: Any) -> Any:
            forget_sends(request)
            return original(client, request, *arguments, **options)

        return send

    @staticmethod
    def _send_async(original: Any) -> Any:
        async def send(client: Any, request: Any, *arguments: Any, **options: Any) -> Any:
            forget_sends(request)
            return await original(client, request, *arguments, **options)

        return send

    @staticmethod
    def _redirect(original: Any) -> Any:
        def _build_redirect_request(client: Any, request: Any, response: Any) -> Any:
            new = original(client, request, response)
            with guard.never_raise("client.redirect"):
                remember(request, new)
            return new

        return _build_redirect_request


def _reset(token: Token[Any]) -> None:
    try:
        _running.reset(token)
    except ValueError:  # closed in another context, see _Inside
        return
