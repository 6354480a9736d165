"""A run as a model of transformers: what `AutoModel` makes of an exported folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.clap.modeling_clap import ClapOutput

from ..config import read_config
from ..hub import fetch
from ..interface import Embedder
from .folder import run_inside, write_folder

DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only", "force_download")


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
        self.has_bias = read_config(embedder.run).loss == "siglip"

    @classmethod
    def from_pretrained(cls, name: str | Path, *_: Any, **options: Any) -> Any:
        """Loads an exported folder, or one of the hub by its name, in float32 whatever dtype is
        asked for. Options of the download count; the device is that of `.to`."""
        hub = {option: options[option] for option in DOWNLOAD if options.get(option) is not None}
        folder = fetch(str(name), "from_pretrained", weights=True, **hub)
        config = options.get("config") or HubConfig.from_pretrained(folder)
        model = cls(config, Embedder(run_inside(folder))).eval()
        return (model, {}) if options.get("output_loading_info") else model

    def save_pretrained(self, save_directory: str | Path, *_: Any, **options: Any) -> None:
        """Writes a folder that `from_pretrained` loads, with the weights of now."""
        write_folder(self.embedder.run, self.model, Path(save_directory))

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Uploads the folder; options as of `huggingface_hub.HfApi.upload_folder`."""
        from huggingface_hub import HfApi

        api = HfApi(token=options.pop("token", None))
        api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)

    def get_audio_features(self, input_features: Tensor, lengths: Tensor) -> Tensor:
        """input_features: [B, F, M]; lengths: [B] -> unit vectors [B, D]."""
        return self.model.audio(input_features, lengths)

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        """What the tokenizer makes of captions -> unit vectors [B, D]."""
        return self.model.text(*inputs)

    def forward(self, input_features: Tensor, lengths: Tensor, *text: Tensor) -> ClapOutput:
        """Returns unit vectors and logits, as CLAP of transformers does."""
        audio, texts = self.get_audio_features(input_features, lengths), self.model.text(*text)
        logits = self.model.logit_scale * texts @ audio.T
        logits = logits + self.model.logit_bias if self.has_bias else logits
        return ClapOutput(
            logits_per_audio=logits.T, logits_per_text=logits, text_embeds=texts, audio_embeds=audio
        )
