"""GGUF files of the architecture "llama": tensors, fields and tokenizer, as a Hugging Face folder would have them.

Quantized weights are made float32 by the library ``gguf``. llama.cpp rotates neighboring numbers of a head and not its
halves, and its converter reorders the rows of the query and key projections for that; here they are put back.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from natsjax.config_fields import format_value
from natsjax.data.optional import import_optional
from natsjax.data.readers.file_marks import check_file_no_pointer
from natsjax.errors import UserError, first_line
from natsjax.interop.layout import UNEMBEDDING

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": UNEMBEDDING.removesuffix(".weight"),
}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_REORDERED = re.compile(r"model\.layers\.\d+\.self_attn\.(q|k)_proj\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"

_ABSENT = {
    "expert_count": "mixture of experts",
    "attention.sliding_window": "sliding layers in GGUF files",
    "attention.clamp_kqv": "clamped queries, keys and values",
    "attn_logit_softcapping": "capped attention logits",
    "final_logit_softcapping": "capped logits in GGUF files",
    "logit_scale": "factor of the logits",
    "embedding_scale": "factor of the embeddings in GGUF files",
    "residual_scale": "factor of the residual stream",
}
"""What natsjax has no counterpart of, by the field that asks for it where it is not 0."""


class GGUFFile:
    """A GGUF file: a ``natsjax.interop.layout.TensorSource``, and what a config.json would say.

    Args:
      path: the file.

    Raises:
      UserError: it is damaged, of another architecture, or has what natsjax cannot represent.
    """

    def __init__(self, path: pathlib.Path):
        import_optional("gguf", f"{path}", "hf")
        from gguf import GGUFReader

        self.where = str(path)
        check_file_no_pointer(path)
        with self._errors():
            reader = GGUFReader(path)
            self._fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        architecture = self.get("general.architecture")
        if architecture != "llama":
            raise UserError(
                f"{path}: general.architecture = {format_value(architecture)}: natsjax imports llama alone."
            )
        for name, what in _ABSENT.items():
            if value := self.get(f"llama.{name}"):
                raise UserError(f"{path}: llama.{name} = {format_value(value)}: natsjax has no {what}.")
        by_name = {tensor.name: tensor for tensor in reader.tensors}
        self._rope_factors = None
        if (tensor := by_name.pop(_ROPE_FACTORS, None)) is not None:
            self._rope_factors = self._numbers(tensor).astype(np.float64)
        self._tensors = {_hf_name(name): tensor for name, tensor in by_name.items()}
        self.shapes = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in self._tensors.items()}

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, ``default`` where there is none."""
        return self._fields.get(name, default)

    def strings(self, name: str) -> list[str]:
        """Returns a field of texts.

        Raises:
          UserError: it is missing or something else.
        """
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f"{self.where}: {name} is no list of texts.")
        return value

    def numbers(self, name: str) -> list[float]:
        """Returns a field of numbers; raises ``UserError`` as ``strings`` does."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(number, int | float) for number in value):
            raise UserError(f"{self.where}: {name} is no list of numbers.")
        return value

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, float32, in the order of rows that transformers has."""
        array = self._numbers(self._tensors[name])
        found = _REORDERED.fullmatch(name)
        if found is None:
            return array
        num_heads = self.config["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]
        pairs = array.reshape(num_heads, array.shape[0] // num_heads // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of a config.json, for ``natsjax.interop.hf_config.read_hf_config``."""
        num_heads, width = self.get("llama.attention.head_count"), self.get("llama.embedding_length")
        is_whole = isinstance(width, int) and isinstance(num_heads, int) and num_heads > 0
        head_dim = self.get("llama.attention.key_length", width // num_heads if is_whole else None)
        for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if head_dim is not None and self.get(name, head_dim) != head_dim:
                raise UserError(
                    f"{self.where}: {name} = {format_value(self.get(name))}: natsjax has one size for queries, keys "
                    f"and values, and rotates all of it; heads are of {format_value(head_dim)} here."
                )
        scaling = self._rope_scaling()
        theta = self.get("llama.rope.freq_base", 10000.0)
        if self._rope_factors is not None:
            if scaling is not None:
                raise UserError(
                    f"{self.where}: it scales the rotary embedding twice, by {_ROPE_FACTORS} and as "
                    f"llama.rope.scaling.type = {format_value(scaling['rope_type'])}; natsjax has one scaling."
                )
            if isinstance(head_dim, int):
                scaling = self._from_factors(theta, head_dim)
        return {
            "model_type": "llama",
            "vocab_size": self.shapes.get("model.embed_tokens.weight", (None,))[0],
            "hidden_size": width,
            "intermediate_size": self.get("llama.feed_forward_length"),
            "num_hidden_layers": self.get("llama.block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self.get("llama.attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.get("llama.context_length"),
            "rms_norm_eps": self.get("llama.attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": UNEMBEDDING not in self.shapes,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind = self.get("llama.rope.scaling.type", "none")
        if kind == "none":
            return None
        values = {"rope_type": kind, "factor": self.get("llama.rope.scaling.factor")}
        if (original := self.get("llama.rope.scaling.original_context_length")) is not None and kind != "linear":
            values["original_max_position_embeddings"] = original
        return values

    def _from_factors(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """Finds Llama 3.1's scaling of which the file has nothing but the divisor of each pair's frequency.

        What is kept of a frequency is ``(turns - slow) / (fast - slow)`` between 0 and 1, with
        ``turns = context · frequency / 2π``: of context, slow and fast two ratios matter, and slow is taken as 1.
        """
        factors = self._rope_factors
        assert factors is not None
        refusal = UserError(f"{self.where}: {_ROPE_FACTORS} is no scaling of the rotary embedding that natsjax has.")
        if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or factors.min() < 1:
            raise refusal
        largest = float(factors.max())
        if largest == 1:
            return None
        frequency = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
        kept = (1 / factors - 1 / largest) / (1 - 1 / largest)
        between = (kept > 1e-4) & (kept < 1 - 1e-4)
        if between.sum() < 2:
            raise refusal
        slope, offset = np.polyfit(frequency[between], kept[between], 1)
        fast = round(1 - 1 / offset, 3)
        context = round(slope * 2 * math.pi * (fast - 1))
        again = np.clip((context * frequency / (2 * math.pi) - 1) / (fast - 1), 0, 1)
        if context < 1 or not np.allclose(1 / (again + (1 - again) / largest), factors, rtol=1e-5):
            raise refusal
        return {
            "rope_type": "llama3",
            "factor": largest,
            "low_freq_factor": 1.0,
            "high_freq_factor": fast,
            "original_max_position_embeddings": context,
        }

    def _numbers(self, tensor: Any) -> np.ndarray:
        from gguf.quants import dequantize

        with self._errors():
            return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raises what the library raises at a damaged file as one sentence."""
        try:
            yield
        except NotImplementedError as error:
            raise UserError(f"{self.where}: {first_line(error)} (of the library gguf).") from error
        except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(f"{self.where} is damaged, or no GGUF file: {first_line(error)}.") from error


def _hf_name(name: str) -> str:
    """Returns the name that a tensor has in a Hugging Face folder; its own where it has none there."""
    if (found := _LAYER.fullmatch(name)) is not None and found[2] in _OF_LAYER:
        return f"model.layers.{found[1]}.{_OF_LAYER[found[2]]}.{found[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_TENSORS[stem]}.{kind}" if stem in _TENSORS else name
