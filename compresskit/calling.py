"""The rooms of the stages can be called: `compresskit.prune(...)` runs the stage whose methods lie in `compresskit/prune`.

A subpackage and a function of one name cannot both be `compresskit.prune`, whichever is imported last would win; so the
subpackage is the function. Loads no torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class CallableRoom(ModuleType):
    """A subpackage that runs its stage when it is called; see `compresskit.api` for the arguments."""

    def __call__(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
        """Run the stage of this name."""
        stage = self.__name__.rpartition(".")[2]
        result: dict[str, Any] = getattr(importlib.import_module("compresskit.api"), stage)(*arguments, **settings)
        return result
