"""report/source_card.py: licence and language are carried on, whatever else a card holds. Oracle: the Hub's own client."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_runs import HOSTILE
from huggingface_hub import ModelCard, ModelCardData

from compresskit.report.source_card import carried


def write(folder: Path, text: str) -> str:
    (folder / "README.md").write_text(text)
    return str(folder)


def test_what_the_hub_s_client_writes_is_carried_on(tmp_path: Path) -> None:
    data = ModelCardData(
        language=["en", "pt-BR"], license="other", license_name="llama3.2", license_link="https://w.org/a/LICENSE", tags=["x"]
    )
    ModelCard(f"---\n{data}\n---\n# A model\n").save(tmp_path / "README.md")
    assert carried(str(tmp_path)) == {
        "license": "other", "license_name": "llama3.2", "license_link": "https://w.org/a/LICENSE", "language": ["en", "pt-BR"],
    }  # fmt: skip
    assert carried(write(tmp_path, "---\nlanguage: de\nlicense: mit\n---\n")) == {"license": "mit", "language": ["de"]}


@pytest.mark.parametrize(
    "text",
    [
        "", "# no metadata", "---\n", "---\nlicense: [a\n---\n", "---\n- a\n---\n", "---\nlicense: 3\nlanguage: {a: b}\n---\n",
        f"---\nlicense: {HOSTILE!r}\nlanguage: ['{'x' * 99}', 3, null]\nlicense_link: 'javascript:x'\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['touch x']\n---\n", "---\n" + "[" * 5000 + "\n---\n",
        f"---\nlicense: mit\nx: {'a' * 70000}\n---\n",
    ],
)  # fmt: skip
def test_what_is_no_licence_and_no_language_is_left_out(text: str, tmp_path: Path) -> None:
    assert carried(write(tmp_path, text)) == {}


@pytest.mark.parametrize("source", ["", "nowhere", "~nobody/model", "who/what-is-not-cached", "a\0b", "x" * 5000, HOSTILE])
def test_a_source_without_a_card_carries_nothing(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert carried(source) == {}


def test_the_card_of_a_hub_model_is_found_in_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--who--what"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert carried("who/what") == {}
    write(repository / "snapshots" / "abc", "---\nlicense: apache-2.0\n---\n")
    assert carried("who/what") == {"license": "apache-2.0"}
