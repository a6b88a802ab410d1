"""The front door: configuration, run folders, stages and the command line."""

import os

# PyTorch's idle OpenMP threads otherwise spin for milliseconds on the very cores that the loader's and the sparse loops'
# threads work on (a sixth of a training step on two cores). Read when torch is loaded, so it stands here, before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
