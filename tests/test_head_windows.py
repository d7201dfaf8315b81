"""Sliding layers whose KV heads have windows of their own: against pair-by-pair definitions, decoded, on a mesh."""

import json

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from processes import ROOT, json_lines

from natsjax import evaluate, export, kv_fraction
from natsjax.config import Config
from natsjax.data import piece_lengths
from natsjax.decode.generation import generate
from natsjax.errors import UserError
from natsjax.evaluate.decoded import measure_decoding
from natsjax.evaluate.masked import measure
from natsjax.model.attention import Attention, MaskedAttention, RoleSampling
from natsjax.model.inputs import Batch
from natsjax.policies.interval import FullAttention, RandomKeys, SlidingWindow
from natsjax.policies.nats import Nats
from natsjax.report.results import read
from natsjax.runtime.flags import parse_train_flags
from natsjax.train.flops import step_flops
from natsjax.train.role_statistics import live_thresholds, role_sums
from natsjax.train.step import Trainer

WINDOWS = (2, 9)
MIXED = {"layer_types": "nats,dense,sliding", "num_layers": 3, "sliding_window": WINDOWS}


def reads(batch, window):
    """bool ``[b, t, s]``: the query reads the key under this window."""
    end = np.asarray(batch["document_end"])
    t, s = np.arange(end.shape[1])[:, None], np.arange(end.shape[1])
    return (s <= t) & (t - s <= window) & (t < end[:, None])


def test_each_head_reads_its_window_and_nothing_else():
    config = tiny.config(model={"layer_types": "sliding", "sliding_window": WINDOWS})
    attention, rows = Attention(config, nnx.Rngs(0)), tiny.packed_batch()
    batch = Batch.from_rows(rows)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*batch.inputs.shape, 16)), jnp.float32)
    arrays = attention.qkv_proj(x, batch.positions)
    sampling = RoleSampling(noise_key=jax.random.key(0))
    got, roles = MaskedAttention(batch, sampling, "sliding")(attention, x, *arrays)
    query, key, value = (np.asarray(array, np.float64) for array in arrays)
    for head, window in enumerate(WINDOWS):
        visible = reads(rows, window)
        logits = np.einsum("btgh,bsh->bgts", query[:, :, head], key[:, :, head]) * 4**-0.5
        weights = np.where(visible[:, None], np.exp(logits), 0)
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        expected = np.einsum("bgts,bsh->btgh", weights, value[:, :, head])
        np.testing.assert_allclose(got[:, :, head], expected, atol=1e-5)
        assert roles.lifetime[head] == visible.sum()
        ends = np.max(np.where(visible, np.arange(24)[:, None] + 1, 0), axis=1)
        np.testing.assert_array_equal(roles.key_end[:, head], ends)
    assert (np.asarray(roles.ids) == 2).all()


PATTERN = decoding.config(model=MIXED)
PARAMETERS = decoding.parameters_of(PATTERN)
POLICIES = [Nats(0.3), FullAttention(), SlidingWindow(4), RandomKeys(0.3, window=1, seed=2)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.method)
@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_give_the_logits_of_the_masked_forward(policy, chunk):
    rows = decoding.prompts([29, 12])
    expected, _ = decoding.masked_logits(PATTERN, PARAMETERS, rows, policy)
    got, _ = decoding.chunked_logits(decoding.decoder(PATTERN, PARAMETERS, policy), rows, chunk)
    assert decoding.error(got, expected, rows) <= 2e-5


def test_generated_tokens_are_those_of_the_masked_forward():
    rows = decoding.prompts([3, 17])
    found = generate(decoding.decoder(PATTERN, PARAMETERS), rows, max_new_tokens=20)
    decoding.check_generated(PATTERN, PARAMETERS, rows, found)


def test_a_run_is_measured_by_head_with_masks_as_through_the_buffer_and_from_an_export(tmp_path):
    config = tiny.config(model=MIXED, nats={"kv_budget": 0.7}, eval={"num_contexts": 3})
    run = tiny.make_run(tmp_path / "run", config)
    contexts = run.data.contexts("validation", 3)
    pairs = [reads(contexts, window).sum() for window in WINDOWS]
    for policy in (Nats(), FullAttention(), SlidingWindow(4)):
        masked, through = measure(run, contexts, policy), measure_decoding(run, contexts, policy, chunk=5)
        np.testing.assert_allclose(through.live_pairs, masked.live_pairs)
        assert through.perplexity == pytest.approx(masked.perplexity, rel=1e-4)
        expected = (
            [reads(contexts, min(window, 4)).sum() for window in WINDOWS] if policy == SlidingWindow(4) else pairs
        )
        np.testing.assert_array_equal(masked.live_pairs[2], expected)
    export.export(tmp_path / "run", tmp_path / "export")
    again = measure(export.export(tmp_path / "export", tmp_path / "another"), contexts, Nats())
    assert again.perplexity == measure(run, contexts, Nats()).perplexity
    found = evaluate.run(tmp_path / "run", loaded=run, budgets=[0.7], progress=False)
    fixed = [row for row in found.rows if row["method"] in ("sliding_window", "streaming_llm")]
    assert len(fixed) == 2
    for row in fixed:
        assert row["kv_fraction"] == pytest.approx(row["budget"], abs=0.04)
    sample = read(tmp_path / "run/report").samples[0]
    assert sample["windows"] == [[[2], [2]], [[2], [2]], [[2], [9]]]


def test_fractions_are_means_over_heads():
    config = tiny.config(model=MIXED, nats={"initial_roles": (1e-6, 1e-6, 1 - 2e-6), "window": 1})
    trainer, batch = Trainer(config, tiny.VOCAB_SIZE), tiny.packed_batch(batch=4)
    _, metrics = trainer.step(trainer.init(), batch)
    lengths = piece_lengths(batch)
    causal = np.sum(lengths * (lengths + 1) // 2)
    near = [reads(batch, window).sum() for window in WINDOWS]
    sliding_roles = kv_fraction.all_sliding_kv_fraction(lengths, 1)
    counted = (sliding_roles + 1 + np.mean(near) / causal) / 3
    assert kv_fraction.all_sliding_model_kv_fraction(config, lengths) == pytest.approx(counted)
    assert float(metrics["kv_fraction"]) == pytest.approx(counted, rel=1e-5)
    np.testing.assert_allclose(metrics["live_keys"][2], np.array(near) / lengths.sum(), rtol=1e-5)
    fixed = tiny.config(model={"layer_types": "sliding", "sliding_window": WINDOWS})
    by_window = [
        tiny.config(model={"layer_types": "sliding", "sliding_window": window, "num_kv_heads": 2}) for window in WINDOWS
    ]
    assert kv_fraction.live_fraction(fixed) == pytest.approx(np.mean([kv_fraction.live_fraction(x) for x in by_window]))
    attention, others = step_flops(fixed, 16).attention, [step_flops(x, 16).attention for x in by_window]
    assert attention == pytest.approx(np.mean(others))
    assert others[0] < attention < others[1]


def test_statistics_of_roles_know_the_windows_of_heads():
    config = tiny.config(model={"layer_types": "nats,sliding", "sliding_window": WINDOWS}, nats={"window": 5})
    assert kv_fraction.sliding_windows(config).tolist() == [[[5], [5]], [[2], [9]]]
    rows = tiny.packed_batch(batch=4)
    ids = np.full((2, 4, 2, 24), 2, np.int8)
    sums = jax.jit(role_sums, static_argnums=2)(ids, Batch.from_rows(rows), config)
    valid = rows["document_end"] > 0
    for layer, windows in enumerate([(5, 5), WINDOWS]):
        live = np.concatenate([reads(rows, window).sum(-1)[valid] for window in windows])
        more = [np.sum(live > threshold) for threshold in live_thresholds(24)]
        np.testing.assert_array_equal(sums.more_live[layer], more)


def test_a_wrong_number_of_windows_is_a_sentence():
    for windows in ((3,), (1, 2, 3), ()):
        with pytest.raises(
            UserError, match=r"sliding_window = .*: 2 numbers were expected, one for each of model.num_kv"
        ):
            tiny.config(model={"layer_types": "sliding", "sliding_window": windows})
    with pytest.raises(UserError, match="sliding_window = -1: it must be at least 0"):
        tiny.config(model={"sliding_window": (3, -1)})
    with pytest.raises(UserError, match=r"sliding_window = 1\.5 .float.: int was expected"):
        tiny.config(model={"sliding_window": 1.5})


def test_one_number_and_several_arrive_from_flags_files_and_stored_configs(tmp_path):
    assert tiny.config(model={"sliding_window": 7}).to_dict()["model"]["sliding_window"] == 7
    config = tiny.config(model={"sliding_window": [3, 7]})
    assert config.model.sliding_window == (3, 7)
    assert Config.from_stored(json.loads(json.dumps(config.to_dict()))) == config
    hash(config)
    file = tiny.write_config(tmp_path / "mine.py", config)
    smoke = ROOT / "configs/smoke.py"
    for path, text, expected in (
        (file, None, (3, 7)),
        (file, "5", 5),
        (file, "(5,9)", (5, 9)),
        (smoke, "16", 16),
        (smoke, "4,8", (4, 8)),
    ):
        flags = [] if text is None else [f"--config.model.sliding_window={text}"]
        flags = [f"--config={path}", "--workdir=w", "--config.model.num_kv_heads=2", *flags]
        assert parse_train_flags(["train.py", *flags])[0].model.sliding_window == expected
    with pytest.raises(UserError, match="sliding_window = 'wide'"):
        parse_train_flags(["train.py", f"--config={smoke}", "--workdir=w", "--config.model.sliding_window=wide"])


MESHES = [{"fsdp": 1}, {"fsdp": 2, "tensor": 2, "context": 2}]
STEPS = """
import json, sys
import jax, numpy as np
import decoding, tiny
from natsjax.policies import FullAttention, RandomKeys
from natsjax.model import sharding
from natsjax.train.step import Trainer
from test_head_windows import MIXED, PATTERN, PARAMETERS

batch, rows = tiny.packed_batch(batch=8), decoding.prompts([3, 17, 1, 9])
for mesh, on in json.load(sys.stdin):
    config = tiny.config(model=MIXED, train={"batch_size": 8}, mesh=mesh)
    devices = jax.devices()[: np.prod(list(mesh.values()))]
    trainer = Trainer(config, tiny.VOCAB_SIZE, sharding.make_mesh(config.mesh, devices))
    state = trainer.init()
    for _ in range(2):
        state, metrics = trainer.step(state, batch)
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(metrics))[0]
    found = {jax.tree_util.keystr(path): np.asarray(value).tolist() for path, value in flat}
    for policy in (None, FullAttention(), RandomKeys(0.4, seed=3)):
        decoder = decoding.decoder(PATTERN, jax.device_get(PARAMETERS), policy, mesh=on)
        found[f"logits of {policy}"] = decoding.chunked_logits(decoder, rows, 8)[0].tolist()
    print(json.dumps(found), flush=True)
"""


@pytest.mark.slow
def test_steps_and_logits_do_not_depend_on_the_mesh():
    one, other = json_lines(
        STEPS, list(zip(MESHES, [None, {"data": 4, "tensor": 2, "fsdp": 1}], strict=True)), devices=8
    )
    assert one.keys() == other.keys()
    for name, value in other.items():
        np.testing.assert_allclose(value, one[name], rtol=2e-5, atol=2e-5, err_msg=name)
