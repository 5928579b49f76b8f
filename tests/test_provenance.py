"""Digests name content and nothing else; the environment names the machine without its owner."""

import hashlib
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import squeeze
from squeeze.provenance import CHUNK_BYTES, digest_bytes, digest_file, digest_json, environment

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=10,
)


def test_the_digest_of_nothing_is_the_published_one() -> None:
    assert digest_bytes(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "f").write_bytes(content)
    assert digest_file(tmp_path / "f") == digest_bytes(content) == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_json_is_digested_in_canonical_form() -> None:
    assert digest_json({"b": [1, None], "a": "é"}) == digest_bytes('{"a":"é","b":[1,null]}'.encode())


@given(JSON)
def test_the_order_of_keys_does_not_change_a_digest(value: object) -> None:
    forward, backward = {"x": value, "y": 1}, {"y": 1, "x": value}
    assert digest_json(forward) == digest_json(backward)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_does_not_have_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_json({"x": value})


def test_the_environment_names_this_interpreter_and_its_packages() -> None:
    here = environment()
    assert platform.python_version() in here.python
    assert here.packages["pydantic"] == metadata.version("pydantic")
    assert here.cores >= 1
    assert here.memory_bytes > 2**20
    assert here.cpu


def test_the_environment_does_not_name_the_host_or_the_user() -> None:
    text = environment().model_dump_json()
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo, which only Linux has")
def test_the_flags_are_among_those_that_the_kernel_lists() -> None:
    assert set(environment().cpu_flags) <= set(Path("/proc/cpuinfo").read_text().split())


def test_asking_for_the_environment_imports_nothing_heavy() -> None:
    script = (
        "import sys; from squeeze.provenance import environment; environment()\n"
        "print([m for m in ('torch', 'numpy', 'onnxruntime', 'transformers') if m in sys.modules])"
    )
    root = Path(squeeze.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
