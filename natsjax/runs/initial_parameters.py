"""Parameters that a new run starts from: those of another run or of an export (``train.init_from``).

A NAtS run may so begin where a dense one ended: with ``train.reinit_scorer`` the scorer, which a dense run lacks,
is initialized as in any new run. Everything else must fit. The optimizer and the KV penalty start afresh, at step 0.
"""

import dataclasses
from typing import Any

import jax

from natsjax.config import Config
from natsjax.data import Vocabulary
from natsjax.errors import UserError
from natsjax.model.transformer import ModelStructure, model_structure
from natsjax.runs.data import open_vocabulary, token_meaning
from natsjax.runs.load import read_parameters
from natsjax.runs.workdir import Workdir
from natsjax.runtime.log import logger

_SCORER = "scorer"  # the name of that module in its block
_MAX_NAMED = 6  # parameters in a message


class InitialParameters:
    """The run of ``train.init_from``, found to fit; nothing is read before ``put_into``.

    Args:
      config: of the new run.
      model: of the new run.
      vocabulary: of the new run.

    Raises:
      UserError: there is no run, no checkpoint or no tokenizer, it is an export that another natsjax wrote, or one with
        other tokens or other parameters; the message lists what differs.
    """

    def __init__(self, config: Config, model: ModelStructure, vocabulary: Vocabulary):
        self._field = f"train.init_from = {config.train.init_from}"
        self._workdir = Workdir(config.train.init_from)
        self._reinit_scorer = config.train.reinit_scorer
        try:
            if self._workdir.is_export:
                self._workdir.read_export()  # whether this natsjax reads it, before its config is taken for one of ours
            self._config = self._workdir.read_config()
            if not self._workdir.has_checkpoint():
                raise UserError(f"{self._workdir.path} holds no checkpoint.")
            theirs = open_vocabulary(self._config, self._workdir)
        except UserError as error:
            raise UserError(f"{self._field}: {error}") from error
        _check_tokens(self._field, theirs, vocabulary)
        self._check_parameters(config, model, vocabulary.vocab_size)

    def put_into(self, parameters: Any) -> Any:
        """Returns the parameters of a new run with the stored values; each process reads its shards of them.

        Args:
          parameters: nested dict of initialized arrays; the scorer's stay where it is to be fresh.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        wanted = _without_scorer(parameters) if self._reinit_scorer else parameters
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        step, read = read_parameters(self._workdir, self._config, abstract)
        scorer = ", the scorer fresh" if self._reinit_scorer else ""
        attention = self._config.model.layer_pattern
        logger.info(f"parameters of {self._workdir.path} ({attention}, step {step}){scorer}")
        return _merged(parameters, read)

    def _check_parameters(self, config: Config, model: ModelStructure, vocab_size: int) -> None:
        ours = _by_name(model.parameters)
        theirs = _by_name(model_structure(self._config, vocab_size).parameters)
        if self._reinit_scorer:
            ours, theirs = ({name: x for name, x in side.items() if not _is_scorer(name)} for side in (ours, theirs))
        missing = [name for name in ours if name not in theirs]
        others = [f"{name} is there and not here" for name in theirs if name not in ours]
        others += [
            f"{name} is {theirs[name].shape} there and {x.shape} here"
            for name, x in ours.items()
            if name in theirs and theirs[name].shape != x.shape
        ]
        fields = _differing_fields(self._config, config)
        if missing and not others and not self._config.model.has_roles and all(map(_is_scorer, missing)):
            raise UserError(
                f"{self._field} holds a dense model, which lacks {' and '.join(missing)}; train.reinit_scorer = True "
                "initializes them."
            )
        others += [f"{name} is here and not there" for name in missing]
        if config.model.has_roles and others and all(_is_scorer(text.split(" ")[0]) for text in others):
            raise UserError(
                f"{self._field} has another scorer ({', '.join(fields)}): {'; '.join(others)}; "
                "train.reinit_scorer = True initializes this run's."
            )
        if others:
            more = f"; {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
            raise UserError(
                f"{self._field} does not fit this run ({', '.join(fields)}): {'; '.join(others[:_MAX_NAMED])}{more}."
            )
        # Of the same shapes, and perhaps what somebody wants; put_into says what attention it was.
        silent = [field for field in fields if not field.startswith("model.layer_types")]
        kinds = [each.model.role_layer_type for each in (self._config, config)]
        if None not in kinds and kinds[0] != kinds[1] and not self._reinit_scorer:
            logger.warning(
                f"warning: the scorer of {self._field} was trained for {kinds[0]} layers and is kept for {kinds[1]} "
                "ones; train.reinit_scorer = True initializes it anew"
            )
        if silent:
            logger.info(f"starting from a model with {', '.join(silent)}")


def _check_tokens(field: str, theirs: Vocabulary, ours: Vocabulary) -> None:
    if token_meaning(theirs) != token_meaning(ours):
        raise UserError(
            f"{field} has other tokens ({token_meaning(theirs)}) than this run's data ({token_meaning(ours)}); prepare "
            "the text with the tokenizer of that run (data.tokenizer may name a folder)."
        )


def _differing_fields(theirs: Config, ours: Config) -> list[str]:
    """Lists ``model.FIELD = X there and Y here`` for the fields of the model itself, and its windows."""
    free = ("remat", "dtype", "param_dtype", "dropout", "zero_init_output")
    found = [
        f"model.{field.name} = {x!r} there and {y!r} here"
        for field in dataclasses.fields(ours.model)
        if field.name not in free and (x := getattr(theirs.model, field.name)) != (y := getattr(ours.model, field.name))
    ]
    x, y = theirs.nats.windows, ours.nats.windows
    return [*found, f"nats.windows = {x!r} there and {y!r} here"] if x != y else found


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _is_scorer(name: str) -> bool:
    return _SCORER in name.split(".")


def _without_scorer(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_scorer(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if name != _SCORER
    }


def _merged(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Returns ``tree`` with the leaves of ``values``."""
    return {
        name: value if name not in values else _merged(value, values[name]) if isinstance(value, dict) else values[name]
        for name, value in tree.items()
    }
