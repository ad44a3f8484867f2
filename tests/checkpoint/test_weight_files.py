"""checkpoint/weight_files.py: of twenty-odd layouts of a folder the tensors are read that transformers loads, or none. Oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_config
from conftest import Run
from safetensors.torch import load_file, save_file
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.errors import CheckpointError

Change = Callable[[Path], object]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Tensors = dict[str, torch.Tensor]


def other(folder: Path, add: float = 1.0) -> Tensors:
    """The weights of the folder, each by 1 larger."""
    return {name: tensor + add for name, tensor in load_file(folder / WHOLE).items()}


def save(tensors: Tensors, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def sharded(folder: Path, tensors: Tensors, files: tuple[str, ...] = (FIRST, SECOND), index: str = INDEX) -> None:
    """Write tensors in turn into files, and an index of them."""
    names = sorted(tensors)
    places = {name: files[number % len(files)] for number, name in enumerate(names)}
    for file in files:
        save({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def without_whole(change: Callable[[Path, Tensors], object]) -> Change:
    """A change of a folder whose one file is gone, given its weights."""

    def changed(folder: Path) -> None:
        tensors = load_file(folder / WHOLE)
        (folder / WHOLE).unlink()
        change(folder, tensors)

    return changed


def beside(*names: str) -> Change:
    """Other weights in further files."""
    return lambda folder: [save(other(folder), folder / name) for name in names]


def edited_index(change: Callable[[dict[str, str]], object]) -> Change:
    def changed(folder: Path, tensors: Tensors) -> None:
        sharded(folder, tensors)
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return without_whole(changed)


def named(name: str) -> Change:
    """Other weights in a file that config.json names."""

    def changed(folder: Path) -> None:
        if name.endswith(".json"):
            sharded(folder, other(folder), ("a.safetensors", "b.safetensors"), name)
        else:
            save(other(folder), folder / name)
        edit_config(folder, transformers_weights=name)

    return changed


def pickled(folder: Path) -> None:
    torch.save(other(folder), folder / "pytorch_model.bin")


def with_adapter(folder: Path) -> None:
    adapter = make_adapter(folder.parent / "adapter", folder)
    for file in adapter.iterdir():
        shutil.copy(file, folder)


def linked(folder: Path) -> None:
    (folder / WHOLE).rename(folder.parent / "blob")
    (folder / WHOLE).symlink_to(folder.parent / "blob")


def half_of_a_set(folder: Path, tensors: Tensors) -> None:
    sharded(folder, tensors)
    for name in (INDEX, SECOND):
        (folder / name).unlink()


READ: dict[str, Change] = {
    "one file": lambda folder: None,
    "one file behind a link": linked,
    "shards and an index": without_whole(sharded),
    "one shard and an index": without_whole(lambda f, t: sharded(f, t, ("model-00001-of-00001.safetensors",))),
    "an index of other names": without_whole(lambda f, t: sharded(f, t, ("b.safetensors", "a.safetensors"))),
    "one file beside an index and old shards": lambda f: sharded(f, other(f)),
    "one file beside old shards": beside(FIRST, SECOND),
    "one file beside an old one": beside("model_old.safetensors", "model.bak.safetensors"),
    "one file beside a variant": beside("model.fp16.safetensors"),
    "one file beside a consolidated one": beside("consolidated.safetensors"),
    "one file beside pickles": pickled,
    "shards beside another set": without_whole(
        lambda f, t: (sharded(f, t), save({"x": torch.zeros(1)}, f / "model-00001-of-00003.safetensors"))
    ),
    "shards beside an old file": without_whole(lambda f, t: (sharded(f, t), save(t, f / "model_old.safetensors"))),
    "an index that leaves a tensor out": edited_index(lambda places: places.pop("model.norm.weight")),
    "a folder of the file's name and an index": without_whole(lambda f, t: (sharded(f, t), (f / WHOLE).mkdir())),
    "a link to nothing and an index": without_whole(lambda f, t: (sharded(f, t), (f / WHOLE).symlink_to(f / "gone"))),
    "a file that config.json names": named("other.safetensors"),
    "a file in a folder that config.json names": named("weights/other.safetensors"),
    "an index that config.json names": named("other.safetensors.index.json"),
    "an adapter in a folder of its own": lambda f: make_adapter(f / "adapter", f),
}
"""Layouts that are read."""

REFUSED: dict[str, tuple[Change, str]] = {
    "a variant alone": (lambda f: (f / WHOLE).rename(f / "model.fp16.safetensors"), "only model.fp16.safetensors"),
    "a consolidated file alone": (lambda f: (f / WHOLE).rename(f / "consolidated.safetensors"), "no model*.safetensors"),
    "pickles alone": (lambda f: (pickled(f), (f / WHOLE).unlink()), "only pickle weights"),
    "an adapter beside the weights": (with_adapter, "holds an adapter (adapter_config.json) beside the weights"),
    "a distributed checkpoint": (beside("shard-00001-model-00001-of-00001.safetensors"), "holds a distributed checkpoint"),
    "a file that is not there": (lambda f: edit_config(f, transformers_weights="gone.safetensors"), "which is not there"),
    "a file outside": (lambda f: edit_config(f, transformers_weights="../model.safetensors"), "no file inside"),
    "half of a set": (without_whole(half_of_a_set), "holds 1 of 2 shards"),
    "an index of a file that is not there": (edited_index(lambda p: p.update(x="gone.safetensors")), "the shard is missing"),
    "an index that names a tensor in a file without it": (
        edited_index(
            lambda places: places.update({"model.norm.weight": FIRST if places["model.norm.weight"] == SECOND else SECOND})
        ),
        "which does not hold it",
    ),
}
"""Layouts that are not, though transformers may read some of them; and what is said."""


@pytest.mark.parametrize("layout", READ)
def test_the_tensors_are_those_that_transformers_loads(layout: str, model: Path) -> None:
    READ[layout](model)
    found = open_checkpoint(model)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    assert found.tensors.keys() == stock.keys()
    for name, tensor in stock.items():
        assert torch.equal(found.read(name), tensor), name


@pytest.mark.parametrize("layout", REFUSED)
def test_other_layouts_are_refused_in_one_line(layout: str, model: Path) -> None:
    change, said = REFUSED[layout]
    change(model)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert said in str(caught.value) and str(model) in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_beside_the_weights_is_added_by_transformers(model: Path) -> None:
    """Why it is refused: the weights alone are another model."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with_adapter(model)
    both = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert float((both(tokens).logits - plain(tokens).logits).abs().max()) > 1e-3


def test_inspect_names_the_files_that_are_not_read(model: Path, run: Run) -> None:
    sharded(model, other(model))
    save(other(model), model / "model_old.safetensors")
    found = json.loads(run("inspect", model, "--json")[1])
    assert list(found["files"]) == [WHOLE]
    assert found["ignored_files"] == [FIRST, SECOND, INDEX, "model_old.safetensors"]
    assert "ignored_files" in run("inspect", model)[1]
    for name in found["ignored_files"]:
        (model / name).unlink()
    assert json.loads(run("inspect", model, "--json")[1])["ignored_files"] == []
