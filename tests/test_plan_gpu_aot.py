"""A step compiled for eight H100s, and nodes of them, on a machine without a GPU; .ci/aot has the command."""

import importlib.util

import aot
import pytest

from natsjax.errors import UserError
from natsjax.model.sharding import make_mesh
from natsjax.plan import topologies, train_step

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax-cuda13-plugin is not installed"
    ),
]


def test_a_step_compiles_for_eight_h100s():
    made = train_step.plan_step(aot.config_of("nats_350m:h100-8"), topologies.topology("h100-8"))
    assert made.fits is True
    assert made.mesh == {"fsdp": 8}
    assert {c.axes for c in made.costs.collectives} == {("fsdp",)}
    assert made.roofline.network == 0
    assert made.costs.unknown_loops == 0


def test_nodes_are_domains_and_may_share_parameters():
    topology = topologies.topology("h100-16")
    assert topology.domains == (0,) * 8 + (1,) * 8
    config = aot.config_of("nats_350m:h100-8")
    assert dict(make_mesh(config.mesh, topology.devices).shape) == {"data": 1, "fsdp": 16, "tensor": 1, "context": 1}


def test_the_share_of_the_memory_is_what_jax_is_told(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert topologies.topology("h100-8").chip.memory == 0.75 * 84929347584
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert topologies.topology("h100-8").chip.memory == 0.9 * 84929347584
    for wrong in ("much", "0", "1.5"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION = .?{wrong}"):
            topologies.topology("h100-8")
