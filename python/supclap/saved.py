"""Embeddings in files: safetensors, NumPy or a FAISS index, by the ending of the name."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError
from .files import write_json, write_whole

ENDINGS = (".safetensors", ".npy", ".faiss")


@dataclass
class Saved:
    """Unit vectors and what they are of."""

    audio: Tensor | None = None  # [N, D]
    text: Tensor | None = None  # [M, D]
    clip_of: Tensor | None = None  # [M] int64, if there are both
    files: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)  # of each caption
    labels: list[str] = field(default_factory=list)  # of each clip, if it has one
    note: dict[str, str] = field(
        default_factory=dict
    )  # the run, its weights, what it was selected on

    def names(self) -> dict[str, list[str]]:
        """What the vectors are of."""
        names = ("files", "captions", "languages", "labels")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def only(self) -> Tensor:
        """The vectors of a file that holds one kind of them."""
        one = self.audio if self.text is None else self.text
        assert one is not None
        return one

    def write(self, path: Path) -> None:
        """Writes the file; the names of a .npy or .faiss go into a .json beside it."""
        if path.suffix == ".safetensors":
            tensors = {"audio": self.audio, "text": self.text, "clip_of": self.clip_of}
            held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            note = {name: json.dumps(values) for name, values in self.names().items()} | self.note
            write_whole(path, lambda partial: save_file(held, partial, note))
            return
        vectors = self.only().numpy()
        if path.suffix == ".npy":

            def write(partial: Path) -> None:
                with partial.open("wb") as stream:  # np.save adds an ending to a name
                    np.save(stream, vectors)
        else:
            faiss = import_faiss()
            index = faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors)

            def write(partial: Path) -> None:
                faiss.write_index(index, str(partial))

        write_whole(path, write)
        write_json(names_of(path), self.names() | self.note)


def names_of(path: Path) -> Path:
    """Where it stands what the vectors of a .npy or .faiss are of."""
    return path.with_name(f"{path.name}.json")


def import_faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ModuleNotFoundError:
        raise UserError("a .faiss index needs `pip install faiss-cpu`") from None


def check_ending(path: Path, both: bool) -> None:
    """Raises an error for a file that cannot hold the embeddings. `both`: of audio and of text."""
    if path.suffix not in ENDINGS:
        raise UserError(f"--out {path}: known endings are {', '.join(ENDINGS)}")
    if both and path.suffix != ".safetensors":
        raise UserError(f"--out {path}: it holds one matrix; add --only audio or --only text")
    if path.suffix == ".faiss":
        import_faiss()


class Index:
    """Saved embeddings of audio that can be searched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isfile(path):
            raise UserError(f"--index {path}: no such file")
        if path.suffix not in ENDINGS:
            raise UserError(f"--index {path}: known endings are {', '.join(ENDINGS)}")
        try:
            self.files, self.vectors, self.weights = self.read()
            count = self.vectors.ntotal if path.suffix == ".faiss" else len(self.vectors)
            if count != len(self.files):
                raise ValueError(f"{count} vectors and {len(self.files)} names")
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"--index {path}: no embeddings of audio: {error}") from error

    def read(self) -> tuple[list[str], Any, str | None]:
        """The files, their vectors, and what tells the weights that made them, if it is known."""
        vectors: Any
        if self.path.suffix == ".safetensors":
            with safe_open(self.path, "pt") as stored:
                note = stored.metadata() or {}
                files = json.loads(note.get("files", "[]"))
                vectors = stored.get_tensor("audio") if files else None
        else:
            beside = names_of(self.path)
            if not beside.is_file():
                raise ValueError(f"{beside.name}, which names what its vectors are of, is missing")
            note = json.loads(beside.read_text(encoding="utf-8"))
            if not isinstance(note, dict):
                raise ValueError(f"{beside.name} holds no object")
            files = note.get("files")
            if self.path.suffix == ".faiss":
                vectors = import_faiss().read_index(str(self.path))
            else:
                vectors = torch.from_numpy(np.load(self.path, allow_pickle=False))
        if not files:
            raise ValueError("it names no files; `supclap embed` writes an index of sounds")
        return files, vectors, note.get("weights")

    @property
    def width(self) -> int:
        return int(self.vectors.d if self.path.suffix == ".faiss" else self.vectors.shape[1])

    def nearest(self, vector: Tensor, top: int) -> list[tuple[float, str]]:
        """Returns the clips nearest to a unit vector [D], as (cosine, file), best first."""
        top = min(top, len(self.files))
        if self.path.suffix == ".faiss":
            scores, places = self.vectors.search(vector[None].numpy(), top)
            return [(float(s), self.files[n]) for s, n in zip(scores[0], places[0], strict=True)]
        return best_of(self.vectors @ vector, self.files, top)


def best_of(scores: Tensor, names: list[str], top: int) -> list[tuple[float, str]]:
    """Returns the highest scores and their names, best first."""
    order = scores.argsort(descending=True, stable=True)[:top].tolist()
    return [(scores[n].item(), names[n]) for n in order]
