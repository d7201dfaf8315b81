"""All fields of a run's config: default, meaning, unit, limits, and whether the field may change on resume.

A config file in ``configs/`` edits the locked ``ConfigDict`` of ``default_config()``; ``Config.from_dict`` turns it,
with the overrides of the command line, into the frozen dataclasses below, which are all that the rest of natsjax sees.
``natsjax.config_checks`` checks fields against each other before any work begins.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from natsjax import config_checks
from natsjax.config_fields import MIXTURE, PathSyntax, build, config_field

LayerType = Literal["nats", "dense", "sliding", "gated", "head_roles", "selective"]
LAYER_TYPES: tuple[LayerType, ...] = typing.get_args(LayerType)
ROLE_LAYER_TYPES = ("nats", "gated", "head_roles")
"""Types of layers whose keys have roles; a model has one of them at most, for all its layers have the same scorer."""

FORMER_DEFAULTS: dict[str, Any] = {
    "data.shuffle": "documents",
    "nats.final_noise": 1.0,
    "nats.initial_roles": (1 / 3, 1 / 3, 1 / 3),
    "nats.kv_penalty": 0.1,
    "nats.kv_penalty_gain": 0.0,
    "nats.kv_penalty_lr": 0.02,
    "nats.min_kv_penalty": 1e-3,
    "nats.noise_end": 0.9,
}
"""What runs of earlier versions have in fields whose default has changed or that are new: such a run keeps its value
when it is resumed with today's default, and a stored config without the field means it."""

RENAMED_FIELDS = {
    "model.attention": "model.layer_types",
    "model.width": "model.embed_dim",
    "model.mlp_width": "model.mlp_dim",
    "model.rope_base": "model.rope_theta",
    "model.norm_epsilon": "model.norm_eps",
    "nats.end_temperature": "nats.final_temperature",
    "nats.price_gradient": "nats.kv_penalty_gradient",
    "nats.price": "nats.kv_penalty_mode",
    "nats.kv_price": "nats.kv_penalty",
    "nats.min_kv_price": "nats.min_kv_penalty",
    "nats.max_kv_price": "nats.max_kv_penalty",
    "nats.price_rate": "nats.kv_penalty_lr",
    "nats.dial": "nats.biased_roles",
    "optimizer.end_learning_rate": "optimizer.final_learning_rate",
    "optimizer.clip_norm": "optimizer.clip_by_global_norm",
    "optimizer.z_loss": "loss.z_loss",
    "train.num_microbatches": "train.gradient_accumulation_steps",
    "train.initial_parameters": "train.init_from",
    "train.fresh_scorer": "train.reinit_scorer",
    "train.watchdog": "train.hang_timeout_seconds",
    "checkpoint.keep_last": "checkpoint.max_to_keep",
    "eval.num_dial_contexts": "eval.num_calibration_contexts",
}
"""New names of fields by their old ones (natsjax 0.1), which a stored ``config.json`` may have and nothing else."""

_RENAMED_VALUES = {"nats.kv_penalty_mode": {"steered": "controlled"}}
"""Present values of these fields by stored ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer: decoder-only, pre-norm with RMSNorm, rotary positions, grouped-query attention, a gated MLP."""

    layer_types: tuple[LayerType, ...] = config_field(
        ("nats",),
        'attention of each layer: "nats" (learned roles), "dense" (full causal attention), "sliding" (the last '
        'sliding_window keys and its own), or a rival of learned roles: "gated" (a gate for each key), "head_roles" (a '
        'role for each KV head), "selective" (queries mask keys for later ones); a pattern that repeats over the '
        "layers, as nats,nats,dense",
    )
    sliding_window: int | tuple[int, ...] = config_field(
        128,
        'keys before its own that a query of a "sliding" layer reads (tokens): one number, or one for each KV head, as '
        "(16, 256)",
        minimum=0,
    )
    num_layers: int = config_field(4, "transformer blocks", minimum=1)
    embed_dim: int = config_field(128, "size of the residual stream (d)", minimum=1)
    num_heads: int = config_field(4, "query heads (n)", minimum=1)
    num_kv_heads: int = config_field(4, "KV heads (k), a divisor of num_heads", minimum=1)
    head_dim: int = config_field(32, "size of queries, keys and values (h), even for the rotary embedding", minimum=2)
    mlp_dim: int = config_field(
        344,
        'size of the MLP\'s hidden layer (f); its matrices are three of d f numbers, or two with "squared_relu"',
        minimum=1,
    )
    activation: Literal["swiglu", "geglu", "squared_relu"] = config_field(
        "swiglu",
        "hidden layer of the MLP: silu(gate) up, gelu(gate) up, or relu(up)^2 without a gate (arXiv:2109.08668)",
    )
    qkv_bias: bool = config_field(False, "add biases to queries, keys and values before the rotary embedding")
    qk_norm: bool = config_field(False, "RMSNorm of each head's queries and keys before the rotary embedding")
    attention_gate: bool = config_field(
        False,
        "multiply each head's result by a sigmoid gate for each of its numbers, computed from the layer's normalized "
        "input (arXiv:2505.06708)",
    )
    attention_sinks: bool = config_field(
        False,
        "one learned logit for each query head in the softmax's denominator, whose value is 0: a head may read "
        "nothing. It starts at 0, the weight of one more key of an average logit",
    )
    final_logit_softcap: float = config_field(0.0, "c in logits = c tanh(logits / c); 0: no cap", minimum=0)
    tie_embeddings: bool = config_field(True, "use the input embedding as the output layer")
    key_shift: bool = config_field(
        False,
        "mix into the keys of every layer those of the token before in its document, by a learned fraction for each "
        "number of a head's key, near 1 in every other KV head at the start and near 0 in the others: a single layer "
        "can then look up what came after a token (smeared keys, arXiv:2209.11895)",
    )
    token_shift: bool = config_field(
        False,
        "add to each token's embedding that of the token before it in its document, times a learned factor for each "
        "channel, which starts at 1/2: a single layer can then look for what came after a token (the smeared keys of "
        "arXiv:2209.11895, at the embedding)",
    )
    embedding_scale: float = config_field(
        0.0, "factor of the input embeddings; 0: the root of embed_dim, which brings them to unit size", minimum=0
    )
    zero_init_output: bool = config_field(
        False, "start the output projections of attention and MLP at zero, so that each block starts as the identity"
    )
    dropout: float = config_field(
        0.0,
        "fraction of numbers that training sets to 0 in the embedded input and in the results of attention and MLP "
        "before they are added to the residual stream",
        minimum=0,
        maximum=0.99,
    )
    rope_theta: float = config_field(10000.0, "base of the rotary wavelengths", minimum=1)
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = config_field(
        "none",
        "rotary embedding for contexts longer than those that the model was trained with: positions divided by "
        "rope_scaling_factor; YaRN (arXiv:2309.00071), which divides those of long wavelengths alone and sharpens "
        "attention; or that of Llama 3.1, which divides them and does not sharpen attention",
    )
    rope_scaling_factor: float = config_field(
        1.0, "how many times longer the contexts are (s), with rope_scaling", minimum=1
    )
    rope_original_context: int = config_field(
        0, 'context length before the extension (tokens), with rope_scaling = "yarn" or "llama3"', minimum=0
    )
    rope_turns: tuple[float, ...] = config_field(
        (),
        "turns in rope_original_context up to which a pair's frequency is divided, and from which it stays; (): 1 and "
        "32 with YaRN, 1 and 4 with Llama 3.1",
        minimum=0,
    )
    rope_ramp: Literal["turns", "pairs"] = config_field(
        "turns",
        "what YaRN goes from one to the other in: turns, as in the paper, or pairs, by a pair's number between the "
        "whole ones that have rope_turns, as the YaRN of transformers and llama.cpp",
    )
    rope_attention_factor: float = config_field(
        0.0, "factor of YaRN's rotated queries and keys; 0: 0.1 ln(s) + 1", minimum=0
    )
    nope: tuple[bool, ...] = config_field(
        (),
        "for each layer, whether it goes without the rotary embedding; a pattern that repeats over the layers, as "
        "layer_types does, for example false,false,false,true; (): no layer does",
    )
    norm_eps: float = config_field(1e-6, "added to the mean square in RMSNorm", minimum=0)
    dtype: Literal["float32", "bfloat16"] = config_field("float32", "dtype of activations")
    param_dtype: Literal["float32", "bfloat16"] = config_field(
        "float32",
        "dtype that parameters, and the averages of AdamW, are stored and updated in; scorer, norms and attention "
        "sinks stay float32. An update below 1/512 of a bfloat16 parameter is lost",
    )
    remat: Literal["none", "full", "dots"] = config_field(
        "none", "recompute in the backward pass: nothing, each block, or each block except its matmuls", resume=True
    )

    @property
    def all_layer_types(self) -> tuple[LayerType, ...]:
        """Type of every layer, first layer first."""
        return self.layer_types * (self.num_layers // len(self.layer_types))

    @property
    def head_windows(self) -> tuple[int, ...]:
        """Windows of a "sliding" layer: one number for each KV head, or one for all of them."""
        return self.sliding_window if isinstance(self.sliding_window, tuple) else (self.sliding_window,)

    @property
    def all_rotary(self) -> tuple[bool, ...]:
        """Flags of the layers with the rotary embedding, first layer first."""
        nope = self.nope or (False,)
        return tuple(not without for without in nope * (self.num_layers // len(nope)))

    @property
    def layer_period(self) -> tuple[tuple[LayerType, bool], ...]:
        """Type of each layer and whether it has the rotary embedding, up to where both begin to repeat."""
        count = math.lcm(len(self.layer_types), len(self.nope) or 1)
        return tuple(zip(self.all_layer_types[:count], self.all_rotary[:count], strict=True))

    @property
    def layer_pattern(self) -> str:
        """``layer_types`` as text, separated by commas."""
        return ",".join(self.layer_types)

    @property
    def has_roles(self) -> bool:
        """True if any layer learns roles."""
        return self.role_layer_type is not None

    @property
    def role_layer_type(self) -> LayerType | None:
        """The type of the layers that learn roles; None: no layer does."""
        return next((kind for kind in self.layer_types if kind in ROLE_LAYER_TYPES), None)

    @property
    def learns_without_local(self) -> bool:
        """True if there are layers that learn roles, and LOCAL is none of them."""
        return self.role_layer_type in ("gated", "head_roles")

    def is_role_layer(self) -> tuple[bool, ...]:
        """Marks the layers that learn roles, first layer first."""
        return tuple(kind in ROLE_LAYER_TYPES for kind in self.all_layer_types)

    @property
    def has_masks(self) -> bool:
        """True if any layer is "selective"."""
        return "selective" in self.layer_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class NatsConfig:
    """Roles and the KV penalty (docs/method.md 2-4); unused where no layer learns roles."""

    window: int = config_field(16, "queries after its own that read a SLIDING key (tokens)", minimum=0)
    windows: tuple[int, ...] = config_field(
        (), "several windows in ascending order, with a SLIDING role for each; (): window alone", minimum=0
    )
    temperature: float = config_field(1.0, "temperature of the straight-through softmax at step 0", minimum=1e-3)
    final_temperature: float = config_field(
        0.0, "temperature at the last step, reached geometrically; 0: it does not change", minimum=0
    )
    noise: float = config_field(1.0, "scale of the Gumbel noise on the scorer's logits at step 0", minimum=0)
    final_noise: float = config_field(
        0.0, "its scale from noise_end on, to which it falls linearly over noise_decay_fraction", minimum=0
    )
    noise_decay_fraction: float = config_field(
        0.5, "fraction of the steps in which the noise falls to final_noise", minimum=0, maximum=1
    )
    noise_end: float = config_field(
        0.7,
        "fraction of the steps after which the noise has fallen; later the roles are those that are served, and the "
        "learning rate must be large enough then for the KV penalty to move them to the budget",
        minimum=0,
        maximum=1,
    )
    initial_roles: tuple[float, ...] = config_field(
        (),
        "fractions of GLOBAL, LOCAL, SLIDING (one for each window) at step 0; of GLOBAL and SLIDING for gated and "
        "head_roles layers, which ignore a third one, of LOCAL; (): nearly all SLIDING with the longest window that "
        "the first budget has room for, as many of each other role, so that roles drawn at random cost half of what "
        "that budget leaves above this window alone; under a ramp as many of each",
        minimum=1e-6,
        maximum=1,
    )
    mask_gradient: Literal["exact", "sampled", "visible"] = config_field(
        "exact",
        "pairs that the role gradient is computed from: all causal ones, or the visible ones with a sample of the "
        "masked-out ones, or without",
    )
    sampled_fraction: float = config_field(
        1 / 8,
        'fraction of queries whose masked-out pairs are computed under mask_gradient = "sampled"',
        minimum=1e-3,
        maximum=1,
    )
    kv_penalty_gradient: Literal["constant", "exact"] = config_field(
        "constant",
        "gradient of the KV penalty: each role with lifetimes held constant, or exact (a GLOBAL token ends LOCAL keys)",
    )
    kv_penalty_mode: Literal["controlled", "fixed"] = config_field(
        "controlled", "adjust kv_penalty so that the KV fraction meets kv_budget, or keep it fixed"
    )
    kv_budget: float = config_field(
        0.15, "KV fraction that a controlled KV penalty is adjusted to", minimum=1e-6, maximum=1
    )
    kv_penalty: float = config_field(
        0.02, "loss in nats per token for a KV fraction of 1; the initial value when controlled", minimum=0
    )
    min_kv_penalty: float = config_field(5e-3, "lower bound of a controlled kv_penalty", minimum=0)
    max_kv_penalty: float = config_field(10.0, "upper bound of a controlled kv_penalty", minimum=0)
    kv_penalty_lr: float = config_field(
        0.0,
        "change of log(kv_penalty) per step and unit of log(KV fraction / budget), within 1 (integral); 0: 60 over the "
        "number of steps, within 0.02 and 0.1, so that short runs get there too",
        minimum=0,
    )
    kv_penalty_gain: float = config_field(
        4.0, "log(kv_penalty) per unit of log(KV fraction / budget), within 1 (proportional)", minimum=0
    )
    average_decay: float = config_field(
        0.9, "decay per step of the KV fraction's running average", minimum=0, maximum=0.9999
    )
    budget_ramp_start: int = config_field(0, "steps before the budget begins to fall from 1", minimum=0)
    budget_ramp_steps: int = config_field(0, "steps over which the budget falls from 1 to kv_budget", minimum=0)
    budget_ramp: Literal["linear", "geometric", "cosine"] = config_field("linear", "shape of that fall")
    biased_roles: Literal["by_sign", "global", "global_local"] = config_field(
        "by_sign",
        "roles whose logits get the role bias in evaluation, beside longer windows; by_sign: GLOBAL where it keeps "
        "more, GLOBAL and LOCAL where it keeps less",
        resume=True,
    )

    @property
    def sliding_windows(self) -> tuple[int, ...]:
        """The window of each SLIDING role, ascending."""
        return self.windows or (self.window,)

    @property
    def num_roles(self) -> int:
        """GLOBAL, LOCAL, and a SLIDING role for each window."""
        return len(self.role_names)

    @property
    def role_names(self) -> tuple[str, ...]:
        """Names of the roles, by their number; with several windows a SLIDING role's has its own."""
        windows = self.sliding_windows
        return ("GLOBAL", "LOCAL", *("SLIDING" if len(windows) == 1 else f"SLIDING {window}" for window in windows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """The associative-recall task (``natsjax.data.RecallTask``); used with ``data.source = "recall"``."""

    num_pairs: int = config_field(4, "key-value pairs in the first half of a sequence", minimum=1)
    num_queries: int = config_field(0, "keys that are asked for in the second half; 0: all of them", minimum=0)
    num_keys: int = config_field(32, "different keys", minimum=1)
    num_values: int = config_field(32, "different values", minimum=1)
    num_fillers: int = config_field(32, "different filler tokens", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and evaluation data, and how a corpus is prepared."""

    source: Literal["corpus", "recall", "none"] = config_field(
        "corpus", "a prepared corpus, the synthetic recall task, or none: what an imported model learned from"
    )
    input: str = config_field(
        "",
        "folder or file of text, FOLDER:SPLIT of a saved dataset, or package:NAME; prepared where prepared_dir "
        "does not exist",
        path=PathSyntax(prefix="package:"),
    )
    mixture: str = config_field(
        "",
        "prepared corpora with weights, instead of one corpus: DIR=WEIGHT,DIR=WEIGHT; the weights are fractions "
        "of the training tokens, up to a factor",
        path=MIXTURE,
    )
    prepared_dir: str = config_field(
        "", "folder of the prepared corpus; empty: corpus/ in the workdir", resume=True, path=PathSyntax()
    )
    tokenizer: str = config_field(
        "bpe",
        '"bpe", "byte", the folder of a tokenizer, or a tokenizer.json, SentencePiece .model or .tiktoken file; '
        "used when preparing",
        path=PathSyntax(words=("bpe", "byte")),
    )
    tiktoken_pattern: str = config_field(
        "",
        "pattern by which a .tiktoken tokenizer splits text before BPE: gpt2, r50k, p50k, cl100k, o200k or a "
        "regular expression; empty: its publisher's, where the file is known; used when preparing",
    )
    vocab_size: int = config_field(
        2048, "entries of a trained BPE, BOS and EOS among them; used when preparing", minimum=258
    )
    validation_input: str = config_field(
        "", "text held out for evaluation; empty: a part of input", path=PathSyntax(prefix="package:")
    )
    held_out_fraction: float = config_field(
        0.05, "fraction of the documents held out for evaluation", minimum=0, maximum=1
    )
    text_field: str = config_field("text", "field or column of the text in JSON files, Parquet files and datasets")
    skip_bad_files: bool = config_field(
        False, "skip files that are damaged, not UTF-8, pointers or unreadable, instead of stopping"
    )
    deduplicate: bool = config_field(False, "drop exact copies of documents; used when preparing")
    context_length: int = config_field(256, "tokens in a training sequence (t)", minimum=2)
    shuffle: Literal["contexts", "documents"] = config_field(
        "contexts",
        "unit that each epoch shuffles: documents and then the contexts cut from them, so that a batch has many "
        "documents, or documents alone; a resumed run keeps its own",
    )
    recall: RecallConfig = dataclasses.field(default_factory=RecallConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer: clipping by global norm, an update rule, weight decay, a linear warm-up and a schedule."""

    name: Literal["adamw", "muon", "lion", "adafactor", "schedule_free"] = config_field(
        "adamw",
        "update rule: AdamW; Muon for the matrices of attention and MLP, with AdamW for the rest; Lion; Adafactor "
        "without scaling by the parameters' size; or schedule-free AdamW, evaluated at its average",
    )
    schedule: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = config_field(
        "cosine",
        "learning rate after the warm-up: a cosine or a line down to the last step; wsd (warm-up-stable-decay): "
        "constant, then a line; constant; or inverse_sqrt: falling as sqrt(warmup_steps / step)",
    )
    decay_fraction: float = config_field(0.2, 'fraction of the steps in which "wsd" decays', minimum=0, maximum=1)
    peak_learning_rate: float = config_field(2e-3, "learning rate after the warm-up", minimum=0)
    adamw_learning_rate: float = config_field(
        0.0,
        'peak learning rate of what AdamW updates under "muon", the scorer excepted, on the same schedule; 0: '
        "peak_learning_rate",
        minimum=0,
    )
    scorer_learning_rate: float = config_field(
        0.0, "peak learning rate of the scorer, on the same schedule; 0: peak_learning_rate", minimum=0
    )
    final_learning_rate: float = config_field(
        2e-4, 'learning rate at the last step of "cosine", "linear" and "wsd"', minimum=0
    )
    warmup_steps: int = config_field(50, "steps in which the learning rate rises from 0 to its peak", minimum=0)
    weight_decay: float = config_field(
        0.1, "decoupled weight decay of matrices (not of norms, biases and embeddings)", minimum=0
    )
    embedding_weight_decay: float = config_field(
        0.0, "decoupled weight decay of the embedding and the output layer", minimum=0
    )
    beta1: float = config_field(0.9, "decay of the gradient's running average (momentum)", minimum=0, maximum=0.999999)
    beta2: float = config_field(0.95, "decay of the squared gradient's running average", minimum=0, maximum=0.999999)
    muon_beta: float = config_field(0.95, "decay of Muon's momentum", minimum=0, maximum=0.999999)
    epsilon: float = config_field(1e-8, "constant added to the root of the squared gradient's average", minimum=0)
    momentum_dtype: Literal["float32", "bfloat16"] = config_field(
        "float32", "dtype in which the gradient's running average is stored; that of its square is float32"
    )
    ema_decay: float = config_field(
        0.0,
        "decay per step of a running average of the parameters, which is then evaluated and served in their place; "
        "0: none",
        minimum=0,
        maximum=0.999999,
    )
    clip_by_global_norm: float = config_field(1.0, "largest global norm of the gradient; 0: no clipping", minimum=0)
    spike_threshold: float = config_field(
        0.0,
        "skip the update when the cross-entropy is this many standard deviations above its running average; 0: never",
        minimum=0,
    )

    @property
    def serves_average(self) -> bool:
        """True if an average of the parameters is evaluated and served, which checkpoints then hold too."""
        return self.ema_decay > 0 or self.name == "schedule_free"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms of the loss besides the cross-entropy and the KV penalty."""

    z_loss: float = config_field(0.0, "weight of the mean squared log-denominator of the output softmax", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    num_steps: int = config_field(1000, "optimizer steps", minimum=1, resume=True)
    num_tokens: int = config_field(
        0, "tokens to train on, instead of num_steps; 0: num_steps", minimum=0, maximum=10**15, resume=True
    )
    num_epochs: float = config_field(
        0.0, "passes over the training documents, instead of num_steps; 0: num_steps", minimum=0, resume=True
    )
    batch_size: int = config_field(32, "sequences in a step, over all microbatches and devices", minimum=1)
    gradient_accumulation_steps: int = config_field(1, "microbatches that a batch is divided into", minimum=1)
    init_from: str = config_field(
        "",
        "workdir or export whose parameters a new run starts from; empty: random initialization from seed",
        path=PathSyntax(),
    )
    reinit_scorer: bool = config_field(
        False, "initialize the scorer at random and take the rest from init_from, for example from dense to nats"
    )
    seed: int = config_field(0, "seed of initialization, role noise and data order", minimum=0, maximum=2**31 - 1)
    log_every: int = config_field(10, "steps between lines of metrics", minimum=1, resume=True)
    eval_every: int = config_field(
        0,
        "steps between evaluations on held-out text while training, with the roles as they are served; 0: none",
        minimum=0,
        resume=True,
    )
    early_stopping_evals: int = config_field(
        0,
        "evaluations in a row without a lower held-out loss after which training ends; 0: never",
        minimum=0,
        resume=True,
    )
    progress: bool = config_field(True, "show a progress bar", resume=True)
    hang_timeout_seconds: int = config_field(
        900,
        "seconds without a step after which the place where the run hangs is reported; 0: never",
        minimum=0,
        resume=True,
    )
    profile: tuple[int, ...] = config_field(
        (), "first and last step to record with the JAX profiler, into profile/ in the workdir", minimum=1, resume=True
    )
    step_breakdown: bool = config_field(
        True,
        "profile three steps of a start, for the time of forward pass, backward pass and optimizer in the summary",
        resume=True,
    )
    wandb: str = config_field(
        "", "Weights & Biases project that metrics are also logged to (natsjax[wandb])", resume=True
    )
    trackio: str = config_field("", "trackio project that metrics are also logged to (natsjax[trackio])", resume=True)
    mlflow: str = config_field("", "MLflow experiment that metrics are also logged to (natsjax[mlflow])", resume=True)
    compilation_cache: str = config_field(
        "auto",
        "folder for compiled steps, or none; auto: compiled/ in the workdir, but none on CPUs, between which the "
        "cache does not distinguish; JAX_COMPILATION_CACHE_DIR takes precedence",
        resume=True,
        path=PathSyntax(words=("auto", "none")),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh (``model.sharding``); one axis may be -1, for all remaining devices."""

    data: int = config_field(1, "replicas, across slices too; -1: all remaining devices", minimum=-1, resume=True)
    fsdp: int = config_field(
        -1, "shards of parameters and optimizer state; -1: all remaining devices", minimum=-1, resume=True
    )
    tensor: int = config_field(
        1, "shards of heads, MLP and vocabulary; -1: all remaining devices", minimum=-1, resume=True
    )
    context: int = config_field(1, "shards of the sequence; -1: all remaining devices", minimum=-1, resume=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, from which an interrupted run resumes."""

    save_every: int = config_field(
        200, "steps between checkpoints; the last step is always saved", minimum=1, resume=True
    )
    save_every_minutes: float = config_field(
        0.0,
        "minutes after which a checkpoint is saved in any case, at the next step that is logged; 0: never",
        minimum=0,
        resume=True,
    )
    max_to_keep: int = config_field(2, "checkpoints to keep", minimum=1, resume=True)
    keep_best: bool = config_field(
        True, "with train.eval_every, also save and keep the checkpoint of the lowest held-out loss", resume=True
    )
    keep_every: int = config_field(
        0, "also keep checkpoints whose step is a multiple of this; 0: none", minimum=0, resume=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The evaluation after the last step: perplexity against KV fraction on held-out text."""

    num_contexts: int = config_field(64, "largest number of held-out contexts", minimum=1, resume=True)
    num_calibration_contexts: int = config_field(
        32, "training-split contexts on which the role bias is chosen", minimum=1, resume=True
    )
    batch_size: int = config_field(16, "contexts evaluated at a time", minimum=1, resume=True)
    budgets: tuple[float, ...] = config_field(
        (), "KV budgets to evaluate at; empty: kv_budget times 0.6 to 2", minimum=1e-6, maximum=1, resume=True
    )
    num_sinks: int = config_field(4, "first tokens that StreamingLLM keeps", minimum=0, resume=True)
    bootstrap_samples: int = config_field(
        1000, "resamplings of documents for the 95 % interval", minimum=1, resume=True
    )
    num_sample_tokens: int = config_field(
        256, "held-out tokens shown with their roles, in each sample", minimum=1, resume=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The config of a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    nats: NatsConfig = dataclasses.field(default_factory=NatsConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Builds and validates a config from nested dicts (or a ``ConfigDict``); missing fields keep their defaults.

        Raises:
          UserError: an unknown field (with the nearest name), a wrong type, a value out of range, or fields that do
            not fit together.
        """
        config = build(cls, values, renamed=RENAMED_FIELDS)
        config_checks.check(config)
        return config

    @classmethod
    def from_stored(cls, values: Any) -> "Config":
        """Builds the config of a run from its ``config.json``, also from one that an older natsjax has written.

        A field that is missing keeps its default, or gets the value that matches what that version did.

        Raises:
          UserError: see ``from_dict``.
        """
        if isinstance(values, Mapping):
            values = _with_new_names(values)
            for path, former in FORMER_DEFAULTS.items():
                group, name = path.split(".")
                if isinstance(values.get(group), Mapping):
                    values = {**values, group: {name: former, **values[group]}}
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts of plain values, from which ``Config.from_dict`` builds the same config."""
        return dataclasses.asdict(self)


def default_config() -> ml_collections.ConfigDict:
    """Returns all fields at their defaults, as a locked ``ConfigDict`` for a config file to edit.

    Types are checked by ``Config.from_dict``, whose errors name the field.
    """
    return ml_collections.ConfigDict(Config().to_dict(), type_safe=False).lock()


def _with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames stored fields and values to their present names."""
    result = {group: dict(fields) if isinstance(fields, Mapping) else fields for group, fields in values.items()}
    for old, new in RENAMED_FIELDS.items():
        (old_group, old_name), (group, name) = old.split("."), new.split(".")
        fields = result.get(old_group)
        if not isinstance(fields, dict) or old_name not in fields:
            continue
        value = fields.pop(old_name)
        if isinstance(value, str):
            value = _RENAMED_VALUES.get(new, {}).get(value, value)
        target = result.setdefault(group, {})
        if isinstance(target, dict):
            target[name] = value
    return result
