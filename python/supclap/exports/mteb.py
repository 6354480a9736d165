"""A run as a model of MTEB, for its tasks of audio and text (MAEB, arXiv 2602.16008).

    import mteb
    from supclap.exports.mteb import MtebEncoder

    mteb.evaluate(MtebEncoder("run"), mteb.get_tasks(tasks=["ClothoA2TRetrieval.v2"]))

It needs `pip install 'supclap-kernels[mteb]'`.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..embeddings import DEFAULTS, embed_features
from ..interface import Embedder
from ..languages import LANGUAGE, language_code
from ..model import WEIGHTS, selection_note
from ..ranks import choose_device
from .folder import BLANK


class MtebEncoder:
    """MTEB's interface of an encoder: `encode`, `similarity`, `similarity_pairwise`.

    Args:
        model_name: the folder of a run.
        revision: what the results are filed under, beside the folder's name; by default a checksum
            of the weights, and whether they were selected on a test set.
        device: auto, cpu or cuda.
    """

    def __init__(
        self, model_name: str | Path, revision: str | None = None, *, device: str | None = None,
        **_: Any,
    ) -> None:  # fmt: skip
        options = replace(DEFAULTS, device=choose_device(device or "auto"))
        self.embedder = Embedder(model_name, options)
        self.revision = revision or revision_of(self.embedder.run)

    @property
    def mteb_model_meta(self) -> Any:
        """What MTEB writes beside the results."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        known = {
            "name": f"supclap/{self.embedder.run.resolve().name}", "revision": self.revision,
            "modalities": ["audio", "text"], "embed_dim": self.embedder.width,
            "framework": ["PyTorch"], "similarity_fn_name": ScoringFunction.COSINE,
        }  # fmt: skip
        return ModelMeta.create_empty(known)

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str,
        prompt_type: Any = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Returns the unit vectors of a loader's rows, [N, D]: of texts, of sounds; of rows with
        both their normalised sum."""
        dataset, parts = inputs.dataset, []
        if "text" in dataset.features:
            language = language_of(task_metadata, hf_subset)
            texts = [text if text.strip() else BLANK for text in dataset["text"]]
            parts.append(self.embedder.embed_text(texts, language))
        if "audio" in dataset.features:
            parts.append(self.embed_sounds(dataset, options.get("batch_size", 32)))
        if not parts:
            raise ValueError(f"neither text nor audio among {list(dataset.features)}")
        return torch.nn.functional.normalize(torch.stack(parts).sum(dim=0), dim=1)

    def embed_sounds(self, dataset: Any, size: int) -> Tensor:
        """[N, D] of a column `audio`, whose files are read as all others are."""
        from datasets import Audio

        if isinstance(dataset.features["audio"], Audio):
            dataset = dataset.cast_column("audio", Audio(decode=False))
        batches = (dataset[n : n + size]["audio"] for n in range(0, len(dataset), size))
        vectors = [
            embed_features(self.embedder.model, list(map(self.features, sounds)), size)
            for sounds in batches
        ]
        return torch.cat(vectors)

    def features(self, sound: dict[str, Any]) -> Tensor:
        """[F, M] of a file's bytes or path, or of samples."""
        if "array" in sound:
            return self.embedder.features(np.asarray(sound["array"]), sound["sampling_rate"])
        return self.embedder.features(
            io.BytesIO(sound["bytes"]) if sound["bytes"] else sound["path"]
        )

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of all rows, [N, M]."""
        first, second = (torch.atleast_2d(torch.as_tensor(x)) for x in (embeddings1, embeddings2))
        return first @ second.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of corresponding rows, [N]."""
        first, second = (torch.atleast_2d(torch.as_tensor(x)) for x in (embeddings1, embeddings2))
        return (first * second).sum(dim=1)


def revision_of(run: Path) -> str:
    """Names the weights of a run."""
    digest = hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()[:16]
    return digest + "-selected-on-test" * bool(selection_note(run))


def language_of(task: Any, subset: str) -> str:
    """Returns the language of a part of a task: the first that MTEB names, as eng-Latn."""
    languages = getattr(task, "hf_subsets_to_langscripts", {}).get(subset) or [LANGUAGE]
    try:
        return language_code(languages[0])
    except ValueError:
        return LANGUAGE
