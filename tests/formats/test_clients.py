"""formats/clients.py: rows cite the client bench or a file read; refusals name the remedy. Oracle: the bench's results."""

from __future__ import annotations

from typing import get_args

import client_page
import pytest

from compresskit.formats import fixed
from compresskit.formats.clients import (
    GRID,
    KERNELS,
    NF4,
    READ,
    STATIC,
    TRIED,
    UNKNOWN,
    Client,
    Form,
    Kernel,
    needs_symmetry,
    of,
    refusal,
    runs,
    stored_forms,
)

COLUMNS = {"transformers": "transformers", "vllm-cpu": "vllm", "llama.cpp": "llama.cpp-export"}
"""The bench's name of each client that it runs."""


def test_every_row_that_cites_the_bench_runs_there() -> None:
    found = {(row["artifact"], row["client"]): row["verdict"] for row in client_page.rows()}
    cited = [kernel for kernel in KERNELS if not kernel.source.startswith((READ, TRIED))]
    assert {found.get((kernel.source, COLUMNS[kernel.client])) for kernel in cited} == {"runs"}


def test_what_the_bench_ran_in_few_bits_is_what_the_table_takes() -> None:
    for row in client_page.rows():
        words = row["artifact"].split("-")
        if row["client"] in ("transformers", "vllm") and words[1:2] == ["bit"] and words[-1] != "float32" and words[0].isdigit():
            client: Client = "transformers" if row["client"] == "transformers" else "vllm-cpu"
            form = Form(GRID, int(words[0]), words[2] == "symmetric", 64)
            assert runs(client, form) == (row["verdict"] == "runs"), row


@pytest.mark.parametrize("client", get_args(Client))
def test_each_client_has_rows_and_takes_4_bits(client: Client) -> None:
    assert list(of(client))
    assert refusal(client, Form(GRID, 4, True, 64)) == ""


@pytest.mark.parametrize(
    ("client", "form", "remedy"),
    [
        ("vllm-cpu", Form(GRID, 3, True, 64), "4 bits"),
        ("vllm-cuda", Form(GRID, 8, False, 64), "8 bits --symmetric"),
        ("vllm-cuda", Form(GRID, 4, True, 16), "--group-size 0, 32, 64 or 128"),
        ("vllm-cpu", Form(NF4), "4 bits"),
        ("llama.cpp", Form(GRID, 4, True, 16), "a multiple of 32"),
    ],
)
def test_a_refusal_says_what_would_work(client: Client, form: Form, remedy: str) -> None:
    words = refusal(client, form)
    assert words.startswith(f"{client} has no kernel for ")
    assert remedy in words
    assert "\n" not in words


def test_zero_points_are_given_up_where_a_client_has_none() -> None:
    assert needs_symmetry("vllm-cuda", 8)
    assert not needs_symmetry("vllm-cuda", 4)
    assert not needs_symmetry("vllm-cpu", 8)


def test_a_row_of_any_group_size_takes_whole_rows() -> None:
    assert Kernel("llama.cpp", GRID, "", bits=(4,), multiple=32).runs(Form(GRID, 4, True, 0))


@pytest.mark.parametrize("name", list(fixed.SCHEMES))
def test_a_format_of_its_own_is_known_by_its_configuration(name: str) -> None:
    for activations in fixed.ACTIVATIONS[name]:
        config = fixed.configuration(fixed.fixed_scheme(name, activations), [])
        kind = name + (STATIC if activations == "static" else "")
        assert stored_forms({"quantization_config": config}) == [Form(kind)]
        assert runs("transformers", Form(kind))
        assert runs("vllm-cuda", Form(kind))


def test_static_activations_have_no_kernel_on_a_cpu_and_the_refusal_says_so() -> None:
    assert runs("vllm-cpu", Form("fp8"))
    assert refusal("vllm-cpu", Form(f"fp8{STATIC}")).startswith("vllm-cpu has no kernel for fp8 with static activations; it runs")
    assert stored_forms({"quantization_config": {"format": "float-quantized", "config_groups": {"a": 3}}}) == [Form(UNKNOWN)]
    assert stored_forms({"quantization_config": {"format": 3, "config_groups": {"a": {}}}}) == [Form(UNKNOWN)]
