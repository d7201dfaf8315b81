"""The model ``natsjax`` of lm-evaluation-harness: log-likelihoods and texts of a run, under any policy and KV budget.

Importing this module registers it:

    import natsjax.lm_eval.adapter
    lm_eval.simple_evaluate("natsjax", model_args="workdir=runs/quickstart,kv_budget=0.1", tasks=["lambada_openai"])

A request's prompt is read, and its keys are dropped, as ``natsjax.generate`` does; what is scored is read as if it had
been generated. So policies that evict by attention can be judged like the others.

Source: https://github.com/EleutherAI/lm-evaluation-harness (``lm_eval.api.model.TemplateLM``).
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from natsjax.data import Tokenizer
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.decode.generation import generate
from natsjax.decode.sampling import Sampling
from natsjax.decode.scoring import score
from natsjax.errors import UserError
from natsjax.evaluate.masked import measure
from natsjax.evaluate.settings import TOLERANCE
from natsjax.generate.flags import parse_policy
from natsjax.interop.hf_tokenizer import puts_bos_first
from natsjax.policies.base import DecodingPolicy
from natsjax.policies.numbers import Calibration, OutOfReachError, layer_windows
from natsjax.policies.registry import NATS, POLICIES
from natsjax.policies.role_bias import role_bias_for_budget
from natsjax.runs.load import LoadedRun, load
from natsjax.runtime.progress import bar

_GENERATED = {"until", "do_sample", "temperature", "max_gen_toks", "top_p", "top_k", "min_p", "seed"}
"""Arguments of generation that are known here, after ``normalize_gen_kwargs``."""

_GENERATED_LENGTH = 256
"""Tokens that the harness's model ``hf`` generates where a task does not say."""


@register_model("natsjax")
class NatsjaxLM(TemplateLM):
    """A run or an export, as lm-evaluation-harness asks a model.

    Args:
      workdir: the run, as given to train.py, or an export.
      checkpoint: as in ``natsjax.load``.
      policy: how long keys live, as ``natsjax.generate --policy`` takes it, with ":" between numbers where "," would
        end an argument; with ``kv_budget`` its name alone. None: the model's roles, or full attention.
      role_bias: of a model with roles.
      kv_budget: KV fraction in contexts of ``max_length``, which the policy's numbers are found for. A role bias is
        searched on training text.
      max_kv: the most keys of a head, hard.
      batch_size: requests that are read at a time.
      max_length: tokens that the model reads at once; what is longer loses its beginning. None:
        ``data.context_length``.
      max_gen_toks: tokens to generate where a task does not say; None: 256, as the harness's own model ``hf``, or half
        of ``max_length`` where that is not longer.
      add_bos_token: begin every text with BOS, as documents begin in training. None: if transformers does so with the
        exported model, which is always but with the tokenizers of some imported ones.
      prepared_dir: as in ``natsjax.load``.
      progress: show progress.
      device, max_batch_size: ignored; the harness passes them to every model.

    Raises:
      UserError: there is no run, it has no text, or a policy does not fit.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        checkpoint: str | int = "newest",
        policy: str | None = None,
        role_bias: float | None = None,
        kv_budget: float | None = None,
        max_kv: int | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int | None = None,
        add_bos_token: bool | None = None,
        prepared_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        del device, max_batch_size
        self.run = load(workdir, checkpoint=checkpoint, prepared_dir=prepared_dir)
        if not isinstance(self.run.tokenizer, Tokenizer):
            raise UserError(f"{self.run.workdir.path} is a recall run, whose tokens stand for no text; name another.")
        self._tokenizer: Tokenizer = self.run.tokenizer
        self.max_length = self.run.config.data.context_length if max_length is None else int(max_length)
        self.max_gen_toks = _default_length(self.max_length) if max_gen_toks is None else int(max_gen_toks)
        is_imported = self.run.config.data.source == "none"
        by_itself = puts_bos_first(self._tokenizer, is_imported=is_imported)
        self.add_bos_token, self._progress = by_itself if add_bos_token is None else add_bos_token, progress
        self.batch_size = _whole("batch_size", batch_size)
        chosen = find_policy(self.run, policy, role_bias=role_bias, kv_budget=kv_budget, length=self.max_length)
        self.decoder = Decoder.of_run(self.run, chosen, DecodeSettings(max_kv=max_kv))

    # --- tokens ---

    @property
    def eot_token_id(self) -> int:
        """EOS, which ends what is generated."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """BOS, which a text without a context is predicted from."""
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Its kind and its fingerprint, for the cache of requests."""
        return f"natsjax_{self._tokenizer.kind}_{self._tokenizer.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes a text, with BOS before it unless that was switched off."""
        del kwargs
        with_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [*([self._tokenizer.bos_id] if with_bos else []), *self._tokenizer.encode(string).tolist()]

    # --- what is asked ---

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """Scores ``(texts, context, continuation)``; of what is longer than ``max_length``, the end is read."""
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for numbers in self._batches([len(context) + len(text) for context, text in pairs], disable_tqdm):
            found = score(self.decoder, *zip(*(pairs[number] for number in numbers), strict=True))
            for number, scored in zip(numbers, found, strict=True):
                results[number] = float(scored.logprobs.sum(dtype=np.float64)), bool(scored.is_likeliest.all())
                if (texts := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[number])
        return results

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cuts from the left what the model cannot read at once: its last token is predicted, but not read."""
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a continuation has {len(continuation):,} tokens, and the model reads 1 to {self.max_length:,} "
                "(max_length); choose another task or max_length."
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, each in windows of ``max_length`` that do not overlap.

        The first token is predicted from BOS. The harness's ``hf`` would also predict BOS from BOS where the tokenizer
        puts it before a text (issue 3333 of the harness); with ``add_bos_token=False`` its sums are these.
        """
        windows, owner = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            parts = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += parts
            owner += [number] * len(parts)
        found = [logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        sums = np.bincount(owner, weights=found, minlength=len(requests)).tolist()
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to the first of its stop texts, EOS or ``max_gen_toks``."""
        results = [""] * len(requests)
        asked = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        for options in asked:
            if unknown := sorted(set(options) - _GENERATED):
                raise UserError(
                    f"generation_kwargs: {', '.join(unknown)} are not known to natsjax; it takes "
                    f"{', '.join(sorted(_GENERATED))}."
                )
        for _, same in _grouped([sorted(options.items(), key=str) for options in asked]):
            self._generate(requests, same, asked[same[0]], results, disable_tqdm)
        return results

    def _generate(self, requests, numbers: Sequence[int], options: dict[str, Any], results: list[str], disable_tqdm):
        new = options["max_gen_toks"]
        if not 0 < new < self.max_length:
            raise UserError(
                f"max_gen_toks = {new}: with a context it must fit into the {self.max_length:,} tokens that the model "
                "reads (max_length)."
            )
        until = [text for text in options["until"] if text]
        names = [name for name in ("temperature", "top_p", "top_k", "min_p", "seed") if options.get(name) is not None]
        sampling = Sampling(**{name: options[name] for name in names})
        prompts = {number: self.tok_encode(requests[number].args[0])[-(self.max_length - new) :] for number in numbers}
        for batch in self._batches([len(prompts[number]) for number in numbers], disable_tqdm):
            batch = [numbers[place] for place in batch]
            given = [prompts[number] or [self.prefix_token_id] for number in batch]
            found = generate(
                self.decoder,
                given,
                max_new_tokens=new,
                sampling=sampling,
                stop_tokens=[self.eot_token_id],
                first_sequence=batch[0],
            )
            for number, tokens in zip(batch, found.tokens, strict=True):
                text = self._tokenizer.decode(tokens)
                results[number] = text[: min([len(text), *(text.find(stop) for stop in until if stop in text)])]
                self.cache_hook.add_partial("generate_until", requests[number].args, results[number])

    def _batches(self, lengths: Sequence[int], disable_tqdm: bool) -> Iterator[list[int]]:
        """Divides requests into batches of similar length, the longest first: memory runs out at once or never."""
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        batches = [order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size)]
        return iter(bar(batches, "requests", self._progress and not disable_tqdm))


def _grouped(keys: Sequence[Any]) -> Iterator[tuple[Any, list[int]]]:
    """Groups the indices of equal keys."""
    order = sorted(range(len(keys)), key=lambda number: str(keys[number]))
    for key, numbers in itertools.groupby(order, key=lambda number: keys[number]):
        yield key, sorted(numbers)


def _default_length(max_length: int) -> int:
    """Returns the tokens to generate where a task does not say."""
    return _GENERATED_LENGTH if max_length > _GENERATED_LENGTH else max_length // 2


def _whole(name: str, value: int | str) -> int:
    """Reads a number above 0; the harness passes texts."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{name} = {value}: a whole number of 1 or more was expected.")
    return number


def find_policy(
    run: LoadedRun, text: str | None, *, role_bias: float | None, kv_budget: float | None, length: int
) -> DecodingPolicy | None:
    """Returns the policy that was asked for; None: the run's own.

    Args:
      run: whose keys it drops.
      text: as in ``NatsjaxLM``.
      role_bias: of a policy that reads roles.
      kv_budget: None: the policy's numbers are given.
      length: tokens of a context, which the budget is a fraction of.

    Raises:
      UserError: it does not exist, or has no numbers for the budget.
    """
    text = text if text is None else text.replace(":", ",").replace(",", ":", 1)
    if kv_budget is None:
        return parse_policy(text, role_bias)
    if not 0 < kv_budget <= 1:
        raise UserError(f"kv_budget = {kv_budget:g}: it is no fraction of the KV; choose one above 0 and up to 1.")
    if role_bias is not None:
        raise UserError(f"role_bias = {role_bias:g}: it and kv_budget = {kv_budget:g} are two; choose one.")
    config = run.config
    if text is None and not config.model.has_roles:
        raise UserError(f"kv_budget = {kv_budget:g}: the model has no roles that could meet it; name a policy.")
    if text is not None and text not in POLICIES:
        parse_policy(text)  # its own message, where the name does not exist
        raise UserError(f"policy = {text}: with kv_budget its name is enough; leave the numbers out.")
    entry = POLICIES[NATS.name if text is None else text]
    if entry.reads_roles:
        contexts = run.data.contexts("train", config.eval.num_calibration_contexts)
        found = role_bias_for_budget(lambda bias: measure(run, contexts, entry.make(bias)).kv_fraction, kv_budget)
        if abs(found.kv_fraction - kv_budget) > TOLERANCE * kv_budget:
            raise UserError(
                f"kv_budget = {kv_budget:g}: no role bias gives this KV fraction on training text; the closest is "
                f"{found.kv_fraction:.3g}, at role_bias = {found.role_bias:g}."
            )
        return entry.make(found.role_bias)
    if entry.for_budget is None:
        raise UserError(f"policy = {text}: it keeps every key, whatever kv_budget = {kv_budget:g} is.")
    calibration = Calibration(config, np.array([length]), layer_windows(config.model), chunk=length)
    try:
        return entry.make(*entry.numbers_for(calibration, kv_budget).arguments)
    except OutOfReachError as error:
        raise UserError(f"kv_budget = {kv_budget:g}: {entry.label} has no numbers for it: {error}.") from error
