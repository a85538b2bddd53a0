"""Test --cuda-graphs: a step and a decoded token can be recorded once and replayed in the same memory."""

import pytest
import torch
from support.builders import optimise
from support.recording import recorded
from support.results import refused

import verify_proto_tokens as vpt


@pytest.fixture
def counted(monkeypatch) -> list:
    """Record on the CPU instead of as CUDA graphs; return the list of all recordings."""
    recordings = []

    def count(work, *inputs):
        recordings.append(work)
        return recorded(work, *inputs)

    monkeypatch.setattr(vpt, "as_cuda_graph", count)
    return recordings


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--optimizer", "adamw", "--grad-clip", 1),
        ("--gradient-checkpointing", "on"),
        ("--num-e-tokens", 2, "--vocabulary", "visual"),
        ("--dtype", "bfloat16"),
    ],
)
def test_a_replayed_evaluation_learns_the_same_bit_for_bit(make_args, counted, options):
    args = make_args("--num-steps", 12, "--target-accuracy", 0, *options)
    models = vpt.load_models(args)
    plain, rows = optimise(models, args)
    args.cuda_graphs = "on"
    replayed, replayed_rows = optimise(models, args)
    assert replayed_rows == rows and torch.equal(replayed.best.points, plain.best.points)
    assert len(counted) == 1


def test_an_evaluation_is_recorded_again_when_a_target_has_ended(tiny_models, make_args, counted):
    codes = torch.stack([torch.zeros(16, dtype=torch.long), torch.arange(16) % 12])
    args = make_args("--m", "own", "--num-steps", 12, "--target-accuracy", 60)
    plain, rows = optimise(tiny_models, args, codes)
    assert plain.targets["steps"][0] < 12
    args.cuda_graphs = "on"
    replayed, replayed_rows = optimise(tiny_models, args, codes)
    assert replayed_rows == rows and torch.equal(replayed.best.points, plain.best.points)
    assert len(counted) == 2


@pytest.mark.parametrize("prompts", [["a"], ["a", "a longer prompt"]])
def test_replayed_decoding_gives_the_same_tokens(tiny_models, make_args, counted, prompts):
    args = make_args()
    plain, _ = vpt.generate_visual_codes(tiny_models, prompts, 16, args)
    args.cuda_graphs = "on"
    replayed, _ = vpt.generate_visual_codes(tiny_models, prompts, 16, args)
    assert torch.equal(replayed, plain) and len(counted) == 1


def test_an_operation_that_makes_the_host_wait_cannot_be_recorded():
    with pytest.raises(RuntimeError, match="the host waits"):
        recorded(lambda x: x.sum().item(), torch.ones(2))


def test_graphs_without_a_cuda_gpu_are_refused_before_anything_loads(call_tiny):
    result = call_tiny("--cuda-graphs", "on")
    refused(result, "--cuda-graphs on needs a CUDA GPU")
    assert "loading" not in result.out
