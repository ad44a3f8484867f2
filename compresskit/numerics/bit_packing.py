"""Whole numbers of few bits in 32-bit words, without gaps: number i of a row takes the bits i * bits, ... of the row.

32 numbers fill as many words as a number has bits, so a number's place in its word depends on i modulo 32 alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.numerics.scheme import BITS_PER_WORD, packed_words


def packed(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes (rows, count) of `bits` bits, 1 to 8, stored plus 2^(bits-1).

    Returns:
        (rows, ceil(count * bits / 32)) int32.
    """
    rows, count = codes.shape
    offset = 1 << (bits - 1)
    padded = pad(codes.to(torch.int8), (0, -count % BITS_PER_WORD), value=-offset)
    numbers = padded.view(rows, -1, BITS_PER_WORD).permute(2, 0, 1).contiguous()  # so that each step runs through memory
    words = torch.zeros(bits, *numbers.shape[1:], dtype=torch.int32, device=codes.device)
    for place in range(BITS_PER_WORD):
        word, start = divmod(place * bits, BITS_PER_WORD)
        number = numbers[place].to(torch.int32) + offset
        beyond = start + bits - BITS_PER_WORD
        if beyond > 0:
            words[word + 1] |= number >> (bits - beyond)
        words[word] |= number.bitwise_left_shift_(start)
    return words.permute(1, 2, 0).flatten(1)[:, : packed_words(count, bits)].clone(memory_format=torch.contiguous_format)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `packed`: words (rows, ceil(count * bits / 32)) int32 -> (rows, count) int8."""
    rows = len(words)
    groups = pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits)
    numbers = torch.empty(rows, groups.shape[1], BITS_PER_WORD, dtype=torch.int8, device=words.device)
    for place in range(BITS_PER_WORD):
        word, start = divmod(place * bits, BITS_PER_WORD)
        inside = min(bits, BITS_PER_WORD - start)
        number = (groups[:, :, word] >> start) & ((1 << inside) - 1)  # the shift of a negative word fills with ones
        if inside < bits:
            number |= (groups[:, :, word + 1] & ((1 << (bits - inside)) - 1)) << inside
        numbers[:, :, place] = number - (1 << (bits - 1))
    return numbers.flatten(1)[:, :count]
