"""Import torch and transformers in the least processor time, and keep their threads from taking more."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module

NETWORKS = ("torch", "transformers.modeling_utils", "transformers.masking_utils")
WAITING = "OMP_WAIT_POLICY"
"""What OpenMP's threads do between two pieces of work; read as torch is imported."""


def import_networks() -> None:
    """Import torch, and what all networks of transformers are built from, while Python's cycle collector waits.

    The import makes a million objects that all stay; to look through them again and again takes a fifth of its time. In a
    process that is the command line's own, which `gc.freeze` has told, the collector never looks at them.
    """
    if NETWORKS[-1] in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in NETWORKS:
            import_module(name)
        if gc.get_freeze_count():
            gc.freeze()
    finally:
        if collecting:
            gc.enable()


def let_threads_sleep() -> None:
    """Let OpenMP's threads sleep while there is no work for them, unless the environment says otherwise.

    They would wait in a loop and take the processor from others: with a small model, or beside other processes, up to half of
    all processor time.
    """
    os.environ.setdefault(WAITING, "PASSIVE")
