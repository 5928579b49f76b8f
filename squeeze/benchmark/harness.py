"""Tasks of EleutherAI's lm-evaluation-harness on squeeze's own sessions: pip install 'squeeze[lm-eval]'.

A task is a name that the harness knows, or a YAML file whose data lies beside it (`dataset_path: json` with `data_files`), so that it
works without a network. One value an example is kept, so that before and after pair up; a metric that the harness gives as
one number for the whole task (corpus BLEU) has none and is left out. Rejected: the harness's own Transformers model (it measures
that network and no export), and log-likelihoods from batches with padding (slower to get right than one text at a time).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from squeeze.errors import BenchError, DataError, RuntimeUnavailable
from squeeze.evaluate import check_finite, log_probabilities
from squeeze.runtimes import Session

MOST_NEW_TOKENS = 256
"""Where a task does not say how long an answer may be; the harness's own default."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: a value for each example in order."""

    task: str
    metric: str
    values: tuple[float, ...]


def evaluate_tasks(
    session: Session, tokenizer: Any, tasks: Sequence[str], *, limit: int | None, max_length: int, seed: int
) -> list[TaskScore]:
    """Every metric of every task that has a value for each example; `limit` takes the first so many examples.

    Raises RuntimeUnavailable without the package, DataError for a task that is unknown or whose data is missing.
    """
    with _offline():
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RuntimeUnavailable(
                "lm-evaluation-harness is not installed: pip install 'squeeze[lm-eval]'."
            ) from error
        model = _language_model(session, tokenizer, max_length)
        scores: list[TaskScore] = []
        for task in tasks:
            given = _local(Path(task)) if task.endswith((".yaml", ".yml")) else task
            try:
                found = lm_eval.simple_evaluate(
                    model, tasks=[given], limit=limit, log_samples=True, bootstrap_iters=0, random_seed=seed,
                    numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, task_manager=TaskManager(),
                )  # fmt: skip
            except (BenchError, RuntimeUnavailable):
                raise
            except Exception as error:
                raise DataError(f"task {task} of lm-evaluation-harness cannot be run: {_first_line(error)}") from error
            for name, samples in (found or {}).get("samples", {}).items():
                scores += _scores(name, samples)
    return scores


def _scores(name: str, samples: list[dict[str, Any]]) -> list[TaskScore]:
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    metrics = dict.fromkeys(metric for sample in ordered for metric in sample.get("metrics", ()))
    rows = []
    for metric in metrics:
        values = [sample.get(metric) for sample in ordered]
        if all(isinstance(value, int | float | np.number | bool) for value in values):
            rows.append(TaskScore(name, metric, tuple(float(value) for value in values)))  # type: ignore[arg-type]
    return rows


def _local(path: Path) -> dict[str, Any]:
    """A task from a YAML file, its data files found beside it. Raises DataError where it is not readable or its data is not there."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not plain YAML: {_first_line(error)}. Tasks with !function are not run.") from error
    if not isinstance(content, dict) or "task" not in content:
        raise DataError(f"{path} is not a task of lm-evaluation-harness: it has no line `task: NAME`.")
    arguments = dict(content.get("dataset_kwargs") or {})
    files = arguments.get("data_files")
    if isinstance(files, dict):
        arguments["data_files"] = {split: _beside(path, name) for split, name in files.items()}
    elif files is not None:
        arguments["data_files"] = _beside(path, files)
    if arguments.pop("trust_remote_code", False):
        raise DataError(f"{path} asks for trust_remote_code, which is never given. Keep its data as JSON beside it.")
    return {**content, "dataset_kwargs": arguments}


def _beside(path: Path, name: Any) -> Any:
    if isinstance(name, list):
        return [_beside(path, one) for one in name]
    file = path.parent / str(name)
    if not file.is_file():
        raise DataError(f"{path} names its data {name}, and {file} does not exist.")
    return str(file.resolve())


def _language_model(session: Session, tokenizer: Any, max_length: int) -> Any:
    """The harness's model class on a session; made here because the harness is optional."""
    from lm_eval.api.model import TemplateLM

    class SessionModel(TemplateLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            token = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
            if token is None:
                raise BenchError(
                    "the tokenizer has neither an end nor a beginning token, which texts without context need."
                )
            return int(token)

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return [int(n) for n in tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [scored(context, continuation) for _, context, continuation in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return [rolling([self.prefix_token_id, *self.tok_encode(request.args[0])]) for request in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self.answer(*request.args) for request in requests]

        def answer(self, context: str, settings: dict[str, Any]) -> str:
            if settings.get("do_sample") and float(settings.get("temperature") or 0) > 0:
                raise BenchError(
                    "a task asks for sampling; squeeze answers greedily. Set do_sample: false in its generation_kwargs."
                )
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            count = int(settings.get("max_gen_toks") or MOST_NEW_TOKENS)
            ids = (self.tok_encode(context) or [self.prefix_token_id])[-max(1, max_length - count) :]
            tokens = session.generate(np.asarray([ids], np.int64), count).tokens[0].tolist()
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            return text[: min([len(text), *(text.find(stop) for stop in stops if stop and stop in text)])]

    def logs_of(ids: list[int]) -> Any:
        batch = np.asarray([ids], np.int64)
        out = session.forward({"input_ids": batch, "attention_mask": np.ones_like(batch)})
        check_finite(out, 0)
        return log_probabilities(out[0])

    def scored(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Σ log p of the continuation after its context, whose beginning is cut where both are too long, and whether it is greedy."""
        if len(continuation) >= max_length:
            raise BenchError(
                f"an answer of {len(continuation)} tokens does not fit into {max_length} with its context."
            )
        whole = (context + continuation)[-max_length:]
        logs = logs_of(whole)[-len(continuation) - 1 : -1]
        wanted = np.asarray(continuation)
        likelihood = float(logs[np.arange(len(wanted)), wanted].sum())
        return likelihood, bool((logs.argmax(axis=-1) == wanted).all())

    def rolling(ids: list[int]) -> float:
        """Σ log p of every token but the first, in windows that do not overlap but for the one token before them."""
        return float(
            sum(
                scored([ids[start]], ids[start + 1 : start + max_length])[0]
                for start in range(0, len(ids) - 1, max_length - 1)
            )
        )

    return SessionModel()


@contextmanager
def _offline() -> Iterator[None]:
    """The hub is not asked while tasks run, unless the user's own settings say that it may be."""
    before = os.environ.get("HF_DATASETS_OFFLINE")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("HF_DATASETS_OFFLINE", None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
