"""Combine the script's parts as a run does, for tests and tools that examine a single part."""

import argparse
import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

import verify_proto_tokens as vpt


def reference_of(models: vpt.Models, args: argparse.Namespace) -> vpt.Reference:
    """Return the targets, generated or of a control; use and fill the reference cache in the save directory."""
    folder = args.save_dir / vpt.CACHE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return vpt.make_reference(models, args, vpt.ReferenceCache(folder, vpt.describe_run(args, models)), vpt.Inputs())


def random_codes(models: vpt.Models, batch: int = 1, num_tokens: int = 16) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return torch.randint(models.codebook_size, (batch, num_tokens), generator=rng)


class Rows(list):
    """Stand in for a `Recorder`: keep the row of every step."""

    stop_signals = ()

    def keep_step(self, row: dict, learning: vpt.Optimisation) -> None:
        self.append(row)


def optimise(
    models: vpt.Models,
    args: argparse.Namespace,
    codes: Tensor | None = None,
    given_m: Tensor | None = None,
    record: Rows | None = None,
) -> tuple[vpt.Optimisation, list[dict]]:
    """Run a whole optimisation; return it, and the row of every step."""
    learning = vpt.Optimisation(models, random_codes(models) if codes is None else codes, args, given_m)
    rows = Rows() if record is None else record
    learn_all(learning, rows)
    return learning, rows


def learn_all(learning: vpt.Optimisation, rows: Rows) -> None:
    """Continue an optimisation to its end."""
    vpt.learn_batch(learning, rows)
    while not learning.finished:
        learning.begin_batch(learning.batch.stop)
        vpt.learn_batch(learning, rows)


class OneStep:
    """Stand in for a `Recorder` that stops the learning after each step."""

    stop_signals = ()

    def keep_step(self, row: dict, learning: vpt.Optimisation) -> None:
        self.row, self.stop_signals = row, (2,)


def take_step(learning: vpt.Optimisation) -> dict:
    """Take one step of an optimisation; return its row."""
    record = OneStep()
    vpt.learn_batch(learning, record)
    return record.row


@contextlib.contextmanager
def memory_for(models: vpt.Models, targets: int = 1000, from_pass: int = 1, recomputed: bool = False) -> Iterator[list]:
    """Make passes with more than `targets` targets run out of memory, from pass number `from_pass` on.

    If `recomputed`, also passes that do not recompute their layers. Yield the numbers of targets of all passes.
    """
    sizes = []

    def run_out(module: torch.nn.Module, args: tuple, inputs: dict) -> None:
        sizes.append(len(inputs["inputs_embeds"]))
        too_much = sizes[-1] > targets or (recomputed and not module.training)
        if too_much and len(sizes) >= from_pass:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = models.generator.model.register_forward_pre_hook(run_out, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


class ProductInTF32(torch.autograd.Function):
    """Compute F.linear in TF32: round both inputs of each product to ten bits of mantissa, forwards and backwards."""

    @staticmethod
    def forward(context, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        product = ten_bits(states) @ ten_bits(weight).mT
        return product if bias is None else product + bias

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return ten_bits(gradient) @ ten_bits(weight), None, None


def ten_bits(numbers: Tensor) -> Tensor:
    """Round float32's 23 bits of mantissa to ten."""
    return ((numbers.contiguous().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)


def linear_in_tf32(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return ProductInTF32.apply(states, weight, bias)
