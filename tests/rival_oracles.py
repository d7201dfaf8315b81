"""Policies that evict, in plain numpy, float64, one sequence at a time.

Rivals are as their papers and official code have them; and there are learned roles under a hard limit.
Written from their descriptions, with loops where the code under test has arrays. ``NumpyModel`` is a dense transformer.
"""

import jax
import numpy as np


class NumpyModel:
    """The layers of a model with dense attention: ``k`` KV heads, each with ``g`` query heads."""

    def __init__(self, config, parameters):
        self.config, self.model = config, config.model
        self.parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)
        self.layers = [
            jax.tree.map(lambda x, n=n: x[n], self.parameters["blocks"]) for n in range(self.model.num_layers)
        ]

    def embed(self, tokens):
        """``[t, d]``."""
        x = self.parameters["embedding"][np.asarray(tokens)]
        if self.model.token_shift:
            x = x + self.parameters["shift"] * np.concatenate([np.zeros_like(x[:1]), x[:-1]])
        return x * self.model.embed_dim**0.5

    def raw_keys(self, layer, x):
        """Keys ``[t, k, h]`` before shift and rotary embedding."""
        return np.einsum("td,dkh->tkh", self._norm(x, layer["attention_norm"]["scale"]), layer["attention"]["key"])

    def project(self, layer, x, first=0, before=None):
        """Queries ``[t, k, g, h]``, keys and values ``[t, k, h]`` of tokens from the index ``first`` on.

        ``before`` is the raw key of the token before the first one.
        """
        y, a, key = self._norm(x, layer["attention_norm"]["scale"]), layer["attention"], self.raw_keys(layer, x)
        query, value = np.einsum("td,dkgh->tkgh", y, a["query"]), np.einsum("td,dkh->tkh", y, a["value"])
        if self.model.key_shift:
            previous = np.concatenate([np.zeros((1, *key.shape[1:])) if before is None else before[None], key])[:-1]
            key = (1 - a["key_shift"]) * key + a["key_shift"] * previous
        index = first + np.arange(len(x))
        return self._rotate(query, index), self._rotate(key, index), value

    def roles(self, layer, x):
        """The roles that the scorer chooses, ``[t, k]``: 0 GLOBAL, 1 LOCAL, 2 SLIDING; the first token is GLOBAL."""
        y, scorer = self._norm(x, layer["attention_norm"]["scale"]), layer["attention"]["scorer"]
        roles = np.argmax(np.einsum("td,dkr->tkr", y, scorer["weight"]) + scorer["bias"], axis=-1)
        return np.concatenate([np.zeros_like(roles[:1]), roles[1:]])

    def weights(self, query, key, is_read):
        """Softmax weights ``[t, k, g, s]``; ``is_read`` is bool ``[t, s]`` or ``[t, k, s]``."""
        logits = np.einsum("tkgh,skh->tkgs", query, key) * self.model.head_dim**-0.5
        is_read = is_read[:, :, None] if is_read.ndim == 3 else is_read[:, None, None]
        weights = np.exp(np.where(is_read, logits - logits.max(-1, keepdims=True), -np.inf))
        return weights / weights.sum(-1, keepdims=True)

    def finish(self, layer, x, out):
        """The layer's result from what its heads read, ``[t, k, g, h]``."""
        x = x + np.einsum("tkgh,kghd->td", out, layer["attention"]["output"])
        y, m = self._norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
        gate = y @ m["gate"]
        return x + (gate / (1 + np.exp(-gate)) * (y @ m["up"])) @ m["down"]

    def logprobs(self, x):
        """``[t, v]``."""
        logits = self._norm(x, self.parameters["final_norm"]["scale"]) @ self.parameters["unembedding"].T
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    def _norm(self, x, scale):
        return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + self.model.norm_eps) * scale

    def _rotate(self, x, index):
        half = x.shape[-1] // 2
        angle = index[:, None] * self.model.rope_theta ** (-np.arange(half) / half)
        sin, cos = (f(angle).reshape(len(index), *(1,) * (x.ndim - 2), half) for f in (np.sin, np.cos))
        left, right = x[..., :half], x[..., half:]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def h2o_choice(score, positions, num_keys, num_recent):
    """Positions that a head keeps: the newest, and of the others those with the highest score."""
    order = sorted(positions)
    if len(order) <= num_keys:
        return order
    recent = order[len(order) - num_recent :]
    others = order[: len(order) - num_recent]
    best = sorted(others, key=lambda s: (score[s], s))[len(others) - (num_keys - num_recent) :]
    return sorted(best) + recent


def snapkv_choice(votes, num_keys, observed, pool=7):
    """Positions that a head keeps of a prompt; ``votes [s]``: what its keys got from the queries of the window."""
    length = len(votes)
    if length <= num_keys:
        return list(range(length))
    rest = votes[: length - observed]
    pooled = [max(rest[max(0, s - pool // 2) : s + pool // 2 + 1]) for s in range(len(rest))]
    best = sorted(range(len(rest)), key=lambda s: (pooled[s], s))[len(rest) - (num_keys - observed) :]
    return sorted(best) + list(range(length - observed, length))


def best(score, positions, num_keys):
    """Positions with the highest score, of equal ones the newest."""
    order = sorted(positions, key=lambda s: (score[s], s))
    return sorted(order[max(0, len(order) - num_keys) :])


def keydiff_score(key, positions):
    """How unlike the mean of the normalized keys at these positions each key is: ``[s]`` of ``key [s, h]``."""
    unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
    anchor = np.mean([unit[s] for s in positions], axis=0)
    return -(key @ anchor) / (np.linalg.norm(key, axis=-1) * np.linalg.norm(anchor))


def ada_budgets(votes, base, safeguard):
    """Keys of each head, ``base`` on average, from its votes ``[s]``: algorithm 1 of Ada-KV, and the safeguard."""
    ranked = sorted(((v, s, -k) for k, row in enumerate(votes) for s, v in enumerate(row)), reverse=True)
    chosen = [sum(-k == head for _, _, k in ranked[: base * len(votes)]) for head in range(len(votes))]
    exact = [round((1 - safeguard) * n + safeguard * base, 9) for n in chosen]
    budgets = [int(x) for x in exact]
    for head in sorted(range(len(votes)), key=lambda k: budgets[k] - exact[k])[: base * len(votes) - sum(budgets)]:
        budgets[head] += 1
    return budgets


def ada_snapkv_choice(votes, num_keys, observed, safeguard, pool=7):
    """As ``snapkv_choice``, for all heads of a layer: ``votes [k, s]``."""
    length = votes.shape[1]
    if length <= num_keys:
        return [list(range(length))] * len(votes)
    rest = votes[:, : length - observed]
    pooled = [[max(row[max(0, s - pool // 2) : s + pool // 2 + 1]) for s in range(len(row))] for row in rest]
    budgets = ada_budgets(pooled, num_keys - observed, safeguard)
    window = list(range(length - observed, length))
    return [best(row, range(len(row)), budget) + window for row, budget in zip(pooled, budgets, strict=True)]


def h2o(model, tokens, num_keys, num_recent, prompt=0):
    """As ``by_token``."""
    return by_token(
        model, tokens, lambda k, held, total, last, key: h2o_choice(total[k], held, num_keys, num_recent), prompt
    )


def tova(model, tokens, num_keys, prompt=0):
    """As ``by_token``; all heads of a layer choose together."""
    return by_token(model, tokens, lambda k, held, total, last, key: best(last.mean(0), held, num_keys), prompt)


def key_norm(model, tokens, num_keys, prompt=0):
    """As ``by_token``."""
    norm = np.linalg.norm
    return by_token(
        model, tokens, lambda k, held, total, last, key: best(-norm(key[:, k], axis=-1), held, num_keys), prompt
    )


def key_diff(model, tokens, num_keys, prompt=0):
    """As ``by_token``."""
    return by_token(
        model, tokens, lambda k, held, total, last, key: best(keydiff_score(key[:, k], held), held, num_keys), prompt
    )


def by_token(model, tokens, choose, prompt=0):
    """Reads a prompt whole, evicts, and goes on token by token.

    Args:
      model: a ``NumpyModel``.
      tokens: of the sequence.
      choose: ``choose(k, held, total, last, key)``, the positions that head k keeps of those that it holds, from what
        keys received of all queries and of the last one, ``[k, s]`` each, and the keys ``[s, k, h]``.
      prompt: tokens that are read before the first key goes.

    Returns:
      Log-probabilities ``[t, v]``, and what every layer and head holds in the end.
    """
    x, length, kept = model.embed(tokens), len(tokens), []
    for layer in model.layers:
        query, key, value = model.project(layer, x)
        heads = range(key.shape[1])
        out = np.zeros(query.shape)
        score = np.zeros((len(heads), length))
        held = [[] for _ in heads]
        for t in range(length):
            last = np.zeros_like(score)
            for k in heads:
                held[k].append(t)
                is_read = np.zeros((1, length), bool)
                is_read[0, held[k]] = True
                weights = model.weights(query[t : t + 1, k : k + 1], key[:, k : k + 1], is_read)[0, 0]  # [g, s]
                out[t, k] = weights @ value[:, k]
                last[k] = weights.sum(0)
            score += last
            if t + 1 >= prompt:
                held = [choose(k, held[k], score, last, key[: t + 1]) for k in heads]
        x = model.finish(layer, x, out)
        kept.append(held)
    return model.logprobs(x), kept


def snapkv(model, tokens, prompt, num_keys, observed, safeguard=None):
    """Reads a prompt with full attention, cuts it down once, and reads the tokens behind it.

    With a safeguard the heads share what they keep (Ada-SnapKV).

    Returns:
      Log-probabilities of the tokens behind the prompt ``[t, v]``, and what every layer and head keeps of the prompt.
    """
    x, kept = model.embed(tokens), []
    before, after = x[:prompt], x[prompt:]
    count = len(after)
    for layer in model.layers:
        query, key, value = model.project(layer, before)
        weights = model.weights(query, key, np.tri(prompt, dtype=bool)) if prompt else np.zeros((0, 1, 1, 0))
        votes = weights[-observed:].sum((0, 2))  # [k, s]
        if not prompt:
            choice = [[]] * key.shape[1]
        elif safeguard is None:
            choice = [snapkv_choice(row, num_keys, observed) for row in votes]
        else:
            choice = ada_snapkv_choice(votes, num_keys, observed, safeguard)
        last = model.raw_keys(layer, before)[-1] if prompt else None
        new_query, new_key, new_value = model.project(layer, after, prompt, last)
        is_read = np.zeros((count, key.shape[1], prompt + count), bool)
        is_read[:, :, prompt:] = np.tri(count, dtype=bool)[:, None]
        for k, positions in enumerate(choice):
            is_read[:, k, positions] = True
        all_keys, all_values = np.concatenate([key, new_key]), np.concatenate([value, new_value])
        new_weights = model.weights(new_query, all_keys, is_read)
        after = model.finish(layer, after, np.einsum("tkgs,skh->tkgh", new_weights, all_values))
        if prompt:
            before = model.finish(layer, before, np.einsum("tkgs,skh->tkgh", weights, value))
        kept.append(choice)
    return model.logprobs(after), kept


def limited(model, tokens, parts, num_keys):
    """Reads tokens in parts, behind each of which a head keeps ``num_keys`` keys at most, those that end last.

    Of keys that end together the newest stay, and the first key stays always. A LOCAL key whose GLOBAL token has not
    come yet ends before a GLOBAL one.

    Returns:
      Log-probabilities ``[t, v]``, and how many live keys went for the limit, over all layers and heads.
    """
    x, length, num_evicted = model.embed(tokens), len(tokens), 0
    ends = np.cumsum(parts)
    assert ends[-1] == length
    for layer in model.layers:
        query, key, value = model.project(layer, x)
        roles, out = model.roles(layer, x), np.zeros(query.shape)
        for k in range(key.shape[1]):
            end = {}  # of the keys that are there
            for t in range(length):
                if roles[t, k] == 0:
                    end = {s: t + 1 if e == np.inf and roles[s, k] == 1 else e for s, e in end.items()}
                end[t] = t + model.config.nats.window + 1 if roles[t, k] == 2 else np.inf
                end = {s: e for s, e in end.items() if e > t}
                is_read = np.zeros((1, length), bool)
                is_read[0, list(end)] = True
                weights = model.weights(query[t : t + 1, k : k + 1], key[:, k : k + 1], is_read)[0, 0]  # [g, s]
                out[t, k] = weights @ value[:, k]
                if t + 1 in ends:
                    live = [s for s, e in end.items() if e > t + 1]
                    order = sorted(live, key=lambda s: (s == 0, end[s], roles[s, k] != 1, s))
                    gone = order[: max(len(order) - num_keys, 0)]
                    num_evicted += len(gone)
                    end = {s: e for s, e in end.items() if s not in gone}
        x = model.finish(layer, x, out)
    return model.logprobs(x), num_evicted
