"""Paths of a run's data: absolute when they are stored, and followed where things were moved.

Runs and corpora are moved, renamed, copied, and read from other folders. A run's config has the path of its corpus, and
``data.json`` of the run its fingerprint. So a corpus is looked for by its name: in the run's folder, beside it, and
beside each folder above it, as far as the stored path reaches (a run in ``runs/mine`` with ``/old/data/texts`` finds
``runs/texts``, ``data/texts`` beside ``runs/``, and so on), and then at its stored path. One with other contents is
passed over. Nothing is prepared here, and nothing written.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from natsjax.config import Config, DataConfig
from natsjax.config_fields import MIXTURE, real_path, resolve_paths
from natsjax.data.corpus import CORPUS_FILE, Corpus
from natsjax.data.mixture import mixture_fingerprint, parse_mixture
from natsjax.data.readers.corpus_reader import CorpusReader, input_exists
from natsjax.errors import UserError
from natsjax.runs.workdir import Workdir

CORPUS_FOLDER = "corpus"  # in a run whose config names no other
_MOST_COMBINATIONS = 1000
_REMEDY = "give its folder (of a mixture, DIR=WEIGHT,DIR=WEIGHT) as --prepared_dir"


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
    """Returns a group of fields with the earlier paths, where a new one may be a moved file that is not there."""
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
      corpus: that the run keeps.

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


class _Found(NamedTuple):
    """A folder with a corpus, and its content hash; None: it cannot be read."""

    folder: Path
    content_hash: str | None


def locate(data: DataConfig, run: Path, fingerprint: str | None, *, remedy: str = _REMEDY) -> DataConfig:
    """Finds the corpora that a run was trained on.

    Args:
      data: of the run's config.
      run: its folder, or an export.
      fingerprint: of the data (``natsjax.runs.data.RunData``); None: not known, and the first that is there is taken.
      remedy: the end of the message where there are none.

    Returns:
      ``data`` with ``mixture`` or ``prepared_dir`` as they are now.

    Raises:
      UserError: a corpus is not there, or only another one, or it is damaged.
    """
    wanted = parse_mixture(data.mixture) if data.mixture else [(data.prepared_dir or str(run / CORPUS_FOLDER), 1.0)]
    shares = [share for _, share in wanted]
    choices = [_all_found(folder, run) for folder, _ in wanted]
    for chosen in itertools.islice(itertools.product(*choices), _MOST_COMBINATIONS):
        if fingerprint is None or fingerprint == _fingerprint(data, chosen, shares):
            if not data.mixture:
                return dataclasses.replace(data, prepared_dir=str(chosen[0].folder))
            here = {folder: str(found.folder) for (folder, _), found in zip(wanted, chosen, strict=True)}
            return dataclasses.replace(data, mixture=MIXTURE.changed(data.mixture, here.__getitem__))
    if missing := [folder for (folder, _), found in zip(wanted, choices, strict=True) if not found]:
        why = f"{' and '.join(missing)} {'holds' if len(missing) == 1 else 'hold'} none"
    else:
        for found in itertools.chain(*choices):
            if found.content_hash is None:
                Corpus.load(found.folder)  # says what is wrong with it
        why = f"what {data.mixture or choices[0][-1].folder} holds is another one"
    raise UserError(f"the corpus that {run} was trained on is not here ({why}); {remedy}.")


def _fingerprint(data: DataConfig, chosen: Sequence[_Found], shares: Sequence[float]) -> str | None:
    hashes = [found.content_hash for found in chosen]
    if not data.mixture:
        return hashes[0]
    known = [content_hash for content_hash in hashes if content_hash is not None]
    return mixture_fingerprint(zip(known, shares, strict=True)) if len(known) == len(hashes) else None


def _all_found(folder: str, run: Path) -> list[_Found]:
    """Lists the places that hold a corpus, each once, the run's own first."""
    places = {real_path(place): place for place in reversed(list(_places(Path(folder), run)))}
    return [
        _Found(place, _content_hash(place))
        for place in reversed(places.values())
        if os.path.exists(place / CORPUS_FILE)
    ]


def _places(folder: Path, run: Path) -> Iterator[Path]:
    """Yields the places of a corpus, the nearest to the run first, and of these the one with most of its path."""
    if folder == run / CORPUS_FOLDER:
        yield folder
        return
    names = [name for name in folder.parts if name not in (folder.anchor, "..")]
    for place in dict.fromkeys([Path(os.path.abspath(run)), real_path(run)]):
        for above in (place, *place.parents):
            if above == above.parent:
                continue  # what lies at the root, lies beside everything
            if not folder.is_absolute():
                yield above / folder
            for first in range(len(names)):
                yield above.joinpath(*names[first:])
    yield folder


def _content_hash(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / CORPUS_FILE).read_text(encoding="utf-8"))["content_hash"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
