"""Test the command line on the demo model and on broken input: what a run prints, writes and refuses."""

import json
import re
import resource
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.contract import COLUMNS, FILES, MEDIA, SUMMARY
from support.processes import DEMO, ended, start_script
from support.results import config_in, refused, results_of, rows_of, summary_in
from support.tiny_model import save_tiny_generator, save_torchscript, spoil_text_head, tiny_arguments

import verify_proto_tokens as vpt


def test_a_demo_run_leaves_every_file_and_nothing_else(demo_run):
    assert {file.name for file in demo_run.folder.iterdir()} == FILES


def test_the_pictures_open_at_the_size_asked_for(demo_run):
    for name in MEDIA:
        Image.open(demo_run.folder / f"{name}.png").verify()
    assert Image.open(demo_run.folder / "reference_image.png").size == (256, 256)
    assert Image.open(demo_run.folder / "reconstructed_image.png").size == (256, 256)


def test_the_summary_holds_every_key(demo_run):
    summary = summary_in(demo_run.folder)
    assert summary.keys() >= SUMMARY | {"psnr"}
    assert summary["num_tokens"] == 64 and summary["total_params"] == 2 * 512
    assert summary["best_accuracy"] == pytest.approx(100 - summary["error_rate"])
    assert summary["speedup"] > 1


def test_the_history_has_a_row_per_step_with_the_names_of_wandb(demo_run):
    rows = rows_of(demo_run.folder / "history.csv")
    assert list(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert float(rows[-1]["train/loss"]) < 0.7 * float(rows[0]["train/loss"])


def test_the_config_holds_all_settings_and_versions(demo_run):
    config = config_in(demo_run.folder)
    assert config.keys() == vpt.DECIDES.keys() - {"prompts", "m_from_fingerprint", "images_fingerprint", "learned_with"}
    assert config["num_steps"] == 40 and config["cfg_scale"] == 6.0 and config["device"] == "cpu"
    assert config["versions"]["torch"] == torch.__version__
    assert config["codebook_size"] == 625 and config["factor"] == 32


def test_the_proto_tokens_file_reproduces_the_prediction(demo_run):
    with safe_open(demo_run.folder / "proto_tokens.safetensors", "pt") as file:
        e_t, m, target_ids, predicted_ids = map(file.get_tensor, ("e_t", "m", "target_ids", "predicted_ids"))
        settings = json.loads(file.metadata()["settings"])
    from transformers import Qwen2ForCausalLM

    generator = Qwen2ForCausalLM.from_pretrained(DEMO / "generator", dtype=torch.float32)
    inputs = torch.cat((e_t, m[:, None].expand(1, 63, -1)), dim=1)
    with torch.no_grad():
        assert torch.equal(generator(inputs_embeds=inputs).logits.argmax(-1), predicted_ids)
    summary = summary_in(demo_run.folder)
    assert int((predicted_ids != target_ids).sum()) == summary["num_errors"]
    assert settings["prompt"] == "a red apple on a wooden table"


def test_the_run_ends_by_printing_its_results_and_their_folder(demo_run):
    assert re.search(r"best accuracy +\d+\.\d %", demo_run.out)
    assert "exp/proto_256px_steps40_lr02_seed42_demo" in demo_run.out


def test_each_slow_stage_prints_that_it_begins(demo_run):
    lines = ("loading the VQ tokenizer", "loading the generator", "decoding its picture", "timing one pass", "writing")
    places = [demo_run.out.index(line) for line in lines]
    assert places == sorted(places)
    for bar in ("reference", "proto-tokens", "pictures", "bits"):
        assert re.search(rf"^{bar}: +0%", demo_run.err, re.MULTILINE)


def test_neither_a_reused_reference_nor_wandb_changes_tokens_or_history(call_tiny, tmp_path):
    arguments = ("--num-steps", 20, "--save-dir", "out", "--wandb-run-name", "run")
    assert call_tiny(*arguments).code == 0
    first = results_of(tmp_path / "out" / "run")
    result = call_tiny(*arguments, "--use-wandb", env={"WANDB_MODE": "offline"})
    assert result.code == 0 and "reused" in result.out
    assert results_of(tmp_path / "out" / "run") == first


def test_folders_with_spaces_and_non_ascii_letters_work(call_tiny, tmp_path):
    result = call_tiny("--save-dir", "größe und raum", "--wandb-run-name", "läuft gut 1")
    assert result.code == 0, result.err
    assert {file.name for file in (tmp_path / "größe und raum" / "läuft gut 1").iterdir()} == FILES


def test_the_codebook_size_comes_from_the_embedding_rows_if_the_decoder_lacks_it(call_tiny):
    assert "1401 text ids + 12 visual codes" in call_tiny().out


def test_a_checkpoint_with_fewer_rows_than_the_tokenizer_has_codes_is_refused(call_tiny):
    result = call_tiny("--vq-model-ckpt", vpt.DEMO_FOLDER / "vq", "--image-size", 32)  # 625 codes, the rows are 12
    refused(result, "embedding rows, too few for 1401 text tokens and a codebook of 625")


def test_the_error_for_an_unreachable_hub_names_the_alternatives(call_script):
    refused(call_script("--device", "cpu"), "--model-path", "--demo", "local folder")


def test_a_model_path_that_does_not_exist_is_refused(call_script):
    refused(call_script("--model-path", "./nowhere"), "--model-path ./nowhere", "no such folder")


def test_a_model_path_that_is_a_file_is_refused(call_tiny, model_folders):
    refused(call_tiny("--model-path", model_folders[0] / "config.json"), "--model-path", "is a file")


def test_a_folder_without_a_model_is_refused(call_tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(call_tiny("--model-path", tmp_path / "empty"), "config.json", "No such file", "SimpleAR model's folder")


def break_config_json(generator, vq):
    (generator / "config.json").write_text("{")


def break_model_type(generator, vq):
    (generator / "config.json").write_text('{"model_type": "llama", "vocab_size": 99}')


def break_weights_cut(generator, vq):
    file = generator / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20_000])


def break_weights_of_another_shape(generator, vq):
    save_tiny_generator(generator.parent / "other", hidden_size=48)
    shutil.copy(generator.parent / "other" / "model.safetensors", generator)


def break_vocabulary(generator, vq):
    save_tiny_generator(generator, vocab_size=1401)


def break_text_tokenizer(generator, vq):
    (generator / "tokenizer.json").write_text("not json")


def break_special_tokens(generator, vq):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = generator / name
        file.write_text(file.read_text().replace("<|soi|>", "<|other|>"))


def break_special_tokens_apart(generator, vq):
    file = generator / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|soi|>"]
    content["model"]["vocab"]["<|soi|>"] = 1399
    file.write_text(json.dumps(content))
    (generator / "tokenizer_config.json").write_text("{}")


def break_config_without_vocabulary(generator, vq):
    (generator / "config.json").write_text('{"model_type": "qwen2"}')


def break_weights_empty(generator, vq):
    (generator / "model.safetensors").write_bytes(b"")


def break_weights_into_not_numbers(generator, vq):
    weights = load_file(generator / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, generator / "model.safetensors")


def break_decoder_empty(generator, vq):
    (vq / "decoder.jit").write_bytes(b"")


def break_decoder_missing(generator, vq):
    (vq / "decoder.jit").unlink()


def break_decoder_text(generator, vq):
    (vq / "decoder.jit").write_text("not TorchScript")


def break_decoder_cut(generator, vq):
    file = vq / "decoder.jit"
    file.write_bytes(file.read_bytes()[:1000])


def break_decoder_kind(generator, vq):
    save_torchscript(torch.nn.Linear(2, 2), vq / "decoder.jit")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_config_json, ["config.json", "damaged"]),
        (break_model_type, ["llama", "qwen2"]),
        (break_weights_cut, ["weights"]),
        (break_weights_of_another_shape, ["weights"]),
        (break_vocabulary, ["embedding rows", "codebook"]),
        (break_text_tokenizer, ["text tokenizer"]),
        (break_special_tokens, ["<|soi|>"]),
        (break_special_tokens_apart, ["text tokenizer"]),
        (break_config_without_vocabulary, ["config.json", "damaged"]),
        (break_weights_empty, ["weights"]),
        (break_weights_into_not_numbers, ["not finite", "weights"]),
        (break_decoder_empty, ["decoder.jit", "TorchScript"]),
        (break_decoder_missing, ["decoder.jit"]),
        (break_decoder_text, ["decoder.jit", "TorchScript"]),
        (break_decoder_cut, ["decoder.jit", "TorchScript"]),
        (break_decoder_kind, ["decoder.jit"]),
    ],
)
def test_a_broken_model_file_is_named(call_tiny, model_folders, tmp_path, damage, words):
    damage(*model_folders)
    refused(call_tiny("--save-dir", "out"), *words)
    left = [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert left == []


def test_only_a_runs_own_files_are_replaced(call_tiny, tmp_path):
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "holiday.png").write_text("precious")
    assert call_tiny("--save-dir", "out", "--wandb-run-name", "mine").code == 0
    assert (tmp_path / "out" / "mine" / "holiday.png").read_text() == "precious"


def test_a_folder_with_files_that_no_run_wrote_is_refused(call_tiny, tmp_path):
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "comparison.png").write_text("precious")
    refused(call_tiny("--save-dir", "out", "--wandb-run-name", "mine"), "no run's folder", "comparison.png")
    assert (tmp_path / "out" / "mine" / "comparison.png").read_text() == "precious"


def test_a_prompt_too_long_for_the_model_is_named(call_tiny, model_folders, tmp_path):
    config = json.loads((model_folders[0] / "config.json").read_text())
    (model_folders[0] / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 300}))
    (tmp_path / "prompts.txt").write_text("a cat\na dog " + "and another " * 300)
    refused(call_tiny("--prompts-file", tmp_path / "prompts.txt"), "(a dog and another", "...)", "shorten a --prompt")


def test_a_models_folder_is_not_mistaken_for_a_runs_folder(call_tiny, model_folders, tmp_path):
    before = (model_folders[0] / "config.json").read_text()
    refused(call_tiny("--save-dir", tmp_path, "--wandb-run-name", model_folders[0].name), "no run's folder")
    assert (model_folders[0] / "config.json").read_text() == before


def test_a_result_that_cannot_be_replaced_is_reported_in_one_line(call_tiny, tmp_path):
    (tmp_path / "out" / "mine" / "capacity.png").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "summary.json").touch()  # this file marks the folder as a run's
    refused(call_tiny("--save-dir", "out", "--wandb-run-name", "mine"), "Is a directory", "capacity.png")


@pytest.mark.parametrize("option", ["--save-dir", "--model-path", "--vq-model-ckpt"])
def test_a_name_too_long_for_the_file_system_is_refused_in_one_line(call_tiny, option):
    refused(call_tiny(option, "x" * 300), option)


@pytest.mark.parametrize("size", ["15", "2"])
def test_an_image_size_that_is_no_multiple_of_the_factor_is_refused(call_tiny, size):
    refused(call_tiny("--image-size", size), "--image-size", "multiple", "4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda:0", "cuda:99", "warp", "meta"])
def test_a_device_that_is_not_there_is_refused(call_tiny, device):
    refused(call_tiny("--device", device), f"--device {device}")


def test_a_save_directory_that_cannot_be_written_is_refused(call_tiny, tmp_path):
    (tmp_path / "occupied").write_text("a file")
    refused(call_tiny("--save-dir", "occupied"), "--save-dir occupied")
    assert (tmp_path / "occupied").read_text() == "a file"


def test_a_diverged_run_saves_its_best_embeddings_and_reports_the_divergence(call_tiny, model_folders, tmp_path):
    spoil_text_head(model_folders[0])
    refused(call_tiny("--save-dir", "out", "--wandb-run-name", "hot"), "finite", "--learning-rate", "proto_tokens")
    with safe_open(tmp_path / "out" / "hot" / "proto_tokens.safetensors", "pt") as file:
        assert file.get_tensor("e_t").isfinite().all()
    assert not (tmp_path / "out" / "hot" / "summary.json").exists()


def test_a_run_that_diverges_after_some_steps_keeps_their_rows(call_tiny, monkeypatch, tmp_path):
    really_step, passes = vpt.loss_and_gradient, iter(range(1, 100))

    def step(*arguments):
        predictions = really_step(*arguments)
        spoilt = predictions._replace(losses=predictions.losses * torch.nan)
        return predictions if next(passes) < 5 else spoilt

    monkeypatch.setattr(vpt, "loss_and_gradient", step)
    arguments = ("--optimizer", "adamw", "--num-steps", 9, "--save-dir", "out", "--wandb-run-name", "hot")
    refused(call_tiny(*arguments), "finite at step 5", "--grad-clip 1", "proto_tokens")
    assert len(rows_of(tmp_path / "out" / "hot" / "history.csv")) == 5


@pytest.mark.parametrize("prompt", ["\U0001f34e\U0001f34e", "tab\tand\x07bell", "  spaced  out  ", "l\u00f6we \u732b"])
def test_an_unusual_prompt_works(call_tiny, prompt):
    assert call_tiny("--prompt", prompt).code == 0


@pytest.mark.parametrize("largest", [4_000, 30_000])
def test_a_full_disk_is_reported_in_one_line_and_leaves_only_whole_files(model_folders, tmp_path, largest):
    """Limit the size of files, so that writing fails as on a full disk: with each limit at a different file."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    result = ended(start_script(tmp_path, *tiny_arguments(tmp_path), "--save-dir", "out", preexec_fn=limit))
    # Matplotlib cannot keep its list of fonts either, and says so.
    result.err = "".join(line for line in result.err.splitlines(keepends=True) if "font_manager" not in line)
    refused(result, "cannot write", "File too large")
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not [file for file in files if "partial" in file.name]
    assert not [file for file in files if file.name == "summary.json"]
    for file in files:
        if file.suffix == ".png":
            Image.open(file).verify()
        if file.suffix == ".json":
            json.loads(file.read_text())
