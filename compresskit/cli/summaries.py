"""The line with which a stage closes: what was gained, what was lost, and what it took."""

from __future__ import annotations

from typing import Any

from compresskit.numerics.units import readable_bytes, readable_count

SECONDS_PER_MINUTE = 60
TIMES = 2
"""From this ratio on, a size is so many times the other, not a percentage of it."""


def summary(result: dict[str, Any]) -> str:
    """Summarize a stage's result, as `--json` prints it, in one line."""
    stage, method = result["stage"], result["method"]
    named = stage if method == stage else f"{stage} {method}"
    parts = [f"{named}: {_size(result)}", *_losses(result)]
    parts.append(f"{_time(result['seconds'])}, peak {readable_bytes(result['peak_memory_bytes'])}")
    return "; ".join(parts)


def _size(result: dict[str, Any]) -> str:
    """Bytes and parameters before and after; what is the same stands there once."""
    before, after = result["bytes_before"], result["bytes_after"]
    if result["parameters_before"] is None:  # of a packed folder, which may hold anything
        return f"{readable_bytes(before)} -> {readable_bytes(after)}{_ratio(before, after)}"
    old, new = readable_count(result["parameters_before"]), readable_count(result["parameters_after"])
    parameters = f"{new} parameters" if old == new else f"{old} -> {new} parameters"
    if before == after:
        return f"{readable_bytes(after)}, as before; {parameters}"
    return f"{readable_bytes(before)} -> {readable_bytes(after)}{_ratio(before, after)}, {parameters}"


def _ratio(before: int, after: int) -> str:
    if not before or not after:
        return ""
    if after < before:
        return f" ({after / before:.1%})"
    return f" ({after / before:.1f} times as much)" if after >= TIMES * before else f" (+{after / before - 1:.1%})"


def _losses(result: dict[str, Any]) -> list[str]:
    """What the stage knows of its quality."""
    found = []
    if "sparsity_achieved" in result:
        found.append(f"{result['sparsity_achieved']:.1%} of the feed-forward channels removed")
    if "blocks_removed" in result:
        found.append(f"{result['blocks_removed']} of {result['blocks_removed'] + result['blocks_kept']} blocks removed")
    if "experts_removed" in result:
        found.append(f"{result['experts_removed']} of {result['experts_removed'] + result['experts_kept']} experts removed")
    if "tokens_after" in result:
        found.append(f"{result['tokens_before']:,} -> {result['tokens_after']:,} tokens")
        found.append(f"{result['text_tokens_kept']:.2%} of the texts' tokens stay")
    if "bits_per_weight" in result:
        found.append(f"{result['bits_per_weight']:.2f} bits a weight")
    if "tensor_types" in result:
        found += [", ".join(f"{count} {kind}" for kind, count in result["tensor_types"].items()), _rounding(result)]
    if "density_achieved" in result:
        found.append(f"{result['density_achieved']:.1%} of the entries kept")
    if "rank_total" in result:
        found.append(f"rank {result['rank_total']} in all")
    if "candidates" in result:
        found.append(_chosen(result["candidates"]))
    if "kl_held_back" in result:
        unchanged = f"{result['top1_held_back']:.1%} of the most likely tokens unchanged"
        found.append(f"on held-back text KL {result['kl_held_back']:.4f}, {unchanged}")
    if "kl_before" in result:
        found.append(f"on held-back text KL {result['kl_before']:.4f} -> {result['kl_after']:.4f}")
    if result.get("held_back_after"):
        before, after = (result[key]["loss"] for key in ("held_back_before", "held_back_after"))
        found.append(f"training loss {result['loss_curve']}, held-back response loss {before:.4f} -> {after:.4f}")
    return found


def _chosen(candidates: list[dict[str, Any]]) -> str:
    """The settings of a merge that have the least loss on the validation texts."""
    best = min((each for each in candidates if each["loss"] is not None), key=lambda each: float(each["loss"]))
    weights = ", ".join(f"{weight:g}" for weight in best["weights"])
    return f"best of {len(candidates)} candidates: scaling {best['scaling']:g}, weights {weights}, loss {best['loss']:.4f}"


def _rounding(result: dict[str, Any]) -> str:
    """Say in a few words what an exported file lost."""
    if result["exact"]:
        return "nothing was rounded"
    worst = f"{result['largest_rounding_error_of']} by {result['largest_rounding_error']:.2%}"
    return f"{len(result['rounding_errors'])} tensors were rounded, most {worst}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), SECONDS_PER_MINUTE)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
