"""Checkpoints of a training: everything that the next step depends on, written aside and renamed; safetensors and JSON, no pickle.

A folder `step-N` is whole or not there. The newest is kept, an older one goes once the newer stands. Weights of the best validation lie
beside them in `best.safetensors`. A workspace belongs to one training: `key` is the digest of all that determines it.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze.errors import TrainError
from squeeze.provenance import Digest
from squeeze.report.files import sync
from squeeze.report.training import Validation
from squeeze.training.sharding import share, whole
from squeeze.training.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from squeeze.training.objective import Objective

KEY, BEST = "key.json", "best.safetensors"


def prepare(workspace: Path, key: Digest) -> None:
    """Make the workspace ready: one of another training is emptied first."""
    file = workspace / KEY
    if workspace.exists() and (not file.is_file() or json.loads(file.read_text()).get("key") != key):
        shutil.rmtree(workspace)
    workspace.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"key": key}) + "\n")
    for torn in workspace.glob("*.part"):
        shutil.rmtree(torn) if torn.is_dir() else torn.unlink()


def newest(workspace: Path) -> Path | None:
    """The newest whole checkpoint."""
    found = sorted(workspace.glob("step-*[0-9]"))
    return found[-1] if found else None


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
    """Write checkpoint `step` and remove those before it. Of many processes `main` writes; where weights are divided all must call."""
    import torch
    from safetensors.torch import save_file

    found = weights(objective, keep=main)
    tensors: dict[str, torch.Tensor] = dict(rng)
    plain: dict[str, Any] = {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = whole(value)
                if main:
                    tensors[f"optimizer.{number}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{number}.{name}"] = value
    if not main:
        return
    place = workspace / f"step-{step:09d}"
    part = workspace / f"{place.name}.part"
    part.mkdir()
    save_file(found, part / "weights.safetensors")
    save_file(tensors, part / "state.safetensors")
    record = {"step": step, "trace": asdict(trace) | {"validations": [v.model_dump() for v in trace.validations]}}
    (part / "state.json").write_text(json.dumps(record | {"optimizer": plain, "scaler": scaler}))
    for file in part.iterdir():
        sync(file)
    os.rename(part, place)
    sync(workspace)
    for other in workspace.glob("step-*[0-9]"):
        if other != place:
            shutil.rmtree(other)


def load(
    place: Path, objective: "Objective", optimizer: "torch.optim.Optimizer", device: "torch.device", process: int = 0, processes: int = 1
) -> tuple[int, Trace, dict[str, Any] | None, int]:  # fmt: skip
    """Put a checkpoint back; return its step, its trace, the gradient scaler's state, and how many processes made it.

    Where that is another number than `processes`, random numbers go on from the seed.
    """
    from safetensors.torch import load_file

    restore(objective, load_file(place / "weights.safetensors"))
    tensors = load_file(place / "state.safetensors")
    record = json.loads((place / "state.json").read_text())
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            like = parameters[int(number)]
            state.setdefault(int(number), {})[key] = share(tensor, like) if tensor.shape == like.shape else tensor
    for name, value in record["optimizer"].items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    made_by = sum(name.startswith("rng.torch") for name in tensors)
    if made_by == processes:
        put_rng(tensors, device, process)
    kept = record["trace"]
    kept["validations"] = [Validation.model_validate(v) for v in kept["validations"]]
    return int(record["step"]), Trace(**kept), record["scaler"], made_by


def rng_of(device: "torch.device", process: int = 0) -> "dict[str, torch.Tensor]":
    """This process's random numbers to come, by names that no other process has."""
    import torch

    found = {_of("rng.torch", process): torch.get_rng_state()}
    if device.type == "cuda":
        found[_of("rng.cuda", process)] = torch.cuda.get_rng_state()
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


def save_best(workspace: Path, objective: "Objective", main: bool = True) -> None:
    """Write the weights of the best validation so far; of many processes `main` does."""
    from safetensors.torch import save_file

    found = weights(objective, keep=main)
    if not main:
        return
    part = workspace / f"{BEST}.part"
    save_file(found, part)
    sync(part)
    os.rename(part, workspace / BEST)


def load_best(workspace: Path, objective: "Objective") -> None:
    """Put the weights of the best validation back."""
    from safetensors.torch import load_file

    restore(objective, load_file(workspace / BEST))
