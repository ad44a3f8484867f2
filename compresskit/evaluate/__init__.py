"""Evaluation: language modelling scores, Matrix Nuclear-Norm, speed, and the gates that judge a report."""

import sys

from compresskit.calling import CallableRoom

sys.modules[__name__].__class__ = CallableRoom
