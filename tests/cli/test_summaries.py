"""cli/summaries.py: the closing line of every kind of result, in fitting units; nothing is 0 that is not, nothing stands twice.

Oracle: the lines, written by hand.
"""

from __future__ import annotations

from typing import Any

import pytest

from compresskit.cli.summaries import summary

COST = {"seconds": 3.21, "peak_memory_bytes": 501_000_000}


def result(named: str, parameters: tuple[int, int], sizes: tuple[int, int], **facts: Any) -> dict[str, Any]:
    stage, method = named.split()
    return {
        "stage": stage, "method": method, "parameters_before": parameters[0], "parameters_after": parameters[1],
        "bytes_before": sizes[0], "bytes_after": sizes[1], **COST, **facts,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            result("expand expand", (36_864, 36_864), (4_100, 149_200), density_achieved=0.2),
            "expand: 4.10 KB -> 149 KB (36.4 times as much), 36.9K parameters; 20.0% of the entries kept; 3.2 s, peak 501 MB",
        ),
        (
            result("quantize compeft", (36_864, 36_864), (149_200, 4_100), density_achieved=0.2),
            "quantize compeft: 149 KB -> 4.10 KB (2.7%), 36.9K parameters; 20.0% of the entries kept; 3.2 s, peak 501 MB",
        ),
        (
            result("prune cfsp", (134_515_008, 113_000_000), (538_060_032, 452_000_000), sparsity_achieved=0.2),
            "prune cfsp: 538 MB -> 452 MB (84.0%), 135M -> 113M parameters; 20.0% of the feed-forward channels removed; "
            "3.2 s, peak 501 MB",
        ),
        (
            result("quantize gptq", (7_241_732_096, 7_241_732_096), (14_483_464_192, 4_830_000_000), bits_per_weight=4.3125,
                   kl_held_back=0.0213, top1_held_back=0.912, seconds=754.4),
            "quantize gptq: 14.5 GB -> 4.83 GB (33.3%), 7.24B parameters; 4.31 bits a weight; on held-back text KL 0.0213, "
            "91.2% of the most likely tokens unchanged; 12 min 34 s, peak 501 MB",
        ),
        (
            result("compensate eora", (230_720, 240_000), (900_000, 937_000), rank_total=112, kl_before=0.2, kl_after=0.1),
            "compensate eora: 900 KB -> 937 KB (+4.1%), 231K -> 240K parameters; rank 112 in all; on held-back text KL 0.2000 "
            "-> 0.1000; 3.2 s, peak 501 MB",
        ),
        (
            result("recover paser", (10, 10), (512, 512), loss_curve=[2.0, 1.5], held_back_before={"loss": 2.0},
                   held_back_after={"loss": 1.5}),
            "recover paser: 512 B, as before; 10 parameters; training loss [2.0, 1.5], held-back response loss 2.0000 -> 1.5000; "
            "3.2 s, peak 501 MB",
        ),
        (
            result("merge ties", (73_728, 36_864), (0, 149_200)),
            "merge ties: 0 B -> 149 KB, 73.7K -> 36.9K parameters; 3.2 s, peak 501 MB",
        ),
    ],
    ids=["expand", "ternary", "prune", "large", "compensate", "recover", "merge"],
)  # fmt: skip
def test_the_closing_line(found: dict[str, Any], line: str) -> None:
    assert summary(found) == line
