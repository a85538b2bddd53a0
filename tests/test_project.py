"""Test what surrounds the script: the shell command, the sweep, the README, and the demo model's files."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from support.builders import reference_of
from support.processes import DEMO, ROOT
from support.results import config_in

import verify_proto_tokens as vpt

OPTIONS = {option for action in vpt.build_parser()._actions for option in action.option_strings}


@pytest.fixture
def run_shell(tmp_path):
    def run(*arguments, command=ROOT / "run_proto_verification.sh", **settings):
        env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HF_HUB_OFFLINE": "1"}
        env |= {"PYTHON": sys.executable, "SAVE_DIR": str(tmp_path / "out")} | settings
        command = ["bash", str(command), "--demo", "--device", "cpu", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)

    return run


def test_the_shell_command_takes_settings_from_the_environment_and_arguments_win(run_shell, tmp_path):
    settings = {"NUM_STEPS": "900", "SEED": "7", "LEARNING_RATE": "0.05", "PROMPT": "$P$G"}  # cmd.exe sets PROMPT
    arguments = ("--num-steps", "2", "--wandb-run-name", "mine", "--prompt", "a penguin on green grass")
    result = run_shell(*arguments, **settings, USE_WANDB="True", WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    config = config_in(tmp_path / "out" / "mine")
    assert (config["num_steps"], config["seed"], config["learning_rate"]) == (2, 7, 0.05)
    assert config["prompt"] == "a penguin on green grass"
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_the_shell_command_ends_with_the_scripts_own_exit_code(run_shell):
    refusal = run_shell("--num-steps", "0", USE_WANDB="0")
    assert refusal.returncode == 2 and "--num-steps" in refusal.stderr


def test_the_shell_command_names_the_valid_values_of_use_wandb(run_shell):
    refusal = run_shell(USE_WANDB="yes")
    assert refusal.returncode == 2 and "true or false" in refusal.stderr


def test_the_shell_command_works_through_a_link_and_with_cdpath(run_shell, tmp_path):
    (tmp_path / "link.sh").symlink_to(ROOT / "run_proto_verification.sh")
    (tmp_path / "wandb").mkdir()
    result = run_shell("--help", command=tmp_path / "link.sh", CDPATH=str(ROOT.parent))
    assert result.returncode == 0 and result.stdout.startswith("usage: verify_proto_tokens.py")


def test_the_shell_command_uses_its_own_venv_if_packages_are_too_old(run_shell, tmp_path):
    for name in ("run_proto_verification.sh", "requirements.txt", "verify_proto_tokens.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "old" / "transformers-4.57.0.dist-info").mkdir(parents=True)
    (tmp_path / "old" / "transformers-4.57.0.dist-info" / "METADATA").write_text(
        "Name: transformers\nVersion: 4.57.0\n"
    )
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text(f'#!/bin/sh\ntouch "{tmp_path}/used"\nexec env -u PYTHONPATH "{sys.executable}" "$@"\n')
    own.chmod(0o755)
    for path, uses_own in (("", False), (str(tmp_path / "old"), True)):
        result = run_shell("--help", command=tmp_path / "run_proto_verification.sh", PYTHONPATH=path)
        assert result.returncode == 0 and (tmp_path / "used").exists() == uses_own, result.stderr


SHELL_SCRIPTS = ("run_proto_verification.sh", "tests/run.sh", ".ci/run")


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shellcheck_has_nothing_to_say_about_a_shell_script(name):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, ROOT / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_a_shell_script_uses_no_syntax_newer_than_bash_3_2(name):
    later_than_bash_3_2 = (
        r"mapfile|readarray|declare -[aAgln]|local -n|\$\{\w+(,|\^|@)|\|&|&>>|coproc|\bwait -n|\$EPOCH"
    )
    assert not re.search(later_than_bash_3_2, (ROOT / name).read_text())


def test_the_top_level_has_only_the_expected_visible_files():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    visible = {name.split("/")[0] for name in tracked if name and not name.startswith(".")}
    assert visible == {
        "README.md",
        "requirements.txt",
        "run_proto_verification.sh",
        "sweep_config.yaml",
        "tests",
        "verify_proto_tokens.py",
    }


def test_the_sweep_maximises_the_best_accuracy_and_its_parameters_are_options():
    sweep = yaml.safe_load((ROOT / "sweep_config.yaml").read_text())
    assert sweep["program"] == "verify_proto_tokens.py" and "command" not in sweep
    assert sweep["metric"] == {"name": "best_accuracy", "goal": "maximize"}
    for name, parameter in sweep["parameters"].items():
        for value in parameter.get("values", []) + [parameter[end] for end in ("min", "max") if end in parameter]:
            assert getattr(vpt.parse_args([f"--{name}={value}"]), name) == value


def test_a_page_names_no_option_that_does_not_exist():
    for page in (ROOT / "README.md", ROOT / "tests" / "README.md", DEMO / "README.md"):
        text = re.sub(r"`python\s+tests/[^`]*`", "", page.read_text())  # tools have options of their own
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text))
        of_other_tools = {
            "--signal",
            "--requeue",
            "--count",
            "--root",
            "--nproc-per-node",
            "--ntasks",
            "--gpus-per-task",
        }
        of_other_tools |= {"--peers"}  # in a block of commands
        assert named - of_other_tools <= OPTIONS, page


def test_the_readme_states_the_true_defaults():
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `?([^|`]+?)`? \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    stated = {option: value for option, value in rows if re.fullmatch(r"[\d.]+", value)}
    assert stated.keys() >= {"--image-size", "--num-steps"}
    args = vars(vpt.parse_args([]))
    for option, value in stated.items():
        assert float(value) == args[option.strip("-").replace("-", "_")], option


def test_the_readme_stays_short_and_narrow():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "tests" / "README.md", DEMO / "README.md"])
def test_every_file_that_a_page_links_to_exists_and_no_placeholder_is_left(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    assert not re.findall(
        r"\b[A-Z]+_[A-Z]+\b(?!=)",
        re.sub("WANDB_[A-Z]+|HF_HOME|CUDA_VISIBLE_DEVICES|SLURM_JOB_ID|SLURM_ARRAY_TASK_ID", "", text),
    )


def test_the_demo_model_stays_within_40_megabytes():
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if ".work" not in file.parts) < 40e6


def test_the_demo_generator_has_the_real_formats():
    config = json.loads((DEMO / "generator" / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    with safe_open(DEMO / "generator" / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert 10e6 < sum(tensor.numel() for tensor in weights.values()) < 18e6
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_the_demo_tokenizer_keeps_the_special_tokens_whole():
    text_tokenizer = vpt.load_text_tokenizer(DEMO / "generator")
    ids = text_tokenizer(vpt.conditional_prompt("a red apple on a wooden table"))["input_ids"]
    assert text_tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<|t2i|>", "<|soi|>"]
    assert text_tokenizer.decode(ids) == vpt.conditional_prompt("a red apple on a wooden table")


def test_the_demo_encoder_and_decoder_have_the_real_shapes():
    encoder, decoder = (
        vpt.load_torchscript(DEMO / "vq" / f"{name}.jit", torch.device("cpu")) for name in ("encoder", "decoder")
    )
    video = torch.zeros(2, 3, 1, 256, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        indices, codes, _ = encoder(video)
        decoded = decoder(indices)
    assert indices.shape == (2, 1, 8, 8) and not indices.is_floating_point()
    assert codes.shape == (2, 4, 1, 8, 8)
    assert decoded.shape == video.shape and decoded.dtype == torch.bfloat16


def test_the_demo_decoder_carries_its_fsq_levels():
    decoder = vpt.load_torchscript(DEMO / "vq" / "decoder.jit", torch.device("cpu"))
    assert vpt.fsq_codebook_size(decoder) == math.prod((5, 5, 5, 5))
    assert vpt.downsampling_factor(decoder, torch.device("cpu")) == 32


def test_a_larger_demo_picture_is_a_larger_grid():
    decoder = vpt.load_torchscript(DEMO / "vq" / "decoder.jit", torch.device("cpu"))
    assert vpt.decode_codes(decoder, torch.zeros(1, 256, dtype=torch.long)).shape == (1, 3, 512, 512)


def test_the_demos_prompts_have_a_size_token_only_at_512_px():
    text_tokenizer = vpt.load_text_tokenizer(DEMO / "generator")
    assert [vpt.size_token_of(text_tokenizer, size) for size in (256, 512)] == ["", "<|512px|>"]
    assert len(text_tokenizer("<|512px|>")["input_ids"]) == 1


@pytest.mark.parametrize(
    ("prompt", "size"), [("a red apple on a wooden table", 256), ("a penguin on green grass", 512)]
)
def test_the_demo_model_draws_what_the_caption_says(prompt, size, tmp_path):
    """Check that the tokens' loss under their own caption is less than half of that under another caption."""
    models = vpt.load_models(vpt.parse_args(["--demo", "--device", "cpu"]))
    wanted = ["--prompt", prompt, "--image-size", str(size)]
    args = vpt.parse_args(["--demo", "--device", "cpu", *wanted, "--save-dir", str(tmp_path)])
    codes = reference_of(models, args).codes

    def loss(caption: str) -> float:
        text = vpt.conditional_prompt(caption, models.size_token(codes.shape[1]))
        ids = torch.tensor(models.text_tokenizer(text)["input_ids"])
        sequence = torch.cat((ids, codes[0] + models.visual_offset))[None]
        with torch.no_grad():
            logits = models.generator(sequence).logits[0, len(ids) - 1 : -1]
        return torch.nn.functional.cross_entropy(logits, codes[0] + models.visual_offset).item()

    other = "a blue book under the night sky"
    assert loss(prompt) < 0.5 * loss(other)
