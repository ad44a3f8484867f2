"""checkpoint/manifest.py: the chain of manifests, and fingerprints of requests. Oracle."""

from __future__ import annotations

from compresskit.checkpoint.manifest import chain, fingerprint


def test_the_chain_goes_back_to_the_first_stage() -> None:
    first = {"stage": "prune", "source": None}
    assert chain({"stage": "quantize", "source": first}) == [{"stage": "quantize", "source": first}, first]
    assert chain(None) == []


def test_fingerprints_tell_requests_apart() -> None:
    assert fingerprint("prune", {"a": 1, "b": 2}) == fingerprint("prune", {"b": 2, "a": 1})
    assert fingerprint("prune", {"a": 1}) != fingerprint("prune", {"a": 2})
