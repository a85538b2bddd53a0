"""Test checkpoints, local and from the hub: which load, and which are refused in one line before anything slow."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.results import refused
from support.tiny_model import save_tiny_generator, save_tiny_vq

import verify_proto_tokens as vpt


def change(file, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "something_new"])
def test_a_quantised_checkpoint_is_refused_with_the_reason(call_tiny, model_folders, method):
    change(model_folders[0] / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(call_tiny(), "quantised", "gradients")


def test_a_checkpoint_with_sliding_windows_is_refused(call_tiny, model_folders):
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None}
    change(model_folders[0] / "config.json", **windows)
    refused(call_tiny(), "--model-path", "sliding windows")


def test_a_checkpoint_with_rope_scaling_is_refused(call_tiny, model_folders):
    change(model_folders[0] / "config.json", rope_scaling={"type": "yarn", "factor": 4.0}, rope_parameters=None)
    refused(call_tiny(), "--model-path", "rope scaling")


def test_a_config_that_ties_the_head_overrides_a_head_in_the_file(tmp_path, make_args, capsys):
    save_tiny_generator(tmp_path / "generator")
    change(tmp_path / "generator" / "config.json", tie_word_embeddings=True)
    generator = vpt.load_models(make_args("--model-path", tmp_path / "generator")).generator
    assert generator.lm_head.weight is generator.model.embed_tokens.weight
    assert "note: config.json ties the head" in capsys.readouterr().out


def test_a_repetition_penalty_of_config_json_is_used_without_a_generation_config(tmp_path, make_args):
    save_tiny_generator(tmp_path / "generator")
    (tmp_path / "generator" / "generation_config.json").unlink()
    change(tmp_path / "generator" / "config.json", repetition_penalty=1.2)
    assert vpt.load_models(make_args("--model-path", tmp_path / "generator")).repetition_penalty == 1.2


def test_a_checkpoint_that_says_it_is_not_quantised_loads(call_tiny, model_folders):
    change(model_folders[0] / "config.json", quantization_config=None)
    assert call_tiny().code == 0


def test_the_error_for_a_wrong_vocabulary_size_names_both_shapes(call_tiny, model_folders):
    change(model_folders[0] / "config.json", vocab_size=1500)
    refused(call_tiny(), "lm_head.weight has [1413, 32], not [1500, 32]")


def test_weights_in_a_pickle_are_not_loaded(call_tiny, model_folders):
    file = model_folders[0] / "model.safetensors"
    torch.save(load_file(file), model_folders[0] / "pytorch_model.bin")
    file.unlink()
    refused(call_tiny(), "model.safetensors")


def test_a_tensor_that_is_missing_is_named(call_tiny, model_folders):
    weights = load_file(model_folders[0] / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_folders[0] / "model.safetensors", {"format": "pt"})
    refused(call_tiny(), "model.layers.1.mlp.up_proj.weight", "download both again")


def test_a_checkpoint_of_more_layers_than_its_config_says_is_refused(call_tiny, model_folders):
    """Check that the library does not silently drop the last layers."""
    change(model_folders[0] / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    refused(call_tiny(), "0 tensors are missing", "model.layers.1", "one too many")


def test_a_prefix_that_all_tensor_names_have_is_named(call_tiny, model_folders):
    weights = load_file(model_folders[0] / "model.safetensors")
    prefixed = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    save_file(prefixed, model_folders[0] / "model.safetensors", {"format": "pt"})
    refused(call_tiny(), f"{len(weights)} are not known", "_orig_mod.")


def test_an_unknown_tensor_is_ignored_and_named(call_tiny, model_folders):
    weights = load_file(model_folders[0] / "model.safetensors") | {"vision_tower.weight": torch.zeros(2)}
    save_file(weights, model_folders[0] / "model.safetensors", {"format": "pt"})
    result = call_tiny()
    assert result.code == 0 and "note: 1 tensors" in result.out and "vision_tower.weight" in result.out


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "special_tokens_map.json"])
def test_a_broken_link_among_a_models_files_is_named(call_tiny, model_folders, name):
    (model_folders[0] / name).unlink(missing_ok=True)
    (model_folders[0] / name).symlink_to("nowhere")
    refused(call_tiny(), "--model-path", name, "a link to a file that is not there")


def test_the_error_for_a_config_with_a_byte_order_mark_names_the_mark(call_tiny, model_folders):
    config = model_folders[0] / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    refused(call_tiny(), "config.json", "BOM")


def test_a_generation_config_that_cannot_be_read_is_named(call_tiny, model_folders):
    (model_folders[0] / "generation_config.json").unlink(missing_ok=True)
    (model_folders[0] / "generation_config.json").mkdir()
    refused(call_tiny(), "generation_config.json", "Is a directory")


@pytest.mark.parametrize(
    ("field", "value"),
    [("initializer_range", 1), ("hidden_size", "32"), ("rms_norm_eps", "x"), ("max_position_embeddings", "many")],
)
def test_a_field_of_the_wrong_type_is_named(call_tiny, model_folders, field, value):
    change(model_folders[0] / "config.json", **{field: value})
    refused(call_tiny(), "config.json", f"'{field}'", "expected", repr(value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", -3),
        ("vocab_size", "x"),
        ("hidden_act", "foo"),
        ("rope_scaling", {"type": "x"}),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 3),
        ("layer_types", ["a"]),
        ("rope_parameters", 7),
    ],
)
def test_a_field_that_describes_no_valid_model_is_refused_in_one_line(call_tiny, model_folders, field, value):
    change(model_folders[0] / "config.json", **{field: value})
    refused(call_tiny(), str(model_folders[0]))


# ----------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def call_hub(call_script, hub):
    return lambda *arguments: call_script("--device", "cpu", *arguments)


def test_a_gated_repository_is_reported_as_gated(call_hub, hub):
    hub.code, hub.error = 403, "GatedRepo"
    refused(call_hub("--model-path", "someone/gated"), "gated", "licence")


def test_a_repository_that_does_not_exist_is_reported_as_not_found(call_hub, hub):
    hub.code, hub.error = 404, "RepoNotFound"
    refused(call_hub("--model-path", "someone/nothing"), "404", "Repository Not Found", "check the name", "--demo")


@pytest.mark.parametrize(
    ("code", "body"),
    [
        (500, b""),
        (401, b'{"error": "Invalid credentials in Authorization header"}'),
        (200, b"<html>Please log in to the network</html>"),
    ],
)
def test_the_error_for_a_failing_hub_names_the_alternatives(call_hub, hub, code, body):
    hub.code, hub.error, hub.body, hub.kind = code, None, body, "text/html"
    refused(call_hub("--model-path", "someone/model"), "--model-path someone/model", "cannot be fetched", "--demo")


def test_the_error_for_an_encoder_missing_offline_mentions_the_cache(call_tiny, tmp_path):
    snapshots = tmp_path / "hf" / "hub" / "models--nvidia--vq"
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs" / "main").write_text("b" * 40)
    save_tiny_vq(snapshots / "snapshots" / ("b" * 40))
    (snapshots / "snapshots" / ("b" * 40) / "encoder.jit").unlink()
    vpt.Image.new("L", (16, 16)).save(tmp_path / "p.png")
    assert call_tiny("--vq-model-ckpt", "nvidia/vq").code == 0
    refused(
        call_tiny("--vq-model-ckpt", "nvidia/vq", "--image", "p.png"),
        "holds no encoder.jit",
        "the hub's cache may lack it",
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "decoder.jit"])
def test_a_git_lfs_pointer_in_a_models_folder_is_named(call_tiny, model_folders, name):
    file = model_folders[name == "decoder.jit"] / name
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")
    refused(call_tiny(), name, "git-LFS pointer", "git lfs pull")


@pytest.mark.parametrize("option", ["--image", "--m-from", "--from-proto-tokens"])
def test_a_git_lfs_pointer_given_to_an_option_is_named(call_tiny, tmp_path, option):
    (tmp_path / "large").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n")
    refused(call_tiny(option, "large"), "large is a git-LFS pointer")


# ----------------------------------------------------------------------------------------------------------------------
# Positions, precision, decoding


@pytest.mark.parametrize("options", [(), ("--control", "random"), ("--image", "p.png")])
def test_an_image_of_more_tokens_than_positions_is_refused_before_the_generator_loads(
    call_tiny, model_folders, tmp_path, options
):
    vpt.Image.new("L", (16, 16)).save(tmp_path / "p.png")
    change(model_folders[0] / "config.json", max_position_embeddings=50)
    result = call_tiny("--image-size", 32, *options)
    refused(result, "the image 64", "50", "--image-size")
    assert "generator:" not in result.out


@pytest.mark.parametrize("position", [0, 5, 15])
def test_logits_that_are_not_finite_end_the_decoding_in_one_line(call_tiny, monkeypatch, position):
    really_guided, calls = vpt.guided_scores, iter(range(100))

    def spoilt(*arguments):
        scores = really_guided(*arguments)
        return scores * torch.nan if next(calls) == position else scores

    monkeypatch.setattr(vpt, "guided_scores", spoilt)
    refused(call_tiny(), "not finite", "--dtype")


def test_the_checkpoints_own_repetition_penalty_holds_unless_another_is_given(tmp_path, make_args, capsys):
    save_tiny_generator(tmp_path / "generator")
    change(tmp_path / "generator" / "generation_config.json", repetition_penalty=1.1)
    own = vpt.load_models(make_args("--model-path", tmp_path / "generator"))
    assert own.repetition_penalty == 1.1 and "own repetition_penalty of 1.1" in capsys.readouterr().out
    none = vpt.load_models(make_args("--model-path", tmp_path / "generator", "--repetition-penalty", "1"))
    assert none.repetition_penalty == 1
    args = make_args()
    keys = {vpt.ReferenceCache(tmp_path, vpt.describe_run(args, models)).entry("a")[1] for models in (own, none)}
    assert len(keys) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"repetition_penalty": "much"}', '{"repetition_penalty": -1}'])
def test_a_damaged_generation_config_is_named(call_tiny, model_folders, content):
    (model_folders[0] / "generation_config.json").write_text(content)
    refused(call_tiny(), "generation_config.json")
