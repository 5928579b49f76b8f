"""Checkpoints of a training: everything that the next step depends on, written aside and renamed; safetensors and JSON, no pickle.

A folder `step-N` is whole or not there, as far as the disk keeps what it was given; the two newest stay, so that one that a disk lost
a part of is passed over. Beside them lie the weights of the validations that were best when they were written, `best-N.safetensors`:
a run that goes on from an older checkpoint finds the one that was best then. A workspace belongs to one training: `key` is the
digest of all that determines it.
"""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze.errors import TrainError
from squeeze.provenance import Digest, environment
from squeeze.report.files import sync, write_atomically
from squeeze.report.training import Validation
from squeeze.training.sharding import share, whole
from squeeze.training.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from squeeze.training.objective import Objective

KEY = "key.json"
LAST_GOOD = "last-good"
"""The model that a training that failed leaves, for people to open."""
KEPT = 2
"""Checkpoints that stay."""
FULL = "the {} could not be written into {}: {}. Make room; the same command goes on from the checkpoint before."
OWN = re.compile(rf"{re.escape(KEY)}(\.tmp-\d+)?|(step-\d+|best-\d+\.safetensors|{LAST_GOOD})(\.part)?")
"""Names that a training gives; what else lies in a workspace is somebody's."""


def prepare(workspace: Path, key: Digest) -> tuple[str, ...]:
    """Make the workspace ready: what another training left in it goes, and so do torn checkpoints; notes about those.

    Raises TrainError for a folder that is no workspace: it is left as it is.
    """
    if workspace.exists():
        _refuse_foreign(workspace)
    workspace.mkdir(parents=True, exist_ok=True)
    if _key(workspace) != key:
        for path in sorted(
            workspace.iterdir(), key=lambda path: path.name == KEY
        ):  # the key last: a cut leaves a workspace
            _remove(path)
        write_atomically(workspace / KEY, json.dumps({"key": key}) + "\n")
    for path in workspace.iterdir():
        if path.name.endswith(".part") or path.name.startswith(f"{KEY}.tmp-"):
            _remove(path)
    torn = [(path, why) for path in _steps(workspace) if (why := _torn(path))]
    for path, _ in torn:
        _remove(path)
    return tuple(f"the checkpoint {path.name} could not be read ({why}) and was passed over" for path, why in torn)


def _refuse_foreign(workspace: Path) -> None:
    if not workspace.is_dir():
        raise TrainError(f"{workspace} is no folder, and checkpoints are to be kept there. Move it away.")
    names = sorted(path.name for path in workspace.iterdir())
    foreign = [name for name in names if not OWN.fullmatch(name)]
    begun = any(name == KEY for name in names) or all(name.startswith(KEY) for name in names)
    if foreign or not begun:
        raise TrainError(
            f"{workspace} is to keep checkpoints, and holds files that no training wrote: {', '.join((foreign or names)[:3])}. "
            "Move them away."
        )


def _key(workspace: Path) -> str | None:
    try:
        return str(json.loads((workspace / KEY).read_text("utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(path: Path) -> None:
    """Away with a file, or with a folder that nobody must find half there."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(".part"):
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        path = path.rename(part)
    shutil.rmtree(path)


def _steps(workspace: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(path for path in workspace.glob("step-*[0-9]") if OWN.fullmatch(path.name))


def newest(workspace: Path) -> Path | None:
    """The newest checkpoint; `prepare` has removed those that are not whole."""
    found = _steps(workspace)
    return found[-1] if found else None


def _torn(place: Path) -> str:
    """Why a checkpoint cannot be gone on from; "" where it can."""
    from safetensors import SafetensorError, safe_open

    try:
        record = json.loads((place / "state.json").read_text("utf-8"))
        Trace(**record["trace"])
        best = record["best"]
        files = [place / "weights.safetensors", place / "state.safetensors"]
        files += [] if best is None else [place.parent / best]
        for file in files:
            with safe_open(file, "np") as opened:  # reads the header, and compares the file's length with it
                opened.keys()
        missing = {"step", "optimizer", "scaler", "written"} - record.keys()
        return f"no {sorted(missing)[0]} in state.json" if missing else ""
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0].replace(str(place.parent) + os.sep, "")


def circumstances() -> dict[str, Any]:
    """What the bits of a step depend on beside the key: kernels differ between packages, processors and numbers of threads."""
    import torch

    here = environment()
    return {"threads": torch.get_num_threads(), "cpu": here.cpu, "gpu": here.cuda} | here.packages


def save(
    workspace: Path,
    step: int,
    objective: "Objective",
    optimizer: "torch.optim.Optimizer",
    trace: Trace,
    scaler: dict[str, Any] | None,
    rng: "Mapping[str, torch.Tensor]",
    main: bool = True,
) -> None:
    """Write checkpoint `step`; it, the one before it and the best weights that they speak of stay. `rng` has all processes' random
    states. Of many processes the `main` one writes; all must call, as divided tensors are put together for it.

    Raises TrainError where the disk does not take it: the checkpoints before it stay.
    """
    from safetensors import SafetensorError

    found = weights(objective, keep=main)
    tensors, plain = _optimizer_state(optimizer, keep=main)
    if not main:
        return
    part = workspace / f"step-{step:09d}.part"
    try:
        _write(part, step, found, dict(rng) | tensors, plain, trace, scaler)
        os.rename(part, part.with_suffix(""))
        sync(workspace)
        for other in _steps(workspace)[:-KEPT]:
            _remove(other)
        spoken_of = {json.loads((place / "state.json").read_text("utf-8"))["best"] for place in _steps(workspace)}
        for file in workspace.glob("best-*.safetensors"):
            if file.name not in spoken_of:
                file.unlink()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise TrainError(FULL.format(f"checkpoint of step {step}", workspace, error)) from error


def _optimizer_state(
    optimizer: "torch.optim.Optimizer", keep: bool
) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """Whole tensors, and what else there is, by the parameter's number and the entry's name."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                complete = whole(value.detach())
                if keep:
                    tensors[f"optimizer.{number}.{name}"] = complete.cpu().contiguous()
            else:
                plain[f"{number}.{name}"] = value
    return tensors, plain


def _write(
    part: Path,
    step: int,
    found: "dict[str, torch.Tensor]",
    tensors: "dict[str, torch.Tensor]",
    plain: dict[str, Any],
    trace: Trace,
    scaler: dict[str, Any] | None,
) -> None:
    from safetensors.torch import save_file

    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_file(found, part / "weights.safetensors")
    save_file(tensors, part / "state.safetensors")
    best = None if trace.best is None else best_file(part.parent, trace.best)
    record = {
        "step": step,
        "trace": asdict(trace) | {"validations": [v.model_dump() for v in trace.validations]},
        "best": best.name if best is not None and best.exists() else None,
        "optimizer": plain,
        "scaler": scaler,
        "written": circumstances() | {"processes": _made_by(tensors)},
    }
    (part / "state.json").write_text(json.dumps(record), "utf-8")
    for file in (*part.iterdir(), part):
        sync(file)


def load(
    place: Path, objective: "Objective", optimizer: "torch.optim.Optimizer", device: "torch.device", process: int = 0, processes: int = 1
) -> tuple[int, Trace, dict[str, Any] | None]:  # fmt: skip
    """Put a checkpoint back; return its step, its trace and the gradient scaler's state.

    Where another number of processes than `processes` made it, random numbers go on from the seed.
    """
    from safetensors.torch import load_file

    restore(objective, load_file(place / "weights.safetensors"))
    tensors = load_file(place / "state.safetensors")
    record = json.loads((place / "state.json").read_text("utf-8"))
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            like = parameters[int(number)]
            tensor = tensor.clone()  # out of the file's mapping, into memory of torch's
            state.setdefault(int(number), {})[key] = share(tensor, like) if tensor.shape == like.shape else tensor
    for name, value in record["optimizer"].items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if _made_by(tensors) == processes:
        put_rng(tensors, device, process)
    kept = record["trace"]
    kept["validations"] = [Validation.model_validate(v) for v in kept["validations"]]
    return int(record["step"]), Trace(**kept), record["scaler"]


def _made_by(tensors: "Mapping[str, torch.Tensor]") -> int:
    """How many processes left their random state."""
    return sum(name.startswith("rng.torch") for name in tensors)


def changed(place: Path, processes: int = 1) -> str:
    """What differs between here and where a checkpoint was written, in words; "" where nothing does."""
    before, here = (
        json.loads((place / "state.json").read_text("utf-8"))["written"],
        circumstances() | {"processes": processes},
    )
    parts = [
        f"{name} {before.get(name)} then, {here.get(name)} now"
        for name in sorted(before.keys() | here.keys())
        if before.get(name) != here.get(name)
    ]
    return "; ".join(parts)


def rng_of(device: "torch.device") -> "dict[str, torch.Tensor]":
    """This process's random numbers to come, under the names that the main process's have in checkpoints."""
    import torch

    found = {"rng.torch": torch.get_rng_state()}
    if device.type == "cuda":
        found["rng.cuda"] = torch.cuda.get_rng_state()
    return found


def put_rng(tensors: "Mapping[str, torch.Tensor]", device: "torch.device", process: int = 0) -> None:
    """Go on with the random numbers that `rng_of` found."""
    import torch

    torch.set_rng_state(tensors[_of("rng.torch", process)])
    if device.type == "cuda" and _of("rng.cuda", process) in tensors:
        torch.cuda.set_rng_state(tensors[_of("rng.cuda", process)])


def _of(name: str, process: int) -> str:
    return f"{name}.{process}" if process else name


def weights(objective: "Objective", keep: bool = True) -> "dict[str, torch.Tensor]":
    """Every parameter and stored buffer once and whole, on the CPU; where they are divided, all processes must ask, and some may `keep`."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights_in_place(objective).items():
        complete = whole(tensor.detach())
        if keep:
            found[name] = complete.cpu().contiguous()
    return found


def restore(objective: "Objective", tensors: "dict[str, torch.Tensor]") -> None:
    """Copy what `weights` gave back into place."""
    import torch

    own = weights_in_place(objective)
    if own.keys() != tensors.keys():
        raise TrainError(f"the checkpoint is of another network: {sorted(own.keys() ^ tensors.keys())[:4]}. Remove it.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(share(tensors[name], tensor))


def weights_in_place(objective: "Objective") -> "dict[str, torch.Tensor]":
    """As `weights`, the tensors themselves."""
    stored = set(objective.state_dict())
    found: dict[str, torch.Tensor] = dict(objective.named_parameters())
    return found | {name: buffer for name, buffer in objective.named_buffers() if name in stored}


def leave(workspace: Path, objective: "Objective") -> Path | None:
    """Write the objective's network as a model of its own, where its stage can; the folder."""
    folder = workspace / LAST_GOOD
    part = folder.with_name(f"{LAST_GOOD}.part")
    try:
        for old in (folder, part):
            if old.exists():
                _remove(old)
        part.mkdir()
        if not objective.write(part):
            part.rmdir()
            return None
        os.rename(part, folder)
    except OSError:  # no room: the checkpoints are there still
        shutil.rmtree(part, ignore_errors=True)
        return None
    return folder


def best_file(workspace: Path, step: int) -> Path:
    """Where the weights of the validation after `step` are kept while it is the best one."""
    return workspace / f"best-{step:09d}.safetensors"


def save_best(workspace: Path, step: int, objective: "Objective", main: bool = True) -> None:
    """Write the weights of the best validation so far; those before it stay until no checkpoint speaks of them. `main`: as in `save`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    found = weights(objective, keep=main)
    if not main:
        return
    file = best_file(workspace, step)
    part = file.with_name(f"{file.name}.part")
    try:
        save_file(found, part)
        sync(part)
        os.rename(part, file)
        sync(workspace)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise TrainError(FULL.format("best weights so far", workspace, error)) from error


def load_best(workspace: Path, step: int, objective: "Objective") -> None:
    """Put the weights of the best validation back."""
    from safetensors.torch import load_file

    restore(objective, load_file(best_file(workspace, step)))
