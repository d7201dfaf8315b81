"""Plans: memory is the compiler's, products are those that the step traces, and a mistake is a sentence."""

import dataclasses
import json
import math
import os

import jax
import pytest
import tiny
from planned import CHIP, check_total, here, plan_and_program
from processes import ROOT, SLOW, json_lines, run

from natsjax.data import ByteTokenizer
from natsjax.errors import UserError
from natsjax.model import attention as attention_layer
from natsjax.plan import __main__ as plan_command
from natsjax.plan import decoding, search, summary, topologies, train_step
from natsjax.train.step import Trainer


def test_local_is_this_machine():
    topology = topologies.topology("local")
    assert topology.devices == jax.devices()
    assert topology.chip is None


# --- names ---


@pytest.mark.parametrize(
    ("name", "num_slices", "message"),
    [
        ("v5q-16", 1, "unknown topology 'v5q-16'; did you mean v5p; known are v5e-N with N = 1, 4, .*local"),
        ("v5p-100", 1, "unknown topology 'v5p-100'; known are"),
        ("v5e:", 1, "unknown topology"),
        ("", 1, "unknown topology ''; chips: v5e"),
        ("h100-12", 1, "unknown topology 'h100-12'; known are"),
        ("h100-0", 1, "unknown topology"),
        ("v5p:4x4", 1, "unknown topology 'v5p:4x4'; known are"),
        ("v5e:4x4x4", 1, "unknown topology"),
        ("h100:2x2", 1, "unknown topology"),
        ("h100-8", 2, "--num_slices=2: it is for TPU slices; 2 times the GPUs are h100-16"),
        ("local", 2, "--num_slices=2: it is for TPU slices"),
        ("v5e-16", 0, "--num_slices=0: it must be at least 1"),
    ],
)
def test_a_topology_that_is_not_known_is_named(name, num_slices, message):
    with pytest.raises(UserError, match=message):
        topologies.topology(name, num_slices)


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--topology=v5p-128 needs the TPUs' compiler, no TPU: pip install"):
        topologies.topology("v5p-128")

    def fail(**_):
        raise NotImplementedError("topology not implemented for cuda\nmore")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    with pytest.raises(UserError, match=r"--topology=h100-8 needs .* jax-cuda13-plugin==.* \(topology not implemented"):
        topologies.topology("h100-8")


@pytest.mark.parametrize(
    "size", [*topologies._SHAPES_2D.items(), *((n // 2, s) for n, s in topologies._SHAPES_V5P.items())]
)
def test_shapes_multiply_to_their_chips(size):
    assert math.prod(int(n) for n in size[1].split("x")) == size[0]


# --- one plan, compiled once ---


@pytest.fixture(scope="module")
def planned():
    """A plan for this machine, and the program that it was read off."""
    return plan_and_program(tiny.config(train={"batch_size": 4, "gradient_accumulation_steps": 2}), here())


def test_memory_is_what_the_compiler_says(planned):
    made, compiled = planned
    check_total(made.memory, compiled)
    assert made.memory.parameters == 4 * made.num_parameters
    assert 8 * made.num_parameters <= made.memory.optimizer <= 8 * made.num_parameters + 64
    assert made.memory.batch == 5 * 4 * 4 * 24  # five arrays of 4 bytes
    assert made.memory.activations > 0


def test_it_says_what_there_is_to_know(planned):
    text = summary.summary(planned[0])
    for part in ("it fits", "parameters", "roofline", "bound by", "tokens/s", "live at nats.kv_budget = 0.4"):
        assert part in text
    numbers = json.loads(json.dumps(summary.as_json(planned[0])))
    assert numbers["memory"]["total"] == planned[0].memory.total
    assert numbers["fits"] is True
    assert numbers["roofline"]["bound"] in ("compute", "memory")


def test_what_does_not_fit_is_named_with_what_would_shrink_it(planned):
    small = dataclasses.replace(CHIP, memory=planned[0].memory.total - 1)
    made = dataclasses.replace(planned[0], chip=small)
    assert made.fits is False
    text = summary.summary(made)
    assert "IT DOES NOT FIT" in text
    assert "most is taken by temporaries; what would shrink it: train.gradient_accumulation_steps" in text


def test_every_class_of_memory_has_a_way_to_shrink_it():
    assert set(summary._SHRINK) == set(train_step.Memory._fields)
    assert set(summary._SHRINK_DECODING) == set(decoding.DecodeMemory._fields)


def test_exit_status_and_file(planned, monkeypatch, tmp_path, capsys):
    arguments = ["plan", "--config=configs/smoke.py", "--topology=local"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train_step, "plan_apart", lambda config, name, num_slices: planned[0])
    assert plan_command.main([*arguments, f"--json={tmp_path / 'plan.json'}"]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["num_parameters"] == planned[0].num_parameters
    small = dataclasses.replace(planned[0], chip=dataclasses.replace(CHIP, memory=1.0))
    monkeypatch.setattr(train_step, "plan_apart", lambda config, name, num_slices: small)
    assert plan_command.main(arguments) == 1
    assert "IT DOES NOT FIT" in capsys.readouterr().out
    for missing, message in ((1, "--config=FILE is missing"), (2, "--topology is missing: v5e-N")):
        with pytest.raises(UserError, match=message):
            plan_command.main([argument for index, argument in enumerate(arguments) if index != missing])
    with pytest.raises(UserError, match=r"--json=nowhere/x: there is no such folder"):
        plan_command.main([*arguments, "--json=nowhere/x"])


def test_search_takes_the_fewest_microbatches_that_fit_and_names_the_fastest(planned, monkeypatch, capsys):
    fewest = {"none": 100, "dots": 6, "full": 1}  # nothing fits with "none": 24 contexts, 2 at a time
    tried = []

    def plan_apart(config, name, num_slices):
        remat, count = config.model.remat, config.train.gradient_accumulation_steps
        tried.append((remat, count))
        if (remat, count) == ("dots", 4):
            raise train_step.CompilerCrashed("the compiler crashed")
        fits = count >= fewest[remat]
        memory = planned[0].memory._replace(temporaries=0.0 if fits else 1e15)
        seconds = train_step.Roofline(2.0 if remat == "full" else 1.0, 0.0, 0.0, 0.0)
        return dataclasses.replace(planned[0], config=config, memory=memory, roofline=seconds, mesh={"fsdp": 2})

    monkeypatch.setattr(search, "plan_apart", plan_apart)
    monkeypatch.chdir(ROOT)
    arguments = ["plan", "--config=configs/smoke.py", "--topology=local", "--config.train.batch_size=24"]
    assert plan_command.main([*arguments, "--search"]) == 0
    assert tried == [("none", n) for n in (1, 2, 3, 4, 6, 12)] + [("dots", n) for n in (1, 2, 3, 4, 6)] + [("full", 1)]
    shown = capsys.readouterr().out
    assert "model.remat = dots, train.gradient_accumulation_steps = 4: the compiler crashed" in shown
    rows = [line.split() for line in shown.splitlines() if line.strip()]
    assert [row[1:4:2] for row in rows[-3:]] == [["dots", "6"], ["full", "1"], ["none", "12"]]
    assert "does not fit" in " ".join(rows[-1])
    with pytest.raises(UserError, match="leave out --search"):
        plan_command.main([*arguments, "--search", "--json=x"])


# --- a compiler that refuses ---


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (33.11G) exceeds available", 33.11),
        ("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
        ("Ran out of memory in memory space vmem while allocating on stack. Used 132.0M of 16.0M vmem.", None),
    ],
)
def test_what_a_refusing_compiler_asked_for_is_read(said, asked, monkeypatch):
    def refuse(_):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}\nmore")

    class Lowered:
        compile = refuse

    monkeypatch.setattr(Trainer, "lower", lambda self: Lowered())
    made = train_step.plan_step(tiny.config(), here())
    assert made.fits is False
    assert made.costs is None
    assert made.refusal == said
    text = summary.summary(made)
    assert f"the compiler: {said}" in text
    assert "total        at least" in text
    assert summary.as_json(made)["roofline"] is None
    if asked is None:
        assert "temporaries          ?" in text
        assert "most is taken" not in text
        return
    known = made.memory.parameters + made.memory.optimizer + made.memory.batch if "Used" in said else 0
    assert made.memory.temporaries + made.memory.activations + known == pytest.approx(asked * 2**30)
    assert "most is taken by temporaries" in text


def crash(config, name, num_slices, log):
    """Ends as libtpu does where one of its checks fails."""
    log.write_text("W1 a.cc:1] a warning\nF2 b.cc:2] Check failed: 1 vs. 8\n*** stack\n")
    os.abort()


def test_a_compiler_that_crashes_is_a_sentence(monkeypatch):
    monkeypatch.setattr(train_step, "_plan_here", crash)
    expected = (
        r"--topology=v5e-16: the compiler crashed on this step \(Check failed: 1 vs. 8\); another train.gradient_accum"
    )
    with pytest.raises(train_step.CompilerCrashed, match=expected):
        train_step.plan_apart(tiny.config(), "v5e-16")


def test_the_command_plans_for_this_machine():
    """From the command line to the text, through a process of its own."""
    words = ["-m", "natsjax.plan", "--config=configs/smoke.py", "--topology=local"]
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "memory of a device, GiB" in done.stdout
    assert "the memory of the device is not known" in done.stdout
    done = run(*words, "--config.mesh.fsdp=3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: mesh.data = 1, mesh.fsdp = 3")
    assert done.stderr.count("\n") == 1


def test_other_errors_of_the_compiler_are_not_hidden(monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(Trainer, "lower", lambda self: Lowered())
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        train_step.plan_step(tiny.config(), here())


# --- products ---


def products(jaxpr, times=1):
    """Operations of the matrix products of a traced function, loops of known length counted out."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += times * 2 * size * math.prod(equation.outvars[0].aval.shape)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += products(inner, times * turns)
    return total


OPTIONS = {
    "none": {},
    "gates": {
        "attention_gate": True,
        "key_shift": True,
        "attention_sinks": True,
        "activation": "geglu",
        "dropout": 0.1,
    },
    "no_gate": {"activation": "squared_relu", "nope": (False, True), "param_dtype": "bfloat16"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("attention", ["dense", "nats"])
def test_products_with_weights_are_those_that_the_step_traces(attention, remat, options, monkeypatch):
    def no_attention(query, key, value, *_, return_lse=False, **__):
        out = query + key.sum() + value.sum()
        return (out, out.sum(-1)) if return_lse else out

    monkeypatch.setattr(attention_layer, "nats_attention", no_attention)
    monkeypatch.setattr(attention_layer, "interval_attention", no_attention)
    model = {"layer_types": attention, "remat": remat} | OPTIONS[options]
    config = tiny.config(model=model, train={"gradient_accumulation_steps": 2})
    trainer = Trainer(config, tiny.VOCAB_SIZE)
    with jax.set_mesh(trainer.mesh):
        traced = jax.make_jaxpr(trainer._step)(trainer.abstract_state(), trainer.abstract_batch())
    assert train_step.step_flops(config, tiny.VOCAB_SIZE).weights == products(traced.jaxpr)


def test_memory_follows_the_options():
    plain, other = (
        Trainer(tiny.config(model=model), tiny.VOCAB_SIZE)
        for model in (
            {},
            {"param_dtype": "bfloat16", "activation": "squared_relu", "attention_gate": True},
        )
    )
    layers, d, f, heads, head_dim = 2, 16, 24, 4, 4
    sizes = [sum(math.prod(x.shape) for x in jax.tree.leaves(trainer.model.parameters)) for trainer in (plain, other)]
    assert sizes[1] == sizes[0] + layers * (d * heads * head_dim - d * f)
    state = other.abstract_state()
    wide = layers * (2 * d + (d + 1) * 2 * 3) + d  # two norms and a scorer in each layer, the last norm
    assert train_step.bytes_on_device(state.parameters) == 2 * sizes[1] + 2 * wide
    assert train_step.bytes_on_device(state.optimizer) == pytest.approx(2 * 4 * sizes[1], abs=64)  # float32 always
    # What dropout keeps for the backward pass: a bool for each number of a block's two results, and of the input.
    saved = [
        sum(math.prod(x.shape) * x.dtype.itemsize for x in train_step.saved_activations(trainer))
        for trainer in (plain, Trainer(tiny.config(model={"dropout": 0.5}), tiny.VOCAB_SIZE))
    ]
    assert saved[1] - saved[0] >= (2 * layers + 1) * 4 * 24 * d


def test_attention_counts_pairs():
    dense = tiny.config(model={"layer_types": "dense"})
    pairs = 4 * 2 * 4 * 24 * 25 / 2  # batch, layers, heads, causal pairs
    assert train_step.step_flops(dense, 16).attention == pairs * 9 * 2 * 4
    exact = tiny.config()  # 40 % of them live, all looked at
    assert train_step.step_flops(exact, 16).attention == pytest.approx(pairs * (0.4 * 9 + 2) * 2 * 4)
    sampled = tiny.config(nats={"mask_gradient": "sampled", "sampled_fraction": 0.25}, model={"remat": "full"})
    assert train_step.step_flops(sampled, 16).attention == pytest.approx(pairs * (0.4 * 11 + 0.5) * 2 * 4)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_selective_layers_take_all_pairs_and_a_head_more(remat):
    """What the step traces, whose arrays have the pairs above the diagonal too."""
    config = tiny.config(model={"layer_types": "selective", "remat": remat})
    trainer = Trainer(config, tiny.VOCAB_SIZE)
    with jax.set_mesh(trainer.mesh):
        traced = jax.make_jaxpr(trainer._step)(trainer.abstract_state(), trainer.abstract_batch())
    flops = train_step.step_flops(config, tiny.VOCAB_SIZE)
    square = 24 * 24 / (24 * 25 / 2)
    assert flops.weights + square * flops.attention == pytest.approx(products(traced.jaxpr))
    mixed = tiny.config(model={"layer_types": "selective,dense"})
    pairs = 4 * 2 * 4 * 24 * 25 / 2
    assert train_step.step_flops(mixed, 16).attention == pytest.approx(pairs * (9 + 6 * 9 / 8) / 2 * 2 * 4)


def test_the_vocabulary_without_the_data(tmp_path):
    assert train_step.vocab_size_of(tiny.config()) == tiny.VOCAB_SIZE
    corpus = {"source": "corpus", "input": "folder", "vocab_size": 1000}
    assert train_step.vocab_size_of(tiny.config(data=corpus)) == 1000
    assert train_step.vocab_size_of(tiny.config(data=corpus | {"tokenizer": "byte"})) == 258
    with pytest.raises(UserError, match="nowhere"):
        train_step.vocab_size_of(tiny.config(data=corpus | {"tokenizer": "nowhere"}))
    ByteTokenizer().save(tmp_path)
    assert train_step.vocab_size_of(tiny.config(data=corpus | {"tokenizer": str(tmp_path)})) == 258


# --- eight devices: what the program moves ---

SHARDED = """
import json, sys
import jax
from natsjax.plan import topologies, train_step, hlo_costs, hlo
from natsjax.model import sharding
from natsjax.config import Config
from natsjax.train.step import Trainer

for values in json.load(sys.stdin):
    config = Config.from_dict(values)
    trainer = Trainer(config, 16, sharding.make_mesh(config.mesh))
    compiled = trainer.lower().compile()
    program = hlo.parse(compiled.as_text())
    costs = hlo_costs.program_costs(program, trainer.mesh, [0] * 8)
    whole = [(kind, array.shape) for kind, array in hlo_costs.collective_results(program)]
    shapes = {array.shape for c in program.computations.values() for i in c.values() for array in i.results}
    memory = compiled.memory_analysis()
    print(json.dumps({
        "collectives": [[c.kind, c.axes] for c in costs.collectives],
        "gathered": [shape for kind, shape in whole if kind in ("all-gather", "all-to-all")],
        "shapes": sorted(shapes),
        "memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "saved": [x.sharding.shard_shape(x.shape) for x in train_step.saved_activations(trainer) if x.sharding],
    }), flush=True)
"""
LENGTH = 1024


def sharded_config(attention, **mesh):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | mesh
    return tiny.config(
        model={"layer_types": attention, "num_layers": 3},
        data={"context_length": LENGTH},
        train={"batch_size": 8},
        mesh=sizes,
    ).to_dict()


@pytest.mark.larger
def test_no_whole_activations_and_nothing_quadratic_in_the_program():
    """The issue's bars, in the program that XLA makes for eight CPU devices."""
    configs = [
        sharded_config("nats", fsdp=4, tensor=2),
        sharded_config("nats", context=2, fsdp=4),
        *[sharded_config("dense", fsdp=4, tensor=2)] * SLOW,
    ]
    found = json_lines(SHARDED, configs, devices=8)
    nats, ring = found[:2]
    width, rows = 16, 2  # of an activation, and of a batch on a device
    for program in found:
        # Weights are gathered, and a few integers for each token; never a layer's activations.
        assert any(math.prod(shape) >= width * width // 4 for shape in program["gathered"])
        assert max(map(math.prod, program["gathered"])) < rows * LENGTH * width // 2
        part = LENGTH // 2 if program is ring else LENGTH
        assert not [shape for shape in program["shapes"] if sum(size >= part for size in shape) > 1]
        # Nor are the gathered weights of all layers kept for the backward: none is as large on a device as it is whole.
        saved = {tuple(shape) for shape in program["saved"]}
        assert saved
        assert not saved & {(3, 16, 12), (3, 12, 16), (3, 16, 24), (3, 24, 16)}
    assert ["collective-permute", ["context"]] in ring["collectives"]
    assert {tuple(axes) for _, axes in nats["collectives"]} >= {("fsdp",), ("tensor",)}
    assert {"fsdp", "tensor"} >= {axis for _, axes in nats["collectives"] for axis in axes}
