"""`compresskit recover` end to end: what it writes, what loads it, a kill and its resumption, what it refuses."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT
from stock_tools import tokens, walked_logits
from tiny_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.checkpoint.reader import sha256
from compresskit.compensation.eora import EoRA
from compresskit.compensation.request import CompensateOptions
from compresskit.compensation.run import compensate
from compresskit.errors import CompresskitError, RequestError
from compresskit.models.load import open_model, with_adapter
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.method import SelectionMethod
from compresskit.recovery.request import RecoverOptions
from compresskit.recovery.run import recover
from compresskit.recovery.selection.paser import Paser
from compresskit.recovery.selection.random import Full, Random
from compresskit.stages import Options
from compresskit.walk.walk import Walk

pytest.importorskip("scipy")
SMALL: dict[str, Any] = {"sequence_length": 256, "batch_size": 4, "held_back": 0.1, "rank": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty samples of two sources."""
    path = tmp_path_factory.mktemp("data") / "instructions.jsonl"
    generator, words = random.Random(0), TEXT.split()
    rows = [
        {"instruction": " ".join(generator.choices(words, k=4)), "input": "", "output": " ".join(generator.choices(words, k=5))}
        for _ in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def damaged(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with noise on its weights."""
    from checkpoint_damage import edit_tensors

    folder = make_model(tmp_path_factory.mktemp("damaged") / "llama", "llama")
    generator = torch.Generator().manual_seed(3)

    def noisy(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "mlp" in name:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))

    edit_tensors(folder, noisy)
    return folder


def options(original: Path, file: Path, **changes: Any) -> RecoverOptions:
    return RecoverOptions(**{"original": str(original), "data": (str(file),), **SMALL, **changes})


def test_the_merged_checkpoint_loads_in_stock_tools_and_has_lost_less(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = options(tiny["llama"], data, loss="distill", data_weight=0.0, epochs=4, self_samples=2, learning_rate=5e-3)
    result = recover(Paser(budget=0.5), str(damaged), out, asked)
    assert result["selected"] == 18
    assert set(result["time_shares"]) == {"selection", "held_back", "sampling", "teacher", "training"}
    assert 0 < sum(result["time_shares"].values()) < result["seconds"] + 0.1
    report = json.loads((out / "recover.json").read_text())
    assert report["held_back_after"]["by_cluster"].keys() == report["held_back_before"]["by_cluster"].keys() != set()
    assert report["losses"][-1] < 0.7 * report["losses"][0]
    assert (report["data_weight"], report["learning_rate"]) == (0.0, 5e-3)
    assert len(report["losses"]) == report["steps"] == 20
    assert len((out / "selection.jsonl").read_text().splitlines()) == 18
    assert result["parameters_after"] == result["parameters_before"]
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(stock(tokens()).logits, walked_logits(out), atol=1e-4)
    assert not out.with_name("out.training").exists()


def test_a_capability_lost_on_purpose_gets_the_largest_share(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Arithmetic and words; the damaged model can no longer read digits."""
    from checkpoint_damage import edit_tensors

    generator, words = random.Random(1), TEXT.split()
    number = lambda: str(generator.randrange(10**7, 10**8))  # noqa: E731
    rows = [{"prompt": f"{number()} {number()}", "response": f"{number()} {number()}", "source": "digits"} for _ in range(20)]
    for _ in range(40):
        prompt, response = (" ".join(generator.choices(words, k=5)) for _ in range(2))
        rows.append({"prompt": prompt, "response": response, "source": "words"})
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny["llama"])
    digits = tokenizer("0123456789", add_special_tokens=False).input_ids
    damaged = make_model(tmp_path / "damaged", "llama")

    def without_digits(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][digits] = 0

    edit_tensors(damaged, without_digits)
    asked = options(tiny["llama"], file, select_only=True, sequence_length=256)
    clusters = recover(Paser(budget=0.2, clusters=2), str(damaged), tmp_path / "out", asked)["clusters"]
    largest = max(clusters, key=lambda cluster: cluster["budget"])
    assert largest["sources"].get("digits", 0) > largest["sources"].get("words", 0)
    assert largest["budget"] > sum(cluster["budget"] for cluster in clusters) / 2


@pytest.mark.parametrize("method", [Random(budget=0.5), Full()])
def test_the_responses_of_the_data_are_learned(
    method: SelectionMethod, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    result = recover(method, str(damaged), tmp_path / "out", options(tiny["llama"], data, steps=20, learning_rate=2e-2))
    assert result["held_back_after"]["loss"] < result["held_back_before"]["loss"]


def test_a_distillation_learns_the_data_as_far_as_it_is_mixed_in(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    losses = []
    for weight in (0.0, 0.5, 1.0):
        asked = options(tiny["llama"], data, steps=20, learning_rate=2e-2, loss="distill", data_weight=weight)
        result = recover(Full(), str(damaged), tmp_path / str(weight), asked)
        losses.append(result["held_back_after"]["loss"])
    # The original has random weights: its predictions say little of the responses.
    assert max(losses[1:]) < losses[0] - 0.1


def test_the_original_is_asked_only_what_the_steps_see(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compresskit.recovery.training import distillation

    request = options(tiny["llama"], data, steps=2, loss="distill")
    asked: list[int] = []

    def of_these(walk: Walk, samples: list[Sample], seen: list[int], *rest: Any) -> distillation.TeacherPredictions:
        asked.extend(seen)
        return distillation.predict(walk, samples, seen, *rest)

    monkeypatch.setattr("compresskit.recovery.training.finetune.predict", of_these)
    some = recover(Full(), str(damaged), tmp_path / "some", request)
    assert len(asked) == len(set(asked)) == 2 * SMALL["batch_size"] < some["selected"]

    monkeypatch.setattr(
        "compresskit.recovery.training.finetune.predict",
        lambda walk, samples, seen, *rest: distillation.predict(walk, samples, range(len(samples)), *rest),
    )
    recover(Full(), str(damaged), tmp_path / "all", request)
    few, all_ = (json.loads((tmp_path / name / "recover.json").read_text())["losses"] for name in ("some", "all"))
    assert few == pytest.approx(all_, abs=1e-4)  # stored in float16, of micro-batches that are padded otherwise


def test_texts_of_the_original_itself_have_no_hard_targets(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compresskit.recovery.training import trainer

    given = []
    train = trainer.train
    monkeypatch.setattr(trainer, "train", lambda trained, learned, *rest: given.append(learned) or train(trained, learned, *rest))
    rows = [{**json.loads(line), "source": "self"} for line in data.read_text().splitlines()]
    named = tmp_path / "named.jsonl"
    named.write_text("\n".join(json.dumps(row) for row in rows))
    asked = options(tiny["llama"], named, steps=1, loss="distill", self_samples=2)
    selected = recover(Random(budget=0.5), str(damaged), tmp_path / "out", asked)["selected"]
    assert given[0].hard_weights == [0.5] * selected + [0.0] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_full_update_changes_the_weights_of_the_blocks_alone(
    family: str, tiny: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    asked = options(tiny[family], data, steps=12, update="full", learning_rate=5e-3, loss="response")
    result = recover(Random(budget=0.5), str(tiny[family]), tmp_path / "out", asked)
    assert result["held_back_after"]["loss"] < result["held_back_before"]["loss"]
    before, after = (open_model(folder) for folder in (tiny[family], tmp_path / "out"))
    inside = f"{before.architecture.blocks}."
    for name in before.checkpoint.tensors:
        same = torch.equal(before.checkpoint.read(name), after.checkpoint.read(name))
        assert same == (inside not in f"{before.removed_prefix}{name}"), name
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(stock(tokens()).logits, walked_logits(tmp_path / "out"), atol=1e-4)


@pytest.mark.parametrize("update", ["low-rank", "full"])
def test_gradient_checkpointing_changes_no_loss(
    update: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    losses = []
    for name, kept in (("kept", False), ("twice", True)):
        asked = options(tiny["llama"], data, steps=6, update=update, gradient_checkpointing=kept, precision="float32")
        recover(Random(budget=0.5), str(damaged), tmp_path / name, asked)
        losses.append(json.loads((tmp_path / name / "recover.json").read_text())["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("loss", ["response", "distill"])
def test_packed_rows_are_learned_as_padded_samples_are(
    loss: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for name in ("packed", "padded"):
        weight = 0.0 if loss == "distill" else None  # small losses, whose last digits are seen
        asked = options(tiny["llama"], data, steps=6, loss=loss, data_weight=weight, learning_rate=1e-2, precision="float32")
        recover(Random(budget=0.5), str(damaged), tmp_path / name, asked)
        losses.append(json.loads((tmp_path / name / "recover.json").read_text())["losses"])
        monkeypatch.setattr("compresskit.recovery.training.packing.pack", lambda network, longest: False)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] != losses[1]  # other sums, so that it is seen that there were rows


def test_a_full_update_of_low_bit_weights_is_refused(tiny: dict[str, Path], data: Path, text_file: Path, tmp_path: Path) -> None:
    text = Options(calibration=str(text_file), samples=2, sequence_length=64)
    quantize(RTN(bits=4, group_size=16), str(tiny["llama"]), tmp_path / "low", text)
    with pytest.raises(RequestError, match="--update low-rank"):
        recover(Random(), str(tmp_path / "low"), tmp_path / "out", options(tiny["llama"], data, update="full"))


def test_an_adapter_alone_is_one_that_peft_adds_to_the_source(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    asked = options(tiny["llama"], data, steps=4, learning_rate=1e-2)
    for name, alone in (("adapter", True), ("merged", False)):
        recover(Random(budget=0.5), str(damaged), tmp_path / name, asked.model_copy(update={"adapter_only": alone}))
    base = AutoModelForCausalLM.from_pretrained(damaged, dtype=torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that 5.24 replaced
        found = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(tokens()).logits
    assert torch.allclose(found, walked_logits(tmp_path / "merged"), atol=1e-4)
    assert (tmp_path / "adapter" / "compresskit.json").is_file()


def test_the_adapter_of_a_low_bit_checkpoint_is_trained_on_from_where_it_was(
    tiny: dict[str, Path], data: Path, text_file: Path, tmp_path: Path
) -> None:
    from compresskit.quantization.apiq.method import ApiQ
    from compresskit.quantization.run import quantize
    from compresskit.stages import Options

    low = tmp_path / "low"
    calibrated = Options(calibration=str(text_file), samples=4, sequence_length=64)
    quantize(ApiQ(bits=2, epochs=1, saliency="none"), str(tiny["llama"]), low, calibrated)
    asked = options(tiny["llama"], data, steps=12, loss="distill", learning_rate=2e-3)
    out = tmp_path / "out"
    recover(Random(budget=0.5), str(low), out, asked)
    assert json.loads((out / "recover.json").read_text())["data_weight"] == 0.5, "what was taken where nothing was given"
    assert sha256(out / "model.safetensors") == sha256(low / "model.safetensors")
    first, last = (with_adapter(open_model(folder), None).adapter for folder in (low, out))
    assert first is not None and last is not None and set(first.names) == set(last.names)
    name = first.names[0]
    assert 0 < float((first.update(name) - last.update(name)).norm()) < float(first.update(name).norm())
    assert first.rank(name) == last.rank(name)


def test_the_adapter_of_a_compensation_is_trained_on(tiny: dict[str, Path], data: Path, text_file: Path, tmp_path: Path) -> None:
    text: dict[str, Any] = {"calibration": str(text_file), "samples": 4, "sequence_length": 64}
    quantize(RTN(bits=2, group_size=16), str(tiny["llama"]), tmp_path / "low", Options(**text))
    repair = CompensateOptions(original=str(tiny["llama"]), **text)
    compensate(EoRA(rank=4, adapter_bits=8), str(tmp_path / "low"), tmp_path / "repaired", repair)
    asked = options(tiny["llama"], data, loss="distill", epochs=4, learning_rate=1e-3)
    result = recover(Full(), str(tmp_path / "repaired"), tmp_path / "out", asked)
    assert result["held_back_after"]["loss"] < result["held_back_before"]["loss"] + 0.05
    found = with_adapter(open_model(tmp_path / "out"), None)
    assert found.adapter is not None and found.adapter.rank(found.linears[0]) == 4
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(tmp_path / "low" / "model.safetensors")


def test_a_selection_alone_can_be_read_again_as_data(tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path) -> None:
    from compresskit.recovery.data.instructions import read_instructions

    recover(Paser(budget=0.25), str(damaged), tmp_path / "out", options(tiny["llama"], data, select_only=True))
    reading = read_instructions([tmp_path / "out" / "selection.jsonl"])
    assert len(reading.samples) == 9
    row = json.loads((tmp_path / "out" / "selection.jsonl").read_text().splitlines()[0])
    assert row.keys() >= {"cluster", "jsd", "lost_loss", "cost", "score", "reason"}


def test_the_same_command_gives_the_same_bytes(tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        recover(Random(budget=0.5), str(damaged), tmp_path / name, options(tiny["llama"], data, steps=3))
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")


@pytest.mark.parametrize("update", ["low-rank", "full"])
def test_a_run_that_was_killed_while_training_ends_as_if_it_had_not_been(
    update: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    settings: dict[str, Any] = {"steps": 16, "loss": "distill", "checkpoint_steps": 2, "update": update}
    recover(Random(budget=0.5), str(damaged), whole, options(tiny["llama"], data, **settings))
    flags = [
        "--sequence-length", "256", "--batch-size", "4", "--held-back", "0.1", "--rank", "4", "--steps", "16",
        "--loss", "distill", "--update", update, "--checkpoint-steps", "2", "--budget", "0.5",
        "--original", str(tiny["llama"]), "--data", str(data),
    ]  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-m", "compresskit", "recover", "random", str(damaged), str(out), *flags, "--quiet"]
    )
    trainer = tmp_path / "out.training" / "trainer"
    while child.poll() is None and not any(trainer.glob("checkpoint-*/complete")):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    recover(Random(budget=0.5), str(damaged), out, options(tiny["llama"], data, resume=True, **settings))
    assert sha256(out / "model.safetensors") == sha256(whole / "model.safetensors")
    losses = [json.loads((folder / "recover.json").read_text())["losses"] for folder in (whole, out)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stopped_in", ["vectors", "budget"])
def test_passes_that_an_interrupted_selection_had_finished_are_not_repeated(
    stopped_in: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compresskit.recovery.selection import degradation, embeddings, paser

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def repeated(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pass that had finished was repeated")

    method, asked = Paser(budget=0.5, clusters=2), options(tiny["llama"], data, steps=2)
    recover(method, str(damaged), tmp_path / "whole", asked)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(*((embeddings, "own_states") if stopped_in == "vectors" else (paser, "split_budget")), stopped)
        recover(method, str(damaged), tmp_path / "out", asked)
    with monkeypatch.context() as patched:
        patched.setattr(degradation, "degradations", repeated)
        if stopped_in != "vectors":
            patched.setattr(embeddings, "own_states", repeated)
        recover(method, str(damaged), tmp_path / "out", asked.model_copy(update={"resume": True}))
    assert sha256(tmp_path / "whole" / "model.safetensors") == sha256(tmp_path / "out" / "model.safetensors")


def test_a_checkpoint_that_cannot_be_saved_is_one_line_and_the_earlier_ones_stay(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(tiny["llama"], data, steps=8, checkpoint_steps=4)
    out = tmp_path / "out"
    saved = torch.save

    def full(value: object, file: Any, *rest: Any, **named: Any) -> None:
        if "checkpoint-8" in str(file):
            raise OSError(28, "No space left on device")
        saved(value, file, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(CompresskitError, match="No space left"):
            recover(Random(budget=0.5), str(damaged), out, asked)
    assert (tmp_path / "out.training" / "trainer" / "checkpoint-4" / "complete").is_file()
    recover(Random(budget=0.5), str(damaged), out, asked.model_copy(update={"resume": True}))
    assert out.is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": ()}, "--data"),
        ({"data": ("/nowhere.jsonl",)}, "no such file"),
        ({"sequence_length": 16}, "longer than 16 tokens"),
        ({"sequence_length": 4096}, "--sequence-length"),
        ({"data_weight": 0.5, "loss": "response"}, "--loss distill"),
    ],
)
def test_unusable_requests_are_refused_before_any_work(
    changes: dict[str, Any], said: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=said):
        recover(Random(), str(damaged), tmp_path / "out", options(tiny["llama"], data, **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", ["0", "1.5"])
def test_a_budget_outside_0_to_1_is_wrong_usage(budget: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from compresskit.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main(["recover", "paser", "a", str(tmp_path / "b"), "--original", "c", "--data", "d.jsonl", "--budget", budget])
    assert caught.value.code == 2
    assert f"--budget {budget}" in capsys.readouterr().err
