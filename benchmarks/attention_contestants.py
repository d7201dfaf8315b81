"""Contestants: our attention and its rivals, forward and backward, as calls without arguments."""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would spin beside XLA's

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention.tiling import Problem, Tiling

MAX_DENSE_BYTES = 3 << 30  # of float32 logits: jax.nn's attention on a CPU holds them all
BY_HEAD = jax.P(None, None, "head")  # [b, t, n, h]
ROLES_BY_HEAD = jax.P(None, "head")  # [b, k, s, …]


class Case(NamedTuple):
    """One attention problem, batch 1.

    Attributes:
      length: tokens.
      global_fraction: of the tokens that are GLOBAL.
      window: of SLIDING tokens.
      num_heads, num_kv_heads, head_dim: of the attention.
      dtype: of query, key and value.
      devices: that the heads are divided among.
    """

    length: int
    global_fraction: float
    window: int
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    devices: int = 1

    @property
    def problem(self) -> Problem:
        """Problem that a tiling is chosen for, on one device."""
        heads, group = self.num_kv_heads // self.devices, self.num_heads // self.num_kv_heads
        return Problem(1, self.length, self.length, heads, group, self.head_dim, self.window, dtype=self.dtype)


class Inputs(NamedTuple):
    """float32 arrays of a case: ``query``, ``dout [1, t, n, h]``, ``key``, ``value [1, s, k, h]``, ``roles``."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    dout: np.ndarray
    role_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Something to be timed: ``call()`` returns when the result is there."""

    name: str
    call: Callable[[], object]


def inputs(case: Case, seed: int = 0) -> Inputs:
    """Returns random arrays and roles of a case."""
    rng = np.random.default_rng(seed)
    shape = (1, case.length, case.num_heads, case.head_dim)
    query, dout = rng.normal(size=(2, *shape)).astype(np.float32)
    key, value = rng.normal(size=(2, 1, case.length, case.num_kv_heads, case.head_dim)).astype(np.float32)
    rest = (1 - case.global_fraction) / 2
    ids = rng.choice(3, (1, case.num_kv_heads, case.length), p=[case.global_fraction, rest, rest])
    return Inputs(query, key, value, dout, ids.astype(np.int32))


def timed_call(function: Callable[..., Any], case: Case, arguments: tuple[Any, ...], in_specs, out_specs):
    """Compiles a call to be timed, heads divided among the devices; also returns the bytes of its temporaries."""
    if case.devices > 1:
        mesh = jax.make_mesh((case.devices,), ("head",), devices=jax.devices()[: case.devices])
        function = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        arguments = jax.device_put(arguments, tuple(jax.NamedSharding(mesh, spec) for spec in in_specs))
    program = jax.jit(function).lower(*arguments).compile()
    temporaries = case.devices * program.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(program(*arguments)), temporaries


def one_pass(case: Case, kind: str, implementation: str, tiling: Tiling) -> Callable[..., Any]:
    """Ours: ``f(query, key, value, roles, dout, sample_key)``; gradients of all four but for "forward"."""

    def attend(query, key, value, roles, sample_key):
        gradient = "visible" if kind == "forward" else kind
        return na.nats_attention(
            *(query, key, value, roles),
            window=case.window,
            mask_gradient=gradient,
            sample_key=sample_key,
            implementation=implementation,
            tiling=tiling,
        )

    def backward(query, key, value, roles, dout, sample_key):
        out, pullback = jax.vjp(lambda *primal: attend(*primal, sample_key), query, key, value, roles)
        return pullback(dout.astype(out.dtype))

    def forward(query, key, value, roles, dout, sample_key):
        return attend(query, key, value, roles, sample_key)

    return forward if kind == "forward" else backward


def ours(case: Case, given: Inputs, kind: str, by_name: dict[str, Tiling], implementation: str):
    """Returns our contestants of one pass, by tiling, and the bytes of temporaries of each compiled program."""
    arrays = [jnp.asarray(x, case.dtype) for x in (given.query, given.key, given.value)]
    arguments = (*arrays, jax.nn.one_hot(given.role_ids, 3), jnp.asarray(given.dout, case.dtype), jax.random.key(0))
    specs = (*[BY_HEAD] * 3, ROLES_BY_HEAD, BY_HEAD, jax.P())
    results = BY_HEAD if kind == "forward" else specs[:4]
    contestants, temporaries = [], {}
    for name, tiling in by_name.items():
        run = one_pass(case, kind, implementation, tiling)
        call, temporaries[name] = timed_call(run, case, arguments, specs, results)
        contestants.append(Contestant(name, call))
    return contestants, temporaries


def jax_rival(case: Case, given: Inputs, kind: str, platform: str) -> Contestant | None:
    """Builds causal ``jax.nn.dot_product_attention``: cuDNN's on a GPU, XLA's elsewhere while its logits fit."""
    name, implementation = ("cudnn", "cudnn") if platform == "gpu" else ("jax", "xla")
    if implementation == "xla" and 4 * case.num_heads * case.length**2 > MAX_DENSE_BYTES:
        return None
    arguments = tuple(jnp.asarray(x, case.dtype) for x in given[:4])
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)

    def backward(query, key, value, dout):
        return jax.vjp(attend, query, key, value)[1](dout)

    def forward(query, key, value, dout):
        return attend(query, key, value)

    run, results = (forward, BY_HEAD) if kind == "forward" else (backward, (BY_HEAD,) * 3)
    return Contestant(name, timed_call(run, case, arguments, (BY_HEAD,) * 4, results)[0])


def torch_rivals(case: Case, given: Inputs, kind: str, platform: str) -> Iterable[Contestant]:
    """Builds PyTorch's dense attention on a CPU, FlexAttention with the same mask on a GPU; none without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if platform == "gpu" and not torch.cuda.is_available():
        return
    device = "cuda" if platform == "gpu" else "cpu"
    arrays = [torch.from_numpy(np.moveaxis(x, 1, 2).copy()).to(device, getattr(torch, case.dtype)) for x in given[:4]]
    if platform == "gpu":
        attend, name = _flex_attention(torch, case, given), "flex"
    else:
        name = "torch"
        attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)

    def call():
        primal = [x.detach().requires_grad_(kind != "forward") for x in arrays[:3]]
        out = attend(*primal)
        if kind != "forward":
            out.backward(arrays[3])
        if device == "cuda":
            torch.cuda.synchronize()

    yield Contestant(name, call)


def _flex_attention(torch: Any, case: Case, given: Inputs) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    end = np.asarray(na.key_end_from_roles(jnp.asarray(given.role_ids), window=case.window))
    key_end = torch.from_numpy(end.copy()).cuda()
    group = case.num_heads // case.num_kv_heads

    def visible(b, head, t, s):
        return (s <= t) & (t < key_end[b, head // group, s])

    mask = create_block_mask(visible, 1, case.num_heads, case.length, case.length, device="cuda")
    return functools.partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True)
