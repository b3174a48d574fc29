"""Settings of every test process: one thread each side by side, and Triton's interpreter."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    # Read when Triton is first imported, by whichever test that is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes of two threads on two cores wait for each other most of the time.
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
