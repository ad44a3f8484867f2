"""numerics/bit_packing.py: words equal those that compressed-tensors packs, and come back, for every number of bits. Oracle."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from compresskit.numerics.bit_packing import packed, unpacked


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 96, 100])
def test_the_words_are_those_of_compressed_tensors_and_come_back(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(bits * count)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, count), generator=generator).to(torch.int8)
    words = packed(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpacked(words, bits, count), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_columns_are_packed_as_rows_of_the_transpose(bits: int) -> None:
    codes = torch.arange(70 * 3).remainder(1 << bits).sub(1 << (bits - 1)).view(70, 3).to(torch.int8)
    assert torch.equal(packed(codes.T, bits).T, pack_to_int32(codes, bits, packed_dim=0))
