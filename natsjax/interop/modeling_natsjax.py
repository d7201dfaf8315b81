"""A natsjax model for transformers: each key is dropped from the cache when the role of its token ends.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

``python -m natsjax.export --format=hf`` puts this file into the folders of models that no class of transformers is; it
needs PyTorch and transformers (5.0 or newer), and nothing of natsjax. Greedy generation gives the tokens of
``python -m natsjax.generate``, and the cache holds as many live keys.

A token is GLOBAL (its key is read by every later query), LOCAL (up to and including the next GLOBAL token of its head)
or SLIDING (by the next ``window`` queries), in every layer and KV head; the first token of a sequence is GLOBAL. Layers
without roles keep every key ("dense") or those of a window ("sliding").

Positions follow from ``attention_mask`` (1 marks tokens, padding may be on either side) and ``position_ids`` are not
read. ``config.role_bias`` is added to the logits of GLOBAL and LOCAL: above 0 keeps more keys, below fewer.

Axis letters: ``b`` batch, ``t`` query, ``s`` key, ``k`` KV head, ``g`` query heads per KV head, ``h`` head dim,
``d`` width, ``r`` role.
"""

import math

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

GLOBAL, LOCAL, SLIDING = 0, 1, 2  # with several windows 3, 4, … are SLIDING too
NO_END = 2**31 - 1
UNTIL_GLOBAL = NO_END - 1  # of a LOCAL key until its head's next GLOBAL token comes
_QUERIES_AT_ONCE = 256
_CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NatsjaxConfig(PretrainedConfig):
    """Config of a natsjax model.

    Args:
      natsjax: its own config: ``model``, ``nats`` and ``data``.
      rotary_frequencies: radians a token of each pair of a head.
      rotary_size: factor of rotated queries and keys.
      role_bias: added to the logits of roles that keep a key.
      options: of ``PretrainedConfig``.
    """

    model_type = "natsjax"

    def __init__(self, natsjax=None, rotary_frequencies=(), rotary_size=1.0, role_bias=0.0, **options):
        self.natsjax = natsjax or {}
        self.rotary_frequencies = list(rotary_frequencies)
        self.rotary_size = rotary_size
        self.role_bias = role_bias
        super().__init__(**options)

    @property
    def own(self):
        """Fields of the model."""
        return self.natsjax["model"]

    @property
    def windows(self):
        """The window of each SLIDING role, ascending."""
        nats = self.natsjax["nats"]
        return tuple(nats["windows"]) or (nats["window"],)

    def of_layers(self, name, usual):
        """Returns a pattern of layers, as ``layer_types``, once for each layer."""
        pattern = list(self.own[name]) or [usual]
        return pattern * (self.own["num_layers"] // len(pattern))

    def role_bias_vector(self):
        """Returns what ``role_bias`` adds to the logits of each role, ``[r]``."""
        length = self.natsjax["data"]["context_length"]
        shortest, *longer = (math.log1p(min(window, length)) for window in self.windows)
        whole = max(math.log1p(length) - shortest, 1e-6)
        biased = self.natsjax["nats"]["biased_roles"]
        with_local = biased == "global_local" or (biased == "by_sign" and self.role_bias < 0)
        shares = [1.0, float(with_local), 0.0, *((x - shortest) / whole for x in longer)]
        return [self.role_bias * share for share in shares]


class NatsjaxCacheLayer:
    """Live keys of one layer; there are as many slots as the head with the most of them needs.

    Attributes:
      keys, values: ``[b, k, s, h]``, keys with the rotary phase of their own position; None before the first token.
      position: int64 ``[b, k, s]``, index of each key in its sequence.
      end: int64 ``[b, k, s]``, the first query that cannot read it; 0: no key is here.
      last_read: int64 ``[b, k]``, keys that the last query read.
    """

    def __init__(self):
        self.keys = self.values = self.position = self.end = self.last_read = None

    def extend(self, keys, values, position, end, local_end):
        """Returns keys, values, positions and ends with those of new tokens.

        Args:
          keys, values: ``[b, k, t, h]``.
          position: ``[b, k, t]``.
          end: ``[b, k, t]``.
          local_end: ``[b, k]``, that of LOCAL keys here, ``UNTIL_GLOBAL`` where no GLOBAL token is among the new ones.
        """
        if self.keys is None:
            return keys, values, position, end
        known = torch.where(self.end == UNTIL_GLOBAL, local_end[..., None], self.end)
        pairs = ((self.keys, keys), (self.values, values), (self.position, position), (known, end))
        found = [torch.cat(pair, dim=2) for pair in pairs]
        return found[0], found[1], found[2], found[3]

    def keep(self, keys, values, position, end, next_index):
        """Stores what a query from ``next_index [b]`` on can read, and drops all else."""
        is_live = end > next_index[:, None, None]
        count = int(is_live.sum(-1).max())
        end = torch.where(is_live, end, 0)
        if count == end.shape[-1]:  # the fullest head has no slot to spare
            self.keys, self.values, self.position, self.end = keys, values, position, end
            return
        order = torch.argsort((~is_live).to(torch.uint8), dim=-1, stable=True)[..., :count]
        rows = order[..., None].expand(*order.shape, keys.shape[-1])
        self.keys, self.values = keys.gather(2, rows), values.gather(2, rows)
        self.position = position.gather(2, order)
        self.end = end.gather(2, order)

    def select(self, rows):
        """Keeps sequences of the batch, by their indices, in that order."""
        for name in ("keys", "values", "position", "end", "last_read"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x.index_select(0, rows.to(x.device)))


class NatsjaxCache(Cache):
    """Live keys of all layers; a key whose role has ended is not in it.

    Args:
      num_layers: of the model.

    Attributes:
      num_tokens: int64 ``[b]``, tokens of each sequence; None before the first.
    """

    is_compileable = False

    def __init__(self, num_layers):
        self.layers = [NatsjaxCacheLayer() for _ in range(num_layers)]
        self.reset()

    @property
    def live_keys(self):
        """Keys that the last query read, int64 ``[layers, b, k]``."""
        return torch.stack([layer.last_read for layer in self.layers])

    @property
    def num_slots(self):
        """Slots that a head has in memory, of each layer."""
        return [0 if layer.keys is None else layer.keys.shape[2] for layer in self.layers]

    def __len__(self):
        return len(self.layers)

    def __repr__(self):
        return f"NatsjaxCache(slots={self.num_slots})"

    def get_seq_length(self, *_, **__):
        """Returns the columns of input that were read, padding among them."""
        return self.num_columns

    def get_max_length(self, *_, **__):
        """Returns -1: there is no limit."""
        return -1

    def get_max_cache_shape(self, *_, **__):
        """Returns -1: there is no limit."""
        return -1

    def reset(self):
        """Forgets everything."""
        self.layers = [NatsjaxCacheLayer() for _ in self.layers]
        self.num_tokens = None
        self.num_columns = 0

    def _select(self, rows):
        for layer in self.layers:
            layer.select(rows)
        if self.num_tokens is not None:
            self.num_tokens = self.num_tokens.index_select(0, rows.to(self.num_tokens.device))

    def reorder_cache(self, beam_idx):
        """Reorders the batch, for beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices):
        """Keeps sequences of the batch."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats):
        """Repeats each sequence of the batch."""
        if self.num_tokens is not None:
            rows = torch.arange(len(self.num_tokens), device=self.num_tokens.device)
            self._select(rows.repeat_interleave(repeats))

    def crop(self, *_, **__):
        """Raises: what was dropped cannot be had again, so that nothing can be taken back."""
        raise NotImplementedError("a cache that drops keys cannot go back, as assisted generation would have it do")


class _Tokens:
    """The tokens of a call.

    Attributes:
      is_token: bool ``[b, t]``.
      position: int64 ``[b, t]``; that of the token before at padding.
      next_index: int64 ``[b]``, of the query that comes next.
    """

    def __init__(self, shape, attention_mask, cache, device):
        b, t = shape
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("attention_mask: a mask of tokens was expected, [batch, tokens]; roles are the model's")
        if attention_mask is None:
            self.is_token = torch.ones(b, t, dtype=torch.bool, device=device)
        else:
            self.is_token = attention_mask[:, -t:].to(device).bool()
        begin = torch.zeros(b, dtype=torch.long, device=device)
        if cache is not None and cache.num_tokens is not None:
            begin = cache.num_tokens.to(device)
        count = self.is_token.long().cumsum(-1)
        self.position = begin[:, None] + count - 1
        self.next_index = begin + count[:, -1]


class NatsjaxNorm(nn.Module):
    """Root-mean-square normalization, in float32."""

    def __init__(self, size, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x):
        """Normalizes ``[…, size]``."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * self.weight.float()).to(x.dtype)


class NatsjaxScorer(nn.Module):
    """Logits of the roles, in float32."""

    def __init__(self, width, num_heads, num_roles, kind):
        super().__init__()
        self.kind, self.shape = kind, (num_heads, num_roles)
        if kind != "head_roles":
            self.weight = nn.Parameter(torch.zeros(num_heads * num_roles, width))
        self.bias = nn.Parameter(torch.zeros(num_heads * num_roles))

    def forward(self, x):
        """Maps ``[b, t, d]`` to float32 ``[b, k, t, r]``."""
        logits = self.bias.float().expand(*x.shape[:2], -1)
        if self.kind != "head_roles":
            logits = nn.functional.linear(x.float(), self.weight.float(), self.bias.float())
        logits = logits.unflatten(-1, self.shape).transpose(1, 2)
        if self.kind != "nats":
            is_local = torch.arange(self.shape[1], device=logits.device) == LOCAL
            logits = logits.masked_fill(is_local, -1e9)
        return logits


class NatsjaxAttention(nn.Module):
    """Grouped-query attention over live keys."""

    def __init__(self, config, layer):
        super().__init__()
        own = config.own
        self.config, self.layer = config, layer
        self.kind = config.of_layers("layer_types", "dense")[layer]
        self.is_rotary = not config.of_layers("nope", False)[layer]
        self.num_heads, self.num_kv_heads, self.head_dim = own["num_heads"], own["num_kv_heads"], own["head_dim"]
        d, n, k = own["embed_dim"], self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d, n, bias=own["qkv_bias"])
        self.k_proj = nn.Linear(d, k, bias=own["qkv_bias"])
        self.v_proj = nn.Linear(d, k, bias=own["qkv_bias"])
        self.o_proj = nn.Linear(n, d, bias=False)
        if own["attention_gate"]:
            self.gate_proj = nn.Linear(d, n, bias=False)
        if own["attention_sinks"]:
            self.sinks = nn.Parameter(torch.zeros(self.num_heads))
        if own["qk_norm"]:
            self.q_norm = NatsjaxNorm(self.head_dim, own["norm_eps"])
            self.k_norm = NatsjaxNorm(self.head_dim, own["norm_eps"])
        roles = [kind for kind in own["layer_types"] if kind not in ("dense", "sliding")]
        if roles:
            self.scorer = NatsjaxScorer(d, self.num_kv_heads, 2 + len(config.windows), roles[0])

    def forward(self, x, tokens, rotation, cache):
        """Maps ``[b, t, d]`` to ``[b, t, d]``, and puts the new keys into the cache, if there is one."""
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.own["qk_norm"]:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.is_rotary:
            query, key = _rotated(query, *rotation), _rotated(key, *rotation)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        end, local_end = self._ends(x, tokens)
        position = tokens.position[:, None].expand_as(end)
        held = NatsjaxCacheLayer() if cache is None else cache.layers[self.layer]
        new = (key, value, position, end)
        keys, values, positions, ends = held.extend(*new, local_end)
        out, held.last_read = self._attend(query, keys, values, positions, ends, tokens)
        held.keep(keys, values, positions, ends, tokens.next_index)
        if self.config.own["attention_gate"]:
            out = out * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(out)

    def _ends(self, x, tokens):
        """Returns the ends of the new keys, int64 ``[b, k, t]``, and ``local_end [b, k]``."""
        b, t = tokens.position.shape
        shape = (b, self.num_kv_heads, t)
        position, is_token = (y[:, None].expand(shape) for y in (tokens.position, tokens.is_token))
        none = torch.full(shape[:2], UNTIL_GLOBAL, device=x.device)
        if self.kind == "dense":
            return torch.where(is_token, NO_END, 0), none
        if self.kind == "sliding":
            return torch.where(is_token, position + self.config.own["sliding_window"] + 1, 0), none
        logits = self.scorer(x)
        if self.config.role_bias:
            logits = logits + torch.tensor(self.config.role_bias_vector(), device=logits.device)
        role = torch.where(position == 0, GLOBAL, logits.argmax(-1))
        is_global = (role == GLOBAL) & is_token
        # The next GLOBAL token after each: the least position of one from the next place on.
        places = torch.where(is_global, position, NO_END)
        from_here = places.flip(-1).cummin(-1).values.flip(-1)
        after = nn.functional.pad(from_here[..., 1:], (0, 1), value=NO_END)
        local = torch.where(after == NO_END, UNTIL_GLOBAL, after + 1)
        window = torch.tensor((0, 0, *self.config.windows), device=x.device)[role]
        end = torch.where(role == GLOBAL, NO_END, torch.where(role == LOCAL, local, position + window + 1))
        first = from_here[..., 0]
        return torch.where(is_token, end, 0), torch.where(first == NO_END, UNTIL_GLOBAL, first + 1)

    def _attend(self, query, keys, values, positions, ends, tokens):
        """Returns ``[b, t, n·h]``, and how many keys the last query read, ``[b, k]``."""
        query = query.unflatten(2, (self.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [b, k, g, t, h]
        found = []
        read = None
        for begin in range(0, query.shape[3], _QUERIES_AT_ONCE):
            part = query[..., begin : begin + _QUERIES_AT_ONCE, :]
            at = tokens.position[:, None, begin : begin + _QUERIES_AT_ONCE, None]
            is_query = tokens.is_token[:, None, begin : begin + _QUERIES_AT_ONCE, None]
            visible = (positions[:, :, None] <= at) & (at < ends[:, :, None]) & is_query
            logits = torch.einsum("bkgth,bksh->bkgts", part, keys).float() * self.head_dim**-0.5
            logits = logits.masked_fill(~visible[:, :, None], torch.finfo(torch.float32).min)
            if self.config.own["attention_sinks"]:
                sinks = self.sinks.float().view(1, self.num_kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
                logits = torch.cat([logits, sinks], dim=-1)
            weights = torch.softmax(logits, dim=-1)[..., : keys.shape[2]]
            weights = weights.masked_fill(~visible[:, :, None], 0.0).to(values.dtype)
            found.append(torch.einsum("bkgts,bksh->btkgh", weights, values))
            read = visible[:, :, -1].sum(-1)
        return torch.cat(found, dim=1).flatten(2), read


def _rotated(x, cos, sin):
    """Rotates ``[b, t, heads, h]`` by angles whose ``cos`` and ``sin`` are ``[b, t, 1, h/2]``."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


class NatsjaxMLP(nn.Module):
    """The MLP: gated, or the square of a ReLU."""

    def __init__(self, own):
        super().__init__()
        d, f = own["embed_dim"], own["mlp_dim"]
        self.activation = own["activation"]
        if self.activation != "squared_relu":
            self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x):
        """Maps ``[b, t, d]`` to ``[b, t, d]``."""
        if self.activation == "squared_relu":
            return self.down_proj(nn.functional.relu(self.up_proj(x)).square())
        function = nn.functional.silu if self.activation == "swiglu" else nn.functional.gelu
        return self.down_proj(function(self.gate_proj(x)) * self.up_proj(x))


class NatsjaxLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        own = config.own
        self.input_layernorm = NatsjaxNorm(own["embed_dim"], own["norm_eps"])
        self.self_attn = NatsjaxAttention(config, layer)
        self.post_attention_layernorm = NatsjaxNorm(own["embed_dim"], own["norm_eps"])
        self.mlp = NatsjaxMLP(own)

    def forward(self, x, tokens, rotation, cache):
        """Maps ``[b, t, d]`` to ``[b, t, d]``."""
        x = x + self.self_attn(self.input_layernorm(x), tokens, rotation, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class NatsjaxPreTrainedModel(PreTrainedModel):
    """Base of the classes below."""

    config_class = NatsjaxConfig
    base_model_prefix = "model"
    _no_split_modules = ["NatsjaxLayer"]  # noqa: RUF012 (as transformers has it)
    _keep_in_fp32_modules_strict = ["norm", "layernorm", "scorer", "sinks"]  # noqa: RUF012


class NatsjaxModel(NatsjaxPreTrainedModel):
    """The model without its output layer."""

    def __init__(self, config):
        super().__init__(config)
        own = config.own
        self.embed_tokens = nn.Embedding(config.vocab_size, own["embed_dim"])
        self.layers = nn.ModuleList([NatsjaxLayer(config, layer) for layer in range(own["num_layers"])])
        self.norm = NatsjaxNorm(own["embed_dim"], own["norm_eps"])
        self.post_init()

    def forward(self, input_ids, attention_mask, cache):
        """Maps token ids ``[b, t]`` to ``[b, t, d]``."""
        x = self.embed_tokens(input_ids)
        x = x * torch.tensor(self.config.own["embedding_scale"] or math.sqrt(x.shape[-1]), dtype=x.dtype)
        tokens = _Tokens(input_ids.shape, attention_mask, cache, x.device)
        frequencies = torch.tensor(self.config.rotary_frequencies, dtype=torch.float32, device=x.device)
        angle = (tokens.position.float()[..., None] * frequencies)[:, :, None]
        size = self.config.rotary_size
        rotation = (size * angle.cos(), size * angle.sin())
        for layer in self.layers:
            x = layer(x, tokens, rotation, cache)
        if cache is not None:
            cache.num_tokens = tokens.next_index
            cache.num_columns += input_ids.shape[1]
        return self.norm(x)


class NatsjaxForCausalLM(NatsjaxPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = NatsjaxModel(config)
        self.lm_head = nn.Linear(config.own["embed_dim"], config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # ``forward`` makes its own

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **_,
    ):
        """Computes logits for the next token.

        Args:
          input_ids: int64 ``[b, t]``.
          attention_mask: ``[b, …]``, whose last ``t`` columns have 1 at tokens and 0 at padding; None: all are tokens.
          cache: a ``NatsjaxCache`` of the tokens before.
          past_key_values: the same, as older versions of transformers call it.
          labels: int64 ``[b, t]``, -100 where there is no loss.
          use_cache: False for none.
          logits_to_keep: of the last tokens; 0: of all.

        Returns:
          ``CausalLMOutputWithPast``.
        """
        if input_ids is None:
            raise ValueError("input_ids is None; a natsjax model reads tokens")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache is not False and labels is None:
            cache = NatsjaxCache(self.config.own["num_layers"])
        if cache is not None and not isinstance(cache, NatsjaxCache):
            raise ValueError(f"cache: a NatsjaxCache was expected, not {type(cache).__name__}")
        hidden = self.model(input_ids, attention_mask, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept]).float()
        if cap := self.config.own["final_logit_softcap"]:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE_FIELD: cache})
