"""Where the corpora of a run are by now: runs and corpora are moved, renamed, copied, and read from other folders.

A run's config says where its corpus was, and ``data.json`` of the run which one it was. So a corpus is looked for by
its name: in the run's folder, beside it, and beside each folder above it, as far as the stored path goes (a run in
``runs/mine`` with ``/old/data/texts`` finds ``runs/texts``, ``data/texts`` beside ``runs/``, and so on), and then where
it was. One with other contents is passed over. Nothing is prepared here, and nothing written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from natsjax.config import DataConfig
from natsjax.config_fields import MIXTURE, real_path
from natsjax.data.corpus import CORPUS_FILE, Corpus
from natsjax.data.mixture import mixture_fingerprint, parse_mixture
from natsjax.errors import UserError

CORPUS_FOLDER = "corpus"  # in a run whose config names no other
_MOST_COMBINATIONS = 1000
_REMEDY = "give its folder (of a mixture, DIR=WEIGHT,DIR=WEIGHT) as --prepared_dir"


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
    """The places that hold a corpus, each once, the run's own first."""
    places = {real_path(place): place for place in reversed(list(_places(Path(folder), run)))}
    return [
        _Found(place, _content_hash(place))
        for place in reversed(places.values())
        if os.path.exists(place / CORPUS_FILE)
    ]


def _places(folder: Path, run: Path) -> Iterator[Path]:
    """Where a corpus may be, the nearest to the run first, and of these the one with most of its path."""
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
