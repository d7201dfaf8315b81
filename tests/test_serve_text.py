"""Text that grows by tokens, and what is read of a request, without a server."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsjax.data.tokenizers import ByteTokenizer
from natsjax.decode.rows import MAX_LIKELIEST
from natsjax.errors import UserError
from natsjax.serve.completion import GrowingText
from natsjax.serve.errors import ApiError
from natsjax.serve.flags import API_KEY_VARIABLE, parse_serve_flags
from natsjax.serve.request import parse_request

TOKENIZER = ByteTokenizer()


def grown(tokens, stop, every, prompt=()):
    """Text in pieces that are taken after so many tokens each, the tokens that came with it, and whether it was cut."""
    text, pieces, shown = GrowingText(TOKENIZER, stop, counts=not prompt), [], []
    for token in prompt:
        text.add(token, 0.0)
    if prompt:
        text.begin_generated()
    for place, token in enumerate(tokens):
        text.add(token, -1.0)
        if (place + 1) % every == 0 or text.is_cut:
            piece, records = text.take()
            pieces.append(piece)
            shown += records
        if text.is_cut:
            return pieces, shown, True
    text.end()
    piece, records = text.take()
    return [*pieces, piece], shown + records, text.is_cut


def cut_by_definition(tokens, stop):
    """Where OpenAI cuts: with the token that completes the first stop string, before the first one that is complete."""
    for count in range(len(tokens) + 1):
        text = bytes(tokens[:count]).decode(errors="replace")
        # Half a character may still become one, so that it is no text yet.
        sure = text if count == len(tokens) else text.removesuffix("\ufffd")
        found = [sure.index(one) for one in stop if one in sure]
        if found:
            return sure[: min(found)], True
    return bytes(tokens).decode(errors="replace"), False


BYTES = st.lists(st.sampled_from(list("aböü€".encode())), max_size=12)
STOPS = st.lists(st.text("abö€\ufffd", min_size=1, max_size=3), max_size=3)


@given(BYTES, STOPS, st.integers(1, 5))
def test_a_text_is_cut_where_the_definition_cuts_however_it_is_taken(tokens, stop, every):
    expected, is_cut = cut_by_definition(tokens, stop)
    pieces, shown, was_cut = grown(tokens, stop, every)
    assert ("".join(pieces), was_cut) == (expected, is_cut)
    assert [record.text for record in shown] == [TOKENIZER_NAMES[token] for token in tokens[: len(shown)]]
    # That of the character that a token's first byte is in.
    begins = [len(bytes(tokens[: n + 1]).decode(errors="replace")) - 1 for n in range(len(shown))]
    assert [record.offset for record in shown] == begins
    assert all(offset < len(expected) for offset in begins), "a token behind the cut is not shown"
    if not is_cut:
        assert len(shown) == len(tokens)


TOKENIZER_NAMES = {byte: chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}" for byte in range(256)}


@given(BYTES, BYTES.filter(bool), STOPS)
def test_a_prompt_does_not_stop_its_own_text(tokens, prompt, stop):
    prompt = list(bytes(prompt).decode(errors="ignore").encode()) or [97]
    pieces, shown, was_cut = grown(tokens, stop, 2, prompt)
    expected, is_cut = cut_by_definition(tokens, stop)
    assert ("".join(pieces), was_cut) == (bytes(prompt).decode() + expected, is_cut)
    assert len(shown) >= len(prompt)


def test_what_may_become_a_stop_string_waits():
    text, given_out = GrowingText(TOKENIZER, ["END", "\n\n"]), []
    for token in b"anEN\nEND":
        text.add(token)
        given_out.append(text.take()[0])
    assert given_out == ["a", "n", "", "", "EN", "\n", "", ""]
    assert text.is_cut


class Ids:
    """A recall task's vocabulary: tokens stand for no text."""

    vocab_size = 9


def test_tokens_without_text_are_ids():
    text = GrowingText(Ids())
    for token in (3, 1, 4):
        text.add(token, -0.5)
    text.end()
    words, records = text.take()
    assert words == "3,1,4"
    assert [(record.text, record.offset) for record in records] == [("3", 0), ("1", 1), ("4", 3)]


def test_of_two_tokens_with_one_text_the_likelier_is_shown():
    text = GrowingText(TOKENIZER)
    text.add(97, -2.0, {257: -0.5, 200: -1.0})
    (record,) = text.take()[1]
    assert record.likeliest == {"⟨eos⟩": -0.5, "bytes:\\xc8": -1.0, "a": -2.0}


# --- requests ---


def test_fields_become_what_they_stand_for():
    asked = parse_request(
        json.dumps(
            {
                "model": "m",
                "prompt": [[1, 2], "a"],
                "max_tokens": 3,
                "n": 2,
                "best_of": 2,
                "echo": True,
                "logprobs": MAX_LIKELIEST,
                "stop": "x",
                "stream": True,
                "stream_options": {"include_usage": True},
                "temperature": 0,
                "top_p": 0.5,
                "top_k": 4,
                "min_p": 0.1,
                "seed": 9,
                "user": "u",
                "suffix": None,
                "presence_penalty": 0,
                "frequency_penalty": 0.0,
                "logit_bias": {},
                "ignore_eos": True,
                "stop_token_ids": [1],
            }
        ).encode()
    )
    assert (asked.prompts, asked.model, asked.max_tokens, asked.n) == (((1, 2), "a"), "m", 3, 2)
    assert (asked.echo, asked.logprobs, asked.stop, asked.stop_token_ids) == (True, 5, ("x",), (1,))
    assert (asked.stream, asked.include_usage, asked.ignore_eos, asked.has_seed) == (True, True, True, True)
    rule = asked.sampling
    assert (rule.temperature, rule.top_p, rule.top_k, rule.min_p, rule.seed) == (0, 0.5, 4, 0.1, 9)


def test_defaults_are_openai_s():
    asked = parse_request(b'{"prompt": ""}')
    assert (asked.prompts, asked.max_tokens, asked.n, asked.logprobs, asked.stop) == (("",), 16, 1, None, ())
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.has_seed, asked.stream) == (1.0, 1.0, False, False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted({"prompt", "stop", "n", "logprobs", "stream_options", "logit_bias", "seed", "top_k"}))


@given(st.dictionaries(NAMES | st.text(max_size=5), JSON, max_size=4) | JSON)
def test_any_json_is_a_request_or_a_sentence(value):
    error = None
    try:
        parse_request(json.dumps(value).encode())
    except ApiError as raised:
        error = raised
    if error is not None:
        assert error.status == 400
        assert error.message.endswith(".")
        assert len(error.message) < 400
        json.dumps(error.body)


@given(st.binary(max_size=30))
def test_any_bytes_are_a_request_or_a_sentence(content):
    with pytest.raises(ApiError):  # no request is so short
        parse_request(content)


# --- flags ---


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "printable"), (b"a b", "printable"), (b"\xff", "UTF-8"), (None, "cannot be read"), ("ö".encode(), "ASCII")],
)
def test_a_key_file_that_does_not_fit(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        parse_serve_flags(["--workdir=x", f"--api_key_file={tmp_path / 'key'}"])


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "of-the-environment")
    assert parse_serve_flags(["--workdir=x"])["api_key"] == "of-the-environment"
    (tmp_path / "key").write_text(" of-a-file\n")
    assert parse_serve_flags(["--workdir=x", f"--api_key_file={tmp_path / 'key'}"])["api_key"] == "of-a-file"
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    with pytest.raises(UserError, match=API_KEY_VARIABLE):
        parse_serve_flags(["--workdir=x"])
    monkeypatch.delenv(API_KEY_VARIABLE)
    assert parse_serve_flags(["--workdir=x"])["api_key"] is None
