"""A CUDA device that is not there: the whole CUDA path of jactri, at any size, on a machine without a GPU.

Tensors are torch's FakeTensors that say "cuda:0": they have shapes, dtypes and devices, and no values. Triton's launch
path is the real one up to the compile, which is noted instead, as every launch is. What is proven by this: all ops see
tensors of one device, no launch is out of limits or cannot be specialised, and who waits for the device. Numerics,
races and times are not.

`install` patches the process for good (torch.cuda, triton's driver, FakeTensor), so it is for a process of its own,
without ``TRITON_INTERPRET``. It takes a torch with or without CUDA, triton 3.6 and newer.

    device = fake.install()
    with device:                                    # a FakeTensorMode, the same one for the whole process
        net, x = device.problem(workload)           # or device.net(module, dtype), torch.empty(..., device="cuda")
        device.clear()
        jactri.jacobian(net, x, per_sample=True, backend="triton")
    device.launches                                 # every launch: kernel, grid, key of its variant, bytes
    device.variants                                 # by (kernel, key): what triton would have compiled, `Variant`
    device.waits                                    # every wait for the device: op, and which function of jactri asked
                                                    # ("outside": the caller's own function)
    device.queries                                  # the same for questions about its memory

**Values.** An op that brings a value to the host (``item``, ``bool``, ``equal``, ``nonzero``, a copy to or from the
CPU, what checks its own result) waits for the device: it is a `Wait`. The answer is ``device.answer``: by default that
all is true, equal and 1 and that ``any`` is not, so that checks pass; None raises `Waited` instead.

**Choices.** Events tell times by what was launched between them: by ``device.fastest`` a way of our own ("kernels",
the first one that is tried) or torch's ("torch") wins when `chooser` times. The rates of the device and its
free memory are constants.

**Captures.** Inside ``torch.cuda.graph`` what a real capture refuses is noted in ``device.refused``: waits, questions
about memory, events and synchronisation, kernels that would be compiled. A replay does nothing. `captured` gives
launches inside of the last one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _len_torch_dispatch_stack,
)
from torch.utils._pytree import tree_leaves
from triton import runtime
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import jactri
from jactri._src.base import rates, tracing
from jactri._src.compile import compiled, traced
from jactri._src.device import chooser
from jactri.kernels import launches, support

from ..counts import extent, region
from ..workloads import Workload
from .driver import Driver
from .engine import Engine

aten = torch.ops.aten

FREE, TOTAL = 75 << 30, 80 << 30
RATES = rates.Rates(5e13, 2.7e12, 8e-6)
"""Of an H100, near enough to plan with."""

READS = frozenset({
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive, aten._coalesce,
    aten._linalg_check_errors, aten.linalg_eig, aten._linalg_eigh, aten._linalg_svd, aten.linalg_lstsq,
})  # fmt: skip
"""Ops whose CUDA implementation brings a value or a size to the host."""

INDEXED = frozenset({aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_})
COPIES = frozenset({aten._to_copy, aten.copy_, aten.copy})

_TORCH, _HERE = Path(torch.__file__).parent, Path(__file__).parent
MODULES = str(_TORCH / "nn" / "modules")
FOLDERS = tuple(str(Path(p).resolve()) for m in (jactri, jactri.kernels) for p in m.__path__)
BETWEEN = (str(_TORCH), str(_HERE / "fake.py"), str(_HERE / "engine.py"))
"""Files of jactri; files that may lie between those and an op."""


class Waited(RuntimeError):
    """A value was read, and there is no answer."""


@dataclass(frozen=True)
class Wait:
    """One wait for the device: the op, the function of jactri that asked, and the calls that led there."""

    op: str
    site: str
    stack: str


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its grid, its variant's key, bytes of the tensors it was given, each once."""

    kernel: str
    grid: tuple[int, int, int]
    key: str
    bytes: int


@dataclass(frozen=True)
class Variant:
    """What triton would have compiled."""

    function: JITFunction
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    options: Any
    attrs: dict[tuple[int, ...], Any]

    def source(self) -> ASTSource:
        """For ``triton.compile(variant.source(), target=..., options=variant.options.__dict__)``."""
        return ASTSource(self.function, self.signature, self.constexprs, self.attrs)


class Device:
    """What happened on the device, and how it answers; there is one a process, see `install`."""

    def __init__(self) -> None:
        self.answer: int | None = 1
        self.fastest = "kernels"
        self.capturing = False
        self.captured = 0
        self.launches: list[Launch] = []
        self.variants: dict[tuple[str, str], Variant] = {}
        self.waits: list[Wait] = []
        self.queries: list[Wait] = []
        self.refused: list[Wait] = []
        self.mode = _Mode(self)

    def __enter__(self) -> Device:
        self.mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)

    @property
    def entered(self) -> bool:
        """Whether ops of this thread go to the device at this moment."""
        return self.mode in _get_current_dispatch_mode_stack()

    def clear(self) -> None:
        """Forget what happened; variants stay, as compiled kernels do."""
        for record in (self.launches, self.waits, self.queries, self.refused):
            record.clear()

    def net(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module, its parameters and buffers on the device, floating point ones in ``dtype``."""
        for m in module.modules():
            for table in (m._parameters, m._buffers):
                for name, t in table.items():
                    if t is not None:
                        own = dtype if t.is_floating_point() else t.dtype
                        new = torch.empty(t.shape, dtype=own, device="cuda")
                        if isinstance(t, nn.Parameter):
                            new = nn.Parameter(new, t.requires_grad)
                        table[name] = new
        return module

    def problem(self, w: Workload, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        """A workload's network and input."""
        trains = w.operator is not None and w.operator.trains
        net = self.net(w.module().eval().requires_grad_(trains), dtype)
        return net, torch.empty(w.samples, *w.in_shape, dtype=dtype, device="cuda")

    def waited(self, op: str) -> int:
        """Note a wait and answer it."""
        found = _here(op)
        self.waits.append(found)
        self._refuse(found)
        if self.answer is None:
            raise Waited(f"{found.op} waits for the device, in {found.site} ({found.stack})")
        return self.answer

    def asked(self, what: str) -> None:
        """Note a question about memory."""
        found = _here(what)
        self.queries.append(found)
        self._refuse(found)

    def _refuse(self, found: Wait) -> None:
        if self.capturing:
            self.refused.append(found)


def _between(file: str) -> bool:
    return file.startswith(BETWEEN) and not file.startswith(MODULES)


def _here(op: str) -> Wait:
    """The call of ``op`` that is going on: of jactri, or "outside" where the caller's own function made it."""
    frame, calls, owner = sys._getframe(2), [], ""
    while frame is not None:
        code = frame.f_code
        ours = code.co_filename.startswith(FOLDERS)
        if ours:
            calls.append((Path(code.co_filename).stem, code.co_name, frame.f_lineno))
        if not owner and (ours or not _between(code.co_filename)):
            owner = "{}.{}".format(*calls[0]) if ours else "outside"
        frame = frame.f_back
    return Wait(op, owner, " < ".join(f"{file}:{line}" for file, _, line in calls))


class _Mode(TorchDispatchMode):
    """Runs every op on fake tensors. No FakeTensorMode itself: jactri knows those, and would not look for values."""

    def __init__(self, device: Device):
        super().__init__()
        self.fake = _Fake(device)

    def __enter__(self):
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor: on the CPU first, and then to the device by an op
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self.lifted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an op by the fake, but for a launch."""
        if func is launches.OP and not tracing.tracing():
            return launches.run(*args)
        if func is aten._local_scalar_dense.default and not isinstance(args[0], Tensor):
            return args[0]  # torch hands a number that it wrapped itself over as the number
        if func is aten.equal.default and not isinstance(args[0], FakeTensor):
            return func(*args)  # of states of the CPU's generator
        with self.fake:
            return func(*args, **(kwargs or {}))


class _Fake(FakeTensorMode):
    """A note of every op that waits for the device; all else is torch's own."""

    def __init__(self, device: Device):
        super().__init__(allow_non_fake_inputs=False)
        self.owner = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note a wait, and answer it where the answer is a value."""
        kwargs = kwargs or {}
        packet, first = func.overloadpacket, args[0] if args else None
        if packet in READS and _on_cuda(first):
            answer = self.owner.waited(packet.__name__)
            if packet is aten._local_scalar_dense:
                if getattr(first, "made_by", None) is aten.any:
                    answer = not answer
                return _number(first.dtype)(answer)
            if packet is aten.equal:
                return bool(answer) and _alike(*args)
            with self:
                if packet is aten.nonzero:
                    return first.new_empty(first.numel(), first.dim(), dtype=torch.int64)
                if packet is aten._unique2:
                    return tuple(
                        first.new_empty(first.shape, dtype=d)
                        for d in (None, torch.int64, torch.int64)
                    )
        elif packet in COPIES and _crosses(packet, args, kwargs):
            self.owner.waited("copy between CPU and device")
        elif packet in INDEXED and _on_cuda(first):
            given = [t for t in args[1] if isinstance(t, Tensor)]
            if any(t.dtype is torch.bool for t in given):
                self.owner.waited("index by a mask")
            elif any(not _on_cuda(t) and t.dim() for t in given):
                self.owner.waited("index by a tensor on the CPU")
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if packet is aten.any:
            made.made_by = packet
        return made


def _on_cuda(t: Any) -> bool:
    return isinstance(t, Tensor) and t.device.type == "cuda"


def _number(dtype: torch.dtype) -> type:
    if dtype is torch.bool:
        return bool
    return complex if dtype.is_complex else float if dtype.is_floating_point else int


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _crosses(packet: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a copy goes from the CPU to the device or back."""
    if packet is aten._to_copy:
        to = kwargs.get("device") or args[0].device
        return _on_cuda(args[0]) != (torch.device(to).type == "cuda")
    return _on_cuda(args[0]) != _on_cuda(args[1])


# ---- what is patched

_device: Device | None = None


def install() -> Device:
    """Patch this process and give its device; the same one when called again."""
    global _device
    if _device is not None:
        return _device
    if support.interpreted():
        raise RuntimeError("the fake device needs a process without TRITON_INTERPRET")
    _guard()
    device = _device = Device()
    runtime.driver.set_active(Driver("sm_90"))
    JITFunction._do_compile = _noting(device)
    FakeTensor.data_ptr = _data_ptr
    rates.measured = lambda _: RATES
    traced._PLAIN = (*traced._PLAIN, FakeTensor)
    compiled.apart = compiled.apart_in_gradients = lambda *given: None  # there are no values
    chooser._milliseconds.__defaults__ = (1,)  # runs: one tells as much as seven
    _hide(device)
    torch.autograd.Variable._execution_engine = Engine(torch.autograd.Variable._execution_engine)
    torch.Generator = Generator
    for name, made in _functions(device).items():
        setattr(torch.cuda, name, made)
    return device


def _hide(device: Device) -> None:
    """jactri runs otherwise where a mode watches the ops: this one is none that watches."""
    for name, module in list(sys.modules.items()):
        if name.startswith("jactri.") and hasattr(module, "_len_torch_dispatch_stack"):
            module._len_torch_dispatch_stack = lambda: _len_torch_dispatch_stack() - device.entered
    disabled = tracing._disable_current_modes

    @contextlib.contextmanager
    def aside() -> Iterator[None]:
        mode = device.mode if device.entered else contextlib.nullcontext()
        with disabled(), mode:
            yield

    tracing._disable_current_modes = aside


def _guard() -> None:
    """Let autograd ask for the device's streams: a build for the CPU has no guard of CUDA devices, a build for CUDA
    one that asks the driver. The guard of meta tensors does nothing, which is right for both."""
    names = (
        "CPU CUDA MKLDNN OPENGL OPENCL IDEEP HIP FPGA MAIA XLA VULKAN METAL XPU MPS META".split()
    )
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * len(names)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    table[names.index("CUDA")] = table[names.index("META")]


def _data_ptr(t: FakeTensor) -> int:
    """An address: aligned as the allocator's are, and the same for as long as the storage lives."""
    return (t.untyped_storage()._cdata << 8) + t.storage_offset() * t.element_size()


def _noting(device: Device) -> Callable:
    """What stands for triton's compile."""

    def compile_(self, key, signature, on, constexprs, options, attrs, warmup):
        kernel_cache = self.device_caches[on][0]
        kernel_cache[key] = made = _Kernel(device, self.__name__, key)
        device.variants[self.__name__, key] = Variant(self, signature, constexprs, options, attrs)
        device._refuse(_here(f"compile of {self.__name__}"))
        return made

    return compile_


class _Kernel:
    """A kernel that was compiled, as triton's launch path sees it."""

    function = packed_metadata = None

    def __init__(self, device: Device, name: str, key: str):
        self.device, self.name, self.key = device, name, key

    def launch_metadata(self, grid, stream, *args):
        """Nothing that a profiler would like to know."""

    def run(self, x, y, z, stream, function, packed, metadata, entered, left, *args) -> None:
        """Note the launch."""
        grid = x, y, z
        if not (0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16):
            raise RuntimeError(f"{self.name} was launched with a grid of {grid}")
        given = {region(t): extent(t) for t in tree_leaves(args) if isinstance(t, Tensor)}
        self.device.launches.append(Launch(self.name, grid, self.key, sum(given.values())))
        self.device.captured += self.device.capturing


class Generator(torch.Generator):
    """The device's generators are the CPU's: nothing is drawn."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def _functions(device: Device) -> dict[str, Any]:
    """What stands for functions and classes of torch.cuda."""
    turns = itertools.count(1)

    class Event:
        def __init__(self, *args, **options):
            self.at = 0

        def record(self, stream=None):
            self.at = len(device.launches)

        def synchronize(self):
            device._refuse(_here("Event.synchronize"))

        def elapsed_time(self, end):
            """Milliseconds: later ones are longer, so that the first way of the fastest kind wins."""
            launched = "kernels" if end.at > self.at else "torch"
            return float(next(turns)) if launched == device.fastest else 1e9

    class Stream:
        def __init__(self, *args, **options):
            pass

        def wait_stream(self, stream):
            pass

        def wait_event(self, event):
            pass

        def record_event(self, event=None):
            return Event()

    class CUDAGraph:
        def replay(self):
            pass

    @contextlib.contextmanager
    def graph(made, *args, **options) -> Iterator[None]:
        device.capturing, device.captured = True, 0
        try:
            yield
        finally:
            device.capturing = False

    def query(name: str, value: Any) -> Callable:
        def answer(*args):
            device.asked(name)
            return value

        return answer

    def refused(name: str) -> Callable:
        return lambda *args: device._refuse(_here(name))

    def state(*args) -> Tensor:
        device._refuse(_here("get_rng_state"))
        return torch.random.get_rng_state()

    def nothing(*args):
        return contextlib.nullcontext()

    return {
        "_lazy_init": lambda: None,
        "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph, "stream": nothing, "device": nothing,
        "current_stream": Stream, "current_device": lambda: 0, "device_count": lambda: 1,
        "is_current_stream_capturing": lambda: device.capturing,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: SimpleNamespace(total_memory=TOTAL),
        "mem_get_info": query("mem_get_info", (FREE, TOTAL)),
        "memory_reserved": query("memory_reserved", 0), "memory_allocated": query("memory_allocated", 0),
        "synchronize": refused("synchronize"), "empty_cache": refused("empty_cache"), "_sleep": lambda cycles: None,
        "get_rng_state": state,
    }  # fmt: skip
