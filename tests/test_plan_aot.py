"""Steps of the large configs compiled for pods: do they fit, and what do they move?"""

import dataclasses
import functools
import math
import time

import aot
import pytest

from natsjax.plan import hlo, hlo_costs, topologies, train_step

pytestmark = [pytest.mark.aot, aot.has_libtpu]
MOST_SECONDS = 600
CASES = [("nats_1b:v5p-128", "v5p:4x4x4"), ("nats_7b:v6e-256", "v5p:8x8x8"), ("nats_7b:v6e-256", "v6e:16x16")]
by_case = pytest.mark.parametrize(("name", "topology"), CASES, ids=lambda value: value)


def config_of(name, **mesh):
    config = aot.config_of(name)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))


@functools.cache
def planned(name, topology, attention="nats"):
    """The plan, and the seconds that it took."""
    config = config_of(name)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layer_types=(attention,)))
    began = time.process_time()  # of all threads: the machine may be busy
    made, _ = aot.planned(config, topology)
    return made, time.process_time() - began


@by_case
def test_it_fits_soon_and_the_memory_is_the_compilers(name, topology):
    made, seconds = planned(name, topology)
    assert made.fits is True
    assert seconds < MOST_SECONDS
    assert made.memory.parameters == pytest.approx(4 * made.num_parameters / made.num_devices, rel=0.02)


@by_case
def test_roles_take_no_more_memory_than_the_dense_baseline(name, topology):
    nats, dense = (planned(name, topology, attention)[0] for attention in ("nats", "dense"))
    print(f"{name} on {topology}: {nats.memory.total / dense.memory.total:.4f} of the dense baseline's memory")
    assert nats.memory.total <= 1.05 * dense.memory.total


@by_case
def test_no_whole_activations_are_gathered(name, topology):
    made = planned(name, topology)[0]
    config = made.config
    length, width = config.data.context_length, config.model.embed_dim
    rows = config.train.batch_size // made.num_devices
    results = hlo_costs.collective_results(hlo.parse(made.program))
    moved = [array.shape for kind, array in results if kind != "collective-permute"]
    largest_weight = width * max(config.model.mlp_dim, config.data.vocab_size)
    assert largest_weight // 2 <= max(map(math.prod, moved)) <= largest_weight
    assert not [shape for shape in moved if len(shape) >= 3 and shape[-3:] == (rows, length, width)]
    assert made.costs.unknown_loops == 0


def test_nothing_is_quadratic_in_the_context():
    """In the model none of whose sizes is the context's length; forward, backward and roles' gradient."""
    made = planned(*CASES[0])[0]
    length = made.config.data.context_length
    computations = hlo.parse(made.program).computations.values()
    shapes = {array.shape for c in computations for i in c.values() for array in i.results}
    assert any(length in shape for shape in shapes)
    assert not [shape for shape in shapes if shape.count(length) > 1]
    rows = made.config.train.batch_size // made.num_devices
    assert max(map(math.prod, shapes)) < rows * made.config.model.num_heads * length**2


def test_slices_talk_across_the_network_about_gradients_alone():
    """Two slices: what crosses lies along ``data`` too, and is about each device's share of the gradients."""
    config = config_of("nats_1b:v5p-128", data=2)
    # With 16 sequences a device libtpu crashes here (docs/scaling.md).
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_accumulation_steps=2))
    made = train_step.plan_step(config, topologies.topology("v5p:2x2x2", num_slices=2))
    crossing = [c for c in made.costs.collectives if c.bytes_across]
    assert crossing
    assert all("data" in c.axes for c in crossing)
    share = 2 * made.num_parameters / 8  # in bfloat16, on the devices of a slice
    assert 0.5 * share < sum(c.bytes_across for c in crossing) < 3 * share
    assert made.roofline.network > 0


def test_a_sequence_that_goes_round_a_ring_compiles_for_a_pod():
    config = config_of("nats_1b:v5p-128", context=4)
    made = train_step.plan_step(config, topologies.topology("v5p:4x4x4"))
    assert made.mesh == {"fsdp": 16, "context": 4}
    ring = [c for c in made.costs.collectives if c.kind == "collective-permute" and c.axes == ("context",)]
    assert ring
    assert made.fits is True
