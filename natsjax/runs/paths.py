"""Paths of a run that begins or is resumed: absolute when they are stored, and followed where things were moved."""

import contextlib
import dataclasses
import os
from typing import Any

from natsjax.config import Config
from natsjax.config_fields import resolve_paths
from natsjax.data import Corpus
from natsjax.data.corpus import CORPUS_FILE
from natsjax.data.locate import locate
from natsjax.data.mixture import parse_mixture
from natsjax.data.readers.corpus_reader import CorpusReader, input_exists
from natsjax.errors import UserError
from natsjax.runs.workdir import Workdir


def settle_paths(config: Config, workdir: Workdir) -> Config:
    """Makes the paths of a config absolute; those of a run that has begun lead to where its data is by now.

    What is named and there is meant. Where a corpus is not, it is looked for as reading commands do (the run may be
    resumed from another folder, or may have been moved); where a text or a tokenizer is not, the run keeps the name
    that it had.

    Args:
      config: to train with.
      workdir: of the run.
    """
    config = resolve_paths(config)
    earlier = workdir.earlier_config()
    if earlier is None:
        return config
    train, data = _kept(config.train, earlier.train), _kept(config.data, earlier.data)
    config = dataclasses.replace(config, train=train, data=data)
    if data.source != "corpus":
        return config
    parts = parse_mixture(data.mixture) if data.mixture else [(data.prepared_dir or workdir.corpus, 1.0)]
    if all(os.path.exists(os.path.join(folder, CORPUS_FILE)) for folder, _ in parts):
        return config
    before = dataclasses.replace(data, mixture=earlier.data.mixture, prepared_dir=earlier.data.prepared_dir)
    for candidate in (data, before):
        with contextlib.suppress(UserError):  # then training opens what is named, and says what is wrong with it
            data = locate(candidate, workdir.path, workdir.known_fingerprint())
            break
    return dataclasses.replace(config, data=resolve_paths(data))


def _kept(group: Any, earlier: Any) -> Any:
    """A group of fields, with the paths of the earlier one where what they name may be moved, and is not there."""
    changes = {}
    for field in dataclasses.fields(group):
        syntax, then, now = field.metadata.get("path"), getattr(earlier, field.name), getattr(group, field.name)
        # What may be another one on resume is asked for anew; a mixture's folders are looked for.
        if syntax is None or field.metadata["resume"] or syntax.is_mixture:
            continue
        if syntax.may_be_moved(then, now) and not input_exists(now):
            changes[field.name] = then
    return dataclasses.replace(group, **changes)


def check_moved_text(config: Config, workdir: Workdir, corpus: Corpus) -> None:
    """Compares a text that a resumed run finds in another place with the one that its corpus was prepared from.

    Args:
      config: to train with.
      workdir: of the run.
      corpus: that the run goes on with.

    Raises:
      UserError: it is another text.
    """
    earlier = workdir.earlier_config()
    if earlier is None:
        return
    then, now = (resolve_paths(which.data) for which in (earlier, config))
    for name in ("input", "validation_input"):
        path, known = getattr(now, name), corpus.input_signatures.get(name)
        if path in ("", getattr(then, name)) or known is None or not input_exists(path):
            continue
        reader = CorpusReader(path, text_field=config.data.text_field, skip_bad_files=config.data.skip_bad_files)
        if reader.signature != known:
            raise UserError(
                f"data.{name} = {path!r} holds other files than {getattr(then, name)!r}, which {corpus.folder} was "
                "prepared from; give the text that the run was started with, or another --workdir."
            )
