"""Choice of a run's device: detecting what the machine has, whether jax can drive it, and the cure where it cannot."""

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from minigrpo.config import UsageError

GOOGLE, NVIDIA = "0x1ae0", "0x10de"
"""Vendors on the PCI bus."""

TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
"""PCI devices of Google's that are TPUs; its network and disk adapters are on the bus of every Google VM."""

PLUGINS = {"jax_cuda13_plugin": ("jax[cuda13]", 580), "jax_cuda12_plugin": ("jax[cuda12]", 525)}
"""jax's plug-ins for NVIDIA, the newest first: what installs each, and the oldest driver that it runs on."""

GPU_SHARE = "0.9"
"""Share of a GPU's memory that jax takes, which plans count on; its own default is 0.75."""

ON_CPU = "or set JAX_PLATFORMS=cpu to run on the CPU"
IMAGE = "create the TPU VM with the runtime image of its generation (v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5-lite: v5e)"
NAMES = {"tpu": "TPU", "cuda": "NVIDIA GPU", "gpu": "NVIDIA GPU"}

Finder = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Folders in which the system lists its devices; tests pass others."""

    root: Path = Path("/")

    def pci(self) -> list[tuple[str, str, str]]:
        """Return (vendor, device, class) of everything on the PCI bus, such as ('0x10de', '0x2684', '0x030000')."""
        folders = sorted((self.root / "sys/bus/pci/devices").glob("*"))
        return [(read(path / "vendor"), read(path / "device"), read(path / "class")) for path in folders]

    def tpus(self) -> int:
        """Return the number of TPU chips; /dev/accel* and /dev/vfio/* are other makers' too, and say nothing."""
        return sum(vendor == GOOGLE and device in TPUS for vendor, device, _ in self.pci())

    def gpu(self) -> bool:
        """Return whether an NVIDIA GPU with a driver is here."""
        nodes = ("nvidiactl", "nvidia[0-9]*")
        return any(True for name in nodes for _ in (self.root / "dev").glob(name)) or bool(self.driver())

    def gpu_without_driver(self) -> bool:
        """Return whether the PCI bus has an NVIDIA GPU that no driver of NVIDIA's serves."""
        return not self.gpu() and any(v == NVIDIA and kind.startswith("0x03") for v, _, kind in self.pci())

    def driver(self) -> int:
        """Return the major version of NVIDIA's driver, 0 when unknown."""
        found = re.search(r"Kernel Module.*?\s(\d+)\.\d", read(self.root / "proc/driver/nvidia/version"))
        return int(found[1]) if found else 0

    def holders(self, names: str) -> list[int]:
        """Return the processes, this one left out, that have a device open whose path matches `names`."""
        pids = set()
        for link in (self.root / "proc").glob("[0-9]*/fd/*"):
            try:
                target = os.readlink(link)
            except OSError:  # another user's, or gone
                continue
            if re.fullmatch(names, target):
                pids.add(int(link.parts[-3]))
        return sorted(pids - {os.getpid()})


def read(path: Path) -> str:
    """Return a small file's text, empty when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def check_tpu(finder: Finder) -> None:
    """Raise UsageError when jax has no library for the TPU that is here."""
    if not finder("libtpu"):
        raise UsageError(f"a TPU is here, but jax cannot drive it (no libtpu): pip install -U 'jax[tpu]', {ON_CPU}")


def cuda_cure(driver: int) -> str:
    """Return the command, or commands, that make jax drive NVIDIA's GPUs with this driver."""
    fitting = next((install for install, oldest in PLUGINS.values() if driver >= oldest), None)
    if fitting:
        return f"pip install -U '{fitting}'"
    if driver:
        return "update the driver to 580 or newer, then pip install -U 'jax[cuda13]'"
    return "pip install -U 'jax[cuda13]' (driver 580 or newer) or 'jax[cuda12]' (525 or newer)"


def check_gpu(machine: Machine, finder: Finder) -> None:
    """Raise UsageError when jax has no plug-in for the GPU that is here, or only one that is too new for its driver."""
    driver = machine.driver()
    installed = [plugin for plugin in PLUGINS if finder(plugin)]
    if not installed:
        raise UsageError(
            f"an NVIDIA GPU is here, but jax cannot drive it (no CUDA plug-in): {cuda_cure(driver)}, {ON_CPU}"
        )
    install, oldest = PLUGINS[installed[0]]
    if driver and driver < oldest:
        raise UsageError(
            f"an NVIDIA GPU is here, but its driver {driver} is older than the {oldest} that {install} needs: "
            f"pip uninstall {installed[0]}, then {cuda_cure(driver)}, {ON_CPU}"
        )


def refuse_absent(asked: str) -> None:
    """Raise UsageError for a device that was asked for and is not here."""
    why, then = "its PCI bus has none", "use a TPU VM"
    if asked != "tpu":
        why, then = "no NVIDIA driver is loaded", "see nvidia-smi"
    raise UsageError(f"JAX_PLATFORMS={asked}: no {NAMES[asked]} here, as {why}; {then}, or leave JAX_PLATFORMS out")


def choose_platform(
    asked: str | None, machine: Machine | None = None, finder: Finder = importlib.util.find_spec
) -> str:
    """Return 'tpu', 'cuda', 'cpu', or another platform that was asked for by jax's setting `asked` (JAX_PLATFORMS).

    UsageError when the device asked for is not here, or when one is here that jax cannot drive.
    """
    machine = machine or Machine()
    first = (asked or "").split(",")[0]
    if first and first not in NAMES:
        return first
    tpu, gpu = machine.tpus() > 0, machine.gpu()
    if first and not (tpu if first == "tpu" else gpu):
        refuse_absent(first)
    if first == "tpu" or (tpu and not first):
        check_tpu(finder)
        return "tpu"
    if gpu:
        check_gpu(machine, finder)
        return "cuda"
    if machine.gpu_without_driver():
        sys.stderr.write(
            "note: an NVIDIA GPU is here without NVIDIA's driver; this runs on the CPU. Install driver 580 or newer "
            "and 'jax[cuda13]' to use it\n"
        )
    return "cpu"


def start_backend(platform: str, machine: Machine | None = None) -> None:
    """Start jax on a platform that `choose_platform` returned; UsageError with the cure when it does not start."""
    if platform == "cuda":
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_SHARE)
    try:
        found = jax.devices()[0].platform
    except Exception as error:  # jax raises RuntimeError, AssertionError and its own
        raise UsageError(explain(platform, str(error) or type(error).__name__, machine or Machine())) from error
    same = {"gpu": "cuda", "rocm": "rocm"}.get(found, found)
    if platform in ("tpu", "cuda") and same != platform:
        raise UsageError(explain(platform, f"jax chose the {found}", machine or Machine()))


def explain(platform: str, text: str, machine: Machine) -> str:
    """Return one line for an error of jax's on starting a platform: its message, and the cure."""
    said = (text.splitlines() or [""])[0].strip()[:200]
    if platform not in NAMES:
        return f"JAX_PLATFORMS={platform}: jax cannot start it ({said}); name cpu, tpu or cuda"
    return f"the {NAMES[platform]} cannot be used ({said}); {cure(platform, text, machine)}"


def cure(platform: str, text: str, machine: Machine) -> str:
    """Return the way on after an error of jax's on starting a TPU or GPU."""
    devices = r"/dev/(accel\d+|vfio/\d+)" if platform == "tpu" else r"/dev/nvidia\d+"
    told = re.search(r"pid (\d+)", text)
    pids = [int(told[1])] if told else machine.holders(devices)
    busy = re.search(r"in use|busy|OUT_OF_MEMORY|out of memory", text)
    if busy and pids:
        return f"another process holds it: end {', '.join(map(str, pids))} (kill {pids[0]})"
    if busy:
        return "another process holds it: end it (sudo lsof /dev/accel* /dev/vfio/* or nvidia-smi names it)"
    if platform == "tpu":
        mismatch = re.search(r"topology|version|UNIMPLEMENTED|runtime", text)
        return IMAGE if mismatch else f"pip install -U 'jax[tpu]', or {IMAGE}"
    if re.search(r"NO_DEVICE|no CUDA-capable", text):
        return "see nvidia-smi, and CUDA_VISIBLE_DEVICES, which may hide it"
    return f"{cuda_cure(machine.driver())}, {ON_CPU}"
