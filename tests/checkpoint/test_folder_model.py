"""checkpoint/folder.py: against a model of a folder, under kills at any call of the system. Property."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from dying_children import dying_at
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from compresskit.checkpoint.folder import commit, discard, held, settle, start_result, whole_folder
from compresskit.checkpoint.work_folder import WorkFolder, is_ours
from compresskit.errors import CompresskitError


class Folder(RuleBasedStateMachine):
    """OUT and what lies beside it, and what they must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.out = self.root / "out"
        self.allowed: set[str | None] = {None}
        """What OUT may hold: a version, "foreign", or None for no OUT. Two versions after a kill, until somebody looks."""
        self.version = 0
        warnings.simplefilter("error")

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def content(self) -> str | None:
        if not self.out.exists():
            return None
        return (self.out / "content").read_text() if is_ours(self.out) else "foreign"

    def write(self, content: str, overwrite: bool) -> None:
        with whole_folder(self.out, overwrite) as partial:
            (partial / "content").write_text(content)
            (partial / "compresskit.json").write_text(json.dumps({"tool": "compresskit", "content": content}))

    @rule(overwrite=st.booleans())
    def finish(self, overwrite: bool) -> None:
        self.version += 1
        before = self.content()
        try:
            self.write(str(self.version), overwrite)
            assert before is None or (overwrite and before != "foreign")
            self.allowed = {str(self.version)}
        except CompresskitError:
            assert before is not None and (not overwrite or before == "foreign")
            shutil.rmtree(WorkFolder(self.out).path, ignore_errors=True)  # where it told the user to look for the result

    @rule(overwrite=st.booleans(), step=st.integers(1, 32))
    def die(self, overwrite: bool, step: int) -> None:
        self.version += 1
        before = self.content()
        dying_at(step, lambda: self.write(str(self.version), overwrite))
        may_change = before is None or (overwrite and before != "foreign")
        self.allowed = {before, str(self.version)} if may_change else {before}

    @rule()
    def stop_with_finished_work(self) -> None:
        """Unfinished work, which settling keeps and the next start forgets."""
        try:
            with held(self.out, overwrite=True) as work:
                start_result(work)
                work.progress.write_text("{}")
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            settle(self.out)
            assert WorkFolder(self.out).progress.is_file()

    @rule(how=st.sampled_from([settle, discard]))
    def tidy(self, how: Callable[[Path], None]) -> None:
        how(self.out)

    @precondition(lambda self: not self.out.exists())
    @rule()
    def somebody_makes_it(self) -> None:
        self.out.mkdir()
        (self.out / "sea.jpg").touch()
        self.allowed = {"foreign"}

    @precondition(lambda self: self.out.exists())
    @rule()
    def somebody_removes_it(self) -> None:
        shutil.rmtree(self.out)
        self.allowed = {None}

    @invariant()
    def out_is_one_of_what_it_may_be(self) -> None:
        found = self.content()
        assert found in self.allowed
        if found not in (None, "foreign"):
            assert json.loads((self.out / "compresskit.json").read_text())["content"] == found
        self.allowed = {found}

    @invariant()
    def nothing_else_lies_beside_it(self) -> None:
        assert {path.name for path in self.root.iterdir()} <= {"out", "out.partial"}


TestFolder = Folder.TestCase
TestFolder.settings = settings(max_examples=10, stateful_step_count=12, deadline=None)


def test_a_result_that_found_its_name_taken_can_be_named_by_hand(tmp_path: Path) -> None:
    """What the message says: move it to where you want it."""
    out = tmp_path / "out"
    try:
        with held(out, overwrite=False) as work:
            (start_result(work) / "compresskit.json").write_text('{"tool": "compresskit"}')
            out.mkdir()
            (out / "sea.jpg").touch()
            commit(work)
    except CompresskitError:
        WorkFolder(out).result.rename(tmp_path / "mine")
    assert is_ours(tmp_path / "mine")
    discard(out)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}
