"""What every test runs under: no hub, no tokenizer threads, one torch thread for each of the two workers."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's small products in the oracles
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)
