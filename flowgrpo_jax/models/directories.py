"""Model directories: where a model of the package, of the disk or of the hub lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

BUNDLED = ("shapes", "signs")  # the models of the worlds of the package, by their names
KNOB = "config.model.path (of generate: --model)"  # what errors say to set


def resolve(model: str | Path, *, folders: Sequence[str] = (), configs: bool = False) -> Path:
    """Return a model's directory from a path, the name of a model of the package, or a hub id.

    Args:
      folders: the components to download of a model on the hub, beside its model_index.json.
      configs: download no weights of them, but their configs alone.

    Raises FileNotFoundError that says what to do when none of them leads to a model.
    """
    if model in BUNDLED:
        return _bundled(str(model))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(model).count("/") != 1 or str(model).startswith("."):
        raise FileNotFoundError(
            f"model directory {model!r} does not exist: set {KNOB} to a directory in"
            f" diffusers layout, a hub id (organisation/name) or one of {', '.join(BUNDLED)}"
        )
    from huggingface_hub import snapshot_download

    # Folders by name: the hub repository holds the same weights a second time in other layouts.
    kinds = "*config.json" if configs else "*"
    wanted = ["model_index.json", *(f"{folder}/{kinds}" for folder in folders)]
    twice = ["*.fp16.safetensors", "*.fp16-*.safetensors", "*.bin", "*.index.fp16.json"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted, ignore_patterns=twice))
    except Exception as error:
        raise FileNotFoundError(_no_download(str(model), error)) from error


def on_this_machine(model: str) -> Path | None:
    """The directory of a model if it is here, in the cache of the hub for one; else None."""
    if model in BUNDLED:
        return _bundled(model)
    if (path := Path(model).expanduser()).is_dir():
        return path
    if model.count("/") != 1 or path.is_absolute():
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(model, "transformer/config.json")
    return Path(file).parent.parent if isinstance(file, str) else None


def _bundled(name: str) -> Path:
    directory = Path(__file__).parent.parent / "worlds" / name / "model"
    if not (directory / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the model {name!r} is not in this copy of the package: make it with"
            f" `python -m flowgrpo_jax.worlds.{name}.pretrain --workdir DIR --out {directory}`,"
            f" or set {KNOB} to a directory that it has written"
        )
    return directory


def _no_download(model: str, error: Exception) -> str:
    """Return the message for a failed download of a model from the hub, with the remedy."""
    from huggingface_hub import errors

    page, local = f"https://huggingface.co/{model}", f"set {KNOB} to a local copy"
    copy = f"`hf download {model} --local-dir DIR` on a machine that can, then {local}"
    match error:
        case errors.GatedRepoError():
            problem, fix = (
                "is gated, and this account has not been given its weights",
                f"accept the licence at {page}, log in here with `hf auth login` (or set HF_TOKEN)"
                f" and start again; or {local}",
            )
        case errors.RepositoryNotFoundError():
            problem, fix = (
                "is not on the hub, or is private",
                f"check the name at {page}; for a private one log in with `hf auth login`; or"
                f" {local}",
            )
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
            problem, fix = (
                "is neither a local directory nor in the cache, and the hub cannot be reached",
                f"go online (and unset HF_HUB_OFFLINE), or {copy}",
            )
        case _:
            problem, fix = (
                "is no local directory and could not be downloaded",
                f"for gated weights accept the licence at {page} and log in with `hf auth login`;"
                f" or {copy}",
            )
    return f"model {model!r} {problem}: {fix}. The hub said: {error}"
