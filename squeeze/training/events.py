"""TensorBoard event files of a training: what the curve has, step by step, while it runs."""

from pathlib import Path

from squeeze.errors import TrainError
from squeeze.training.trace import Trace

PREFIX = "events.out.tfevents."


class Events:
    """Scalars of every step in one folder: loss and its shares, rate, tokens a second, and the metric of validations.

    A run that goes on from step `start` writes another file there, whose first entry makes TensorBoard drop the steps after `start`
    that the killed process had written; a run from the beginning drops the files themselves.
    """

    def __init__(self, folder: Path, start: int) -> None:
        """Raises TrainError where the package tensorboard is missing, before anything is trained."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise TrainError(
                "training.tensorboard = true needs the package tensorboard: pip install 'squeeze[tensorboard]'; or set it to false."
            ) from error
        if start == 0:
            for file in folder.glob(f"{PREFIX}*"):
                file.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=start + 1, flush_secs=10)

    def step(self, trace: Trace, metric: str) -> None:
        """The newest step of the trace, with the validation that followed it if there was one."""
        step = len(trace.tokens)
        tokens, began = (trace.tokens[-2], trace.seconds[-2]) if step > 1 else (0, 0.0)
        shares = {name: values[-1] for name, values in trace.shares.items()}
        scalars = {"loss/total": sum(shares.values())} | {f"loss/{name}": value for name, value in shares.items()}
        scalars |= {
            "rate": trace.rate[-1],
            "tokens per second": (trace.tokens[-1] - tokens) / max(trace.seconds[-1] - began, 1e-9),
        }
        if trace.validations and trace.validations[-1].step == step:
            scalars[f"held out/{metric}"] = trace.validations[-1].value
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Onto the disk, so that a checkpoint is never ahead of the events."""
        self.writer.flush()

    def close(self) -> None:
        """The last entries onto the disk."""
        self.writer.close()
