"""Small cases of every mode for compute-sanitizer: ragged sizes, several tiles, far rows."""

import torch

from supclap_kernels import fused_svr_loss
from supclap_kernels.testing import Case, evaluate, make_inputs


def main() -> None:
    for backend in ("panel", "triton"):
        for dtype in (torch.bfloat16, torch.float32):
            for options in ({}, {"bilateral": "shared"}, {"objective": "siglip"}):
                case = Case(N=161, D=100, dtype=dtype, gap=0.05, radius="row", options=options)
                inputs = make_inputs(case, "cuda")
                evaluate(fused_svr_loss, inputs, backend=backend, workspace=0, **options)
                torch.cuda.synchronize()
                print(backend, case, flush=True)


if __name__ == "__main__":
    main()
