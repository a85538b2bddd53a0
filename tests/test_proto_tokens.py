"""Test the optimisation: one pass, its loss and gradient, the optimisers, the results of targets, memory, devices."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from support.builders import linear_in_tf32, memory_for, optimise, random_codes, reference_of, take_step, ten_bits
from support.contract import USUAL_RECIPE

import verify_proto_tokens as vpt


@pytest.mark.parametrize("num_e_tokens", [1, 3])
@pytest.mark.parametrize("own_m", [False, True])
def test_one_pass_equals_feeding_the_embeddings_one_by_one(tiny_models, num_e_tokens, own_m):
    rng = torch.Generator().manual_seed(3)
    e_t, m = (torch.randn(2, count, tiny_models.hidden_size, generator=rng) for count in (num_e_tokens, 1))
    proto_tokens = vpt.proto_tokens_of(e_t, m[:, 0] if own_m else m[0])
    hidden_states = vpt.one_pass(tiny_models, proto_tokens, 9, slice(2))
    for row in range(2):
        for position in range(9):
            vectors = [*e_t[row], *[m[row if own_m else 0, 0]] * 8][: position + 1]
            alone = tiny_models.generator.model(inputs_embeds=torch.stack(vectors)[None]).last_hidden_state[0, -1]
            assert torch.allclose(hidden_states[row, position], alone, atol=1e-5)


@pytest.mark.parametrize("vocabulary", ["full", "visual"])
def test_loss_and_gradient_equal_a_plain_loop(tiny_models, make_args, vocabulary):
    args, codes = make_args("--num-steps", "1"), random_codes(tiny_models)
    _, rows = optimise(dataclasses.replace(tiny_models, vocabulary=vocabulary), args, codes)
    start = vpt.initial_proto_tokens(tiny_models, 1, args)
    inputs = torch.cat((start.e_t, start.m[None].expand(1, 15, -1)), dim=1)
    logits = tiny_models.generator(inputs_embeds=inputs).logits[0]  # [N, V]
    if vocabulary == "visual":
        logits = logits[:, 1401:]
    first_code_row = 0 if vocabulary == "visual" else 1401
    loss = sum(-logits[i].log_softmax(0)[codes[0, i] + first_code_row] for i in range(16)) / 16
    (gradient,) = torch.autograd.grad(loss, start.points)
    assert rows[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert rows[0]["gradients/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)


class Head:
    """Stand in for models in which every row of the head [V, D] is a visual code."""

    first_code_row = visual_offset = 0

    def __init__(self, head: torch.Tensor):
        self.head, self.codebook_size = head, len(head)


def test_losses_and_ranks_match_numbers_worked_by_hand():
    logits = torch.tensor(
        [[[9.0, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [0, 0, 0, 8, 0, 0, 0]]]
    )
    # The head is the identity, so the hidden states are the logits; the target is the largest, the fifth largest, the
    # seventh largest, the largest.
    predictions = vpt.predict(Head(torch.eye(7)), logits, torch.tensor([[0, 3, 1, 3]]))
    assert predictions.rank.tolist() == [[0, 4, 6, 0]]
    assert predictions.ids.tolist() == [[0, 0, 0, 3]]
    assert (predictions.num_correct.item(), (predictions.rank < 5).sum().item()) == (2, 3)
    assert predictions.losses[0, 3].item() == pytest.approx(math.log(1 + 6 * math.exp(-8)), rel=1e-4)


def test_only_the_id_that_argmax_takes_is_right_among_equally_likely_ids():
    predictions = vpt.predict(Head(torch.eye(2)), torch.full((1, 2, 2), 5.0), torch.tensor([[0, 1]]))
    assert predictions.rank.tolist() == [[0, 1]] and predictions.ids.tolist() == [[0, 0]]


@pytest.mark.parametrize("logits_at_once", [1, 60, 2**20])
@pytest.mark.parametrize("scale", [1, 100])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, logits_at_once, scale):
    rng = torch.Generator().manual_seed(0)
    hidden_states, head = torch.randn(2, 7, 6, generator=rng) * scale, torch.randn(20, 6, generator=rng)
    targets = torch.randint(20, (2, 7), generator=rng)
    monkeypatch.setattr(vpt, "LOGITS_AT_ONCE", logits_at_once)
    predictions = vpt.predict(Head(head), hidden_states, targets)
    logits = hidden_states @ head.T
    plain = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    assert torch.allclose(predictions.losses, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(predictions.rank, (logits > logits.gather(-1, targets[..., None])).sum(-1))
    assert torch.equal(predictions.ids, logits.argmax(-1))


@pytest.mark.parametrize(("logits_at_once", "targets_per_pass"), [(1, 1), (20_000, 2), (2**20, 3)])
def test_the_gradient_equals_the_formulas_for_any_size_of_chunk_and_pass(
    tiny_models, make_args, monkeypatch, logits_at_once, targets_per_pass
):
    proto_tokens, codes = vpt.initial_proto_tokens(tiny_models, 3, make_args()), random_codes(tiny_models, batch=3)
    monkeypatch.setattr(vpt, "LOGITS_AT_ONCE", logits_at_once)
    predictions = vpt.loss_and_gradient(tiny_models, proto_tokens, codes, targets_per_pass)
    logits = tiny_models.generator(inputs_embeds=proto_tokens.inputs(16)).logits.transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, codes + 1401, reduction="none")
    (gradient,) = torch.autograd.grad(losses.mean(1).sum(), proto_tokens.points)
    assert torch.allclose(proto_tokens.points.grad, gradient, rtol=1e-3, atol=1e-6)
    assert torch.allclose(predictions.losses, losses, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [(), ("--m", "own")])
def test_the_best_accuracy_while_learning_equals_that_of_the_reconstruction(make_args, dtype, options):
    """Check half precision, too, in which a pass over another set of targets may round differently."""
    args = make_args("--dtype", dtype, "--num-steps", 40, "--target-accuracy", 20, *options)
    models = vpt.load_models(args)
    codes = random_codes(models, batch=3)
    learning, _ = optimise(models, args, codes)
    reconstruction = vpt.reconstruct(models, learning.best, codes, learning.predictions)
    predictions = reconstruction.predictions
    assert (100 * predictions.num_correct / 16).tolist() == learning.targets["best_accuracy"].tolist()
    assert torch.equal(predictions.rank == 0, predictions.ids == codes + models.visual_offset)
    assert learning.targets["best_accuracy"].max() > 0


def test_ties_in_bfloat16_are_counted_alike_in_the_rank_and_in_the_prediction(make_args):
    models = vpt.load_models(make_args("--dtype", "bfloat16"))
    # Equal rows give equal logits: every code ties with three others, and all text ids lie below them.
    head = models.generator.lm_head.weight
    head.zero_()
    head[1401:] = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0).bfloat16()
    proto_tokens = vpt.initial_proto_tokens(models, 1, make_args("--initial-scale", 2))
    predictions = vpt.reconstruct(models, proto_tokens, random_codes(models)).predictions
    right = predictions.ids == random_codes(models) + models.visual_offset
    assert torch.equal(predictions.rank == 0, right)
    ties = (predictions.rank == 1).sum()
    assert ties > 0 and set(predictions.drawable_codes.flatten().tolist()) <= {0, 4, 8}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_in_half_precision_have_the_direction_of_float32_gradients(make_args, dtype):
    """Check that the backward pass carries sums over positions: means of 1,024 would cost small gradients ten bits."""

    def gradient(dtype: str) -> torch.Tensor:
        args = make_args("--dtype", dtype)
        models = vpt.load_models(args)
        proto_tokens = vpt.initial_proto_tokens(models, 1, args)
        codes = random_codes(models, num_tokens=1024)
        vpt.loss_and_gradient(models, proto_tokens, codes, targets_per_pass=1)
        return proto_tokens.points.grad.flatten()

    half, exact = gradient(dtype), gradient("float32")
    assert torch.nn.functional.cosine_similarity(half, exact, dim=0) > 0.99
    assert (half == 0).float().mean() <= (exact == 0).float().mean() + 0.01


def test_the_rate_warms_up_then_follows_a_cosine():
    rates = [vpt.rate_at(step, 1000, 20, 0.1) for step in range(1, 1001)]
    assert rates[0] == pytest.approx(0.1 / 20)
    assert max(rates) == rates[20] == pytest.approx(0.1)
    assert rates[(1000 + 20) // 2] == pytest.approx(0.05, rel=0.01)
    assert rates[-1] == pytest.approx(vpt.FINAL_RATE)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 21])
def test_a_short_run_has_positive_rates_too(num_steps):
    assert all(0 < vpt.rate_at(step, num_steps, 20, 0.1) <= 0.1 for step in range(1, num_steps + 1))


def minimise(start: list[list[float]], losses_of, num_steps: int, rate: float = 10, rounding: float = 0):
    """Take L-BFGS steps for problems of two numbers each; return the losses [steps, G] of all points that it tried."""
    points = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer, tried = vpt.LBFGS(points, 2, rate, rounding), []
    for _ in range(num_steps):
        losses = losses_of(points)
        (points.grad,) = torch.autograd.grad(losses.sum(), points)
        tried.append(losses.detach())
        optimizer.step(losses.detach())
    return torch.stack(tried)


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    """Return Rosenbrock's function: its valley is bent, so a first-order method takes thousands of steps."""
    return (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2


def test_lbfgs_finds_the_minimum_of_a_bent_valley():
    assert minimise([[-1.2, 1.0]], rosenbrock, 60)[-1] < 1e-8


def test_lbfgs_treats_each_problem_as_if_it_were_alone():
    starts = [[-1.2, 1.0], [0.5, 2.0], [3.0, -1.0]]
    together = minimise(starts, rosenbrock, 25)
    alone = torch.cat([minimise([start], rosenbrock, 25) for start in starts], dim=1)
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-6)


def test_the_root_mean_square_of_an_lbfgs_step_is_limited_by_the_rate():
    points = []
    minimise([[-1.2, 1.0]], lambda x: (points.append(x.detach().clone()), rosenbrock(x))[1], 40, rate=0.05)
    moves = torch.stack(points).diff(dim=0).square().mean(-1).sqrt()
    assert 0.04 < moves.max() <= 2 * 0.05 + 1e-6  # twice the rate: back from a rejected point, then the next trial


def test_lbfgs_goes_on_where_rounding_hides_the_descent():
    """Round the loss to bfloat16: it is flat over short steps, where a strict search would turn back forever."""
    rounded = minimise(
        [[-1.2, 1.0]],
        lambda x: rosenbrock(x) + (rosenbrock(x).bfloat16().double() - rosenbrock(x)).detach(),
        120,
        rounding=torch.finfo(torch.bfloat16).eps,
    )
    assert rounded[-1] < 1e-3


@pytest.mark.parametrize("spoilt", [3, 4, 12])
def test_lbfgs_treats_a_trial_that_is_not_finite_as_a_step_too_far(spoilt):
    """Check that it goes back, tries a shorter step, and still finds the minimum."""
    count = []

    def losses_of(x: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return rosenbrock(x) * (math.nan if len(count) in (spoilt, spoilt + 1) else 1)

    tried = minimise([[-1.2, 1.0]], losses_of, 70)
    assert tried.isnan().sum() == 2 and tried[-1] < 1e-8


def test_lbfgs_keeps_to_where_the_loss_is_finite():
    tried = minimise([[-1.2, 1.0]], lambda x: torch.where(x[:, 0] < -1.3, math.inf, rosenbrock(x)), 70)
    assert tried[-1] < 1e-8


def test_lbfgs_reports_when_it_cannot_go_back_to_a_finite_loss():
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    optimizer = vpt.LBFGS(points, 2, 0.1, 0.0)
    assert optimizer.can_go_back.tolist() == [False, False]  # nothing was evaluated yet
    for step in range(30):
        points.grad = points.detach().clone()
        losses = points.detach().square().sum(1) / 2
        if step > 4:
            losses[1] = math.nan
        optimizer.step(losses)
        if not optimizer.can_go_back[1]:
            break
    assert optimizer.can_go_back.tolist() == [True, False] and step > optimizer.TRIES
    assert points.isfinite().all()


def test_lbfgs_discards_a_direction_without_a_finite_loss_beyond_its_start():
    """Shorten the step until rounding undoes it: the loss is then the one at x, which must not count as a success."""
    points, x = torch.tensor([[3.0, -2.0]], requires_grad=True), None
    optimizer = vpt.LBFGS(points, 2, 0.1, 1e-7)
    for _ in range(60):
        points.grad = 4 * points.detach() ** 3
        losses = (points.detach() ** 4).sum(1)
        if x is not None and not torch.equal(points.detach(), x):
            losses = losses * math.nan
        elif optimizer.pairs[0, 0, -5:].any(1).all():
            x = points.detach().clone()  # from here on, nothing else is finite
        optimizer.step(losses)
        if not optimizer.can_go_back:
            break
    assert x is not None and not optimizer.can_go_back and not optimizer.pairs.any()
    assert torch.equal(optimizer.x, x)


@pytest.mark.parametrize("name", ["lbfgs", "adamw"])
def test_an_optimizer_that_drops_a_problem_continues_the_others_as_if_alone(tiny_models, name):
    args = vpt.parse_args(["--optimizer", name])
    start = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    def steps(points: torch.Tensor, optimizer, count: int) -> torch.Tensor:
        for _ in range(count):
            points.grad = 4 * points.detach() ** 3
            optimizer.step((points.detach() ** 4).sum(1))
        return points.detach()

    def make(points: torch.Tensor):
        return vpt.make_optimizer(points, args, tiny_models.generator)

    points = start.clone().requires_grad_()
    optimizer = make(points)
    kept, together = torch.tensor([0, 2]), steps(points, optimizer, 5)[[0, 2]].requires_grad_()
    optimizer.drop_others(kept, together)
    alone = start[kept].requires_grad_()
    after = steps(together, optimizer, 5)
    assert torch.allclose(after, steps(alone, make(alone), 10), rtol=1e-4, atol=1e-6) and after.isfinite().all()


@pytest.mark.parametrize("recipe", ["--optimizer adamw", USUAL_RECIPE])
def test_adamw_follows_the_rate_and_clips_each_problem_on_its_own(recipe):
    """Compare with one plain torch.optim.AdamW per problem."""
    args = vpt.parse_args([*recipe.split(), "--num-steps", "40"])
    rng = torch.Generator().manual_seed(0)
    ours = torch.zeros(2, 6, requires_grad=True)
    optimizer = vpt.AdamW(ours, args)
    theirs = [torch.nn.Parameter(torch.zeros(6)) for _ in range(2)]
    torchs = [torch.optim.AdamW([each], betas=args.betas, weight_decay=0.0) for each in theirs]
    for step in range(1, 41):
        gradients, before = torch.randn(2, 6, generator=rng), ours.detach().clone()
        for each, its_optimizer, gradient in zip(theirs, torchs, gradients, strict=True):
            its_optimizer.param_groups[0]["lr"] = vpt.rate_at(step, 40, args.warmup_steps, args.learning_rate)
            each.grad = gradient.clone()
            if args.grad_clip:
                torch.nn.utils.clip_grad_norm_([each], args.grad_clip)
            its_optimizer.step()
        ours.grad = gradients.clone()
        optimizer.step(torch.ones(2))
        assert torch.allclose(ours, torch.stack(list(theirs)), rtol=1e-4, atol=1e-6)
        assert torch.allclose(optimizer.change, (ours - before).square().mean(1).sqrt())


def test_the_product_with_the_inverse_hessian_equals_the_two_loop_recursion():
    """Compare with algorithm 7.4 of Nocedal and Wright, which takes the pairs one by one."""
    rng = torch.Generator().manual_seed(0)
    gradient, steps = torch.randn(12, generator=rng).double(), torch.randn(5, 12, generator=rng).double()
    root = torch.randn(12, 12, generator=rng).double()
    changes = steps @ (root @ root.T + torch.eye(12))
    q, weights = gradient.clone(), []
    for step, change in zip(steps.flip(0), changes.flip(0), strict=True):
        weights.append((step @ q) / (step @ change))
        q -= weights[-1] * change
    scales = torch.rand(12, generator=rng).double()
    q *= scales
    for step, change, weight in zip(steps, changes, reversed(weights), strict=True):
        q += (weight - (change @ q) / (step @ change)) * step
    padded = [torch.cat((torch.zeros(2, 12), pairs))[None] for pairs in (steps, changes)]  # two places still empty
    assert torch.allclose(vpt.inverse_hessian_times(gradient[None], *padded, scales[None])[0], q)


def test_each_embedding_has_the_scale_of_its_own_curvature():
    step, change = torch.ones(1, 6), torch.tensor([[4, 4, 0.5, 0.5, -1, -1]])
    of_all = (8 + 1 - 2) / (32 + 0.5 + 2)
    far, near = (vpt.scales_of_embeddings(step, change, 2, apart)[0].tolist() for apart in (30, 2))
    assert far == pytest.approx([0.25, 0.25, 2, 2, of_all, of_all])  # the third curves downwards: the common scale
    assert near == pytest.approx([0.25, 0.25, 2 * of_all, 2 * of_all, of_all, of_all])


def test_the_generator_gets_no_gradients_and_keeps_its_values_bit_for_bit(tiny_models, make_args):
    before = {name: p.clone() for name, p in tiny_models.generator.named_parameters()}
    _, rows = optimise(tiny_models, make_args("--num-steps", "30"))
    for name, parameter in tiny_models.generator.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_only_two_hidden_sized_vectors_learn(tiny_models, make_args):
    result, _ = optimise(tiny_models, make_args("--num-steps", "5"))
    assert result.best.e_t.shape == (1, 1, tiny_models.hidden_size)
    assert result.best.m.shape == (1, tiny_models.hidden_size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_proto_tokens_are_float32_whatever_the_generators_precision(make_args, dtype):
    args = make_args("--dtype", dtype, "--num-steps", "5")
    models = vpt.load_models(args)
    assert models.generator.dtype == getattr(torch, dtype)
    result, _ = optimise(models, args)
    assert result.best.e_t.dtype == result.best.m.dtype == torch.float32


def test_the_best_embeddings_are_kept_not_the_last(tiny_models, make_args):
    args = make_args("--num-steps", 100, *USUAL_RECIPE.split(), "--learning-rate", 0.05)  # the accuracy falls again
    result, rows = optimise(tiny_models, args)
    accuracies = [row["train/accuracy"] for row in rows]
    assert max(accuracies) == rows[-1]["train/best_accuracy"] == accuracies[result.targets["best_step"][0] - 1]
    reconstruction = vpt.reconstruct(tiny_models, result.best, random_codes(tiny_models))
    assert 100 * reconstruction.predictions.num_correct.item() / 16 == max(accuracies) > accuracies[-1]
    assert result.summary()["final_accuracy"] == accuracies[-1]


def test_learning_stops_as_soon_as_the_target_accuracy_is_reached(tiny_models, make_args):
    same = torch.zeros(1, 16, dtype=torch.long)  # sixteen times one code: easy
    result, rows = optimise(tiny_models, make_args("--num-steps", "500", "--target-accuracy", "90"), same)
    assert result.step < 500
    assert [row["train/accuracy"] >= 90 for row in rows] == [False] * (len(rows) - 1) + [True]


def test_target_accuracy_zero_never_stops_early(tiny_models, make_args):
    same = torch.zeros(1, 16, dtype=torch.long)
    result, rows = optimise(tiny_models, make_args("--num-steps", "100", "--target-accuracy", "0"), same)
    assert result.step == 100 and rows[-1]["train/accuracy"] == 100


def test_the_same_seed_gives_the_same_history_bit_for_bit(tiny_models, make_args):
    first, second = (optimise(tiny_models, make_args("--num-steps", "20"))[1] for _ in range(2))
    assert first == second
    assert first != optimise(tiny_models, make_args("--num-steps", "20", "--seed", "7"))[1]


def test_clipping_changes_the_update_but_not_the_logged_norm(tiny_models, make_args):
    free = optimise(tiny_models, make_args("--num-steps", "3", "--optimizer", "adamw"))[1]
    clipped = optimise(tiny_models, make_args("--num-steps", "3", "--optimizer", "adamw", "--grad-clip", "1e-9"))[1]
    assert clipped[0]["gradients/grad_norm"] == free[0]["gradients/grad_norm"]
    assert clipped[2]["train/loss"] != free[2]["train/loss"]


def spoil_passes(models: vpt.Models, spoilt: range):
    """Make the passes with the numbers `spoilt` return NaN."""
    calls = []

    def spoil(module, inputs, output):
        calls.append(1)
        if len(calls) in spoilt:
            output.last_hidden_state = output.last_hidden_state * math.nan
        return output

    return models.generator.model.register_forward_hook(spoil)


def test_two_steps_without_a_finite_loss_do_not_stop_learning(tiny_models, make_args):
    hook = spoil_passes(tiny_models, range(10, 12))
    result, rows = optimise(tiny_models, make_args("--num-steps", 60))
    hook.remove()
    assert not result.targets.diverged.any() and len(rows) == 60
    assert rows[9]["train/loss"] == rows[10]["train/loss"] == rows[8]["train/loss"]  # the last finite loss
    assert rows[-1]["train/loss"] < rows[8]["train/loss"]


@pytest.mark.parametrize(("options", "most"), [(("--optimizer", "adamw"), 10), ((), 30)])
def test_a_loss_that_stays_not_finite_ends_the_run_with_the_best_so_far(tiny_models, make_args, options, most):
    """Let L-BFGS try at most ten shorter steps along its direction, then ten along the steepest descent."""
    hook = spoil_passes(tiny_models, range(10, 1000))
    result, rows = optimise(tiny_models, make_args("--num-steps", 200, *options))
    hook.remove()
    assert result.targets.diverged and 10 <= result.step == len(rows) <= most
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    best = min(rows, key=lambda row: (-row["train/accuracy"], row["train/loss"]))
    assert result.targets["best_step"].tolist() == [best["step"]]
    assert result.best.points.isfinite().all()


def test_several_targets_share_m_and_have_an_e_t_each(tiny_models, make_args):
    result, _ = optimise(tiny_models, make_args("--num-steps", "5"), random_codes(tiny_models, batch=3))
    assert result.best.e_t.shape == (3, 1, tiny_models.hidden_size)
    assert result.best.m.shape == (1, tiny_models.hidden_size)
    assert len(set(result.targets["best_step"].tolist())) == 1  # one m: the targets share their best step


def test_each_row_has_means_over_the_targets_and_each_targets_own_numbers(tiny_models, make_args):
    _, rows = optimise(tiny_models, make_args("--num-steps", "5"), random_codes(tiny_models, batch=3))
    for row in rows:
        for name in ("loss", "accuracy", "best_accuracy"):
            own = [row[f"targets/{k}/{name}"] for k in range(3)]
            assert row[f"train/{name}"] == pytest.approx(sum(own) / 3)
        assert row["train/correct_tokens"] == round(3 * 16 * row["train/accuracy"] / 100)


@pytest.mark.parametrize("options", [(), ("--optimizer", "adamw"), ("--optimizer", "adamw", "--grad-clip", "0.01")])
def test_targets_with_an_m_of_their_own_learn_together_as_each_would_alone(tiny_models, make_args, options):
    args, codes = make_args("--num-steps", "40", "--m", "own", *options), random_codes(tiny_models, batch=3)
    together, rows = optimise(tiny_models, args, codes)
    for k in range(3):
        alone, own_rows = optimise(tiny_models, args, codes[k : k + 1])
        assert rows[9][f"targets/{k}/loss"] == pytest.approx(own_rows[9]["train/loss"], rel=1e-3)
        best = together.targets["best_accuracy"][k].item(), alone.targets["best_accuracy"].item()
        assert best[0] == pytest.approx(best[1], abs=100 / 16)


def test_a_target_given_twice_with_a_shared_m_learns_as_if_given_once(tiny_models, make_args):
    args, codes = make_args("--num-steps", "10", "--optimizer", "adamw"), random_codes(tiny_models)
    _, once = optimise(tiny_models, args, codes)
    _, twice = optimise(tiny_models, args, codes.repeat(2, 1))
    assert [row["train/loss"] for row in twice] == pytest.approx([row["train/loss"] for row in once], rel=1e-3)


@pytest.mark.parametrize("at", [1, 2, 100])
def test_a_step_that_runs_out_of_memory_is_taken_again_with_its_layers_recomputed(tiny_models, make_args, capsys, at):
    args = make_args("--num-steps", at + 2, "--target-accuracy", 0)
    _, plain = optimise(tiny_models, args)
    with memory_for(tiny_models, from_pass=at, recomputed=True) as sizes:
        _, starved = optimise(tiny_models, args)
    assert starved == plain and len(sizes) == at + 3
    assert capsys.readouterr().out == "note: out of memory for a step: going on with --gradient-checkpointing on\n"


@pytest.mark.parametrize(("at", "options"), [(1, ("--m", "own")), (2, ()), (100, ("--m", "own"))])
def test_a_step_still_out_of_memory_is_taken_again_with_half_the_targets(tiny_models, make_args, capsys, at, options):
    args = make_args("--num-steps", at + 5, "--target-accuracy", 0, "--gradient-checkpointing", "on", *options)
    codes = random_codes(tiny_models, batch=5)
    with memory_for(tiny_models, targets=2, from_pass=at) as sizes:
        _, starved = optimise(tiny_models, args, codes)
    assert sizes[at - 1 : at + 4] == [5, 3, 2, 2, 1] and set(sizes[at + 4 :]) == {1, 2}
    assert len(starved) == at + 5
    _, plain = optimise(tiny_models, make_args(*options, "--num-steps", 6, "--target-accuracy", 0), codes)
    for one, other in zip(plain, starved, strict=False):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
    assert [line[-18:] for line in capsys.readouterr().out.splitlines()] == [
        "3 targets per pass",
        "2 targets per pass",
    ]


def test_layers_are_not_recomputed_if_the_user_switched_it_off(tiny_models, make_args):
    args = make_args("--num-steps", 3, "--gradient-checkpointing", "off")
    with memory_for(tiny_models, recomputed=True) as sizes, pytest.raises(torch.OutOfMemoryError):
        optimise(tiny_models, args, random_codes(tiny_models, batch=2))
    assert sizes == [2, 1]


def test_a_given_m_does_not_change_while_e_t_learns(tiny_models, make_args):
    args, m = make_args("--num-steps", "5"), torch.full((1, tiny_models.hidden_size), 0.3)
    start = vpt.initial_proto_tokens(tiny_models, 1, args, m)
    learning, rows = optimise(tiny_models, args, given_m=m)
    assert torch.equal(learning.best.m, m) and not torch.equal(learning.best.e_t, start.e_t)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_targets_under_one_given_m_learn_together_as_each_would_alone(tiny_models, make_args):
    args, codes, m = make_args("--num-steps", "40"), random_codes(tiny_models, batch=3), torch.full((1, 32), 0.3)
    alone = [optimise(tiny_models, args, row, m)[0].targets["best_accuracy"].item() for row in codes.split(1)]
    together, _ = optimise(tiny_models, args, codes, m)
    assert together.targets["best_accuracy"].tolist() == pytest.approx(alone, abs=100 / 16)


def test_the_best_of_a_target_is_final_once_it_has_reached_the_target_accuracy(tiny_models, make_args):
    args = make_args("--num-steps", "60", "--m", "own", "--target-accuracy", "90")
    codes = torch.cat((torch.zeros(1, 16, dtype=torch.long), random_codes(tiny_models)))  # an easy one, a hard one
    together, rows = optimise(tiny_models, args, codes)
    first = next(row["step"] for row in rows if row["targets/0/accuracy"] >= 90)
    assert together.targets["best_step"][0] == first < together.step


def numbers_of(accuracies: list[float], finite: list[bool], can_go_back: bool = False) -> dict[str, torch.Tensor]:
    """Return a step's numbers; the loss falls as the accuracy rises."""
    accuracy = torch.tensor(accuracies, dtype=torch.float64)
    ones = torch.ones_like(accuracy)
    return {
        "loss": torch.where(torch.tensor(finite), 100 - accuracy, math.nan),
        "num_correct": accuracy / 10,
        "accuracy": accuracy,
        "top5_accuracy": accuracy,
        "grad_norm": ones,
        "can_go_back": can_go_back * ones,
    }


def test_targets_that_share_m_end_at_the_first_step_at_which_all_have_reached_the_accuracy(make_args):
    targets = vpt.TargetResults(2, together=True, args=make_args("--target-accuracy", 99))
    for accuracies in ([100.0, 98.8], [99.2, 99.2]):
        assert not targets["ended"].any()
        better = targets.update([0, 1], numbers_of(accuracies, [True] * 2))
    assert targets["ended"].all() and targets["reached"].all() and better.all()
    assert targets["best_accuracy"].tolist() == [99.2, 99.2] and targets["best_step"].tolist() == [2, 2]


def test_means_cover_the_targets_that_began_and_the_best_accuracy_covers_all(make_args):
    targets = vpt.TargetResults(3, together=False, args=make_args())
    targets.update([0, 2], numbers_of([80.0, 50.0], [True, True]))
    targets.update([0, 2], numbers_of([70.0, 0.0], [True, False]))
    means, columns = targets.means(), targets.numbers_per_target()
    assert means["train/accuracy"] == 60 and means["train/best_accuracy"] == pytest.approx((80 + 50) / 3)
    assert columns["targets/0/best_accuracy"] == 80 and columns["targets/1/accuracy"] is None
    row = {"target": 2, "prompt": "c", "best_accuracy": 50, "best_step": 1, "steps": 1, "diverged": True}
    assert targets.rows(["a", "b", "c"])[2] == row


def test_a_step_that_is_not_finite_keeps_the_last_numbers_and_ends_only_a_target_that_cannot_go_back(make_args):
    targets = vpt.TargetResults(1, together=False, args=make_args())
    targets.update([0], numbers_of([80.0], [True]))
    better = targets.update([0], numbers_of([90.0], [False], can_go_back=True))
    assert not better and not targets["ended"] and targets["steps"] == 2 and targets["accuracy"] == 80
    targets.update([0], numbers_of([90.0], [False]))
    assert targets["ended"] and targets.diverged and targets["best_accuracy"] == 80 and targets["steps"] == 2


def test_more_e_tokens_reach_a_higher_accuracy(tiny_models, make_args):
    """Learn sixteen embeddings for sixteen tokens: there is no m, and each embedding has one token of its own."""
    one, sixteen = (
        optimise(tiny_models, make_args("--num-steps", "300", "--num-e-tokens", count))[0] for count in ("1", "16")
    )
    assert one.targets["best_accuracy"].item() < sixteen.targets["best_accuracy"].item() == 100


def test_gradient_checkpointing_changes_no_number(tiny_models, make_args):
    kept, recomputed = (
        optimise(tiny_models, make_args("--num-steps", "6", "--gradient-checkpointing", choice))
        for choice in ("off", "on")
    )
    assert kept[1] == recomputed[1] and torch.equal(kept[0].best.points, recomputed[0].best.points)


@pytest.mark.parametrize(("choice", "passes"), [("off", 1), ("on", 2)])
def test_gradient_checkpointing_computes_each_layer_again_in_the_backward_pass(tiny_models, make_args, choice, passes):
    layers, calls = tiny_models.generator.model.layers, []
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    optimise(tiny_models, make_args("--num-steps", 1, "--gradient-checkpointing", choice))
    assert len(calls) == passes * len(layers)


# ----------------------------------------------------------------------------------------------------------------------
# What the host asks of a device


def host_reads(work) -> int:
    """Count how often the host reads a number from a device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return sum(event.name in ("aten::_local_scalar_dense", "aten::is_nonzero") for event in profile.events())


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--m", "own"),
        ("--optimizer", "adamw"),
        ("--optimizer", "adamw", "--grad-clip", 1),
        ("--gradient-checkpointing", "on"),
    ],
)
def test_a_step_reads_nothing_from_the_device_but_its_numbers(tiny_models, make_args, options):
    args = make_args("--target-accuracy", 50, *options)
    learning = vpt.Optimisation(tiny_models, random_codes(tiny_models, batch=2), args)
    take_step(learning)

    def work_on_the_device() -> None:
        predictions = learning.evaluate()
        vpt.numbers_of(predictions, learning.proto_tokens, learning.optimizer)
        learning.optimizer.step(predictions.losses.mean(1))
        learning.keep_best(torch.tensor([True, True]), predictions)

    # The one copy of all numbers does not count as a read; torch's AdamW reads its number of steps, on the host.
    assert host_reads(work_on_the_device) == (args.optimizer == "adamw")


@pytest.mark.parametrize("options", [(), ("--top-k", 3), ("--top-p", 0.9), ("--repetition-penalty", 1.2)])
def test_decoding_a_token_reads_nothing_from_the_device(make_args, options):
    args = make_args(*options)
    models = vpt.load_models(args)

    def reads(num_tokens: int) -> int:
        return host_reads(lambda: vpt.generate_visual_codes(models, ["a cat", "a"], num_tokens, args))

    assert reads(3) == reads(12) > 0  # the first and the last token check that all logits were finite


def test_prompts_are_decoded_in_smaller_batches_if_memory_runs_out(tiny_models, make_args, monkeypatch):
    prompts = [word for name in "abcde" for word in ("--prompt", name)]
    together = reference_of(tiny_models, make_args(*prompts))
    batches, really_generate = [], vpt.generate_visual_codes

    def generate(models, some, *rest):
        batches.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return really_generate(models, some, *rest)

    monkeypatch.setattr(vpt, "generate_visual_codes", generate)
    split = reference_of(tiny_models, make_args(*prompts, "--force-generate"))
    assert batches == [5, 3, 2, 2, 1] and torch.equal(split.codes, together.codes)


def test_a_device_named_without_its_number_is_given_one(monkeypatch):
    probe = SimpleNamespace(cpu=lambda: None, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: probe)
    assert vpt.pick_device("cuda") == torch.device("cuda:0")


@pytest.mark.parametrize("options", [(), ("--optimizer", "adamw", "--m", "own"), ("--gradient-checkpointing", "on")])
def test_learning_is_repeatable_and_only_the_generators_products_may_be_in_tf32(call_tiny, monkeypatch, options):
    """Check that a step has a deterministic form of every operation: while learning, torch refuses any other."""
    modes = {}

    def note(name: str) -> None:
        def noted(*arguments):
            modes[name] = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
            return really(*arguments)

        really = getattr(vpt, name)
        monkeypatch.setattr(vpt, name, noted)

    for name in ("generate_visual_codes", "loss_and_gradient", "numbers_of", "describe_targets"):
        note(name)
    monkeypatch.setattr(vpt, "pick_precision", lambda name, device: "tf32")
    assert call_tiny("--prompt", "a", "--prompt", "b", *options).code == 0
    assert modes == {
        "generate_visual_codes": (False, "high"),
        "loss_and_gradient": (True, "high"),
        "numbers_of": (True, "highest"),  # and therefore also in the optimiser
        "describe_targets": (False, "high"),
    }
    assert torch.get_float32_matmul_precision() == "highest" and not torch.are_deterministic_algorithms_enabled()


def test_tf32_rounds_to_ten_bits_of_mantissa():
    numbers = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-12, -1 - 3 * 2**-12, 3e-20])
    assert ten_bits(numbers).tolist() == [1, 1 + 2**-10, 1, -1 - 2**-10, pytest.approx(3e-20, rel=2**-11)]


def test_learning_256_tokens_with_products_in_tf32_loses_at_most_two_points(monkeypatch):
    """Check that the accuracy after 12 steps is within two percentage points of float32's."""
    words = ["--demo", "--device", "cpu", "--image-size", "512", "--num-steps", "12"]
    args = vpt.parse_args([*words, "--prompt", "a penguin on green grass"])
    models = vpt.load_models(args)
    codes, _ = vpt.generate_visual_codes(models, args.prompts, 256, args)
    exact, rows = optimise(models, args, codes)
    monkeypatch.setattr(torch.nn.functional, "linear", linear_in_tf32)
    rounded, rounded_rows = optimise(models, args, codes)
    assert rounded_rows[0]["train/loss"] == pytest.approx(rows[0]["train/loss"], rel=1e-3)
    assert rounded_rows[0]["train/loss"] != rows[0]["train/loss"]
    accuracies = [learning.targets["best_accuracy"].item() for learning in (exact, rounded)]
    assert accuracies[0] > 15 and abs(accuracies[0] - accuracies[1]) <= 2


@pytest.mark.parametrize(
    "variables", [{"LOCAL_RANK": "3"}, {"SLURM_LOCALID": "1"}, {"SLURM_LOCALID": "1", "LOCAL_RANK": ""}]
)
def test_the_local_rank_decides_which_gpu_is_used(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(cpu=lambda: None, device=device))
    assert vpt.pick_device(None) == "cuda:1"


@pytest.mark.parametrize(("has_tf32", "precision"), [(True, "tf32"), (False, "float32")])
def test_a_gpu_computes_in_tf32_if_it_can_unless_an_option_says_otherwise(monkeypatch, has_tf32, precision):
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: has_tf32)
    assert vpt.pick_precision("auto", torch.device("cuda")) == precision
    assert vpt.pick_precision("bfloat16", torch.device("cuda")) == "bfloat16"
    assert vpt.pick_precision("auto", torch.device("cpu")) == "float32"
