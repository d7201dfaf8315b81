"""A real server process: OpenAI's client gets what the run generates, and nothing is lost under load or abuse."""

import asyncio
import concurrent.futures
import functools
import json
import re
import signal
import socket
import threading
import time
from typing import NamedTuple

import httpx
import jax
import numpy as np
import openai
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import Process, wait_for

from natsjax import generate
from natsjax.decode import generation
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.decode.sampling import Sampling
from natsjax.model.inputs import Batch

ROWS, QUEUE = 4, 20
FLAGS = ["--port=0", f"--rows={ROWS}", f"--max_queue={QUEUE}", "--chunk=32"]
# Sixteen keys a head: the buffer has one size, and texts can be long. Shorter ones than that lose no key.
LONG = [*FLAGS, "--max_kv=16", "--block=16", "--max_length=30000", "--max_body=20000"]
SETTINGS = DecodeSettings(chunk=32, max_kv=16, block=16)
ENDLESS = {"max_tokens": 29000, "ignore_eos": True}
BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """Untied, and with likely bytes and unlikely ones, or a greedy text would say one thing for ever."""
    folder = tmp_path_factory.mktemp("text")
    config = tiny.config(model={"tie_embeddings": False}, data=tiny.corpus(folder / "texts"))
    return tiny.make_run(folder / "run", config)


class Server:
    """A server process, and clients of it."""

    def __init__(self, run, flags, env=None):
        words = ["-m", "natsjax.serve", f"--workdir={run.workdir.path}", *flags]
        self.process, self.lines = Process(*words, env=env), []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_for(lambda: any(" at http://" in line for line in self.lines), self.process)
        self.url = re.search(r"http://[\d.:]+", "".join(self.lines))[0]
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=300)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def complete(self, prompt, **options):
        extra = {name: options.pop(name) for name in ("ignore_eos", "top_k", "stop_token_ids") if name in options}
        return self.openai.completions.create(model="run", prompt=prompt, extra_body=extra, **options)

    def post(self, body, **options):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post("/v1/completions", content=content, **options)

    def metrics(self):
        lines = self.http.get("/metrics").text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix("natsjax_"): float(value) for name, _, value in pairs}

    def wait_until(self, what):
        deadline = time.monotonic() + 240
        while not what(found := self.metrics()):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def end(self):
        """Stops it and returns its log, which has no traceback."""
        self.http.close()
        self.openai.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(240) == 0
        self._reader.join()
        self.process.close()
        log = "".join(self.lines)
        assert "Traceback" not in log, log
        return log


@pytest.fixture(scope="module")
def server(text_run):
    server = Server(text_run, LONG)
    yield server
    log = server.end()
    assert log.count("\n") == 4, "a warning of long texts, the address, the signal and the end"


@pytest.fixture(scope="module")
def generated(text_run):
    """What a batch gives: ``generated(prompts, tokens, **rule)``, with one shape for all."""
    decoder, rows, longest = Decoder.of_run(text_run, settings=SETTINGS), 6, 40

    @functools.cache
    def whole(prompts, rule):
        ids = [[BOS, *prompt.encode()] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        padded = ids + [[BOS]] * (rows - len(ids))
        return generation.generate(
            decoder, padded, max_new_tokens=longest, sampling=Sampling(**dict(rule)), stop_tokens=[EOS]
        )

    def first(prompts, tokens, **rule):
        count = len(prompts)
        found = whole(tuple(map(tuple_of, prompts)), tuple(rule.items()))
        return [
            Expected(ids[:tokens], logprobs[:tokens], text_run.tokenizer.decode(ids[:tokens]))
            for ids, logprobs in zip(found.tokens[:count], found.logprobs[:count], strict=True)
        ]

    return first


class Expected(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    text: str


def tuple_of(prompt):
    return prompt if isinstance(prompt, str) else tuple(prompt)


def names(tokens):
    """Bytes as OpenAI's log-probabilities have them."""
    special = {BOS: "⟨bos⟩", EOS: "⟨eos⟩"}
    return [special.get(x) or (chr(x) if x < 128 else f"bytes:\\x{x:02x}") for x in tokens]


def joined(stream):
    """Text, log-probabilities and end of a stream's only choice, and the number of its parts."""
    parts = [chunk.choices[0] for chunk in stream]
    columns = {"tokens": [], "token_logprobs": [], "text_offset": []}
    for part in parts:
        for name, values in columns.items():
            values += getattr(part.logprobs, name) if part.logprobs else []
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    return "".join(part.text for part in parts), columns, parts[-1].finish_reason, len(parts)


# --- the same tokens ---

PROMPTS = ["köln was", "", "the house", "là"]
RULES = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.5, "top_p": 0.9, "seed": 6},
    {"temperature": 0.9, "top_k": 40, "seed": 7},
]


def test_texts_are_those_of_generate_whatever_else_is_in_the_loop(server, generated):
    """At once, each under a rule of its own, some streamed; several prompts of one request have numbers."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = {}
        for place, rule in enumerate(RULES):
            options = {"max_tokens": 40, "logprobs": 0, **rule}
            asked[place] = pool.submit(server.complete, PROMPTS, **options)
            asked[place, "one"] = pool.submit(
                lambda options: joined(server.complete(PROMPTS[0], stream=True, **options)), options
            )
        found = {place: answer.result() for place, answer in asked.items()}
    for place, rule in enumerate(RULES):
        expected, choices = generated(PROMPTS, 40, **rule), found[place].choices
        for choice, (tokens, logprobs, text) in zip(choices, expected, strict=True):
            assert choice.text == text
            assert choice.logprobs.tokens == names(tokens)
            np.testing.assert_allclose(choice.logprobs.token_logprobs, logprobs, atol=1e-4)
            assert choice.finish_reason == ("stop" if tokens[-1] == EOS else "length")
        assert found[place].usage.completion_tokens == sum(len(one.tokens) for one in expected)
        assert found[place].usage.prompt_tokens == sum(len(f"b{prompt}".encode()) for prompt in PROMPTS)
        text, columns, end, parts = found[place, "one"]
        assert (text, end) == (expected[0].text, choices[0].finish_reason)
        assert columns["tokens"] == choices[0].logprobs.tokens
        assert columns["text_offset"] == choices[0].logprobs.text_offset
        np.testing.assert_allclose(columns["token_logprobs"], choices[0].logprobs.token_logprobs, atol=1e-4)
        assert parts > 1


def test_the_text_is_that_of_the_command(server, text_run):
    """``python -m natsjax.generate --prompt=… --seed=5 --temperature=1 --max_kv=16``."""
    rule, prompts = RULES[1], [*PROMPTS, "a", "b"]  # as many as ``generated`` has
    found = generate.run(
        text_run.workdir.path,
        prompts,
        max_new_tokens=40,
        sampling=Sampling(**rule),
        settings=SETTINGS,
        batch_size=len(prompts),
        loaded=text_run,
    )
    answer = server.complete(prompts, max_tokens=40, **rule)
    assert [choice.text for choice in answer.choices] == found.texts


def test_several_texts_of_a_prompt_are_draws_with_numbers(server, generated):
    answer = server.complete([[BOS, 97, 98], [BOS, 99]], n=3, max_tokens=6, seed=3, temperature=2.0)
    prompts = [[BOS, 97, 98]] * 3 + [[BOS, 99]] * 3
    expected = generated(prompts, 6, temperature=2.0, seed=3)
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices}) > 3
    assert answer.usage.prompt_tokens == 5, "each prompt once"
    with server.complete("a", n=2, max_tokens=5, seed=1, stream=True, stream_options={"include_usage": True}) as stream:
        *parts, last = stream
    whole = server.complete("a", n=2, max_tokens=5, seed=1)
    for place, choice in enumerate(whole.choices):
        assert "".join(x.text for part in parts for x in part.choices if x.index == place) == choice.text
    assert (last.choices, last.usage) == ([], whole.usage)


def test_without_a_seed_texts_differ(server):
    texts = {server.complete("a", max_tokens=8, temperature=2.0).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def own_logprobs(run, tokens):
    """Of the model's masked forward, normalized in float64: ``[t, v]``."""
    positions = np.arange(len(tokens), dtype=np.int32)[None]
    batch = Batch(np.array([tokens], np.int32), positions, np.full_like(positions, len(tokens)))
    x = np.asarray(jax.jit(lambda batch: run.model(batch)[0])(batch), np.float64)[0]
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_prompt_and_text_are_the_model_s_own(server, text_run, generated, stream):
    """The prompt's first byte has one too, behind the BOS that the server adds."""
    options = {"echo": True, "logprobs": 5, "temperature": 0, "max_tokens": 6}
    if stream:
        text, columns, *_ = joined(server.complete("köln", stream=True, **options))
        tokens, logprobs, offsets = (columns[name] for name in ("tokens", "token_logprobs", "text_offset"))
    else:
        choice = server.complete("köln", **options).choices[0]
        text, tokens = choice.text, choice.logprobs.tokens
        logprobs, offsets = choice.logprobs.token_logprobs, choice.logprobs.text_offset
    (expected,) = generated(["köln"], 6)
    whole = [BOS, *"köln".encode(), *expected.tokens]
    own = own_logprobs(text_run, whole)
    assert text == f"köln{expected.text}"
    assert tokens == names(whole[1:])
    assert offsets[:6] == [0, 1, 1, 2, 3, 4], "half a character begins where the character does"
    np.testing.assert_allclose(logprobs, own[np.arange(len(tokens)), whole[1:]], atol=1e-4)
    if not stream:
        for step, best in enumerate(choice.logprobs.top_logprobs):
            assert best[tokens[step]] == pytest.approx(logprobs[step], abs=1e-6), "the token itself is among them"
            values = sorted(best.values(), reverse=True)[:5]
            np.testing.assert_allclose(values, np.sort(own[step])[::-1][:5], atol=1e-4)


def test_a_prompt_of_ids_is_scored_alone(server, text_run):
    """As lm-eval asks: no new token, and none has a log-probability that nothing precedes."""
    ids = [BOS, 97, 98, 99]
    answer = server.complete(ids, echo=True, logprobs=1, max_tokens=0)
    logprobs = answer.choices[0].logprobs
    assert (answer.choices[0].text, logprobs.tokens) == ("abc", ["⟨bos⟩", "a", "b", "c"])
    assert logprobs.token_logprobs[0] is None
    np.testing.assert_allclose(logprobs.token_logprobs[1:], own_logprobs(text_run, ids)[range(3), ids[1:]], atol=1e-4)
    assert answer.usage.completion_tokens == 0


def test_a_stop_string_cuts(server, generated):
    rule = {"temperature": 1.0, "seed": 2}
    ((ids, _, whole),) = generated(["the"], 40, **rule)
    stop = whole[9:11]
    cut = whole.index(stop)
    for stream in (False, True):
        answer = server.complete("the", max_tokens=40, seed=2, stop=["no such text", stop], stream=stream, logprobs=1)
        if stream:
            text, columns, end, _ = joined(answer)
            tokens = columns["tokens"]
        else:
            text, end, tokens = (
                answer.choices[0].text,
                answer.choices[0].finish_reason,
                answer.choices[0].logprobs.tokens,
            )
        assert (text, end) == (whole[:cut], "stop")
        assert tokens == names(ids)[: len(tokens)]
        assert len(tokens) >= cut, "each character is a token or several"
    echoed = server.complete(f"the{stop}", max_tokens=1, seed=2, stop=stop, echo=True)
    assert echoed.choices[0].text.startswith(f"the{stop}"), "in a prompt it stops nothing"


def test_stop_tokens(server, generated):
    ((tokens, *_),) = generated(["the"], 40, temperature=1.0, seed=2)
    first = tokens.index(tokens[5])
    answer = server.complete("the", max_tokens=40, seed=2, logprobs=0, stop_token_ids=[tokens[5]])
    assert answer.choices[0].logprobs.tokens == names(tokens[: first + 1])
    assert answer.choices[0].finish_reason == "stop"


# --- load and clients that leave ---


def test_a_hundred_streams_at_once_are_answered_or_refused(server):
    """Of twenty seeds: those with one seed say the same."""
    body = {"model": "run", "prompt": "the house", "max_tokens": 30, "stream": True, "ignore_eos": True}
    before = server.metrics()

    async def one(client, number):
        request = client.stream("POST", "/v1/completions", json={**body, "seed": number % 20})
        async with request as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        return number, answer.status_code, lines, answer.headers

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            return await asyncio.gather(*(one(client, number) for number in range(100)))

    texts, num_refused = {}, 0
    for number, status, lines, headers in asyncio.run(all_of_them()):
        if status == 429:
            assert "queue" in json.loads("".join(lines))["error"]["message"]
            assert headers["retry-after"] == "1"
            num_refused += 1
            continue
        assert (status, lines[-1]) == (200, "data: [DONE]")
        parts = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
        assert parts[-1]["finish_reason"] == "length"
        texts.setdefault(number % 20, set()).add("".join(part["text"] for part in parts))
    num_answered = 100 - num_refused
    assert num_answered >= ROWS + QUEUE
    assert num_refused > 0, "a hundred are more than there is room for"
    assert all(len(same) == 1 for same in texts.values())
    assert len({text for same in texts.values() for text in same}) == len(texts)
    after = server.wait_until(lambda now: now["rows_busy"] == 0)
    assert after["generated_tokens_total"] - before["generated_tokens_total"] == 30 * num_answered
    counted = [now['requests_total{path="/v1/completions",status="200"}'] for now in (before, after)]
    assert counted[1] - counted[0] == num_answered
    assert after['requests_total{path="/v1/completions",status="429"}'] == num_refused
    assert after["queue_length"] == after["kv_live_keys"] == after["kv_allocated_slots"] == 0


def test_who_leaves_frees_rows_places_and_keys(server):
    """Streams, and a client that waits for a whole answer; running ones, and ones that wait."""
    before = server.metrics()
    body = {"model": "run", "prompt": ["a"] * 3, **ENDLESS}
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}):
        found = server.wait_until(lambda now: now["rows_busy"] == 3 and now["kv_live_keys"] > 0)
        assert found["kv_live_keys"] <= found["kv_allocated_slots"] == ROWS * 16 * 4
        assert found["kv_allocated_bytes"] > 0
        impatient = httpx.Timeout(300, read=2)
        with pytest.raises(httpx.ReadTimeout):
            server.post({**body, "prompt": ["b"] * 4, "stream": False}, timeout=impatient)
    found = server.wait_until(lambda now: now["rows_busy"] == now["queue_length"] == 0)
    assert found["kv_live_keys"] == found["kv_allocated_slots"] == 0
    assert found['sequences_total{reason="cancelled"}'] - before.get('sequences_total{reason="cancelled"}', 0) == 7
    assert found["disconnects_total"] - before["disconnects_total"] == 2
    assert found["kv_evicted_keys_total"] > before["kv_evicted_keys_total"]
    assert server.complete("a", max_tokens=2).usage.completion_tokens == 2


# --- mistakes ---

TOO_LARGE = {"prompt": "a" * 30000}
MISTAKES = [
    (b"", 400, "no JSON"),
    (b"{", 400, "no JSON"),
    (b"\xff\xfe{}", 400, "UTF-8"),
    (b'{"prompt": "\xe2\x28"}', 400, "UTF-8"),
    (b"[" * 9000, 400, "nested too deeply|no JSON"),
    (b'{"prompt": "a", "seed": ' + b"9" * 9000 + b"}", 400, "no JSON|seed = "),
    (b'{"prompt": "a", "temperature": NaN}', 400, "NaN"),
    (b"null", 400, "object"),
    (b"[]", 400, "object"),
    ({}, 400, "prompt: it is missing"),
    ({"prompt": None}, 400, "prompt: it is missing"),
    ({"prompt": []}, 400, "prompt = "),
    ({"prompt": [[]]}, 400, "prompt = "),
    ({"prompt": [1, "a"]}, 400, "prompt = "),
    ({"prompt": [-1]}, 400, "prompt = "),
    ({"prompt": [True]}, 400, "prompt = "),
    ({"prompt": [999999]}, 400, "0 … 257"),
    ({"prompt": [1.5]}, 400, "prompt = "),
    ({"prompt": {"a": 1}}, 400, "prompt = "),
    ({"prompt": "\ud800"}, 400, "surrogate"),
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens = -1"),
    ({"prompt": "a", "max_tokens": 10**12}, 400, "max_tokens = "),
    ({"prompt": "a", "max_tokens": 29999}, 400, "30000"),
    ({"prompt": "a", "max_tokens": "7"}, 400, "max_tokens = '7'"),
    ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens = 1.5"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens = 0"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature = -1"),
    ({"prompt": "a", "temperature": 1e999}, 400, "Infinity|temperature"),
    ({"prompt": "a", "temperature": 10**400}, 400, "temperature = "),
    ({"prompt": "a", "top_p": 0}, 400, "top_p = 0"),
    ({"prompt": "a", "n": 0}, 400, "n = 0"),
    ({"prompt": "a", "n": 25}, 400, "room for 24"),
    ({"prompt": ["a"] * 99, "n": 9}, 400, "at most 128"),
    ({"prompt": "a", "best_of": 2}, 400, "best_of"),
    ({"prompt": "a", "logprobs": 6}, 400, "logprobs = 6"),
    ({"prompt": "a", "logprobs": True}, 400, "logprobs = True"),
    ({"prompt": "a", "echo": 1}, 400, "echo = 1"),
    ({"prompt": "a", "stop": ""}, 400, "stop = ''"),
    ({"prompt": "a", "stop": ["a"] * 17}, 400, "stop = "),
    ({"prompt": "a", "stop": [1]}, 400, "stop = "),
    ({"prompt": "a", "seed": -1}, 400, "seed = -1"),
    ({"prompt": "a", "suffix": "b"}, 400, "suffix = 'b'"),
    ({"prompt": "a", "logit_bias": {"1": 5}}, 400, "logit_bias"),
    ({"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty = 0.5"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream"),
    ({"prompt": "a", "stream": True, "stream_options": []}, 400, "stream_options"),
    ({"prompt": "a", "stop_token_ids": [300]}, 400, "stop_token_ids: there is no id 300"),
    ({"prompt": "a", "temprature": 1}, 400, "did you mean temperature"),
    ({"prompt": "a", "\u202e\n": 1}, 400, "unknown field"),
    ({"prompt": "a", "model": "gpt"}, 404, "no such model"),
    (TOO_LARGE, 413, "20000 bytes"),
]


def check_error(answer, status, sentence=""):
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert re.search(sentence, error["message"]), error
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("body", "status", "sentence"), MISTAKES, ids=lambda x: repr(x)[:40])
def test_a_mistake_is_a_sentence(server, body, status, sentence):
    check_error(server.post(body), status, sentence)


def test_a_large_body_is_not_read_though_its_size_is_not_told(server):
    check_error(server.http.post("/v1/completions", content=iter([b"a" * 9000] * 9)), 413)


FIELDS = ["prompt", "max_tokens", "n", "temperature", "top_p", "stop", "logprobs", "echo", "stream", "seed", "best_of"]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 300), max_size=4),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=9), LEAVES, max_size=4), is_cut=st.booleans())
def test_whatever_comes_is_answered_or_a_sentence(server, fields, is_cut):
    content = json.dumps(fields).encode()
    answer = server.post(content[: len(content) // 2] if is_cut else content)
    if answer.status_code == 200:
        assert "prompt" in fields
    else:
        check_error(answer, 400)


def test_connections_that_break_or_speak_no_http(server):
    for content in (
        b"\0\xff" * 100,
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(60)
            assert connection.recv(1000)[:13] in (b"", b"HTTP/1.1 400 ")
    assert server.http.get("/health").json() == {"status": "ok"}


def test_other_pages(server):
    assert [model.id for model in server.openai.models.list()] == ["run"]
    assert server.openai.models.retrieve("run").model_extra["max_model_len"] == 30000
    with pytest.raises(openai.NotFoundError, match="no such model"):
        server.openai.models.retrieve("a/b")
    check_error(server.http.get("/v1/completions"), 405, "POST")
    check_error(server.http.get("/nothing"), 404, "/v1/completions")
    assert server.http.get("/health").status_code == 200


# --- keys, and the end ---


def test_a_key_and_a_stop_that_waits_for_running_texts(text_run, tmp_path):
    """The second signal cuts off what is still running."""
    (tmp_path / "key").write_text("secret-key\n")
    server = Server(text_run, [*LONG, f"--api_key_file={tmp_path / 'key'}", "--model_name=org/name"])
    try:
        for key in ("", "Bearer no", "secret-key", "Bearer \xff"):
            check_error(server.http.get("/v1/models", headers={"authorization": key.encode("latin-1")}), 401, "key")
        check_error(server.post({"prompt": "a"}), 401)
        assert server.http.get("/health").status_code == server.http.get("/metrics").status_code == 200
        client = server.openai.with_options(api_key="secret-key")
        ask = {"model": "org/name", "prompt": "a", "stream": True, "temperature": 1.5}
        short = client.completions.create(**ask, max_tokens=60, extra_body={"ignore_eos": True})
        first = next(iter(short)).choices[0].text
        endless = client.completions.create(**{**ask, "max_tokens": 29000}, extra_body={"ignore_eos": True})
        next(iter(endless))
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: any("no more requests" in line for line in server.lines), server.process)
        rest = [part.choices[0] for part in short]
        assert rest[-1].finish_reason == "length", first
        wait_for(lambda: not can_connect(server.port), server.process)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="is being stopped"):
            list(endless)
    finally:
        log = server.end()
    assert "secret-key" not in log


def can_connect(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
