"""A GPU of a process that has none: `python -m pytest -p stand_in` with this folder on the path.

CUDA tensors live in the CPU's memory (`device.cpp`). Triton's kernels run in its interpreter if STAND_IN_TRITON=1 is set; otherwise there
is no Triton, and kernels made of PyTorch's operators run, many times as fast. Values, devices, and what waits for the device are much like
those of a GPU; speed, memory and the order of its sums are not. Needs Linux, g++ and a PyTorch without CUDA; to be imported before PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
MODES = {"default": 0, "warn": 1, "error": 2}
UNAVAILABLE = 3
"""Exit status where there can be no stand-in."""


def unavailable() -> str | None:
    """Why there can be no stand-in here, if so."""
    if sys.platform != "linux":
        return "is built on Linux alone"
    if shutil.which("g++") is None:
        return "needs g++"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "needs a PyTorch without CUDA"
    return None


def torch_folder() -> Path:
    """Where PyTorch is installed; does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ImportError("PyTorch is not installed")
    return Path(spec.origin).parent


def built() -> Path:
    """The library, compiled if it is not there for this source and this PyTorch."""
    folder = torch_folder()
    key = hashlib.sha256(SOURCE.read_bytes() + (folder / "version.py").read_bytes()).hexdigest()[:16]
    library = SOURCE.parent / "build" / f"device-{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    includes = [folder / "include", folder / "include/torch/csrc/api/include"]
    command = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", *[f"-I{path}" for path in includes]]
    command += [str(SOURCE), "-o", str(partial), f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    partial.rename(library)
    return library


def install() -> None:
    """Make `cuda` a device of this process.

    Raises:
        RuntimeError: PyTorch is imported already, and has looked for GPUs.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the stand-in for a GPU must be installed before PyTorch is imported")
    problem = unavailable()
    if problem is not None:
        print(problem, file=sys.stderr)
        sys.exit(UNAVAILABLE)
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    device = ctypes.CDLL(str(built()))
    import torch

    device.stand_in_install()
    _patch_cuda(torch, device)
    if os.environ.get("STAND_IN_TRITON") == "1":
        _interpret_triton(device)
    else:
        _hide_triton()


def _patch_cuda(torch: Any, device: Any) -> None:
    """What `torch.cuda` asks of its driver."""
    properties = SimpleNamespace(
        name="stand-in", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
    )

    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "mem_get_info": (70 << 30, 80 << 30),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "_lazy_init": None,
        "manual_seed": None,
        "manual_seed_all": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.synchronize = lambda *_: device.stand_in_arrive()
    torch.cuda.set_sync_debug_mode = lambda mode: device.stand_in_set_mode(MODES[mode])
    torch.cuda.Event = lambda *_, **__: SimpleNamespace(
        record=lambda *_: None, synchronize=device.stand_in_arrive
    )
    torch.cuda.device = lambda *_: nullcontext()
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *_: torch.get_rng_state()
        module.set_rng_state = lambda *_: None
        module.get_rng_state_all = lambda: [torch.get_rng_state()]
        module.set_rng_state_all = lambda *_: None


def _hide_triton() -> None:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *package: None if name == "triton" else find(name, *package)


def _interpret_triton(device: Any) -> None:
    """The interpreter copies its arguments, which is no waiting of ours."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.interpreter import GridExecutor

    interpret = GridExecutor.__call__

    def quietly(self: Any, *args: Any, **options: Any) -> Any:
        mode = device.stand_in_mode()
        device.stand_in_set_mode(MODES["default"])
        try:
            return interpret(self, *args, **options)
        finally:
            device.stand_in_set_mode(mode)

    GridExecutor.__call__ = quietly


install()
