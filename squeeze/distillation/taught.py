"""The trained model that teaches, known by its digest before it is loaded: it can be let go of, and come again."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from squeeze.provenance import Digest, digest_bytes

if TYPE_CHECKING:
    from squeeze.model import Model


class Taught:
    """A model and how to get it."""

    def __init__(self, digest: Digest, load: "Callable[[], Model]") -> None:
        """`digest`: of all that its answers depend on."""
        self.digest, self._load = digest, load
        self._model: Model | None = None

    @staticmethod
    def of(model: "Model") -> "Taught":
        """A model that is loaded already; its digest is that of its weights and config."""
        return Taught(weights_digest(model), lambda: model)

    @property
    def model(self) -> "Model":
        """The model, loaded when it is first asked for."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def forget(self) -> None:
        """Free its memory; it is loaded anew where it is asked for again."""
        self._model = None


def weights_digest(model: "Model") -> Digest:
    """Digest of a network's parameters, buffers and config."""
    import hashlib
    import json

    import torch

    lines = [json.dumps(model.config, sort_keys=True, default=str)]
    for name, tensor in sorted(model.network.state_dict().items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}")
    return digest_bytes("\n".join(lines).encode())
