"""Zero-shot classification: the label whose sentence is nearest to the clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .embeddings import DEFAULTS, EmbedOptions, embed_clips, embed_text
from .errors import UserError
from .labels import labelled_clips
from .languages import LANGUAGE
from .model import load_model, selection_note

TEMPLATE = "This is a sound of {label}"
RULE = (
    "a clip is right if its label's sentence scores higher than every other label's (a tie is "
    "wrong); with several templates a label is the mean of its sentences' unit vectors"
)


def class_vectors(model: Any, labels: list[str], templates: list[str], language: str) -> Tensor:
    """Returns the unit vectors of C labels, [C, D]."""
    for template in templates:
        if "{label}" not in template:
            raise UserError(f"--template {template!r} needs {{label}}, such as {TEMPLATE!r}")
    sentences = [template.replace("{label}", label) for label in labels for template in templates]
    vectors = embed_text(model, sentences, [language] * len(sentences))
    mean = vectors.view(len(labels), len(templates), -1).mean(dim=1)
    return torch.nn.functional.normalize(mean, dim=1)


def accuracies(scores: Tensor, truth: Tensor, folds: list[str]) -> dict[str, Any]:
    """Returns numbers by RULE, as fractions, of scores [N, C] and truth [N]."""
    rank = (scores >= scores.gather(1, truth[:, None])).sum(dim=1)
    right = (rank == 1).double()
    per_class = [right[truth == c].mean() for c in truth.unique()]
    numbers: dict[str, Any] = {
        "accuracy": right.mean().item(),
        "top5": (rank <= 5).double().mean().item(),
        "mean_class_accuracy": torch.stack(per_class).mean().item(),
    }
    if len(set(folds)) > 1:
        names = sorted(set(folds), key=lambda fold: (len(fold), fold))
        in_fold = {name: torch.tensor([fold == name for fold in folds]) for name in names}
        of_fold = {name: right[clips].mean().item() for name, clips in in_fold.items()}
        numbers |= {"mean_fold_accuracy": sum(of_fold.values()) / len(of_fold), "folds": of_fold}
    return numbers


def classify_run(
    run: Path,
    data: Path,
    templates: list[str] | None = None,
    language: str = LANGUAGE,
    options: EmbedOptions = DEFAULTS,
) -> dict[str, Any]:
    """Returns the accuracy of a run's checkpoint, the rule, the templates and what was skipped."""
    model = load_model(run).to(options.device)
    clips, labels, folds = labelled_clips(data)
    names, templates = sorted(set(labels)), templates or [TEMPLATE]
    audio, used, skipped = embed_clips(model, clips, data, options)
    known = set(map(id, used))
    kept = [n for n, clip in enumerate(clips) if id(clip) in known]
    scores = audio @ class_vectors(model, names, templates, language).T
    truth = torch.tensor([names.index(labels[n]) for n in kept])
    numbers = accuracies(scores, truth, [folds[n] for n in kept]) | selection_note(run)
    shared = {"rule": RULE, "templates": templates, "clips": len(kept), "classes": len(names)}
    return {**shared, **numbers, "skipped": skipped}
