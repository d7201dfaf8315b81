"""The config.json of a Hugging Face model as a natsjax config, and back.

Architectures are those whose layers natsjax runs as they are: Llama (also of SmolLM2 and TinyLlama), Mistral, Qwen2 and
Qwen3. Whatever a config asks for and natsjax has not is refused by name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from natsjax.config import Config, DataConfig, LayerType, ModelConfig
from natsjax.config_fields import format_value
from natsjax.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers in ``layer_types``."""

OWN_TYPE = "natsjax"
"""``model_type`` of the folders whose code is our own ``modeling_natsjax.py``; their config has ours in ``natsjax``."""


class _Architecture(NamedTuple):
    """Properties of an architecture that its config leaves out.

    Attributes:
      defaults: of fields that are not the same in all of them.
      qkv_bias: whether queries, keys and values have biases.
      qk_norm: whether heads' queries and keys are normalized.
    """

    defaults: Mapping[str, Any]
    qkv_bias: bool = False
    qk_norm: bool = False


_WINDOWS = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
ARCHITECTURES = {
    "llama": _Architecture({"max_position_embeddings": 2048}),
    "mistral": _Architecture(
        {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    ),
    "qwen2": _Architecture({"num_key_value_heads": 32, "max_position_embeddings": 32768} | _WINDOWS, qkv_bias=True),
    "qwen3": _Architecture(
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128} | _WINDOWS, qk_norm=True
    ),
}
"""By ``model_type``; the defaults are those of transformers' classes, which a config.json may leave out."""

_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""``model.activation`` by ``hidden_act``; transformers' "gelu" is the exact one."""

_ABSENT: dict[str, Any] = {
    "attention_bias": "biases of the attention's output layer",
    "mlp_bias": "biases in the MLP",
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "attn_logit_softcapping": "capped attention logits",
    "final_logit_softcapping": "capped logits in this architecture",
    "quantization_config": "quantized weights (of a folder)",
    "auto_map": "code of a model's own",
    "embedding_multiplier": "factor of the embeddings in this architecture",
    "no_rope_layers": "layers without positions in this architecture",
}
"""What natsjax has no counterpart of, by the field that asks for it where it is set."""


class DescribedModel(NamedTuple):
    """Model that a config of another project describes.

    Attributes:
      config: with the fields of the model and ``data.context_length``; ``data.source`` is "none".
      vocab_size: rows of the embedding.
      bos_id, eos_id: special tokens; None where it names none.
    """

    config: Config
    vocab_size: int
    bos_id: int | None
    eos_id: int | None


def read_hf_config(values: Mapping[str, Any], where: str) -> DescribedModel:
    """Reads a config.json.

    Args:
      values: its content.
      where: the file, for messages.

    Raises:
      UserError: natsjax has no such model, or a value is none that such a field can have.
    """
    fields = _Fields(values, where)
    kind = values.get("model_type")
    if kind == OWN_TYPE:
        own = values.get("natsjax")
        config = _built(own if isinstance(own, Mapping) else {}, where)
        config = dataclasses.replace(config, data=_no_data(config.data.context_length))
        return DescribedModel(config, fields.count("vocab_size"), fields.token("bos"), fields.token("eos"))
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type = {format_value(kind)} is no architecture that natsjax can import; these are "
            f"{', '.join(ARCHITECTURES)}."
        )
    heads = values.get("architectures")
    if isinstance(heads, list) and heads and not any("CausalLM" in str(name) for name in heads):
        raise UserError(f"{where}: architectures = {format_value(heads[0])} is no language model (…ForCausalLM).")
    for name, what in _ABSENT.items():
        if values.get(name):
            raise UserError(f"{where}: {name} = {format_value(values[name])}: natsjax has no {what}.")
    architecture = ARCHITECTURES[kind]
    fields.defaults = architecture.defaults
    num_layers, num_heads = fields.count("num_hidden_layers"), fields.count("num_attention_heads")
    width, length = fields.count("hidden_size"), fields.count("max_position_embeddings")
    types, window = _layer_types(fields, kind, num_layers)
    activation = values.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act = {format_value(activation)}: natsjax has no such activation of a gated MLP; it has "
            f"{', '.join(_ACTIVATIONS)}."
        )
    model = {
        "layer_types": types,
        "num_layers": num_layers,
        "embed_dim": width,
        "num_heads": num_heads,
        "num_kv_heads": fields.count("num_key_value_heads", num_heads),
        "head_dim": fields.count("head_dim", max(1, width // num_heads)),
        "mlp_dim": fields.count("intermediate_size"),
        "activation": _ACTIVATIONS[activation],
        "qkv_bias": architecture.qkv_bias,
        "qk_norm": architecture.qk_norm,
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "embedding_scale": 1.0,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        **_rope(fields, length),
    }
    if window is not None:
        model["sliding_window"] = window - 1
    config = _built({"model": model, "data": dataclasses.asdict(_no_data(length))}, where)
    return DescribedModel(config, fields.count("vocab_size"), fields.token("bos"), fields.token("eos"))


def _no_data(context_length: int) -> DataConfig:
    return DataConfig(source="none", context_length=context_length)


def _built(values: Mapping[str, Any], where: str) -> Config:
    try:
        config = Config.from_stored(values)
        architecture_of(config.model)  # of our own, a folder may name what none is exported with
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return config


class _Fields:
    """Fields of a config.json, each with its type.

    Args:
      values: the content.
      where: the file.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.defaults: Mapping[str, Any] = {}

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, its default where it is absent or null (``default`` where the architecture has none)."""
        value = self.values.get(name)
        return self.defaults.get(name, default) if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        """Returns a positive whole number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, value, "a positive whole number was expected")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a finite number that is not negative."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.error(name, value, "a number of at least 0 was expected")
        return float(value)

    def flag(self, name: str) -> bool:
        """Returns true or false; false where it is absent."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false was expected")
        return value

    def token(self, name: str) -> int | None:
        """Returns the id of BOS or EOS, the first where there are several."""
        value = self.values.get(f"{name}_token_id")
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.error(f"{name}_token_id", value, "a token id was expected")
        return None if value is None or value < 0 else value

    def error(self, name: str, value: Any, what: str) -> UserError:
        """Returns the exception for a field."""
        return UserError(f"{self.where}: {name} = {format_value(value)}: {what}.")


def _layer_types(fields: _Fields, kind: str, num_layers: int) -> tuple[tuple[LayerType, ...], int | None]:
    """Returns ``model.layer_types``, as short as it can be, and the tokens that a sliding layer reads, or None."""
    window = None
    if kind == "mistral":
        # Null is no window, and only a field that is absent has the default.
        window = fields.values["sliding_window"] if "sliding_window" in fields.values else fields.get("sliding_window")
        types = [FULL if window is None else SLIDING] * num_layers
    elif kind == "llama":
        types = [FULL] * num_layers
    else:
        window = fields.get("sliding_window") if fields.flag("use_sliding_window") else None
        if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
            window = None
        first = fields.number("max_window_layers", num_layers)
        types = [FULL if window is None or layer < first else SLIDING for layer in range(num_layers)]
    if (given := fields.values.get("layer_types")) is not None:
        if not isinstance(given, list) or len(given) != num_layers or not set(map(str, given)) <= {FULL, SLIDING}:
            raise fields.error("layer_types", given, f"{num_layers} of {FULL} and {SLIDING} were expected")
        if given != types and not kind.startswith("qwen"):
            raise fields.error("layer_types", given, f"layers of this architecture ({kind}) are all {types[0]} here")
        types = list(given)
    if SLIDING not in types:
        return ("dense",), None
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise fields.error("sliding_window", window, "a positive whole number was expected, for there are such layers")
    names: list[LayerType] = ["sliding" if each == SLIDING else "dense" for each in types]
    return shortest_period(names), window


def shortest_period(names: list[LayerType]) -> tuple[LayerType, ...]:
    """Returns the shortest pattern that repeats to a list."""
    count = len(names)
    sizes = (size for size in range(1, count + 1) if count % size == 0 and names == names[:size] * (count // size))
    return tuple(names[: next(sizes)])


_TURNS = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
_USUAL_TURNS = {"llama3": (1, 4), "yarn": (1, 32)}


def _rope(fields: _Fields, context_length: int) -> dict[str, Any]:
    """Reads the rotary embedding, as any version of transformers writes it."""
    found = fields.values.get("rope_scaling") or fields.values.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise fields.error("rope_scaling", found, "an object was expected")
    if any(isinstance(value, dict) for value in found.values()):
        raise fields.error("rope_parameters", found, "natsjax has one rotary embedding for all layers")
    given = _Fields({"rope_theta": fields.values.get("rope_theta")} | found, fields.where)
    for place in (fields, given):
        if place.number("partial_rotary_factor", 1) != 1:
            raise place.error(
                "partial_rotary_factor", place.get("partial_rotary_factor"), "natsjax rotates whole heads"
            )
    model: dict[str, Any] = {"rope_theta": given.number("rope_theta", 10000.0)}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return model
    if not isinstance(kind, str) or kind not in ("linear", *_TURNS):
        raise fields.error("rope_type", kind, f"natsjax has no such scaling; it has linear, {' and '.join(_TURNS)}")
    if kind == "linear":
        return model | {"rope_scaling": kind, "rope_scaling_factor": given.number("factor")}
    original = given.count("original_max_position_embeddings", context_length)
    is_yarn = kind == "yarn"
    factor = given.number("factor", context_length / original if is_yarn else None)
    turns = tuple(
        given.number(name, default) or default for name, default in zip(_TURNS[kind], _USUAL_TURNS[kind], strict=True)
    )
    model |= {"rope_scaling": kind, "rope_scaling_factor": factor, "rope_original_context": original}
    if turns != _USUAL_TURNS[kind]:
        model["rope_turns"] = turns
    if is_yarn:
        if given.get("truncate", True) is not True:
            raise given.error("truncate", found["truncate"], "natsjax has YaRN's ramp between whole pairs alone")
        model["rope_ramp"] = "pairs"
        if size := _attention_factor(given, factor):
            model["rope_attention_factor"] = size
    return model


def _attention_factor(given: _Fields, factor: float) -> float:
    """Returns YaRN's factor of rotated queries and keys, 0 where it is the usual one."""
    if given.get("attention_factor") is not None:
        return given.number("attention_factor")
    above, below = given.number("mscale", 0), given.number("mscale_all_dim", 0)
    if not above or not below or factor <= 1:
        return 0.0
    return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)


# --- the way out ---


def architecture_of(model: ModelConfig) -> tuple[str, list[str]]:
    """Returns the architecture that a model is written as, and the fields for which it is ``OWN_TYPE``.

    Args:
      model: config.

    Raises:
      UserError: it has layers that neither of them has.
    """
    if "selective" in model.layer_types:
        raise UserError(
            f"model.layer_types = {model.layer_pattern}: neither transformers nor modeling_natsjax.py has "
            '"selective" layers.'
        )
    for name in ("key_shift", "token_shift"):
        if getattr(model, name):
            raise UserError(f"model.{name} = True: neither transformers nor modeling_natsjax.py has it.")
    if "sliding" in model.layer_types and not isinstance(model.sliding_window, int):
        raise UserError(
            f"model.sliding_window = {format_value(model.sliding_window)}: neither transformers nor "
            "modeling_natsjax.py has a window for each KV head."
        )
    own = [
        f"model.{name} = {format_value(getattr(model, name))}"
        for name, usual in (("attention_gate", False), ("attention_sinks", False), ("final_logit_softcap", 0.0))
        if getattr(model, name) != usual
    ]
    if model.has_roles:
        own.append(f"model.layer_types = {model.layer_pattern}")
    if any(model.nope):
        own.append(f"model.nope = {format_value(model.nope)}")
    if model.activation not in _ACTIVATIONS.values():
        own.append(f"model.activation = {model.activation}")
    if model.qkv_bias and model.qk_norm:
        own.append("model.qkv_bias and model.qk_norm")
    if model.rope_scaling == "yarn" and model.rope_ramp != "pairs":
        own.append("model.rope_ramp = turns")
    if own:
        return OWN_TYPE, own
    is_sliding = "sliding" in model.layer_types
    if model.qk_norm:
        return "qwen3", []
    # Qwen2 is the one with layers of both kinds; its biases are 0 where the model has none.
    if model.qkv_bias or (is_sliding and "dense" in model.layer_types):
        return "qwen2", []
    if is_sliding or model.embed_dim % model.num_heads:  # transformers refuses the latter for Llama alone
        return "mistral", []
    return "llama", []


def hf_config(config: Config, vocab_size: int, *, dtype: str, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """Returns the content of a config.json.

    Args:
      config: of the run.
      vocab_size: v.
      dtype: of the tensors in the folder.
      bos_id, eos_id: special tokens; None where there are none.
    """
    model = config.model
    kind, _ = architecture_of(model)
    values: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": config.data.context_length,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": dtype,
    }
    if kind == OWN_TYPE:
        values["auto_map"] = {
            "AutoConfig": "modeling_natsjax.NatsjaxConfig",
            "AutoModelForCausalLM": f"modeling_natsjax.{_CLASSES[kind]}",
        }
        stored = config.to_dict()
        return values | {"natsjax": {name: stored[name] for name in ("model", "nats")} | {"data": _kept_data(config)}}
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    values |= {
        "intermediate_size": model.mlp_dim,
        "hidden_act": names[model.activation],
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": 0.0,
        "rope_parameters": _rope_parameters(model),
    }
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = False
    if kind == "llama":
        values["mlp_bias"] = False
        return values
    is_sliding = "sliding" in model.layer_types
    window = model.sliding_window
    assert isinstance(window, int) or not is_sliding  # ``architecture_of`` has refused others
    values["sliding_window"] = window + 1 if is_sliding and isinstance(window, int) else None
    if kind != "mistral":
        types = [SLIDING if each == "sliding" else FULL for each in model.all_layer_types]
        first = types.index(SLIDING) if is_sliding else model.num_layers
        values |= {"use_sliding_window": is_sliding, "max_window_layers": first, "layer_types": types}
    return values


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    OWN_TYPE: "NatsjaxForCausalLM",
}


def _kept_data(config: Config) -> dict[str, Any]:
    return {"source": "none", "context_length": config.data.context_length}


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    kind, theta = model.rope_scaling, {"rope_theta": model.rope_theta}
    if kind == "none":
        return {"rope_type": "default"} | theta
    values: dict[str, Any] = {"rope_type": kind, "factor": model.rope_scaling_factor} | theta
    if kind == "linear":
        return values
    values["original_max_position_embeddings"] = model.rope_original_context
    values |= zip(_TURNS[kind], model.rope_turns or _USUAL_TURNS[kind], strict=True)
    if model.rope_attention_factor:
        values["attention_factor"] = model.rope_attention_factor
    return values
