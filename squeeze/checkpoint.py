"""Is this a checkpoint that can be opened and trusted? Asked of the files, before any weight is read.

Transformers would load a truncated shard in part, fill missing weights with random numbers and run a checkpoint's own code when
asked to; each of these is an error here that names the file and the mend.
"""

import json
import pickle  # only for the name of its error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from squeeze.errors import ModelError


def check_config(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """The content of config.json; ModelError where it is broken, wants to run code, or is no plain float model's."""
    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}.") from error
    if "auto_map" in raw and not trust_remote_code:
        raise ModelError(
            f"{folder} asks to run Python code of its own (auto_map). Read that code, then set model.trust_remote_code: true."
        )
    if raw.get("quantization_config") is not None:
        raise ModelError(
            f"{folder} is already quantized ({raw['quantization_config'].get('quant_method', 'unknown method')}). "
            "Give squeeze the float checkpoint it was made from."
        )
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} is a LoRA adapter, not a whole model. Merge it into its base model first.")
    return dict(raw)


def check_weight_files(folder: Path, *, allow_pickle: bool) -> None:
    """Every safetensors header is opened, so that a truncated file is named; pickles are refused without leave."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.exists():
        try:
            named = {str(v) for v in json.loads(index.read_text("utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: {error!r}.") from error
        absent = sorted(n for n in named if not (folder / n).exists())
        if absent:
            raise ModelError(f"{index} names {absent[0]}, which is not there. Download the checkpoint again.")
    if not files:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if pickles and not allow_pickle:
            raise ModelError(
                f"{folder} has only pickled weights ({pickles[0]}), which can run code. Convert them to safetensors, "
                "or set model.allow_pickle: true (they are then read with weights_only=True)."
            )
        if not pickles:
            raise ModelError(f"{folder} has a config.json but no *.safetensors.")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is truncated or corrupt ({error}). Download it again.") from error
    _check_memory(folder, sum(f.stat().st_size for f in files))


def _check_memory(folder: Path, weight_bytes: int) -> None:
    import psutil

    free = psutil.virtual_memory().available
    if weight_bytes > free:
        raise ModelError(
            f"{folder} has {weight_bytes / 1e9:.1f} GB of weights; {free / 1e9:.1f} GB of memory are free."
        )


def check_missing(location: Path | str, info: dict[str, Any], task: str) -> None:
    missing = sorted(
        key for key in info.get("missing_keys", ()) if "pooler." not in key or task == "text-classification"
    )
    if missing:
        raise ModelError(
            f"{location} lacks {len(missing)} weights that {task} needs (first: {missing[0]}). They would be random numbers; "
            "fine-tune the model for this task first, or name another task."
        )
    mismatched = info.get("mismatched_keys") or ()
    if mismatched:
        raise ModelError(f"{location}: shapes do not fit the config for {sorted(map(str, mismatched))[:3]}.")


@contextmanager
def hub_errors(location: Path | str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:  # one value of config.json that its class refuses, told on several lines
        said = " ".join(str(error).split())
        raise ModelError(f"{location}: config.json is not what its class takes: {said}. Correct that value.") from error
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        if isinstance(location, str):
            raise ModelError(
                f"{location} is neither a local folder nor reachable on the hub: {first} "
                "With HF_HUB_OFFLINE=1 only local folders and cached models open."
            ) from error
        raise ModelError(f"{location} cannot be loaded: {first}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and load reports: squeeze prints its own progress and raises on what they warn of."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
