"""Quantisation: a method a file, and the walk that they share."""

import sys

from compresskit.calling import CallableRoom

sys.modules[__name__].__class__ = CallableRoom
