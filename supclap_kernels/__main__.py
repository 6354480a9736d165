"""`python -m supclap_kernels`: versions, the backends, and why each is on or off."""

import platform

import torch

from . import __version__, available_backends, explain, native


def main() -> None:
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


if __name__ == "__main__":
    main()
