"""Run one stage: check everything that can be checked without loading torch, then do the work, then report.

The order matters to users: bad input is refused in under a second, before any weight is read.
"""

from compresskit.pipeline.evaluation import evaluate
from compresskit.pipeline.inspection import inspect
from compresskit.pipeline.pruning import prune

__all__ = ["evaluate", "inspect", "prune"]
