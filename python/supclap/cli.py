"""The `supclap` command: synth, train, eval, demo."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import ModelConfig, TrainConfig, UserError

MODEL_HELP = {
    "width": "channels of the transformers",
    "heads": "attention heads",
    "audio_layers": "transformer layers for audio",
    "text_layers": "transformer layers for text",
    "embed_dim": "dimensions of the shared space",
    "patch_frames": "10 ms frames in one audio token",
    "max_bytes": "longer captions are cut",
    "max_seconds": "longer clips are cut",
}
TRAIN_HELP = {
    "data": "manifest (CSV: file_name, caption_1, ...); every clip is trained on",
    "out": "folder of the run: model.safetensors, config.json, log.jsonl",
    "val": "manifest for choosing the best epoch; without it the last checkpoint is kept",
    "epochs": "one epoch is every (clip, caption) pair once",
    "batch_size": "pairs in a step",
    "lr": "peak learning rate of AdamW",
    "weight_decay": "of AdamW, on matrices only",
    "warmup": "share of the steps for linear warm-up; cosine afterwards",
    "clip_grad": "largest gradient norm",
    "seed": "of the weights and of the order of the pairs",
    "loss": "support vectors: static radius, dynamic radius or none (infonce)",
    "objective": "the loss under them",
    "bilateral": "support vectors on both sides (mirror), text only, or shared",
    "alpha": "weight of the support vector term",
    "beta": "weight of the radius constraint (default: 0.01 with --loss dynamic, else 0)",
    "radius_init": "initial semantic radius",
    "tau": "temperature (its initial value with --learn-tau)",
    "learn_tau": "learn the temperature",
    "micro_batch_size": "encode a batch in pieces of this many pairs: same gradient, less memory",
    "device": "auto takes a GPU if there is one",
    "threads": "CPU threads of PyTorch",
    "skip_bad_audio": "leave broken or missing files out instead of stopping",
    "overwrite": "write over an earlier run in --out",
}
CHOICES = {
    "loss": ("static", "dynamic", "infonce"),
    "objective": ("infonce", "siglip"),
    "bilateral": ("mirror", "shared", "none"),
    "device": ("auto", "cpu", "cuda"),
}
TYPES = {"int": int, "int | None": int, "float": float, "float | None": float, "str": str}
TYPES |= {"Path": Path, "Path | None": Path}


def add_options(parser: argparse.ArgumentParser, config: type, helps: dict[str, str]) -> None:
    """One option for each setting named in `helps`; type and default come from the setting."""
    for field in fields(config):
        if field.name not in helps:
            continue
        option, text = f"--{field.name.replace('_', '-')}", helps[field.name]
        if field.type == "bool":
            parser.add_argument(option, action="store_true", help=text)
        elif field.name in ("data", "out"):
            parser.add_argument(option, type=Path, required=True, help=text)
        else:
            if field.default is not None:
                text += f" (default: {field.default})"
            kind, choices = TYPES[str(field.type)], CHOICES.get(field.name)
            parser.add_argument(
                option, type=kind, default=field.default, choices=choices, help=text
            )


def build_parser() -> argparse.ArgumentParser:
    """The four commands and their options."""
    parser = argparse.ArgumentParser(prog="supclap", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    synth = commands.add_parser("synth", help="write a corpus of synthetic scenes with captions")
    synth.add_argument("out", type=Path, metavar="OUT", help="gets {train,val,test}.csv and audio/")
    synth.add_argument("--clips", type=int, default=800, help="in all (default: 800)")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--overwrite", action="store_true", help="write over an earlier corpus")

    train = commands.add_parser("train", help="train on a manifest")
    add_options(train, TrainConfig, TRAIN_HELP)
    add_options(train.add_argument_group("model"), ModelConfig, MODEL_HELP)  # type: ignore[arg-type]

    evaluate = commands.add_parser("eval", help="retrieval metrics of a run on a manifest")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder that `train` wrote")
    evaluate.add_argument("--data", type=Path, required=True, help="manifest")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics here")
    shared = {name: TRAIN_HELP[name] for name in ("device", "threads", "skip_bad_audio")}
    add_options(evaluate, TrainConfig, shared)

    demo = commands.add_parser("demo", help="synth, train InfoNCE and bi-StaticSVR, eval, plot")
    demo.add_argument("--out", type=Path, default=Path("supclap-demo"))
    demo.add_argument("--clips", type=int, default=800)
    demo.add_argument("--epochs", type=int, default=4)
    demo.add_argument("--seed", type=int, default=0)
    add_options(demo, TrainConfig, {name: TRAIN_HELP[name] for name in ("device", "threads")})
    return parser


def run_eval(run: Path, data: Path, json_path: Path | None, **options: Any) -> None:
    """Print the metrics of a run and write them if asked."""
    from .evaluate import RULE, evaluate_run
    from .report import COLUMNS, table

    if json_path is not None and not json_path.parent.is_dir():
        raise UserError(f"--json {json_path}: there is no folder {json_path.parent}")
    metrics, corpus = evaluate_run(run, data, **options)
    if corpus.skipped:
        print(f"skipped {len(corpus.skipped)} bad audio files:")
        print("\n".join(f"  {reason}" for reason in corpus.skipped))
    print(f"{data}: {len(corpus.clips)} clips, {len(corpus.captions)} captions, in %")
    print(table({str(run): metrics}, COLUMNS))
    for way, name in (("t2a", "text to audio"), ("a2t", "audio to text")):
        print(f"median rank, {name}: {metrics[way]['median_rank']:.0f}")
    print(f"rule: {RULE}")
    if json_path is not None:
        json_path.write_text(json.dumps({"rule": RULE} | metrics, indent=2) + "\n")


def run_command(args: argparse.Namespace) -> None:
    """Carry out one parsed command; heavy imports happen here, so that --help is quick."""
    options = vars(args).copy()
    command = options.pop("command")
    if command == "synth":
        from .synth import synthesise

        synthesise(**options)
        print(f"{args.clips} clips with captions are in {args.out}")
        return
    if command == "train":
        from .train import train

        model = ModelConfig(**{name: options.pop(name) for name in MODEL_HELP})
        train(TrainConfig(model=model, **options))
    elif command == "demo":
        from .report import demo

        demo(**options)
    else:
        from .train import choose_device, set_threads

        set_threads(options.pop("threads"))
        options["device"] = choose_device(options["device"])
        run_eval(json_path=options.pop("json"), **options)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can put right ends without a traceback."""
    args = build_parser().parse_args(arguments)
    # Threads that wait must not spin: with other work on the cores a step takes several times
    # as long. OpenMP reads this once, so it is set before PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        run_command(args)
    except UserError as error:
        print(f"supclap: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("supclap: interrupted; files already written are complete", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == __package__:
            raise
        print(
            f"supclap: {error.name} is not installed; pip install 'supclap-kernels[train]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"supclap: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print(
            "supclap: out of memory; try --micro-batch-size, or a smaller --max-seconds",
            file=sys.stderr,
        )
        return 2
    return 0
