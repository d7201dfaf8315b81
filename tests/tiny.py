"""Tiny configs, batches and runs that several tests share."""

import copy
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.config import Config
from natsjax.model.parameters import PARTS
from natsjax.model.transformer import init_parameters
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runs.data import open_data
from natsjax.runs.export import write_export
from natsjax.runs.load import LoadedRun, load
from natsjax.runs.workdir import Workdir
from natsjax.train.role_statistics import QUANTILES
from natsjax.train.step import StepMetrics, Trainer

_BASE = {
    "model": {"num_layers": 2, "embed_dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 24},
    # All roles from the first step on, so that none goes untested.
    "nats": {
        "window": 2,
        "kv_budget": 0.4,
        "kv_penalty": 0.1,
        "final_noise": 1.0,
        "initial_roles": (1 / 3, 1 / 3, 1 / 3),
    },
    "data": {
        "source": "recall",
        "context_length": 24,
        "recall": {"num_pairs": 2, "num_keys": 5, "num_values": 5, "num_fillers": 5},
    },
    "optimizer": {"peak_learning_rate": 1e-2, "final_learning_rate": 1e-3, "warmup_steps": 2},
    "train": {"num_steps": 12, "batch_size": 4, "log_every": 1, "progress": False},
    "checkpoint": {"save_every": 5},
    "eval": {
        "num_contexts": 6,
        "num_calibration_contexts": 4,
        "batch_size": 4,
        "bootstrap_samples": 50,
        "num_sample_tokens": 24,
    },
}
VOCAB_SIZE = 16  # BOS and 5 of each kind


def config(**groups) -> Config:
    """The tiny config with ``group={field: value}`` changed."""
    values = copy.deepcopy(_BASE)
    for group, fields in groups.items():
        for name, value in fields.items():
            values.setdefault(group, {})[name] = value
    return Config.from_dict(values)


def write_texts(folder, count=12) -> pathlib.Path:
    """Files of random words."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(["the", "house", "köln", "was", "là"], 60)))
    return folder


def corpus(folder, **data):
    """Fields of ``data`` for a corpus of bytes from texts that are written to the folder."""
    texts = str(write_texts(folder))
    return {"source": "corpus", "input": texts, "tokenizer": "byte", "held_out_fraction": 0.2} | data


def write_config(file, config) -> pathlib.Path:
    """A config file, as commands take them."""
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\ndef get_config():\n"
        f"    return ConfigDict(json.loads({json.dumps(config.to_dict())!r}), type_safe=False).lock()\n"
    )
    return file


def spread_scorer(parameters, seed=1, scale=1.0):
    """Gives the scorer weights, so that roles depend on the input as they do in a trained model."""
    scorer = parameters["blocks"]["attention"]["scorer"]
    scorer["weight"] = scale * jax.random.normal(jax.random.key(seed), scorer["weight"].shape)
    return parameters


def step_metrics(config: Config, **changes) -> StepMetrics:
    """What a step could report, on the host: all ones and a third of each role, with fields changed."""
    layers, heads = config.model.num_layers, config.model.num_kv_heads
    names = (
        "loss cross_entropy z_loss accuracy kv_fraction kv_penalty kv_budget gradient_norm update_norm learning_rate "
        "temperature noise"
    )
    values = {
        **dict.fromkeys(names.split(), np.float32(1)),
        **{f"{name}/{part}": np.float32(1) for name in ("gradient_norm", "update_norm") for part in PARTS},
        "role_fractions": np.full((layers, heads, 3), 1 / 3, np.float32),
        "live_keys": np.ones((layers, heads), np.float32),
        "live_key_quantiles": np.ones((layers, len(QUANTILES)), np.float32),
        "scorer_entropy": np.ones((layers, heads), np.float32),
        "unended_locals": np.zeros((layers, heads), np.float32),
        "forced_globals": np.float32(0.1),
        "skipped": np.float32(0),
        "skipped_steps": np.float32(0),
    }
    return values | changes


def packed_batch(seed=0, batch=3, length=24, vocab_size=VOCAB_SIZE) -> dict[str, np.ndarray]:
    """Random tokens in several documents a row, the last row with padding."""
    rng = np.random.default_rng(seed)
    cuts = [np.unique(np.append(rng.choice(np.arange(1, length), 2, replace=False), length)) for _ in range(batch)]
    document_end = np.stack([c[np.searchsorted(c, np.arange(length), side="right")] for c in cuts]).astype(np.int32)
    document_end[-1, -4:] = 0
    document_end[-1, :-4] = np.minimum(document_end[-1, :-4], length - 4)
    positions = np.zeros((batch, length), np.int32)
    for s in range(1, length):
        same = (document_end[:, s] == document_end[:, s - 1]) & (document_end[:, s] > 0)
        positions[:, s] = np.where(same, positions[:, s - 1] + 1, 0)
    tokens = rng.integers(0, vocab_size, (batch, length + 1)).astype(np.int32)
    weight = (np.arange(1, length + 1) < document_end).astype(np.float32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weight": weight,
        "positions": positions,
        "document_end": document_end,
    }


def write_random_export(path, config, vocabulary, seed=0) -> LoadedRun:
    """An export of a model with random parameters, also where it begins at zeros and ones."""
    _, parameters = init_parameters(config, vocabulary.vocab_size, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    path.mkdir(parents=True)
    write_export(
        path,
        config=config,
        parameters=jax.tree.unflatten(structure, noisy),
        dtype="float32",
        step=3,
        vocabulary=vocabulary,
        fingerprint="0",
        data="made for a test",
        source="a test",
    )
    return load(path)


def make_run(path, config, step=7) -> LoadedRun:
    """A workdir as training leaves it, with fresh parameters."""
    workdir = Workdir(path)
    workdir.path.mkdir(parents=True)
    data = open_data(config, workdir, progress=False)
    workdir.record(config, data.fingerprint)
    state = Trainer(config, data.vocabulary.vocab_size).init()
    checkpoints = Checkpoints(workdir.checkpoints)
    checkpoints.save(step, state._replace(step=jnp.int32(step)))
    checkpoints.close()
    return load(path)


def make_export(path, config, vocabulary, change=lambda parameters: parameters) -> LoadedRun:
    """A fresh model with its parameters changed, which learned from no data (``data.source`` is "none")."""
    parameters = jax.jit(lambda key: init_parameters(config, vocabulary.vocab_size, key)[1])(jax.random.key(0))
    path.mkdir(parents=True)
    write_export(
        path,
        config=config,
        parameters=change(parameters),
        dtype="float32",
        step=7,
        vocabulary=vocabulary,
        fingerprint="none",
        data="none",
        source="tests",
    )
    return load(path)
