"""The rival of ``benchmarks.decode``: the greedy loop of `transformers`, on PyTorch, after a full cache.

``LlamaForCausalLM`` as it comes, with our parameters; importing this module needs PyTorch and `transformers` (5.24 is
what it was written for). Our model multiplies embeddings by √width where they enter, Llama does not: here the matrices
that write to the residual stream are divided by it, and the norms' epsilon by its square. The stream is then smaller by
√width, which the norms take out again: the logits are the same.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would spin beside XLA's

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from natsjax.config import ModelConfig


def llama(model: ModelConfig, vocab_size: int, length: int) -> LlamaForCausalLM:
    """Builds a model of our sizes, with parameters of its own; ``length`` is the longest sequence in tokens."""
    if model.dtype != "float32" or not model.tie_embeddings or model.qkv_bias:
        raise NotImplementedError("the rival is float32, ties its embeddings and has no biases.")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.embed_dim,
        intermediate_size=model.mlp_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=length,
        rms_norm_eps=model.norm_eps / model.embed_dim,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,  # nothing stops it early
        pad_token_id=None,
        dtype="float32",
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def take_over(module: LlamaForCausalLM, parameters: Mapping[str, Any]) -> None:
    """Copies the parameters of our model, nested dicts of arrays, into ``module``; except for a scorer's."""
    blocks, shrink = parameters["blocks"], module.config.hidden_size**-0.5
    values = {
        "model.embed_tokens.weight": parameters["embedding"],
        "model.norm.weight": parameters["final_norm"]["scale"],
    }
    for layer in range(module.config.num_hidden_layers):
        name = f"model.layers.{layer}."
        values[f"{name}input_layernorm.weight"] = blocks["attention_norm"]["scale"][layer]
        values[f"{name}post_attention_layernorm.weight"] = blocks["mlp_norm"]["scale"][layer]
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):  # [d, …, h] → [n · h, d]
            weight = np.asarray(blocks["attention"][ours][layer])
            values[f"{name}self_attn.{theirs}.weight"] = weight.reshape(weight.shape[0], -1).T
        output = np.asarray(blocks["attention"]["output"][layer])
        values[f"{name}self_attn.o_proj.weight"] = shrink * output.reshape(-1, output.shape[-1]).T
        for theirs, ours in (("gate_proj", "gate"), ("up_proj", "up")):
            values[f"{name}mlp.{theirs}.weight"] = np.asarray(blocks["mlp"][ours][layer]).T
        values[f"{name}mlp.down_proj.weight"] = shrink * np.asarray(blocks["mlp"]["down"][layer]).T
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in values.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or set(missing) != {"lm_head.weight"}:  # which is the embedding
        raise ValueError(f"parameters that do not fit: missing {missing}, unexpected {unexpected}.")


class Greedy:
    """A loop that generates ``tokens`` tokens a call after a full cache; ``reset`` removes them again.

    Args:
      module: of ``llama``.
      layers: keys and values of each layer, ``[b, k, c, h]``, c tokens that were read, keys with their rotary phase.
      first: int ``[b]``, the token after them, which the first step reads.
      tokens: a call.
      static: a ``StaticCache``, allocated once, instead of the default one, which is copied at every step.
    """

    def __init__(
        self,
        module: LlamaForCausalLM,
        layers: Iterable[tuple[np.ndarray, np.ndarray]],
        first: np.ndarray,
        tokens: int,
        *,
        static: bool,
    ):
        self.module, self.tokens, self.cache = module, tokens, DynamicCache(config=module.config)
        self.context, self.is_full = 0, False
        for number, pair in enumerate(layers):
            if not number:
                self.context = pair[0].shape[2]
                if static:
                    self.cache = StaticCache(config=module.config, max_cache_len=self.context + tokens)
            self.cache.update(*(torch.from_numpy(np.array(x)) for x in pair), number)
        # The ids before the last are not looked at: their keys are there.
        self.input_ids = torch.zeros((len(first), self.context + 1), dtype=torch.long)
        self.input_ids[:, -1] = torch.from_numpy(np.asarray(first, np.int64))

    @property
    def cache_bytes(self) -> int:
        """Returns the bytes of keys and values."""
        return sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))

    def reset(self) -> None:
        """Removes the generated tokens from the cache."""
        if self.is_full:
            self.cache.crop(-self.tokens)
        self.is_full = False

    def __call__(self) -> None:
        """Waits until they are there."""
        self._generate()

    def check(self) -> tuple[np.ndarray, np.ndarray]:
        """Generates tokens and checks the steps; returns the tokens and their log-probabilities, ``[b, tokens]`` each.

        Raises:
          RuntimeError: it did not read one token a step.
        """
        read: list[int] = []
        hook = self.module.model.embed_tokens.register_forward_pre_hook(lambda _, ids: read.append(ids[0].shape[1]))
        found = self._generate(output_logits=True, return_dict_in_generate=True)
        hook.remove()
        if read != [1] * self.tokens:
            raise RuntimeError(f"the steps of transformers read {read} tokens; {self.tokens} times 1 was expected.")
        generated = found.sequences[:, -self.tokens :]
        logprobs = torch.stack(found.logits, dim=1).log_softmax(-1).gather(-1, generated[..., None])[..., 0]
        return generated.numpy(), logprobs.numpy()

    def _generate(self, **asked) -> Any:
        if self.is_full:
            raise RuntimeError("reset() first.")
        self.is_full = True
        with torch.inference_mode():
            return self.module.generate(
                self.input_ids, cache=self.cache, max_new_tokens=self.tokens, do_sample=False, **asked
            )
