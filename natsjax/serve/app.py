"""The pages of the server: OpenAI's completions and models, health, and metrics."""

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from natsjax.data import Tokenizer
from natsjax.decode.rows import RowRequest
from natsjax.errors import UserError
from natsjax.runs.load import LoadedRun
from natsjax.serve.completion import Choice, Piece
from natsjax.serve.engine import Engine, QueueFullError, StoppingError
from natsjax.serve.errors import ApiError
from natsjax.serve.metrics import Metrics
from natsjax.serve.request import CompletionRequest, parse_request

_BODY_SECONDS = 30.0
"""Time in which the body of a request must come."""

_CUT_SECONDS = 1.0
"""Time in which a client must take the error that ends its answer when the server is cut off."""

_RETRY_AFTER = "1"
"""Seconds after which a client that got 429 may ask again."""

STOPPING = "the server is being stopped; ask again when it is back, or another one."


class Service:
    """State that all pages share.

    Args:
      run: that is served.
      engine: that generates.
      metrics: of the server.
      model_name: by which clients ask for the run.
      api_key: that they must give; None: none.
      max_body: bytes of a request, at most.

    Attributes:
      is_cut: set when answers that are still under way must end at once.
    """

    def __init__(
        self, run: LoadedRun, engine: Engine, metrics: Metrics, model_name: str, api_key: str | None, max_body: int
    ):
        self.engine, self.metrics, self.model_name, self.max_body = engine, metrics, model_name, max_body
        self.is_cut = asyncio.Event()
        self._vocabulary = run.tokenizer
        self._key = None if api_key is None else api_key.encode()
        self._created = int(time.time())
        named = [
            run.data.fingerprint,
            run.step,
            engine.rows.decoder.policy.method,
            *sorted(run.config.to_dict().items()),
        ]
        self._fingerprint = f"natsjax_{hashlib.sha256(repr(named).encode()).hexdigest()[:10]}"

    def app(self) -> ASGIApp:
        """Makes the application."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.prometheus),
        ]
        handlers: dict[Any, Callable] = {
            ApiError: _as_response,
            HTTPException: _of_starlette,
            Exception: _unexpected,  # which Starlette raises again behind the answer: uvicorn logs it
        }
        return _Counted(Starlette(routes=routes, exception_handlers=handlers), self.metrics)

    # --- pages ---

    async def health(self, request: Request) -> Response:
        """Answers 200 while requests are taken, else 503."""
        is_well = self.engine.is_alive
        return JSONResponse({"status": "ok" if is_well else "stopping"}, 200 if is_well else 503)

    async def prometheus(self, request: Request) -> Response:
        """Answers the metrics in Prometheus's text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """Lists the one model."""
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describes the model."""
        self._authorize(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        """Generates texts."""
        self._authorize(request)
        asked = parse_request(await self._body(request))
        if asked.model is not None:
            self._check_model(asked.model)
        if len(asked.prompts) * asked.n > self.engine.most_jobs:
            raise ApiError(
                400,
                f"prompts * n = {len(asked.prompts) * asked.n}: this server has room for {self.engine.most_jobs} at a "
                "time; divide them.",
                param="n",
            )
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        choices = await asyncio.to_thread(self._choices, asked, _sender(pieces))
        prompt_tokens = sum(len(choice.request.prompt) for choice in choices[:: asked.n])
        answer = _Answer(self, asked, choices, pieces, prompt_tokens)
        try:
            self.engine.submit(choices)
        except QueueFullError as error:
            message = f"all rows and {self.engine.max_queue} places of the queue are taken; ask again in a while."
            raise ApiError(429, message, code="queue_full", headers={"retry-after": _RETRY_AFTER}) from error
        except StoppingError as error:
            raise ApiError(503, STOPPING) from error
        return answer

    # --- their parts ---

    def _authorize(self, request: Request) -> None:
        if self._key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            message = "the key is missing or wrong; give it as in Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            raise ApiError(
                404,
                f"model = {name[:100]!r}: there is no such model; this server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def _model(self) -> dict[str, Any]:
        most = self.engine.rows.most
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "natsjax",
            "max_model_len": most,
        }

    async def _body(self, request: Request) -> bytes:
        """Reads the body, no more of it than is allowed."""
        too_large = ApiError(413, f"the body has more than {self.max_body} bytes; send shorter prompts, or fewer.")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_body:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self.max_body:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {_BODY_SECONDS:g} seconds; send it at once.") from error
        except ClientDisconnect as error:
            raise ApiError(400, "the body is incomplete; send all of it.") from error
        return bytes(body)

    def _choices(self, asked: CompletionRequest, send: Callable[[Piece], None]) -> list[Choice]:
        """Makes the jobs of a request: ``n`` texts of each prompt, the draws of each with a number of their own."""
        vocabulary = self._vocabulary
        is_text = isinstance(vocabulary, Tokenizer)
        stop = set(asked.stop_token_ids)
        if is_text and not asked.ignore_eos:
            stop.add(vocabulary.eos_id)
        for token in asked.stop_token_ids:
            self._check_id("stop_token_ids", token)
        sampling = asked.sampling
        if not asked.has_seed:
            sampling = dataclasses.replace(sampling, seed=secrets.randbelow(2**31))
        choices: list[Choice] = []
        for prompt in asked.prompts:
            ids = self._ids(prompt)
            if len(ids) + asked.max_tokens > self.engine.rows.most:
                raise ApiError(
                    400,
                    f"max_tokens = {asked.max_tokens}: with {len(ids)} tokens of the prompt that is more than the "
                    f"{self.engine.rows.most} tokens of a sequence here; shorten the prompt, or ask for fewer.",
                    param="max_tokens",
                    code="context_length_exceeded",
                )
            for _ in range(asked.n):
                number = len(choices)
                request = RowRequest(
                    ids,
                    asked.max_tokens,
                    sampling,
                    sequence=number,
                    stop_tokens=tuple(sorted(stop)),
                    num_likeliest=asked.logprobs or 0,
                    scores_prompt=asked.echo and asked.logprobs is not None,
                )
                has_own_bos = isinstance(prompt, str)
                choices.append(
                    Choice(
                        number,
                        request,
                        vocabulary,
                        asked.stop,
                        asked.echo,
                        asked.logprobs,
                        has_own_bos,
                        asked.stream,
                        send,
                    )
                )
        return choices

    def _ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        vocabulary = self._vocabulary
        if not isinstance(prompt, str):
            for token in prompt:
                self._check_id("prompt", token)
            return prompt
        if not isinstance(vocabulary, Tokenizer):
            raise ApiError(400, "prompt: the tokens of this model stand for no text; give token ids.", param="prompt")
        try:
            return (vocabulary.bos_id, *vocabulary.encode(prompt).tolist())
        except UserError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from error

    def _check_id(self, name: str, token: int) -> None:
        size = self._vocabulary.vocab_size
        if token >= size:
            raise ApiError(
                400, f"{name}: there is no id {token}; the vocabulary has the ids 0 … {size - 1}.", param=name
            )

    def envelope(self, name: str, created: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes the object of an answer, or of a part of it."""
        return {
            "id": name,
            "object": "text_completion",
            "created": created,
            "model": self.model_name,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }


def _sender(pieces: asyncio.Queue[Piece]) -> Callable[[Piece], None]:
    """Returns a function that the engine's thread may call."""
    loop = asyncio.get_running_loop()

    def send(piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    return send


class _Answer(Response):
    """The answer to a request whose jobs are with the engine; they are cancelled where the client leaves."""

    def __init__(
        self,
        service: Service,
        asked: CompletionRequest,
        choices: Sequence[Choice],
        pieces: asyncio.Queue[Piece],
        prompt_tokens: int,
    ):
        super().__init__()
        self._service, self._asked, self._choices, self._pieces = service, asked, choices, pieces
        self._prompt_tokens = prompt_tokens
        self._name, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer until it ends, the client leaves, or the server must end."""
        respond = self._stream if self._asked.stream else self._whole
        tasks = [
            asyncio.ensure_future(task)
            for task in (respond(scope, receive, send), _left(receive), self._service.is_cut.wait())
        ]
        answer, client, _ = tasks
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not client.done():
                # The engine says so too, unless its thread is inside a compiler.
                self._pieces.put_nowait(Piece(0, error=STOPPING))
                await asyncio.wait([answer, client], timeout=_CUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
            elif client.done():
                self._service.metrics.disconnects.inc()
        finally:
            self._service.engine.cancel(self._choices)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _parts(self) -> AsyncIterator[Piece]:
        """Yields pieces until every text has ended.

        Raises:
          ApiError: the engine could not go on.
        """
        left = len(self._choices)
        while left:
            piece = await self._pieces.get()
            if piece.error is not None:
                raise ApiError(503 if self._service.is_cut.is_set() else 500, piece.error)
            left -= piece.finish_reason is not None
            yield piece

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        found: dict[int, Piece] = {}
        try:
            async for piece in self._parts():
                found[piece.number] = piece
        except ApiError as error:
            await _as_response(None, error)(scope, receive, send)
            return
        body = self._service.envelope(self._name, self._created, [_choice(piece) for _, piece in sorted(found.items())])
        body["usage"] = self._usage(found)
        await JSONResponse(body)(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        found: dict[int, Piece] = {}

        async def event(content: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {content}\n\n".encode(), "more_body": more})

        def chunk(choices: list[dict[str, Any]], usage: Any = None) -> str:
            body = self._service.envelope(self._name, self._created, choices)
            if self._asked.include_usage:
                body["usage"] = usage
            return json.dumps(body)

        try:
            async for piece in self._parts():
                found[piece.number] = piece
                await event(chunk([_choice(piece)]))
        except ApiError as error:
            await event(json.dumps(error.body))
        else:
            if self._asked.include_usage:
                await event(chunk([], self._usage(found)))
        await event("[DONE]", more=False)

    def _usage(self, found: dict[int, Piece]) -> dict[str, int]:
        new = sum(piece.num_tokens for piece in found.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }


def _choice(piece: Piece) -> dict[str, Any]:
    return {
        "index": piece.number,
        "text": piece.text,
        "logprobs": piece.logprobs,
        "finish_reason": piece.finish_reason,
    }


async def _left(receive: Receive) -> None:
    """Waits until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_response(request: Request | None, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


def _of_starlette(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = "/v1/completions, /v1/models, /health and /metrics"
    messages = {
        404: f"there is no page {request.url.path[:100]!r}; this server has {paths}.",
        405: f"{request.method} {request.url.path[:100]}: it takes {(error.headers or {}).get('Allow', 'others')}.",
    }
    message = messages.get(error.status_code, f"{error.detail}.")
    return _as_response(request, ApiError(error.status_code, message, headers=dict(error.headers or {})))


def _unexpected(request: Request, error: Exception) -> Response:
    return _as_response(request, ApiError(500, "the server failed on this request; its log has the reason."))


class _Counted:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        paths = ("/v1/completions", "/v1/models", "/health", "/metrics")
        path = scope["path"] if scope["path"] in paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted)
