"""POST /v1/completions in OpenAI's style: from a request to texts in the engine, and from those to its answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from minigpt_cli.core.detokenize import Detokenizer
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.generate import Sampling
from minigpt_cli.core.tokenizer import Tokenizer
from minigpt_cli.extras.serve.engine import Busy, Engine, Stopping
from minigpt_cli.extras.serve.request import ApiError, CompletionRequest, parse_request, read_body
from minigpt_cli.extras.serve.stream import Likely, Order, Stream

MAX_PROMPT_TOKENS = 1 << 16
FLUSH_SECONDS = 0.02  # between two pieces of a stream: nobody reads faster, and each one costs computing time


@dataclass
class Answer:
    """The texts of one request, in the order of their index, and an event that is set when one has something new."""

    request: CompletionRequest
    prompt_ids: list[list[int]]
    streams: list[Stream] = field(default_factory=list)
    new: asyncio.Event = field(default_factory=asyncio.Event)
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


class Completions:
    """POST /v1/completions."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model: str, *, max_tokens: int, seconds: float) -> None:
        self.engine, self.tokenizer, self.model = engine, tokenizer, model
        self.max_tokens, self.seconds = max_tokens, seconds
        self._pieces = tokenizer.token_bytes()

    async def __call__(self, http: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self.seconds
        answer = await self._begin(parse_request(await read_body(http)))
        if answer.request.stream:
            return _Events(self._events(answer, deadline), lambda: self.engine.cancel(answer.streams))
        gone = asyncio.ensure_future(_disconnected(http))
        try:
            await self._whole(answer, deadline, gone)
            choices = [self._choice(answer, i, answer.streams[i]) for i in range(len(answer.streams))]
            return JSONResponse(self._document(answer, choices, usage=True))
        finally:
            gone.cancel()
            self.engine.cancel(answer.streams)

    async def _begin(self, request: CompletionRequest) -> Answer:
        """Check what depends on this model and this server, and hand the texts to the engine."""
        most = self.engine.slots + self.engine.queue
        if request.max_tokens > self.max_tokens:
            raise ApiError(
                400, f"max_tokens: {request.max_tokens} is above this server's {self.max_tokens}", "max_tokens"
            )
        if len(request.prompts) * request.n > most:
            raise ApiError(400, f"n: {len(request.prompts) * request.n} texts at once; this server takes {most}", "n")
        sampling = Sampling(request.temperature, request.top_k, request.top_p if request.top_p < 1 else None)
        prompt_ids = [await run_in_threadpool(self._encode, prompt) for prompt in request.prompts]
        answer, loop = Answer(request, prompt_ids), asyncio.get_running_loop()
        orders = [
            Order(
                ids or [self.tokenizer.end_of_text or 0], request.max_tokens, sampling, request.stops,
                logprobs=request.logprobs,
                seed=None if request.seed is None else request.seed + index * request.n + copy,
                score_prompt=request.echo and request.logprobs is not None, partial=request.stream,
                end_of_text=self.tokenizer.end_of_text,
            )
            for index, ids in enumerate(prompt_ids) for copy in range(request.n)
        ]  # fmt: skip

        def wake() -> None:
            if not answer.new.is_set():
                with contextlib.suppress(RuntimeError):  # the loop may be gone when the last text is ended
                    loop.call_soon_threadsafe(answer.new.set)

        try:
            answer.streams = self.engine.submit(orders, wake)
        except Busy as error:
            raise ApiError(429, f"too many requests: {error}", kind="rate_limit_error", retry_after="1") from None
        except Stopping as error:
            raise ApiError(503, str(error), kind="server_error", retry_after="5") from None
        return answer

    def _encode(self, prompt: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(prompt).tolist() if prompt else []
        except UserError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from None
        if len(ids) > MAX_PROMPT_TOKENS:
            raise ApiError(400, f"prompt: {len(ids):,} tokens; at most {MAX_PROMPT_TOKENS:,} are taken", "prompt")
        return ids

    async def _whole(self, answer: Answer, deadline: float, gone: asyncio.Future[None]) -> None:
        """Until every text is done. ApiError where one failed, or it takes too long, or nobody waits any more."""
        while not all(stream.done for stream in answer.streams):
            new = asyncio.ensure_future(answer.new.wait())
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait((new, gone), timeout=max(0, left), return_when=asyncio.FIRST_COMPLETED)
            new.cancel()
            answer.new.clear()
            if gone.done():
                raise ApiError(499, "the client has gone")
            self._check_time(deadline)
        for stream in answer.streams:
            _raise_error_of(stream)

    def _check_time(self, deadline: float) -> None:
        if asyncio.get_running_loop().time() >= deadline:
            raise ApiError(
                408, f"not done in {self.seconds:g} s: ask for fewer max_tokens", "max_tokens", kind="timeout",
                x_should_retry="false",
            )  # fmt: skip

    async def _events(self, answer: Answer, deadline: float) -> AsyncIterator[bytes]:
        """Server-sent events: what is new of each text, again and again; [DONE] at the end."""
        going = dict(enumerate(answer.streams))
        told = [False] * len(answer.streams)
        try:
            while going:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(answer.new.wait(), max(0, deadline - asyncio.get_running_loop().time()))
                answer.new.clear()
                for i, stream in list(going.items()):
                    done = stream.done  # before its pieces are taken: none comes after that
                    if stream.pieces:
                        choice = self._choice(answer, i, stream, first=not told[i])
                        told[i] = True
                        yield _event(self._document(answer, [choice]))
                    if done:
                        _raise_error_of(stream)
                        del going[i]
                if going:
                    self._check_time(deadline)
                    await asyncio.sleep(FLUSH_SECONDS)
            if answer.request.stream_options and answer.request.stream_options.include_usage:
                yield _event(self._document(answer, [], usage=True))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)

    def _document(self, answer: Answer, choices: list[dict[str, Any]], usage: bool = False) -> dict[str, Any]:
        document = {
            "id": answer.id, "object": "text_completion", "created": answer.created, "model": self.model,
            "choices": choices,
        }  # fmt: skip
        if usage:
            read, written = sum(map(len, answer.prompt_ids)), sum(stream.written for stream in answer.streams)
            document["usage"] = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return document

    def _choice(self, answer: Answer, index: int, stream: Stream, first: bool = True) -> dict[str, Any]:
        """What is new of a text, all of it if it is done. With `echo` the `first` begins with the prompt."""
        request, prompt = answer.request, answer.request.prompts[index // answer.request.n]
        text, tokens, finish = prompt if first and request.echo else "", [], None
        begin = len(prompt) if request.echo else 0
        while stream.pieces:
            piece = stream.pieces.popleft()
            text, finish = text + piece.text, piece.finish
            tokens += piece.tokens
        logprobs = None
        if request.logprobs is not None:
            rows: list[tuple[int, float | None, Likely | None, int]] = []
            if first and request.echo:
                rows = self._scored_prompt(answer.prompt_ids[index // request.n], stream)
            rows += [(t.token, t.logprob, t.likeliest, begin + t.offset) for t in tokens]
            logprobs = self._logprobs(rows)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _scored_prompt(self, ids: list[int], stream: Stream) -> list[tuple[int, float | None, Likely | None, int]]:
        """Nothing stands before the first token, nor before what the context is too short for: null."""
        reader, offsets = Detokenizer(self._pieces), []
        for token in ids:
            offsets.append(reader.seen)
            reader.add(token)
        nothing: list[tuple[float | None, Likely | None]] = [(None, None)] * (len(ids) - len(stream.prompt_scores))
        scores = (*nothing, *stream.prompt_scores)
        return [(token, *score, at) for token, score, at in zip(ids, scores, offsets, strict=True)]

    def _logprobs(self, rows: Sequence[tuple[int, float | None, Likely | None, int]]) -> dict[str, Any]:
        return {
            "tokens": [self._spelled(token) for token, *_ in rows],
            "token_logprobs": [logprob for _, logprob, *_ in rows],
            "top_logprobs": [
                None if likeliest is None else {self._spelled(t): p for t, p in (*likeliest, (token, logprob))}
                for token, logprob, likeliest, _ in rows
            ],
            "text_offset": [offset for *_, offset in rows],
        }

    def _spelled(self, token: int) -> str:
        """A token's text; the bytes of one that is only a part of a character as OpenAI does: bytes:\\xe6."""
        try:
            return self._pieces[token].decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._pieces[token])


class _Events(StreamingResponse):
    """A stream of events that tells when nobody reads it any more, however it ends."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def _raise_error_of(stream: Stream) -> None:
    if isinstance(stream.error, Stopping):
        raise ApiError(503, str(stream.error), kind="server_error", retry_after="5")
    if isinstance(stream.error, MinigptError):
        raise ApiError(500, str(stream.error), kind="server_error", x_should_retry="false")


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
