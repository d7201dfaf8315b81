"""Commands make a CPU device for each core where the work divides, and say so; the user's own number stays."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import tiny
from processes import ROOT

from natsjax.model import sharding

CODE = """
import json, logging, sys
from pallas_kernels.nats_attention import tiling
tiling.num_cores = lambda: 4
from natsjax.runtime.cpu_devices import use_cores
import jax

divides = json.loads(sys.argv[1])
asked = use_cores(lambda count: count in divides)
print(json.dumps([asked, jax.device_count(), use_cores(lambda count: count == 3)]))
"""


@pytest.mark.parametrize(
    ("environment", "divides", "expected"),
    [
        ({}, [2, 4], [4, 4]),
        ({}, [2], [2, 2]),
        ({}, [], [1, 1]),
        ({"JAX_NUM_CPU_DEVICES": "1"}, [2, 4], [1, 1]),
        ({"JAX_NUM_CPU_DEVICES": "5"}, [2, 4], [1, 5]),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, [4], [1, 2]),
    ],
    ids=str,
)
def test_devices_are_cores_unless_somebody_said_otherwise(environment, divides, expected):
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    found = subprocess.run(  # a fresh process: JAX reads the environment as it is imported
        [sys.executable, "-c", CODE, json.dumps(divides)],
        env=kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout)[:2] == expected
    assert json.loads(found.stdout)[2] == 1  # too late: devices were touched, or set
    assert ("JAX_NUM_CPU_DEVICES=1 switches this off" in found.stderr) == (expected[0] > 1)


@pytest.mark.parametrize(
    ("changes", "count", "trains", "expected"),
    [
        ({}, 4, True, True),
        ({}, 3, True, False),  # a batch of 4
        ({"train": {"batch_size": 3}}, 2, True, False),
        ({"train": {"batch_size": 3}}, 2, False, True),
        ({"train": {"gradient_accumulation_steps": 2}}, 4, True, False),
        ({"mesh": {"fsdp": 1}}, 2, True, False),  # as many devices as somebody asked for
        ({"mesh": {"fsdp": 1, "tensor": -1}}, 2, True, True),
        ({"mesh": {"fsdp": 1, "tensor": -1}}, 4, True, False),  # 2 KV heads
        ({"mesh": {"fsdp": 2}}, 2, True, True),
    ],
)
def test_a_mesh_fits_where_its_arrays_can_be_divided(changes, count, trains, expected):
    assert sharding.fits(tiny.config(**changes), count, trains=trains) == expected


def test_cores_hold_replicas_unless_a_mesh_is_asked_for():
    config = tiny.config()
    on_cores = sharding.for_cores(config)
    assert sharding.mesh_sizes(on_cores.mesh, 4) == (4, 1, 1, 1)
    assert on_cores == dataclasses.replace(config, mesh=on_cores.mesh)
    asked = tiny.config(mesh={"fsdp": 1, "tensor": -1})
    assert sharding.for_cores(asked) == asked
