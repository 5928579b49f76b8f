"""Artifacts: folders that are either whole, as their manifest says, or not there.

An artifact is filled under a temporary name beside its place, hashed, given its manifest, flushed to the disk and only
then renamed, so that kill -9, a full disk or a power cut leaves what stood before. Its digests let a later run reuse
it, and let `bench` and `export` refuse a file that changed since. A run's folder is claimed with a lock that the kernel
releases when its holder dies, so no lock file has to be deleted by hand.

Two renames replace an older artifact, because POSIX cannot rename over a folder that has files: between them it lies
whole as `<name>.was-<pid>`, and `remove_stale` puts it back. Rejected: Linux's RENAME_EXCHANGE (needs ctypes, and the
two renames elsewhere all the same), symbolic links to versioned folders (break on copying), and pid files without a
lock (a recycled pid looks alive). The lock is POSIX's flock: squeeze runs on Linux and macOS.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from squeeze.errors import ArtifactError, nearest
from squeeze.provenance import Digest, digest_file
from squeeze.report.schema import SCHEMA_VERSION, FileEntry, Manifest, first_fault, sync, write_atomically
from squeeze.report.status import STATUS
from squeeze.report.text import amount

MANIFEST = "squeeze.json"
LOCK = ".lock"
RUN = ".squeeze-run"
REPORTS = ("report.json", "report.html")
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<state>tmp|was)-(?P<pid>\d+)")
"""`tmp`: being written when its process died; `was`: an older whole artifact on its way out."""


@dataclass(frozen=True)
class Artifact:
    """A folder and the manifest that was read from it."""

    folder: Path
    manifest: Manifest
    label: str = ""
    """What it is called beside others of the same name; "" where its own name will do."""

    @property
    def digest(self) -> Digest:
        """The manifest's digest: content, not place or time."""
        return self.manifest.digest

    @property
    def name(self) -> str:
        """The manifest's name, such as "1-quantize", unless it has a label."""
        return self.label or self.manifest.name

    @property
    def config(self) -> dict[str, Any]:
        """The network's config.json; empty where there is none, as for an own module."""
        path = self.folder / "config.json"
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists. Raises ArtifactError for any other."""
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.folder} has no {name}. {nearest(name, self.manifest.files)}")
        return self.folder / name


def write_artifact(
    folder: Path, fill: Callable[[Path], None], *, make_manifest: Callable[[dict[str, FileEntry]], Manifest]
) -> Artifact:
    """Make an artifact, or replace an older one, in one step that either happens or does not.

    `fill` writes the files into the folder that it is given; `make_manifest` gets their digests. Whatever either raises
    (Ctrl-C too), the temporary folder is removed and the older artifact is untouched. Raises ArtifactError where the
    disk is full or read-only, and where `folder` holds files that squeeze did not write.
    """
    place = Path(os.path.abspath(folder))
    temporary = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    try:
        remove_stale(place.parent, place.name)
        _refuse_foreign(place)
        temporary.mkdir()
        fill(temporary)
        manifest = make_manifest(_entries(temporary))
        (temporary / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        _sync_tree(temporary)
        _put_in_place(temporary, place)
    except BaseException as error:
        needed = _bytes_in(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or _is_disk_full(error):
            raise _cannot_write(folder, error, needed) from error
        raise
    return Artifact(folder, manifest)


def _refuse_foreign(folder: Path) -> None:
    """Raise ArtifactError where replacing the folder would lose something that squeeze did not write."""
    if folder.is_symlink():
        raise ArtifactError(f"{folder} is a symbolic link. Name the folder that it points to.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file. An artifact is a folder: name another one.")
    try:
        known = _read_manifest(folder).files if is_artifact(folder) else {}
    except ArtifactError:
        return  # its manifest is broken, so nobody can say which of its files were ours: all of them are taken to be
    if foreign := _foreign(folder, known):
        raise ArtifactError(
            f"{folder} holds files that squeeze did not write: {_few(foreign)}. Move them, or name another folder."
        )


def _foreign(folder: Path, known: Collection[str]) -> list[str]:
    """Files in a folder that are neither known nor the manifest; hidden ones aside (.DS_Store and the like)."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder) for path in paths)
    visible = (name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    return [name for name in visible if name != MANIFEST and name not in known]


def _entries(folder: Path) -> dict[str, FileEntry]:
    entries: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ArtifactError(f"{name} is a symbolic link. An artifact holds its files itself: copy it instead.")
        if path.is_file():
            entries[name] = FileEntry(sha256=digest_file(path), bytes=path.stat().st_size)
    return entries


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _put_in_place(temporary: Path, place: Path) -> None:
    if not place.exists():
        os.rename(temporary, place)
        sync(place.parent)
        return
    older = place.with_name(f"{place.name}.was-{os.getpid()}")
    os.rename(place, older)
    try:
        os.rename(temporary, place)
    except BaseException:
        os.rename(older, place)
        raise
    sync(place.parent)
    shutil.rmtree(older, ignore_errors=True)


def read_artifact(folder: Path, *, check: bool = True) -> Artifact:
    """The artifact in a folder, once it is known to be what was written.

    Presence, sizes and links are looked at always; `check` also compares every digest and refuses files that the
    manifest does not list. Raises ArtifactError that names the file.
    """
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder} {fault}. Name an artifact's folder.")
    if not is_artifact(folder):
        raise ArtifactError(f"{folder} is not a squeeze artifact: it holds no {MANIFEST}.")
    manifest = _read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry, content=check)
    if check and (foreign := _foreign(folder, manifest.files)):
        raise ArtifactError(f"{folder} holds files that its manifest does not list: {_few(foreign)}. Move them away.")
    return Artifact(folder, manifest)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    _refuse_outside(folder, path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not whole JSON ({error}). Make the artifact again.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema {version}, newer than {SCHEMA_VERSION}. Upgrade: pip install -U squeeze."
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        fault = first_fault(error)
        raise ArtifactError(f"{path} is not a squeeze manifest: {fault}. Make the artifact again.") from error


def _check_file(folder: Path, name: str, entry: FileEntry, *, content: bool) -> None:
    path = folder / name
    _refuse_outside(folder, path)
    if not os.path.isfile(path):  # false also for a name that no disk can hold, where Path.is_file raises
        raise ArtifactError(f"{path} is missing, though the manifest lists it. Make the artifact again.")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ArtifactError(_changed(path, f"{size} bytes", f"{entry.bytes}"))
    if content and (digest := digest_file(path)) != entry.sha256:
        raise ArtifactError(_changed(path, f"{digest[:19]}…", f"{entry.sha256[:19]}…"))


def _changed(path: Path, found: str, written: str) -> str:
    return f"{path} changed after it was written: {found}, the manifest says {written}. Make the artifact again."


def _refuse_outside(folder: Path, path: Path) -> None:
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(folder)):
        raise ArtifactError(f"{path} is a link to {target}, outside the artifact. Copy the file into the folder.")


def is_artifact(folder: Path) -> bool:
    """True where a folder holds a manifest, whole or not."""
    return (folder / MANIFEST).is_file()


def reusable(folder: Path, inputs: Digest) -> Artifact | None:
    """The artifact that an earlier run made from the same inputs, if every byte of it is still there; else None.

    Raises ArtifactError where making it again would lose a file that squeeze did not write: before the work, not after.
    """
    _refuse_foreign(folder)
    try:
        artifact = read_artifact(folder)
    except ArtifactError:
        return None
    return artifact if artifact.manifest.inputs == inputs else None


def chain(folder: Path) -> list[Manifest]:
    """Manifests from the source to this artifact, each parent found by digest among the folder's siblings.

    Where a parent is not there (the artifact was moved), the list begins with the oldest that is; its `parent` is not
    None.
    """
    line = [read_artifact(folder, check=False).manifest]
    by_digest = siblings(folder)
    while (parent := by_digest.pop(line[0].parent or "", None)) is not None:
        line.insert(0, parent.manifest)
    return line


def siblings(folder: Path) -> dict[Digest, Artifact]:
    """Every artifact in the folder that this one lies in, by digest, its files not looked at; broken ones are passed over."""
    found: dict[Digest, Artifact] = {}
    for path in sorted(Path(os.path.abspath(folder)).parent.iterdir()):
        if is_artifact(path):
            try:
                artifact = Artifact(path, _read_manifest(path))
            except ArtifactError:
                continue
            found[artifact.digest] = artifact
    return found


@dataclass(frozen=True)
class Claim:
    """An output folder that this process alone writes to, while the `with` block lasts."""

    folder: Path
    recipe: Digest | None

    def finish(self) -> None:
        """Say that the run is complete: the same command is then refused instead of continued."""
        if self.recipe is not None:
            _write_run(self.folder, self.recipe, finished=True)


@contextmanager
def claim(folder: Path, mode: Literal["new", "resume", "fresh"], recipe: Digest | None) -> Iterator[Claim]:
    """Create an output folder, or enter that of an earlier run, and hold it against every other process.

    "new" continues a run of the same recipe that was cut off, and refuses one that is complete; "resume" enters that
    too; "fresh" first removes what squeeze wrote. None of them touches a folder that holds anything else, or another recipe's run (except
    "fresh"); without `recipe` it may be any, and stays it. Raises ArtifactError, before any work, also where it cannot be written.
    """
    with _explained(folder):
        _refuse_run(folder, mode, recipe)
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with _explained(folder):
            _hold(lock, folder)
            _refuse_run(folder, mode, recipe)  # again: until the lock was held, another run could change the folder
            remove_stale(folder)
            if mode == "fresh":
                _remove_run(folder)
            if recipe is not None:
                _write_run(folder, recipe, finished=False)
        yield Claim(folder, recipe)
    finally:
        os.close(lock)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot_write(folder, error) from error


def run_of(folder: Path) -> Digest | None:
    """The recipe whose run a folder holds; None where it holds none."""
    return _read_run(folder / RUN)[0] if (folder / RUN).is_file() else None


def _read_run(path: Path) -> tuple[Digest, bool]:
    """The recipe, and whether it was finished."""
    try:
        run = json.loads(path.read_bytes())
        return run["recipe"], run["finished"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}. Start over with --fresh.") from error


def _refuse_run(folder: Path, mode: str, recipe: Digest | None) -> None:
    """Raise ArtifactError where the folder is not one that a run of this recipe may enter."""
    if not folder.exists():
        if not folder.parent.is_dir():
            raise ArtifactError(f"{folder} cannot be made: {folder.parent} is not a folder. Create it first.")
        return
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file. Name a folder for the output.")
    if not (folder / RUN).is_file():
        foreign = [p.name for p in sorted(folder.iterdir()) if p.name != LOCK and not p.name.startswith(f"{RUN}.tmp-")]
        if foreign:
            raise ArtifactError(
                f"{folder} is not empty and holds no squeeze run ({_few(foreign)}). Name a new or an empty folder."
            )
        return
    if mode == "fresh":
        return
    earlier, finished = _read_run(folder / RUN)
    if recipe not in (None, earlier):
        raise ArtifactError(f"{folder} holds a run of another recipe. Name another folder, or start over with --fresh.")
    if finished and mode == "new":
        raise ArtifactError(f"{folder} holds the finished run of this recipe. --resume reuses it, --fresh starts over.")


def _hold(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode("ascii", errors="replace").strip() or "unknown"
        raise ArtifactError(
            f"{folder} is in use by process {holder}. Wait until it ends, or name another folder."
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)


def _write_run(folder: Path, recipe: Digest, *, finished: bool) -> None:
    write_atomically(folder / RUN, json.dumps({"recipe": recipe, "finished": finished}) + "\n")


def _remove_run(folder: Path) -> None:
    """Remove what an earlier run wrote here and nothing else; `.squeeze-run` goes last, so that a cut leaves a run."""
    artifacts = [path for path in sorted(folder.iterdir()) if is_artifact(path) and not path.is_symlink()]
    for path in artifacts:
        _refuse_foreign(path)
    for path in artifacts:
        shutil.rmtree(path)
    for pattern in (".*.training", ".*.generated", ".teacher-cache"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    for path in folder.glob("tensorboard/*/events.out.tfevents.*"):
        path.unlink()
    for path in sorted(folder.glob("tensorboard/**/"), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    for name in (*REPORTS, STATUS, RUN):
        (folder / name).unlink(missing_ok=True)


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Clear away what dead processes left half-written in a folder, and put back what they were about to replace.

    With `name`, only what belongs to that one artifact or file is looked at.
    """
    for path in sorted(folder.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None or name not in (None, match["name"]) or not _is_dead(int(match["pid"])):
            continue
        place = folder / match["name"]
        if match["state"] == "was" and not os.path.lexists(place):
            os.rename(path, place)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_dead(pid: int) -> bool:
    """True where no other process has this number. Our own counts as dead: in a container each run has the same one."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def _is_disk_full(error: BaseException) -> bool:
    """True for ENOSPC and EDQUOT, also where a writer in Rust or C++ has them only in the message of its own error."""
    code = error.errno if isinstance(error, OSError) else None
    return code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _cannot_write(folder: Path, error: BaseException, needed: int = 0) -> ArtifactError:
    """The error for a write that failed: what the disk lacks or forbids, and what to do."""
    if _is_disk_full(error):
        return ArtifactError(
            f"{folder} cannot be written: the disk is full. It needs more than {amount(needed, 'bytes')}, {amount(_free(folder), 'bytes')} "
            "are free. Make room, or name a folder on another disk. What stood there before is whole."
        )
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ArtifactError(f"{folder} cannot be written: it is read-only for this user. Name another folder.")
    return ArtifactError(f"{folder} cannot be written: {error}.")


def _bytes_in(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *Path(os.path.abspath(folder)).parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
