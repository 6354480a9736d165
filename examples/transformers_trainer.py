"""transformers' Trainer with a ClapModel: its optimizer gets the model's parameters alone.

    python examples/transformers_trainer.py --out runs/clap && ... --resume

Changed lines are marked SVR.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ClapConfig, ClapModel, Trainer, TrainingArguments

from supclap_kernels import StaticRadius, attach_radius  # SVR
from supclap_kernels.integrations.transformers import clap_loss  # SVR

from toy import BATCH, command_line


class SVRTrainer(Trainer):
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        outputs = model(**inputs)
        clap = self.accelerator.unwrap_model(model)
        radius = clap.supclap_radius(outputs.audio_embeds, outputs.text_embeds, 1.0)  # SVR
        loss = clap_loss(outputs, clap.logit_scale_a.exp(), radius=radius, beta=1.0)  # SVR
        return (loss, outputs) if return_outputs else loss


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Stands for your data set of processed clips and captions."""

    def __len__(self) -> int:
        return 8 * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "input_ids": torch.randint(3, 50, (7,), generator=generator),
            "input_features": torch.randn(1, 64, 16, generator=generator),
            "is_longer": torch.zeros(1, dtype=torch.bool),
        }


def clap() -> ClapModel:
    """Stands for ClapModel.from_pretrained(...)."""
    text = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 40, "projection_dim": 8,
    }  # fmt: skip
    audio = {
        "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "projection_dim": 8,
        "num_attention_heads": [1, 2], "num_hidden_layers": 2, "spec_size": 64, "num_mel_bins": 16,
        "window_size": 4, "patch_size": 4, "patch_stride": [4, 4], "num_classes": 4,
        "mlp_ratio": 2.0, "enable_fusion": False,
    }  # fmt: skip
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8))


def train(out: Path, steps: int, resume: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = clap()
    attach_radius(model, StaticRadius(1.0))  # SVR: before the Trainer
    backend = "gloo" if "RANK" in os.environ else None  # under torchrun, on CPUs
    args = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, save_steps=steps,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, logging_strategy="no", ddp_backend=backend,
    )  # fmt: skip
    trainer = SVRTrainer(model=model, args=args, train_dataset=Pairs())
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer.optimizer


if __name__ == "__main__":
    command_line(train)
