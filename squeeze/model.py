"""A trained model in memory: where it came from, what it computes, and which of its weights are integers.

`load_model` opens a local Transformers folder, a hub id, a GGUF file, an `asset:` name, a squeeze artifact, or anyone's own
`nn.Module` named as `package.module:factory`. Everything is computed in float32 on load: a CPU lacks fast fp16 kernels, and
every later error figure is then the method's and not the dtype's.

A quantized artifact loads as the float network whose weights are *exactly* the dequantized integers, with the integers
beside it. Rejected: quantized module classes: each runtime's simulation would then need its own, and the dynamo exporter
would have to be taught about them; a plain network exports, evaluates and differentiates as it is.
"""

import importlib
import inspect
import io
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from squeeze.artifact import Artifact, is_artifact, read_artifact
from squeeze.checkpoint import check_config, check_missing, check_weight_files, hub_errors, quiet_transformers
from squeeze.errors import ModelError, nearest
from squeeze.rows import asset_path
from squeeze.tasks import TASKS, auto_class, check_task, infer_task, positions

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from squeeze.halves import Half
    from squeeze.integers import IntegerWeight
    from squeeze.masks import Pruned

FACTORY = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
INTEGERS, FLOATS = "integers.safetensors", "floats.safetensors"


class ModelSettings(BaseModel):
    """Which trained model, and how much of it is trusted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        description="local folder, .gguf file, asset: name, squeeze artifact, hub id, or package.module:factory"
    )
    revision: str | None = Field(default=None, description="hub revision (branch, tag or commit)")
    weights: str | None = Field(default=None, description="safetensors file or folder, for package.module:factory")
    trust_remote_code: bool = Field(default=False, description="allow a checkpoint to run Python code of its own")
    allow_pickle: bool = Field(default=False, description="allow .bin weights, read with weights_only=True")


@dataclass
class Model:
    """A network with its tokenizer and task; `integers` maps the names of quantized weights to their integers."""

    network: "nn.Module"
    tokenizer: Any
    task: str
    source: str
    config: dict[str, Any]
    factory: str | None = None
    artifact: Artifact | None = None
    integers: "dict[str, IntegerWeight]" = field(default_factory=dict)
    activations: str = "float"
    half: "Half | None" = None
    """Which parameters files hold in 16 bits."""
    pruned: "dict[str, Pruned]" = field(default_factory=dict)
    """Name of each pruned matrix to what was asked of it."""
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of weights, shared ones counted once."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def nonzero_parameters(self) -> int:
        """Number of weights that are not exactly zero, shared ones counted once."""
        return sum(int(p.count_nonzero()) for p in self.network.parameters())

    @property
    def positions(self) -> int | None:
        """Longest sequence that the position table allows, in tokens; None where there is no table."""
        return positions(self.config)

    @property
    def text_inputs(self) -> tuple[str, ...]:
        """The text inputs that the network takes and the tokenizer gives, in order. GPT-2 takes token types that no one gives."""
        accepted = inspect.signature(self.network.forward).parameters
        if "input_ids" not in accepted:
            raise ModelError(
                f"{self.source}: forward({', '.join(accepted)}) takes no input_ids, which every text model here needs."
            )
        given = ("input_ids",) if self.tokenizer is None else ("input_ids", *self.tokenizer.model_input_names)
        return tuple(name for name in TEXT_INPUTS if name in accepted and name in given)


def load_model(
    path: str | Path | ModelSettings,
    task: str | None = None,
    *,
    revision: str | None = None,
    weights: str | None = None,
) -> Model:
    """Open a trained model in float32, in evaluation mode.

    Raises ModelError, naming the file and the mend, where it is missing, broken, not for this task, or asks for trust.
    """
    if not isinstance(path, ModelSettings):
        path = ModelSettings(path=str(path), revision=revision, weights=weights)
    if task is not None and task not in TASKS:
        raise ModelError(f"task {task!r} is unknown. {nearest(task, TASKS)}")
    location = locate(path)
    if isinstance(location, str):
        model = _from_factory(path, task) if FACTORY.match(location) else _from_transformers(location, path, task)
    elif is_artifact(location):
        model = _from_artifact(location, path)
        if task is not None and task != model.task:
            raise ModelError(
                f"{location} is an artifact for {model.task}, not for {task}. Drop --task or name the other artifact."
            )
    elif location.suffix == ".gguf":
        model = _from_gguf(location, path, task)
    else:
        model = _from_transformers(location, path, task)
    _check_vocabulary(model)
    model.network.eval().requires_grad_(False)
    return model


def task_of(settings: ModelSettings) -> str:
    """The task that a model is for, from its config alone: GGUF files and own modules are causal language models."""
    location = locate(settings)
    if isinstance(location, Path) and is_artifact(location):
        return read_artifact(location, check=False).manifest.task
    if (isinstance(location, str) and FACTORY.match(location)) or (
        isinstance(location, Path) and location.suffix == ".gguf"
    ):
        return "causal-lm"
    return _read_config(location, settings, None)[1]


def locate(settings: ModelSettings) -> Path | str:
    """A path on this machine, or the string itself where it is a factory or a hub id. Raises ModelError if neither can be."""
    name = settings.path
    if name.startswith("asset:"):
        return asset_path(name)
    path = Path(name).expanduser()
    if path.exists():
        if path.is_dir() and not (path / "config.json").exists() and not is_artifact(path):
            ggufs = sorted(path.glob("*.gguf"))
            if len(ggufs) == 1:
                return ggufs[0]
            seen = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
            raise ModelError(
                f"{path} holds no model: looked for config.json, squeeze.json or one *.gguf; found {seen}."
            )
        if path.is_file() and path.suffix != ".gguf":
            raise ModelError(
                f"{path} is a file that is not .gguf. Name the folder that holds config.json and *.safetensors."
            )
        return path
    if FACTORY.match(name):
        return name
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".") and path.suffix != ".gguf":
        return name
    raise ModelError(
        f"{name} does not exist. Name a local folder, a .gguf file, an asset:, package.module:factory or a hub id."
    )


def _from_transformers(location: Path | str, settings: ModelSettings, task: str | None) -> Model:
    import torch

    notes: list[str] = []
    config, task = _read_config(location, settings, task)
    options = _options(location, settings)
    if isinstance(location, Path):
        check_weight_files(location, allow_pickle=settings.allow_pickle)
    if str(getattr(config, "dtype", "float32")) in ("torch.float16", "torch.bfloat16", "float16", "bfloat16"):
        notes.append(f"the checkpoint is {config.dtype}; it is computed in float32 here")
    if getattr(config, "is_encoder_decoder", False):
        config.is_encoder_decoder = False  # T5Gemma's encoder opens with nothing else, T5's sets it so itself
        notes.append(f"{config.model_type} is an encoder-decoder; its encoder alone is opened, the decoder left out")
    with hub_errors(location), quiet_transformers():
        network, info = auto_class(config, task).from_pretrained(
            location, config=config, dtype=torch.float32, output_loading_info=True,
            use_safetensors=None if settings.allow_pickle else True, **options,
        )  # fmt: skip
        tokenizer = _tokenizer(location, options)
    check_missing(location, info, task)
    _drop_pooler(network, task)
    return Model(network, tokenizer, task, settings.path, network.config.to_dict(), notes=tuple(notes))


def _drop_pooler(network: Any, task: str) -> None:
    """The last hidden state never passes through BERT's pooler: without it, sizes and integers count what is used."""
    if task == "feature-extraction" and getattr(network, "pooler", None) is not None:
        network.pooler = None


def _read_config(location: Path | str, settings: ModelSettings, task: str | None) -> tuple[Any, str]:
    """The config, and the task: the one asked for, once the checkpoint is known to be for it, or the checkpoint's own.

    A local config.json is judged before Transformers reads it, which fails in words of its own on a model type it lacks.
    """
    import transformers

    if isinstance(location, Path):
        described = check_config(location, trust_remote_code=settings.trust_remote_code)
        task = task or infer_task(described)
        check_task(described, task)
    with hub_errors(location):
        config = transformers.AutoConfig.from_pretrained(location, **_options(location, settings))
    # Here too for a local one: what its config.json leaves out, that it is an encoder-decoder say, the class fills in.
    task = task or infer_task(config.to_dict())
    check_task(config.to_dict(), task)
    return config, task


def _options(location: Path | str, settings: ModelSettings) -> dict[str, Any]:
    """What Transformers is told beside the place: how far the checkpoint is trusted and, on the hub, which revision."""
    trust: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    return trust | {"revision": settings.revision} if isinstance(location, str) else trust


def _from_gguf(location: Path, settings: ModelSettings, task: str | None) -> Model:
    import torch
    import transformers

    task = task or "causal-lm"
    if task != "causal-lm":
        raise ModelError(f"{location.name} is a GGUF file; those hold causal-lm models, not {task}.")
    with location.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{location} is not a GGUF file: its first four bytes are not 'GGUF'.")
    try:
        # Its progress bar asks nobody: it goes to whatever stderr is.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            network = transformers.AutoModelForCausalLM.from_pretrained(
                str(location.parent), gguf_file=location.name, dtype=torch.float32
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(location.parent), gguf_file=location.name)
    except (ValueError, OSError, KeyError, MemoryError, OverflowError) as error:
        raise ModelError(f"{location} cannot be read as GGUF: {error}.") from error
    # Transformers marks the network as quantized and then refuses to save it, though its weights are plain float32 by now.
    network.hf_quantizer = None  # type: ignore[assignment]
    network.is_quantized = False  # type: ignore[assignment]
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.config._name_or_path = ""
    note = f"source weights come dequantized from {location.name}: low-bit results on their own grid flatter"
    return Model(network, tokenizer, task, settings.path, network.config.to_dict(), notes=(note,))


def _from_factory(settings: ModelSettings, task: str | None) -> Model:
    """Anyone's own nn.Module: `package.module:factory` called without arguments, its weights read from safetensors."""
    network = build_own_module(settings.path)
    if settings.weights is None:
        raise ModelError(
            f"{settings.path} has random weights until it is trained. Name its safetensors with model.weights."
        )
    weights = Path(settings.weights).expanduser()
    file = weights / "model.safetensors" if weights.is_dir() else weights
    if not file.is_file():
        raise ModelError(
            f"{file} does not exist: model.weights names a safetensors file or a folder with model.safetensors."
        )
    _load_state(network, file)
    return Model(network, load_tokenizer(file.parent), task or "causal-lm", settings.path, {}, factory=settings.path)


def build_own_module(name: str) -> "nn.Module":
    """Import and call `package.module:factory`; the working directory is importable, as with `python -m`."""
    from torch import nn

    module_name, factory_name = name.split(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        network = getattr(importlib.import_module(module_name), factory_name)()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{name}: {error}. Run where `import {module_name}` works, or install the package.") from error
    finally:
        sys.path.remove(here)
    if not isinstance(network, nn.Module):
        raise ModelError(f"{name}() returned {type(network).__name__}, not a torch.nn.Module.")
    return network


def _from_artifact(folder: Path, settings: ModelSettings) -> Model:
    import torch
    import transformers
    from safetensors.torch import load_file

    from squeeze.halves import Half
    from squeeze.integers import from_tensors
    from squeeze.masks import from_rows

    artifact = read_artifact(folder)
    manifest = artifact.manifest
    if manifest.format != "torch":
        raise ModelError(
            f"{folder} is an ONNX export. Name the torch artifact it was made from; `squeeze inspect {folder}` shows it."
        )
    factory = manifest.extra.get("factory")
    if factory is not None:
        own = build_own_module(str(factory))
        model = Model(own, load_tokenizer(folder), manifest.task, "", {}, factory=str(factory))
        if INTEGERS not in manifest.files:
            _load_state(own, folder / "model.safetensors")
    elif INTEGERS not in manifest.files:
        model = _from_transformers(folder, settings.model_copy(update={"path": str(folder)}), manifest.task)
    else:
        config = transformers.AutoConfig.from_pretrained(folder)
        network = auto_class(config, manifest.task).from_config(config, dtype=torch.float32)
        _drop_pooler(network, manifest.task)
        model = Model(network, _tokenizer(folder, {}), manifest.task, "", network.config.to_dict())
    if INTEGERS in manifest.files:
        layout: dict[str, Any] = manifest.extra["integers"]  # type: ignore[assignment]
        model.integers = from_tensors(load_file(folder / INTEGERS), layout)
        state = load_file(folder / FLOATS)
        state |= {name: weight.dequantize() for name, weight in model.integers.items()}
        _assign_state(model.network, state, folder)
        model.activations = str(manifest.extra["activations"])
    if "half" in manifest.extra:
        model.half = Half.from_row(manifest.extra["half"])  # type: ignore[arg-type]
    model.artifact, model.source, model.pruned = artifact, manifest.source, from_rows(manifest.extra.get("pruned"))
    return model


def save_model(model: Model, folder: Path) -> None:
    """Write the model as an ordinary Transformers folder; a quantized one as integers, scales and the floats that remain.

    The integer files are not called model.safetensors on purpose: Transformers then refuses the folder instead of
    filling the missing weights with random numbers.
    """
    from squeeze.halves import as_stored

    if model.integers:
        _save_integers(model, folder)
        if model.factory is None:
            model.network.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    elif model.factory is None:
        with quiet_transformers(), as_stored(model.network, model.half):
            model.network.save_pretrained(folder)  # type: ignore[operator]
            if model.half is not None:
                model.network.config.dtype = model.half.config_dtype  # type: ignore[assignment]
                model.network.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    else:
        from safetensors.torch import save_model as save_tensors

        with as_stored(model.network, model.half):
            save_tensors(model.network, str(folder / "model.safetensors"))
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _save_integers(model: Model, folder: Path) -> None:
    from safetensors.torch import save_file

    from squeeze.integers import to_tensors

    shared = aliases(model.network)
    floats = {
        name: tensor.detach().contiguous()
        for name, tensor in model.network.state_dict().items()
        if shared.get(name, name) not in model.integers and shared.get(name, name) == name
    }
    save_file(to_tensors(model.integers), folder / INTEGERS, metadata={"format": "pt"})
    save_file(floats, folder / FLOATS, metadata={"format": "pt"})


def aliases(network: "nn.Module") -> dict[str, str]:
    """Name of every parameter -> the first name of the same tensor, so that tied weights are met once."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in network.named_parameters(remove_duplicate=False)
    }


def _assign_state(network: "nn.Module", state: "dict[str, torch.Tensor]", where: Path) -> None:
    shared = aliases(network)
    own = {name for name in network.state_dict() if shared.get(name, name) == name}
    missing, unexpected = sorted(own - set(state)), sorted(set(state) - own)
    if missing or unexpected:
        raise ModelError(
            f"{where}: weights do not fit the network; missing {missing[:4]}, unexpected {unexpected[:4]}."
        )
    network.load_state_dict(state, strict=False)


def _load_state(network: "nn.Module", file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_model as load_tensors

    try:
        load_tensors(network, str(file))
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(f"{file} does not fit the module: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; None where there is none, as beside an own module."""
    return _tokenizer(folder, {}) if any(folder.glob("tokenizer*")) else None


def _tokenizer(location: Path | str, options: dict[str, Any]) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(location, **options)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{location} has no tokenizer that loads ({error}). Put tokenizer.json beside config.json."
        ) from error


def _check_vocabulary(model: Model) -> None:
    rows = model.config.get("vocab_size")
    if model.tokenizer is not None and isinstance(rows, int) and len(model.tokenizer) > rows:
        raise ModelError(
            f"{model.source}: the tokenizer knows {len(model.tokenizer)} tokens, the embedding has {rows} rows."
        )


def answer(out: Any, task: str) -> "torch.Tensor":
    """The one tensor that a task is about, from what forward() gave: an own module gives just that."""
    import torch

    return out if isinstance(out, torch.Tensor) else getattr(out, TASKS[task].output)


def call(network: "nn.Module", model: Model, inputs: "Mapping[str, NDArray[np.int64]]") -> "NDArray[np.float32]":
    """What `network`, the model's own or its simulation, gives for those of the model's text inputs that are given."""
    import torch

    with torch.no_grad():
        out = network(**{name: torch.from_numpy(inputs[name]) for name in model.text_inputs if name in inputs})
    return answer(out, model.task).numpy()
