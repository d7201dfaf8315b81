"""Entries of the policies that a user can name: the one place for all that is known of each.

An entry feeds evaluation (at every budget, with masks or by decoding), ``generate --policy`` with its help, the table,
picture and page of a report, and the table in ``docs/generate.md``. A new policy is a file with its class, and an entry
here.

Importing this is cheap: an entry names its class, which is imported when a policy is made.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from natsjax.config import ModelConfig
    from natsjax.policies.numbers import Calibration, PolicyNumbers

Mode = Literal["masked", "decode"]
"""A way to evaluate, as ``evaluate --mode`` names it."""


@dataclasses.dataclass(frozen=True)
class Number:
    """A number of a policy, as the command line takes it.

    Attributes:
      letter: stands for it in the form, as ``W`` in ``sliding_window:W``.
      kind: ``int`` or ``float``.
      required: False: the policy has a default. Numbers that are not required come last.
    """

    letter: str
    kind: type[int] | type[float] = int
    required: bool = True


@dataclasses.dataclass(frozen=True)
class PolicyEntry:
    """A policy: its class, its names, and where its numbers come from.

    Attributes:
      name: ``method`` of the class, for flags, rows of results, and the CSS variable of its color.
      policy: the class, as ``module:Class``.
      label: its name for people.
      summary: what lives, with the letters of ``numbers``; begins with a noun.
      color: of its line, on white.
      dark_color: the same on black.
      marker: of its points, as Matplotlib names it: one of ``o D d s ^ > < P X p h v``.
      numbers: what follows its name in ``generate --policy``, in the order of the class's fields.
      arguments: completes numbers to the arguments of the class.
      for_budget: ``module:function`` that finds its numbers for a budget, as those in ``natsjax.policies.numbers``;
        None: it has none, and is measured once.
      modes: evaluations that measure it. Random keys have a mask too, but are measured where the rivals are.
      reads_roles: whether it is the model's own roles. They need a model that has some, and their number for a budget
        is the role bias, which is searched by measuring.
      is_trained_in: whether models learn it, so that those that did not go without it, and those that did are compared
        under it.
    """

    name: str
    policy: str
    label: str
    summary: str
    color: str
    dark_color: str
    marker: str
    numbers: tuple[Number, ...] = ()
    arguments: Callable[..., tuple[Any, ...]] = lambda *numbers: numbers
    for_budget: str | None = None
    modes: tuple[Mode, ...] = ("masked", "decode")
    reads_roles: bool = False
    is_trained_in: bool = False

    @property
    def form(self) -> str:
        """The name and its numbers, as ``generate --policy`` takes them: ``h2o:N[,R]``."""
        text = ""
        for place, number in enumerate(self.numbers):
            part = f"{',' if place else ':'}{number.letter}"
            text += part if number.required else f"[{part}]"
        return self.name + text

    def unsuited(self, model: "ModelConfig") -> str | None:
        """Returns why a model's layers cannot follow the policy, a clause; None where they can."""
        from natsjax.policies.base import unsuited

        return unsuited(_named(self.policy), model)

    def make(self, *numbers: float) -> Any:
        """Returns the policy with these numbers.

        Raises:
          ValueError: one is out of range.
        """
        return _named(self.policy)(*self.arguments(*numbers))

    def numbers_for(self, calibration: "Calibration", budget: float) -> "PolicyNumbers":
        """Returns the numbers that meet a budget, a KV fraction.

        Raises:
          natsjax.policies.numbers.OutOfReachError: no numbers do.
        """
        assert self.for_budget is not None, self.name
        return _named(self.for_budget)(calibration, budget)


def _named(path: str) -> Any:
    """Imports what ``module:name`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _half_recent(num_keys: int, num_recent: int | None = None) -> tuple[int, int]:
    return num_keys, num_keys // 2 if num_recent is None else num_recent  # half, as in H2O's paper


def _by_name(entries: Iterable[PolicyEntry]) -> dict[str, PolicyEntry]:
    return {entry.name: entry for entry in entries}


_NUMBERS = "natsjax.policies.numbers"

ROLE_LABELS = {"nats": "NAtS", "gated": "SP-KV gates", "head_roles": "head roles"}
"""Labels of ``NATS``, by the type of the layers that learned the roles."""

# Colors on white are Okabe and Ito's palette, which stays apart under the common color-vision deficiencies.
NATS = PolicyEntry(
    name="nats",
    policy="natsjax.policies:Nats",
    label=ROLE_LABELS["nats"],
    summary="keys by the model's own roles (--role_bias keeps more or less)",
    color="#d55e00",
    dark_color="#ff8b3e",
    marker="o",
    reads_roles=True,
    is_trained_in=True,
)
"""The model's own roles."""

FULL = PolicyEntry(
    name="full",
    policy="natsjax.policies:FullAttention",
    label="full attention",
    summary="every key",
    color="#333333",
    dark_color="#d5dae0",
    marker="D",
)
"""Full attention, which others are compared with."""

POLICIES: dict[str, PolicyEntry] = _by_name(
    [
        NATS,
        FULL,
        PolicyEntry(
            name="sliding_window",
            policy="natsjax.policies:SlidingWindow",
            label="sliding window",
            summary="each key for the W queries after its own",
            color="#0072b2",
            dark_color="#56b4e9",
            marker="s",
            numbers=(Number("W"),),
            for_budget=f"{_NUMBERS}:sliding_window",
        ),
        PolicyEntry(
            name="streaming_llm",
            policy="natsjax.policies:StreamingLLM",
            label="StreamingLLM",
            summary="the first S keys of a document, others for the W queries after their own",
            color="#009e73",
            dark_color="#2cc79b",
            marker="^",
            numbers=(Number("S"), Number("W")),
            for_budget=f"{_NUMBERS}:streaming_llm",
        ),
        PolicyEntry(
            name="random",
            policy="natsjax.policies:RandomKeys",
            label="random keys",
            summary="a random FRACTION of the keys, others for the W queries after their own (0)",
            color="#777777",
            dark_color="#a3a3a3",
            marker=">",
            numbers=(Number("FRACTION", float), Number("W", required=False)),
            for_budget=f"{_NUMBERS}:random_keys",
            modes=("decode",),
        ),
        PolicyEntry(
            name="h2o",
            policy="natsjax.policies:H2O",
            label="H2O",
            summary="N keys of a head: the R newest (half), of the others those with the most attention",
            color="#cc79a7",
            dark_color="#e59cc6",
            marker="P",
            numbers=(Number("N"), Number("R", required=False)),
            arguments=_half_recent,
            for_budget=f"{_NUMBERS}:head_keys",
            modes=("decode",),
        ),
        PolicyEntry(
            name="snapkv",
            policy="natsjax.policies:SnapKV",
            label="SnapKV",
            summary="N keys of a prompt in each head, chosen by its last W queries (32), and all later keys",
            color="#e69f00",
            dark_color="#ffc44d",
            marker="<",
            numbers=(Number("N"), Number("W", required=False)),
            for_budget=f"{_NUMBERS}:prompt_keys",
            modes=("decode",),
        ),
        PolicyEntry(
            name="ada_snapkv",
            policy="natsjax.policies:AdaSnapKV",
            label="Ada-SnapKV",
            summary="the same where the heads of a layer share their keys by votes, a fraction ALPHA (0.2) equally",
            color="#b35806",
            dark_color="#f1a340",
            marker="X",
            numbers=(Number("N"), Number("W", required=False), Number("ALPHA", float, required=False)),
            for_budget=f"{_NUMBERS}:prompt_keys",
            modes=("decode",),
        ),
        PolicyEntry(
            name="tova",
            policy="natsjax.policies:TOVA",
            label="TOVA",
            summary="N keys, the same in all heads of a layer: those with the most attention of the last query",
            color="#6a51a3",
            dark_color="#a99bd6",
            marker="d",
            numbers=(Number("N"),),
            for_budget=f"{_NUMBERS}:head_keys",
            modes=("decode",),
        ),
        PolicyEntry(
            name="knorm",
            policy="natsjax.policies:KeyNorm",
            label="key norm",
            summary="N keys of a head: those of the lowest L2 norm",
            color="#1b7837",
            dark_color="#7fbf7b",
            marker="p",
            numbers=(Number("N"),),
            for_budget=f"{_NUMBERS}:head_keys",
            modes=("decode",),
        ),
        PolicyEntry(
            name="keydiff",
            policy="natsjax.policies:KeyDiff",
            label="KeyDiff",
            summary="N keys of a head: those that are least like the mean direction of its keys",
            color="#c51b7d",
            dark_color="#f07fbd",
            marker="h",
            numbers=(Number("N"),),
            for_budget=f"{_NUMBERS}:head_keys",
            modes=("decode",),
        ),
        PolicyEntry(
            name="selective",
            policy="natsjax.policies:LeastMasked",
            label="selective attention",
            summary='N keys of a "selective" layer: those that its queries have masked least; all keys of other layers',
            color="#8b5a00",
            dark_color="#c9a25a",
            marker="v",
            numbers=(Number("N"),),
            for_budget=f"{_NUMBERS}:selective",
            is_trained_in=True,
        ),
    ]
)
"""By name, in the order of reports."""


def label_of(name: str, layers: Iterable[str]) -> str:
    """Returns a policy's label; what a model's own layers have learned, or cannot read, is a part of it.

    Args:
      name: of the policy; one that is not here is its own label.
      layers: types of the model's layers (``model.layer_types``).
    """
    layers = tuple(layers)
    kind = next((kind for kind in layers if kind in ROLE_LABELS), None)
    if name == NATS.name and kind is not None:
        return ROLE_LABELS[kind]
    if name == FULL.name and "sliding" in layers:  # trained windows stay under every policy
        return "trained window" if set(layers) == {"sliding"} else "full beside trained windows"
    return POLICIES[name].label if name in POLICIES else name
