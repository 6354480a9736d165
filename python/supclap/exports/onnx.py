"""Both towers as ONNX graphs, checked by onnxruntime.

    features.onnx   wave [S] -> features [F, M]: built-in and CED's front end
    audio.onnx      features [B, F, M], lengths [B] -> unit vectors [B, D]
    text.onnx       what the tokenizer makes of sentences -> unit vectors [B, D]
    onnx.json       how sounds become features and sentences become ids, and the names of both
    audio_encoder/, text_encoder/    settings, extractor and tokenizer of encoders of the hub

Encoders that hear waves (wav2vec 2.0, HuBERT, ...) take one clip at a time: features [1, S, 1].
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..audio import N_FFT, LogMel, log_mel, mel_filters
from ..batches import pad_features
from ..builtin import Bytes
from ..config import TrainConfig, read_config
from ..errors import UserError
from ..files import write_json
from ..languages import LANGUAGE
from ..model import SupclapModel, Tower, load_model, selection_note
from .folder import check_out

WITHIN = 1e-5  # of PyTorch, the largest difference in vectors, and in features as a share
SENTENCES = ("a dog barks", "rain falls on a roof, and far away a bird sings", "wind")
SECONDS = (1.0, 0.6, 2.3)


class Graph(nn.Module):
    """A tower without what only training needs."""

    def __init__(self, tower: Tower, alone: bool) -> None:
        super().__init__()
        self.tower, self.alone = tower, alone

    def forward(self, *inputs: Tensor) -> Tensor:
        encoder: Any = self.tower.encoder
        if self.alone:
            states = encoder.of_waves(inputs[0][..., 0], [inputs[0].shape[1]])
        else:
            states = encoder(*inputs)
        return F.normalize(self.tower.head(states).float(), dim=1)


class FrontEndGraph(nn.Module):
    def forward(self, wave: Tensor) -> Tensor:
        return log_mel(wave)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the exporter says of itself from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def write_graph(
    path: Path, module: nn.Module, examples: list[tuple[Tensor, ...]], names: list[str]
) -> float:
    """Exports a module and returns the largest difference of onnxruntime from PyTorch over the
    examples, of which the first one is traced."""
    runtime = importlib.import_module("onnxruntime")
    importlib.import_module("onnxscript")
    free = torch.export.Dim.AUTO
    sizes = tuple({d: free for d in range(min(2, x.ndim)) if x.shape[d] > 1} for x in examples[0])
    module.eval()
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module, examples[0], input_names=names, output_names=["output"],
                dynamic_shapes=(sizes,) if isinstance(module, Graph) else sizes,
                dynamo=True, verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(f"PyTorch cannot export {path.stem} to ONNX: {reason}") from error
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # where on this machine the code is
        program.save(path)
        session, worst = runtime.InferenceSession(path), 0.0
        for inputs in examples:
            given = dict(zip(names, (x.numpy() for x in inputs), strict=True))
            found, expected = torch.from_numpy(run_graph(session, given)), module(*inputs)
            if found.shape != expected.shape:
                raise UserError(f"{path.name}: onnxruntime gives {tuple(found.shape)}")
            difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)
            worst = max(worst, float(difference))
    if not worst <= WITHIN:
        raise UserError(f"{path}: onnxruntime differs from PyTorch by {worst:.1e}")
    return worst


def run_graph(session: Any, given: dict[str, Any]) -> Any:
    """The output of a graph. An error of onnxruntime has a class of its own."""
    try:
        return session.run(None, given)[0]
    except Exception as error:
        raise UserError(f"onnxruntime cannot run what was exported: {error}") from error


def export_onnx(run: Path, out: Path) -> list[str]:
    """Writes the graphs; returns a line for each."""
    model = load_model(run)
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    front_end, tokenizer = model.audio.encoder.front_end, model.text.encoder.tokenizer
    rng, rate = np.random.default_rng(0), front_end.sample_rate
    waves = [rng.normal(0, 0.1, round(rate * s)).astype(np.float32) for s in SECONDS]
    features, texts = [front_end(wave) for wave in waves], list(SENTENCES)
    alone = hasattr(model.audio.encoder, "of_waves") and features[0].shape[1] == 1
    heard: list[tuple[Tensor, ...]]
    if alone:
        heard = [(clip[None].float(),) for clip in features]
    else:
        heard = [pad_features(features[:2]), pad_features(features), pad_features(features[2:])]
    read = [tokenizer(part, [LANGUAGE] * len(part)) for part in (texts[:2], texts, texts[2:])]
    graphs: dict[str, tuple[nn.Module, list[Any], list[str]]] = {
        "audio": (Graph(model.audio, alone), heard, ["features", "lengths"][: len(heard[0])]),
        "text": (Graph(model.text, False), read, ["ids", "mask"][: len(read[0])]),
    }
    if isinstance(front_end, LogMel):
        mel_filters()  # before it is traced
        given = [(torch.from_numpy(wave),) for wave in waves]
        graphs["features"] = (FrontEndGraph(), given, ["wave"])
    lines, config = [], read_config(run)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        for name, (module, examples, names) in graphs.items():
            worst = write_graph(Path(folder) / f"{name}.onnx", module, examples, names)
            path = out / f"{name}.onnx"
            lines.append(f"{path}: {', '.join(names)}; within {worst:.1e} of PyTorch")
        described: dict[str, Any] = {
            "run": run.name, "dimensions": model.width, "logit_scale": model.logit_scale.item(),
            "sample_rate": rate, "seconds": model.seconds,
            "inputs": {name: names for name, (_, _, names) in graphs.items()},
            "ids": ids_of(model, config),
        }  # fmt: skip
        if config.loss == "siglip":
            described["logit_bias"] = model.logit_bias.item()
        if "features" in graphs:
            described["shortest_wave"] = N_FFT
        model.keep_encoders(Path(folder))
        write_json(Path(folder) / "onnx.json", described | selection_note(run))
        out.mkdir(exist_ok=True)
        for path in Path(folder).iterdir():
            path.replace(out / path.name)
    return lines


def ids_of(model: SupclapModel, config: TrainConfig) -> dict[str, Any]:
    """How a sentence becomes ids."""
    tokenizer = model.text.encoder.tokenizer
    if isinstance(tokenizer, Bytes):
        how = "UTF-8 bytes of the lower-cased sentence, plus 1; padded with 0"
        return {"are": how, "at_most": tokenizer.max_bytes}
    if config.model.text_encoder.startswith("py:"):
        return {"are": f"what the tokenizer of {config.model.text_encoder} makes of a sentence"}
    said = {
        "are": "what transformers.AutoTokenizer makes of a sentence, from text_encoder/",
        "at_most": tokenizer.most, "prompt": tokenizer.prompt,
    }  # fmt: skip
    return said | ({"src_lang": "of the sentence's language"} if tokenizer.languages else {})
