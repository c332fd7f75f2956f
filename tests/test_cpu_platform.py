"""Devices: what is really in the machine, and one line with the cure where jax cannot drive it."""

import os

import jax
import pytest

from minigrpo.config import UsageError
from minigrpo.runtime.platform import Machine, choose_platform, explain, start_backend

TPU_V6E, GOOGLE_NETWORK, GPU, INTEL_NPU = (
    ("0x1ae0", "0x006f", "0x120000"),
    ("0x1ae0", "0x0042", "0x020000"),
    ("0x10de", "0x2684", "0x030000"),
    ("0x8086", "0x7d1d", "0x120000"),
)


def machine(root, pci=(), dev=(), driver=""):
    """A file system that looks like a machine with these devices."""
    for number, values in enumerate(pci):
        folder = root / f"sys/bus/pci/devices/0000:00:{number:02x}.0"
        folder.mkdir(parents=True)
        for name, value in zip(("vendor", "device", "class"), values, strict=True):
            (folder / name).write_text(value + "\n")
    for name in dev:
        path = root / "dev" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if driver:
        path = root / "proc/driver/nvidia/version"
        path.parent.mkdir(parents=True)
        path.write_text(f"NVRM version: NVIDIA UNIX {driver}  Release Build\nGCC version:  gcc 12\n")
    return Machine(root)


def driver(version):
    return f"x86_64 Kernel Module  {version}"


OPEN = "Open Kernel Module for x86_64  580.65.06"
CUDA12, CUDA13 = "jax_cuda12_plugin", "jax_cuda13_plugin"

FOUND = {
    "nothing": ({}, [], "cpu"),
    "an Intel NPU": ({"pci": [INTEL_NPU], "dev": ["accel/accel0", "accel0"]}, ["libtpu"], "cpu"),
    "a card passed through": ({"dev": ["vfio/7", "vfio/vfio"]}, ["libtpu"], "cpu"),
    "a Google VM without TPU": ({"pci": [GOOGLE_NETWORK], "dev": ["accel0"]}, ["libtpu"], "cpu"),
    "a v6e": ({"pci": [GOOGLE_NETWORK, TPU_V6E], "dev": ["vfio/0"]}, ["libtpu"], "tpu"),
    "a GPU and CUDA 13": ({"pci": [GPU], "dev": ["nvidiactl"], "driver": OPEN}, [CUDA13], "cuda"),
    "a GPU and CUDA 12": ({"dev": ["nvidia0"], "driver": driver("535.1")}, [CUDA12], "cuda"),
    "a GPU of unknown driver": ({"dev": ["nvidiactl"]}, [CUDA12, CUDA13], "cuda"),
    "a GPU without its driver": ({"pci": [GPU]}, [], "cpu"),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_platform_is_what_is_really_there(name, tmp_path, capsys):
    devices, modules, platform = FOUND[name]
    assert choose_platform(None, machine(tmp_path, **devices), modules.__contains__) == platform
    said = capsys.readouterr().err
    assert said.startswith("note: an NVIDIA GPU is here without") if name == "a GPU without its driver" else not said


UNUSABLE = {
    "no libtpu": (None, {"pci": [TPU_V6E]}, [], "a TPU is here, .*pip install -U 'jax.tpu.'"),
    "no plug-in, new driver": (None, {"driver": driver("580.1")}, [], "no CUDA plug-in.*'jax.cuda13.'"),
    "no plug-in, older driver": (None, {"driver": driver("550.1")}, [], "no CUDA plug-in.*'jax.cuda12.'"),
    "no plug-in, old driver": (None, {"driver": driver("470.1")}, [], "update the driver to 580"),
    "no plug-in, unknown driver": (None, {"dev": ["nvidia0"]}, [], "'jax.cuda13.' .driver 580 or newer. or"),
    "driver too old": (None, {"driver": driver("550.1")}, [CUDA13], "driver 550 is older than the 580 .*jax.cuda12"),
    "driver much too old": ("cuda", {"driver": driver("470.1")}, [CUDA12], "driver 470 is older .*update the driver"),
    "tpu asked": ("tpu", {"dev": ["accel0"]}, ["libtpu"], "JAX_PLATFORMS=tpu: no TPU here"),
    "tpu,cpu asked": ("tpu,cpu", {}, ["libtpu"], "JAX_PLATFORMS=tpu: no TPU here"),
    "cuda asked": ("cuda", {}, [CUDA13], "JAX_PLATFORMS=cuda: no NVIDIA GPU here"),
    "gpu asked on a TPU VM": ("gpu", {"pci": [TPU_V6E]}, ["libtpu"], "JAX_PLATFORMS=gpu: no NVIDIA GPU here"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_device_that_cannot_be_driven_is_one_line_with_the_cure(name, tmp_path):
    asked, devices, modules, message = UNUSABLE[name]
    with pytest.raises(UsageError, match=message) as caught:
        choose_platform(asked, machine(tmp_path, **devices), modules.__contains__)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("asked", "platform"), [("cpu", "cpu"), ("rocm", "rocm"), ("cuda,cpu", "cuda")])
def test_what_is_asked_for_wins(asked, platform, tmp_path):
    here = machine(tmp_path, pci=[TPU_V6E], dev=["nvidiactl"])
    assert choose_platform(asked, here, lambda name: True) == platform


ERRORS = {
    "TPU in use": ("tpu", "ABORTED: The TPU is already in use by process with pid 4321.\nmore", "end 4321 .kill 4321."),
    "TPU busy": ("tpu", "open(/dev/vfio/0): Device or resource busy", "another process holds it: end 77"),
    "wrong image": ("tpu", "Failed to get global TPU topology.", "v2-alpha-tpuv6e"),
    "driver mismatch": ("cuda", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: x", "pip install -U 'jax.cuda12.'"),
    "hidden": ("cuda", "no CUDA-capable device is detected", "CUDA_VISIBLE_DEVICES"),
    "GPU full": ("cuda", "CUDA_ERROR_OUT_OF_MEMORY: out of memory", "another process holds it"),
    "an assertion": ("cuda", "AssertionError", "pip install"),
    "unknown": (
        "abacus",
        "Unknown backend abacus",
        "JAX_PLATFORMS=abacus: jax cannot start it .*name cpu, tpu or cuda",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_jax_says_on_starting_is_one_line_with_the_cure(name, tmp_path):
    platform, text, message = ERRORS[name]
    here = machine(tmp_path, driver=driver("550.1"))
    (tmp_path / "proc/77/fd").mkdir(parents=True)
    (tmp_path / "proc/77/fd/3").symlink_to("/dev/vfio/0")
    (tmp_path / f"proc/{os.getpid()}/fd").mkdir(parents=True)
    (tmp_path / f"proc/{os.getpid()}/fd/4").symlink_to("/dev/vfio/0")
    line = explain(platform, text, here)
    assert "\n" not in line
    with pytest.raises(UsageError, match=message):
        raise UsageError(line)


def failing():
    raise AssertionError


def test_a_backend_that_does_not_start_or_is_another_is_refused(monkeypatch, tmp_path):
    start_backend("cpu")
    with pytest.raises(UsageError, match="the TPU cannot be used .jax chose the cpu.; pip install -U 'jax.tpu.'"):
        start_backend("tpu", machine(tmp_path))
    monkeypatch.setattr(jax, "devices", failing)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    del os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]
    with pytest.raises(UsageError, match="the NVIDIA GPU cannot be used .AssertionError."):
        start_backend("cuda", machine(tmp_path))
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"


@pytest.mark.parametrize(("text", "major"), [(OPEN, 580), (driver("535.183.01"), 535), ("nonsense", 0), ("", 0)])
def test_the_drivers_version_is_read(text, major, tmp_path):
    assert machine(tmp_path, driver=text).driver() == major
