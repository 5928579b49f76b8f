"""Text that a language model writes: continuations of given tokens, and a teacher's as blocks on disk.

Kim & Rush 2016, "Sequence-Level Knowledge Distillation" (arXiv:1606.07947), section 3.2: the student learns the mode of the teacher's
distribution over whole texts, found by beam search, with plain cross entropy. A language model has no source sentence to translate;
the first tokens of a train block stand in for it.

Blocks are written a batch at a time (`.NAME.generated` beside the artifact; aside and renamed): a run that was killed goes on with the
first batch that is missing. Of several processes the main one writes, and the others read.
"""

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from squeeze.distillation.taught import weights_digest
from squeeze.errors import TrainError
from squeeze.model import answer
from squeeze.provenance import digest_bytes, digest_json
from squeeze.report.files import sync
from squeeze.training.examples import Examples

if TYPE_CHECKING:
    from torch import Tensor, nn

    from squeeze.distillation.settings import GenerateSettings
    from squeeze.model import Model

NOTHING = -1
"""After the end of a text in a block on disk."""
FINE = 2**40
"""Probabilities are summed as whole multiples of 1 / FINE: sums of integers are the same in every order, on every device."""


def drawn(logits: "Tensor", uniform: "Tensor", temperature: float) -> "Tensor":
    """One token for each row of logits [b, vocabulary], drawn from softmax(logits / temperature) by numbers in [0, 1) [b]: [b]."""
    shares = (torch.softmax(logits.double() / temperature, dim=-1) * FINE).long()
    sums = shares.cumsum(dim=-1)
    goal = (uniform.to(sums.device, torch.float64) * sums[:, -1]).long().clamp(max=sums[:, -1] - 1)
    return torch.searchsorted(sums, goal[:, None], right=True)[:, 0]


def continued(
    network: "nn.Module", prompts: "Tensor", new_tokens: int, ends: Iterable[int], *, temperature: float | None = None,
    uniform: "Tensor | None" = None,
) -> "tuple[Tensor, Tensor]":  # fmt: skip
    """Prompts [b, p] with at most `new_tokens` more, [b, ≤ p + new_tokens], and the length of each [b]; no gradients.

    The likeliest token each time, or with a temperature one drawn by `uniform` [b, new_tokens] in [0, 1). A text ends with a token of
    `ends`, which belongs to it; what follows is 0. Keys and values are kept where the network can.
    """
    accepted = inspect.signature(network.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    has_cache = "past_key_values" in accepted and "use_cache" in accepted
    stop = torch.tensor(sorted(ends), dtype=torch.int64, device=prompts.device)
    whole, ids, cache = prompts, prompts, None
    lengths = torch.full((len(prompts),), prompts.shape[1], device=prompts.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    with torch.no_grad():
        for step in range(new_tokens):
            if has_cache:
                out = network(input_ids=ids, past_key_values=cache, use_cache=True, **options)
                cache = getattr(out, "past_key_values", None)
            else:
                out = network(input_ids=whole, **options)
            logits = answer(out, "causal-lm")[:, -1]
            if temperature is None:
                new = logits.argmax(dim=-1)
            else:
                assert uniform is not None
                new = drawn(logits, uniform[:, step], temperature)
            new = new.masked_fill(done, 0)
            lengths = lengths + (~done).long()
            done = done | torch.isin(new, stop)
            whole = torch.cat([whole, new[:, None]], dim=1)
            ids = new[:, None] if cache is not None else whole
            if bool(done.all()):
                break
    return whole, lengths


def searched(
    network: Any, prompts: "Tensor", new_tokens: int, ends: Iterable[int], beams: int, pad: int
) -> "tuple[Tensor, Tensor]":
    """As `continued`, the text that a beam search of this width finds (scores divided by length). Raises TrainError for own modules."""
    from transformers import GenerationConfig

    if not hasattr(network, "generate"):
        raise TrainError(
            "generate.beams needs a Transformers model as teacher; this one is a module of its own. Set it to 1."
        )
    ends = sorted(ends)
    config = GenerationConfig(
        num_beams=beams, do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=pad
    )  # type: ignore[no-untyped-call]
    with torch.no_grad():
        whole = network.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    width = prompts.shape[1]
    stops = torch.isin(whole[:, width:], torch.tensor(ends, dtype=whole.dtype, device=whole.device))
    first = torch.where(stops.any(dim=1), stops.int().argmax(dim=1) + 1, torch.full_like(whole[:, 0], stops.shape[1]))
    return whole, width + first


def ends_of(model: "Model") -> frozenset[int]:
    """The tokens after which the model says nothing more."""
    network: Any = model.network
    for place in (getattr(network, "generation_config", None), getattr(network, "config", None), model.tokenizer):
        found = getattr(place, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def generated(
    teacher: "Model", blocks: NDArray[np.int64], settings: "GenerateSettings", seed: int, folder: Path | None = None,
    say: Callable[[int, int, str], None] | None = None, device: str = "cpu",
) -> Examples:  # fmt: skip
    """The teacher's continuations of the blocks' first tokens, up to their length, as examples whose prompts are marked.

    Written to `folder` and read from there where they were made from the same teacher, prompts and settings.
    """
    prompts = np.ascontiguousarray(blocks[: settings.count, : settings.prompt])
    length = blocks.shape[1]
    chunks = [prompts[at : at + settings.batch] for at in range(0, len(prompts), settings.batch)]
    files: list[Path | None] = [None] * len(chunks)
    if folder is not None:
        key = _key(teacher, prompts, length, settings, seed)
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.iterdir():
            if other.name[: len(key)] != key:
                other.unlink(missing_ok=True)
        files = [folder / f"{key}-{number:06d}.npy" for number in range(len(chunks))]
    made: list[NDArray[np.int32]] = []
    for number, (chunk, file) in enumerate(zip(chunks, files, strict=True)):
        found = None if file is None else _read(file, len(chunk), length)
        if found is None:
            found = _write(teacher, chunk, length, settings, seed, number * settings.batch, device)
            if file is not None:
                _keep(file, found)
        made.append(found)
        if say is not None:
            say(number + 1, len(chunks), "the teacher continues blocks")
    rows = np.concatenate(made)
    kept = rows != NOTHING
    starts = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int64)
    given = np.full(len(rows), settings.prompt, np.int64)
    return Examples(rows[kept], starts, None, None, teacher.tokenizer.pad_token_id or 0, prompt=given)


def _write(
    teacher: "Model",
    prompts: NDArray[np.int64],
    length: int,
    settings: "GenerateSettings",
    seed: int,
    first: int,
    device: str,
) -> NDArray[np.int32]:
    """One batch of continuations [b, length], NOTHING after their ends."""
    network = teacher.network.to(device).eval()
    ids, new = torch.from_numpy(prompts).to(device), length - prompts.shape[1]
    if settings.beams > 1:
        whole, lengths = searched(
            network, ids, new, ends_of(teacher), settings.beams, teacher.tokenizer.pad_token_id or 0
        )
    else:
        uniform = (
            None if settings.temperature is None else uniforms([(seed, first + n + 1) for n in range(len(ids))], new)
        )
        whole, lengths = continued(
            network, ids, new, ends_of(teacher), temperature=settings.temperature, uniform=uniform
        )
    rows = np.full((len(prompts), length), NOTHING, np.int32)
    for row, tokens, count in zip(rows, whole.cpu().numpy(), lengths.tolist(), strict=True):
        row[:count] = tokens[:count]
    return rows


def uniforms(seeds: Iterable[tuple[int, ...]], count: int) -> "Tensor":
    """`count` numbers in [0, 1) for each seed, whatever stands beside it and wherever it is computed: float64 [seeds, count]."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(count) for seed in seeds]))


def _key(teacher: "Model", prompts: NDArray[np.int64], length: int, settings: "GenerateSettings", seed: int) -> str:
    """Sixteen digits over all that the continuations depend on, the teacher's weights among it."""
    given = digest_bytes(np.array(prompts.shape, "<i8").tobytes() + prompts.astype("<i8").tobytes())
    parts: list[JsonValue] = [
        settings.model_dump(mode="json"),
        seed,
        length,
        [*sorted(ends_of(teacher))],
        given,
        weights_digest(teacher),
    ]
    return digest_json(parts).removeprefix("sha256:")[:16]


def _read(file: Path, rows: int, length: int) -> NDArray[np.int32] | None:
    """What the file holds; None where it is missing or not whole."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (rows, length) and found.dtype == np.int32 else None


def _keep(file: Path, rows: NDArray[np.int32]) -> None:
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        np.save(stream, rows, allow_pickle=False)
    sync(part)
    os.rename(part, file)
    sync(file.parent)
