"""Plans of decoding: memory is the compiler's, the buffer stays where it is, and a mistake is a sentence."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny
from planned import CHIP, check_total, here, plan_and_program
from processes import ROOT, json_lines, run

from natsjax.errors import UserError
from natsjax.plan import __main__ as plan_command
from natsjax.plan import decoding, hlo, hlo_flow, summary, topologies, train_step
from natsjax.plan.decoding import DecodeRequest


@pytest.fixture(scope="module", params=["nats", "dense"])
def planned(request):
    """A plan for this machine, and the program that it was read off."""
    config = tiny.config(model={"layer_types": request.param})
    return plan_and_program(config, here(), lambda *given: decoding.plan_decode(*given, DecodeRequest(batch=4)))


def test_memory_is_what_the_compiler_says(planned):
    made, compiled = planned
    check_total(made.memory, compiled)
    assert made.memory.parameters == 4 * made.num_parameters
    layers, heads, slots, head_dim = 2, 2, 128, 4
    numbers = 2 * slots + 1  # position and end of each key, and the length
    assert made.memory.buffer == 4 * layers * 4 * heads * (2 * slots * head_dim + numbers)
    weights, read = made.reads
    assert weights == made.memory.parameters
    assert read == 4 * layers * 4 * heads * slots * (2 * head_dim + 1)


def test_the_buffer_is_neither_copied_nor_sent(planned):
    made = planned[0]
    assert made.is_donated is True
    assert made.copies == ()
    assert made.sent == ()
    assert made.collectives == ()


def test_it_says_what_there_is_to_know(planned):
    text = summary.decode_summary(planned[0])
    for part in ("it fits", "buffer ", "yes, donated", "in the program: none", "bound by memory", "tokens/s", "128"):
        assert part in text
    numbers = json.loads(json.dumps(summary.decode_as_json(planned[0])))
    assert numbers["memory"]["total"] == planned[0].memory.total
    assert numbers["roofline"]["bound"] == "memory"


def test_slots_are_those_that_the_decoder_would_allocate():
    nats, dense = tiny.config(nats={"kv_budget": 0.1}), tiny.config(model={"layer_types": "dense"})
    assert decoding.slots_of(nats, 4096, None, 128) == (512, 4096)  # 410 live, and room to grow
    assert decoding.slots_of(nats, 4096, 1.0, 128) == (4096, 4096)
    assert decoding.slots_of(dense, 4096, None, 128) == (4096, 4096)
    assert decoding.slots_of(nats, 100, None, 128) == (128, 128)


def test_the_mesh_for_decoding_divides_what_it_must():
    def mesh(devices, domains=1, **model):
        topology = topologies.Topology(
            "x", [None] * devices, None, tuple(n * domains // devices for n in range(devices))
        )
        return decoding.decode_mesh(tiny.config(model=model), 16, topology).tensor

    assert mesh(64, num_heads=8, num_kv_heads=8) == 8
    assert mesh(64, num_heads=6, num_kv_heads=6) == 2
    assert mesh(16, 4, num_heads=8, num_kv_heads=8) == 4
    assert mesh(1, num_heads=8, num_kv_heads=8) == 1


# --- mistakes ---


def test_mistakes_are_sentences(monkeypatch):
    monkeypatch.chdir(ROOT)
    for request, message in (
        ({"batch": 0}, "--decode_batch=0: it must"),
        ({"kv": 1.5}, "--decode_kv=1.5: it must be above"),
    ):
        with pytest.raises(UserError, match=message):
            DecodeRequest(**request)
    arguments = ["plan", "--config=configs/smoke.py", "--topology=local"]
    with pytest.raises(UserError, match="--decode_batch=4: it has no effect without --decode"):
        plan_command.main([*arguments, "--decode_batch=4"])
    with pytest.raises(UserError, match="leave it out with --decode"):
        plan_command.main([*arguments, "--decode", "--search"])


def test_exit_status_and_what_is_asked_for(planned, monkeypatch, tmp_path, capsys):
    asked = []

    def plan_decode_apart(config, name, num_slices, request):
        asked.append(request)
        return planned[0]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(decoding, "plan_decode_apart", plan_decode_apart)
    arguments = ["plan", "--config=configs/smoke.py", "--topology=local", "--decode"]
    assert plan_command.main([*arguments, f"--json={tmp_path / 'plan.json'}"]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["batch"] == 4
    planned = (dataclasses.replace(planned[0], chip=dataclasses.replace(CHIP, memory=1.0)), None)
    assert plan_command.main([*arguments, "--decode_batch=8", "--decode_kv=0.5", "--config.mesh.tensor=1"]) == 1
    assert asked == [DecodeRequest(), DecodeRequest(batch=8, kv=0.5, as_trained=True)]
    assert "most is taken by" in capsys.readouterr().out


def test_a_refusing_compiler(monkeypatch):
    def refuse(_):
        return None, "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm."

    monkeypatch.setattr(train_step, "compile_program", refuse)
    made = decoding.plan_decode(tiny.config(), here())
    assert made.fits is False
    assert made.memory.total == pytest.approx(20.5 * 2**30)
    assert "IT DOES NOT FIT" in summary.decode_summary(made)
    assert summary.decode_as_json(made)["copies"] is None


# --- eight devices ---


def test_the_command_on_eight_devices(tmp_path):
    """Batch and heads are divided; the buffer is updated where it lies, and no part of it goes to another device."""
    words = ["-m", "natsjax.plan", "--config=configs/smoke.py", "--topology=local", "--decode"]
    words += ["--config.model.num_heads=4", "--config.model.num_kv_heads=2", f"--json={tmp_path / 'plan.json'}"]
    found = run(*words, devices=8)
    assert (found.returncode, found.stderr) == (0, "")
    assert "data=4, tensor=2 (chosen" in found.stdout
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert numbers["batch"] == 16 * 4
    assert (numbers["is_donated"], numbers["copies"], numbers["sent"]) == (True, [], [])
    along = {tuple(c["axes"]): c["times"] for c in numbers["collectives"]}
    assert along["tensor",] >= 2 * 2  # attention and MLP of each layer


EIGHT = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from natsjax.plan import topologies, decoding, hlo_flow, hlo
from natsjax.config import Config
from natsjax.errors import UserError

mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
whole = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P("x")))
number = jax.ShapeDtypeStruct((), jnp.int32)

def loop(buffer, steps):
    def body(carry):
        n, buffer, total = carry
        part = jax.lax.dynamic_index_in_dim(buffer.reshape(8, 2, 32).swapaxes(0, 1), n % 2, 0, keepdims=False)
        part = jax.lax.with_sharding_constraint(part, NamedSharding(mesh, P()))
        return n + 1, buffer.at[n, 0].set(total[0, 0]), total + part * 2

    return jax.lax.while_loop(lambda c: c[0] < steps, body, (0, buffer, jnp.zeros((8, 32))))

text = jax.jit(loop, donate_argnums=0).lower(whole, number).compile().as_text()
program = hlo.parse(text)
for name in ("buffer", "steps"):
    found = hlo_flow.moves(program, hlo_flow.parameters_named(program, name))
    print(json.dumps(sorted({hlo_flow.kind_of(i) for i in found} & hlo_flow.COLLECTIVES)))

for values, request in json.load(sys.stdin):
    try:
        decoding.plan_decode(
            Config.from_dict(values), topologies.topology("local"), decoding.DecodeRequest(**request)
        )
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_on_eight_devices_a_part_that_is_sent_is_found_and_mistakes_are_sentences():
    ring = tiny.config(mesh={"context": 2, "fsdp": 4}).to_dict()
    asked = [(ring, {"as_trained": True}), (tiny.config().to_dict(), {"batch": 6})]
    buffer, steps, divides_sequences, odd = json_lines(EIGHT, asked, devices=8)
    assert "all-gather" in buffer
    assert steps == []
    assert divides_sequences == "mesh.context = 2: decoding divides batch and heads, not sequences; make it 1."
    assert odd == (
        "--decode_batch=6: it cannot be divided among mesh.data * mesh.fsdp = 4 devices; give a multiple of 4."
    )


# --- where an argument goes ---


def moved(function, *arguments, donate=()):
    text = jax.jit(function, donate_argnums=donate).lower(*arguments).compile().as_text()
    program = hlo.parse(text)
    numbers = hlo_flow.parameters_named(program, "x")
    kinds = [hlo_flow.kind_of(i) for i in hlo_flow.moves(program, numbers)]
    return kinds, set(numbers) <= hlo_flow.aliased_parameters(text)


def test_copies_are_found_and_updates_are_none():
    x, n = jnp.zeros((64, 32)), jnp.int32(3)

    def update(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: jax.lax.dynamic_update_index_in_dim(x, x[i] + 1, i, 0), x)

    kinds, is_donated = moved(update, x, n, donate=0)
    assert is_donated
    assert not set(kinds) & hlo_flow.COPIES
    kinds, is_donated = moved(update, x, n)
    assert not is_donated
    assert "copy" in kinds
    assert moved(lambda x, n: x @ x.T + n, x, n)[0].count("copy") == 0  # what is computed from it is something else


# As XLA writes it for several devices of a TPU: the gather starts and ends apart, in a branch.
BRANCHES = """HloModule jit_f, input_output_alias={ {0}: (1, {}, may-alias) }

%idle (p.1: bf16[4,8]) -> bf16[8,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %zeros = bf16[8,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
}

%busy (p.2: bf16[4,8]) -> bf16[8,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%p.2), replica_groups={{0,1}}, dimensions={0}
  ROOT %done = bf16[8,8]{1,0} all-gather-done(%start)
}

ENTRY %main (a: s32[], x: bf16[4,8], y: bf16[8,8]) -> (bf16[4,8], bf16[8,8]) {
  %a = s32[] parameter(0), metadata={op_name="a"}
  %x = bf16[4,8]{1,0} parameter(1), metadata={op_name="x"}
  %y = bf16[8,8]{1,0} parameter(2), metadata={op_name="y"}
  %which = bf16[8,8]{1,0} conditional(%a, %x, %x), branch_computations={%idle, %busy}
  %turned = bf16[8,8]{0,1} transpose(%which), dimensions={1,0}
  %sum = bf16[8,8]{0,1} add(%turned, %y)
  ROOT %result = (bf16[4,8]{1,0}, bf16[8,8]{0,1}) tuple(%x, %sum)
}
"""


def test_branches_and_what_starts_and_ends_apart():
    program = hlo.parse(BRANCHES)
    assert hlo_flow.parameters_named(program, "x") == [1]
    assert hlo_flow.aliased_parameters(BRANCHES) == {1}
    assert [hlo_flow.kind_of(i) for i in hlo_flow.moves(program, [1])] == ["all-gather", "transpose"]
    assert hlo_flow.moves(program, [2]) == []
