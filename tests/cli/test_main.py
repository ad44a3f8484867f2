"""The command line's contract: streams, exit codes, JSON keys, refusals that write nothing. End to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors
from conftest import Run
from safetensors.torch import load_file
from tiny_models import make_model

from compresskit.checkpoint.folder import partial_folder
from compresskit.checkpoint.reader import sha256

SMALL = ("--samples", "8", "--sequence-length", "64", "--round-to", "4")
STAGE_KEYS = {
    "stage", "method", "output", "source", "seconds", "peak_memory_bytes", "parameters_before", "parameters_after",
    "bytes_before", "bytes_after", "settings", "sparsity_achieved", "widths",
}  # fmt: skip
EVALUATE_KEYS = {
    "perplexity", "tokens", "kl", "top1_agreement", "perplexity_ratio", "size_ratio", "tasks", "speed", "gates",
}  # fmt: skip


@pytest.fixture
def model(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny llama that a test may damage."""
    return Path(shutil.copytree(tiny["llama"], tmp_path / "model"))


def compresskit(*arguments: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compresskit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload, no-any-return]


def test_help_loads_no_torch() -> None:
    script = (
        "import sys, compresskit.cli.main as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("typed", "wanted"), [("compresskit pru", "prune"), ("compresskit prune cf", "cfsp"), ("x inspect a --js", "--json")]
)
def test_the_shell_completes_commands_methods_and_flags(typed: str, wanted: str) -> None:
    asked = {"_COMPRESSKIT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert compresskit(env={**os.environ, **asked}).stdout.split() == [wanted]


def test_refusals_load_no_torch(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    script = (
        f"import sys, compresskit.cli.main as c\ntry: c.main(['prune', 'cfsp', {str(model)!r}, {str(tmp_path / 'o')!r}])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines() == ["2 False"]


def test_a_stage_prints_its_output_folder_and_nothing_else(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    code, out, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert "prune cfsp" in err


def test_json_is_one_object_with_the_documented_keys(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    code, out, _ = run("prune", "flap", model, tmp_path / "out", "--calibration", text_file, *SMALL, "--json", "--sparsity", 0.3)
    assert code == 0
    result = json.loads(out)
    assert result.keys() >= STAGE_KEYS
    assert result["settings"]["sparsity"] == 0.3
    assert abs(result["sparsity_achieved"] - 0.3) <= 2 / 96
    manifest = json.loads((tmp_path / "out" / "compresskit.json").read_text())
    assert manifest["outputs"]["sha256"] == {"model.safetensors": sha256(tmp_path / "out" / "model.safetensors")}
    assert manifest["inputs"]["sha256"] == {"model.safetensors": sha256(model / "model.safetensors")}


def test_stages_make_a_shell_pipeline(model: Path, text_file: Path, tmp_path: Path) -> None:
    tool = f"{sys.executable} -m compresskit"
    line = (
        f"{tool} prune magnitude {model} {tmp_path / 'a'} --no-refit --round-to 4 | "
        f"{tool} prune cfsp - {tmp_path / 'b'} --calibration {text_file} {' '.join(SMALL)} | "
        f"{tool} evaluate - --against {model} --data {text_file} --windows 4 --sequence-length 64 --json"
    )
    finished = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report.keys() >= EVALUATE_KEYS
    assert report["size_ratio"] < 1
    assert report["source"] == str(tmp_path / "b")
    chain = json.loads((tmp_path / "b" / "compresskit.json").read_text())
    assert [chain["method"], chain["source"]["method"]] == ["cfsp", "magnitude"]


def test_a_gate_that_is_missed_exits_3_after_everything_is_printed(run: Run, model: Path, text_file: Path) -> None:
    common = ("evaluate", model, "--data", text_file, "--windows", 2, "--sequence-length", 64)
    code, out, err = run(*common, "--gate", "perplexity<=1", "--gate", "perplexity>0", "--json")
    assert code == 3
    assert [gate["passed"] for gate in json.loads(out)["gates"]] == [False, True]
    assert "perplexity<=1: missed by" in err
    assert run(*common, "--gate", "perplexity>0")[0] == 0


def test_the_default_text_is_the_part_of_the_documentation_that_calibration_never_takes(run: Run, model: Path) -> None:
    code, out, _ = run("evaluate", model, "--windows", 2, "--sequence-length", 64, "--json")
    assert code == 0
    assert "documentation" in json.loads(out)["text"]


def test_evaluating_without_a_terminal_prints_a_table(run: Run, model: Path, text_file: Path) -> None:
    code, out, _ = run("evaluate", model, "--against", model, "--data", text_file, "--windows", 2, "--sequence-length", 64)
    assert code == 0
    assert "perplexity (lower is better)" in out
    assert "x 1.000" in out
    assert f"measured on: {text_file.name}" in out


def test_the_same_command_twice_gives_the_same_bytes(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert (
            run("prune", "cfsp", model, tmp_path / name, "--calibration", text_file, *SMALL, "--max-shard-size", "60KB")[0] == 0
        )
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 1
    assert all(sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name) for name in files)


def test_inspect_shows_widths_and_the_chain(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    found = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert found["family"] == "llama"
    assert found["chain"][0]["method"] == "cfsp"
    assert found["changed_files"] == []
    assert len(found["ffn_widths"]) == 3
    edit_tensors(tmp_path / "out", lambda tensors: tensors["model.norm.weight"].add_(1))
    assert "CHANGED" in run("inspect", tmp_path / "out")[1]


def test_methods_lists_every_method(run: Run) -> None:
    table = json.loads(run("methods", "--json")[1])
    assert list(table["prune"]) == ["cfsp", "flap", "wanda-sp", "magnitude", "random"]


def quantized(folder: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors", "config_groups": groups})


def hear_interrupts() -> None:
    """A test run in the background passes on an ignored SIGINT, which its children would ignore too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


REFUSALS: dict[str, tuple[tuple[object, ...], str]] = {
    "sparsity 1": (("--sparsity", "1"), "--sparsity"),
    "sparsity 1.5": (("--sparsity", "1.5"), "--sparsity"),
    "sparsity -0.1": (("--sparsity", "-0.1"), "--sparsity"),
    "sparsity nan": (("--sparsity", "nan"), "--sparsity"),
    "a flag of another method": (("--density", "0.2"), "No such option: --density"),
    "unknown allocation": (("--allocation", "even"), "--allocation even"),
    "round-to above the width": (("--round-to", "500"), "--round-to 500"),
    "no such text": (("--calibration", "nothing.txt"), "nothing.txt"),
    "a bad shard size": (("--max-shard-size", "lots"), "--max-shard-size"),
    "an unknown device": (("--device", "abacus"), "--device abacus"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_unusable_settings_are_refused_with_one_line(case: str, run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    arguments, said = REFUSALS[case]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_unusable_places_are_refused_with_one_line(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    latin, empty, other = tmp_path / "latin.txt", tmp_path / "empty.txt", tmp_path / "other.jsonl"
    latin.write_bytes("caf\xe9 ".encode("latin-1") * 999)
    empty.touch()
    other.write_text('{"body": "words"}\n' * 999)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    taken = tmp_path / "taken"
    taken.mkdir()
    for source, out, text, said in [
        (tmp_path / "missing", "out", text_file, "no such folder"),
        (model, "taken", text_file, "exists already"),
        (model, "model/inside", text_file, "inside the source"),
        (model, "out", latin, "latin.txt"),
        (model, "out", empty, "empty.txt"),
        (model, "out", other, "body"),
        (model, "out", short, "short.txt"),
        ("demo:gpt5", "out", text_file, "demo:smollm2-135m"),
    ]:
        code, stdout, err = run("prune", "cfsp", source, tmp_path / out, "--calibration", text, *SMALL)
        assert (code, stdout, err.count("\n")) == (2, "", 1), err
        assert said in err
        assert not (tmp_path / "out").exists()
    quantized(model)
    code, _, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert code == 2
    assert "quantized already" in err


def test_an_unknown_method_names_the_near_miss(run: Run, model: Path, tmp_path: Path) -> None:
    code, _, err = run("prune", "cfps", model, tmp_path / "out")
    assert code == 2
    assert "cfsp" in err
    assert err.count("\n") == 1


def test_nan_weights_fail_with_the_tensor_named_and_leave_nothing(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    edit_tensors(model, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    code, out, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert (code, out) == (1, "")
    assert name in err
    assert not (tmp_path / "out").exists()
    assert not partial_folder(tmp_path / "out").exists()


def test_nan_activations_fail_with_the_block_named(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    code, _, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert code == 1
    assert "model.layers.1" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_final_and_resumes_to_the_same_bytes(
    stop: signal.Signals, tmp_path: Path, text_file: Path
) -> None:
    source = make_model(tmp_path / "deep", "llama", num_hidden_layers=24, hidden_size=64, intermediate_size=512)
    options = ("--calibration", text_file, "--samples", "32", "--sequence-length", "128", "--round-to", "8", "--sparsity", "0.5")
    command = [sys.executable, "-m", "compresskit", "prune", "cfsp", str(source), str(tmp_path / "out"), *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts) as process:  # noqa: PLW1509
        progress = partial_folder(tmp_path / "out") / "progress.json"
        while process.poll() is None and not (progress.exists() and len(json.loads(progress.read_text())["blocks"]) >= 2):
            time.sleep(0.01)
        process.send_signal(stop)
        _, err = process.communicate()
    assert not (tmp_path / "out").exists()
    assert progress.exists()
    if stop != signal.SIGKILL:
        assert process.returncode == 130, err
        assert "--resume" in err
    assert compresskit("prune", "cfsp", source, tmp_path / "out", *options, "--resume").returncode == 0
    assert compresskit("prune", "cfsp", source, tmp_path / "whole", *options).returncode == 0
    resumed, whole = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert sha256(resumed) == sha256(whole)
    first, second = (json.loads((tmp_path / n / "compresskit.json").read_text())["facts"] for n in ("out", "whole"))
    assert first == second


def test_an_interrupt_that_a_library_made_an_error_of_its_own_still_is_an_interrupt(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> dict[str, object]:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("worker failed") from None
        raise AssertionError("nobody listens to SIGTERM")

    monkeypatch.setattr("compresskit.cli.stages.runner", lambda stage, name: stopped)
    code, _, err = run("prune", "cfsp", model, tmp_path / "out")
    assert code == 130
    assert err.strip() == "compresskit: error: interrupted (RuntimeError: worker failed (--verbose shows where))"


def test_bfloat16_checkpoints_stay_bfloat16(run: Run, text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "half", "qwen3", dtype=torch.bfloat16)
    assert run("prune", "cfsp", source, tmp_path / "out", "--calibration", text_file, *SMALL)[0] == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
