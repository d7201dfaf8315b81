"""The command that generates: prompts from anywhere, the KV that they took, and every mistake one sentence."""

import dataclasses
import io
import json
import re
import sys

import jax
import pytest
import tiny
from processes import run as run_process

from natsjax import generate
from natsjax.config import MeshConfig
from natsjax.decode import generation
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.decode.sampling import Sampling
from natsjax.errors import UserError
from natsjax.export import export
from natsjax.generate import __main__ as generate_command
from natsjax.generate.flags import (
    DEFAULTS,
    EVICTION_NAMES,
    parse_generate_flags,
    parse_mesh,
    parse_policy,
    policy_forms,
)
from natsjax.policies.attention_score import H2O, TOVA, AdaSnapKV, SnapKV
from natsjax.policies.eviction import EVICTIONS
from natsjax.policies.interval import FullAttention, RandomKeys, SlidingWindow, StreamingLLM
from natsjax.policies.key_score import KeyDiff, KeyNorm
from natsjax.policies.nats import Nats
from natsjax.policies.selective import LeastMasked

SHORT = ["--temperature=1", "--max_new_tokens=6"]  # fresh parameters give bytes at random, and greedily the same again


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return tiny.make_run(folder / "run", tiny.config(data=tiny.corpus(folder / "texts")))


@pytest.fixture(scope="module")
def recall_run(tmp_path_factory):
    return tiny.make_run(tmp_path_factory.mktemp("recall") / "run", tiny.config())


def run(loaded, prompts, **arguments):
    """As ``SHORT``, unless told otherwise."""
    arguments = {"sampling": Sampling(temperature=1.0), "max_new_tokens": 6, "loaded": loaded} | arguments
    return generate.run(loaded.workdir.path, prompts, **arguments)


def command(capsys, loaded, *flags):
    """Standard output and standard error."""
    generate_command.main([f"--workdir={loaded.workdir.path}", *flags])
    return capsys.readouterr()


class Terminal(io.StringIO):
    def isatty(self):
        return True


# --- prompts ---


def test_help_shows_the_defaults_that_hold():
    settings = DecodeSettings()
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert tuple(EVICTIONS) == EVICTION_NAMES


def test_a_prompt_comes_from_a_flag_a_file_or_a_pipe(text_run, capsys, monkeypatch, tmp_path):
    given = command(capsys, text_run, "--prompt=köln", "--prompt=", "--prompt= a", *SHORT)
    assert given.out.startswith("==> 1 of 3 <==\nköln")
    assert "\n\n==> 2 of 3 <==\n" in given.out
    for name, content in (("unix", "köln\n\n a\n"), ("no_end", "köln\n\n a"), ("windows", "köln\r\n\r\n a\r\n")):
        (tmp_path / name).write_text(content)
        assert command(capsys, text_run, f"--prompt_file={tmp_path / name}", *SHORT).out == given.out
    for flags in ([], ["--prompt_file=-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("köln\n\n a\n".encode())))
        assert command(capsys, text_run, *flags, *SHORT).out == given.out


def test_what_is_piped_into_the_command_on_two_devices_comes_out_of_one(text_run, tmp_path):
    """From an export, too; heads divided."""
    export(text_run.workdir.path, tmp_path / "out")
    words = ["-m", "natsjax.generate", f"--workdir={tmp_path / 'out'}", "--mesh=tensor=2", *SHORT]
    done = run_process(*words, input="köln\n", devices=2)
    stream = io.StringIO()
    found = run(text_run, ["köln"], stream=stream)
    assert done.stdout == stream.getvalue() == f"köln{found.texts[0]}\n"
    assert done.stderr.count("\n") == 1
    assert "1 prompt, 6 prompt tokens, 6 output tokens; first token after " in done.stderr


def test_the_tokens_are_those_of_decode_generate(text_run):
    prompts = ["köln", "", "war"]
    ids = [[256, *text.encode()] for text in prompts]
    sampling = Sampling(temperature=1.0, top_k=50, seed=3)
    found = run(text_run, prompts, sampling=sampling, policy=Nats(0.5))
    expected = generation.generate(
        Decoder.of_run(text_run, Nats(0.5)), ids, max_new_tokens=6, sampling=sampling, stop_tokens=[257]
    )
    assert found.prompts == ids
    assert (found.total.tokens, found.total.logprobs) == (expected.tokens, expected.logprobs)
    assert found.texts == [text_run.tokenizer.decode(tokens) for tokens in expected.tokens]
    for name in ("kv_live", "kv_live_max", "kv_allocated", "kv_full", "prompt_tokens", "capacities"):
        assert getattr(found.total, name) == getattr(expected, name), name
    again = run(text_run, [tuple(row) for row in ids], sampling=sampling, policy=Nats(0.5))
    assert again.texts == found.texts


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, seed=1)], ids=["greedy", "drawn"])
def test_text_does_not_depend_on_the_batches(text_run, sampling):
    prompts, texts = ["köln", "köln w", "war là", "köln l"], []
    for batch_size in (1, 3):
        stream = io.StringIO()
        found = run(text_run, prompts, sampling=sampling, batch_size=batch_size, stream=stream)
        texts.append((found.texts, stream.getvalue()))
        assert len(found.batches) == -(-4 // batch_size)
        for name in ("kv_full", "prompt_tokens", "kv_allocated"):
            assert getattr(found.total, name) == sum(getattr(batch, name) for batch in found.batches)
        assert min(b.kv_live for b in found.batches) <= found.total.kv_live <= max(b.kv_live for b in found.batches)
        assert found.summary().startswith(f"4 prompts in {len(found.batches)} batches, 30 prompt tokens, ")
        assert " at a time) where full attention" in found.summary()
    assert texts[0] == texts[1]


# --- what ends a text ---


def test_a_stop_token_at_once_and_a_single_token(text_run, capsys):
    whole = run(text_run, ["köln"])
    first, second = whole.total.tokens[0][:2]
    assert first != second  # else the next line would say nothing
    assert run(text_run, ["köln"], stop_tokens=[second]).total.tokens == [[first, second]]
    for flag in (f"--stop_tokens=0,{first}", "--max_new_tokens=1"):
        said = command(capsys, text_run, "--prompt=köln", *SHORT, flag)
        assert said.out == f"köln{text_run.tokenizer.decode([first])}\n"
        assert "6 prompt tokens, 1 output token; " in said.err
        assert "live keys" not in said.err  # no query has read any but the prompt's
        assert "where full attention would hold 24 " in said.err  # 6 tokens, 2 layers, 2 heads


def test_eos_ends_a_text_unless_it_is_ignored(text_run, monkeypatch):
    first = run(text_run, ["köln"]).total.tokens[0][0]
    monkeypatch.setattr(text_run.tokenizer, "eos_id", first)
    assert run(text_run, ["köln"]).total.tokens == [[first]]
    assert len(run(text_run, ["köln"], ignore_eos=True).total.tokens[0]) > 1


def test_what_is_longer_than_in_training_is_said_and_done(text_run, capsys):
    said = command(capsys, text_run, f"--prompt={'k' * 30}", *SHORT)
    assert said.err.startswith("warning: prompt 1 has 31 tokens, but the run was trained on contexts of 24 (data.con")
    assert said.err.count("warning") == 1
    assert said.out.startswith("k" * 30)
    assert run(text_run, ["a"], max_new_tokens=22).notes == []
    (note,) = run(text_run, ["a"], max_new_tokens=23).notes
    assert note.startswith("prompt 1 has 2 tokens and may get 23 more, but the run was trained on contexts of 24 ")


# --- the KV cache ---


def test_the_closing_line(text_run, capsys):
    limit = ["--max_kv=3", "--eviction=oldest", "--role_bias=9", "--block=4", "--chunk=8"]
    said = command(capsys, text_run, "--prompt=köln war", "--temperature=1", "--max_new_tokens=12", *limit).err
    assert re.fullmatch(
        r"1 prompt, 10 prompt tokens, 12 output tokens; first token after [\d.]+ s, the last after [\d.]+ s; "
        r"KV under nats, role bias 9: [\d.]+ live keys a head on average, at most 4; 16 slots allocated "
        r"\([\d.]+ (KiB|B)\) "
        r"where full attention would hold 84 \(19.0 %\); [1-9]\d* live keys evicted\.\n",
        said,
    ), said
    found = run(text_run, ["a"], settings=DecodeSettings(segment=2), policy=FullAttention())
    assert found.total.kv_full == 7 * 4
    text = found.summary()
    assert " tokens/s after that (less what had to be compiled); KV under full: 5.0 live keys a " in text
    assert text.endswith("where full attention would hold 28 (100.0 %).")
    moved = dataclasses.replace(found, total=dataclasses.replace(found.total, transfers=2)).summary()
    assert moved == f"{text[:-1]}; 2 transfers to larger buffers."


POLICIES = {
    "full": FullAttention(),
    "nats": Nats(),
    "sliding_window:16": SlidingWindow(16),
    "streaming_llm:4,12": StreamingLLM(4, 12),
    "h2o:9": H2O(9, 4),
    "h2o:8,2": H2O(8, 2),
    "snapkv:40": SnapKV(40),
    "snapkv:8,4": SnapKV(8, 4),
    "ada_snapkv:40": AdaSnapKV(40, 32, 0.2),
    "ada_snapkv:8,4,0.5": AdaSnapKV(8, 4, 0.5),
    "tova:9": TOVA(9),
    "knorm:9": KeyNorm(9),
    "keydiff:9": KeyDiff(9),
    "random:0.25": RandomKeys(0.25),
    "random:1,3": RandomKeys(1.0, 3),
    "selective:9": LeastMasked(9),
}


def test_every_policy_has_a_name():
    assert {text: parse_policy(text) for text in POLICIES} == POLICIES
    assert {text.partition(":")[0] for text in POLICIES} == {form.partition(":")[0] for form in policy_forms()}
    assert parse_policy(None) is None
    assert parse_policy(None, -0.5) == parse_policy("nats", -0.5) == Nats(-0.5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "snap",
            r"there is no such policy; did you mean snapkv; choose one of nats, full, sliding_window:W, streaming_",
        ),
        ("", "there is no such policy; choose one of nats, full, "),
        ("full:3", "its numbers do not fit; give it as full"),
        ("full:", "its numbers do not fit; give it as full"),
        ("nats:0.5", "its numbers do not fit; give it as nats"),
        ("sliding_window", "its numbers do not fit; give it as sliding_window:W"),
        ("sliding_window:", "its numbers do not fit; give it as sliding_window:W"),
        ("sliding_window:1.5", "its numbers do not fit; give it as sliding_window:W"),
        ("sliding_window:1,2", "its numbers do not fit; give it as sliding_window:W"),
        ("sliding_window:-1", "window=-1: it must be 0 or more"),
        ("sliding_window:99999999999", "a number is too large; choose numbers below 1073741824"),
        ("streaming_llm:4", "its numbers do not fit; give it as streaming_llm:S,W"),
        ("h2o:4,5", "num_recent=5: it must be between 0 and num_keys=4"),
        ("h2o:", r"its numbers do not fit; give it as h2o:N\[,R\]"),
        ("snapkv:8", "num_keys=8: it must be 33 or more"),
        ("snapkv:8,2,1", r"its numbers do not fit; give it as snapkv:N\[,W\]"),
        ("random:1.5", "fraction=1.5: it must be between 0 and 1"),
        ("random:nan", "fraction=nan: it must be between 0 and 1"),
    ],
)
def test_a_wrong_policy_is_explained(text, sentence):
    with pytest.raises(UserError, match=rf"^--policy={re.escape(text)}: {sentence}.*\.$"):
        parse_policy(text)


@pytest.mark.parametrize("policy", ["h2o:4", "sliding_window:2"])
def test_a_policy_is_used(text_run, capsys, policy):
    said = command(capsys, text_run, "--prompt=köln war là", *SHORT, f"--policy={policy}")
    name, number = policy.split(":")
    number = int(number) + 1  # and its own key
    found = re.search(rf"KV under {name}, .*: ([\d.]+) live keys a head on average, at most (\d+);", said.err)
    assert int(found[2]) <= number
    assert ("evicted" in said.err) == (name == "h2o")


# --- mistakes ---


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dat=2", "unknown axis 'dat'; did you mean data"),
        ("data", "it is not AXIS=N,…; give it as in data=2,tensor=4"),
        ("data=2,", "it is not AXIS=N,…"),
        ("data=2.5", "it is not AXIS=N,…"),
        ("data=1,data=1", "data is there twice; name each axis once"),
        ("data=0", "data has no such size; choose 1 or more, or -1"),
        ("data=-1,tensor=-1", "-1, the rest, is there twice; name it once"),
        ("context=2", "decoding divides batch and heads, not sequences"),
    ],
)
def test_a_wrong_mesh_is_explained(text, sentence):
    with pytest.raises(UserError, match=rf"^--mesh={re.escape(text)}: {sentence}"):
        parse_mesh(text)


def test_a_mesh_is_completed():
    assert parse_mesh("data=2,tensor=4") == MeshConfig(data=2, tensor=4)
    assert parse_mesh("data=-1") == MeshConfig(data=-1, fsdp=1)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--prompt=a", "--prompt_tokens=1"],
            "--prompt, --prompt_tokens: these are two places for prompts; choose one",
        ),
        (["--prompt_file=/nowhere"], r"--prompt_file=/nowhere: it cannot be read \(No such file or directory\); name"),
        (["--prompt_tokens=1,b"], "--prompt_tokens=1,b: these are no ids; separate them by commas, as in 0,5,7"),
        (["--prompt_tokens=1,999"], "prompt 1: there is no id 999; the vocabulary has the ids 0 … 257"),
        (["--prompt=a", "--stop_tokens=-2"], "stop_tokens: there is no id -2; the vocabulary has the ids 0 … 257"),
        (["--prompt=\udcff"], "is no UTF-8 text"),
        (["--prompt=a", "--max_new_tokens=0"], "max_new_tokens = 0: it is too small; choose 1 or more"),
        (
            ["--prompt=a", "--max_new_tokens=9999999999"],
            "--max_new_tokens=9999999999: it is too large; choose a number below 1073741824",
        ),
        (["--prompt=a", "--batch_size=0"], "batch_size = 0: it is too small; choose 1 or more"),
        (["--prompt=a", "--temperature=-1"], "temperature = -1.0: it must be 0 or more"),
        (["--prompt=a", "--top_p=x"], "argument --top_p: invalid float value: 'x'; see --help"),
        (["--prompt=a", "--max_kv=0"], "max_kv = 0: it must be 1 or more"),
        (["--prompt=a", "--max_kv=4", "--policy=h2o:4"], "are two limits; choose one"),
        (["--prompt=a", "--eviction=oldest"], "--eviction=oldest: without --max_kv nothing is evicted; give that too"),
        (["--prompt=a", "--eviction=newest", "--max_kv=4"], "eviction = 'newest': one of 'soonest_end', 'oldest' was"),
        (
            ["--prompt=a", "--role_bias=1", "--policy=full"],
            "--role_bias=1: --policy=full does not read the model's roles; leave one out",
        ),
        (["--prompt=a", "--role_bias=nan"], r"--role_bias=nan: it is out of range; choose one from -1e\+06 to 1e\+06"),
        (["--prompt=a", "--mesh=data=3,fsdp=1"], "mesh.data = 3, .* make 3 devices, and there are 1"),
        (["--prompt=a", "--output=/proc/no/x"], "--output=/proc/no/x cannot be written: No such file or directory"),
        (["--prompt=a", "--tempo=1"], "unknown flag --tempo; did you mean --temperature; see --help"),
    ],
)
def test_a_mistake_is_one_sentence(text_run, capsys, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        command(capsys, text_run, *flags)
    assert capsys.readouterr() == ("", "")


def test_where_there_is_no_prompt_that_is_said(text_run, monkeypatch, tmp_path):
    def parse(*flags):
        return parse_generate_flags(["--workdir=x", *flags], "")

    monkeypatch.setattr(sys, "stdin", Terminal("never read"))
    with pytest.raises(UserError, match="there is no prompt: give --prompt=TEXT or --prompt_file=FILE, or pipe lines"):
        parse()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(UserError, match="standard input: it is empty, so there is no prompt"):
        parse()
    (tmp_path / "latin").write_bytes("ja\nKöln\n".encode("latin-1"))
    with pytest.raises(UserError, match="latin: line 2 has the byte 0xf6, which is no UTF-8"):
        parse(f"--prompt_file={tmp_path / 'latin'}")
    (tmp_path / "lfs").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n")
    with pytest.raises(UserError, match="lfs is a pointer of Git LFS"):
        parse(f"--prompt_file={tmp_path / 'lfs'}")
    with pytest.raises(UserError, match="there is no prompt"):
        run(text_run, [])
    with pytest.raises(UserError, match="prompt 2: it has no token"):
        run(text_run, ["a", []])


def test_several_processes_are_refused(text_run, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"there are 2 processes, and natsjax\.generate runs as one"):
        run(text_run, ["a"])


# --- tokens without text, and files ---


def test_a_recall_run_takes_and_gives_ids(recall_run, capsys, tmp_path):
    with pytest.raises(
        UserError, match="is a recall run, whose tokens stand for no text; give ids, as in --prompt_tok"
    ):
        command(capsys, recall_run, "--prompt=a")
    flags = ["--prompt_tokens=0,3,7", f"--output={tmp_path / 'out'}"]
    out = command(capsys, recall_run, *flags, *SHORT).out
    found = run(recall_run, [[0, 3, 7]])
    assert out == ",".join(map(str, [0, 3, 7, *found.total.tokens[0]])) + "\n"
    assert found.texts is None
    assert json.loads((tmp_path / "out").read_text())["text"] is None
    longer = command(capsys, recall_run, f"--prompt_tokens={out.strip()}", "--no-echo", *SHORT)
    whole = command(capsys, recall_run, flags[0], *SHORT, "--max_new_tokens=12").out
    assert whole == f"{out.strip()},{longer.out}"


def test_a_full_disk_is_one_sentence_and_the_text_is_printed(text_run, capsys):
    with pytest.raises(UserError, match="--output=/dev/full cannot be written: No space left on device; make room"):
        command(capsys, text_run, "--prompt=a", "--output=/dev/full", *SHORT)
    assert capsys.readouterr().out.startswith("a")


def test_results_are_kept(text_run, capsys, tmp_path):
    (tmp_path / "out").symlink_to("new/folder/out")
    flags = ["--prompt_tokens=256,97", "--prompt_tokens=98,195", f"--output={tmp_path / 'out'}", "--batch_size=1"]
    command(capsys, text_run, *flags, *SHORT)
    found = run(text_run, [[256, 97], [98, 195]], batch_size=1)
    records = [json.loads(line) for line in (tmp_path / "out").read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == ["a", "b\N{REPLACEMENT CHARACTER}"]
    assert [record["prompt_tokens"] for record in records] == found.prompts
    assert [record["text"] for record in records] == found.texts
    assert [record["tokens"] for record in records] == found.total.tokens
    assert [record["logprobs"] for record in records] == found.total.logprobs


def test_an_interruption_leaves_what_was_written(text_run, tmp_path):
    class Interrupted(io.StringIO):
        def write(self, text):
            if "2 of 3" in self.getvalue():
                raise KeyboardInterrupt
            return super().write(text)

    stream = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(text_run, ["a", "b", "c"], batch_size=1, stream=stream, output=tmp_path / "out")
    whole = io.StringIO()
    run(text_run, ["a", "b", "c"], batch_size=1, stream=whole)
    assert stream.getvalue() == whole.getvalue()[: len(stream.getvalue())]
    assert stream.getvalue().endswith("==> 2 of 3 <==\n")
