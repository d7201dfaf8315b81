"""Our own tokenizers: deterministic, refusing what is not theirs. (What all do: test_data_pretrained_tokenizer.py.)"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsjax.data import BPETokenizer, ByteTokenizer, load_tokenizer
from natsjax.data.tokenizers import bpe
from natsjax.data.tokenizers.bpe import LONGEST_TRAINING_WORD
from natsjax.errors import UserError

TEXTS = [
    "the cat sat on the mat, and the dog sat on the cat",
    "naïve café — 東京 🙂\r\n\ttabs and\u00a0spaces   \n",
    "<|bos|><s></s>⟨bos⟩ looks like a special token and is none",
] * 3

BYTE = ByteTokenizer()
BPE = BPETokenizer.train(TEXTS, vocab_size=300)


def test_partial_utf8_is_shown_in_hex_and_decoded_with_a_replacement():
    euro = BYTE.encode("€")
    assert [BYTE.token_text(int(token)) for token in euro] == ["⟨e2⟩", "⟨82⟩", "⟨ac⟩"]
    assert BYTE.decode(euro[:2]) == "\ufffd"
    assert BYTE.token_text(ord("a")) == "a"


def test_bpe_joins_frequent_pairs_and_is_deterministic():
    assert BPE.vocab_size == 300
    assert len(BPE.encode("the cat")) < len("the cat")
    assert " the" in {BPE.token_text(token) for token in range(BPE.vocab_size)}
    again = BPETokenizer.train(iter(TEXTS), vocab_size=300)
    assert again.fingerprint == BPE.fingerprint
    assert BPETokenizer.train(TEXTS, vocab_size=301).fingerprint != BPE.fingerprint
    assert BYTE.fingerprint != BPE.fingerprint


def test_little_text_gives_a_smaller_vocabulary_that_still_encodes_everything():
    tokenizer = BPETokenizer.train(["ab"], vocab_size=1000)
    assert tokenizer.vocab_size == 256 + 1 + 2  # one merge to learn
    assert tokenizer.decode(tokenizer.encode("東京 ab")) == "東京 ab"


def test_vocabulary_too_small_for_bytes():
    with pytest.raises(UserError, match=r"vocab_size = 257.*at least 258"):
        BPETokenizer.train(TEXTS, vocab_size=257)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_version": 7}, "format_version 7, but this natsjax reads version 1"),
        ({"kind": "wordpiece"}, "kind 'wordpiece'; known are"),
        ({"fingerprint": "0" * 64}, "was changed: its fingerprint is .* was written for 000000000000"),
    ],
)
def test_a_description_that_does_not_fit(tmp_path, changes, sentence):
    BPE.save(tmp_path)
    path = tmp_path / "natsjax_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_files(tmp_path):
    BPE.save(tmp_path)
    definition = (tmp_path / "tokenizer.json").read_text()
    for damaged in ("{", "[]", "{}", definition.replace('"merges"', '"mergers"')):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)
    other = BPETokenizer.train(TEXTS, vocab_size=280)
    other.save(tmp_path / "other")
    (tmp_path / "tokenizer.json").write_text((tmp_path / "other" / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="was changed"):
        load_tokenizer(tmp_path)


def test_training_cuts_long_words_and_encoding_does_not():
    """The time of training is quadratic in the longest word: DNA has only one."""
    tokenizer = BPETokenizer.train(["a" * 100_000], vocab_size=300)
    assert tokenizer.token_bytes.max() == LONGEST_TRAINING_WORD == 256
    assert len(tokenizer.encode("a" * 1024)) == 4
    wide = BPETokenizer.train(["東" * 10_000], vocab_size=300)  # characters are not cut in two
    assert "東" * 256 in {wide.token_text(token) for token in range(wide.vocab_size)}


def test_tokenizers_of_ordinary_text_are_what_they_always_were():
    """Of the version before words were cut, so that what was trained then is what is trained today."""
    assert BPE.fingerprint == "1b0f151a2f3779bd4aec1177d62991e7b0cf9cfb20d316c25b187f000a563f96"


@given(words=st.lists(st.from_regex(r"[^\s\w]{0,3}[\w東ö]{0,9}'?[a-z0-9é京]", fullmatch=True)), data=st.data())
def test_a_long_text_is_encoded_as_if_it_were_in_one_piece(words, data):
    spaces = [data.draw(st.sampled_from([" ", "  ", "\n", "\t \r\n", " \u3000"])) for _ in words]
    text = "".join(word + space for word, space in zip(words, spaces, strict=True))
    (whole,) = BPE._encode_batch([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "_LONGEST_PART", 20)
        assert BPE.encode(text).tolist() == whole.tolist()
        assert BPE.encode_batch(["x", text])[1].tolist() == whole.tolist()
        assert BPE.decode(BPE.encode("ACGT" * 50)) == "ACGT" * 50
