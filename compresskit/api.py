"""Stages and recipes from Python: `from compresskit import prune, quantize, search, compensate, recover, evaluate, export, run`.

Settings are the command line's flags, as keyword arguments. Results are the dictionaries that `--json` prints; errors are
the classes of `compresskit.errors`. A progress bar is drawn on a terminal unless quiet=True. The import does not load
torch.

    from compresskit import prune, evaluate
    prune("demo:smollm2-135m", "small", "cfsp", sparsity=0.2)
    evaluate("small", against="demo:smollm2-135m")["perplexity_ratio"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compresskit.errors import RequestError, near_miss
from compresskit.methods import METHODS, method_class, options_class, runner


def prune(source: str | Path, out: str | Path, method: str = "cfsp", quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Remove FFN channels of SOURCE and write to the folder OUT; for settings see `compresskit prune METHOD --help`.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; OUT is then unchanged.
    """
    return stage("prune", source, out, method, quiet, settings)


def quantize(source: str | Path, out: str | Path, method: str = "apiq", quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Quantise the weights of SOURCE into the folder OUT; for settings see `compresskit quantize METHOD --help`.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; OUT is then unchanged.
    """
    return stage("quantize", source, out, method, quiet, settings)


def compensate(source: str | Path, out: str | Path, method: str = "eora", quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Repair the compressed SOURCE towards `original` by a low-rank adapter in OUT, or by a checkpoint with merge=True.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; OUT is then unchanged.
    """
    return stage("compensate", source, out, method, quiet, settings)


def recover(source: str | Path, out: str | Path, method: str = "paser", quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Fine-tune the compressed SOURCE towards `original` on selected `data`; see `compresskit recover METHOD --help`.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; OUT is then unchanged.
    """
    return stage("recover", source, out, method, quiet, settings)


def export(source: str | Path, out: str | Path, method: str = "gguf", quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Write SOURCE, a checkpoint or an adapter, as the one file OUT; for settings see `compresskit export METHOD --help`.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; OUT is then unchanged.
    """
    return stage("export", source, out, method, quiet, settings)


def search(source: str | Path, out: str | Path, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Choose bits and groups of every part of SOURCE for bits=..., bytes=... or max_loss=..., and store it in the folder OUT.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, KL divergences in nats per token.

    Raises:
        CompresskitError: see errors.py for the kinds; OUT is then unchanged.
    """
    return _single("search", source, out, quiet, settings)


def evaluate(source: str | Path, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Measure SOURCE, with against=... compared with the original; for settings see `compresskit evaluate --help`.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, KL divergences in nats per token. It includes failed gates, which
        are not raised.

    Raises:
        CompresskitError: see errors.py for the kinds.
    """
    _check_settings("evaluate", settings, [options_class("evaluate", "")])
    options = _built(options_class("evaluate", ""), settings)
    return runner("evaluate", "")(str(source), options, quiet=quiet)


def pack(source: str | Path, out: str | Path, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Pack the folder SOURCE without loss into the one file OUT, .ckz; for settings see `compresskit pack --help`.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; OUT is then unchanged.
    """
    return _single("pack", source, out, quiet, settings)


def expand(source: str | Path, out: str | Path, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Make the folder OUT of a packed file, or of a ternary task vector; for settings see `compresskit expand --help`.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; OUT is then unchanged.
    """
    return _single("expand", source, out, quiet, settings)


def _single(name: str, source: str | Path, out: str | Path, quiet: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run a stage that has no methods."""
    options_type = options_class(name, "")
    _check_settings(name, settings, [options_type])
    return runner(name, "")(str(source), Path(out), _built(options_type, settings), quiet=quiet)


def register() -> None:
    """Let transformers load ragged checkpoints without `trust_remote_code` (see models/ragged.py)."""
    from compresskit.models.ragged import register as register_classes

    register_classes()


def run(
    recipe: str | Path,
    out: str | Path,
    variables: Mapping[str, str] | None = None,
    first: str | None = None,
    say: Callable[[str], None] | None = print,
    on: str | None = None,
) -> dict[str, Any]:
    """Run a recipe (a YAML file or the name of a shipped one) in the folder OUT, and write report.html there.

    `variables` are the values of `--set` and `--source`. `first` redoes this step and all after it. `say` receives one line
    per step. `on` is `ray` or `ray:ADDRESS`, for the steps to run on a cluster.

    Returns:
        The dictionary that `--json` prints. It includes failed gates ("passed", "gates"), which are not raised.

    Raises:
        CompresskitError: see errors.py for the kinds; the same call resumes after the last finished step.
    """
    from compresskit.recipe.reading import load
    from compresskit.recipe.run import Wanted
    from compresskit.recipe.run import run as run_recipe
    from compresskit.recipe.shipped import find
    from compresskit.report.page import write_reports

    result = run_recipe(load(find(str(recipe)), variables), Path(out), Wanted(first=first, on=on), say or (lambda line: None))
    write_reports(Path(out), result)
    return result


def stage(
    name: str, source: str | Path, out: str | Path, method: str, quiet: bool, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Run one stage.

    Returns:
        The dictionary that `--json` prints.

    Raises:
        RequestError: the stage, method or a setting does not exist; raised before any work.
        CompresskitError: the stage's own errors, see errors.py for the kinds.
    """
    if name not in METHODS:
        raise RequestError(f"{name}: this installation has no such stage; there are {', '.join(METHODS)}")
    method_type, options_type = method_class(name, method), options_class(name, method)
    _check_settings(f"{name} {method}", settings, [method_type, options_type])
    built = _built(method_type, settings), _built(options_type, settings)
    return runner(name, method)(built[0], str(source), Path(out), built[1], quiet=quiet)


def _check_settings(title: str, settings: Mapping[str, Any], types: list[type[Any]]) -> None:
    known = [field for each in types for field in each.model_fields]
    for name in settings:
        if name not in known:
            raise RequestError(f"{title}: no setting {name!r};{near_miss(name, known)} There are {', '.join(known)}")


def _built(model: type[Any], settings: Mapping[str, Any]) -> Any:
    from pydantic import ValidationError

    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    try:
        return model(**{name: plain[name] for name in model.model_fields if name in plain})
    except ValidationError as error:
        fault = error.errors()[0]
        raise RequestError(f"{fault['loc'][0]}: {fault['msg'][0].lower()}{fault['msg'][1:]}, not {fault['input']!r}") from error
