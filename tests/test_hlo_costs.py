"""Costs that are read off a compiled program: every notation, and programs of known collectives and traffic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import json_lines

from natsjax.plan import hlo, hlo_costs


class FakeMesh:
    def __init__(self, **sizes):
        self.shape = sizes
        self.axis_names = tuple(sizes)
        self.size = math.prod(sizes.values())


ONE_DEVICE = FakeMesh(fsdp=1)


def collective(attributes):
    return hlo.Instruction("x", "all-reduce", (), (), "", attributes, False)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (", replica_groups={{0,1},{2,3}}, to_apply=%add", [[0, 1], [2, 3]]),
        (", replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        (", channel_id=1, to_apply=%add", [[0, 1, 2, 3]]),
        (", replica_groups=[2,2]<=[4], to_apply=%add", [[0, 1], [2, 3]]),
        (", replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add", [[0, 2], [1, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%add", [[0, 1], [2, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%add", [[0, 2], [1, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2] {'a','b'}, to_apply=%add", [[0, 1, 2, 3]]),
        (", replica_groups=mesh['a'=4] {'a':(1)2}, to_apply=%add", [[0, 2], [1, 3]]),
        (", replica_groups=mesh['a'=4] {'a':(2)2}, to_apply=%add", [[0, 1], [2, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2], device_ids=([4]<=[2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}, x", [[0, 2], [3, 1]]),
        (", source_target_pairs={{0,1},{1,0}}, channel_id=2", [[0, 1], [1, 0]]),
    ],
)
def test_every_notation_of_device_groups_is_read(attributes, expected):
    groups = hlo.device_groups(collective(attributes), 4)
    assert sorted(map(list, groups.tolist())) == expected


def test_a_notation_that_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="not understood"):
        hlo.device_groups(collective(", replica_groups=something"), 4)
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")


# As XLA for TPUs writes them: no trip count, memory spaces in layouts, a reduce-scatter fused from an all-reduce.
TPU_TEXT = """
HloModule jit_f, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(16), metadata={op_name="while/cond/lt"}
  %count = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

%all-reduce-scatter.1 (q: bf16[8,128]) -> bf16[2,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %reduced = bf16[8,128]{1,0} all-reduce(%q), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = bf16[2,128]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={2,128}
}

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%p), index=0
  %value = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} multiply(%value, %value)
  %reduced = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%near), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %scattered = bf16[2,128]{1,0} fusion(%reduced), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[8,128]) tuple(%count, %reduced)
}

ENTRY %main (a: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %a = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%a), condition=%condition, body=%body
}
"""


def test_loops_memory_spaces_and_fused_collectives_of_a_tpu_program():
    mesh = FakeMesh(data=2, fsdp=2)
    costs = hlo_costs.program_costs(hlo.parse(TPU_TEXT), mesh, [0, 0, 1, 1])
    size = 8 * 128 * 2
    # The reduce-scatter runs among four devices in two slices: half inside, a quarter across.
    assert {tuple(c) for c in costs.collectives} == {
        ("all-reduce", ("fsdp",), 16, 16 * 2 * size / 2, 0.0),
        ("reduce-scatter", ("data", "fsdp"), 16, 16 * size / 2, 16 * size / 4),
    }
    # The product lies in fast memory: it is read from memory, and the all-reduce writes there; then the fusion.
    assert costs.memory_traffic == 16 * (2 * size + size + (size + size // 4))
    assert costs.unknown_loops == 0


PIECES = """
HloModule jit_f, is_scheduled=true

%start (q: bf16[8,128]) -> (bf16[8,128], bf16[32,128]) {
  %q = bf16[8,128]{1,0} parameter(0)
  %gathered = bf16[32,128]{1,0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %both = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) tuple(%q, %gathered)
}

%meanwhile (r: bf16[8,128]) -> bf16[8,128] {
  %r = bf16[8,128]{1,0} parameter(0)
  %gathered = bf16[32,128]{1,0} all-gather(%r), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %product = bf16[8,128]{1,0} multiply(%r, %r)
}

ENTRY %main (a: bf16[8,128], w: bf16[64,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %w = bf16[64,128]{1,0} parameter(1)
  %async-collective-start.1 = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %near = (bf16[64,128]{1,0}, bf16[4,128]{1,0S(1)}, u32[]{S(2)}) slice-start(%w), slice={[0:4], [0:128]}
  %product = bf16[8,128]{1,0} fusion(%a), kind=kCustom, calls=%meanwhile
  %async-collective-done.1 = bf16[32,128]{1,0} fusion(%async-collective-start.1), kind=kCustom, calls=%start
  %second = bf16[32,128]{1,0} all-gather(%product), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %last = bf16[8,128]{1,0} slice(%second), slice={[0:8], [0:128]}
}
"""


def test_a_collective_in_pieces_is_one_and_of_a_slice_only_the_slice_moves():
    costs = hlo_costs.program_costs(hlo.parse(PIECES), FakeMesh(fsdp=4), [0] * 4)
    share = 8 * 128 * 2
    assert [tuple(c) for c in costs.collectives] == [("all-gather", ("fsdp",), 2, 2 * 3 * share, 0.0)]
    starts, product, second = share + 5 * share, 2 * share, share + 4 * share
    assert costs.memory_traffic == starts + share // 2 + product + second + 2 * share


SLICES = """
HloModule jit_f, is_scheduled=true

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[8,128]{1,0}, u32[], token[]) send(%a, %token), channel_id=3, is_host_transfer=true, ATTRIBUTES
  %recv = (bf16[8,128]{1,0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, ATTRIBUTES
  ROOT %done = (bf16[8,128]{1,0}, token[]) recv-done(%recv), channel_id=2
}
""".replace(
    "ATTRIBUTES", 'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
)


def test_what_hosts_carry_between_slices_is_read():
    mesh = FakeMesh(data=2, fsdp=4)
    size = 8 * 128 * 2
    costs = hlo_costs.program_costs(hlo.parse(SLICES), mesh, [0] * 4 + [1] * 4)
    assert [tuple(c) for c in costs.collectives] == [("all-reduce", ("data",), 1, 0.0, 2 * size / 2)]
    other = hlo.parse(SLICES.replace("ALL_REDUCE", "ONE_TO_ONE"))
    costs = hlo_costs.program_costs(other, mesh, [0] * 4 + [1] * 4)
    assert [tuple(c)[:3] for c in costs.collectives] == [("collective-permute", ("data",), 1)]
    assert costs.collectives[0].bytes_across == size


@pytest.mark.parametrize(
    ("kind", "inside", "across"),
    [
        # Of 16 devices in two nodes, each giving 160 bytes.
        ("all-gather", 2560 * 14 / 16, 2560 / 16),
        ("reduce-scatter", 160 * 14 / 16, 160 / 16),
        ("all-reduce", 2 * 160 * 14 / 16, 2 * 160 / 16),
        ("all-to-all", 160 * (1 / 2 - 1 / 16), 80),
    ],
)
def test_little_of_a_collective_crosses_the_network(kind, inside, across):
    groups, domains = np.arange(16)[None], [0] * 8 + [1] * 8
    assert hlo_costs._bytes_sent(kind, 160, groups, domains) == pytest.approx((inside, across))
    assert hlo_costs._bytes_sent(kind, 160, groups, [0] * 16)[1] == 0


def test_of_a_permutation_the_pairs_that_cross_count():
    ring = np.array([[index, (index + 1) % 4] for index in range(4)])
    assert hlo_costs._bytes_sent("collective-permute", 100, ring, [0, 0, 1, 1]) == (50, 50)


def test_a_loop_of_unknown_length_is_counted_once_and_said():
    text = TPU_TEXT.replace("direction=LT", "direction=NE")
    costs = hlo_costs.program_costs(hlo.parse(text), FakeMesh(data=2, fsdp=2), [0] * 4)
    assert costs.unknown_loops == 1
    assert {c.times for c in costs.collectives} == {1}


COLLECTIVES = """
import json, jax, jax.numpy as jnp
from natsjax.plan import hlo_costs, hlo
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

def step(x, _):
    whole = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
    total = jax.lax.psum(jnp.sin(whole), ("data", "fsdp"))
    part = jax.lax.psum_scatter(total * x[0], "context", scatter_dimension=0, tiled=True)
    swapped = jax.lax.all_to_all(jnp.cos(part), "fsdp", 1, 0, tiled=True)
    return jax.lax.ppermute(jnp.tanh(swapped[: x.shape[0], :1] * x), "context", [(0, 1), (1, 0)]), None

def function(x):
    return jax.lax.scan(step, x, None, length=5)[0]

x = jax.ShapeDtypeStruct((4096, 32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(("data", "fsdp", "context"))))
spec = jax.P(("data", "fsdp", "context"))
mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
text = jax.jit(mapped).lower(x).compile().as_text()
costs = hlo_costs.program_costs(hlo.parse(text), mesh, [0] * 8)
print(json.dumps([[c.kind, c.axes, c.times, c.bytes_inside] for c in costs.collectives]))
"""


def test_collectives_of_a_program_that_xla_compiled():
    (collectives,) = json_lines(COLLECTIVES, devices=8)
    found = {kind: (axes, count, sent) for kind, axes, count, sent in collectives}
    part = 4096 // 8 * 32 * 4  # bytes of a device's share
    assert found == {
        "all-gather": (["fsdp"], 5, 5 * part),
        "all-reduce": (["data", "fsdp"], 5, 5 * 2 * (2 * part) * 3 / 4),
        "reduce-scatter": (["context"], 5, 5 * (2 * part) / 2),
        "all-to-all": (["fsdp"], 5, 5 * part / 2),
        "collective-permute": (["context"], 5, 5 * part),
    }


def traffic(function, *shapes):
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*structs).compile().as_text()
    costs = hlo_costs.program_costs(hlo.parse(text), ONE_DEVICE, [0])
    assert costs.collectives == ()
    assert costs.unknown_loops == 0
    return costs.memory_traffic


def test_an_elementwise_operation_reads_and_writes_once():
    assert traffic(lambda x: jnp.sin(x) * 2 + 1, (1000, 256)) == 2 * 1000 * 256 * 4


def test_a_loop_over_stacked_weights_reads_each_of_them_once():
    def layers(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    count, width, rows = 64, 128, 8
    found = traffic(layers, (count, width, width), (rows, width))
    weights, x = count * width * width * 4, rows * width * 4
    # Each weight is sliced out, once into a copy perhaps; never is the whole stack read in every turn.
    assert weights <= found <= 3 * weights + count * 8 * x


def test_results_of_a_loop_are_written_a_slice_at_a_time():
    def steps(x):
        return jax.lax.scan(lambda x, _: (x * 1.5, jnp.sin(x)), x, None, length=64)[1]

    found = traffic(steps, (4096,))
    assert 64 * 4096 * 4 <= found <= 8 * 64 * 4096 * 4


def test_bytes_of_types():
    arrays = hlo.arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[5]{0}, f32[], f8e4m3fn[4], s32[0])")
    assert [(a.size, a.in_memory) for a in arrays] == [(12, False), (5, True), (4, True), (4, True), (0, True)]
    assert np.prod(arrays[0].shape) == 6
