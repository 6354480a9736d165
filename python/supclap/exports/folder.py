"""A folder that transformers and sentence-transformers load.

`run/` holds the model as supclap keeps it. The files around it name the classes that load it:
transformers.py and sentence_transformers.py.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import TrainConfig, config_text, read_config
from ..errors import UserError
from ..files import write_json, write_text
from ..model import WEIGHTS, SupclapModel, load_model, save_model, selection_note

RUN = "run"
CODE = "modeling_supclap.py"
OF_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # the name of a model, which no folder here has
BLANK = "."  # read where a sentence is empty
MARK = "It was selected on a test set: numbers on that set say nothing."
CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, transformers, audio, feature-extraction, supclap]
---

# Audio and text in one space

Unit vectors of {width} dimensions, of sounds ({seconds:g} seconds are heard) and of sentences.
{mark}
`pip install '{extra}' sentence-transformers`, then one of:

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
MODELLING = """try:
    from supclap.exports.transformers import HubConfig, HubModel
except ImportError as error:
    raise ImportError("this model needs: pip install '{extra}'") from error
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
        local = encoder.startswith("hf:") and OF_HUB.fullmatch(encoder[3:]) is None
        encoders[name] = f"hf:{Path(encoder).name}" if local else encoder
    return replace(config, model=replace(config.model, **encoders), **changed)


def keep_run(run: Path, model: SupclapModel, out: Path) -> None:
    """Writes a run without what only training needs, with the weights of `model`."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", config_text(shareable(read_config(run))))
    note = selection_note(run)
    if out.resolve() != run.resolve():
        for old in out.glob("*_encoder"):
            shutil.rmtree(old)
        for encoder in run.glob("*_encoder"):
            shutil.copytree(encoder, out / encoder.name)
    save_model(out / WEIGHTS, model, note)


def extra_of(config: TrainConfig) -> str:
    """What has to be installed for a model."""
    return f"supclap-kernels[{'peft' if config.model.lora else 'hub'}]"


def write_folder(run: Path, model: SupclapModel, out: Path) -> None:
    """Writes the folder, of a run and its model."""
    extra, selected = extra_of(read_config(run)), bool(selection_note(run))
    keep_run(run, model, out / RUN)
    loaded = {"AutoConfig": "HubConfig", "AutoModel": "HubModel"}
    write_json(out / "config.json", {
        "model_type": "supclap", "architectures": ["HubModel"], "hidden_size": model.width,
        "auto_map": {auto: f"{Path(CODE).stem}.{name}" for auto, name in loaded.items()},
        **({"selected_on": "test"} if selected else {}),
    })  # fmt: skip
    write_text(out / CODE, MODELLING.format(extra=extra))
    kind = "supclap.exports.sentence_transformers.SupclapModule"
    write_json(out / "modules.json", [{"idx": 0, "name": "0", "path": RUN, "type": kind}])
    settings = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    write_json(out / "config_sentence_transformers.json", settings)
    card = {"width": model.width, "seconds": model.seconds, "extra": extra}
    write_text(out / "README.md", CARD.format(mark=MARK if selected else "", **card))


def run_inside(folder: Path) -> Path:
    """Returns the run of a folder, which sentence-transformers may have put elsewhere."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    return folder / str(modules[0]["path"])


def check_out(out: Path) -> None:
    """Raises an error for a folder that holds something: a run, or another's files."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already; name a new folder")


def export_folder(run: Path, out: Path) -> list[str]:
    """Writes the folder; returns what there is to say."""
    config, model = read_config(run), load_model(run)
    check_out(out)
    write_folder(run, model, out)
    lines = [f"transformers and sentence-transformers load {out}, with trust_remote_code=True"]
    for name in (config.model.audio_encoder, config.model.text_encoder):
        if name.startswith("py:"):
            lines.append(f"where the module of {name} is, which is not in the folder")
    return lines
