"""Settings of every test process: side by side, each computes on one thread."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes of two threads on two cores wait for each other most of the time.
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
