"""A run as a module of sentence-transformers, for sentences and for sounds."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from sentence_transformers.base.modules import InputModule
from sentence_transformers.util import load_dir_path
from torch import Tensor

from ..batches import pad_features
from ..folders import is_audio
from ..interface import Embedder
from ..languages import LANGUAGE, language_code
from .folder import BLANK, keep_run

HUB = ("token", "cache_folder", "revision", "local_files_only")
TEXT, AUDIO = ("input_ids", "attention_mask"), ("input_features", "lengths")
"""What a tower takes, by the names that the trainer looks for; more are numbered."""


class SupclapModule(InputModule):
    """Both towers of a run; what is heard is a file of sound, samples at the rate of the model's
    `sampling_rate`, or {"array", "sampling_rate"}; every other string is read, in the language of
    `encode(..., lang=)`."""

    save_in_root = False
    forward_kwargs = {"lang"}

    def __init__(self, run: str | Path) -> None:
        super().__init__()
        self.embedder = Embedder(run)
        self.model = self.embedder.model
        self.sampling_rate = int(self.model.audio.encoder.front_end.sample_rate)

    @property
    def modalities(self) -> list[Any]:
        return ["text", "audio"]

    def get_embedding_dimension(self) -> int:
        return self.embedder.width

    def preprocess(
        self, inputs: Any, prompt: str | None = None, lang: str = LANGUAGE, **_: Any
    ) -> dict[str, Any]:
        """Returns what one of the towers takes."""
        if all(isinstance(x, str) and not is_sound(x) for x in inputs):
            texts = [f"{prompt or ''}{text}" for text in inputs]
            texts = [text if text.strip() else BLANK for text in texts]
            languages = [language_code(lang)] * len(texts)
            return named(TEXT, self.model.text.encoder.tokenizer(texts, languages))
        sounds = [x if isinstance(x, dict) else {"array": x} for x in inputs]
        rates = [x.get("sampling_rate", self.sampling_rate) for x in sounds]
        features = [
            self.embedder.features(x["array"], r) for x, r in zip(sounds, rates, strict=True)
        ]
        return named(AUDIO, pad_features(features))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        heard = AUDIO[0] in features
        tower, names = (self.model.audio, AUDIO) if heard else (self.model.text, TEXT)
        return {**features, "sentence_embedding": tower(*unnamed(names, features))}

    def save(self, output_path: str, *_: Any, **options: Any) -> None:
        keep_run(self.embedder.run, self.model, Path(output_path))

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> SupclapModule:
        hub = {name: options[name] for name in HUB if name in options}
        return cls(load_dir_path(model_name_or_path, subfolder=subfolder, **hub))


def is_sound(text: str) -> bool:
    """Whether a string names a file of sound."""
    return is_audio(text) and Path(text).is_file()


def all_names(names: tuple[str, ...]) -> Any:
    yield from names
    yield from (f"{names[0]}_{n}" for n in count(len(names)))


def named(names: tuple[str, ...], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Names what a tower takes, in order."""
    return dict(zip(all_names(names), inputs, strict=False))


def unnamed(names: tuple[str, ...], features: dict[str, Any]) -> list[Tensor]:
    """What a tower takes, by its names."""
    found: list[Tensor] = []
    for name in all_names(names):
        if name not in features:
            return found
        found.append(features[name])
    return found
