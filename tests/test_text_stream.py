"""Text on its way to a person: whole characters, prompts in order, and nothing that a terminal would obey."""

import io

from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.data import BPETokenizer, ByteTokenizer
from natsjax.generate.text_stream import IdStream, Printer, TextStream

BPE = BPETokenizer.train(["köln là 😀😁 日本語 " * 20], 320)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    tokenizer=st.sampled_from([ByteTokenizer(), BPE]),
    text=st.text(max_size=12),
    noise=st.lists(st.binary(max_size=4), max_size=3),
)
def test_only_what_cannot_change_is_given_out(data, tokenizer, text, noise):
    """Whole characters and broken ones, cut anywhere: every piece stays, and at most one character waits."""
    tokens = tokenizer.encode(text).tolist()
    broken = [token for part in noise for token in part] + [tokenizer.eos_id]
    for token in broken:
        tokens.insert(data.draw(st.integers(0, len(tokens))), token)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    stream, given_out = TextStream(tokenizer), ""
    for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        given_out += stream.push(tokens[begin:end])
        so_far = tokenizer.decode(tokens[:end])
        assert given_out in (so_far, so_far[:-1])
        assert given_out == so_far or so_far.endswith("\N{REPLACEMENT CHARACTER}")
        assert tokenizer.decode(tokens).startswith(given_out)
    assert given_out + stream.push([], is_last=True) == tokenizer.decode(tokens)


def test_what_is_no_text_is_decoded_once(monkeypatch):
    """Bytes that never become a character: a client can send as many as a prompt may have."""
    looked_at, piece = [], ByteTokenizer.piece
    monkeypatch.setattr(ByteTokenizer, "piece", lambda self, token: looked_at.append(token) or piece(self, token))
    stream = TextStream(ByteTokenizer())
    assert "".join(stream.push([0x80]) for _ in range(300)) == "\N{REPLACEMENT CHARACTER}" * 299
    assert stream.push([], is_last=True) == "\N{REPLACEMENT CHARACTER}"
    assert len(looked_at) == 300


@given(parts=st.lists(st.lists(st.integers(0, 99), max_size=3), max_size=5))
def test_ids_get_commas_between_them(parts):
    stream = IdStream()
    tokens = [token for part in parts for token in part]
    assert "".join(stream.push(part) for part in parts) == ",".join(map(str, tokens))


def test_prompts_are_written_in_order_and_the_first_as_it_comes():
    stream = io.StringIO()
    printer = Printer(stream, ByteTokenizer(), [[256, 65], [256, 66], [256]], stop={0}, num_new=3, echo=True)
    printer.begin()
    assert stream.getvalue() == "==> 1 of 3 <==\nA"
    printer.add(1, [*b"xy"])
    printer.add(0, [0xC3])
    assert stream.getvalue() == "==> 1 of 3 <==\nA"  # half a character, and what is not its turn
    printer.add(0, [0xB6])
    assert stream.getvalue() == "==> 1 of 3 <==\nAö"
    printer.add(2, [*b"uvw"])
    printer.add(0, [0xC3])  # the third token ends it, whatever it is
    assert stream.getvalue() == "==> 1 of 3 <==\nAö\N{REPLACEMENT CHARACTER}\n\n==> 2 of 3 <==\nBxy"
    printer.add(1, [0])
    assert stream.getvalue().endswith("==> 2 of 3 <==\nBxy\0\n\n==> 3 of 3 <==\nuvw\n")


def test_a_terminal_gets_no_commands():
    stream = io.StringIO()
    stream.isatty = lambda: True
    printer = Printer(stream, ByteTokenizer(), [[256, 65]], stop=set(), num_new=6, echo=True)
    printer.begin()
    printer.add(0, [*b"\x1b[2J\r\n"])
    assert stream.getvalue() == "\x1b[1mA\x1b[0m␛[2J␍\n\n"
