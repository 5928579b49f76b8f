"""Several processes that train together: who is the main one, what the others wait for, and how all end when one fails.

`torchrun` and `accelerate launch` start the same command several times. Only the main process (rank 0) runs it; every other one is a
follower that waits until a training begins, takes part in it, and goes back to waiting. Messages are numbered entries of the launcher's
key-value store (a TCPStore), not collective operations: a process that fails in the middle of an all-reduce can still tell the others,
and a follower can wait for hours (export, bench) without using a core. Rejected: broadcasts over gloo, which pair up with whatever
collective the other side is in, so that an error on one side hangs or garbles the other.

How an error ends all. On the main process: the job is marked as failed, followers that are still in it go once the end is announced. On a
follower: it leaves its reason in the store; the main process, which may be stuck in a collective, sees that within a second, prints the
reason and exits with code 2. A process that is killed closes its connections, and the launcher ends the rest. After an error no process
takes its interpreter down with the group open: gloo's threads may hold tensors still, which ends in SIGABRT (pytorch pull request 179291).
"""

import atexit
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from squeeze.errors import SqueezeError, TrainError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

EVER = timedelta(days=365)
"""How long a follower waits for work, and a collective operation for the slowest process (which may be building a cache)."""
GRACE = 5.0
"""Seconds in which a process that meets the same error as another one may end by itself."""
GLANCE = 0.5
"""Seconds between looks at what the others say while a training runs."""
LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")
"""Variables of the launchers. Children (the bench's, say) must not see them: they would look for processes that are not theirs."""


@dataclass
class _World:
    """All processes of this command, as one of them sees them."""

    rank: int
    size: int
    store: "Store"
    environment: dict[str, str]
    message: int = 0
    """Messages of the main process so far."""
    turns: int = 0
    training: bool = False
    code: int = 1
    """What this process exits with, where the group is still open at its end."""
    stderr: Any = field(default_factory=lambda: sys.stderr)


_world: _World | None = None


def device_of(setting: str) -> "torch.device":
    """Where this process computes under `training.device`: its own CUDA device, or the CPU."""
    import torch

    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def join() -> bool:
    """Meet the other processes that the launcher started; True on the main one. The launcher's variables leave the environment."""
    global _world
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    found, rank, size = next(iter(rendezvous("env://", timeout=timedelta(minutes=30))))
    found.set_timeout(EVER)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"squeeze {attempt}", found)
    distributed.init_process_group(
        backend, store=PrefixStore("collectives", store), rank=rank, world_size=size, timeout=EVER
    )
    held = {n: v for n, v in os.environ.items() if n in LAUNCHER or n.startswith(PREFIXES)}
    for name in held:
        del os.environ[name]
    _world = _World(rank, size, store, held)
    atexit.register(_end, _world)
    return _world.rank == 0


def is_main() -> bool:
    """Whether this process writes and prints."""
    return _world is None or _world.rank == 0


def launcher_asks_for_sharding() -> bool:
    """Whether the launcher was given --use_fsdp."""
    held = os.environ if _world is None else _world.environment
    return held.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def launcher_environment() -> Iterator[None]:
    """Inside, the environment says how many processes train: all within a job, and otherwise this one.

    Of accelerate's own variables only the device is passed on: precision and sharding are settings of the training.
    """
    if _world is None:
        yield
        return
    shown = {n: v for n, v in _world.environment.items() if n in LAUNCHER or n == "ACCELERATE_USE_CPU"}
    if _world.training:
        os.environ.update(shown)
    try:
        yield
    finally:
        for name in (*LAUNCHER, *shown):
            os.environ.pop(name, None)


@contextmanager
def together(job: Mapping[str, Any]) -> Iterator[None]:
    """On the main process: what is trained inside, all processes train. `job` (JSON) tells the followers what it is."""
    if _world is None:
        yield
        return
    world = _world
    _post({"job": dict(job)})
    world.training = True
    try:
        with _watching(world, _failure, _give_up):
            yield
    except RuntimeError as error:
        _post({"failed": True})
        time.sleep(GLANCE)  # a connection that closes is seen before the reason for it
        if (reason := _failure(world)) is not None:
            raise TrainError(f"{reason} Started again, the command goes on from the newest checkpoint.") from error
        raise
    except BaseException:
        _post({"failed": True})
        raise
    finally:
        world.training = False


def dismiss(code: int) -> None:
    """On the main process, at its end: send the followers home with this exit code, and wait a little for them to go."""
    world = _world
    if world is None:
        return
    world.code = code
    _post({"end": code})
    until = time.monotonic() + 3 * GRACE
    while world.store.add("gone", 0) < world.size - 1 and time.monotonic() < until:
        time.sleep(0.05)
    if code == 0:
        _leave()


def follow(work: Callable[[Mapping[str, Any]], None]) -> int:
    """On every other process: do `work` for each job until the main process ends; the exit code that it ends with.

    Never returns after an error that is this process's own: it is printed, and the process exits at once.
    """
    import signal

    world = _world
    assert world is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process says what happens then
    _hush(world)
    while True:
        message = _receive(world)
        if "job" in message:
            _work(world, work, message["job"])
        elif "end" in message:
            code = int(message["end"])
            if code == 0:
                _leave()
            world.store.add("gone", 1)
            world.code = code
            return code


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block first: what it writes there, the others find there."""
    world = _world
    if world is None or not world.training:
        yield
        return
    world.turns += 1
    key = f"turn/{world.turns}"
    if world.rank:
        world.store.wait([key], EVER)
    yield
    if not world.rank:
        world.store.set(key, "done")


def _work(world: _World, work: Callable[[Mapping[str, Any]], None], job: Mapping[str, Any]) -> None:
    world.training = True
    try:
        with _watching(world, _end_after_failure, _go):
            work(job)
    except BaseException as error:
        text = str(error) if isinstance(error, SqueezeError) else f"{type(error).__name__}: {error}"
        trace = "" if isinstance(error, SqueezeError) else traceback.format_exc()
        _fail(world, text, trace)
    finally:
        world.training = False


def _fail(world: _World, text: str, trace: str) -> None:
    """Say what went wrong here. Where the main process met it too, it speaks for all; else this process ends."""
    reason = f"process {world.rank} of {world.size} failed: {text}"
    following = f"message/{world.message + 1}"
    try:
        world.store.set("failed", reason)
        until = time.monotonic() + 6 * GRACE
        while time.monotonic() < until:
            if world.store.check([following]):
                return
            time.sleep(GLANCE)
    except Exception:  # the store is gone, and with it the main process
        trace += "The main process is gone.\n"
    world.stderr.write(f"{trace}squeeze: {reason}\n")
    world.stderr.flush()
    os._exit(SqueezeError.exit_code)


def _post(message: Mapping[str, Any]) -> None:
    assert _world is not None
    _world.message += 1
    _world.store.set(f"message/{_world.message}", json.dumps(message))


def _receive(world: _World) -> dict[str, Any]:
    world.message += 1
    key = f"message/{world.message}"
    try:
        world.store.wait([key], EVER)
        found: dict[str, Any] = json.loads(world.store.get(key))
    except Exception:  # the store went with the process that held it: the main one was killed
        os._exit(SqueezeError.exit_code)
    return found


def _failure(world: _World) -> str | None:
    """What a follower says that went wrong."""
    return world.store.get("failed").decode() if world.store.check(["failed"]) else None


def _end_after_failure(world: _World) -> str | None:
    """On a follower: the main process's exit code, where it failed in this very job and has ended."""
    failed, end = f"message/{world.message + 1}", f"message/{world.message + 2}"
    for key in (failed, end):
        if not world.store.check([key]):
            return None
        message = json.loads(world.store.get(key))
        if "end" in message:
            return str(message["end"])
        if "failed" not in message:
            return None
    return None


def _give_up(world: _World, reason: str) -> None:
    world.stderr.write(f"squeeze: {reason} Started again, the command goes on from the newest checkpoint.\n")
    world.stderr.flush()
    _post({"failed": True})
    dismiss(SqueezeError.exit_code)
    os._exit(SqueezeError.exit_code)


def _go(world: _World, code: str) -> None:
    world.store.add("gone", 1)
    os._exit(int(code))


@contextmanager
def _watching(
    world: _World, look: Callable[[_World], str | None], act: Callable[[_World, str], None]
) -> Iterator[None]:
    """While the block runs, a thread looks what the others say; when the block has not ended GRACE after that, it acts."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(GLANCE):
            try:
                found = look(world)
            except Exception:  # no store: whoever held it is gone, and collectives say so by themselves
                return
            if found is not None:
                if not ended.wait(GRACE):
                    act(world, found)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _hush(world: _World) -> None:
    """What a follower prints is what the main process prints already; its errors go to where stderr was."""
    world.stderr = os.fdopen(os.dup(2), "w")
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _leave() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _end(world: _World) -> None:
    """At exit, before the interpreter goes down. After an error the group is open, and closing it might wait for ever: end at once."""
    from torch import distributed

    if distributed.is_initialized():
        with suppress(OSError, ValueError):  # nobody reads any more, or a stream is closed
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(world.code)
