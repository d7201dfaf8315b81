"""The rival of ``benchmarks.train_step``: the dense model as a PyTorch ``nn.Module``, and its whole optimizer step.

The same mathematics as ``natsjax.model`` with ``model.layer_types = ("dense",)``: pre-norm RMSNorm, rotary positions,
grouped-query attention, SwiGLU, tied embeddings. Parameters are taken over from ours, so that both start, and stay,
at the same loss. Importing this module needs PyTorch.
"""

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would spin beside XLA's

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from natsjax.config import Config, ModelConfig, OptimizerConfig


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.head_dim = model.head_dim
        width, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.query = nn.Linear(model.embed_dim, width, bias=False)
        self.key = nn.Linear(model.embed_dim, keys, bias=False)
        self.value = nn.Linear(model.embed_dim, keys, bias=False)
        self.output = nn.Linear(width, model.embed_dim, bias=False)

    def forward(self, x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        """Maps ``[b, t, d]`` to ``[b, t, d]``; ``sin``, ``cos [t, h / 2]``."""
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(
            _rotate(query, sin, cos), _rotate(key, sin, cos), value, is_causal=True, enable_gqa=True
        )
        return self.output(out.transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(model.embed_dim, model.mlp_dim, bias=False)
        self.up = nn.Linear(model.embed_dim, model.mlp_dim, bias=False)
        self.down = nn.Linear(model.mlp_dim, model.embed_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[…, d]`` to ``[…, d]``."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.embed_dim, model.norm_eps)
        self.attention = Attention(model)
        self.mlp_norm = nn.RMSNorm(model.embed_dim, model.norm_eps)
        self.mlp = MLP(model)

    def forward(self, x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        """Maps ``[b, t, d]`` to ``[b, t, d]``."""
        x = x + self.attention(self.attention_norm(x), sin, cos)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The language model, from tokens to the mean cross-entropy.

    Args:
      model: the sizes; float32, tied embeddings and no biases.
      vocab_size: v.
      length: tokens in a sequence.
    """

    def __init__(self, model: ModelConfig, vocab_size: int, length: int):
        super().__init__()
        if model.dtype != "float32" or not model.tie_embeddings or model.qkv_bias:
            raise NotImplementedError("the PyTorch model is float32, ties its embeddings and has no biases.")
        self.embedding = nn.Embedding(vocab_size, model.embed_dim)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.num_layers))
        self.final_norm = nn.RMSNorm(model.embed_dim, model.norm_eps)
        half = model.head_dim // 2
        frequency = model.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("sin", angle.sin())
        self.register_buffer("cos", angle.cos())

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy, nats, of int64 ``[b, t]`` each."""
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        for block in self.blocks:
            x = block(x, self.sin, self.cos)
        logits = self.final_norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def take_over(module: Transformer, parameters: Mapping[str, Any]) -> None:
    """Copies the parameters of our dense model, nested dicts of arrays, into ``module``."""
    blocks = parameters["blocks"]
    values = {
        "embedding.weight": parameters["embedding"],
        "final_norm.weight": parameters["final_norm"]["scale"],
    }
    for layer in range(len(module.blocks)):
        name = f"blocks.{layer}."
        for norm in ("attention_norm", "mlp_norm"):
            values[f"{name}{norm}.weight"] = blocks[norm]["scale"][layer]
        for matrix in ("query", "key", "value"):  # [d, …, h] → [n · h, d]
            weight = np.asarray(blocks["attention"][matrix][layer])
            values[f"{name}attention.{matrix}.weight"] = weight.reshape(weight.shape[0], -1).T
        output = np.asarray(blocks["attention"]["output"][layer])
        values[f"{name}attention.output.weight"] = output.reshape(-1, output.shape[-1]).T
        for matrix in ("gate", "up", "down"):
            values[f"{name}mlp.{matrix}.weight"] = np.asarray(blocks["mlp"][matrix][layer]).T
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in values.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or set(missing) != {"sin", "cos"}:
        raise ValueError(f"parameters that do not fit: missing {missing}, unexpected {unexpected}.")


class Step:
    """One optimizer step after another: ``step()`` returns the loss before it, ``gradient_norm`` is before the clip.

    Args:
      config: of our dense run.
      vocab_size: v.
      parameters: of our dense model.
      batch: of ``natsjax.data``: every row one document, every token predicted.
      schedule: learning rate by step, of ours.
      compiled: under ``torch.compile``; otherwise eagerly.
    """

    def __init__(self, config: Config, vocab_size: int, parameters, batch, schedule, compiled: bool):
        self.tokens, self.targets = (torch.from_numpy(batch[x].astype(np.int64)) for x in ("inputs", "targets"))
        self.module = Transformer(config.model, vocab_size, self.tokens.shape[1])
        take_over(self.module, parameters)
        self.forward = torch.compile(self.module) if compiled else self.module
        self.clip_by_global_norm = config.optimizer.clip_by_global_norm
        self.optimizer = _adamw(self.module, config.optimizer)
        self.schedule, self.count = schedule, 0
        self.gradient_norm = float("nan")

    def __call__(self) -> float:
        """Takes a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.schedule(self.count))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(self.tokens, self.targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_by_global_norm or float("inf"))
        self.optimizer.step()
        self.count += 1
        self.gradient_norm = norm.item()
        return loss.item()


def _adamw(module: Transformer, config: OptimizerConfig) -> torch.optim.AdamW:
    """Builds AdamW in one fused pass; weight decay for the layers' matrices."""
    matrices = [p for name, p in module.named_parameters() if p.ndim == 2 and not name.startswith("embedding")]
    others = [p for name, p in module.named_parameters() if p.ndim != 2 or name.startswith("embedding")]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=config.peak_learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )
