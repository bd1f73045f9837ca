"""The endpoint over HTTP: the real `openai` client against a real process, and whatever else may be sent to it."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from commands.conftest import call

from clock import PATIENCE, wait_for
from minigpt_cli.core.checkpoint import Checkpoint
from minigpt_cli.extras.serve import server as serving
from served import KEY, SCRIPT, Server, in_this_process


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def complete(client: openai.OpenAI, prompt: Any = "", top_k: int | None = None, **more: Any) -> Any:
    """Greedy, unless it says otherwise."""
    extra = {"extra_body": {"top_k": top_k}} if top_k else {}
    return client.completions.create(model="best", prompt=prompt, **{"temperature": 0} | more | extra)


# --- what the openai client gets ---


def test_the_models_are_one_and_it_says_what_it_is(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("best", "model", "minigpt")
    assert client.models.retrieve("best") == model
    assert (model.context_window, model.vocab_size) == (128, 256)
    with pytest.raises(openai.NotFoundError, match="there is 'best'"):
        client.models.retrieve("gpt-3.5-turbo-instruct")


@pytest.mark.parametrize("prompt", ["", "G"])  # the first stands for token 0, and is not shown
def test_a_completion_is_the_text_its_reason_and_its_counts(client: openai.OpenAI, prompt: str) -> None:
    done = complete(client, prompt, max_tokens=20)
    (choice,) = done.choices
    assert choice.text == SCRIPT.encode()[:20].decode()
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    assert done.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(prompt), "completion_tokens": 20, "total_tokens": 20 + len(prompt),
    }  # fmt: skip
    assert (done.object, done.model) == ("text_completion", "best")
    assert done.id.startswith("cmpl-")
    assert abs(done.created - time.time()) < 60
    assert complete(client, prompt).usage.completion_tokens == 16  # what OpenAI's default is


def test_prompts_and_copies_come_in_order_and_streamed_they_are_the_same(client: openai.OpenAI) -> None:
    request = {"prompt": ["", "xy", "Grüße"], "n": 2, "max_tokens": 30, "temperature": 2.5, "seed": 8, "echo": True}
    whole = complete(client, **request)
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert len({choice.text for choice in whole.choices}) == 6
    texts, ends = [""] * 6, [None] * 6
    for chunk in complete(client, **request, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert [text[: len(prompt)] for text, prompt in zip(texts[::2], request["prompt"], strict=True)] == request[
        "prompt"
    ]
    assert ends == ["length"] * 6
    assert chunk.usage == whole.usage
    assert whole.usage.prompt_tokens == len("xy") + len("Grüße".encode())


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("END", SCRIPT.partition("END")[0]), (["never", "東京"], "Grüße, <img src=x onerror=alert(1)> aus "),
     ("京!\n", "Grüße, <img src=x onerror=alert(1)> aus 東"), ("not there", SCRIPT)],
    ids=str,
)  # fmt: skip
def test_a_text_ends_before_its_stop(client: openai.OpenAI, stop: Any, expected: str) -> None:
    """Each byte is a token, so every stop text, and every character of several bytes, lies across token borders."""
    n = len(SCRIPT.encode())
    (whole,) = complete(client, stop=stop, max_tokens=n).choices
    chunks = [chunk.choices[0] for chunk in complete(client, stop=stop, max_tokens=n, stream=True)]
    assert whole.text == "".join(chunk.text for chunk in chunks) == expected
    assert whole.finish_reason == chunks[-1].finish_reason == ("length" if expected == SCRIPT else "stop")
    assert {chunk.finish_reason for chunk in chunks[:-1]} <= {None}


def test_the_same_seed_gives_the_same_text_whatever_else_is_asked_for(
    client: openai.OpenAI, scripted: Checkpoint
) -> None:
    """And the text of `minigpt sample --seed`; the second copy is that of the next seed."""
    request = {"prompt": "xyz", "max_tokens": 80, "temperature": 2.5, "top_p": 0.97, "top_k": 90}

    def copies(seed: int) -> list[str]:
        return [choice.text for choice in complete(client, **request, seed=seed, n=2).choices]

    quiet = copies(7)
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(complete, client, "a" * i, max_tokens=40 * i, temperature=1) for i in range(1, 5)]
        among = [pool.submit(copies, 7).result(), pool.submit(copies, 8).result()]
        assert all(other.result().choices[0].text for other in others)
    assert among[0] == quiet
    assert among[1][0] == quiet[1] != quiet[0]
    arguments = ["--tokens", 80, "--temperature", 2.5, "--top-p", 0.97, "--top-k", 90, "--seed", 7, "--raw"]
    sampled = call("sample", "--ckpt", scripted.path, "--prompt", "xyz", *arguments, "--precision", "fp32")
    assert sampled.out == "xyz" + quiet[0]
    assert complete(client, **request).choices[0].text != complete(client, **request).choices[0].text


def test_greedy_text_is_that_of_sample_past_the_context_too(client: openai.OpenAI, scripted: Checkpoint) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: complete(client, prompt, max_tokens=300), ["one", "2", "drei"]))
    for prompt, done in zip(("one", "2", "drei"), found, strict=True):
        arguments = ["--temperature", 0, "--tokens", 300, "--raw", "--precision", "fp32"]
        sampled = call("sample", "--ckpt", scripted.path, "--prompt", prompt, *arguments)
        assert sampled.out == prompt + done.choices[0].text


def test_log_probabilities_are_the_models_and_offsets_lead_to_the_tokens(
    client: openai.OpenAI, scripted: Checkpoint
) -> None:
    prompt = "aus 東"
    (choice,) = complete(client, prompt, max_tokens=12, temperature=1.2, logprobs=3, echo=True).choices
    told, model = choice.logprobs, scripted.model().eval()
    pieces = [eval(f"b'{t[6:]}'") if t.startswith("bytes:") else t.encode() for t in told.tokens]
    ids = [byte for piece in pieces for byte in piece]
    assert bytes(ids[: len(prompt.encode())]).decode() == prompt
    assert bytes(ids).decode(errors="replace") == choice.text
    assert told.tokens[4:7] == ["bytes:\\xe6", "bytes:\\x9d", "bytes:\\xb1"]
    assert told.text_offset[:7] == [0, 1, 2, 3, 4, 4, 4]
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset] == token
    assert told.token_logprobs[0] is told.top_logprobs[0] is None
    log_probs_TV = model(torch.tensor([ids]))[0].detach().log_softmax(dim=-1)
    for t in range(1, len(ids)):
        assert told.token_logprobs[t] == pytest.approx(float(log_probs_TV[t - 1, ids[t]]), abs=1e-4)
        best = log_probs_TV[t - 1].topk(3).values.tolist()
        assert sorted(told.top_logprobs[t].values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)
        assert told.top_logprobs[t][told.tokens[t]] == told.token_logprobs[t]


def test_a_prompt_can_be_scored_and_what_the_context_is_too_short_for_is_null(client: openai.OpenAI) -> None:
    (choice,) = complete(client, "x" * 200, max_tokens=0, logprobs=0, echo=True).choices
    assert choice.text == "x" * 200
    assert choice.logprobs.token_logprobs[:73] == [None] * 73
    assert all(score < 0 for score in choice.logprobs.token_logprobs[73:])
    (nothing,) = complete(client, "x", max_tokens=0).choices
    assert (nothing.text, nothing.finish_reason) == ("", "length")


# --- what is refused, and how ---

BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"best_of": 3}, "best_of", "not supported"),
    ({"suffix": "the end"}, "suffix", "not supported"),
    ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"messages": []}, "messages", "unknown field"),
    ({"prompt": [1, 2, 3]}, "prompt", "a string, or a list of 1 to 32 strings"),
    ({"prompt": []}, "prompt", "a list of 1 to 32 strings"),
    ({"prompt": ["x"] * 33}, "prompt", "1 to 32"),
    ({"prompt": "x" * 70_000}, "prompt", "70,000 tokens; at most 65,536"),
    ({"max_tokens": -1}, "max_tokens", "0 or more"),
    ({"max_tokens": 100_001}, "max_tokens", "above this server's 100000"),
    ({"max_tokens": 1.5}, "max_tokens", "whole number"),
    ({"max_tokens": 10**30}, "max_tokens", "max_tokens"),
    ({"temperature": -0.1}, "temperature", "from 0"),
    ({"temperature": "hot"}, "temperature", "not 'hot'"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_k": 0}, "top_k", "1 or more"),
    ({"n": 0}, "n", "1 to 32"),
    ({"n": 9, "prompt": ["a", "b"]}, "n", "18 texts at once; this server takes 16"),
    ({"stop": ""}, "stop", "1 to 200 characters"),
    ({"stop": ["x"] * 9}, "stop", "at most 8"),
    ({"seed": -1}, "seed", "from 0 to"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"logprobs": True}, "logprobs", "from 0 to 20"),
    ({"stream_options": {"x": 1}}, "stream_options", "include_usage"),
]


@pytest.mark.parametrize(("request_", "param", "message"), BAD, ids=[str(bad[0])[:40] for bad in BAD])
def test_a_wrong_field_is_named(server: Server, request_: dict[str, Any], param: str | None, message: str) -> None:
    reply = server.complete(**{"prompt": "a"} | request_)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert message in reply.error["message"]
    assert len(reply.error["message"]) < 300


def test_fields_that_ask_for_nothing_are_taken(server: Server) -> None:
    neutral = {"best_of": 1, "suffix": None, "logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0}
    reply = server.complete(prompt="a", user="me", model="whatever", stop=None, logprobs=None, seed=None, **neutral)
    assert reply.status == 200


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"", {}, 400, "not a JSON object"),
        (b"[1]", {}, 400, "not a JSON object"),
        (b'{"prompt": "a"', {}, 400, "not a JSON object"),
        (b'{"prompt": "\xff"}', {}, 400, "not a JSON object"),
        (b'{"prompt": "\\ud800"}', {}, 400, "not a JSON object"),
        (b'{"temperature": NaN}', {}, 400, "temperature"),
        (b'{"stop":' + b"[" * 100_000, {}, 400, "recursion"),
        (b'{"prompt": "' + b"x" * (1 << 20) + b'"}', {}, 413, "larger than 1,048,576 bytes"),
        (b'{"prompt": "a"}', {"Content_Type": "text/plain"}, 415, "application/json"),
        (b'{"prompt": "a"}', {"Authorization": "Bearer another"}, 401, "API key"),
        (b'{"prompt": "a"}', {"Authorization": f"Basic {KEY}"}, 401, "API key"),
        (b'{"prompt": "a"}', {"Origin": "https://evil.example"}, 403, "other web pages"),
        (b'{"prompt": "a"}', {"Origin": "null"}, 403, "other web pages"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_request_of_ours_is_refused_in_openais_form(
    server: Server, body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    reply = server.fetch("POST", "/v1/completions", body, **headers)
    assert reply.status == status
    assert message in reply.error["message"]
    assert "Access-Control-Allow-Origin" not in reply.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("POST", "/v1/chat/completions", 404), ("GET", "/../stream.py", 404)],
)  # fmt: skip
def test_other_paths_and_methods_are_errors_of_the_same_form(
    server: Server, method: str, path: str, status: int
) -> None:
    assert server.fetch(method, path).status == status
    assert path[:20] in server.fetch(method, path).error["message"]


def test_nothing_in_a_request_drives_the_terminal_that_shows_the_log(server: Server) -> None:
    assert server.errors is not None
    server.fetch("GET", "/%0Aforged%20line%1b[31m")
    wait_for(lambda: "forged" in server.errors.read_text(), "the line, which is written after the answer")
    (line,) = (line for line in server.errors.read_text().splitlines() if "forged" in line)
    assert line.startswith("127.0.0.1 GET /%0Aforged%20line%1b[31m 404 ")


def test_a_key_is_needed_for_the_api_and_not_for_the_page(server: Server) -> None:
    stranger = Server(server.port)
    assert stranger.fetch("GET", "/v1/models").status == 401
    assert stranger.fetch("GET", "/v1/models").headers["WWW-Authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    for path in ("/", "/page.js", "/page.css", "/health"):
        reply = stranger.fetch("GET", path)
        assert reply.status == 200
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_a_server_without_a_key_answers_to_names_that_nobody_can_point_at_it(scripted: Checkpoint) -> None:
    """DNS rebinding: a page under evil.example, which now resolves to 127.0.0.1, is same-origin with it."""
    with in_this_process(scripted, names=("my-box",)) as (server, _, _):
        for host in ("localhost", "127.0.0.1:1", "[::1]:8000", "192.168.1.5", "my-box:80", f"localhost:{server.port}"):
            assert server.fetch("GET", "/v1/models", Host=host).status == 200, host
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", ""):
            assert server.fetch("GET", "/v1/models", Host=host).status in (400, 403), host


# --- many at once, and those who go away ---


def test_when_the_queue_is_full_the_answer_is_429_and_when_to_come_again(server: Server) -> None:
    endless = [server.begin(prompt="a", max_tokens=100_000, n=8, stream=True) for _ in range(2)]
    server.until(running=4, waiting=12)
    reply = server.complete(prompt="a")
    assert reply.status == 429
    assert reply.headers["Retry-After"] == "1"
    assert "16 texts" in reply.error["message"]
    for connection in endless:
        connection.close()
    server.until(running=0, waiting=0)
    assert server.complete(prompt="a").status == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=str)
def test_the_slot_of_a_client_that_goes_away_is_free(server: Server, stream: bool, more: dict[str, int]) -> None:
    connection = server.begin(prompt="a", max_tokens=100_000, stream=stream, **more)
    server.until(running=1)
    if stream:
        response = connection.getresponse()
        assert response.readline().startswith(b"data: {")
        response.close()
    connection.close()
    server.until(running=0)


def test_a_request_that_takes_too_long_ends_with_an_error(scripted: Checkpoint) -> None:
    with in_this_process(scripted, seconds=1) as (server, engine, _):
        reply = server.complete(prompt="a", max_tokens=10**6)
        assert reply.status == 408
        assert reply.headers["x-should-retry"] == "false"
        assert "not done in 1 s" in reply.error["message"]
        events = server.complete(prompt="a", max_tokens=10**6, stream=True).body.split(b"\n\n")
        assert json.loads(events[0][6:])["choices"]
        assert "not done in 1 s" in json.loads(events[-2][6:])["error"]["message"]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
        with pytest.raises(openai.APIError, match="not done in"):
            list(complete(client, "a", max_tokens=10**6, stream=True))
        server.until(running=0)
        assert engine.running == 0


def test_a_body_that_never_comes_is_not_waited_for(scripted: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt_cli.extras.serve.request.BODY_SECONDS", 0.1)
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 9")
    with in_this_process(scripted) as (server, _, _), socket.create_connection(("127.0.0.1", server.port)) as link:
        link.settimeout(PATIENCE)
        link.sendall("\r\n".join([*lines, "", ""]).encode())
        assert b" 408 " in link.recv(1 << 16)


def test_whoever_is_not_done_when_the_grace_is_over_hears_that_the_server_stops(
    scripted: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [0.0]  # the server's clock, which goes on when the test says so
    monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=lambda: passed[0], perf_counter=time.perf_counter))
    with in_this_process(scripted) as (server, _, stop):
        replies: list[Any] = []
        request = {"prompt": "a", "max_tokens": 10**6}
        asking = [
            threading.Thread(target=lambda s=stream: replies.append(server.complete(**request, stream=s)))
            for stream in (False, True)
        ]
        for thread in asking:
            thread.start()
        server.until(running=2)
        stop.set()
        wait_for(lambda: server.fetch("GET", "/health").status == 503, "no more being taken")
        reply = server.complete(prompt="a")
        assert reply.status == 503
        assert reply.headers["Retry-After"] == "5"
        passed[0] = serving.GRACE_SECONDS
        for thread in asking:
            thread.join()
    whole, streamed = sorted(replies, key=lambda reply: -reply.status)
    assert whole.status == 503
    assert "the server is stopping" in whole.error["message"]
    assert b"the server is stopping" in streamed.body
    assert b"[DONE]" not in streamed.body


def test_a_fault_of_ours_is_a_500_and_one_line_in_the_log(
    scripted: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with in_this_process(scripted, log=lines.append, verbose=True) as (server, engine, _):
        monkeypatch.setattr(engine, "submit", lambda *_: 1 / 0)
        reply = server.complete(prompt="a")
        assert reply.status == 500
        assert reply.error["message"] == "internal error"
    assert lines[0] == "/v1/completions: internal error: ZeroDivisionError: division by zero"
    assert lines[1].startswith("127.0.0.1 POST /v1/completions 500 ")
