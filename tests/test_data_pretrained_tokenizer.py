"""All tokenizers: no special id from any text, honest bytes. Others' files: their library's ids, mistakes in a line."""

import base64
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from natsjax.data import (
    BPETokenizer,
    ByteTokenizer,
    Corpus,
    HuggingFaceTokenizer,
    Tokenizer,
    Vocabulary,
    is_tokenizer_of,
    load_tokenizer,
)
from natsjax.data.prepare import prepare
from natsjax.data.tokenizers import pretrained, tiktoken_patterns
from natsjax.errors import UserError
from natsjax.generate.text_stream import TextStream

sentencepiece = pytest.importorskip("sentencepiece")
tiktoken = pytest.importorskip("tiktoken")
regex = pytest.importorskip("regex")
openai_public = pytest.importorskip("tiktoken_ext.openai_public")

TEXTS = [
    "the cat sat on the mat, and the dog sat on the cat",
    "naïve café — 東京 🙂\r\n\ttabs and\u00a0spaces   \n",
    "0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ <>|/[]_",
] * 5
SPELLED = ["<s>", "</s>", "<pad>", "<unk>", "[CLS]", "[SEP]", "[UNK]", "<|endoftext|>", "<0x41>", "##a", "a</w>"]
SPELLED += ["▁", "  ", "<|bos|>", "⟨bos⟩"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def _bpe(pre_tokenizer, decoder, special, normalizer=None, alphabet=(), suffix=None, **model):
    end = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = tokenizers.Tokenizer(models.BPE(**model, **end))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    common = {"vocab_size": 450, "initial_alphabet": list(alphabet), "show_progress": False}
    trainer = trainers.BpeTrainer(special_tokens=special, **common, **end)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _byte_level(special, add_prefix_space=False):
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer = _bpe(pre_tokenizer, decoders.ByteLevel(), special, alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_tokens(["<tool>"])  # not special: text that spells it may give it
    return tokenizer


def _roberta():
    tokenizer = _byte_level(["<s>", "<pad>", "</s>"], add_prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    return tokenizer


def _llama():
    """Spaces as ▁, one before each text, and bytes to fall back on, as in Llama 2's tokenizer.json."""
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = _bpe(None, decoder, special, normalizer, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    definition = json.loads(tokenizer.to_str())
    size = len(definition["model"]["vocab"])
    definition["model"]["vocab"] |= {token: size + place for place, token in enumerate(BYTES)}
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def _unigram():
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.normalizer = normalizers.NFKC()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _suffix():
    decoder, special = decoders.BPEDecoder("</w>"), ["<unk>", "</s>"]
    return _bpe(pre_tokenizers.Whitespace(), decoder, special, suffix="</w>", unk_token="<unk>")


def _word_piece():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _word_level():
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sentence_piece(model_type, vocab_size=420, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def ranks_file(ranks):
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks)


def _ranks():
    trained = BPETokenizer.train(TEXTS, 330)
    pieces = [bytes(trained._pieces[token]) for token in range(trained.vocab_size - 2)]
    return list(zip(pieces, range(len(pieces)), strict=True))


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
# name -> (file, how to make it, ids of BOS and EOS counted from the end where negative)
MADE = {
    "byte_level": ("tokenizer.json", lambda: _byte_level(["<|endoftext|>", "<pad>"]), (0, 0)),
    "byte_level_no_specials": ("tokenizer.json", lambda: _byte_level([]), (-2, -1)),
    "roberta": ("tokenizer.json", _roberta, (0, 2)),
    "llama": ("tokenizer.json", _llama, (1, 2)),
    "unigram": ("tokenizer.json", _unigram, (1, 2)),
    "word_piece": ("tokenizer.json", _word_piece, (2, 3)),
    "word_level": ("tokenizer.json", _word_level, (1, 2)),
    "suffix": ("tokenizer.json", _suffix, (-1, 1)),
    "sp_unigram": ("x.model", lambda: _sentence_piece("unigram", 90), (1, 2)),
    "sp_bpe": ("x.model", lambda: _sentence_piece("bpe", 90, bos_id=-1, user_defined_symbols=["<pad>"]), (-1, 2)),
    "sp_unigram_bytes": ("x.model", lambda: _sentence_piece("unigram", byte_fallback=True, **IDENTITY), (1, 2)),
    "sp_bpe_bytes": ("x.model", lambda: _sentence_piece("bpe", byte_fallback=True, **IDENTITY), (1, 2)),
    "sp_no_space": (
        "x.model.v3",
        lambda: _sentence_piece("bpe", byte_fallback=True, add_dummy_prefix=False, **IDENTITY),
        (1, 2),
    ),
    "tiktoken": ("x.tiktoken", lambda: ranks_file(_ranks()), (-2, -1)),
    "llama3": ("tokenizer.model", lambda: ranks_file(_ranks()), (-2, -1)),
}
OWN = {"byte": ByteTokenizer(), "bpe": BPETokenizer.train(TEXTS, vocab_size=300)}  # with BOS and EOS at the end
# All text comes back; a space is put before it by some; what spells a space or a byte as the vocabulary does, does not.
LOSSLESS = {
    "byte": (False, ()),
    "bpe": (False, ()),
    "byte_level": (False, ()),
    "byte_level_no_specials": (False, ()),
    "tiktoken": (False, ()),
    "llama3": (False, ()),
    "llama": (True, ("▁",)),
    "sp_unigram_bytes": (True, ("▁",)),
    "sp_bpe_bytes": (True, ("▁",)),
    "sp_no_space": (False, ("▁",)),
}

valid_text = st.text(st.characters(exclude_categories=["Cs"]))
tricky_text = st.lists(st.one_of(valid_text, st.sampled_from(SPELLED), st.sampled_from([*TEXTS[:3], " "]))).map("".join)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@functools.cache
def content(name):
    made = MADE[name][1]()
    return made if isinstance(made, bytes) else made.to_str().encode()


def write(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE[name][0]).write_bytes(content(name))
    return folder / MADE[name][0]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return functools.cache(lambda name: OWN.get(name) or load_tokenizer(write(name, tmp_path_factory.mktemp(name))))


every = pytest.mark.parametrize("name", [*MADE, *OWN])
every_file = pytest.mark.parametrize("name", MADE)


def _specials(tokenizer):
    return {tokenizer.bos_id, tokenizer.eos_id} | {
        token
        for token in range(tokenizer.vocab_size)
        if tokenizer.token_text(token) in ("<s>", "</s>", "[CLS]", "[SEP]", "[PAD]", "<|endoftext|>")
        or (tokenizer.token_text(token) == "<pad>" and tokenizer.token_bytes[token] == 0)
    }


@every
def test_protocol_and_special_ids(opened, name):
    tokenizer = opened(name)
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(tokenizer, Vocabulary)
    places = (-2, -1) if name in OWN else MADE[name][2]
    bos, eos = ((place + tokenizer.vocab_size) % tokenizer.vocab_size for place in places)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int32
    assert not tokenizer.token_bytes[list(_specials(tokenizer))].any()
    assert name not in OWN or (tokenizer.token_bytes[:-2] > 0).all()
    assert [tokenizer.token_text(id) for id in (bos, eos)] == (["⟨bos/eos⟩"] * 2 if bos == eos else ["⟨bos⟩", "⟨eos⟩"])
    assert all(tokenizer.token_text(token) for token in range(tokenizer.vocab_size))
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.bos_id]) == ""
    for outside in (-1, tokenizer.vocab_size):
        for call in (tokenizer.token_text, lambda token: tokenizer.decode([token])):
            with pytest.raises(IndexError, match=str(outside)):
                call(outside)


@every
@quick
@given(texts=st.lists(tricky_text, min_size=1, max_size=3))
def test_no_text_gives_a_special_id_and_bytes_are_those_that_come_back(opened, name, texts):
    tokenizer = opened(name)
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert not _specials(tokenizer) & set(ids.tolist())
        assert tokenizer.token_bytes[ids].sum() == len(tokenizer.decode(ids).encode())


@pytest.mark.parametrize("name", LOSSLESS)
@quick
@given(text=tricky_text)
def test_lossless_tokenizers_give_back_every_text(opened, name, text):
    adds_space, lost = LOSSLESS[name]
    for sequence in lost:
        text = text.replace(sequence, "")
    tokenizer = opened(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == text
    assert tokenizer.decode(ids) == (" " if adds_space and text else "") + text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + (adds_space and text != "")


@every_file
def test_ids_are_those_of_the_library(opened, name):
    texts = [*TEXTS[:3], "an unseen sentence, with  spaces", ""]
    if MADE[name][0].endswith(".json"):
        library = tokenizers.Tokenizer.from_str(content(name).decode())
        library.no_truncation(), library.no_padding()
        expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    elif name.startswith("sp_"):
        library = sentencepiece.SentencePieceProcessor(model_proto=content(name))
        expected = library.encode(texts, out_type=int)
    else:
        return  # the property above says it all: tiktoken is called as it is
    assert [ids.tolist() for ids in opened(name).encode_batch(texts)] == expected


@every
def test_text_streams_with_its_spaces(opened, name):
    tokenizer = opened(name)
    ids = tokenizer.encode(TEXTS[0]).tolist()
    stream = TextStream(tokenizer)
    streamed = "".join(stream.push([token]) for token in ids) + stream.push([], is_last=True)
    assert streamed == tokenizer.decode(ids)
    assert " sat on the" in streamed


@every
def test_save_load_and_pickle_keep_everything(opened, name, tmp_path):
    tokenizer = opened(name)
    tokenizer.save(tmp_path / "deep" / "folder")
    shutil.move(tmp_path / "deep", tmp_path / "moved")
    for copy in (load_tokenizer(tmp_path / "moved" / "folder"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.kind == tokenizer.kind
        assert copy.fingerprint == tokenizer.fingerprint
        assert (copy.vocab_size, copy.bos_id, copy.eos_id) == (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        assert copy.token_bytes.tolist() == tokenizer.token_bytes.tolist()
        assert [copy.encode(text).tolist() for text in TEXTS] == [tokenizer.encode(text).tolist() for text in TEXTS]
    if name in MADE:
        again = load_tokenizer(write(name, tmp_path / "again").parent)  # the folder, where it is the only tokenizer
        assert again.fingerprint == tokenizer.fingerprint


def test_fingerprints_tell_tokenizers_apart(opened):
    prints = {name: opened(name).fingerprint for name in [*MADE, *OWN]}
    assert prints.pop("llama3") == prints["tiktoken"]  # the same ranks under another name
    assert len(set(prints.values())) == len(prints)


@every_file
def test_damaged_files_get_one_sentence(name, tmp_path):
    whole = content(name)
    file = write(name, tmp_path)
    for share in (0, 0.2, 0.5, 0.9):
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=re.escape(str(file))) as caught:
            load_tokenizer(file)
        assert "\n" not in str(caught.value)


@every_file
@quick
@given(data=st.data())
def test_changed_bytes_never_cause_a_traceback(name, tmp_path, data):
    damaged = bytearray(content(name))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1) | st.sampled_from([b'"', b"1", b"[", b" "]))
    file = tmp_path / MADE[name][0]
    file.write_bytes(damaged)
    try:
        tokenizer = load_tokenizer(file)
    except UserError:
        return
    tokenizer.decode(tokenizer.encode(TEXTS[0]))


@every_file
def test_changed_saved_files_are_noticed(opened, name, tmp_path):
    opened(name).save(tmp_path)
    description = json.loads((tmp_path / "natsjax_tokenizer.json").read_text())
    file = next(file for file in tmp_path.iterdir() if file.name != "natsjax_tokenizer.json")
    other = {"huggingface": "roberta", "sentencepiece": "sp_unigram"}.get(description["kind"])
    ranks = _ranks()
    changed = content(other) if other else ranks_file([*ranks[:-2], (ranks[-1][0], len(ranks) - 2)])
    file.write_bytes(changed + (b"" if name != other else b" "))
    if name != other:
        with pytest.raises(UserError, match=r"was changed|cannot be BOS|damaged"):
            load_tokenizer(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "caveat"),
    [
        ("byte_level", ""),
        ("tiktoken", "file does not define how text is split before BPE, and the pattern of cl100k (GPT-4) is assumed"),
        ("sp_no_space", "it does not decode every text to what it was ('a▁b' is decoded as 'a b')"),
        ("sp_bpe_bytes", "it puts a space before each document, which counts as a byte of it, and it does not decode"),
        ("word_piece", "('The cat sat.' is decoded as 'the cat sat "),
        ("unigram", "it puts a space before each document, which counts as a byte of it, and it does not decode"),
    ],
)
def test_what_is_lost_is_said_once_when_a_tokenizer_is_opened(opened, tmp_path, caplog, monkeypatch, name, caveat):
    monkeypatch.setattr(pretrained, "_warned", set())
    file = write(name, tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tokenizer = load_tokenizer(file)
        tokenizer.save(tmp_path / "saved")
        load_tokenizer(tmp_path / "saved")
    assert caveat in tokenizer.caveat
    assert len(caplog.records) == bool(caveat)
    assert not caveat or f"The tokenizer {file}: " in caplog.text


@pytest.mark.parametrize(
    ("declaration", "ids"),
    [
        ({"bos_token": "</s>", "eos_token": {"content": "<s>", "lstrip": False}}, (2, 0)),
        ({"bos_token": None, "eos_token": "<pad>"}, (-1, 1)),
        ({"bos_token": "the"}, ("the", 2)),  # in the vocabulary, but no special token until now
        ({"bos_token": "<nothing of the kind>"}, (-1, 2)),
    ],
)
def test_declared_bos_and_eos_go_before_usual_names(tmp_path, declaration, ids):
    file = write("roberta", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<pad>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declaration))
    tokenizer = load_tokenizer(file)
    vocabulary = json.loads(content("roberta"))["model"]["vocab"]
    bos, eos = (vocabulary[place] if isinstance(place, str) else place % tokenizer.vocab_size for place in ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    assert not {bos, eos} & set(tokenizer.encode("the <s> the </s><pad>, the").tolist())
    assert "the" in tokenizer.decode(tokenizer.encode("in the end, the"))
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_a_model_that_knows_its_special_tokens_by_heart_gives_none_of_them():
    """`ignore_merges` takes a whole word from the vocabulary, specials too, when it stands alone."""
    definition = json.loads(content("byte_level"))
    definition["model"]["ignore_merges"] = True
    definition["pre_tokenizer"]["use_regex"] = False
    tokenizer = HuggingFaceTokenizer(json.dumps(definition), bos_id=0, eos_id=0)
    assert 0 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("x.json", "{}", r"x\.json is not a tokenizer\.json of Hugging Face's library"),
        ("x.json", "[]", r"x\.json is not a tokenizer\.json of Hugging Face's library"),
        ("x.json", '{"model": {"type": "Magic", "vocab": {}}}', r"x\.json cannot be run by the library tokenizers"),
        ("x.model", "hello", r"x\.model is not a SentencePiece model, or damaged"),
        ("x.tiktoken", "aGVsbG8= 1\nnothing\n", r"x\.tiktoken:2 is not a line of a tiktoken file"),
        ("x.tiktoken", "aGVsbG8= x\n", r"x\.tiktoken:1 is not a line of a tiktoken file"),
        ("x.tiktoken", "aGVsbG8= 1\naGVsbG8= 2\n", r"x\.tiktoken:2 has the token b'hello' for the second time"),
        ("x.tiktoken", "aGVsbG8= 1\n", r"lacks 256 of the 256 single bytes \(the first is 0x00\)"),
        ("x.vocab", "hello", r"x\.vocab is not a tokenizer that natsjax can read"),
    ],
)
def test_other_files_get_one_sentence(tmp_path, file, text, sentence):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path / file)


def test_a_folder_with_none_or_several_tokenizers(tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer in .*: it holds no natsjax_tokenizer\.json, "):
        load_tokenizer(tmp_path)
    write("sp_bpe", tmp_path)
    write("tiktoken", tmp_path)
    with pytest.raises(UserError, match=r"holds several tokenizers \(x\.model, x\.tiktoken\); name one file"):
        load_tokenizer(tmp_path)
    write("unigram", tmp_path)
    assert load_tokenizer(tmp_path).kind == "huggingface"


@pytest.mark.parametrize(("module", "name"), [("sentencepiece", "sp_bpe"), ("tiktoken", "tiktoken")])
def test_without_its_library_one_sentence_says_what_to_install(tmp_path, monkeypatch, module, name):
    file = write(name, tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"x\.\w+ needs {module}, .*pip install 'natsjax\[formats\]'"):
        load_tokenizer(file)


def _with_settings(folder, **values):
    file = write("tiktoken", folder)
    (folder / "x.tiktoken.json").write_text(json.dumps(values))
    return file


def test_tiktoken_settings_beside_the_file(tmp_path):
    plain = load_tokenizer(write("tiktoken", tmp_path / "plain"))
    specials = {"<eot>": 400, "<bot>": 401}
    file = _with_settings(tmp_path, pattern=r"\s+|\S", special_tokens=specials, bos_token="<bot>", eos_token="<eot>")
    tokenizer = load_tokenizer(file)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (401, 400, 402)
    assert tokenizer.token_text(399) == "⟨unused 399⟩"
    assert len(tokenizer.encode("the cat")) == 7 > len(plain.encode("the cat"))
    assert not {400, 401} & set(tokenizer.encode("<eot><bot>").tolist())
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("the cat").tolist() == tokenizer.encode("the cat").tolist()
    holes = load_tokenizer(_with_settings(tmp_path, pattern=r"\p{L}+"))
    assert "is decoded as 'Thecatsat'" in holes.caveat


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"patern": "x"}, r"unknown setting 'patern'; known are pattern, special_tokens"),
        ({"pattern": 3}, r"pattern = 3: a str was expected"),
        ({"pattern": "(("}, r"the pattern '\(\(' of the tokenizer .* is no regular expression"),
        ({"special_tokens": {"<eot>": -1}}, r"gives '<eot>' the id -1; ids are 0"),
        ({"special_tokens": {"<eot>": 2**40}}, r"gives '<eot>' the id 1099511627776; ids are 0"),
        ({"special_tokens": {"<eot>": "7"}}, r"gives '<eot>' the id '7'; ids are 0"),
        ({"special_tokens": {"<eot>": 7}}, r"has the id 7 twice, the second time for '<eot>'"),
        ({"eos_token": "<eot>"}, r"eos_token = '<eot>': not one of the special_tokens of the tokenizer .* \(none\)"),
    ],
)
def test_wrong_tiktoken_settings_get_one_sentence(tmp_path, values, sentence):
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(_with_settings(tmp_path, **values))


@pytest.mark.parametrize("text", [" " * 200_000 + "x", "\t \n" * 60_000, "a" * 50_000, "é!" * 20_000], ids=len)
@pytest.mark.parametrize("name", ["tiktoken", "byte_level", "sp_no_space"])
def test_texts_without_end_are_encoded(opened, name, text):
    tokenizer = opened(name)
    (ids,) = tokenizer.encode_batch([text])
    assert ids.tolist() == tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text


def test_a_pattern_that_runs_out_of_stack_is_helped(tmp_path):
    tokenizer = load_tokenizer(_with_settings(tmp_path, pattern=r"(?:(?!y).)+(?=$|y)|."))
    text = "x" * 3_000_000
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text)


@pytest.mark.parametrize("name", ["byte_level", "sp_bpe_bytes", "tiktoken"])
def test_a_corpus_is_prepared_with_a_tokenizer_file_and_keeps_it(tmp_path, name):
    file = write(name, tmp_path / "elsewhere")
    tokenizer = load_tokenizer(file)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate([*TEXTS[:3], "<s></s><|endoftext|>"]):
        (tmp_path / "texts" / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    arguments = {"input": tmp_path / "texts", "output": tmp_path / "out", "tokenizer": file, "held_out_fraction": 0.5}
    prepare(**arguments, progress=False)
    corpus = prepare(**arguments, progress=False)  # is there already, and was made with the same tokenizer
    shutil.rmtree(tmp_path / "elsewhere")
    corpus = Corpus.load(corpus.folder)
    assert corpus.tokenizer.fingerprint == tokenizer.fingerprint
    found = {
        document_id: corpus.tokenizer.decode([tokenizer.bos_id, *documents[place]])
        for documents in map(corpus.documents, ("train", "validation"))
        for place, document_id in enumerate(documents.ids)
    }
    assert found["3.txt.gz"] == "<s></s><|endoftext|>"
    assert [found[f"{number}.txt.gz"] for number in range(3)] == TEXTS[:3]


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, os.cpu_count()),
        ({"RAYON_NUM_THREADS": "3"}, 3),
        ({"RAYON_NUM_THREADS": "0"}, os.cpu_count()),
        ({"RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "false"}, 1),
    ],
)
def test_one_variable_limits_the_threads_of_all(monkeypatch, variables, threads):
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pretrained.num_threads() == threads


def test_importing_brings_in_no_optional_package_and_touches_no_device():
    """Importing the names that `natsjax.data` finds when they are used."""
    code = (
        "import sys\n"
        "from natsjax.data import *\n"
        "assert not {'pyarrow', 'sentencepiece', 'tiktoken'} & sys.modules.keys()\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "assert not (bridge and bridge._backends)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[1])


@every
def test_lone_surrogates_are_refused(opened, name):
    with pytest.raises(UserError, match=r"U\+D83D at character 2"):
        opened(name).encode("ab\ud83d")
    with pytest.raises(UserError, match=r"U\+D83D"):
        opened(name).encode_batch(["fine", "\ud83d"])


def _edited(folder, name, change, **beside):
    """A tokenizer.json with a change, and files beside it."""
    definition = json.loads(content(name))
    change(definition)
    folder.mkdir(exist_ok=True)
    for file, values in {"tokenizer": definition, **beside}.items():
        (folder / f"{file}.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("name", "random"),
    [("byte_level", {"dropout": 0.3}), ("unigram", {"alpha": 0.1}), ("unigram", {"alpha": 0.5, "nbest_size": 5})],
)
def test_what_is_random_in_a_file_is_off(opened, tmp_path, caplog, monkeypatch, name, random):
    monkeypatch.setattr(pretrained, "_warned", set())
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(_edited(tmp_path, name, lambda definition: definition["model"].update(random)))
    text = " ".join(TEXTS)
    assert {tuple(tokenizer.encode(text).tolist()) for _ in range(10)} == {tuple(opened(name).encode(text).tolist())}
    assert all(f"its {setting} = {value} is off" in caplog.text for setting, value in random.items())
    # Tokenizers that earlier versions stored have this fingerprint.
    parsed = json.loads((tmp_path / "tokenizer.json").read_text())
    parsed |= {"truncation": None, "padding": None, "post_processor": None}
    definition = ["huggingface", tokenizer._declared, json.dumps(parsed, sort_keys=True)]
    assert tokenizer.fingerprint == hashlib.sha256(json.dumps(definition).encode()).hexdigest()


def test_what_cuts_texts_off_is_off_and_a_byte_order_mark_is_no_damage(opened, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(pretrained, "_warned", set())
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path = _edited(tmp_path, "byte_level", lambda definition: definition.update(truncation=cut)) / "tokenizer.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(path)
    assert "its truncation is off, so that texts keep their length" in caplog.text
    assert tokenizer.encode(TEXTS[0]).tolist() == opened("byte_level").encode(TEXTS[0]).tolist()


@pytest.mark.parametrize(
    ("settings", "caveat"),
    [
        ({}, ""),
        ({"single_word": True}, ""),
        ({"lstrip": True}, "its token '<tool>' changes the text around it ('a <tool> b' is decoded as 'a<tool> b')"),
        ({"rstrip": True}, "its token '<tool>' changes the text around it ('a <tool> b' is decoded as 'a <tool>b')"),
    ],
)
def test_a_files_own_tokens_are_probed_with_white_space_around_them(tmp_path, settings, caveat):
    def change(definition):
        for token in definition["added_tokens"]:
            token.update(settings)  # of special ones too, which are ordinary text here

    assert load_tokenizer(_edited(tmp_path, "byte_level", change)).caveat == caveat


def test_an_own_token_that_stands_for_other_spellings_is_said_and_so_is_unknown_text(tmp_path, opened):
    def change(definition):
        definition["normalizer"] = {"type": "Replace", "pattern": {"String": "<TOOL>"}, "content": "<tool>"}
        next(token for token in definition["added_tokens"] if token["content"] == "<tool>")["normalized"] = True

    assert "('a <TOOL> b' is decoded as 'a <tool> b')" in load_tokenizer(_edited(tmp_path, "byte_level", change)).caveat
    assert "it has no token for parts of" in opened("sp_unigram").caveat
    assert "it has no token" not in opened("sp_unigram_bytes").caveat


def test_a_tokenizer_that_draws_at_random_after_all_is_found_out(opened, monkeypatch):
    tokenizer = HuggingFaceTokenizer(content("byte_level").decode())
    calls = iter(range(1000))
    monkeypatch.setattr(tokenizer, "encode", lambda text: np.array([next(calls) % 3 + 50], np.int32))
    assert "it does not always encode a text in the same way" in tokenizer.caveat


def test_files_that_contradict_tokenizer_json_are_named(tmp_path):
    config = {"add_prefix_space": True, "add_bos_token": True, "model_max_length": 4, "do_lower_case": None}
    tokenizer = load_tokenizer(_edited(tmp_path / "x", "byte_level", lambda _: None, tokenizer_config=config))
    assert "has add_prefix_space = true and tokenizer.json the contrary, which takes precedence" in tokenizer.caveat
    assert len(tokenizer.encode(TEXTS[0])) > 4
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").caveat == tokenizer.caveat
    assert json.loads((tmp_path / "saved" / "natsjax_tokenizer.json").read_text())["caveat"] == tokenizer.caveat
    named = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"999": {"content": "<new>"}}}
    added = {"tokenizer_config": named, "added_tokens": {"<new>": 999, "a": 1}}
    lacking = load_tokenizer(_edited(tmp_path / "z", "byte_level", lambda _: None, **added))
    assert lacking.caveat == (
        "files beside tokenizer.json name tokens that it lacks ('<|im_end|>', '<new>'), which are not used"
    )
    same = _edited(tmp_path / "y", "roberta", lambda _: None, tokenizer_config={"add_prefix_space": True})
    assert "add_prefix_space" not in load_tokenizer(same).caveat


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["vocab.json", "merges.txt"], r"which do not define how text is split; .*ByteLevelBPETokenizer"),
        (["encoder.json", "vocab.bpe"], r"which do not define how text is split; .*ByteLevelBPETokenizer"),
        (["tekken.json"], r"Mistral's format, which natsjax does not read; give the tokenizer\.json"),
    ],
)
def test_formats_that_are_not_read_are_recognized(tmp_path, files, sentence):
    for file in files:
        (tmp_path / file).write_text("{}")
    for path in (tmp_path, *(tmp_path / file for file in files)):
        with pytest.raises(UserError, match=sentence):
            load_tokenizer(path)


# --- tiktoken ---

NUMBERED = "In 2024, I'VE seen 12345 things;  don't you?\n\n\n  Été naïve 東京\t\tend  HTMLParser's/x "


def _public_patterns(monkeypatch):
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    names = ("r50k", "p50k", "cl100k", "o200k")
    found = {name: getattr(openai_public, f"{name}_base")()["pat_str"] for name in names}
    return found | {"gpt2": openai_public.r50k_pat_str}


@quick
@given(text=tricky_text | st.text("aZé東19 '.!/\n\r\t\u3000svt", max_size=30))
@example(text="a line\n  ")
def test_named_patterns_cut_as_tiktokens_own_do(text):
    with pytest.MonkeyPatch.context() as patch:
        for name, pattern in _public_patterns(patch).items():
            ours, theirs = (
                [found.group() for found in regex.finditer(p, text)]
                for p in (tiktoken_patterns.PATTERNS[name], pattern)
            )
            assert ours == theirs, name


def test_known_files_are_those_that_tiktoken_checks(monkeypatch):
    asked = {}
    patterns = _public_patterns(monkeypatch)
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda _, expected_hash: asked.update(now=expected_hash))
    for constructor in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base"):
        theirs = getattr(openai_public, constructor)()
        name, pattern, specials = tiktoken_patterns._FILES[asked["now"]]
        assert name.split()[0] == constructor
        assert patterns[pattern] == theirs["pat_str"]
        assert specials.items() <= theirs["special_tokens"].items()


@pytest.mark.parametrize("name", [*tiktoken_patterns.PATTERNS, "GPT2", "o200k_base", r"\d|\D+?(?=\d|$)"])
def test_a_pattern_can_be_asked_for(tmp_path, name, monkeypatch):
    file = write("tiktoken", tmp_path)
    tokenizer = load_tokenizer(file, tiktoken_pattern=name)
    pattern = _public_patterns(monkeypatch).get(name.lower().removesuffix("_base"), name)
    theirs = tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks=dict(_ranks()), special_tokens={})
    assert tokenizer.encode(NUMBERED).tolist() == theirs.encode_ordinary(NUMBERED)
    assert "assumed" not in tokenizer.caveat
    (tmp_path / "x.tiktoken.json").write_text(json.dumps({"pattern": name}))
    assert load_tokenizer(file).fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved", tiktoken_pattern=name).fingerprint == tokenizer.fingerprint


def test_an_assumed_pattern_is_said_and_kept(tmp_path):
    tokenizer = load_tokenizer(write("tiktoken", tmp_path))
    assert "cl100k (GPT-4) is assumed (with it no text is encoded to 1.1% of the tokens" in tokenizer.caveat
    assert "give --tiktoken_pattern=gpt2 if that is right" in tokenizer.caveat
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").caveat == tokenizer.caveat


@pytest.mark.parametrize(
    ("make", "pattern", "sentence"),
    [
        ("tiktoken", "gpt-2", r"tiktoken_pattern = 'gpt-2': gpt2, r50k, p50k, cl100k, o200k or a"),
        ("tiktoken", "((", r"the pattern '\(\(' of the tokenizer .* is no regular expression"),
        ("tiktoken", "x*", r"the pattern 'x\*' of the tokenizer .* matches empty text"),
        ("tiktoken", r"\w+|\s*", r"matches empty text"),
        ("byte_level", "gpt2", r"tokenizer\.json is no \.tiktoken file and defines itself how text is split"),
        ("sp_bpe", "gpt2", r"x\.model is no \.tiktoken file"),
    ],
)
def test_a_pattern_that_is_none_or_not_for_this_tokenizer(tmp_path, make, pattern, sentence):
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(write(make, tmp_path), tiktoken_pattern=pattern)


def test_a_pattern_for_a_tokenizer_without_one(tmp_path, opened):
    opened("tiktoken").save(tmp_path / "saved")
    with pytest.raises(UserError, match=r"was stored with all that it needs; leave tiktoken_pattern out"):
        load_tokenizer(tmp_path / "saved", tiktoken_pattern="o200k")
    with pytest.raises(UserError, match=r"tiktoken_pattern = 'gpt2': tokenizer is 'bpe'"):
        prepare(tmp_path, tmp_path / "out", tiktoken_pattern="gpt2")


def test_a_known_file_is_recognized_and_earlier_corpora_of_it_stay_what_they_are(tmp_path, monkeypatch, opened):
    before = opened("tiktoken")
    mark = hashlib.sha256(content("tiktoken")).hexdigest()
    monkeypatch.setitem(tiktoken_patterns._FILES, mark, ("toy", "gpt2", {"<bos>": 400, "<eos>": 401}))
    file = write("tiktoken", tmp_path)
    tokenizer = load_tokenizer(file)
    assert (tokenizer.pattern, tokenizer.bos_id, tokenizer.eos_id) == (tiktoken_patterns.PATTERNS["gpt2"], 400, 401)
    assert tokenizer.caveat == ""
    file.write_bytes(b"\r\n".join(reversed(content("tiktoken").splitlines())))  # the same ranks
    assert load_tokenizer(file).fingerprint == tokenizer.fingerprint
    assert is_tokenizer_of(file, tokenizer)
    assert is_tokenizer_of(file, before)  # which was cut with cl100k's pattern, and has a corpus
    assert not is_tokenizer_of(file, before, tiktoken_pattern="gpt2")
    assert not is_tokenizer_of(file, opened("byte_level"))
    (tmp_path / "x.tiktoken.json").write_text(json.dumps({"special_tokens": {"<eot>": 500}, "eos_token": "<eot>"}))
    mine = load_tokenizer(file)
    assert (mine.pattern, mine.eos_id, mine.bos_id) == (tokenizer.pattern, 500, 501)
