"""The recipes that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path

from compresskit.errors import RequestError, near_miss
from compresskit.recipe.located import read

FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
"""Inside an installed package, or beside it in the source tree."""


def folder() -> Path:
    """Folder of the shipped recipes."""
    return next((each for each in FOLDERS if (each / "demo.yaml").is_file()), FOLDERS[0])


def names() -> list[str]:
    """Names of the shipped recipes, in alphabetical order."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(recipe: str) -> Path:
    """Find the file of RECIPE, a path or the name of a shipped recipe; raises RequestError if there is none."""
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    if recipe not in names():
        raise RequestError(f"{recipe}: no such file or recipe;{near_miss(recipe, names())} Shipped are {', '.join(names())}")
    return folder() / f"{recipe}.yaml"


def listing() -> dict[str, str]:
    """First line of each recipe's description, by name."""
    found = {}
    for name in names():
        content = read(folder() / f"{name}.yaml").mapping("recipe")
        found[name] = content["description"].text("description").strip().splitlines()[0] if "description" in content else ""
    return found
