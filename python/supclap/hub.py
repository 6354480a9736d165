"""Encoders of the Hugging Face hub, by name or from a folder: CED, CLAP, SONAR, any text encoder;
other audio encoders are in hub_audio.py.

A run keeps what it needs to load again (settings, tokenizer) in its own folder, without weights:
`RUN/audio_encoder`, `RUN/text_encoder`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import langcodes
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .ced import CED, SIZES, translate
from .errors import UserError
from .hub_audio import FRAMES, WAVES, HubAudio
from .languages import language_code
from .layers import masked_mean

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we fork to decode audio


def fetch(name: str, option: str, weights: bool, **hub: Any) -> Path:
    """Returns the folder of a model, which is downloaded if it is no folder yet. `hub`: options of
    `snapshot_download`."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{option} hf:{name}: no such folder, and the hub has not given it "
            f"({type(error).__name__}). Download the model where there is a network (hf download "
            f"{name}) and pass its folder: {option} hf:/path/to/it"
        ) from error


def settings_of(folder: Path, option: str) -> dict[str, Any]:
    """Reads a model's config.json."""
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return settings
    except (OSError, ValueError) as error:
        raise UserError(f"{option} hf:{folder}: cannot read its config.json: {error}") from error


def build(model_class: Any, folder: Path, weights: bool, option: str) -> Any:
    """Builds a model of transformers, in float32, with its weights or random ones."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # one tower of two is loaded: the other's weights are no news
    try:
        if weights:
            return model_class.from_pretrained(folder, dtype=torch.float32)
        return model_class(model_class.config_class.from_pretrained(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{option} hf:{folder}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def any_model(folder: Path, weights: bool, option: str) -> Any:
    """Builds whatever model of transformers a folder holds."""
    from transformers import AutoConfig, AutoModel

    if weights:
        return build(AutoModel, folder, weights, option)
    return AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


class ClapFrontEnd:
    """CLAP's own features, without its random crop: clips come cut."""

    def __init__(self, extractor: Any) -> None:
        self.extractor, self.sample_rate = extractor, int(extractor.sampling_rate)
        self.seconds = extractor.nb_max_samples / self.sample_rate
        self.key = f"clap {json.dumps(extractor.to_dict(), sort_keys=True, default=str)}"

    def __call__(self, wave: np.ndarray) -> Tensor:
        """[S] -> [views * F, M]; the same F for every clip."""
        wave = wave[: round(self.seconds * self.sample_rate)]
        batch = self.extractor(wave, sampling_rate=self.sample_rate, return_tensors="pt")
        features: Tensor = batch["input_features"][0]  # [views, F, M]
        return features.flatten(0, 1)


class ClapAudio(nn.Module):
    """CLAP's audio tower with its projection."""

    projects = True

    def __init__(self, folder: Path, weights: bool, option: str) -> None:
        from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor

        super().__init__()
        self.model = build(ClapAudioModelWithProjection, folder, weights, option)
        self.extractor = ClapFeatureExtractor.from_pretrained(folder)
        self.front_end = ClapFrontEnd(self.extractor)
        self.views = 4 if self.model.config.enable_fusion else 1
        self.extractor.truncation = "fusion" if self.views > 1 else "rand_trunc"
        self.width = int(self.model.config.projection_dim)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """[B, views * F, M] -> [B, W]. No clip is longer than the model hears: they come cut."""
        longer = torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)
        output = self.model(features.unflatten(1, (self.views, -1)), is_longer=longer)
        return output.audio_embeds

    def keep(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)
        self.extractor.save_pretrained(folder)


class PublishedCED(CED):
    """CED in the size of a published checkpoint."""

    def __init__(self, folder: Path, weights: bool, option: str) -> None:
        self.settings = settings_of(folder, option)
        name, base = self.settings.get("name"), SIZES["base"]
        width, heads = SIZES.get(str(name).removeprefix("ced-"), base)
        width, heads = self.settings.get("embed_dim", width), self.settings.get("num_heads", heads)
        super().__init__(width, heads, self.settings.get("depth", 12))
        if weights:
            try:
                self.load_state_dict(translate(load_file(folder / "model.safetensors")))
            except (OSError, RuntimeError, SafetensorError) as error:
                raise UserError(f"{option} hf:{folder}: {error}") from error

    def set_statistics(self, features: Callable[[], list[Tensor]]) -> None:
        """Keeps the statistics of the published weights."""

    def keep(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.settings, indent=2), encoding="utf-8")


POOLING, PROMPTS = "1_Pooling/config.json", "config_sentence_transformers.json"
LENGTH = "sentence_bert_config.json"


def pooling_of(folder: Path, option: str) -> str:
    """Returns how sentence-transformers pools the states of a model: mean, cls or lasttoken; the
    mean where nothing says so."""
    settings = said_in(folder, POOLING, option)
    if not settings:
        return "mean"
    modes = [settings.get("pooling_mode")]
    if not modes[0]:
        names = [key.removeprefix("pooling_mode_") for key, on in settings.items() if on is True]
        modes = [name.removesuffix("s").removesuffix("_token") for name in names]
        modes = [mode for mode in modes if mode != "include_prompt"]
    if modes not in (["mean"], ["cls"], ["lasttoken"]):
        raise UserError(f"{option} hf:{folder}: pooling {modes}; known are mean, cls, lasttoken")
    return str(modes[0])


def prompt_of(folder: Path, option: str) -> str:
    """Returns what stands before every sentence, where the folder says so."""
    settings = said_in(folder, PROMPTS, option)
    name = settings.get("default_prompt_name")
    return str((settings.get("prompts") or {}).get(name) or "")


def said_in(folder: Path, name: str, option: str) -> dict[str, Any]:
    """Returns what a file beside a model says; nothing if it is not there."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option} hf:{folder}: cannot read its {name}: {error}") from error
    if not isinstance(said, dict):
        raise UserError(f"{option} hf:{folder}: its {name} holds no object")
    return said


def most_tokens(folder: Path, config: Any, tokenizer: Any, option: str) -> int:
    """Returns how many tokens of a caption are read. A tokenizer that does not say it is taken for
    RoBERTa's, which has two positions more than tokens."""
    positions = int(getattr(config, "max_position_embeddings", 512))
    most = tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else positions - 2
    said = said_in(folder, LENGTH, option).get("max_seq_length")
    limits = [n for n in (most, positions, 512, said) if n is not None]
    if not all(isinstance(n, int) and n > 0 for n in limits):
        raise UserError(f"{option} hf:{folder}: max_seq_length must be a number, got {said!r}")
    return min(limits)


class Tokenizer:
    """Makes token ids and masks of captions, by their languages where the model has them."""

    def __init__(self, tokenizer: Any, most: int, prompt: str = "") -> None:
        self.tokenizer, self.most, self.prompt = tokenizer, most, prompt
        self.languages = self.known() if hasattr(tokenizer, "src_lang") else []

    def known(self) -> list[str]:
        """Returns the language codes of an NLLB tokenizer, such as eng_Latn."""
        tokens = self.tokenizer.get_added_vocab()
        return sorted(token for token in tokens if len(token) == 8 and token[3] == "_")

    def code(self, language: str) -> str:
        """Returns the tokenizer's code for a language: eng -> eng_Latn, zho -> zho_Hans."""
        if language in self.languages:
            return language
        codes = [code for code in self.languages if code.startswith(f"{language}_")]
        for script in ("Latn", "Hans"):
            codes = [code for code in codes if code.endswith(script)] or codes
        codes = codes or [code for code in self.languages if language_code(code) == language]
        if codes:
            return codes[0]
        nearest, _ = langcodes.closest_match(language, self.languages, max_distance=3)
        if nearest not in self.languages:
            raise UserError(
                f"the text encoder has no language {language!r}; it has {', '.join(self.languages)}"
            )
        return nearest

    def __call__(self, captions: list[str], languages: list[str]) -> tuple[Tensor, ...]:
        """Returns ids [B, L] and mask [B, L]."""
        rows = []
        for caption, language in zip(captions, languages, strict=True):
            if self.languages:
                self.tokenizer.src_lang = self.code(language)
            text = self.prompt + caption
            rows.append(self.tokenizer(text, truncation=True, max_length=self.most)["input_ids"])
        ids = [torch.tensor(row) for row in rows]
        mask = [torch.ones_like(row) for row in ids]
        pad, padding = torch.nn.utils.rnn.pad_sequence, self.tokenizer.pad_token_id or 0
        return pad(ids, True, padding), pad(mask, True)


class PublishedText(nn.Module):
    """CLAP's text tower with its projection, or any text encoder's last states, pooled as its
    folder says."""

    def __init__(self, folder: Path, weights: bool, option: str) -> None:
        from transformers import AutoTokenizer, ClapTextModelWithProjection
        from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

        super().__init__()
        kind = settings_of(folder, option).get("model_type")
        self.projects = kind in ("clap", "clap_text_model")
        if kind == "m2m_100":
            if weights:
                print(
                    f"{option}: the published SONAR and NLLB weights are CC-BY-NC-4.0, for "
                    "non-commercial use only"
                )
            self.model = build(M2M100Encoder, folder, weights, option)
        elif self.projects:
            self.model = build(ClapTextModelWithProjection, folder, weights, option)
        else:
            self.model = any_model(folder, weights, option)
        config = self.model.config
        if config.is_encoder_decoder and hasattr(self.model, "get_encoder"):
            self.model = self.model.get_encoder()
        self.width = int(config.projection_dim if self.projects else config.hidden_size)
        try:
            self.files = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{option} hf:{folder}: cannot load its tokenizer: {error}") from error
        most = most_tokens(folder, config, self.files, option)
        self.tokenizer = Tokenizer(self.files, most, prompt_of(folder, option))
        self.pooling = pooling_of(folder, option)
        names = [name for name in (POOLING, PROMPTS, LENGTH) if (folder / name).is_file()]
        self.said = {name: (folder / name).read_text(encoding="utf-8") for name in names}

    def lengths_of(self, ids: Tensor, mask: Tensor) -> Tensor:
        return mask.sum(dim=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: [B, L] -> [B, W]."""
        output = self.model(input_ids=ids, attention_mask=mask)
        if self.projects:
            return output.text_embeds
        states = output.last_hidden_state
        if self.pooling == "mean":
            return masked_mean(states, mask)
        if self.pooling == "cls":
            return states[:, 0]
        last = (mask.sum(dim=1) - 1)[:, None, None].expand(-1, 1, states.shape[2])
        return states.gather(1, last)[:, 0]

    def keep(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)
        self.files.save_pretrained(folder)
        for name, text in self.said.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


def audio_encoder(name: str, weights: bool = True, option: str = "--audio-encoder") -> nn.Module:
    """Builds an audio encoder from the hub or a folder."""
    folder = fetch(name, option, weights)
    kind = settings_of(folder, option).get("model_type")
    if kind == "ced":
        return PublishedCED(folder, weights, option)
    if kind in ("clap", "clap_audio_model"):
        return ClapAudio(folder, weights, option)
    if kind in (*WAVES, *FRAMES):
        return HubAudio(any_model(folder, weights, option), folder, option, str(kind))
    known = ", ".join(("ced", "clap", *FRAMES, *WAVES))
    raise UserError(f"{option} hf:{name}: model type {kind!r}; known are {known}")


def text_encoder(name: str, weights: bool = True, option: str = "--text-encoder") -> nn.Module:
    """Builds a text encoder from the hub or a folder."""
    return PublishedText(fetch(name, option, weights), weights, option)
