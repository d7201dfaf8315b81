"""Decode loops of the large configs compiled for pods: do they fit, does the buffer stay put?"""

import functools

import aot
import pytest

from natsjax.plan import decoding, hlo, hlo_costs
from natsjax.plan import summary as plan_command

pytestmark = [pytest.mark.aot, aot.has_libtpu]
CASES = [(name, topology) for name in ("nats_1b", "nats_7b") for topology in ("v5e:2x4", "v5p:4x4x4")]
by_case = pytest.mark.parametrize(("name", "topology"), CASES, ids=lambda value: value)


@functools.cache
def planned(name, topology):
    made, memory = aot.planned(aot.config_of(name), topology, decoding.plan_decode)
    print(f"\n{plan_command.decode_summary(made)}")
    return made, memory


@by_case
def test_it_fits_and_the_memory_is_the_compilers(name, topology):
    made = planned(name, topology)[0]
    assert made.fits is True
    assert made.mesh["tensor"] == 8
    assert made.memory.parameters == pytest.approx(2 * made.num_parameters / 8, rel=0.02)
    # Besides weights in another layout there is next to nothing.
    assert made.memory.temporaries < 0.1 * made.memory.parameters


@by_case
def test_the_buffer_is_updated_where_it_lies_and_no_part_of_it_is_sent(name, topology):
    made, memory = planned(name, topology)
    assert made.is_donated is True
    assert memory.alias_size_in_bytes >= made.memory.buffer
    assert made.copies == ()
    assert made.sent == ()
    assert made.slots == 512
    assert made.memory.buffer == pytest.approx(made.full_buffer / 8, rel=0.01)


@by_case
def test_what_is_sent_is_of_one_token(name, topology):
    """By their sizes too: nothing larger than the logits of a device's sequences goes anywhere."""
    made = planned(name, topology)[0]
    rows = made.batch // made.mesh.get("data", 1)
    sizes = [array.size for _, array in hlo_costs.collective_results(hlo.parse(made.program))]
    assert max(sizes) == 4 * rows * made.config.data.vocab_size
    assert {axis for c in made.collectives for axis in c.axes} <= {"data", "tensor"}
    assert all(c.bytes_inside < 1000 for c in made.collectives if "data" in c.axes)
    assert made.roofline.bound == "memory"


@by_case
def test_attention_is_the_kernel(name, topology):
    assert 'custom_call_target="tpu_custom_call"' in planned(name, topology)[0].program
