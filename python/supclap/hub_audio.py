"""Audio encoders of transformers by one adapter: AST, Whisper, wav2vec 2.0, HuBERT, WavLM.

The front end is the model's own feature extractor. A clip's vector is the mean of the states over
what is real of it, or what the model itself makes of them (AST).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .layers import masked_mean

WAVES = ("wav2vec2", "hubert", "wavlm", "unispeech-sat", "data2vec-audio")
FRAMES = ("audio-spectrogram-transformer", "whisper")
SECONDS = 30.0  # of a wave that is heard, if the model names no length


class Extractor:
    """A feature extractor of transformers. One that pads every clip to one length ends them with
    equal frames, of which one is kept: the encoder repeats it."""

    def __init__(self, extractor: Any, by_time: bool) -> None:
        self.extractor, self.by_time = extractor, by_time
        self.sample_rate = int(extractor.sampling_rate)
        self.seconds = SECONDS
        if hasattr(extractor, "chunk_length"):
            self.seconds = float(extractor.chunk_length)
        elif hasattr(extractor, "max_length"):  # AST: in frames of 10 ms
            self.seconds = extractor.max_length / 100
        self.key = f"hub {json.dumps(extractor.to_dict(), sort_keys=True, default=str)}"

    def __call__(self, wave: np.ndarray) -> Tensor:
        """[S] -> [F, M], or [S, 1] of a model that hears waves."""
        wave = np.pad(wave, (0, max(0, self.sample_rate // 20 - len(wave))))  # of one window
        batch = self.extractor(wave, sampling_rate=self.sample_rate, return_tensors="pt")
        features: Tensor = next(iter(batch.values()))[0]
        if features.ndim == 1:
            return features[:, None]
        features = features if self.by_time else features.t()
        other = (features != features[-1]).any(dim=1).nonzero()
        return features[: int(other.max()) + 2 if len(other) else 1].contiguous()


class HubAudio(nn.Module):
    """A model of transformers that hears waves or frames."""

    projects = False

    def __init__(self, model: Any, folder: Path, option: str, kind: str) -> None:
        from transformers import AutoFeatureExtractor

        super().__init__()
        self.kind, self.config = kind, model.config
        self.model = model.encoder if kind == "whisper" else model
        try:
            extractor = AutoFeatureExtractor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{option} hf:{folder}: cannot load its extractor: {error}") from error
        self.front_end = Extractor(extractor, by_time=kind != "whisper")
        if kind == "whisper":
            self.model.embed_positions.requires_grad_(False)  # sines
            self.frames, self.width = 2 * model.config.max_source_positions, model.config.d_model
        else:
            frames = getattr(model.config, "max_length", 0)
            self.frames, self.width = frames, model.config.hidden_size
        self.shortest = 1  # samples of a clip of which the convolutions leave something
        while kind in WAVES and self.model._get_feat_extract_output_lengths(self.shortest) < 1:
            self.shortest *= 2

    def whole(self, features: Tensor, lengths: Tensor) -> Tensor:
        """[B, frames, M]: with the frames that were left out, which equal the last one."""
        time = torch.arange(self.frames, device=features.device)
        places = torch.minimum(time[None, :], lengths[:, None] - 1)
        return features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """features: [B, F, M]; lengths: [B] real frames -> [B, W]."""
        if self.kind in WAVES:
            return self.of_waves(features[..., 0], lengths.tolist())
        frames = self.whole(features, lengths)
        if self.kind != "whisper":
            return self.model(frames).pooler_output
        states = self.model(frames.transpose(1, 2)).last_hidden_state  # a state for two frames
        time = torch.arange(states.shape[1], device=states.device)
        return masked_mean(states, 2 * time < lengths[:, None])

    def of_waves(self, waves: Tensor, lengths: list[int]) -> Tensor:
        """waves: [B, S] -> [B, W]. The convolutions take clip by clip: some of them normalise over
        time, and would hear the padding."""
        parts = []
        for wave, length in zip(waves, lengths, strict=True):
            real = F.pad(wave[:length], (0, max(0, self.shortest - length)))
            parts.append(self.model.feature_extractor(real[None])[0].t())
        pad, ones = nn.utils.rnn.pad_sequence, [torch.ones_like(part[:, 0]) for part in parts]
        hidden = self.model.feature_projection(pad(parts, batch_first=True))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        mask = pad(ones, batch_first=True) > 0
        states = self.model.encoder(hidden, attention_mask=mask).last_hidden_state
        return masked_mean(states, mask)

    def keep(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        self.front_end.extractor.save_pretrained(folder)
