"""Small cases of every mode for compute-sanitizer: ragged sizes, several tiles, literal rows."""

import torch

from supclap_kernels import fused_svr_loss
from supclap_kernels.backends import gpu_hopper, gpu_single
from supclap_kernels.testing import Case, evaluate, make_inputs


def main() -> None:
    for name in ("panel", "triton", "cuda", "cuda panel", "cuda hopper"):
        gpu_hopper.WANTED = gpu_hopper.ALONE = name == "cuda hopper"
        if " " in name:  # as if no batch fitted on the chip
            gpu_single.limit_of = lambda *_: 0
        for dtype in (torch.bfloat16, torch.float32):
            for options in ({}, {"bilateral": "shared"}, {"objective": "siglip"}):
                case = Case(N=161, D=100, dtype=dtype, gap=0.05, radius="row", options=options)
                inputs = make_inputs(case, "cuda")
                evaluate(fused_svr_loss, inputs, backend=name.split()[0], workspace=0, **options)
                torch.cuda.synchronize()
                print(name, case, flush=True)


if __name__ == "__main__":
    main()
