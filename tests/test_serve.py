"""A real server process: OpenAI's client gets what the model draws, and nothing is lost under load or abuse."""

import asyncio
import concurrent.futures
import itertools
import json
import re
import signal
import socket
import threading
import time

import httpx
import jax
import numpy as np
import openai
import pytest
import rival_oracles
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import SLOW, Process, wait_for

from natsjax import generate
from natsjax.data.tokenizers import ByteTokenizer
from natsjax.decode.decoder import DecodeSettings
from natsjax.decode.sampling import Sampling, sample

NAME, KEY = "org/name", "secret-key"
ROWS, QUEUE, MAX_KV = 4, 20, 16
# With a limit of keys the buffer has one size, and texts can be long.
FLAGS = ["--port=0", f"--rows={ROWS}", f"--max_queue={QUEUE}", "--chunk=32", f"--max_kv={MAX_KV}", "--block=16"]
FLAGS += ["--max_length=30000", "--max_body=20000", f"--model_name={NAME}"]
ENDLESS = {"max_tokens": 29000, "ignore_eos": True}
BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """Untied, and with likely bytes and unlikely ones, or a greedy text would say one thing for ever."""

    def spread(parameters):
        return tiny.spread_scorer(parameters | {"unembedding": 4 * parameters["unembedding"]})

    config = tiny.config(model={"tie_embeddings": False}, data={"source": "none"})
    return tiny.make_export(tmp_path_factory.mktemp("text") / "run", config, ByteTokenizer(), spread)


class Server:
    """A server process, and clients of it."""

    def __init__(self, run, flags):
        words = ["-m", "natsjax.serve", f"--workdir={run.workdir.path}", *flags]
        self.process, self.lines = Process(*words), []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_for(lambda: any(" at http://" in line for line in self.lines), self.process)
        self.url = re.search(r"http://[\d.:]+", "".join(self.lines))[0]
        self.port = int(self.url.rpartition(":")[2])
        self.headers = {"authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(base_url=self.url, timeout=300, headers=self.headers)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=300)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def complete(self, prompt, **options):
        extra = {name: options.pop(name) for name in ("ignore_eos", "top_k", "stop_token_ids") if name in options}
        return self.openai.completions.create(model=NAME, prompt=prompt, extra_body=extra, **options)

    def post(self, body, **options):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post("/v1/completions", content=content, **options)

    def metrics(self):
        lines = httpx.get(f"{self.url}/metrics", timeout=300).text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix("natsjax_"): float(value) for name, _, value in pairs}

    def wait_until(self, what):
        deadline = time.monotonic() + 240
        while not what(found := self.metrics()):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def end(self):
        """Stops it; its log has no traceback."""
        self.http.close()
        self.openai.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(240) == 0
        self._reader.join()
        self.process.close()
        log = "".join(self.lines)
        assert log.count("\n") == 4, f"a warning of long texts, the address, the signal and the end, not {log}"
        assert KEY not in log


@pytest.fixture(scope="module")
def servers(text_run, tmp_path_factory):
    """Starts a server where there is none."""
    running, key = [], tmp_path_factory.mktemp("key") / "key"
    key.write_text(f"{KEY}\n")

    def one():
        if not running or running[-1].process.poll() is not None:
            running.append(Server(text_run, [*FLAGS, f"--api_key_file={key}"]))
        return running[-1]

    yield one
    for server in running:
        server.end()


@pytest.fixture
def server(servers):
    """The process that all tests here share; a fresh one behind the test that ends it."""
    return servers()


@pytest.fixture(scope="module")
def model(text_run):
    return rival_oracles.NumpyModel(text_run.config, text_run.parameters)


def logprobs_of(model, prompt, tokens):
    """float64 ``[t, v]``, what precedes each of these tokens; a prompt is read at once."""
    read = [*prompt, *tokens[:-1]]
    found, _ = rival_oracles.limited(model, read, [len(prompt), *[1] * (len(tokens) - 1)], MAX_KV)
    return found[len(prompt) - 1 :]


draw = jax.jit(sample, static_argnames="kind")


def check_drawn(model, prompt, tokens, logprobs, number=0, **rule):
    """The tokens are draws from the log-probabilities of the model, in numpy, and have these."""
    prompt = [BOS, *prompt.encode()] if isinstance(prompt, str) else prompt
    own, count, longest = logprobs_of(model, prompt, tokens), len(tokens), 40
    logits = np.pad(np.float32(own), [(0, longest - count), (0, 0)])
    sampling = Sampling(**rule)
    at = len(prompt) + np.arange(longest)
    drawn, _ = draw(logits, np.full(longest, number), at, kind=sampling.kind, numbers=sampling.numbers)
    assert tokens == drawn[:count].tolist()
    np.testing.assert_allclose(logprobs, own[np.arange(count), tokens], atol=1e-4)


def names(tokens):
    """Bytes as OpenAI's log-probabilities have them."""
    special = {BOS: "⟨bos⟩", EOS: "⟨eos⟩"}
    return [special.get(x) or (chr(x) if x < 128 else f"bytes:\\x{x:02x}") for x in tokens]


IDS = dict(zip(names(range(258)), range(258), strict=True))


def ids(named):
    return [IDS[name] for name in named]


def text_of(tokens):
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


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

RULES = [
    {"temperature": 1.5, "top_p": 0.9, "seed": 6},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 40, "seed": 7},
]
PROMPTS = ["köln was", "", "the house", "là", "a"]


def test_texts_are_the_model_s_draws_whatever_else_is_in_the_loop(server, model):
    """Rows with rules of their own come and go beside each other, some streamed."""
    asked = [(prompt, RULES[n % 4], 40 - n) for n, prompt in enumerate(PROMPTS * 2)]

    def answered(prompt, rule, count, stream):
        answer = server.complete(prompt, max_tokens=count, logprobs=0, stream=stream, **rule)
        if stream:
            text, columns, end, parts = joined(answer)
            assert parts > 1
            return text, columns["tokens"], columns["token_logprobs"], columns["text_offset"], end, None
        choice, found = answer.choices[0], answer.choices[0].logprobs
        return choice.text, found.tokens, found.token_logprobs, found.text_offset, choice.finish_reason, answer.usage

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        results = list(pool.map(lambda n: answered(*asked[n], stream=n % 3 == 0), range(len(asked))))
    for (prompt, rule, count), (text, named, logprobs, offsets, end, usage) in zip(asked, results, strict=True):
        tokens = ids(named)
        check_drawn(model, prompt, tokens, logprobs, **rule)
        assert text == text_of(tokens)
        assert (end, len(tokens)) == ("length", count) or (end, tokens[-1], EOS in tokens[:-1]) == ("stop", EOS, False)
        begins = [(n, len(text_of(tokens[: n + 1])) - 1) for n, token in enumerate(tokens) if token < 256]
        assert [offsets[n] for n, _ in begins] == [begin for _, begin in begins]
        if usage is not None:
            assert (usage.prompt_tokens, usage.completion_tokens) == (1 + len(prompt.encode()), len(tokens))


@pytest.mark.slow
def test_the_text_is_that_of_the_command(server, text_run):
    """``python -m natsjax.generate --prompt=… --seed=5 --temperature=1 --max_kv=16``."""
    found = generate.run(
        text_run.workdir.path,
        PROMPTS,
        max_new_tokens=40,
        sampling=Sampling(**RULES[1]),
        settings=DecodeSettings(chunk=32, max_kv=MAX_KV, block=16),
        batch_size=len(PROMPTS),
        loaded=text_run,
    )
    answer = server.complete(PROMPTS, max_tokens=40, **RULES[1])
    assert [choice.text for choice in answer.choices] == found.texts


def test_several_texts_of_a_prompt_are_draws_with_numbers(server, model):
    rule = {"temperature": 2.0, "seed": 3}
    answer = server.complete([[BOS, 97, 98], [BOS, 99]], n=3, max_tokens=6, logprobs=0, **rule)
    for number, choice in enumerate(answer.choices):
        prompt, found = [[BOS, 97, 98], [BOS, 99]][number // 3], choice.logprobs
        check_drawn(model, prompt, ids(found.tokens), found.token_logprobs, number, **rule)
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


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_prompt_and_text_are_the_model_s_own(server, model, stream):
    """The prompt's first byte has one too, behind the BOS that the server adds; greedy."""
    options = {"echo": True, "logprobs": 5, "temperature": 0, "max_tokens": 6}
    if stream:
        text, columns, *_ = joined(server.complete("köln", stream=True, **options))
        tokens, logprobs, offsets = (columns[name] for name in ("tokens", "token_logprobs", "text_offset"))
    else:
        choice = server.complete("köln", **options).choices[0]
        text, tokens = choice.text, choice.logprobs.tokens
        logprobs, offsets = choice.logprobs.token_logprobs, choice.logprobs.text_offset
    whole = ids(tokens)
    own = logprobs_of(model, [BOS], whole)  # no key of so few is lost
    assert text == text_of(whole)
    assert tokens[:5] == names("köln".encode())
    assert whole[5:] == own[5:].argmax(-1).tolist()
    assert offsets[:6] == [0, 1, 1, 2, 3, 4], "half a character begins where the character does"
    np.testing.assert_allclose(logprobs, own[np.arange(len(whole)), whole], atol=1e-4)
    if not stream:
        for step, best in enumerate(choice.logprobs.top_logprobs):
            assert best[tokens[step]] == pytest.approx(logprobs[step], abs=1e-6), "the token itself is among them"
            values = sorted(best.values(), reverse=True)[:5]
            np.testing.assert_allclose(values, np.sort(own[step])[::-1][:5], atol=1e-4)


def test_a_prompt_of_ids_is_scored_alone(server, model):
    """As lm-eval asks: no new token, and none has a log-probability that nothing precedes."""
    prompt = [BOS, 97, 98, 99]
    answer = server.complete(prompt, echo=True, logprobs=1, max_tokens=0)
    logprobs = answer.choices[0].logprobs
    assert (answer.choices[0].text, logprobs.tokens) == ("abc", ["⟨bos⟩", "a", "b", "c"])
    assert logprobs.token_logprobs[0] is None
    own = logprobs_of(model, prompt[:1], prompt[1:])
    np.testing.assert_allclose(logprobs.token_logprobs[1:], own[range(3), prompt[1:]], atol=1e-4)
    assert answer.usage.completion_tokens == 0


def test_stop_strings_and_tokens_cut(server):
    """Of a text that has been asked for whole."""
    options = {"max_tokens": 40, "seed": 2, "ignore_eos": True, "logprobs": 0}
    choice = server.complete("the", **options).choices[0]
    whole, tokens = choice.text, choice.logprobs.tokens
    assert (len(tokens), choice.finish_reason) == (40, "length")
    stop = whole[9:11]
    cut = whole.index(stop)
    for stream in (False, True):
        answer = server.complete("the", stop=["no such text", stop], stream=stream, **options)
        if stream:
            text, columns, end, _ = joined(answer)
            shown = columns["tokens"]
        else:
            (choice,) = answer.choices
            text, end, shown = choice.text, choice.finish_reason, choice.logprobs.tokens
        assert (text, end) == (whole[:cut], "stop")
        assert shown == tokens[: len(shown)]
        assert len(shown) >= cut, "each character is a token or several"
    echoed = server.complete(f"the{stop}", max_tokens=1, seed=2, stop=stop, echo=True)
    assert echoed.choices[0].text.startswith(f"the{stop}"), "in a prompt it stops nothing"
    (last,) = ids(tokens[5:6])
    choice = server.complete("the", stop_token_ids=[last], **options).choices[0]
    assert choice.logprobs.tokens == tokens[: tokens.index(tokens[5]) + 1]
    assert choice.finish_reason == "stop"


# --- load and clients that leave ---


def test_many_streams_at_once_are_answered_or_refused(server):
    """While all rows are taken, as many wait as there are places; of those with one seed all get the same text."""
    count, seeds, num_tokens = 100 if SLOW else 30, 7, 30 if SLOW else 12
    body = {"model": NAME, "prompt": "the house", "stream": True, "ignore_eos": True}
    before = server.metrics()

    async def one(client, number):
        asked = {"max_tokens": num_tokens, "stream_options": {"include_usage": True}, "seed": number % seeds}
        async with client.stream("POST", "/v1/completions", json=body | asked) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        return number, answer.status_code, lines, answer.headers

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        client = httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, headers=server.headers)
        async with client:
            async with client.stream("POST", "/v1/completions", json=body | ENDLESS | {"prompt": ["a"] * ROWS}):
                await asyncio.to_thread(server.wait_until, lambda now: now["rows_busy"] == ROWS)
                answers = [asyncio.ensure_future(one(client, number)) for number in range(count)]
                for answer in itertools.islice(asyncio.as_completed(answers), count - QUEUE):
                    assert (await answer)[1] == 429
            return await asyncio.gather(*answers)

    texts, num_refused = {}, 0
    for number, status, lines, headers in asyncio.run(all_of_them()):
        if status == 429:
            assert "queue" in json.loads("".join(lines))["error"]["message"]
            assert headers["retry-after"] == "1"
            num_refused += 1
            continue
        assert (status, lines[-1]) == (200, "data: [DONE]")
        *parts, last = (json.loads(line.removeprefix("data: ")) for line in lines[:-1])
        assert parts[-1]["choices"][0]["finish_reason"] == "length"
        assert last["usage"]["completion_tokens"] == num_tokens
        texts.setdefault(number % seeds, set()).add("".join(part["choices"][0]["text"] for part in parts))
    assert num_refused == count - QUEUE
    assert all(len(same) == 1 for same in texts.values())
    assert len({text for same in texts.values() for text in same}) == len(texts) == seeds
    after = server.wait_until(lambda now: now["rows_busy"] == 0)
    counted = [now.get('requests_total{path="/v1/completions",status="200"}', 0) for now in (before, after)]
    assert counted[1] - counted[0] == QUEUE + 1
    counted = [now.get('requests_total{path="/v1/completions",status="429"}', 0) for now in (before, after)]
    assert counted[1] - counted[0] == num_refused
    assert after["queue_length"] == after["kv_live_keys"] == after["kv_allocated_slots"] == 0


def test_who_leaves_frees_rows_places_and_keys(server):
    """Streams, and a client that waits for a whole answer; running ones, and ones that wait."""
    before = server.metrics()
    body = {"model": NAME, "prompt": ["a"] * 3, **ENDLESS}
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}):
        found = server.wait_until(lambda now: now["rows_busy"] == 3 and now["kv_live_keys"] > 0)
        assert found["kv_live_keys"] <= found["kv_allocated_slots"] == ROWS * MAX_KV * 4
        assert found["kv_allocated_bytes"] > 0
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            impatient = pool.submit(server.post, {**body, "prompt": ["b"] * 4}, timeout=httpx.Timeout(300, read=2))
            server.wait_until(lambda now: now["rows_busy"] == ROWS and now["queue_length"] == 3)
            server.wait_until(lambda now: now["kv_evicted_keys_total"] > before["kv_evicted_keys_total"])
            with pytest.raises(httpx.ReadTimeout):
                impatient.result()
    found = server.wait_until(lambda now: now["rows_busy"] == now["queue_length"] == 0)
    assert found["kv_live_keys"] == found["kv_allocated_slots"] == 0
    assert found['sequences_total{reason="cancelled"}'] - before.get('sequences_total{reason="cancelled"}', 0) == 7
    assert found["disconnects_total"] - before["disconnects_total"] == 2
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


@settings(max_examples=150 if SLOW else 50, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    assert [model.id for model in server.openai.models.list()] == [NAME]
    assert server.openai.models.retrieve(NAME).model_extra["max_model_len"] == 30000
    with pytest.raises(openai.NotFoundError, match="no such model"):
        server.openai.models.retrieve("a/b")
    check_error(server.http.get("/v1/completions"), 405, "POST")
    check_error(server.http.get("/nothing"), 404, "/v1/completions")
    assert server.http.get("/health").status_code == 200


# --- keys, and the end ---


def test_a_key(server):
    for key in ("", "Bearer no", KEY, f"Bearer {KEY}x", "Bearer \xff"):
        for method, path in (("GET", "/v1/models"), ("GET", f"/v1/models/{NAME}"), ("POST", "/v1/completions")):
            check_error(server.http.request(method, path, headers={"authorization": key.encode("latin-1")}), 401, "key")
    for path in ("/health", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200


def test_a_stop_waits_for_running_texts(server):
    """The second signal cuts off what is still running."""
    ask = {"prompt": "a", "stream": True, "temperature": 1.5, "ignore_eos": True}
    short = server.complete(max_tokens=60, **ask)
    first = next(iter(short)).choices[0].text
    endless = server.complete(max_tokens=29000, **ask)
    next(iter(endless))
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: any("no more requests" in line for line in server.lines), server.process)
    rest = [part.choices[0] for part in short]
    assert rest[-1].finish_reason == "length", first
    wait_for(lambda: not can_connect(server.port), server.process)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="is being stopped"):
        list(endless)
    assert server.process.wait(240) == 0


def can_connect(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
