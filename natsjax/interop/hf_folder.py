"""A Hugging Face folder: config.json, safetensors (sharded or not) and tokenizer.json. Pickles are refused unread."""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from natsjax.data.optional import import_optional
from natsjax.data.readers.file_marks import check_file_no_pointer
from natsjax.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from natsjax.data.tokenizers.base import read_json
from natsjax.data.tokenizers.huggingface import HUGGING_FACE_FILE
from natsjax.errors import UserError, first_line
from natsjax.interop.hf_config import DescribedModel
from natsjax.interop.layout import EMBEDDING, UNEMBEDDING

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
_DTYPES = ("F32", "F16", "BF16")
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|h5|msgpack)", re.IGNORECASE)
_BUFFER = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # of early files; it follows from the config


class SafetensorsFolder:
    """The tensors of a folder: a ``natsjax.interop.layout.TensorSource``.

    Args:
      path: the folder.
      is_tied: whether the output layer is the embedding, which some files have twice.

    Raises:
      UserError: there is no weight file, a shard is missing or damaged, or a tensor has a dtype that is none of
        float32, float16 and bfloat16.
    """

    def __init__(self, path: pathlib.Path, *, is_tied: bool):
        self._safetensors = import_optional("safetensors", f"{path}", "hf")
        self.where = str(path)
        self._files: dict[str, Any] = {}
        self._file_of = {name: file for file in _weight_files(path) for name in self._names(path / file)}
        self.dtypes = {name: self._slice(name).get_dtype() for name in self._file_of if not _BUFFER.fullmatch(name)}
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self.dtypes}
        for name, dtype in self.dtypes.items():
            if dtype not in _DTYPES:
                raise UserError(
                    f"{path}: the tensor {name} is stored as {dtype}; natsjax reads {', '.join(_DTYPES)} (it has no "
                    "quantized weights)."
                )
        _check_index(path, self._file_of)
        if is_tied and UNEMBEDDING in self.shapes and EMBEDDING in self.shapes:
            if not np.array_equal(self.read(UNEMBEDDING), self.read(EMBEDDING)):
                raise UserError(
                    f"{path}: {UNEMBEDDING} is not {EMBEDDING}, although tie_word_embeddings is true; one of them is "
                    "wrong."
                )
            del self.shapes[UNEMBEDDING], self.dtypes[UNEMBEDDING]

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, float32, float16 or bfloat16."""
        with _errors(self._file_of[name]):
            return self._files[self._file_of[name]].get_tensor(name)

    @property
    def is_bfloat16(self) -> bool:
        """True if all numbers are bfloat16."""
        return set(self.dtypes.values()) == {"BF16"}

    def _slice(self, name: str) -> Any:
        with _errors(self._file_of[name]):
            return self._files[self._file_of[name]].get_slice(name)

    def _names(self, path: pathlib.Path) -> list[str]:
        check_file_no_pointer(path)
        with _errors(str(path)):
            opened = self._safetensors.safe_open(path, framework="np")
            self._files[path.name] = opened
            return list(opened.keys())


@contextlib.contextmanager
def _errors(file: str) -> Iterator[None]:
    """Raises the library's errors, which are bare ones, as a sentence about a file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing.") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}.") from error
    except Exception as error:
        if not _is_of_library(error):
            raise
        raise UserError(f"{file} is damaged, or no safetensors file: {first_line(error)}.") from error


def _weight_files(path: pathlib.Path) -> list[str]:
    """Returns the names of the weight files: all shards, or the one."""
    if (path / INDEX_FILE).is_file():
        shards = sorted(set(_weight_map(path).values()))
        if missing := [name for name in shards if not (path / name).is_file()]:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise UserError(f"{path} lacks {missing[0]}{more}, which {INDEX_FILE} names.")
        return shards
    if (path / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    names = sorted(file.name for file in path.iterdir())
    if pickles := [name for name in names if _PICKLES.fullmatch(name)]:
        raise UserError(
            f"{path} holds its weights as {pickles[0]} and not as safetensors; natsjax unpickles nothing, for a pickle "
            "can run any program: convert it where you trust it (save_pretrained of transformers)."
        )
    raise UserError(f"{path} holds no {WEIGHTS_FILE} and no {INDEX_FILE}.")


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    found = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{path / INDEX_FILE} has no weight_map of the names of tensors and files.")
    if outside := [name for name in found.values() if name in ("", ".", "..") or re.search(r"[/\\]", name)]:
        raise UserError(f"{path / INDEX_FILE} names {outside[0]!r}, which is no file of its folder.")
    return found


def _check_index(path: pathlib.Path, file_of: Mapping[str, str]) -> None:
    """Compares the index with what is in the shards."""
    if not (path / INDEX_FILE).is_file():
        return
    for name, file in _weight_map(path).items():
        if file_of.get(name) != file:
            raise UserError(f"{path / INDEX_FILE} says that {file} holds {name}, and it does not.")


def open_tokenizer(path: pathlib.Path, described: DescribedModel) -> Tokenizer:
    """Opens the tokenizer of a model.

    Args:
      path: folder of the model, or a tokenizer's own file or folder.
      described: the model.

    Raises:
      UserError: there is none, or its tokens are not those of the model.
    """
    file = path / HUGGING_FACE_FILE if path.is_dir() else path
    if file.is_file() and HuggingFaceTokenizer.reads(file):
        tokenizer: Tokenizer = HuggingFaceTokenizer.open_for_model(
            file, vocab_size=described.vocab_size, bos_id=described.bos_id, eos_id=described.eos_id
        )
    else:
        tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size != described.vocab_size:
        raise UserError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} ids, and the model {described.vocab_size}."
        )
    return tokenizer


def write_tensors(
    folder: pathlib.Path, tensors: Mapping[str, Callable[[], np.ndarray]], *, largest: int = 5 * 2**30
) -> None:
    """Writes tensors as one safetensors file, or as shards with an index.

    Args:
      folder: it, without such files.
      tensors: makes each tensor when it is called.
      largest: bytes of a file, where a tensor is not larger itself.

    Raises:
      UserError: a file cannot be written.
    """
    import_optional("safetensors.numpy", f"{folder}", "hf")
    from safetensors.numpy import save_file

    parts: list[list[str]] = []
    total = 0
    for part in _parts(tensors, largest):
        path = folder / _part_name(len(parts))
        path.touch()
        mode = path.stat().st_mode  # of any new file; the library's are for their owner alone
        with _errors_of_writing(folder):
            save_file(part, path, metadata={"format": "pt"})
        path.chmod(mode)
        parts.append(list(part))
        total += sum(tensor.nbytes for tensor in part.values())
    if len(parts) == 1:
        (folder / _part_name(0)).rename(folder / WEIGHTS_FILE)
        return
    shards = [f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors" for number in range(len(parts))]
    for number, shard in enumerate(shards):
        (folder / _part_name(number)).rename(folder / shard)
    index = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": index})


def _parts(tensors: Mapping[str, Callable[[], np.ndarray]], largest: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the tensors by file."""
    part: dict[str, np.ndarray] = {}
    size = 0
    for name, make in tensors.items():
        tensor = np.ascontiguousarray(make())
        if part and size + tensor.nbytes > largest:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


@contextlib.contextmanager
def _errors_of_writing(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_of_library(error):
            raise
        raise UserError(f"{folder} cannot be written: {first_line(error)}.") from error


def _is_of_library(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("safetensors", "_safetensors_rust")


def _part_name(number: int) -> str:
    return f"part-{number}.safetensors"


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a JSON file; raises OSError where that fails."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
