"""Put one family's tiny checkpoint through the stages, and compare each result with what stock transformers makes of it.

A cell is "works", "refused: REASON" (an error of ours, in one line), "WRONG: ..." (stock disagrees) or "CRASH: ...".
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import tiny_models
import torch
from families import auto_class
from safetensors import safe_open
from transformers import PreTrainedModel

from compresskit.compensation.request import CompensateOptions
from compresskit.compensation.run import compensate
from compresskit.errors import CompresskitError, UnsupportedArchitecture
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.machine.device import Where
from compresskit.methods import method_class
from compresskit.models.load import open_any, open_model
from compresskit.pruning.depth.method import Depth
from compresskit.pruning.depth.run import remove
from compresskit.pruning.run import prune
from compresskit.quantization.run import quantize
from compresskit.report.inspect import inspect
from compresskit.stages import Options
from compresskit.walk.walk import Walk

WORKS = "works"
STAGES = ("inspect", "walk", "prune 0", "uniform", "padded", "ragged", "rtn 8", "gptq 4", "eora", "evaluate")
"""What `cells` runs if nothing else is asked for; "depth" has a test of its own."""
TOLERANCE = 1e-3
"""Largest difference of logits between a result as stock tools run it and our own walk over it, in their spread."""
CLOSE = 0.1
"""Largest difference between the logits of 8-bit codes and of the original at the usual token, in their spread."""
PRINTABLE = range(33, 127)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of the ASCII characters, whose tokens fit into a vocabulary of 128."""
    tiny_models.write_tokenizer(folder, [*map(chr, PRINTABLE), "Ġ", "Ċ"])


def tokens(rows: int = 2) -> torch.Tensor:
    """Random tokens (rows, 12) int64, none special."""
    return torch.randint(3, 100, (rows, 12), generator=torch.Generator().manual_seed(1))


def stock(model_type: str, folder: Path) -> torch.Tensor:
    """Logits of a folder in stock transformers; raises AssertionError if it does not hold every tensor."""
    network: PreTrainedModel
    network, info = auto_class(model_type).from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"], f"stock misses {sorted(info['missing_keys'])[:2]}"
    assert not info["mismatched_keys"], f"shapes differ: {sorted(info['mismatched_keys'])[:2]}"
    network.float()  # stock unpacks the codes of experts to float16 and would then compute in it
    with torch.no_grad():
        logits: torch.Tensor = network.eval()(input_ids=tokens(), use_cache=False).logits
    return logits


def without(model_type: str, folder: Path, removed: Collection[int]) -> torch.Tensor:
    """Logits of a folder in stock transformers, some of whose blocks hand on what they are given."""
    network: PreTrainedModel = auto_class(model_type).from_pretrained(folder, dtype=torch.float32).eval()
    architecture = open_model(folder).architecture
    blocks: Any = network.get_submodule(architecture.blocks)
    for index in removed:
        others = (None,) * (architecture.block(index).tuple_length - 1)
        returned = (
            (lambda hidden, others=others: (hidden, *others)) if architecture.block(index).tuple_length else lambda hidden: hidden
        )
        blocks[index].forward = lambda hidden_states, *_, returned=returned, **__: returned(hidden_states)
    with torch.no_grad():
        logits: torch.Tensor = network(input_ids=tokens(), use_cache=False).logits
    return logits


def walked(folder: Path) -> torch.Tensor:
    """Logits of a folder by our walk over its blocks."""
    walk = Walk(open_any(str(folder)), tokens(), Where(torch.device("cpu"), torch.float32, False), micro_batch=1)
    for _ in walk:
        pass
    return torch.cat([logits for _, _, logits in walk.logits()])


def cells(model_type: str, source: Path, work: Path, text: Path, only: tuple[str, ...] = STAGES) -> dict[str, str]:
    """Run the stages on a checkpoint of this type; returns the outcome by stage."""
    write_tokenizer(source)
    options = Options(calibration=str(text), samples=4, sequence_length=32, device="cpu", dtype="float32")
    original: torch.Tensor | None = None

    def reference() -> torch.Tensor:
        nonlocal original
        if original is None:
            original = stock(model_type, source)
        return original

    def pruned(name: str, **settings: Any) -> Path:
        prune(method_class("prune", "cfsp")(round_to=8, **settings), str(source), work / name, options)
        return work / name

    def quantized(name: str, method: str, **settings: Any) -> Path:
        quantize(method_class("quantize", method)(**settings), str(source), work / name, options)
        return work / name

    def unpruned() -> None:
        _same_tensors(source, pruned("prune0", sparsity=0.0))
        _agree(model_type, work / "prune0")

    def close() -> None:
        found = _agree(model_type, quantized("rtn8", "rtn", bits=8))
        # The median, because random weights send some token to another expert for the least difference.
        apart = float((found - reference()).abs().mean(dim=-1).median() / reference().std())
        assert apart < CLOSE, f"8 bits are {apart:.3f} from the original"

    def repaired() -> None:
        made = work / "gptq4"
        if not made.is_dir():
            quantized("gptq4", "gptq", bits=4)
        merged = CompensateOptions(**options.model_dump(), original=str(source), merge=True)
        compensate(method_class("compensate", "eora")(rank=4), str(made), work / "eora", merged)
        _agree(model_type, work / "eora")

    def shortened() -> None:
        made = remove(Depth(blocks=1, choose="angle", refit="none"), str(source), work / "depth", options)
        _close(stock(model_type, work / "depth"), without(model_type, source, made["removed_blocks"]))
        remove(Depth(blocks=1, choose="loss"), str(source), work / "refitted", options)
        _agree(model_type, work / "refitted")

    def measured() -> None:
        found = evaluate(str(source), EvaluateOptions(data=str(text), sequence_length=32, windows=4, device="cpu"))
        assert found["perplexity"] > 0

    runs: dict[str, Callable[[], Any]] = {
        "inspect": lambda: _supported(inspect(str(source))),
        "walk": lambda: _close(walked(source), reference()),
        "prune 0": unpruned,
        "uniform": lambda: _agree(model_type, pruned("uniform", sparsity=0.25, allocation="uniform")),
        "padded": lambda: _agree(model_type, pruned("padded", sparsity=0.25, layout="padded")),
        "ragged": lambda: _agree(model_type, pruned("ragged", sparsity=0.25)),
        "rtn 8": close,
        "gptq 4": lambda: _agree(model_type, quantized("gptq4", "gptq", bits=4)),
        "eora": repaired,
        "evaluate": measured,
        "depth": shortened,
    }
    found = {stage: outcome(runs[stage]) for stage in only}
    shutil.rmtree(work, ignore_errors=True)
    return found


def outcome(run: Callable[[], Any]) -> str:
    """What became of one stage."""
    try:
        run()
    except CompresskitError as error:
        return f"refused: {str(error).splitlines()[0]}"
    except AssertionError as error:
        return f"WRONG: {str(error).splitlines()[0]}"
    except Exception as error:  # the bench reports whatever a family does
        return f"CRASH: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return WORKS


def _supported(found: dict[str, Any]) -> None:
    if not found["supported"]:
        raise UnsupportedArchitecture(found["reason"])


def _agree(model_type: str, folder: Path) -> torch.Tensor:
    """Compare a result in stock transformers with our own walk over it; returns the stock logits."""
    found = stock(model_type, folder)
    _close(walked(folder), found)
    return found


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    apart = float((ours - theirs).abs().max() / theirs.std())
    assert apart < TOLERANCE, f"logits differ by {apart:.2g} of their spread"


def _same_tensors(source: Path, out: Path) -> None:
    before, after = _bytes(source), _bytes(out)
    assert before.keys() == after.keys(), f"tensors differ: {sorted(before.keys() ^ after.keys())[:2]}"
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"{changed[0]} changed"


def _bytes(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                tensor = tensors.get_tensor(name)
                found[name] = (
                    str((tensor.dtype, tuple(tensor.shape))).encode()
                    + tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                )
    return found
