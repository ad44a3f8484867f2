"""Recovery: choose the instruction data that repairs a compressed model, and fine-tune on it."""

import sys

from compresskit.calling import CallableRoom

sys.modules[__name__].__class__ = CallableRoom
