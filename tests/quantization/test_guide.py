"""quantization/guide.py and quantization/guided_grams.py: against autograd in float64; a whole run. Oracle, end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_tools import tokens
from torch import Tensor, nn

from compresskit.calibration.sampling import pick
from compresskit.errors import NumericalError, RequestError, UnsupportedArchitecture
from compresskit.machine import precision
from compresskit.machine.device import Where
from compresskit.models import meta
from compresskit.models.load import open_model
from compresskit.quantization import cost, guide, guided_grams, sequential
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.run import quantize
from compresskit.stages import Options
from compresskit.walk.sequence import chosen_sequence
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")
SEED, GROUPS = 3, 2


def float64_squares(request: QuantizeRequest, walk: Walk, windows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By name (inputs (windows, tokens, in), g^2 (windows, tokens, out)), one window, network and graph at a time."""
    model, network = request.model, walk.network
    for prefix in ("", *(model.block_name(i) for i in range(model.block_count))):
        meta.fill(model, network, prefix, CPU, torch.float32)
    network.double()
    inputs: dict[str, list[Tensor]] = {name: [] for name in request.schemes}
    added: dict[str, list[Tensor]] = {name: [] for name in request.schemes}

    def offset(name: str) -> object:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name].append(given[0].detach().flatten(0, -2))
            added[name].append(torch.zeros_like(output, requires_grad=True))
            return output + added[name][-1]

        return hook

    for name in request.schemes:
        network.get_submodule(name).register_forward_hook(offset(name))  # type: ignore[arg-type]
    for number, window in enumerate(windows):
        logits = network(window[None]).logits[0]
        generator = torch.Generator().manual_seed(SEED + number)
        drawn = pick(logits.detach(), torch.rand(len(logits), 1, dtype=torch.float64, generator=generator))
        (-logits.log_softmax(dim=-1).gather(1, drawn[:, None])).sum().backward()
    squares = {name: torch.stack([each.grad.flatten(0, -2).square() for each in found]) for name, found in added.items()}  # type: ignore[union-attr]
    return {name: torch.stack(each) for name, each in inputs.items()}, squares


def expected_moments(inputs: Tensor, squares: Tensor) -> list[Tensor]:
    """Equation 2 of each group of the rows, with the weights capped and of mean 1."""
    found = []
    for part in squares.tensor_split(GROUPS, dim=-1):
        weights = part.mean(dim=-1).flatten()
        weights = weights.clamp_max(weights.sort().values[int(guide.CAP * len(weights)) - 1])
        x = inputs.flatten(0, 1)
        found.append(x.T @ ((weights / weights.mean())[:, None] * x))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_guided_second_moments_are_those_of_each_samples_gradient(
    family: str, tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(cost, "GUIDE_TOKENS", 3 * tokens().shape[1])  # two parts of the windows
    windows, where = torch.cat([tokens(), tokens().flip(1)]), Where(CPU, torch.float32)
    method = GPTQ(bits=3, guide="fisher", guide_groups=GROUPS)
    request = QuantizeRequest(method, open_model(tiny[family]), tmp_path / "out", Options(seed=SEED))
    inputs, squares = float64_squares(request, Walk(request.model, windows, where), windows)
    walk = Walk(request.model, windows, where, 2)
    found = guide.guide_of(request, walk, where, tmp_path, lambda *_: None)
    for block in walk:
        for position in chosen_sequence(request.model, block.index, request.schemes):
            grams = guided_grams.guided(position, block, False, found(block.index))
            for group in position:
                parts = iter(grams[group[0]].parts(sum(block.linear(name).out_features for name in group)))
                for name in group:
                    for part in expected_moments(inputs[name], squares[name]):
                        assert torch.allclose(
                            next(parts)[1].matrix().double(), part, rtol=2e-3, atol=2e-3 * float(part.diagonal().mean())
                        )
                assert next(parts, None) is None


def options(text_file: Path, **given: object) -> Options:
    return Options(calibration=str(text_file), samples=2, sequence_length=48, **given)


def test_a_guided_run_differs_from_a_plain_one_and_resumes_to_the_same_bytes(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, method = str(tiny["llama"]), GPTQ(bits=3, guide="fisher")
    quantize(replace_guide(method, "none"), source, tmp_path / "plain", options(text_file))
    whole = quantize(method, source, tmp_path / "whole", options(text_file))
    guided, calls = guided_grams.guided, 0

    def stopping(*given: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 5:  # four positions a block
            raise KeyboardInterrupt
        return guided(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sequential, "guided", stopping)
        quantize(method, source, tmp_path / "out", options(text_file))
    quantize(method, source, tmp_path / "out", options(text_file, resume=True))
    plain, once, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "whole", "out"))
    assert all(torch.equal(once[name], resumed[name]) for name in once)
    assert any(not torch.equal(once[name], plain[name]) for name in once if name.endswith("weight_packed"))
    assert whole["settings"]["guide"] == "fisher"


def replace_guide(method: GPTQ, value: str) -> GPTQ:
    return GPTQ(**{**method.model_dump(), "guide": value})


def test_the_plan_states_the_scratch_files_of_a_guide(tiny: dict[str, Path], tmp_path: Path) -> None:
    windows, where = tokens(), Where(CPU, torch.float32)
    model = open_model(tiny["llama"])
    request = QuantizeRequest(
        GPTQ(bits=3, guide="fisher", guide_groups=4),
        model,
        tmp_path,
        Options(samples=len(windows), sequence_length=windows.shape[1]),
    )
    sizes = []
    guide.guide_of(
        request,
        Walk(model, windows, where),
        where,
        tmp_path,
        lambda *_: sizes.append(sum(f.stat().st_size for f in tmp_path.iterdir())),
    )
    plain = replace(request, method=GPTQ(bits=3))
    assert plain.scratch_bytes == 0
    headers = 4096 * model.block_count
    assert max(sizes) - headers <= request.scratch_bytes <= 2 * max(sizes)
    assert request.peak_bytes() >= plain.peak_bytes()
    assert cost._row_moments(model, 4) == 8 * (4 - 1) * 96**2  # of the down projection, more than of q, k and v: 11 of 32 x 32
    assert request.passes() > plain.passes()


def test_groups_of_rows_without_a_guide_are_refused(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--guide-groups 2: is for --guide fisher"):
        quantize(GPTQ(bits=4, guide_groups=2), str(tiny["llama"]), tmp_path / "out", options(text_file))


def test_a_linear_that_misses_a_window_is_named() -> None:
    with pytest.raises(NumericalError, match=r"layers\.1\.up: not all windows"):
        guide._of_all_ranks({"layers.1.up": [torch.ones(4, 1)]}, 2)
    with pytest.raises(NumericalError, match="pass --guide none"):
        guide._of_all_ranks({"layers.1.up": [torch.ones(4, 1), torch.ones(5, 1)]}, 2)
    assert guide._of_all_ranks({"layers.1.up": []}, 2) == {}


def test_a_linear_that_only_some_parts_of_the_text_reach_has_no_weights() -> None:
    found = guide._weights([{"down": torch.ones(1, 8, 1), "cross": torch.ones(1, 8, 1)}, {"down": torch.ones(1, 8, 1)}])
    assert found.keys() == {"down"}


def test_rows_on_which_nothing_depends_count_all_tokens_alike() -> None:
    weights = torch.zeros(2, 8, 2)
    weights[..., 1] = torch.arange(16.0).view(2, 8)
    found = guide._weights([{"down": weights[:1]}, {"down": weights[1:]}])["down"]
    assert torch.equal(found[..., 0], torch.ones(2, 8))
    assert float(found[..., 1].mean()) == pytest.approx(1)
    assert float(found[1, 7, 1]) == float(found[1, 6, 1])  # capped


def test_experts_are_refused_by_name(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    method = GPTQ(bits=4, symmetric=True, guide="fisher")
    with pytest.raises(UnsupportedArchitecture, match=r"mixtral: --guide fisher: .* pass --guide none"):
        quantize(method, str(tiny["mixtral"]), tmp_path / "out", options(text_file))
    assert not (tmp_path / "out").exists()
