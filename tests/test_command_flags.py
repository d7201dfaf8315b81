"""Every command names the nearest flag, choice or field of one that does not exist, and takes no abbreviation."""

import sys

import commands
import pytest
from processes import ROOT

from natsjax import UserError
from natsjax.config_fields import closest
from natsjax.runtime.flags import Parser, parse_train_flags, typed_text

CONFIG = f"--config={ROOT / 'configs/smoke.py'}"
OF_ABSL = ("natsjax.plan", "natsjax.sweep", "train")


def call(command, arguments, monkeypatch):
    """Runs it with these flags, on whatever way they reach it."""
    if command == "train":
        return parse_train_flags(["train.py", *arguments])
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    return commands.module_of(command).main()


def sentence_of(command, arguments, monkeypatch, capsys):
    """Two commands print it themselves."""
    try:
        status = call(command, arguments, monkeypatch)
    except UserError as error:
        return str(error)
    assert status == 2
    return capsys.readouterr().err.removeprefix("error: ").rstrip()


FLAGS = [
    ("natsjax.evaluate", "--workdir"),
    ("natsjax.evaluate", "--budgets"),
    ("natsjax.export", "--output"),
    ("natsjax.generate", "--temperature"),
    ("natsjax.report", "--title"),
    ("natsjax.serve", "--grace_seconds"),
    ("natsjax.data.prepare", "--tokenizer"),
    ("natsjax.data.inspect", "--batch_size"),
    ("natsjax.plan", "--topology"),
    ("natsjax.sweep", "--kv_budgets"),
    ("train", "--workdir"),
    ("benchmarks.attention", "--lengths"),
    ("benchmarks.decode", "--layers"),
    ("benchmarks.plans", "--hardware"),
    ("benchmarks.recall", "--workdir"),
    ("benchmarks.sampling", "--draws"),
    ("benchmarks.study", "--workdir"),
    ("benchmarks.train_step", "--repeats"),
    ("pallas_kernels.nats_attention.autotune", "--backend"),
]


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_the_nearest_flag_is_named(command, flag, monkeypatch, capsys):
    name = flag.removeprefix("--")
    swapped = f"--{name[0]}{name[2]}{name[1]}{name[3:]}"
    wrong = [f"{swapped}=1", swapped, f"--{name[:-1]}=1", f"--{name[:4]}", f"--{name.upper()}=1", f"---{name}=1"]
    if command not in OF_ABSL:  # to absl one dash is as good as two
        wrong += [f"-{name}=1", f"-{name}"]
    for word in wrong:
        said = sentence_of(command, [word, "1"], monkeypatch, capsys)
        assert f"unknown flag {word.partition('=')[0]}; did you mean {flag}; " in said


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("natsjax.evaluate", ["--workdir=x", "--mode=decod"], "'decod' is none of masked, decode; did you mean decode"),
        ("natsjax.evaluate", ["--workdir=x", "--mode", "mask"], "did you mean masked; see --help"),
        ("natsjax.export", ["--workdir=x", "--output=y", "--dtype=float16"], "did you mean bfloat16"),
        ("natsjax.data.inspect", ["--prepared_dir=x", "--split=valid"], "did you mean validation"),
        ("natsjax.data.prepare", ["--input=x", "--output=y", "--no_progress"], "did you mean --no-progress"),
        ("natsjax.generate", ["--workdir=x", "--prompt=a", "--policy=sliding:4"], "did you mean sliding_window"),
        ("natsjax.generate", ["--workdir=x", "--prompt=a", "--policy=H20:4"], "did you mean h2o"),
        ("natsjax.generate", ["--workdir=x", "--prompt=a", "--max_kv=9", "--eviction=soonest"], "mean soonest_end"),
        ("natsjax.generate", ["--workdir=x", "--prompt=a", "--mesh=fdsp=2"], "did you mean fsdp"),
        ("natsjax.generate", ["--role_bais=3"], "unknown flag --role_bais; did you mean --role_bias; see --help"),
        ("natsjax.evaluate", ["-help"], "unknown flag -help; did you mean --help"),
        ("natsjax.generate", ["--workdir=x", "--role_bias", "-0.3", "--prompt", "-- a b"], "x holds no run"),
        ("natsjax.plan", [CONFIG, "--topolgy", "v5e-16"], "did you mean --topology"),
        ("natsjax.plan", [CONFIG, "--nosearhc"], "unknown flag --nosearhc; did you mean --search"),
        ("natsjax.plan", ["--topology=v5e-16", "--confg=x"], "unknown flag --confg; did you mean --config; usage"),
        ("benchmarks.plans", ["--configs=nats_1g"], "did you mean nats_1b"),
        ("benchmarks.attention", ["--passes=sample"], "did you mean sampled"),
        ("benchmarks.attention", ["--implementation=pallas_tpus"], "did you mean pallas_tpu"),
        ("benchmarks.attention", ["--dtype=bfloat"], "did you mean bfloat16"),
        ("pallas_kernels.nats_attention.autotune", ["--backend=xlaa"], "did you mean xla"),
        ("pallas_kernels.nats_attention.autotune", ["--heads=a"], "invalid"),
        ("train", [CONFIG, "--workdir=x", "--config.kv_budget=0.1"], "kv_budget; did you mean nats.kv_budget"),
        ("train", [CONFIG, "--workdir=x", "--config.train.kv_budget=0.1"], "did you mean nats.kv_budget"),
        ("train", [CONFIG, "--workdir=x", "--config.train.learning_rate=1"], "did you mean optimizer.*learning_rate"),
        ("train", [CONFIG, "--workdir=x", "--config.optimiser.beta1=1"], "did you mean optimizer.beta1"),
        ("train", [CONFIG, "--workdir=x", "-config.model.embd_dim=1"], "did you mean model.embed_dim"),
        ("train", [CONFIG, "--workdir=x", "--config.modle=1"], "did you mean model"),
        ("train", [CONFIG, "--workdir=x", "--config.model.remat=ful"], "'none', 'full', 'dots' .*; did you mean full"),
        ("train", [CONFIG, "--workdir=x", "--config.nats.kv_penalty_mode=controled"], "did you mean controlled"),
        ("train", [CONFIG, "--workdir=x", "--config.model.layer_types=nast"], "did you mean nats"),
        ("train", [CONFIG, "--workdir=x", "--num_proceses=2"], "did you mean --num_processes"),
        ("train", [f"--config={ROOT / 'configs/smok.py'}", "--workdir=x"], "did you mean .*configs/smoke.py"),
        ("train", [f"--config={ROOT / 'configs/nats_1b.py'}:v5e16", "--workdir=x"], "did you mean v5e-16"),
    ],
)
def test_the_nearest_value_is_named(command, arguments, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        raise UserError(sentence_of(command, arguments, monkeypatch, capsys))


def test_words_that_only_look_like_flags():
    parser = Parser()
    parser.add_argument("--number", type=float)
    parser.add_argument("--text", type=typed_text)
    parser.add_argument("rest", nargs="*")
    flags = parser.parse_args(["--number", "-1.5", "--text", "-a b=c", "--", "--x"])
    assert (flags.number, flags.text, flags.rest) == (-1.5, "-a b=c", ["--x"])


def test_text_that_the_locale_did_not_read():
    assert typed_text("k\udcc3\udcb6ln") == typed_text("köln") == "köln"
    parser = Parser()
    parser.add_argument("--text", type=typed_text)
    with pytest.raises(UserError, match=r"--text: 'k\\udcf6ln' is no UTF-8 text"):
        parser.parse_args(["--text=k\udcf6ln"])


@pytest.mark.parametrize(
    ("name", "found"),
    [("b", "budgets"), ("BUDGET", "budgets"), ("baseline-workdir", "baseline_workdir"), ("x" * 9999, None), ("", None)],
)
def test_closest(name, found):
    assert closest(name, ["workdir", "budgets", "baseline_workdir"]) == found
