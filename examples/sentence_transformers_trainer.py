"""sentence-transformers' trainer: it saves and resumes the model part by part, and not the loss.

    python examples/sentence_transformers_trainer.py --out runs/sentences && ... --resume

Changed lines are marked SVR. A folder saved while the radius hangs on the model needs this package
to be loaded; after `detach_radius(model)` it is a plain one. To go on from such a folder by hand,
SentenceTransformer(folder, trust_remote_code=True) and attach_radius, which finds the value.
"""

import os
import string
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from supclap_kernels import StaticRadius, attach_radius, detach_radius  # SVR
from supclap_kernels.integrations.sentence_transformers import (  # SVR
    MultipleNegativesSymmetricRankingLoss,
)

from toy import BATCH, command_line


def encoder() -> SentenceTransformer:
    """Stands for SentenceTransformer("your/model")."""
    vocabulary = {letter: n for n, letter in enumerate("?" + string.ascii_lowercase)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def pairs() -> Dataset:
    """Stands for your data set."""
    letters = torch.randint(0, 26, (8 * BATCH, 12), generator=torch.Generator().manual_seed(0))
    words = ["".join(string.ascii_lowercase[n] for n in row) for row in letters.tolist()]
    return Dataset.from_dict({"anchor": words, "positive": [word[:8] for word in words]})


def train(out: Path, steps: int, resume: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = encoder()
    radius = attach_radius(model, StaticRadius(1.0))  # SVR: before the trainer
    backend = "gloo" if "RANK" in os.environ else None  # under torchrun, on CPUs
    args = Arguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, save_steps=steps,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", ddp_backend=backend,
    )  # fmt: skip
    loss = MultipleNegativesSymmetricRankingLoss(model, radius=radius, beta=1.0)  # SVR
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs(), loss=loss)
    trainer.train(resume_from_checkpoint=resume)
    detach_radius(model)  # SVR: what is saved for inference is a plain folder
    model.save_pretrained(str(out / "final"))
    attach_radius(model, radius)
    return model, trainer.optimizer


if __name__ == "__main__":
    command_line(train)
