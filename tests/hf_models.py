"""Tiny models of transformers with random weights, their folders and logits; PyTorch is imported when asked for."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from natsjax.model.inputs import Batch

VOCAB_SIZE = 300
"""More than the tokenizer's tokens, as models that are padded to a round number have."""
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": ("Llama", {"rope_theta": 500.0, "rms_norm_eps": 1e-5}),
    "llama tied, wide heads": ("Llama", {"tie_word_embeddings": True, "head_dim": 12, "num_key_value_heads": 1}),
    "llama linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "llama 3": (
        "Llama",
        {
            "rope_theta": 100.0,
            "head_dim": 16,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 10}),
    "mistral without windows": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2 yarn": (
        "Qwen2",
        {
            "rope_theta": 100.0,
            "hidden_size": 64,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 sliding, yarn": (
        "Qwen3",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 3.0,
                "original_max_position_embeddings": 21,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
                "mscale": 1.5,
                "mscale_all_dim": 0.5,
            },
        },
    ),
}
"""Class and fields of each; windows are shorter than the texts, and YaRN's ramps go over several pairs."""


def cases(names, quick):
    """Names of cases, of which the quick suite runs some: each of the others checks a part of what these check."""
    assert set(quick) <= set(names)
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


def modules():
    """``torch`` and ``transformers``; the test is skipped where they are not installed (``natsjax[torch]``)."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'natsjax[torch]'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'natsjax[torch]'")
    transformers.logging.set_verbosity_error()
    return torch, transformers


def make(name, seed=0, **changes):
    """A model of ``MODELS``, all of whose parameters are random."""
    torch, transformers = modules()
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | fields | changes, attn_implementation="eager")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which begin at 1 and 0
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def write_tokenizer(folder):
    """A byte-level tokenizer of 258 tokens, BOS and EOS the last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|begin|>", "<|end|>"])
    library.save(str(folder / "tokenizer.json"))
    declared = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))


def save(model, folder, **options):
    """Writes a model and a tokenizer."""
    model.save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


def load(folder, dtype=None, **options):
    """A model of a folder, as transformers loads it; float32 where no dtype is given."""
    torch, transformers = modules()
    options = {"dtype": torch.float32 if dtype is None else dtype, "attn_implementation": "eager"} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def texts(lengths=(23, 9, 16), vocab_size=VOCAB_SIZE, seed=0):
    """Random tokens of several lengths: padded ids, and which of them are tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, (len(lengths), max(lengths)))
    return ids, np.arange(max(lengths)) < np.array(lengths)[:, None]


def their_logits(model, ids, is_token):
    """Of transformers, float32 ``[b, t, v]``."""
    torch, _ = modules()
    with torch.no_grad():
        mask = torch.tensor(is_token.astype(np.int64))
        return model(input_ids=torch.tensor(ids), attention_mask=mask).logits.float().numpy()


def our_logits(run, ids, is_token):
    """Of natsjax, float32 ``[b, t, v]``."""
    ends = np.broadcast_to(is_token.sum(-1, keepdims=True), ids.shape)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    batch = Batch(*(jnp.asarray(x, jnp.int32) for x in (ids, positions, np.where(is_token, ends, 0))))
    return np.asarray(run.model(batch)[0])


def assert_same_logits(ours, theirs, is_token, tolerance=1e-4):
    """Compares logits of tokens, by the largest of all."""
    difference = np.abs(ours - theirs)[is_token].max() / np.abs(theirs[is_token]).max()
    assert difference <= tolerance, difference
