"""The side of ``benchmarks.kvpress`` on PyTorch: presses of kvpress as they come, and by our policies' definitions.

Importing this module needs the extra ``kvpress`` (0.5.5, which holds `transformers` below 5.3).

A press drops keys of a prompt once, when it has been read. kvpress describes its presses as *related* to papers; where
one differs from the paper's own code, ``PRESSES`` has it a second time, changed in that alone.

Axis letters: ``b`` context, ``k`` KV head, ``g`` query head of a KV head, ``s`` key, ``t`` query.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would spin beside XLA's

import kvpress
import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

logging.disable_progress_bar()

NUM_SINKS = 4
"""Of StreamingLLM and ExpectedAttention, in kvpress by default."""

NORM_STEP = 1e-3
"""Norms of keys that round to the same multiple of it are equal, where ours are compared with those of kvpress."""

_POOL = 7  # keys; of SnapKV's LongBench runs


class Numbers(NamedTuple):
    """Numbers that the presses of a table share.

    Attributes:
      ratio: of the keys that it drops, such that a head keeps ``keys``.
      keys: that a head keeps.
      recent: newest keys that H2O keeps in any case.
      window: queries that SnapKV observes.
      safeguard: of AdaKV.
    """

    ratio: float
    keys: int
    recent: int
    window: int
    safeguard: float


def _newest_first(score: torch.Tensor) -> torch.Tensor:
    """Ranks scores ``[…, s]``, of equal ones the newest higher, for ``topk`` takes any of them."""
    return score.argsort(dim=-1, stable=True).argsort(dim=-1).float()


def _votes(attention: torch.Tensor, num_kv_heads: int, window: int) -> torch.Tensor:
    """Adds up the attention ``[b, k g, t, s]`` of the last queries to the keys before them: ``[b, k, s]``, pooled."""
    last = attention[..., -window:, :-window]
    votes = last.reshape(len(last), num_kv_heads, -1, last.shape[-1]).sum(2)
    return functional.max_pool1d(votes, _POOL, stride=1, padding=_POOL // 2)


class MaxPooled(kvpress.SnapKVPress):
    """SnapKV as in its LongBench runs: the maximum over seven neighbors, of query heads together."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        """See ``kvpress.ScorerPress``."""
        votes = _votes(attentions, keys.shape[1], self.window_size)
        return functional.pad(_newest_first(votes), (0, self.window_size), value=torch.inf)


class SharedByVotes(kvpress.AdaKVPress):
    """AdaKV as its code has it: budgets from the votes before the window, a fraction of which all heads get alike."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        """See ``kvpress.BasePress``; the keys stay, and those that are out are masked."""
        window = self.press.window_size
        attention = kvpress.SnapKVPress.compute_window_attention(
            module, hidden_states, keys, window, kwargs["position_embeddings"]
        )
        votes = _votes(functional.pad(attention, (0, window)), keys.shape[1], window)
        base = kvpress.utils.compute_n_kept(keys.shape[2], self.compression_ratio) - window
        dropped = torch.ones(keys.shape[:3], dtype=torch.bool)
        dropped[..., -window:] = False
        for row, of_heads in enumerate(votes.numpy()):
            for head, budget in enumerate(self._budgets(of_heads, base)):
                best = np.argsort(of_heads[head], kind="stable")[len(of_heads[head]) - budget :]
                dropped[row, head, best.copy()] = False
        module.masked_key_indices = torch.nonzero(dropped, as_tuple=True)
        return keys, values

    def _budgets(self, votes: np.ndarray, base: int) -> np.ndarray:
        """Returns the keys of each head from votes ``[k, s]``: of ``base`` a head, by the largest remainder."""
        heads, length = votes.shape
        newest_first = votes[:, ::-1].T.reshape(-1)
        chosen = np.argsort(-newest_first, kind="stable")[: heads * base] % heads
        exact = (1 - self.alpha_safeguard) * np.bincount(chosen, minlength=heads) + self.alpha_safeguard * base
        exact = np.round(exact, 9)
        budgets = np.floor(exact).astype(int)
        budgets[np.argsort(budgets - exact, kind="stable")[: heads * base - budgets.sum()]] += 1
        return np.minimum(budgets, length)


class SummedUp(kvpress.ObservedAttentionPress):
    """H2O as its code has it: the sum of the attention, not its mean over the queries, and the newest keys."""

    recent: int

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        """See ``kvpress.ScorerPress``."""
        received = attentions.reshape(len(attentions), keys.shape[1], -1, *attentions.shape[2:]).sum((2, 3))
        received[..., received.shape[-1] - self.recent :] = torch.inf
        return _newest_first(received)


class OwnKeyToo(kvpress.TOVAPress):
    """TOVA as its code has it: the last token's own key is one of those that may go."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        """See ``kvpress.ScorerPress``."""
        score = attentions[..., -1, :].mean(1, keepdim=True)
        return _newest_first(score).expand(-1, keys.shape[1], -1)


class TiesByAge(kvpress.KnormPress):
    """Key norm where norms that differ by rounding alone are equal, and the newest of equal ones stay.

    In the first layer a key's norm follows from its token, so that the same token has it wherever it stands.
    """

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        """See ``kvpress.ScorerPress``."""
        score = super().score(module, hidden_states, keys, values, attentions, kwargs)
        return _newest_first(torch.round(score / NORM_STEP))


def _summed_up(numbers: Numbers) -> kvpress.ObservedAttentionPress:
    press = SummedUp(numbers.ratio)
    press.recent = numbers.recent
    return press


class Press(NamedTuple):
    """A press of kvpress.

    Attributes:
      make: from the numbers.
      attention: implementation in `transformers`: "eager" where the press reads attention weights.
      tokens: of a continuation that are read at once; None: all.
    """

    make: Callable[[Numbers], Any]
    attention: str = "sdpa"
    tokens: int | None = None


def _snapkv(numbers: Numbers) -> kvpress.SnapKVPress:
    return kvpress.SnapKVPress(numbers.ratio, numbers.window)


PRESSES: dict[str, tuple[Press, Press | None]] = {
    "streaming_llm": (Press(lambda n: kvpress.StreamingLLMPress(n.ratio, NUM_SINKS)), None),
    "snapkv": (Press(_snapkv), Press(lambda n: MaxPooled(n.ratio, n.window), "eager")),
    "ada_snapkv": (
        # It masks a key by another that all queries of a pass turn away from, and for many queries finds none.
        Press(lambda n: kvpress.AdaKVPress(_snapkv(n), n.safeguard), tokens=1),
        Press(lambda n: SharedByVotes(_snapkv(n), n.safeguard), tokens=1),
    ),
    "h2o": (Press(lambda n: kvpress.ObservedAttentionPress(n.ratio), "eager"), Press(_summed_up, "eager")),
    "tova": (Press(lambda n: kvpress.TOVAPress(n.ratio)), Press(lambda n: OwnKeyToo(n.ratio), "eager")),
    "knorm": (Press(lambda n: kvpress.KnormPress(n.ratio)), Press(lambda n: TiesByAge(n.ratio))),
    "keydiff": (Press(lambda n: kvpress.KeyDiffPress(n.ratio)), None),
    "expected_attention": (Press(lambda n: kvpress.ExpectedAttentionPress(n.ratio, n_sink=NUM_SINKS)), None),
}
"""By our policy's name (and one that we have not): as it comes, and with our policy's definition; None: the same."""


class Theirs:
    """A model in `transformers`, whose prompts are cut down by presses.

    Args:
      folder: an export with ``--format=hf``.
      prompts: int ``[b, t]``, tokens.
      continuations: int ``[b, t]``, the tokens behind them, at least one.
    """

    def __init__(self, folder: str | os.PathLike[str], prompts: np.ndarray, continuations: np.ndarray):
        path = pathlib.Path(folder)
        self._models = {
            kind: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=kind).eval()
            for kind in ("sdpa", "eager")
        }
        self._prompts, self._continuations = (torch.from_numpy(x.astype(np.int64)) for x in (prompts, continuations))

    def nll(self, press: Press | None, numbers: Numbers | None = None) -> np.ndarray:
        """Returns the negative log-likelihood of the continuations' tokens, nats, float64 ``[b, t]``; None: all keys.

        Raises:
          RuntimeError: a head keeps another number of keys than it was to.
        """
        model = self._models["sdpa" if press is None else press.attention]
        cache = DynamicCache()
        length, count = self._prompts.shape[1], self._continuations.shape[1]
        with torch.no_grad():
            if press is None:
                first = model(self._prompts, past_key_values=cache).logits[:, -1:]
            else:
                assert numbers is not None
                with press.make(numbers)(model):
                    first = model(self._prompts, past_key_values=cache).logits[:, -1:]
                self._check(model, cache, numbers.keys)
            logits = [first]
            size = count if press is None or press.tokens is None else press.tokens
            for inputs in self._continuations[:, :-1].split(size, 1):  # the last token predicts none
                begin = length + sum(x.shape[1] for x in logits) - 1
                places = torch.arange(begin, begin + inputs.shape[1])[None].expand(len(inputs), -1)
                logits.append(model(inputs, past_key_values=cache, position_ids=places).logits)
        for layer in model.model.layers:  # what AdaKV left for attention to mask
            layer.self_attn.masked_key_indices = None
        logprobs = torch.cat(logits, 1).double().log_softmax(-1)
        return -logprobs.gather(-1, self._continuations[..., None])[..., 0].numpy()

    def _check(self, model: Any, cache: DynamicCache, keys: int) -> None:
        """Checks that the heads of each layer keep ``keys`` on average."""
        for layer, block in zip(cache.layers, model.model.layers, strict=True):
            b, k, held, _ = layer.keys.shape
            masked = getattr(block.self_attn, "masked_key_indices", None)
            kept = held - (0 if masked is None else len(masked[0]) / (b * k))
            if kept != keys:
                raise RuntimeError(f"a press left {kept:g} keys of a head; {keys} were expected.")
