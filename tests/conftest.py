"""Set before anything else is imported, for the whole run."""

from __future__ import annotations

import os

# Triton decides at its import whether kernels are compiled or interpreted; there is no CUDA device here.
# tests/gpu is run by itself, with TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Threads of torch that spin at barriers make everything crawl where another process works too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("enginehouse", deadline=None)
settings.load_profile("enginehouse")
