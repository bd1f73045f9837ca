"""What a request to /v1/completions may say, and what is answered to one that says something else."""

from __future__ import annotations

import asyncio
import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

MAX_BODY = 1 << 20  # bytes
BODY_SECONDS = 30.0  # in which a request must have arrived
NEUTRAL = {  # fields of OpenAI's that are not supported, and the values that ask for nothing
    "best_of": (1,), "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,),
}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error", **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


Text = Annotated[str, Field(max_length=MAX_BODY)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """What /v1/completions takes. The descriptions are what a wrong value is answered with."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field("", description="a string; there is one model here")
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=32)] = Field(
        "", description="a string, or a list of 1 to 32 strings"
    )
    max_tokens: int = Field(16, ge=0, description="a whole number, 0 or more")
    temperature: float = Field(1.0, ge=0, le=100, description="a number from 0 (always the likeliest token) to 100")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    top_k: int | None = Field(None, ge=1, description="a whole number, 1 or more")
    n: int = Field(1, ge=1, le=32, description="a whole number from 1 to 32")
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=8)]
    ) = Field([], description="a string of 1 to 200 characters, or a list of at most 8")
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="a whole number from 0 to 2^63 - 1")
    logprobs: int | None = Field(None, ge=0, le=20, description="how many likely tokens to tell of, from 0 to 20")
    echo: bool = Field(False, description="true or false")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description='{"include_usage": true or false}')
    user: str = Field("", description="a string")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {k: v for k, v in given.items() if v is not None and v not in NEUTRAL.get(k, ())}

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


def parse_request(body: bytes) -> CompletionRequest:
    """ApiError 400, naming the field, for whatever is wrong."""
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
    if not first["loc"]:
        raise ApiError(400, f"the body is not a JSON object: {first['msg']}"[:300])
    name = str(first["loc"][0])[:100]
    known = CompletionRequest.model_fields
    if name in NEUTRAL:
        raise ApiError(400, f"{name} is not supported here", name)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ApiError(400, f"unknown field {name!r}" + (f"; did you mean {near[0]}?" if near else ""), name)
    shown = repr(first["input"])
    raise ApiError(400, f"{name}: {known[name].description}, not {shown[:60]}{'...' * (len(shown) > 60)}", name)


async def read_body(http: Request) -> bytes:
    """The whole body, of bounded size and in bounded time."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the request's Content-Type must be application/json")  # which no web form can send
    body = bytearray()

    async def read() -> None:
        async for piece in http.stream():
            body.extend(piece)
            if len(body) > MAX_BODY:
                raise ApiError(413, f"the body is larger than {MAX_BODY:,} bytes", connection="close")

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except ClientDisconnect:
        raise ApiError(499, "the client has gone") from None
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive in {BODY_SECONDS:g} s", connection="close") from None
    return bytes(body)
