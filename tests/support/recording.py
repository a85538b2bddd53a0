"""Record operations and replay them in the same memory, as a CUDA graph does, on any device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")


class Recording(TorchDispatchMode):
    """Record the operations inside the block and their tensors. Raises RuntimeError if the host reads a tensor."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.name() in HOST_READS:
            raise RuntimeError(f"{operation.name()} cannot be recorded: the host waits for its result")
        results = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        for operation, args, kwargs, results in self.operations:
            with torch._C._AutoDispatchBelowAutograd():
                again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # no view, and not in place
                    old.data.copy_(new)


def recorded(work: Callable[..., object], *inputs: Tensor) -> Callable[..., object]:
    """Stand in for the script's `as_cuda_graph` where there is no CUDA."""
    buffers = [tensor.clone() for tensor in inputs]
    work(*buffers)
    recording = Recording()
    with recording:
        results = work(*buffers)

    def replay(*inputs: Tensor) -> object:
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        recording.replay()
        return results

    return replay
