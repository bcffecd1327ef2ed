"""Without a GPU Triton runs in its interpreter, which must be chosen before anything (peft does) imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
