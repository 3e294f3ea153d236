"""The starlette application: its paths, and how an answer is sent. It knows neither sockets nor how models are loaded."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from gpt2.generation.loop import start
from gpt2.generation.text_stream import TextStream
from gpt2.serving import protocol
from gpt2.serving.answers import Answer, ChatAnswer, CompletionAnswer
from gpt2.serving.engine import Engine, closing_error
from gpt2.serving.fields import ApiError, Fields, json_bytes, parse_body, shown, unsupported
from gpt2.serving.gate import Access, Gate, add_facts, too_large
from gpt2.serving.inspection_page import inspection_page
from gpt2.serving.job import Choice, Job, Work
from gpt2.serving.metrics import CONTENT_TYPE, Metrics
from gpt2.serving.models import Models, Served
from gpt2.serving.own_thread import in_own_thread
from gpt2.serving.playground import playground_page
from gpt2.serving.token_texts import TokenTexts
from gpt_config.errors import GPT2Error

# Seconds in which a client must have sent its body.
_SECONDS_FOR_BODY = 60.0

Ask = Callable[[Fields, Served], protocol.Request]


class Application:
    """The endpoints on one engine. `asgi` is the application for a server; set `is_closing` to refuse new requests."""

    def __init__(self, models: Models, engine: Engine, access: Access, metrics: Metrics) -> None:
        self._models, self._engine, self._access, self._metrics = models, engine, access, metrics
        self.is_ready = self.is_closing = False
        self._texts: dict[Served, TokenTexts] = {}
        # Bodies are read one after another in a thread, so that a long text does not make the streams wait.
        self._inspecting = asyncio.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="gpt2-reader")
        routes = [
            Route("/", self._page),
            Route("/inspect", self._inspect),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/tokenizer_info", self._tokenizer_info),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/embeddings", self._embed, methods=["POST"]),
        ]
        router = Router(routes, default=_not_found, redirect_slashes=False)
        paths = [route.path for route in routes]
        metrics.watch("gpt2_slots", "Rows that may run at a time.", lambda: engine.slots)
        metrics.watch("gpt2_running_rows", "Rows that have a slot.", lambda: engine.n_running)
        metrics.watch("gpt2_waiting_requests", "Requests of which nothing runs yet.", lambda: engine.n_waiting)
        self.asgi: ASGIApp = Gate(_with_app(router), Access(**{**vars(access), "paths": paths}), metrics)

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(playground_page())

    async def _inspect(self, request: Request) -> Response:
        self._check_open()
        served = await self._models.get(request.query_params.get("model"))
        text = request.query_params.get("text", "")
        async with self._inspecting:  # one at a time: it takes as long as some hundred tokens
            return HTMLResponse(await in_own_thread(inspection_page, served, text))

    async def _health(self, request: Request) -> Response:
        state = "closing" if self.is_closing else "ready" if self.is_ready else "loading"
        return _json({"status": state}, status=200 if state == "ready" else 503)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.page(), headers={"content-type": CONTENT_TYPE})

    async def _list_models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model(name) for name in self._models.names]})

    async def _show_model(self, request: Request) -> Response:
        return _json(self._model(self._models.check(request.path_params["name"])))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._models.created, "owned_by": "gpt2-from-scratch"}

    async def _tokenizer_info(self, request: Request) -> Response:
        served = await self._models.get(request.query_params.get("model"))
        roles = served.tokenizer.roles
        info = {name: roles.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        template = None if served.template is None else served.template.source
        return _json({**info, "vocab_size": served.tokenizer.vocab_size, "chat_template": template})

    async def _tokenize(self, request: Request) -> Response:
        fields, served = await self._fields(request)

        def encode() -> list[int]:
            text = fields.text("prompt")
            if text is None:
                raise fields.wrong("prompt", "must be a string", code="invalid_type")
            add, special = fields.flag("add_special_tokens", True), fields.flag("special_tokens", True)
            allowed: Any = "all" if special else ()
            ids: list[int] = served.tokenizer.encode(text, allowed_special=allowed, add_special_tokens=add)
            return ids

        ids = await self._in_reader(encode)
        return _json({"tokens": ids, "count": len(ids), "max_model_len": served.n_positions})

    async def _detokenize(self, request: Request) -> Response:
        fields, served = await self._fields(request)
        text = await self._in_reader(lambda: served.tokenizer.decode(protocol.token_ids(fields, "tokens", served)))
        return _json({"prompt": text})

    async def _complete(self, request: Request) -> Response | Answering:
        return await self._generate(request, protocol.completion_request, CompletionAnswer)

    async def _chat(self, request: Request) -> Response | Answering:
        return await self._generate(request, protocol.chat_request, ChatAnswer)

    async def _generate(self, request: Request, ask: Ask, kind: type[Answer]) -> Response | Answering:
        self._check_open()
        fields, served = await self._fields(request)
        asked = await self._in_reader(lambda: ask(fields, served))
        job = Job(served, is_stream=asked.stream)
        for work in _works(job, asked):
            job.add(work)
        answer = kind(asked, job, self._texts.setdefault(served, TokenTexts(served.tokenizer)))
        self._engine.submit(job)
        return Answering(self._engine, job, answer.complete, answer if asked.stream else None)

    async def _embed(self, request: Request) -> Response | Answering:
        self._check_open()
        fields, served = await self._fields(request)
        if fields.get("dimensions") is not None:
            raise unsupported("dimensions", f"an embedding has {served.model.config.n_embd} numbers: leave it out")
        if fields.get("input") is None:
            raise fields.wrong("input", "must be a text or several", code="invalid_type")
        is_base64 = fields.choice("encoding_format", ("float", "base64"), "float") == "base64"
        prompts = await self._in_reader(lambda: protocol.prompts_of(fields, "input", served, special=False))
        job = Job(served)
        for prompt in prompts:
            job.add(Work(prompt, is_embedded=True))
        self._engine.submit(job)
        return Answering(self._engine, job, lambda: _embeddings(job, is_base64))

    def _check_open(self) -> None:
        if self.is_closing:
            raise closing_error()
        self._engine.check_room()

    async def _fields(self, request: Request) -> tuple[Fields, Served]:
        """The body and the model that it names."""
        fields = parse_body(await self._body(request))
        served = await self._models.get(fields.text("model"))
        add_facts(request.scope, model=shown(served.name)[1:-1])
        return fields, served

    async def _body(self, request: Request) -> bytes:
        content = bytearray()
        try:
            async with asyncio.timeout(_SECONDS_FOR_BODY):
                async for part in request.stream():
                    content += part
                    if len(content) > self._access.most_bytes:
                        raise too_large(self._access.most_bytes)
        except TimeoutError:
            message = f"the body has not come within {_SECONDS_FOR_BODY:g} seconds: send it at once"
            raise ApiError(message, status=408, code="body_timeout") from None
        return bytes(content)

    async def _in_reader(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._reader, function)


class Answering:
    """Sends the answer of a job, complete or as a stream of events, and cancels the job when the client leaves."""

    def __init__(
        self, engine: Engine, job: Job, complete: Callable[[], dict[str, Any]], streamed: Answer | None = None
    ) -> None:
        self._engine, self._job, self._complete, self._streamed = engine, job, complete, streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_until_gone(receive))
        sent = asyncio.ensure_future(self._send_stream(send) if self._streamed else self._send_whole(scope, receive, send))
        try:
            await asyncio.wait({gone, sent}, return_when=asyncio.FIRST_COMPLETED)
            if not sent.done():
                raise ClientDisconnect
            sent.result()
        finally:
            self._engine.cancel(self._job)  # nothing, if it has ended
            for task in (gone, sent):
                task.cancel()
            add_facts(scope, prompt_tokens=self._job.n_prompt_tokens, new_tokens=self._job.n_new_tokens)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._job.finished()
        answer = await asyncio.to_thread(lambda: _json(self._complete()))  # perhaps long: the streams do not wait for it
        await answer(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        answer = self._streamed
        assert answer is not None
        try:
            for chunk in answer.start():
                yield json_bytes(chunk)
            while deltas := await self._job.take():
                for delta in deltas:
                    for chunk in answer.chunks(delta):
                        yield json_bytes(chunk)
            for chunk in answer.end():
                yield json_bytes(chunk)
            yield b"[DONE]"
        except ApiError as error:
            yield json_bytes(error.body)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _works(job: Job, asked: protocol.Request) -> list[Work]:
    """The prompts of a request with their rows. Row j of prompt p has the index of `gpt2 generate`'s sample j."""
    served, with_logprobs = job.served, asked.logprobs is not None or asked.best_of > asked.n
    works: list[Work] = []
    for prompt in asked.prompts:
        try:
            rows = start(served.model, [prompt], asked.config, logprobs=with_logprobs)
        except GPT2Error as error:
            raise ApiError(str(error)) from None
        work = Work(rows[0].prompt_ids, n_top=asked.logprobs if asked.scores_prompt else None)
        for row in rows:
            index = len(works) * len(rows) + row.index
            work.choices.append(Choice(job, index, row, TextStream(served.tokenizer, asked.config.stop)))
        works.append(work)
    return works


def _embeddings(job: Job, is_base64: bool) -> dict[str, Any]:
    def written(vector: list[float]) -> list[float] | str:
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii") if is_base64 else vector

    data = [
        {"object": "embedding", "index": index, "embedding": written(work.vector or [])}
        for index, work in enumerate(job.works)
    ]
    usage = {"prompt_tokens": job.n_prompt_tokens, "total_tokens": job.n_prompt_tokens}
    return {"object": "list", "data": data, "model": job.served.name, "usage": usage}


def _json(value: object, *, status: int = 200) -> Response:
    return Response(json_bytes(value), status, media_type="application/json")


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404)


def _with_app(router: Router) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # a Route then raises for a wrong method in place of sending plain text
        await router(scope, receive, send)

    return call
