"""What every test runs under: no hub, no tokenizer threads, two torch threads at most."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's small products in the oracles
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
