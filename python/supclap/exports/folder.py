"""A folder that transformers and sentence-transformers load.

`run/` holds the model as supclap keeps it. The files around it name the classes that load it:
transformers.py and sentence_transformers.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import TrainConfig, config_text, read_config
from ..files import write_json, write_text
from ..model import WEIGHTS, SupclapModel, load_model, save_model, selection_note

RUN = "run"
CODE = "modeling_supclap.py"
CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, transformers, audio, feature-extraction, supclap]
---

# Audio and text in one space

Unit vectors of {width} dimensions, of sounds ({seconds:g} seconds are heard) and of sentences.
`pip install 'supclap-kernels[hub]'`, then one of:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(FOLDER, trust_remote_code=True)
model.similarity(model.encode(["a dog barks"]), model.encode(["a.wav"]))
```

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
model.similarity(["a dog barks"], ["a.wav"])
```

`supclap.load(FOLDER + "/run")` and `supclap search FOLDER/run ...` take it as well.
"""


def shareable(config: TrainConfig) -> TrainConfig:
    """Returns the settings with the names of files alone: their folders are nobody's business."""
    changed: dict[str, Any] = {"out": Path(RUN)}
    for name in ("val", "test", "init"):
        path = getattr(config, name)
        changed[name] = path and Path(path.name)
    changed["data"] = tuple(Path(path.name) for path in config.manifests)
    kept = config.cache in ("memory", "off")
    changed["cache"] = config.cache if kept else Path(config.cache).name
    encoders: dict[str, Any] = {}
    for name in ("audio_encoder", "text_encoder"):
        encoder = getattr(config.model, name)
        local = encoder.startswith("hf:") and Path(encoder[3:]).is_absolute()
        encoders[name] = f"hf:{Path(encoder).name}" if local else encoder
    return replace(config, model=replace(config.model, **encoders), **changed)


def keep_run(run: Path, model: SupclapModel, out: Path) -> None:
    """Writes a run without what only training needs, with the weights of `model`."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", config_text(shareable(read_config(run))))
    for encoder in run.glob("*_encoder"):
        shutil.copytree(encoder, out / encoder.name, dirs_exist_ok=True)
    save_model(out / WEIGHTS, model, selection_note(run))


def write_folder(run: Path, model: SupclapModel, out: Path) -> None:
    """Writes the folder, of a run and its model."""
    keep_run(run, model, out / RUN)
    loaded = {"AutoConfig": "HubConfig", "AutoModel": "HubModel"}
    write_json(out / "config.json", {
        "model_type": "supclap", "architectures": ["HubModel"], "hidden_size": model.width,
        "auto_map": {auto: f"{Path(CODE).stem}.{name}" for auto, name in loaded.items()},
    })  # fmt: skip
    names = ", ".join(loaded.values())
    write_text(out / CODE, f"from supclap.exports.transformers import {names}  # noqa: F401\n")
    kind = "supclap.exports.sentence_transformers.SupclapModule"
    write_json(out / "modules.json", [{"idx": 0, "name": "0", "path": RUN, "type": kind}])
    settings = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    write_json(out / "config_sentence_transformers.json", settings)
    write_text(out / "README.md", CARD.format(width=model.width, seconds=model.seconds))


def export_folder(run: Path, out: Path) -> list[str]:
    """Writes the folder; returns what there is to say."""
    write_folder(run, load_model(run), out)
    return [f"transformers and sentence-transformers load {out}, with trust_remote_code=True"]
