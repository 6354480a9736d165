"""`python -m supclap_kernels`: versions, the backends, and why each is on or off.

python -m supclap_kernels tune            measure this machine (tuning.py), in under two minutes
python -m supclap_kernels tune --show     what was measured
python -m supclap_kernels tune --reset    forget it
"""

import argparse
import platform

import torch

from . import __version__, available_backends, explain, native, tables


def show_machine() -> None:
    python = platform.python_version()
    print(f"supclap_kernels {__version__}, torch {torch.__version__}, Python {python}")
    for name, state in available_backends().items():
        print(f"  {name:10s} {state}")
    module, _ = native.load()
    if module is not None:
        print(f"CPU kernels: {module.isa()} of {', '.join(module.isa_compiled)}")
        runtime = module.parallel_runtime().rsplit("/", 1)[-1]
        print(f"threads: {torch.get_num_threads()} from {runtime}")
    print(f"CPU tensors run on {explain('cpu')}")
    if torch.cuda.is_available():
        print(f"CUDA tensors run on {explain('cuda')}")


def run_tune(arguments: argparse.Namespace) -> None:
    from .tuning import tune, tuned_device

    device = tuned_device(arguments.device)
    path = tables.path_of(device)
    if arguments.reset:
        print(f"removed {path}" if tables.reset(device) else f"there is no {path}")
        return
    if not arguments.show:
        path = tune(device, budget=arguments.budget, report=lambda line: print(line, flush=True))
        print(f"written to {path}")
        return
    table = tables.load(device)
    if table is None:
        print(f"nothing was measured on {tables.device_name(device)}: no valid {path}")
        return
    print(path)
    for name, measured in table.kinds.items():
        for N, times in zip(measured.sizes, measured.times, strict=True):
            print(f"{name}, N = {N}: {tables.listed(times)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m supclap_kernels", description="What runs on this machine, and why."
    )
    commands = parser.add_subparsers(dest="command")
    tune = commands.add_parser("tune", help="measure this machine, for backend='auto'")
    tune.add_argument("--device", help="cpu, cuda, cuda:1; default: the GPU if there is one")
    tune.add_argument("--budget", type=float, default=100.0, help="seconds (default 100)")
    what = tune.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="print what was measured")
    what.add_argument("--reset", action="store_true", help="forget what was measured")
    arguments = parser.parse_args()
    if arguments.command != "tune":
        show_machine()
        return
    try:
        run_tune(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog} tune: {error}\n")


if __name__ == "__main__":
    main()
