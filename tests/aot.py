"""Chips that programs are compiled for on a machine without them.

That a compiler takes a program says that its layouts and its memory fit, not that it is right or fast. ``.ci/aot``
installs the compilers (``pip install -e '.[test,tpu]'``, or of the version of jax ``pip install --no-deps
jax-cuda13-plugin jax-cuda13-pjrt``) and runs the files, each of which takes minutes:

    JAX_PLATFORMS=cpu python -m pytest -n 0 -m aot tests/test_attention_tpu_aot.py
"""

import importlib.util
import os

# Before libtpu is loaded: it would ask the cloud's metadata server which machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import functools

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh
from planned import check_total, plan_and_program
from processes import ROOT

from natsjax.config import Config
from natsjax.plan.topologies import topology
from natsjax.runtime.flags import read_config_file

has_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: jax[tpu] has it"
)
has_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for a GPU needs jax-cuda13-plugin and jax-cuda13-pjrt",
)
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def mesh_of(chip, shape=(1,), axes=("device",)):
    """Chips of ``TOPOLOGIES``, or an ``h100``."""
    if chip == "h100":
        options = {"platform": "cuda", "topology_name": "", "topology": "1x1x1", "target_config": H100}
    else:
        options = {"platform": "tpu", "topology_name": TOPOLOGIES[chip]}
    devices = topologies.get_topology_desc(**options).devices
    return Mesh(np.array(devices[: np.prod(shape)]).reshape(shape), axes)


def array(mesh, dtype, *shape, spec=()):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))


def attention_arguments(mesh, length, num_heads, num_kv_heads, head_dim, dtype, specs=((),) * 5, num_roles=3):
    """Query, key, value, roles, and the data of a sample key."""
    key = (dtype, 1, length, num_kv_heads, head_dim)
    query, roles = (dtype, 1, length, num_heads, head_dim), ("float32", 1, num_kv_heads, length, num_roles)
    shapes = [query, key, key, roles, ("uint32", 2)]
    return [array(mesh, *shape, spec=spec) for shape, spec in zip(shapes, specs, strict=True)]


def config_of(name):
    """The config of a file of ``configs/``, and a word for it behind a colon."""
    file, colon, word = name.partition(":")
    return Config.from_dict(read_config_file(f"{ROOT}/configs/{file}.py{colon}{word}"))


def planned(config, name, *plan):
    """The plan, whose memory is what the compiler itself says, and that."""
    made, compiled = plan_and_program(config, topology(name), *plan)
    check_total(made.memory, compiled)
    return made, compiled.memory_analysis()
