"""Artifacts are whole or not there: real files, real processes, real kills."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import squeeze
from squeeze import artifact as module
from squeeze.artifact import (
    MANIFEST,
    Artifact,
    chain,
    claim,
    is_artifact,
    read_artifact,
    remove_stale,
    reusable,
    run_of,
    write_artifact,
)
from squeeze.errors import ArtifactError
from squeeze.provenance import digest_bytes, environment
from squeeze.report.schema import FileEntry, Manifest

INPUTS = digest_bytes(b"inputs")
RECIPE, OTHER_RECIPE = digest_bytes(b"recipe"), digest_bytes(b"other recipe")


def maker(name: str = "0-source", **changes: Any) -> Callable[[dict[str, FileEntry]], Manifest]:
    def make(files: dict[str, FileEntry]) -> Manifest:
        fields: dict[str, Any] = {
            "name": name, "format": "torch", "task": "causal-lm", "source": "x", "files": files, "parent": None, "record": None, "data": {},
            "parameters": 1, "nonzero_parameters": 1, "weight_bytes": 1, "inputs": INPUTS, "environment": environment(),
            "created": "2026-11-24T00:00:00+00:00", "extra": {},
        }  # fmt: skip
        return Manifest(**{**fields, **changes})

    return make


def filler(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "weights").write_text(text)
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_text("a b c")

    return fill


def write(folder: Path, text: str = "1 2 3", **changes: Any) -> Artifact:
    return write_artifact(folder, filler(text), make_manifest=maker(folder.name, **changes))


def python(script: str, *arguments: str) -> list[str]:
    """Command of another process that sees this squeeze and this file's helpers."""
    roots = [str(Path(squeeze.__file__).parents[1]), str(Path(__file__).parent)]
    return [sys.executable, "-c", f"import sys; sys.path[:0] = {roots!r}\n{script}", *arguments]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing and reading


def test_an_artifact_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = write(tmp_path / "0-source")
    assert read_artifact(tmp_path / "0-source") == written
    assert written.name == "0-source"
    assert written.digest == written.manifest.digest
    assert written.file("tokenizer/vocab.txt").read_text() == "a b c"
    assert names(tmp_path) == ["0-source"]
    assert written.manifest.files["weights"] == FileEntry(sha256=digest_bytes(b"1 2 3"), bytes=5)


def test_a_file_that_the_manifest_does_not_list_is_offered_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no weihgts\. Did you mean 'weights'\?"):
        write(tmp_path / "a").file("weihgts")


def test_the_digest_does_not_depend_on_the_folder_it_was_written_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert write(tmp_path / "a").digest == write(tmp_path / "elsewhere" / "a").digest


def test_an_older_artifact_is_replaced_whole(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", lambda folder: (folder / "old").touch(), make_manifest=maker("a"))
    write(tmp_path / "a")
    assert read_artifact(tmp_path / "a").file("weights").read_text() == "1 2 3"
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == [MANIFEST, "tokenizer", "weights"]


def test_an_empty_folder_and_an_odd_name_are_fine(tmp_path: Path) -> None:
    folder = tmp_path / "ein Ördner mit 'Zeichen'" / ".." / "ü b"
    (tmp_path / "ein Ördner mit 'Zeichen'").mkdir()
    (tmp_path / "ü b").mkdir()
    write(folder)
    assert read_artifact(tmp_path / "ü b").file("weights").exists()


def test_a_link_in_an_artifact_is_refused_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^link is a symbolic link"):
        write_artifact(tmp_path / "a", lambda folder: (folder / "link").symlink_to("/"), make_manifest=maker())
    assert names(tmp_path) == []


# What stood before stays whole


def fault_full(folder: Path) -> None:
    (folder / "weights").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def fault_full_in_rust(folder: Path) -> None:
    (folder / "weights").write_text("half")
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def fault_read_only(folder: Path) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (
            fault_full,
            r"a cannot be written: the disk is full\. It needs more than 4\.00\sbytes, [\d.]+\s[kMGT]?B are free\.",
        ),
        (fault_full_in_rust, r"a cannot be written: the disk is full\. It needs more than 4\.00\sbytes,"),
        (fault_read_only, r"a cannot be written: it is read-only for this user\. Name another folder\."),
    ],
)
def test_a_failed_write_says_why_and_leaves_the_earlier_artifact(
    tmp_path: Path, fill: Callable[[Path], None], message: str
) -> None:
    before = write(tmp_path / "a")
    with pytest.raises(ArtifactError, match=message):
        write_artifact(tmp_path / "a", fill, make_manifest=maker())
    assert read_artifact(tmp_path / "a") == before
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug"), ArtifactError("mine")])
def test_any_other_exception_passes_and_leaves_the_earlier_artifact(tmp_path: Path, error: BaseException) -> None:
    before = write(tmp_path / "a")

    def fill(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise error

    with pytest.raises(type(error)) as seen:
        write_artifact(tmp_path / "a", fill, make_manifest=maker())
    assert seen.value is error
    assert read_artifact(tmp_path / "a") == before
    assert names(tmp_path) == ["a"]


def test_a_second_rename_that_fails_puts_the_earlier_artifact_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write(tmp_path / "a")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".tmp-" in source.name:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ArtifactError, match=r"a cannot be written: \[Errno 5\] Input/output error\."):
        write(tmp_path / "a", "4 5 6")
    monkeypatch.undo()
    assert read_artifact(tmp_path / "a") == before
    assert names(tmp_path) == ["a"]


KILLED = """
import os, signal
from pathlib import Path
import test_artifact
folder, step = Path(sys.argv[1]), sys.argv[2]

def die(): os.kill(os.getpid(), signal.SIGKILL)

def fill(temporary):
    test_artifact.filler("4 5 6")(temporary)
    if step == "fill": die()

def make_manifest(files):
    if step == "manifest": die()
    return test_artifact.maker("a")(files)

rename = os.rename
def killing(source, target):
    moment = "out" if ".was-" in str(target) else "in"
    if step == f"before {moment}": die()
    rename(source, target)
    if step == f"after {moment}": die()

os.rename = killing
test_artifact.write_artifact(folder, fill, make_manifest=make_manifest)
"""


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        ("fill", "1 2 3"),
        ("manifest", "1 2 3"),
        ("before out", "1 2 3"),
        ("after out", "1 2 3"),
        ("before in", "1 2 3"),
        ("after in", "4 5 6"),
    ],
)
def test_kill_9_at_any_step_leaves_a_whole_artifact(tmp_path: Path, step: str, kept: str) -> None:
    write(tmp_path / "a", "1 2 3")
    done = subprocess.run(python(KILLED, str(tmp_path / "a"), step), check=False)
    assert done.returncode == -signal.SIGKILL
    remove_stale(tmp_path)
    assert read_artifact(tmp_path / "a").file("weights").read_text() == kept
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fill", "after out", "after in"])
def test_the_next_write_clears_what_a_killed_one_left(tmp_path: Path, step: str) -> None:
    write(tmp_path / "a", "1 2 3")
    subprocess.run(python(KILLED, str(tmp_path / "a"), step), check=False)
    write(tmp_path / "a", "7 8 9")
    assert read_artifact(tmp_path / "a").file("weights").read_text() == "7 8 9"
    assert names(tmp_path) == ["a"]


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sync, rename = module.sync, os.rename

    def noting(path: Path) -> None:
        seen.append(re.sub(r"tmp-\d+", "tmp", path.relative_to(tmp_path).as_posix()))
        sync(path)

    def renaming(source: Path, target: Path) -> None:
        seen.append("rename")
        rename(source, target)

    monkeypatch.setattr(module, "sync", noting)
    monkeypatch.setattr(os, "rename", renaming)
    write(tmp_path / "a")
    first = ["a.tmp/squeeze.json", "a.tmp/tokenizer", "a.tmp/tokenizer/vocab.txt", "a.tmp/weights"]
    assert (sorted(seen[:4]), seen[4:]) == (first, ["a.tmp", "rename", "."])


def test_the_half_written_folder_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / f"a.tmp-{os.getppid()}").mkdir()
    (tmp_path / "notes.tmp-draft").touch()
    remove_stale(tmp_path)
    assert names(tmp_path) == [f"a.tmp-{os.getppid()}", "notes.tmp-draft"]


# Nothing of the user's is lost


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a" / "papers").mkdir(parents=True)
    (tmp_path / "a" / "papers" / "thesis.tex").write_text("ten years")
    with pytest.raises(
        ArtifactError, match=r"a holds files that squeeze did not write: papers/thesis\.tex\. Move them"
    ):
        write(tmp_path / "a")
    assert (tmp_path / "a" / "papers" / "thesis.tex").read_text() == "ten years"


def test_a_file_added_to_an_artifact_keeps_it_from_being_replaced_or_reused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    for act in (lambda: write(tmp_path / "a"), lambda: reusable(tmp_path / "a", INPUTS)):
        with pytest.raises(ArtifactError, match=r"squeeze did not write: notes\.txt"):
            act()


def test_a_file_or_a_link_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="file is a file"):
        write(tmp_path / "file")
    with pytest.raises(ArtifactError, match="link is a symbolic link"):
        write(tmp_path / "link")
    with pytest.raises(ArtifactError, match="a cannot be written: .*Not a directory"):
        write(tmp_path / "file" / "a")
    with pytest.raises(ArtifactError, match="a cannot be written: .*No such file or directory"):
        write(tmp_path / "nowhere" / "a")


# Reading what changed


def test_a_changed_file_of_the_same_size_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a").file("weights").write_text("1 2 4")
    with pytest.raises(
        ArtifactError, match=r"a/weights changed after it was written: sha256:\w{12}…, the manifest says"
    ):
        read_artifact(tmp_path / "a")
    assert read_artifact(tmp_path / "a", check=False).name == "a"


@pytest.mark.parametrize("check", [True, False])
def test_a_truncated_file_is_named(tmp_path: Path, check: bool) -> None:
    os.truncate(write(tmp_path / "a").file("weights"), 3)
    with pytest.raises(ArtifactError, match=r"a/weights changed after it was written: 3 bytes, the manifest says 5"):
        read_artifact(tmp_path / "a", check=check)


@pytest.mark.parametrize("check", [True, False])
def test_a_missing_file_is_named(tmp_path: Path, check: bool) -> None:
    write(tmp_path / "a").file("tokenizer/vocab.txt").unlink()
    with pytest.raises(ArtifactError, match=r"a/tokenizer/vocab\.txt is missing"):
        read_artifact(tmp_path / "a", check=check)


def test_a_file_that_is_not_listed_is_named_and_a_hidden_one_is_not(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / ".DS_Store").touch()
    assert read_artifact(tmp_path / "a").name == "a"
    (tmp_path / "a" / "tokenizer" / "extra.bin").touch()
    with pytest.raises(ArtifactError, match=r"files that its manifest does not list: tokenizer/extra\.bin\."):
        read_artifact(tmp_path / "a")


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["weights", MANIFEST])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str, check: bool) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / name).rename(tmp_path / "secret")
    (tmp_path / "a" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=rf"a/{name} is a link to {tmp_path}/secret, outside the artifact"):
        read_artifact(tmp_path / "a", check=check)


def test_a_linked_folder_inside_is_refused_too(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "tokenizer").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"a/tokenizer/vocab\.txt is a link to"):
        read_artifact(tmp_path / "a", check=False)


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99, "new": 1}, r"a/squeeze\.json has schema 99, newer than 2\. Upgrade"),
        ({"new": 1}, r"a/squeeze\.json is not a squeeze manifest: new: Extra inputs"),
        ({"files": {"../../x": {"sha256": INPUTS, "bytes": 1}}}, "is not a plain path inside the folder"),
        ({"files": {"x" * 300: {"sha256": INPUTS, "bytes": 1}}}, "x is missing, though the manifest lists it"),
        ({"files": {"weights": {"sha256": "md5:1", "bytes": 1}}}, r"files\.weights\.sha256: String should match"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / "a")
    edit(tmp_path / "a", **changes)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "\ufffd\x00", "[" * 100_000])
def test_a_torn_manifest_is_named_and_the_artifact_can_be_made_again(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_text(text)
    assert is_artifact(tmp_path / "a")
    assert reusable(tmp_path / "a", INPUTS) is None
    with pytest.raises(ArtifactError, match=r"a/squeeze\.json is not whole JSON"):
        read_artifact(tmp_path / "a")
    assert write(tmp_path / "a") == read_artifact(tmp_path / "a")


def test_what_is_no_artifact_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, message in (
        ("nowhere", "does not exist"),
        ("file", "is not a folder"),
        (".", r"it holds no squeeze\.json"),
    ):
        assert not is_artifact(tmp_path / name)
        with pytest.raises(ArtifactError, match=message):
            read_artifact(tmp_path / name)


# Reuse and chain


def test_an_artifact_is_reused_for_the_same_inputs_only(tmp_path: Path) -> None:
    written = write(tmp_path / "a")
    assert reusable(tmp_path / "a", INPUTS) == written
    assert reusable(tmp_path / "a", digest_bytes(b"others")) is None
    assert reusable(tmp_path / "nowhere", INPUTS) is None
    written.file("weights").write_text("1 2 4")
    assert reusable(tmp_path / "a", INPUTS) is None


def test_the_chain_runs_from_the_source_to_the_artifact(tmp_path: Path) -> None:
    source = write(tmp_path / "0-source")
    stage = write(tmp_path / "1-quantize", "int8", parent=source.digest)
    export = write(tmp_path / "export-1-quantize", "onnx", parent=stage.digest)
    write(tmp_path / "2-other", "another", parent=source.digest)
    assert [m.name for m in chain(export.folder)] == ["0-source", "1-quantize", "export-1-quantize"]
    assert [m.name for m in chain(source.folder)] == ["0-source"]


def test_the_chain_of_a_moved_artifact_begins_with_the_oldest_that_is_there(tmp_path: Path) -> None:
    source = write(tmp_path / "0-source")
    write(tmp_path / "1-quantize", "int8", parent=source.digest)
    (tmp_path / "0-source" / MANIFEST).write_text("torn")
    (only,) = chain(tmp_path / "1-quantize")
    assert only.parent == source.digest


def test_the_chain_is_found_from_inside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "0-source")
    write(tmp_path / "1-quantize", "int8", parent=source.digest)
    monkeypatch.chdir(tmp_path / "1-quantize")
    assert [m.name for m in chain(Path())] == ["0-source", "1-quantize"]


# Claims

HOLDER = """
from pathlib import Path
from squeeze.artifact import claim
with claim(Path(sys.argv[1]), "resume", sys.argv[2]) as held:
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder until its stdin is closed."""
    with subprocess.Popen(
        python(HOLDER, str(folder), RECIPE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("mode", ["new", "resume", "fresh"])
def test_a_second_process_is_refused_with_the_number_of_the_first(tmp_path: Path, mode: Any) -> None:
    with (
        holder(tmp_path / "run") as process,
        pytest.raises(ArtifactError, match=rf"run is in use by process {process.pid}\."),
        claim(tmp_path / "run", mode, RECIPE),
    ):
        pytest.fail("two processes hold one folder")


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        process.kill()
        process.wait()
        assert (tmp_path / "run" / ".lock").read_text() == f"{process.pid}\n"
        with claim(tmp_path / "run", "new", RECIPE) as held:
            assert held.folder == tmp_path / "run"


def test_the_same_command_continues_a_run_that_was_cut_off(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "run", "new", RECIPE) as held:
        write(held.folder / "0-source")
        (held.folder / "1-quantize.tmp-99999999").mkdir()
        raise KeyboardInterrupt
    with claim(tmp_path / "run", "new", RECIPE) as held:
        assert reusable(held.folder / "0-source", INPUTS) is not None
        assert names(held.folder) == [".lock", ".squeeze-run", "0-source"]


def test_a_finished_run_is_entered_only_to_resume_it(tmp_path: Path) -> None:
    with claim(tmp_path / "run", "new", RECIPE) as held:
        write(held.folder / "0-source")
        held.finish()
    with pytest.raises(ArtifactError, match="finished run of this recipe. --resume reuses it, --fresh starts over"):
        claim(tmp_path / "run", "new", RECIPE).__enter__()
    with claim(tmp_path / "run", "resume", RECIPE) as held:
        assert reusable(held.folder / "0-source", INPUTS) is not None


@pytest.mark.parametrize("mode", ["new", "resume"])
def test_the_run_of_another_recipe_is_not_entered(tmp_path: Path, mode: Any) -> None:
    with claim(tmp_path / "run", "new", OTHER_RECIPE):
        pass
    with pytest.raises(ArtifactError, match="holds a run of another recipe. Name another folder, or start over"):
        claim(tmp_path / "run", mode, RECIPE).__enter__()


def test_fresh_removes_what_squeeze_wrote_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with claim(run, "new", OTHER_RECIPE) as held:
        write(run / "0-source")
        held.finish()
    for name in ("report.json", "report.html", "report.docx", "notes.txt"):
        (run / name).touch()
    (run / "papers").mkdir()
    (run / "link").symlink_to(run / "0-source")
    (run / "1-quantize.tmp-99999999").mkdir()
    with claim(run, "fresh", RECIPE):
        assert names(run) == [".lock", ".squeeze-run", "link", "notes.txt", "papers", "report.docx"]


def test_fresh_removes_nothing_at_all_where_an_artifact_holds_a_file_of_the_users(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with claim(run, "new", RECIPE):
        write(run / "0-source")
        write(run / "1-quantize")
    (run / "1-quantize" / "notes.txt").touch()
    with pytest.raises(ArtifactError, match=r"1-quantize holds files that squeeze did not write: notes\.txt"):
        claim(run, "fresh", RECIPE).__enter__()
    assert is_artifact(run / "0-source")


@pytest.mark.parametrize("mode", ["new", "resume", "fresh"])
def test_a_folder_that_holds_no_run_is_refused_and_left_as_it_was(tmp_path: Path, mode: Any) -> None:
    for number in range(7):
        (tmp_path / f"report{number}.json").touch()
    with pytest.raises(
        ArtifactError,
        match=r"is not empty and holds no squeeze run \(report0\.json, .*, report4\.json and 2 more\)\.",
    ):
        claim(tmp_path, mode, RECIPE).__enter__()
    assert len(names(tmp_path)) == 7


@pytest.mark.parametrize("mode", ["new", "resume", "fresh"])
def test_a_new_and_an_empty_folder_are_claimed(tmp_path: Path, mode: Any) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with claim(tmp_path / name, mode, RECIPE) as held:
            assert names(held.folder) == [".lock", ".squeeze-run"]


def test_a_folder_that_cannot_be_made_is_an_error_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="file is a file"):
        claim(tmp_path / "file", "new", RECIPE).__enter__()
    with pytest.raises(ArtifactError, match="deep cannot be made: .*nowhere is not a folder"):
        claim(tmp_path / "nowhere" / "deep", "new", RECIPE).__enter__()
    with pytest.raises(ArtifactError, match="cannot be written: .*File name too long"):
        claim(tmp_path / ("x" * 300), "new", RECIPE).__enter__()


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "read-only")]
)
def test_a_disk_that_takes_nothing_is_an_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "write_atomically", refuse)
    with pytest.raises(ArtifactError, match=f"run cannot be written: .*{message}"):
        claim(tmp_path / "run", "new", RECIPE).__enter__()


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_run_file_that_cannot_be_read_is_named_and_fresh_starts_over(tmp_path: Path, text: str) -> None:
    with claim(tmp_path / "run", "new", RECIPE):
        pass
    (tmp_path / "run" / ".squeeze-run").write_text(text)
    with pytest.raises(ArtifactError, match=r"\.squeeze-run cannot be read: .* Start over with --fresh"):
        claim(tmp_path / "run", "new", RECIPE).__enter__()
    with claim(tmp_path / "run", "fresh", RECIPE):
        pass


def test_a_run_can_be_claimed_a_hundred_times_without_leaking_files(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(100):
        with claim(tmp_path / "run", "new", RECIPE):
            write(tmp_path / "run" / "0-source")
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before
    shutil.rmtree(tmp_path / "run")


def test_a_claim_without_a_recipe_enters_any_run_and_leaves_it_that(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_of(run) is None
    with claim(run, "new", RECIPE) as held:
        write(run / "0-source")
        held.finish()
    with claim(run, "resume", None) as held:
        write(held.folder / "export-0-source")
        held.finish()
        with pytest.raises(ArtifactError, match="is in use by process"):
            claim(run, "resume", None).__enter__()
    assert run_of(run) == RECIPE
    with pytest.raises(ArtifactError, match="finished run of this recipe"):
        claim(run, "new", RECIPE).__enter__()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ArtifactError, match="holds no squeeze run"):
        claim(tmp_path / "other", "resume", None).__enter__()
