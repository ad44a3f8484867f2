"""The command line: from the first signal that counts to the exit code.

Standard output carries only the result; everything else goes to standard error.

This module imports little, and `main` listens to signals before it imports more. From there on Ctrl-C, SIGTERM and SIGHUP
end with one line and exit code 130. Before, while Python starts, they do what they do to any Python program.
"""

from __future__ import annotations

import gc
import os
import sys

from compresskit.cli.streams import guard, log, silence, speak
from compresskit.machine.interrupts import INTERRUPTED, Interrupts
from compresskit.machine.libraries import let_threads_sleep


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code. `arguments`: of this process if None."""
    interrupts = Interrupts()
    try:
        interrupts.listen(to_the_end=arguments is None)
        if arguments is None:
            guard()
            let_threads_sleep()
            gc.freeze()  # what has been imported stays, and so will what comes; see import_networks
        code = _run(sys.argv[1:] if arguments is None else arguments, interrupts)
        interrupts.settle(code)
    except KeyboardInterrupt:
        interrupts.settle(code := INTERRUPTED)
        from compresskit import distributed

        if distributed.is_first_to_fail():
            _speak()
            log("compresskit: error: interrupted")
    finally:
        if arguments is None:
            gc.freeze()  # or Python looks through all objects again before it ends
        else:
            interrupts.restore()
    sys.exit(code)


def _run(arguments: list[str], interrupts: Interrupts) -> int:
    """Import, run, and say what went wrong; the exit code."""
    import warnings

    from compresskit import distributed
    from compresskit.cli.failures import described

    with warnings.catch_warnings():
        _show_storage_warnings()
        try:
            from compresskit.cli.application import called

            with distributed.joined():
                if not distributed.is_first():
                    silence()
                code = called(arguments, completing=any(name.startswith("_COMPRESSKIT") for name in os.environ))
                sys.stdout.flush()
        except Exception as error:
            message, code = described(error)
            if interrupts.received and code != INTERRUPTED:  # a library turned the interrupt into its own error
                message, code = f"interrupted ({message})", INTERRUPTED
            interrupts.settle(code)
            if distributed.is_first_to_fail():
                _speak()
                _say(message, error if "--verbose" in arguments else None)
    return code


def _speak() -> None:
    """Let a rank that was silent say why the run ends."""
    from compresskit import distributed

    if distributed.asked_count() > 1:
        speak()


def _say(message: str, error: Exception | None) -> None:
    if error is not None:
        import traceback

        log("".join(traceback.format_exception(error)).rstrip())
    if message:
        log(message if message.startswith("Usage:") else f"compresskit: error: {message}")


def _show_storage_warnings() -> None:
    """Print every StorageWarning as one line, even with --quiet; other warnings as Python does."""
    import warnings

    from compresskit.cli.streams import one_line
    from compresskit.errors import StorageWarning

    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: object) -> None:
        if issubclass(category, StorageWarning):
            log(f"compresskit: warning: {one_line(str(message))}")
        else:
            usual(message, category, *place)  # type: ignore[arg-type]

    warnings.simplefilter("always", StorageWarning)
    warnings.showwarning = show  # type: ignore[assignment]
