"""machine/interrupts.py: the first signal raises, the others leave its clean-up alone. Property."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from compresskit.machine.interrupts import RETRY_SECONDS, STOPPING, Interrupts


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    found = Interrupts()
    found.listen(to_the_end=False)
    yield found
    found.restore()


@pytest.mark.parametrize("first", STOPPING)
def test_only_the_first_signal_raises(interrupts: Interrupts, first: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(first)
    for each in STOPPING:
        signal.raise_signal(each)
    assert interrupts.received == [first, *STOPPING]


def test_no_signal_raises_once_the_outcome_is_certain(interrupts: Interrupts) -> None:
    interrupts.settle(0)
    signal.raise_signal(signal.SIGTERM)
    assert interrupts.received == [signal.SIGTERM]


def test_what_was_ignored_stays_ignored_and_what_was_handled_is_given_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handler = signal.getsignal(signal.SIGINT)
    try:
        found = Interrupts()
        found.listen(to_the_end=False)
        signal.raise_signal(signal.SIGHUP)
        assert found.received == []
        assert signal.getsignal(signal.SIGINT) != handler
        found.restore()
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_a_finalizer_swallows_is_raised_again(interrupts: Interrupts) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        Finalized()
        gc.collect()
        time.sleep(100 * RETRY_SECONDS)


def test_a_signal_long_after_the_first_ends_a_process_that_does_not_end_itself() -> None:
    script = (
        "import signal, compresskit.machine.interrupts as i\ni.PATIENCE_SECONDS = 0\nfound = i.Interrupts()\n"
        "found.listen(True)\ntry: signal.raise_signal(signal.SIGTERM)\nexcept KeyboardInterrupt: pass\n"
        "signal.raise_signal(signal.SIGTERM)\nprint('goes on')"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (130, "")
    assert finished.stderr == "compresskit: error: interrupted again, ended at once\n"
