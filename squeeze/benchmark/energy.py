"""Energy in joules, where the machine counts it: Intel's and AMD's RAPL through powercap, NVIDIA's through NVML.

A counter covers the whole package or board, other programs included; the report says so. Where there is none, or it may
not be read, that is said and nothing is estimated: an energy from a datasheet's watts is a guess with decimals.
"""

from collections.abc import Callable
from pathlib import Path

RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules used since it was made, summed over the counters that can be read; `absent` says why where there is none."""

    def __init__(self, device: str = "cpu", folder: Path = RAPL) -> None:
        self.sources: tuple[str, ...] = ()
        self.absent = ""
        self._counters: list[tuple[Callable[[], float], float]] = []
        if device == "cuda":
            self._open_nvml()
        else:
            self._open_rapl(folder)
        self._last = [read() for read, _ in self._counters]
        self._joules = 0.0

    def joules(self) -> float:
        """Joules since the meter was made. Call it oftener than a counter wraps (about a minute under full load)."""
        for number, (read, span) in enumerate(self._counters):
            now = read()
            passed = now - self._last[number]
            self._joules += passed if passed >= 0 else passed + span
            self._last[number] = now
        return self._joules

    def _open_rapl(self, folder: Path) -> None:
        zones = sorted(zone for zone in folder.glob("*rapl:[0-9]*") if zone.name.count(":") == 1)
        for zone in zones:
            file = zone / "energy_uj"
            try:
                file.read_text("ascii")
                span = int((zone / "max_energy_range_uj").read_text("ascii")) / 1e6
            except PermissionError:
                self.absent = f"{file} may be read by root only"
                continue
            except (OSError, ValueError):
                continue
            self._counters.append((lambda file=file: int(file.read_text("ascii")) / 1e6, span))  # type: ignore[misc]
            self.sources = (*self.sources, zone.name)
        if not self._counters and not self.absent:
            self.absent = "this machine offers no RAPL counter (virtual machines rarely do)"

    def _open_nvml(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            board = pynvml.nvmlDeviceGetHandleByIndex(0)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
        except ImportError:
            self.absent = "NVML is not installed: pip install nvidia-ml-py"
            return
        except Exception as error:
            self.absent = f"NVML gives no energy: {error}"
            return
        self._counters.append((lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(board) / 1e3, float("inf")))
        self.sources = ("nvml:0",)
