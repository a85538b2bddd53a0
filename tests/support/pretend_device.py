"""Run the script on a pretend device that computes on the CPU: `python pretend_device.py < RUNS`.

Without a GPU, this finds errors that only a GPU would show: operations on tensors of two devices, tensors given to
numpy, and float64 (which MPS lacks). It also counts how often the host waits for the device. RUNS is JSON, a list of
command lines; a run with the word "stopping" is stopped after its second step, a run with "on the CPU" runs there. For
each run, a line of JSON is printed. Not tested: TorchScript, which runs on the CPU behind the same check, and
recomputed layers (torch's Python backends crash there).
"""

import collections
import contextlib
import json
import signal
import sys

import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

torch.inference_mode = torch.no_grad  # tensors of a subclass cannot be inference tensors
import verify_proto_tokens as vpt  # noqa: E402

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend:0")
# Operations that may take tensors of both devices: copies, and indexing, since an index may be on the CPU.
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXED = ("aten::index.Tensor", "aten::index_put_")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")

counts = collections.Counter()


class Pretend(torch.Tensor):
    """A tensor on the pretend device, with its values on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, device=DEVICE, **layout)

    def __init__(self, values: torch.Tensor):
        self.values_on_cpu = values

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


def computed(operation, args: tuple, kwargs: dict) -> object:
    """Compute an operation on the CPU. Raises RuntimeError if its tensors are on two devices, TypeError for float64."""
    name = operation.name()
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.dim() > 0]
    if here and elsewhere and name not in COPIES + INDEXED:
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on the CPU, of {[tuple(t.shape) for t in elsewhere]}")
    to_device = is_pretend(kwargs["device"]) if kwargs.get("device") is not None else bool(here)
    counts["waits"] += bool(here) and the_host_waits(name, args, to_device)
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    values = operation(*tree_map(values_of, args), **tree_map(values_of, kwargs))
    by_values = {id(tensor.values_on_cpu): tensor for tensor in here}  # an in-place operation returns its own argument

    def placed(leaf: object) -> object:
        if not (to_device and isinstance(leaf, torch.Tensor)):
            return leaf
        if leaf.dtype == torch.float64:
            raise TypeError(f"{name} gives float64 on {DEVICE}")
        return by_values[id(leaf)] if id(leaf) in by_values else Pretend(leaf)

    return args[0] if name == "aten::copy_" else tree_map(placed, values)


def the_host_waits(name: str, args: tuple, to_device: bool) -> bool:
    """Return whether the host must wait until this operation on the device's tensors is finished."""
    if name == "aten::_to_copy":
        return not to_device
    if name == "aten::copy_":
        return not isinstance(args[0], Pretend)
    if name in INDEXED:  # the host must know how many elements a mask picks
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return name in READS


def values_of(leaf: object) -> object:
    return leaf.values_on_cpu if isinstance(leaf, Pretend) else leaf


def is_pretend(device: object) -> bool:
    return torch.device(device).type == DEVICE.type


class Operations(TorchDispatchMode):
    """Compute also operations that create tensors: they have no Pretend argument that would dispatch them."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


class Lists(TorchFunctionMode):
    """Make Pretend tensors from Python's numbers and lists, which torch converts without dispatching."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and is_pretend(kwargs.get("device") or "cpu"):
            return self.made(*args, **{name: value for name, value in kwargs.items() if name != "device"})
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Pretend):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(self.made(i, dtype=torch.long) if isinstance(i, list) else i for i in index)
            args = (args[0], index, *args[2:])
        return function(*args, **kwargs)

    def made(self, *args, **kwargs) -> Pretend:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return Pretend(torch.tensor(*args, **kwargs))


class Script:
    """A TorchScript module that takes and returns tensors on the device."""

    def __init__(self, module: torch.jit.ScriptModule):
        self.module = module

    def __call__(self, tensor: torch.Tensor) -> object:
        if not isinstance(tensor, Pretend):
            raise RuntimeError(f"a module on {DEVICE} was given a tensor on {tensor.device}")
        with _disable_current_modes():
            values = self.module(tensor.values_on_cpu)
        return tree_map(lambda leaf: Pretend(leaf) if isinstance(leaf, torch.Tensor) else leaf, values)

    def named_buffers(self) -> list:
        return [(name, Pretend(buffer)) for name, buffer in self.module.named_buffers()]

    def parameters(self):
        return map(Pretend, self.module.parameters())


def main() -> None:
    really_load, really_step, really_generate = vpt.load_torchscript, vpt.Recorder.keep_step, vpt.generate_visual_codes
    really_make, really_save = torch.Generator, torch.save

    def step(record, row, learning):
        really_step(record, row, learning)
        done["waits_by_step"].append(counts["waits"])
        if stopping and learning.step == 2:
            signal.raise_signal(signal.SIGTERM)

    def save(state, file):
        """Save CPU tensors, since the state is loaded on the CPU."""
        with _disable_current_modes():
            really_save(tree_map(values_of, state), file)

    def generate(*args):
        before = counts["waits"]
        decoded = really_generate(*args)
        done["waits_of_decoding"] = counts["waits"] - before
        return decoded

    def load_torchscript(file, device):
        module = really_load(file, torch.device("cpu"))
        return Script(module) if is_pretend(device) else module

    vpt.load_torchscript = load_torchscript
    vpt.render = lambda figure: Image.new("RGB", (8, 8), "white")  # Matplotlib knows no device, and is slow
    vpt.Recorder.keep_step, vpt.generate_visual_codes = step, generate
    torch.Generator, torch.save = lambda device="cpu": really_make(), save
    vpt.targets_at_once = lambda models, num_tokens: 2  # so that there are several batches
    for words in json.load(sys.stdin):
        done, stopping = {"waits_by_step": []}, "stopping" in words
        command = [word for word in words if word not in ("stopping", "on the CPU")]
        device = "cpu" if "on the CPU" in words else DEVICE.type
        with Lists(), Operations(), contextlib.redirect_stdout(sys.stderr):
            try:
                vpt.main(vpt.parse_args([*command, "--device", device]))
            except SystemExit as end:
                if not stopping:
                    raise
                done["exit_code"] = end.code
        print(json.dumps(done))


if __name__ == "__main__":
    main()
