"""A model of several kinds of layers, with all that a step may have, steps alike on every mesh."""

import numpy as np
import pytest
from processes import SLOW, json_lines

pytestmark = pytest.mark.larger
MESHES = [{"fsdp": 1}, {"fsdp": 2, "tensor": 2, "context": 2}]
if SLOW:
    MESHES += [{"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 1, "context": 2}]

STEPS = """
import json, sys
import jax, numpy as np
import tiny
from natsjax.model import sharding
from natsjax.train.step import Trainer

groups = {
    "model": {"layer_types": "nats,dense,sliding", "sliding_window": 5, "num_layers": 3, "qk_norm": True,
              "final_logit_softcap": 4.0},
    "optimizer": {"spike_threshold": 4.0, "schedule": "wsd", "scorer_learning_rate": 1e-3},
    "loss": {"z_loss": 1e-2},
    "nats": {"final_temperature": 0.5, "budget_ramp": "cosine", "budget_ramp_steps": 5},
    "train": {"batch_size": 8, "gradient_accumulation_steps": 2},
}
batch = tiny.packed_batch(batch=8)
for mesh in json.load(sys.stdin):
    config = tiny.config(**groups, mesh=mesh)
    devices = jax.devices()[: np.prod(list(mesh.values()))]
    trainer = Trainer(config, tiny.VOCAB_SIZE, sharding.make_mesh(config.mesh, devices))
    state = trainer.init()
    for _ in range(3):
        state, metrics = trainer.step(state, batch)
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(metrics))[0]
    print(json.dumps({jax.tree_util.keystr(path): np.asarray(value).tolist() for path, value in flat}), flush=True)
"""


def test_all_metrics_of_a_step_are_those_of_one_device():
    one, *others = json_lines(STEPS, MESHES, devices=8)
    assert len(others) == len(MESHES) - 1
    assert one["['update_norm']"] > 0
    for found in others:
        assert found.keys() == one.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, one[name], rtol=2e-5, atol=1e-6, err_msg=name)
