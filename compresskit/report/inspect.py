"""The inspect command: show the contents of a checkpoint or adapter folder from its headers."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from compresskit.checkpoint import source
from compresskit.checkpoint.manifest import chain, changed_files
from compresskit.checkpoint.reader import Checkpoint, TensorSpec, open_checkpoint, tensors_in
from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.weight_files import ignored_files
from compresskit.errors import CheckpointError, UnsupportedArchitecture
from compresskit.formats import open_format
from compresskit.formats.archive.container import by_kind, open_archive
from compresskit.formats.stored_forms import as_dense
from compresskit.formats.ternary.golomb import entropy
from compresskit.models.architectures import RAGGED_PREFIX
from compresskit.models.load import bind, with_adapter
from compresskit.models.model import Model
from compresskit.task_vectors.vector import TernaryVector, facts_of, is_ternary, open_task_vector

BITS_PER_BYTE = 8


def inspect(source_name: str, trust_remote_code: bool = False, structure: bool = False) -> dict[str, Any]:
    """Describe a folder from its headers: family, blocks, widths, dtypes, bytes and the chain of manifests.

    `structure` adds the kinds of blocks: their linears in compute order, their feed-forward networks, and what no stage edits.

    Returns:
        The dictionary that `--json` prints; its keys depend on "kind", a checkpoint or an adapter, ternary or not, or an
        archive.

    Raises:
        CheckpointError: SOURCE is none of these, or is damaged.
    """
    folder = source.resolve(source_name)
    if folder.is_file():
        return _inspect_archive(folder)
    if is_ternary(folder):
        return _inspect_ternary(folder)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _inspect_adapter(folder)
    checkpoint = open_checkpoint(folder)
    model_type = str(checkpoint.config.get("model_type", ""))
    family = model_type.removeprefix(RAGGED_PREFIX)
    usable = checkpoint.config.get("quantization_config") is None or readable(checkpoint)
    dense = as_dense(checkpoint) if usable else checkpoint
    result: dict[str, Any] = {
        "kind": "checkpoint",
        "folder": str(folder),
        "family": family,
        "supported": True,
        "quantization": checkpoint.config.get("quantization_config"),
        "stored_as": dense.stored_as,
        "parameters": dense.parameters,
        "bytes": checkpoint.bytes,
        "dtypes": _dtypes(list(checkpoint.tensors.values())),
        "files": {file.name: file.stat().st_size for file in checkpoint.files},
        "ignored_files": ignored_files(folder, checkpoint.files),
    }
    if usable:
        result |= _inspect_model(dense, trust_remote_code, structure)
    return result | {"chain": _links(checkpoint.manifest), "changed_files": changed_files(folder, checkpoint.manifest or {})}


def _inspect_model(checkpoint: Checkpoint, trust_remote_code: bool, structure: bool) -> dict[str, Any]:
    """Facts about the model; of a type that is not supported, the reason."""
    try:
        model = with_adapter(bind(checkpoint, trust_remote_code), None)
    except UnsupportedArchitecture as error:
        return {"supported": False, "reason": str(error)}
    weights = {"parameters": model.parameters, "bytes": model.bytes, "bits_per_weight": model.bits_per_weight}
    found = weights | {"low_bit": _low_bit(model)} | _blocks(model) | {"editable": editable(model)}
    if model.adapter:
        found["adapter"] = _inspect_adapter(model.adapter.folder)
    return found | ({"structure": _structure(model)} if structure else {})


def editable(model: Model) -> dict[str, float]:
    """Shares of the parameters that `quantize` can store in few bits, and that `prune` can take channels from."""
    networks = {
        name for i in range(model.block_count) for group in model.ffn_groups(i)
        for ffn in group.members for name in (*ffn.in_projections, ffn.out_projection)
    }  # fmt: skip
    shares = {"quantize": model.linears, "prune": networks}
    return {
        stage: round(sum(math.prod(model.linear_shape(n)) for n in names) / model.parameters, 4)
        for stage, names in shares.items()
    }


def _structure(model: Model) -> list[dict[str, Any]]:
    """The kinds of blocks in the order of their first block, with the blocks that are of each kind."""
    found: dict[str, dict[str, Any]] = {}
    for index in range(model.block_count):
        kind = model.architecture.block(index)
        described = {
            "positions": [[list(group) for group in position] for position in kind.positions],
            "ffns": [
                {"in_projections": list(ffn.in_projections), "out_projection": ffn.out_projection, "width_key": ffn.width_key}
                for ffn in kind.ffns
            ],
            "untouched": dict(kind.untouched),
        }  # fmt: skip
        found.setdefault(json.dumps(described), described | {"blocks": []})["blocks"].append(index)
    return list(found.values())


def readable(checkpoint: Checkpoint) -> bool:
    """Whether its low-bit format or stored form is supported; for others only the stored tensors are listed."""
    try:
        open_format(as_dense(checkpoint))
    except CheckpointError:
        return False
    return True


def _low_bit(model: Model) -> dict[str, Any] | None:
    """Storage of the low-bit linears: their number, bits, and stored bits per weight; None if all are dense."""
    found = [name for name in model.linears if model.is_low_bit(name)]
    if model.format is None or not found:
        return None
    stored = [tensor for name in found for tensor in model.format.stored_tensors(model.stored_name(name))]
    weights = sum(math.prod(model.linear_shape(name)) for name in found)
    bits = BITS_PER_BYTE * sum(model.checkpoint.spec(tensor).bytes for tensor in stored) / weights
    by_bits = Counter(str(model.format.bits(model.stored_name(name))) for name in found)
    return {"linears": len(found), "dense_linears": len(model.linears) - len(found), "bits": dict(by_bits), "stored_bits": bits}


def _dtypes(specs: list[TensorSpec]) -> dict[str, int]:
    """Number of parameters by dtype."""
    counts: Counter[str] = Counter()
    for spec in specs:
        counts[spec.dtype] += spec.elements
    return dict(counts)


def _blocks(model: Model) -> dict[str, Any]:
    widths = [[group.width for group in model.ffn_groups(index)] for index in range(model.block_count)]
    return {
        "layout": "ragged" if model.ragged else "plain",
        "blocks": model.block_count,
        "hidden_size": model.hidden_size,
        "ffn_widths": widths,
        "experts": max((len(group.members) for i in range(model.block_count) for group in model.ffn_groups(i)), default=0),
    }


def _links(manifest: dict[str, Any] | None) -> list[dict[str, Any]]:
    kept = ("stage", "method", "version", "settings", "inputs", "outputs")
    return [{key: link.get(key) for key in kept} for link in chain(manifest)]


def _inspect_ternary(folder: Path) -> dict[str, Any]:
    """Density, scale, bits per entry with the entropy bound, and non-zeros by tensor."""
    vector = open_task_vector(folder, None)
    assert isinstance(vector, TernaryVector)
    tensors = vector.container.tensors
    facts = facts_of(vector)
    manifest = read_manifest(folder)
    return {
        "kind": "ternary adapter" if vector.is_adapter else "ternary checkpoint",
        "folder": str(folder),
        "bytes": vector.container.path.stat().st_size,
        **facts,
        "entropy_bits": entropy(facts["density_achieved"]),
        "scales": sorted({entry.scale for entry in tensors.values()}),
        "codings": dict(Counter(section.coding for entry in tensors.values() for section in entry.sections)),
        "base": vector.container.facts.base,
        "balanced": vector.container.facts.balanced,
        "dense_tensors": len(vector.dense),
        "nonzeros_by_tensor": {name: entry.nonzeros for name, entry in tensors.items()},
        "chain": _links(manifest),
        "changed_files": changed_files(folder, manifest or {}),
    }


def _inspect_archive(path: Path) -> dict[str, Any]:
    """What an archive holds, by its index: files, bytes before and after by kind, and the ratio."""
    archive = open_archive(path)
    size = path.stat().st_size
    return {
        "kind": "archive",
        "file": str(path),
        "bytes": size,
        "folder_bytes": archive.bytes,
        "ratio": round(size / archive.bytes, 4) if archive.bytes else None,
        "made_by": archive.tool,
        "digest": archive.digest,
        "sections": len(archive.sections),
        "kinds": {
            label: found | {"ratio": round(found["stored"] / found["bytes"], 4)}
            for label, found in by_kind(archive.sections).items()
        },
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in archive.files},
    }


def _inspect_adapter(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{folder}: an adapter without adapter_model.safetensors; save it with peft as safetensors")
    specs = tensors_in(file)
    return {
        "kind": "adapter",
        "folder": str(folder),
        "base": config.get("base_model_name_or_path"),
        "type": config.get("peft_type"),
        "rank": config.get("r"),
        "rank_pattern": config.get("rank_pattern") or {},
        "parameters": sum(spec.elements for spec in specs),
        "bytes": file.stat().st_size,
        "dtypes": _dtypes(specs),
        "tensors": len(specs),
    }


def listing(found: dict[str, Any]) -> str:
    """Format the result of `inspect`, one fact per line; what a terminal would act on is shown as a space."""
    lines = []
    for key, value in found.items():
        if key == "ffn_widths":
            flat = [width for block in value for width in block] or [0]
            lines.append(f"{key:16} {min(flat)} to {max(flat)}: {' '.join('/'.join(map(str, block)) for block in value)}")
        elif key == "structure":
            for kind in value:
                lines.append(f"{'blocks':16} {' '.join(map(str, kind['blocks']))}")
                lines += [
                    f"{'  position':16} {'; '.join(' '.join(group) for group in position)}" for position in kind["positions"]
                ]
                lines += [
                    f"{'  ffn':16} {' '.join(f['in_projections'])} -> {f['out_projection']} ({f['width_key'] or 'no key'})"
                    for f in kind["ffns"]
                ]
                lines += [f"{'  untouched':16} {name} ({reason})" for name, reason in kind["untouched"].items()]
        elif key == "kinds":
            for label, kind in value.items():
                lines.append(f"{'  ' + label:28} {kind['bytes']:>15,} -> {kind['stored']:>15,} bytes  {kind['ratio']:.1%}")
        elif key == "files" and found["kind"] == "archive":
            lines += [f"{'file':16} {name} ({each['bytes']:,} bytes)" for name, each in value.items()]
        elif key == "chain":
            for link in value:
                made_by = f"{link['stage']} {link['method']} (compresskit {link['version']})"
                lines.append(f"{'made by':16} {made_by} {json.dumps(link['settings'])}")
        elif key == "changed_files" and value:
            lines.append(f"{'CHANGED':16} {', '.join(value)} since the manifest was written")
        elif value not in (None, [], {}):
            lines.append(f"{key:16} {json.dumps(value) if isinstance(value, dict) else value}")
    return "\n".join("".join(each if each.isprintable() else " " for each in line) for line in lines)
