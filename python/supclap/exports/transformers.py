"""A run as a model of transformers: what `AutoModel` makes of an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.clap.modeling_clap import ClapOutput

from ..hub import fetch
from ..interface import Embedder
from .folder import RUN, write_folder


class HubConfig(PretrainedConfig):
    """Its settings are those of the run inside the folder."""

    model_type = "supclap"


class HubModel(PreTrainedModel):
    """Both towers of a run. `embed_audio`, `embed_text` and `similarity` are those of
    `supclap.load`; the others take what the encoders take, and are differentiable."""

    config_class = HubConfig

    def __init__(self, config: HubConfig, embedder: Embedder) -> None:
        super().__init__(config)
        self.embedder, self.model = embedder, embedder.model
        self.embed_audio, self.embed_text = embedder.embed_audio, embedder.embed_text
        self.similarity = embedder.similarity

    @classmethod
    def from_pretrained(cls, name: str | Path, *_: Any, **options: Any) -> HubModel:
        """Loads an exported folder, or one of the hub by its name. Of the options of transformers
        `config` and `dtype` count; the device is that of `.to`."""
        folder = fetch(str(name), "from_pretrained", weights=True)
        config = options.get("config") or HubConfig.from_pretrained(folder)
        model = cls(config, Embedder(folder / RUN))
        dtype = options.get("dtype") or options.get("torch_dtype")
        return model.to(dtype).eval() if isinstance(dtype, torch.dtype) else model.eval()

    def save_pretrained(self, save_directory: str | Path, *_: Any, **options: Any) -> None:
        """Writes a folder that `from_pretrained` loads, with the weights of now."""
        write_folder(self.embedder.run, self.model, Path(save_directory))

    def get_audio_features(self, features: Tensor, lengths: Tensor) -> Tensor:
        """features: [B, F, M]; lengths: [B] -> unit vectors [B, D]."""
        return self.model.audio(features, lengths)

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        """What the tokenizer makes of captions -> unit vectors [B, D]."""
        return self.model.text(*inputs)

    def forward(self, features: Tensor, lengths: Tensor, *text: Tensor) -> ClapOutput:
        """Returns unit vectors and logits, as CLAP of transformers does."""
        audio, texts = self.get_audio_features(features, lengths), self.get_text_features(*text)
        logits = self.model.logit_scale * texts @ audio.T
        return ClapOutput(
            logits_per_audio=logits.T, logits_per_text=logits, text_embeds=texts, audio_embeds=audio
        )
