"""Injects faults of the disk and signals into whole commands, and judges what they leave.

Each trial copies a template folder, runs a command in it with one fault at one call of the C library that touches a file
below the folder (fault_shim.c), judges, runs the command again without a fault, and judges again:

1. OUT is the old whole folder, or none, or the new whole one.
2. Nothing else in the folder has changed.
3. Success means that OUT is the new one. A failure is one line that names a file; an interruption is one line.
4. The second run (with --resume where the command has it) succeeds, OUT is the new one, and nothing is left beside it.
5. The second run finishes no block again that the first one had finished, and a run repeats no finished step.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.work_folder import WorkFolder

HERE = Path(__file__).parent
FAULTS: tuple[tuple[str, int], ...] = (
    ("fail", errno.EIO), ("fail", errno.ENOSPC), ("fail from here", errno.ENOSPC), ("short write", 0),
    ("signal before", signal.SIGKILL), ("signal after", signal.SIGKILL), ("signal after", signal.SIGTERM),
    ("signal after", signal.SIGINT), ("signal after", signal.SIGHUP),
)  # fmt: skip
"""(kind, errno or signal)."""
SMALL = "--samples 6 --sequence-length 32 --calibration text.txt --quiet"
GOOD = (0, 3)
"""3: everything is written, and the tiny random model is found to know nothing."""
VOLATILE = ("compresskit.json", "recover.json")
"""Files that hold times."""
WORDS = ("one", "two", "three", "four", "five", "six", "seven")
RECIPE = """
source: {here}/model
defaults: {{calibration: "{here}/text.txt", samples: 6, sequence_length: 32}}
steps:
  - {{prune: cfsp, sparsity: 0.25, round_to: 8}}
  - {{quantize: rtn, bits: 4, group_size: 8}}
  - {{evaluate: , against: source, data: "{here}/text.txt", windows: 2, sequence_length: 32}}
"""


@dataclass(frozen=True)
class Command:
    """A command to be disturbed."""

    line: str
    """Relative paths are those of the template folder; the output is `out`."""
    other: str = ""
    """Flags that give the older OUT other weights."""
    resumes: bool = True

    @property
    def arguments(self) -> list[str]:
        """The words of the line."""
        return self.line.split()

    @property
    def is_run(self) -> bool:
        """Whether it is a run of a recipe."""
        return self.line.startswith("run ")


COMMANDS = {
    "prune": Command(f"prune cfsp model out --sparsity 0.25 --round-to 8 {SMALL}", "--sparsity 0.5"),
    "rtn": Command(f"quantize rtn model out --bits 4 --group-size 8 {SMALL}", "--bits 8"),
    "gptq": Command(f"quantize gptq model out --bits 3 --group-size 8 --max-shard-size 20KB {SMALL}", "--bits 8"),
    "apiq": Command(f"quantize apiq model out --bits 3 --group-size 8 --epochs 1 {SMALL}", "--bits 4"),
    "eora": Command(f"compensate eora pruned out --original model --rank 2 {SMALL}", "--rank 3"),
    "merge-eora": Command(f"compensate eora pruned out --original model --rank 2 --merge {SMALL}", "--rank 3"),
    "recover": Command(
        "recover random pruned out --original model --data data.jsonl --steps 4 --batch-size 2 --checkpoint-steps 2 --rank 2 "
        "--sequence-length 256 --quiet",
        "--rank 3",
    ),
    "compeft": Command("quantize compeft adapter out --quiet", "--density 0.5", resumes=False),
    "expand": Command("expand ternary out --quiet", resumes=False),
    "merge": Command("merge average adapter adapter2 out --quiet", "--weights 1 --weights 2", resumes=False),
    "run": Command("run recipe.yaml out --json --quiet", resumes=False),
}


def compiled_shim(folder: Path) -> Path | None:
    """Compile the shim; None where there is no compiler for it, or no preloading."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    shim = folder / "fault_shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(HERE / "fault_shim.c"), "-ldl"], check=True)
    return shim


@dataclass
class Nursery:
    """A process that runs commands in forks of itself (fault_nursery.py)."""

    shim: Path
    cache: Path
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        environment = {
            **os.environ, "LD_PRELOAD": str(self.shim), "OMP_NUM_THREADS": "1", "COMPRESSKIT_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_nursery.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def run(self, arguments: list[str], log: Path, fault: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run a command line, with a fault if asked."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"arguments": arguments, "log": str(log), "fault": fault}) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


def tree(folder: Path, without: tuple[Path, ...] = ()) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path in it; "" for folders, the target for links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if any(path == each or each in path.parents for each in without):
            continue
        name = str(path.relative_to(folder))
        found[name] = str(path.readlink()) if path.is_symlink() else sha256(path) if path.is_file() else ""
    return found


def lasting(files: dict[str, str]) -> dict[str, str]:
    """The files that are the same whenever the same request is run."""
    return {name: digest for name, digest in files.items() if Path(name).name not in VOLATILE}


@dataclass
class Room:
    """A place for trials: templates by state of OUT, and the folder in which every trial happens."""

    root: Path
    nursery: Nursery

    @property
    def trial(self) -> Path:
        """The folder of the trial, always the same one, because results name it."""
        return self.root / "trial"

    def prepare(self) -> None:
        """Make the template: models, adapters, texts, and things that are nobody's business."""
        from tiny_models import make_adapter, make_model

        trial = self.trial
        trial.mkdir(parents=True)
        make_model(trial / "model", "llama")
        (trial / "text.txt").write_text("the quick brown fox jumps over a lazy dog " * 1000)
        (trial / "recipe.yaml").write_text(RECIPE.format(here=trial))
        rows = [
            {"instruction": f"say {word}", "output": word * 3} for word in ["one", "two", "three", "four", "five", "six", "seven"]
        ]
        (trial / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (trial / "photographs").mkdir()
        (trial / "photographs" / "sea.jpg").write_bytes(b"a photograph")
        (trial / "out.notes").write_text("notes")
        make_adapter(trial / "adapter", trial / "model", 1)
        make_adapter(trial / "adapter2", trial / "model", 2)
        self.undisturbed(f"prune cfsp model pruned --sparsity 0.25 --round-to 8 {SMALL}".split())
        self.undisturbed(["quantize", "compeft", "adapter", "ternary", "--quiet"])
        trial.rename(self.root / "template")

    def fresh(self, template: Path) -> None:
        """Start a trial from a template."""
        shutil.rmtree(self.trial, ignore_errors=True)
        shutil.copytree(template, self.trial, symlinks=True)

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """The arguments with full paths."""
        there = {path.name for path in (self.root / "template").iterdir()} if (self.root / "template").exists() else set()
        there |= {path.name for path in self.trial.iterdir()} | {"out", "pruned", "ternary"}
        return [str(self.trial / each) if each in there else each for each in arguments]

    def run(self, arguments: Sequence[str], fault: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run a command in the trial's folder; adds what it printed."""
        log = self.root / "log"
        (self.root / "log.fault").unlink(missing_ok=True)
        found = self.nursery.run(self.arguments(arguments), log, fault)
        return found | {"printed": log.read_text(errors="replace")}

    def undisturbed(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Run a command that must succeed."""
        found = self.run(arguments)
        assert found["code"] in GOOD, f"{' '.join(arguments)}: {found}"
        return found


@dataclass
class Scene:
    """A command, and what is there before it: nothing, or an older OUT that is to be replaced."""

    room: Room
    name: str
    overwrites: bool
    command: Command = field(init=False)
    template: Path = field(init=False)
    result: dict[str, str] = field(init=False)
    """The lasting files of an undisturbed OUT."""
    before: dict[str, str] = field(init=False)
    """All files of the older OUT."""
    blocks: int = field(init=False)
    calls: int = field(init=False)
    """Number of calls that can be disturbed."""

    def __post_init__(self) -> None:
        room, self.command = self.room, COMMANDS[self.name]
        self.template = room.root / f"{self.name}-{'old' if self.overwrites else 'new'}"
        room.fresh(room.root / "template")
        if self.overwrites:
            room.undisturbed([*self.command.arguments, *self.command.other.split()])
        shutil.copytree(room.trial, self.template, symlinks=True)
        self.before = tree(room.trial / "out") if self.overwrites else {}
        count = room.run(self.flags, self._fault(-1, "count", 0))
        assert count["code"] in GOOD, count
        self.calls, self.blocks = count["calls"], count["blocks"]
        self.result = lasting(tree(room.trial / "out"))

    @property
    def flags(self) -> list[str]:
        """The command's arguments."""
        return [*self.command.arguments, *(("--overwrite",) if self.overwrites else ())]

    def _fault(self, call: int, kind: str, number: int) -> dict[str, Any]:
        return {"below": str(self.room.trial) + "/", "call": call, "kind": kind, "number": int(number)}

    def trial(self, call: int, kind: str, number: int) -> list[str]:
        """One fault; returns the invariants that it broke."""
        room, out = self.room, self.room.trial / "out"
        room.fresh(self.template)
        first = room.run(self.flags, self._fault(call, kind, number))
        where = (room.root / "log.fault").read_text().strip() if (room.root / "log.fault").exists() else "not reached"
        broken = [f"first run: {each}" for each in self._judge_message(first, kind)]
        broken += [f"first run: {each}" for each in (self._judge_run if self.command.is_run else self._judge_out)(first)]
        done, finished = self._done(), self._finished_steps()
        broken += self._judge_second(done, finished, is_there=self._is_new(out))
        title = f"{self.name}{' --overwrite' if self.overwrites else ''}, {kind} {number} at call {where}"
        said = first["printed"].strip()[-300:]
        return [f"{title}: {each} [exit {first['code']}: {said}]" for each in broken]

    def _is_new(self, out: Path) -> bool:
        return out.exists() and lasting(tree(out)) == self.result and (out / "compresskit.json").is_file()

    def _others(self) -> dict[str, str]:
        trial = self.room.trial
        return tree(trial, (trial / "out", trial / "out.partial"))

    def _judge_message(self, run: dict[str, Any], kind: str) -> Iterator[str]:
        code, lines = run["code"], [line for line in run["printed"].splitlines() if line.strip()]
        errors = [line for line in lines if not line.startswith("compresskit: warning:")]
        if code == -signal.SIGKILL or code in GOOD:
            return
        if any("Traceback" in line for line in lines):
            yield "a traceback"
        if len(errors) != 1 or not errors[0].startswith("compresskit: error:"):
            yield f"not one line of error: {errors}"
        if kind.startswith("signal") and code != 130:
            yield f"exit {code} after a signal"
        if not kind.startswith("signal") and (code not in (1, 2) or str(self.room.root) not in " ".join(errors)):
            yield "no file is named"

    def _judge_out(self, run: dict[str, Any]) -> Iterator[str]:
        out = self.room.trial / "out"
        is_new = self._is_new(out)
        if not is_new and (tree(out) if out.exists() else {}) != self.before:
            yield "OUT is neither the old one nor the new one"
        if run["code"] in GOOD and not is_new:
            yield "success without the new OUT"
        if self._others() != tree(self.template, (self.template / "out",)):
            yield "something else has changed"

    def _judge_run(self, run: dict[str, Any]) -> Iterator[str]:
        out = self.room.trial / "out"
        for step in ("prune", "quantize"):
            folder = out / step
            new = {name: digest for name, digest in self.result.items() if name.startswith(step + "/")}
            found = {name: digest for name, digest in lasting(tree(out)).items() if name.startswith(step + "/")}
            if folder.exists() and not _weights(new).items() <= found.items():
                yield f"step {step} is there and is not whole"
        if run["code"] in GOOD and _weights(lasting(tree(out))) != _weights(self.result):
            yield "success without the result"
        if self._others() != tree(self.template, (self.template / "out",)):
            yield "something else has changed"

    def _done(self) -> int:
        progress = WorkFolder(self.room.trial / "out").progress
        return len(json.loads(progress.read_text())["blocks"]) if progress.is_file() else 0

    def _finished_steps(self) -> list[str]:
        state = self.room.trial / "out" / "run.json"
        if not self.command.is_run or not state.is_file():
            return []
        return [name for name, step in json.loads(state.read_text())["steps"].items() if step["status"] == "done"]

    def _judge_second(self, done: int, finished: list[str], is_there: bool) -> Iterator[str]:
        room, out = self.room, self.room.trial / "out"
        flags = list(self.command.arguments) if self.command.is_run else self.flags
        if is_there and not self.command.resumes and not self.overwrites and not self.command.is_run:
            return  # it is there, and would be refused
        second = room.run([*flags, *(("--resume",) if self.command.resumes else ())])
        if second["code"] not in GOOD:
            yield f"second run: exit {second['code']}: {second['printed'].strip()[-400:]}"
            return
        if self.command.is_run:
            ran = json.loads(second["printed"].strip().splitlines()[-1])["ran"]
            if set(ran) & set(finished):
                yield f"second run: repeats finished steps {sorted(set(ran) & set(finished))}"
            if _weights(lasting(tree(out))) != _weights(self.result):
                yield "second run: other weights"
        else:
            if not self._is_new(out):
                yield "second run: OUT is not the new one"
            expected = 0 if is_there and self.command.resumes else self.blocks - done
            if second["blocks"] > expected:
                yield f"second run: finished {second['blocks']} blocks, {expected} were missing"
        if (left := set(tree(room.trial, (out,))) ^ set(tree(self.template, (self.template / "out",)))) or (
            left := {name for name in tree(out) if name.endswith((".partial", ".new", ".lock")) and name != ".lock"}
        ):
            yield f"second run: leaves {sorted(left)[:5]}"


def _weights(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def faults(scene: Scene, count: int, seed: int) -> list[tuple[int, str, int]]:
    """Draw faults of a scene: every call once if that is fewer than `count`, with kinds in turn."""
    generator = random.Random(seed)
    calls = list(range(scene.calls))
    generator.shuffle(calls)
    while len(calls) < count:
        calls += calls
    kinds = list(FAULTS)
    generator.shuffle(kinds)
    return [(call, *kinds[position % len(kinds)]) for position, call in enumerate(calls[:count])]
