"""Test the decoding of the reference: guidance, sampling, agreement with transformers' `generate`, and the cache."""

import dataclasses
import hashlib
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.builders import reference_of
from support.tiny_model import save_tiny_generator
from transformers import LogitsProcessor, Qwen2ForCausalLM, UnbatchedClassifierFreeGuidanceLogitsProcessor

import verify_proto_tokens as vpt


def test_prompts_follow_the_template_word_for_word():
    assert vpt.conditional_prompt("a cat") == "<|t2i|>A highly realistic image of a cat<|soi|>"
    assert vpt.negative_prompt() == (
        "<|t2i|>An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, "
        "bad teeth, bad eyes, bad limbs, distortion<|soi|>"
    )


def test_prompts_name_the_size_if_the_tokenizer_has_a_token_for_it(tiny_models, make_args):
    """Add the size: without it, a generator trained on several sizes could only guess the first token."""
    assert vpt.describe_run(make_args(), tiny_models)["prompt_templates"][0] == vpt.conditional_prompt("")
    tiny_models.text_tokenizer.add_special_tokens({"additional_special_tokens": ["<|16px|>"]})
    conditional, negative = vpt.describe_run(make_args(), tiny_models)["prompt_templates"]
    assert conditional == "<|t2i|>A highly realistic image of <|16px|><|soi|>"
    assert negative.endswith(" distortion<|16px|><|soi|>")


def test_guidance_matches_numbers_worked_by_hand():
    cond, uncond = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    scores = vpt.guided_scores(cond, uncond, cfg_scale=3.0)
    # log 0.5 + 3 (log 0.75 - log 0.5) = log(0.5 * 1.5^3), log(0.5 * 0.5^3)
    assert torch.allclose(scores.exp(), torch.tensor([[1.6875, 0.0625]]))


def test_guidance_of_one_is_the_conditional_distribution():
    cond, uncond = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(vpt.guided_scores(cond, uncond, 1.0).exp(), cond.softmax(-1))


def drawn(scores, temperature=1.0, top_k=None, top_p=1.0, count=4000) -> torch.Tensor:
    """Return the share of draws that each index gets."""
    rng = torch.Generator().manual_seed(0)
    draws = vpt.sample(scores.expand(count, -1), temperature, top_k, top_p, [rng] * count)
    return torch.bincount(draws, minlength=scores.shape[-1]) / count


def test_an_extremely_low_temperature_is_greedy():
    assert drawn(SCORES, temperature=1e-40).tolist() == [0, 1, 0, 0]


SCORES = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


def test_sampling_follows_the_distribution():
    assert torch.allclose(drawn(SCORES), SCORES.exp()[0], atol=0.03)


def test_temperature_sharpens_the_distribution():
    assert torch.allclose(drawn(SCORES, temperature=0.5), (SCORES / 0.5).softmax(-1)[0], atol=0.03)


def test_top_k_keeps_the_k_likeliest():
    assert (drawn(SCORES, top_k=2) > 0).tolist() == [False, True, False, True]


def test_top_k_of_one_is_greedy():
    assert drawn(SCORES, top_k=1).tolist() == [0, 1, 0, 0]


def test_top_p_keeps_the_smallest_set_that_holds_the_share():
    assert (drawn(SCORES, top_p=0.65) > 0).tolist() == [False, True, False, True]


def test_a_tiny_top_p_still_keeps_the_likeliest():
    assert drawn(SCORES, top_p=1e-6).tolist() == [0, 1, 0, 0]


class VisualOnly(LogitsProcessor):
    def __init__(self, first: int, count: int):
        self.visual = slice(first, first + count)

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, -math.inf)
        masked[:, self.visual] = scores[:, self.visual]
        return masked


@pytest.mark.parametrize("prompt", ["a red apple on a wooden table", "x"])
@pytest.mark.parametrize("cfg_scale", [1.5, 6.0])
def test_greedy_decoding_equals_transformers_guided_generate_token_for_token(tiny_models, make_args, prompt, cfg_scale):
    args = make_args("--top-k", "1", "--cfg-scale", str(cfg_scale))
    codes = vpt.generate_visual_codes(tiny_models, [prompt], 40, args)[0]

    def ids(text):
        return torch.tensor([tiny_models.text_tokenizer(text)["input_ids"]])

    prompt_ids = ids(vpt.conditional_prompt(prompt))
    negative_ids = ids(vpt.negative_prompt())
    peer = tiny_models.generator.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        negative_prompt_ids=negative_ids,
        negative_prompt_attention_mask=torch.ones_like(negative_ids),
        guidance_scale=cfg_scale,
        logits_processor=[VisualOnly(tiny_models.visual_offset, tiny_models.codebook_size)],
        do_sample=False,
        max_new_tokens=40,
        min_new_tokens=40,
    )
    assert (codes + tiny_models.visual_offset).tolist() == peer[:, prompt_ids.shape[1] :].tolist()


@pytest.mark.parametrize("penalty", [1.1, 1.5, 0.8])
def test_a_repetition_penalty_comes_before_guidance_as_in_simplears_own_call_of_generate(
    tiny_models, make_args, penalty
):
    """Give guidance to `generate` as a processor, as SimpleAR does: it comes after the library's own processors."""
    models = dataclasses.replace(tiny_models, repetition_penalty=penalty)
    codes, plain = (
        vpt.generate_visual_codes(each, ["a cat"], 40, make_args("--top-k", "1"))[0] for each in (models, tiny_models)
    )

    def ids(text):
        return torch.tensor([models.text_tokenizer(text)["input_ids"]])

    prompt_ids, negative_ids = ids(vpt.conditional_prompt("a cat")), ids(vpt.negative_prompt())
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        6.0,
        models.generator,
        unconditional_ids=negative_ids,
        unconditional_attention_mask=torch.ones_like(negative_ids),
    )
    peer = models.generator.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        repetition_penalty=penalty,
        logits_processor=[guidance, VisualOnly(models.visual_offset, models.codebook_size)],
        do_sample=False,
        max_new_tokens=40,
        min_new_tokens=40,
    )
    assert (codes + models.visual_offset).tolist() == peer[:, prompt_ids.shape[1] :].tolist()
    assert codes.tolist() != plain.tolist()


def plain_codes(generator: Qwen2ForCausalLM, tokenizer, penalty: float) -> list[int]:
    """Return the greedy codes of a plain loop over stock Qwen2, without a cache, as SimpleAR's own class decodes."""
    prompts = [tokenizer(text)["input_ids"] for text in (vpt.conditional_prompt("a cat"), vpt.negative_prompt())]
    codes = []
    while len(codes) < 24:
        ids = [code + 1401 for code in codes]
        cond, uncond = (
            generator(input_ids=torch.tensor([prompt + ids])).logits[0, -1, 1401:1413].clone() for prompt in prompts
        )
        for code in set(codes):
            cond[code] = cond[code] / penalty if cond[code] > 0 else cond[code] * penalty
        cond, uncond = cond.log_softmax(-1), uncond.log_softmax(-1)
        codes.append((uncond + 6 * (cond - uncond)).argmax().item())
    return codes


@pytest.mark.parametrize("penalty", [0.9, 1.0, 1.3])
@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        pytest.param({"tie_word_embeddings": True}, {}, id="tied"),
        pytest.param({"vocab_size": 1440}, {}, id="padded rows"),
        pytest.param({"num_key_value_heads": 1}, {}, id="one key/value head"),
        pytest.param({}, {"max_shard_size": "50KB"}, id="many shards"),
        pytest.param({"dtype": "bfloat16"}, {}, id="bfloat16 file"),
    ],
)
def test_any_checkpoint_decodes_to_the_tokens_of_a_plain_loop(
    tmp_path, make_args, monkeypatch, changes, saved, penalty
):
    save_tiny_generator(tmp_path, saved, **changes)
    monkeypatch.setattr(vpt, "fsq_codebook_size", lambda decoder: 12)  # as with Cosmos' decoder, also for padded rows
    args = make_args("--model-path", tmp_path, "--top-k", 1, "--repetition-penalty", penalty)
    models = vpt.load_models(args)
    codes, _ = vpt.generate_visual_codes(models, ["a cat"], 24, args)
    with torch.no_grad():
        stock = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert codes[0].tolist() == plain_codes(stock, models.text_tokenizer, penalty)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(saved)


def test_only_visual_codes_are_ever_sampled(tiny_models, make_args):
    codes, seconds = vpt.generate_visual_codes(tiny_models, ["a"], 200, make_args("--temperature", "50"))
    assert codes.shape == (1, 200) and seconds > 0
    assert codes.min() >= 0 and codes.max() < tiny_models.codebook_size
    assert codes.unique().numel() > 6  # so hot that text ids would be sampled, too, if they could be


@pytest.mark.parametrize("top_k", ["1", "12"])
def test_prompts_decoded_together_give_the_codes_that_each_gives_alone(tiny_models, make_args, top_k):
    prompts, args = ["a cat", "a much longer description of a red apple"], make_args("--top-k", top_k)
    together = vpt.generate_visual_codes(tiny_models, prompts, 24, args)[0]
    alone = [vpt.generate_visual_codes(tiny_models, [prompt], 24, args)[0] for prompt in prompts]
    assert together.tolist() == torch.cat(alone).tolist()


def test_the_seed_decides_the_picture(tiny_models, make_args):
    def codes(seed):
        return vpt.generate_visual_codes(tiny_models, ["a"], 16, make_args("--seed", str(seed)))[0].tolist()

    assert codes(1) == codes(1) != codes(2)


def cache_files(args):
    return sorted((args.save_dir / "reference_cache").glob("*"))


def test_runs_with_the_same_decoding_settings_reuse_the_reference(tiny_models, make_args, capsys):
    first = reference_of(tiny_models, make_args())
    second = reference_of(tiny_models, make_args("--num-steps", "7", "--learning-rate", "0.3"))
    assert "reused" in capsys.readouterr().out
    assert torch.equal(first.codes, second.codes)
    assert first.autoregressive_seconds == second.autoregressive_seconds


def test_only_prompts_that_are_not_cached_are_decoded(tiny_models, make_args, capsys):
    first = reference_of(tiny_models, make_args("--prompt", "a cat"))
    both = reference_of(tiny_models, make_args("--prompt", "a dog", "--prompt", "a cat", "--prompt", "a dog"))
    assert "reused" in capsys.readouterr().out
    assert torch.equal(both.codes[1], first.codes[0]) and torch.equal(both.codes[0], both.codes[2])
    assert both.codes.shape == (3, 16) and both.pixels.shape[0] == 3


def test_only_a_prompt_that_was_decoded_alone_has_a_time(tiny_models, make_args):
    together = reference_of(tiny_models, make_args("--prompt", "a cat", "--prompt", "a dog"))
    cached = reference_of(tiny_models, make_args("--prompt", "a cat"))
    assert together.autoregressive_seconds is cached.autoregressive_seconds is None
    assert reference_of(tiny_models, make_args("--prompt", "a cat", "--force-generate")).autoregressive_seconds > 0
    assert reference_of(tiny_models, make_args("--prompt", "a cat")).autoregressive_seconds > 0


def test_a_control_of_random_codes_uses_the_whole_codebook_and_generates_no_reference(tiny_models, make_args):
    args = make_args("--control", "random", "--image-size", 40)
    reference = reference_of(tiny_models, args)
    assert reference.codes.shape == (1, 100) and reference.codes.unique().numel() == 12
    assert reference.autoregressive_seconds is None
    assert torch.equal(reference_of(tiny_models, args).codes, reference.codes)
    assert not cache_files(args)


def test_a_control_of_shuffled_codes_permutes_the_references_codes(tiny_models, make_args):
    plain, shuffled = (reference_of(tiny_models, make_args(*option)).codes for option in ([], ["--control=shuffled"]))
    assert torch.equal(shuffled.sort().values, plain.sort().values) and not torch.equal(shuffled, plain)


def test_an_untrained_generator_has_fresh_weights_that_depend_only_on_the_seed(tiny_models):
    generator = tiny_models.generator.bfloat16()
    generator.config.tie_word_embeddings = True  # as config.json may claim of two separate matrices
    weight = generator.model.layers[0].mlp.down_proj.weight
    weights = [weight.clone()]
    for seed in (1, 1, 2):
        vpt.randomise_weights(generator, seed)
        weights.append(weight.clone())
    trained, fresh, same, different = weights
    assert torch.equal(fresh, same) and fresh.dtype == torch.bfloat16
    assert not torch.equal(fresh, trained) and not torch.equal(fresh, different)
    assert not any(parameter.requires_grad for parameter in generator.parameters())


@pytest.mark.parametrize(
    "change",
    ["--prompt=a cat", "--seed=1", "--image-size=20", "--cfg-scale=2", "--temperature=2", "--top-k=3", "--top-p=0.5"],
)
def test_any_other_decoding_setting_makes_a_reference_of_its_own(tiny_models, make_args, change):
    reference_of(tiny_models, make_args())
    reference_of(tiny_models, make_args(change))
    assert len(cache_files(make_args())) == 2


def test_a_cache_folder_that_another_run_removed_is_made_again(tmp_path):
    """Start without the folder: a run that made it removes it at its end if it is still empty."""
    cache = vpt.ReferenceCache(tmp_path / "gone", {"num_tokens": 4, "codebook_size": 4})
    cache.write("a", torch.arange(4), 1.0)
    assert cache.read(["a"])["a"][0].tolist() == [0, 1, 2, 3]


def test_another_model_makes_a_reference_of_its_own(tiny_models, make_args):
    other = dataclasses.replace(tiny_models, generator_fingerprint="other weights")
    reference_of(tiny_models, make_args())
    reference_of(other, make_args())
    assert len(cache_files(make_args())) == 2


def test_another_torch_and_another_device_make_references_of_their_own(tiny_models, make_args, monkeypatch):
    reference_of(tiny_models, make_args())
    monkeypatch.setattr(torch, "__version__", "2.13.0+another")
    reference_of(tiny_models, make_args())
    monkeypatch.setattr(vpt, "device_name", lambda device: "another GPU")
    reference_of(tiny_models, make_args())
    assert len(cache_files(make_args())) == 3


def test_a_model_is_identified_by_the_content_of_its_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = vpt.fingerprint_of(tmp_path, vpt.GENERATOR_FILES)
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert vpt.fingerprint_of(tmp_path, vpt.GENERATOR_FILES) != before


def test_a_file_that_is_no_part_of_a_model_does_not_matter(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = vpt.fingerprint_of(tmp_path, vpt.GENERATOR_FILES)
    (tmp_path / "extra.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "trainer_state.json").mkdir()
    (tmp_path / "other.safetensors").write_bytes(b"other")
    assert vpt.fingerprint_of(tmp_path, vpt.GENERATOR_FILES) == before


def test_a_hubs_snapshot_and_a_copy_of_it_are_one_model(tmp_path):
    blob = tmp_path / "blobs" / hashlib.sha256(b"weights").hexdigest()
    snapshot, copy = tmp_path / "snapshots" / ("a" * 40), tmp_path / "copy"
    for folder in (blob.parent, snapshot, copy):
        folder.mkdir(parents=True)
    blob.write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blob)
    (copy / "model.safetensors").write_bytes(b"weights")
    assert vpt.fingerprint_of(snapshot, vpt.GENERATOR_FILES) == vpt.fingerprint_of(copy, vpt.GENERATOR_FILES)


def test_the_reference_and_the_initial_embeddings_use_separate_random_generators(tiny_models, make_args):
    few, many = make_args("--num-steps", "3"), make_args("--num-steps", "9", "--force-generate")
    before = vpt.initial_proto_tokens(tiny_models, 1, few)
    codes = reference_of(tiny_models, few).codes
    after = vpt.initial_proto_tokens(tiny_models, 1, few)
    assert torch.equal(before.e_t, after.e_t) and torch.equal(before.m, after.m)
    assert torch.equal(reference_of(tiny_models, many).codes, codes)


def test_force_generate_ignores_the_cached_reference(tiny_models, make_args, capsys):
    reference_of(tiny_models, make_args())
    reference_of(tiny_models, make_args("--force-generate"))
    assert "reused" not in capsys.readouterr().out


def test_a_reference_that_cannot_be_cached_does_not_end_the_run(tiny_models, make_args, capsys):
    reference = reference_of(tiny_models, make_args())
    (file,) = cache_files(make_args())
    file.unlink()
    file.mkdir()
    assert torch.equal(reference_of(tiny_models, make_args()).codes, reference.codes)
    assert "is not kept for later runs" in capsys.readouterr().err


def damage_truncate(file):
    file.write_bytes(file.read_bytes()[:40])


def damage_empty(file):
    file.write_bytes(b"")


def damage_text(file):
    file.write_text("not a tensor file")


def replace_codes(file, codes):
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    save_file({"codes": codes.contiguous()}, file, metadata)


def damage_range(file):
    replace_codes(file, load_file(file)["codes"] + 12)


def damage_sign(file):
    replace_codes(file, load_file(file)["codes"] - 12)


def damage_length(file):
    replace_codes(file, load_file(file)["codes"][:, :9])


def damage_type(file):
    replace_codes(file, load_file(file)["codes"].float())


def damage_key(file):
    save_file(load_file(file), file, {"key": "another", "autoregressive_seconds": "1"})


DAMAGES = [
    damage_truncate,
    damage_empty,
    damage_text,
    damage_range,
    damage_sign,
    damage_length,
    damage_type,
    damage_key,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_cache_file_is_replaced_with_a_warning(tiny_models, make_args, capsys, damage):
    reference = reference_of(tiny_models, make_args())
    (file,) = cache_files(make_args())
    damage(file)
    again = reference_of(tiny_models, make_args())
    assert "generating the reference anew" in capsys.readouterr().err
    assert torch.equal(again.codes, reference.codes)
    assert torch.equal(load_file(file)["codes"], reference.codes)
