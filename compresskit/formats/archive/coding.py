"""Entropy coding of one run of bytes: zstd's Huffman coder alone, zstd with repetitions, or the bytes as they are.

zstd, RFC 8878; its Huffman coder, section 4.2.1. With repetitions off, each block of 128 KiB gets a table of its own, and a byte
costs at least one bit:

    bits(run) = sum over its blocks of (table + sum_i length(b_i)),    H <= mean length < H + 1                        (1)

A byte that holds four 2-bit codes is coded as one symbol, which brings the mean length within 1.2% of the entropy H.
"""

from __future__ import annotations

import sys

from compresskit.errors import CheckpointError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

AS_IT_IS, ZSTD = 0, 1
"""How a run is stored."""
LITERALS_MODE, HUFFMAN = 1002, 1
"""zstd's ZSTD_c_literalCompressionMode, and its value that codes literals at every level."""
HUFFMAN_ALONE = {
    zstd.CompressionParameter.compression_level: 1,
    zstd.CompressionParameter.strategy: zstd.Strategy.fast,
    zstd.CompressionParameter.min_match: 7,
    zstd.CompressionParameter.target_length: 1 << 17,  # of this strategy the step: the matches that it would find cost more
    LITERALS_MODE: HUFFMAN,
}
QUICK, SMALLEST = 3, 19
"""Levels of zstd with repetitions."""
WINDOW_LOG_MAX = 24
"""Of a frame, 16 MiB: a section is no larger."""
Run = bytes | memoryview


def coded(run: Run, level: int | None) -> tuple[int, bytes]:
    """The smallest of a run's codings: (`AS_IT_IS` or `ZSTD`, its bytes); `level` None tries no repetitions."""
    tried = [zstd.compress(run, options=HUFFMAN_ALONE)]
    if level is not None:
        tried.append(zstd.compress(run, level=level))
    smallest = min(tried, key=len)
    return (ZSTD, smallest) if len(smallest) < len(run) else (AS_IT_IS, bytes(run))


def decoded(coding: int, data: Run, size: int) -> Run:
    """The run of `size` bytes that `coded` made these of; raises CheckpointError, a few words, if they are none."""
    if coding == AS_IT_IS:
        found: Run = data
    elif coding == ZSTD:
        # Of a decoder's own object: it stops at `size`, whatever the frame says of itself.
        decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG_MAX})
        try:
            found = decoder.decompress(data, max_length=size + 1)
        except (zstd.ZstdError, EOFError) as error:
            raise CheckpointError("zstd cannot read it") from error
        if not decoder.eof or decoder.unused_data:
            raise CheckpointError("it is cut short, or too long")
    else:
        raise CheckpointError(f"there is no coding {coding}")
    if len(found) != size:
        raise CheckpointError(f"it holds {len(found):,} bytes instead of {size:,}")
    return found
