"""cli/streams.py: standard streams that are closed, full or a terminal. End to end."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from compresskit.cli.streams import escaped, log, one_line

TOOL = f"{sys.executable} -m compresskit"


def shell(line: str) -> tuple[int, str, str]:
    """Run a line of bash: (exit code of its first command, standard output, standard error)."""
    command = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize("command", ["methods --json", "--version", "prune cfsp --help"])
@pytest.mark.parametrize(("where", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")])
def test_a_result_that_cannot_be_printed_is_an_error_of_one_line(command: str, where: str, why: str) -> None:
    assert shell(f"{TOOL} {command} {where}") == (1, "", f"compresskit: error: standard output: {why}\n")


@pytest.mark.parametrize("command", ["methods --json", "--version", "schema"])
def test_a_reader_that_has_gone_ends_the_command_in_silence(command: str) -> None:
    assert shell(f"(sleep 0.1; exec {TOOL} {command}) | true") == (141, "", "")


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2>&1 >&- | true", ">/dev/full 2>/dev/full", ">&- 2>&- <&-"])
def test_a_refusal_that_cannot_be_printed_keeps_its_exit_code(where: str, tmp_path: Path) -> None:
    assert shell(f"{TOOL} prune cfsp {tmp_path / 'none'} {tmp_path / 'out'} {where}") == (2, "", "")


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "<&-"])
def test_a_result_does_not_depend_on_the_other_streams(where: str) -> None:
    code, out, _ = shell(f"{TOOL} methods --json {where}")
    assert code == 0
    assert "prune" in json.loads(out)


def test_a_file_does_not_take_the_number_of_a_closed_stream() -> None:
    script = "from compresskit.cli.streams import guard; guard(); import sys; sys.exit(open(sys.argv[1]).fileno())"
    assert shell(f"{sys.executable} -c '{script}' /dev/null <&- >&- 2>&-")[0] > 2


def test_log_outlives_a_closed_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
    log("lost")
    monkeypatch.setattr(sys, "stderr", None)
    log("lost")


def test_a_file_name_moves_no_cursor(tmp_path: Path) -> None:
    name = str(tmp_path / "a\x1b[2J\r\nb")
    command = [sys.executable, "-m", "compresskit", "inspect", name]
    code, _, err = (found := subprocess.run(command, capture_output=True, text=True, check=False)).returncode, "", found.stderr
    assert code == 2
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    assert "a\\x1b[2J\\r\\nb" in err


@pytest.mark.parametrize("text", ["plain", "two\nlines", "\x1b]0;title\x07", "\x9b31m", "\u202eright to left", "\udcff"])
def test_what_is_escaped_is_printable(text: str) -> None:
    assert escaped(text).replace("\n", "").isprintable()
    assert one_line(text).isprintable()


def test_a_terminal_is_shown_a_result_without_control_characters() -> None:
    leader, follower = pty.openpty()
    script = "from compresskit.cli.streams import guard, show; guard(); show('a\\x1b[2Jb')"
    subprocess.run([sys.executable, "-c", script], stdout=follower, check=True)
    assert os.read(leader, 100) == b"a\\x1b[2Jb\r\n"
    os.close(leader)
    os.close(follower)


def test_a_path_that_is_no_text_is_printed_byte_for_byte() -> None:
    script = "from compresskit.cli.streams import guard, show; guard(); show('a\\udcffb')"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"a\xffb\n"
