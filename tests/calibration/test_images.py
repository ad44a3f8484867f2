"""calibration/images.py, calibration/image_rows.py, models/processor.py: windows with images. Of all three kinds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import families
import image_models
import pyarrow
import pytest
import torch
from conftest import Run
from pyarrow import parquet
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from compresskit.calibration import Calibration, calibrate, image_rows
from compresskit.calibration.sources import TextRequest
from compresskit.calibration.windows import digest
from compresskit.errors import RequestError
from compresskit.machine.device import Where
from compresskit.models.load import open_model

WHERE = Where(torch.device("cpu"), torch.float32)
IMAGE_TOKEN = {"gemma3": 122, "llava": 120}
TOKENS_AN_IMAGE = 4


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("image-models")
    return {name: make(root / name) for name, make in image_models.MODELS.items()}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_models.json_file(tmp_path_factory.mktemp("image-rows"))


def run(file: Path | str, folder: Path, samples: int = 8, seed: int = 0, text_only: int = 2, length: int = 64) -> Calibration:
    return calibrate(TextRequest(str(file), samples, length, seed, text_only), open_model(folder), WHERE)


def refused(file: Path, folder: Path, **how: int) -> str:
    with pytest.raises(RequestError) as caught:
        run(file, folder, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images_in(found: Calibration) -> list[bool]:
    return [window.numpy().tobytes() in found.images for window in found.tokens]


@pytest.mark.parametrize("family", image_models.MODELS)
def test_a_window_is_what_the_processor_makes_of_a_row_and_then_text(family: str, models: dict[str, Path], rows: Path) -> None:
    found = run(rows, models[family])
    processor = AutoProcessor.from_pretrained(models[family])
    made = {}
    for row in image_models.rows():
        if row["images"]:
            pictures = [image_rows.opened("row", name, rows.parent) for name in row["images"]]
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": row["text"]}]
            text = "<image>" * len(pictures) + row["text"]
            if family == "gemma3":
                text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            inputs = processor(images=[pictures], text=[text], return_tensors="pt", add_special_tokens=False)
            made[tuple(inputs["input_ids"][0].tolist())] = inputs
    begins = [tuple(window.tolist()) for window in found.tokens]
    drawn = [any(begin[: len(key)] == key for begin in begins) for key in made]
    rest = [row["text"] for row, is_drawn in zip(image_models.rows(), drawn + [False] * 40, strict=True) if not is_drawn]
    assert sum(drawn) == 6
    text = processor.tokenizer("\n\n".join(rest), add_special_tokens=False)["input_ids"]
    for window in found.tokens[:-2]:
        start = max((key for key in made if tuple(window[: len(key)].tolist()) == key), key=len)
        beside = found.images[window.numpy().tobytes()]
        assert torch.equal(beside["pixel_values"], made[start]["pixel_values"])
        placed = window == IMAGE_TOKEN[family]
        assert int(placed.sum()) == TOKENS_AN_IMAGE * len(beside["pixel_values"])
        if family == "gemma3":
            assert torch.equal(beside["token_type_ids"][0], placed.long())
        filling = window[len(start) :].tolist()
        # Two pieces of the text may meet in it, but no more: it is shorter than a window.
        assert any(holds(text, filling[:cut]) and holds(text, filling[cut:]) for cut in range(len(filling) + 1))


def holds(text: list[int], part: list[int]) -> bool:
    return any(text[start : start + len(part)] == part for start in range(len(text) - len(part) + 1))


def test_the_last_windows_are_text_alone(models: dict[str, Path], rows: Path) -> None:
    assert images_in(run(rows, models["gemma3"])) == [True] * 6 + [False] * 2
    found = run(f"{rows}+{rows}", models["gemma3"], samples=10, text_only=6)
    assert images_in(found) == [True] * 4 + [False] * 6


def test_a_file_with_few_images_gives_text_for_the_rest(models: dict[str, Path], tmp_path: Path) -> None:
    few = image_models.json_file(tmp_path, image_models.rows(images=3))
    found = run(few, models["gemma3"])
    assert sum(images_in(found)) == 3
    assert images_in(found)[-2:] == [False, False]
    assert "8 windows of rows.jsonl: 3 with images and 5 of text" in found.description


def test_no_window_with_images_needs_no_processor(tiny: dict[str, Path], rows: Path) -> None:
    found = run(rows, tiny["llama"], samples=2, text_only=2)
    assert found.images == {}
    assert found.digest == digest(found.tokens)


def test_the_seed_decides_and_pixels_count(models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    first, again, other = (run(rows, models["gemma3"], seed=seed) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    changed = image_models.json_file(tmp_path)
    for file in (tmp_path / "pictures").iterdir():
        file.write_bytes(image_models.picture(12345))
    found = run(changed, models["gemma3"])
    assert torch.equal(found.tokens, first.tokens)
    assert found.digest != first.digest


def test_a_parquet_file_with_bytes_gives_the_same_windows(models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    found = run(image_models.parquet_file(tmp_path / "rows.parquet"), models["gemma3"])
    assert found.digest == run(rows, models["gemma3"]).digest


@pytest.mark.parametrize("kind", ["paths", "bytes", "none", "text"])
def test_other_forms_of_parquet_columns(kind: str, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    found = image_models.rows()
    stored = pyarrow.list_(pyarrow.string() if kind == "paths" else pyarrow.struct([("bytes", pyarrow.binary())]))
    images: list[Any] = [row["images"] or None for row in found]
    if kind == "bytes":
        images = [row and [{"bytes": (rows.parent / name).read_bytes()} for name in row] for row in images]
    if kind == "none":
        images = [None for _ in images]
    column = pyarrow.array(["no list"] * len(found)) if kind == "text" else pyarrow.array(images, stored)
    file = image_models.json_file(tmp_path).with_suffix(".parquet")
    parquet.write_table(pyarrow.table({"text": [row["text"] for row in found], "images": column}), file)
    if kind == "none":
        assert "no row has an image; give rows with images" in refused(file, models["gemma3"])
    elif kind == "text":
        assert "column 'images' holds string, expected a list of images" in refused(file, models["gemma3"])
    else:
        assert run(file, models["gemma3"]).digest == run(rows, models["gemma3"]).digest


def test_longer_samples_are_left_out_and_counted(models: dict[str, Path], tmp_path: Path) -> None:
    long = [{"text": image_models.sentence(i, 40), "images": [f"pictures/{i}.png"]} for i in range(20)]
    file = image_models.json_file(tmp_path, [*image_models.rows(), *long])
    found = run(file, models["gemma3"], samples=20)
    assert sum(images_in(found)) == 12
    assert ": 12 with images and 8 of text, 20 longer samples left out" in found.description
    only = image_models.json_file(tmp_path / "only", long + image_models.rows(images=0))
    message = refused(only, models["gemma3"])
    needed = int(message.split("to ")[-1].split(",")[0])
    assert f"no sample of the file is shorter; raise --sequence-length from 64 to {needed}" in message
    assert ", line " in message
    assert sum(images_in(run(only, models["gemma3"], samples=3, length=needed))) == 1


def test_too_little_text_to_fill_the_windows_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    file = image_models.json_file(tmp_path, image_models.rows(texts=1))
    assert "are needed to fill 8 windows of 64; add rows of text" in refused(file, models["gemma3"])


def write(file: Path, name: str, data: bytes = b"no image at all") -> None:
    (file.parent / name).write_bytes(data)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (["pictures/none.png"], "line 1: image .*none.png: cannot be read"),
        (["../secret.png"], "line 1: names the image '../secret.png', which is no file inside .*; move it there"),
        (["/etc/passwd"], "line 1: names the image '/etc/passwd', which is no file inside"),
        (["text.png"], "line 1: image 'text.png' is none .*; give one of PNG, JPEG"),
        (["page.eps"], "line 1: image 'page.eps' is none"),
        ([7], "line 1: image 7, expected a path"),
        ([{"bytes": "abc"}], "line 1: image 'abc', expected bytes"),
        ([None], "line 1: image None, expected a path"),
        ("a.png", "line 1: 'images' 'a.png', expected a list"),
        (["a.png"] * 65, "line 1: 65 images, expected a list of at most 64"),
    ],
)
def test_what_is_no_image_of_the_folder_is_refused(images: Any, reason: str, models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "folder" / "rows.jsonl"
    image_models.json_file(file.parent, image_models.rows(images=0))
    file.write_text(json.dumps({"text": "a red thing", "images": images}) + "\n" + file.read_text())
    write(file, "../secret.png", image_models.picture(1))
    write(file, "text.png")
    write(file, "page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(RequestError, match=reason) as caught:
        run(file, models["gemma3"])
    assert "\n" not in str(caught.value)


def test_an_image_of_too_many_pixels_or_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_rows, "MOST_PIXELS", 100)
    with pytest.raises(RequestError, match=r"an image has \d+ x \d+ pixels, at most 100 are read"):
        image_rows.opened("row 1", {"bytes": image_models.picture(0)}, Path())
    monkeypatch.setattr(image_rows, "LARGEST_IMAGE_BYTES", 10)
    with pytest.raises(RequestError, match=r"an image of \d+ bytes, at most 10 are read"):
        image_rows.opened("row 1", {"bytes": image_models.picture(0), "path": None}, Path())


def test_a_model_of_text_alone_is_refused_before_any_work(tiny: dict[str, Path], rows: Path, tmp_path: Path, run: Run) -> None:
    code, _, error = run("prune", "cfsp", tiny["llama"], tmp_path / "out", "--sparsity", 0.3, "--calibration", rows)
    assert code == 2
    assert "llama takes no images; give a vision-language model" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_usable_processor_is_refused(models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    bare = families.build("gemma3", tmp_path / "bare")
    assert "has no preprocessor_config.json, so images cannot be read for it; copy it from" in refused(rows, bare)
    (bare / "processor_config.json").write_text("{")
    assert "not valid JSON" in refused(rows, bare)
    (bare / "processor_config.json").write_text('{"processor_class": "Gemma3Processor"}')
    assert "no usable processor" in refused(rows, bare)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_another_package_says_which(rows: Path, tmp_path: Path) -> None:
    folder = families.build("qwen3_vl", tmp_path / "model")
    image_models.tokenizer({"<|image_pad|>": 120, "<|video_pad|>": 121}).save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    settings |= {"video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    expected = f"{folder}: no usable processor (it needs the package torchvision; pip install torchvision)"
    assert refused(rows, folder) == expected


def test_a_row_that_the_processor_does_not_take_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    row = {"text": "a <boi> too many", "images": ["pictures/0.png"]}
    file = image_models.json_file(tmp_path, [row, *image_models.rows(images=0)])
    assert "line 1: the model's processor does not take it" in refused(file, models["gemma3"])


def test_placeholders_in_text_stand_for_no_image(models: dict[str, Path], tmp_path: Path) -> None:
    texts = [{**row, "text": f"<image> {row['text']}"} for row in image_models.rows(images=0)]
    found = run(image_models.json_file(tmp_path, [*image_models.rows(texts=0), *texts]), models["llava"])
    for window in found.tokens:
        beside = found.images.get(window.numpy().tobytes())
        count = TOKENS_AN_IMAGE * len(beside["pixel_values"]) if beside else 0
        assert int((window == IMAGE_TOKEN["llava"]).sum()) == count


SMALL = ("--samples", 6, "--sequence-length", 64, "--json")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "command",
    [("prune", "cfsp", "--sparsity", 0.3, "--allocation", "uniform"), ("quantize", "gptq", "--bits", 4, "--group-size", 32)],
)
def test_a_stage_runs_with_images(
    command: tuple[Any, ...], kind: str, models: dict[str, Path], rows: Path, tmp_path: Path, run: Run
) -> None:
    file = rows if kind == "jsonl" else image_models.parquet_file(tmp_path / "rows.parquet")
    stage, method, *flags = command
    out = tmp_path / "out"
    code, _, error = run(stage, method, models["gemma3"], out, *flags, "--calibration", file, *SMALL)
    assert code == 0, error
    manifest = json.loads((out / "compresskit.json").read_text())
    assert "6 with images" in json.dumps(manifest)
    if stage == "prune":
        inputs = stock_inputs(models["gemma3"], rows)
        network = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            assert bool(network(**inputs).logits.isfinite().all())


@pytest.mark.slow
def test_a_repair_and_a_training_method_run_with_images(models: dict[str, Path], rows: Path, tmp_path: Path, run: Run) -> None:
    low, small = tmp_path / "low", ("--samples", 2, "--sequence-length", 64, "--calibration", rows, "--json")
    assert run("quantize", "rtn", models["gemma3"], low, "--bits", 3, "--group-size", 32, *small)[0] == 0
    for method in ("eora", "act"):
        out = tmp_path / method
        original = ("--original", models["gemma3"], "--rank", 4, "--aim", "block")
        code, output, error = run("compensate", method, low, out, *original, *small)
        assert code == 0, error
        assert json.loads(output)["kl_after"] < json.loads(output)["kl_before"]
        assert "2 with images" in (out / "compresskit.json").read_text()
    trained = ("--bits", 3, "--group-size", 32, "--epochs", 1)
    code, _, error = run("quantize", "apiq", models["gemma3"], tmp_path / "apiq", *trained, *small)
    assert code == 0, error


def stock_inputs(folder: Path, rows: Path) -> dict[str, torch.Tensor]:
    """A window with an image, for a stock model."""
    found = calibrate(TextRequest(str(rows), 8, 64, 0, 2), open_model(folder), WHERE)
    return {"input_ids": found.tokens[:1], **found.images[found.tokens[0].numpy().tobytes()]}
