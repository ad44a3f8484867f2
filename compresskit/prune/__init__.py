"""Structured pruning of feed-forward channels: one file a method, plus what all of them share."""

import sys

from compresskit.calling import CallableRoom

sys.modules[__name__].__class__ = CallableRoom
