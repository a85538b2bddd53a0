"""Test the options: defaults, spellings, run names, and every value that is refused before anything slow happens."""

import contextlib
import os
import re
import subprocess
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.processes import ROOT

import verify_proto_tokens as vpt


def test_the_defaults_are_the_documented_ones():
    args = vpt.parse_args([])
    assert args.model_path == "Daniel0724/SimpleAR-1.5B-RL"
    assert args.vq_model_ckpt == "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
    assert args.prompts == ["a red apple on a wooden table"]
    assert (args.image_size, args.cfg_scale, args.temperature, args.top_k, args.top_p) == (256, 6.0, 1.0, None, 1.0)
    assert (args.seed, args.num_steps, args.vocabulary, args.target_accuracy, args.log_every) == (
        42,
        1000,
        "full",
        100,
        1,
    )
    assert str(args.save_dir) == "proto_tokens_exp"
    assert (args.wandb_project, args.wandb_tags, args.use_wandb) == ("simplear-proto-tokens", ["proto-tokens"], False)


def test_every_option_is_accepted_with_underscores():
    def values(name: str) -> list[str]:
        action = actions[name]
        if action.nargs in (0, "?"):
            return []
        plain = {
            "--device": "cpu",
            "--prompts-file": __file__,
            "--betas": "0.5,0.6",
            "--shard": "1/1",
            "--optimizer": "adamw",
        }.get(name, "1")
        return [plain if plain != "1" or not action.choices else action.choices[0]]

    actions = {a.option_strings[0]: a for a in vpt.build_parser()._actions if a.option_strings[0].startswith("--")}
    for name in actions.keys() - {"--demo"}:
        spelled = name.replace("-", "_").replace("__", "--", 1)
        both = [vars(vpt.parse_args(["--optimizer", "adamw", each, *values(name)])) for each in (spelled, name)]
        assert both[0] == both[1], name


def test_underscores_in_a_value_are_kept():
    assert vpt.parse_args(["--wandb_run_name=my_run_1"]).wandb_run_name == "my_run_1"
    assert vpt.parse_args(["--prompt", "snake_case"]).prompts == ["snake_case"]


def test_a_run_is_named_after_its_settings():
    args = vpt.parse_args(["--learning-rate", "0.01", "--num-steps", "1000", "--image-size", "256", "--seed", "42"])
    assert args.wandb_run_name == "proto_256px_steps1000_lr001_seed42"


def name_of(*words: object) -> str:
    name = vpt.parse_args([str(word) for word in words]).wandb_run_name
    assert len(name.encode()) <= 128 and not re.search(r"[\s/\\]", name)
    return name


def test_the_name_shows_settings_that_change_results_and_differ_from_their_defaults():
    plain = "proto_256px_steps1000_lr02_seed42"
    assert name_of("--demo") == f"{plain}_demo"
    assert name_of("--prompt", vpt.DEFAULT_PROMPT, "--optimizer", "lbfgs", "--log-every", 1) == plain
    prompted = name_of("--prompt", "a cat", "--num-e-tokens", 4)
    assert re.fullmatch(rf"{plain}_prompts-a-cat_num-e-tokens-4-\w+", prompted)
    assert name_of("--optimizer", "adamw", "--betas", "0.9,0.999") == f"{plain}_optimizer-adamw_betas-0.9-0.999"
    model = name_of("--model-path", "Daniel0724/SimpleAR-0.5B-RL")
    assert re.fullmatch(rf"{plain}_model-path-Daniel0724-SimpleAR-0.5B-RL-\w+", model)
    assert name_of("--dtype", "bfloat16", "--capacity") == f"{plain}_dtype-bfloat16_target-accuracy-99_capacity"
    assert re.fullmatch(rf"{plain}_prompts-2_m-own-\w+", name_of("--prompt", "a", "--prompt", "b", "--m", "own"))
    earlier = f"out/my-run/{vpt.PROTO_TOKENS_FILE}"
    assert re.fullmatch(r"reconstructed_from-proto-tokens-my-run-\w+", name_of("--from-proto-tokens", earlier))
    assert name_of("--use-wandb", "--resume", "--save-every", 7, "--device", "cpu") == plain


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--demo"], ["--prompt", "demo"]),
        (["--m", "own"], ["--prompt", "m own"]),
        (["--prompt", "a"], ["--prompt", "a", "--prompt", "a"]),
        (["--model-path", "a/b-c"], ["--model-path", "a-b/c"]),
        (["--model-path", "x/y_dtype-bfloat16"], ["--model-path", "x/y", "--dtype", "bfloat16"]),
        (["--model-path", "a/b"], ["--vq-model-ckpt", "a/b"]),
        (["--vocabulary", "visual"], ["--vocabulary", "full"]),
        (["--dtype", "float32"], ["--dtype", "float16"]),
        (["--image", "a/x.png"], ["--image", "b/x.png"]),
    ],
)
def test_different_settings_never_share_a_name(one, other):
    assert name_of(*one) != name_of(*other)


def test_pictures_of_one_name_in_two_folders_never_share_a_run_name(tmp_path, monkeypatch):
    names = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        names |= {name_of("--image", "x.png"), name_of("--image", "x.png", "--image", "y.png")}
    assert len(names) == 4


@given(st.text(min_size=1, max_size=200), st.text(min_size=1, max_size=200))
def test_two_prompts_never_share_a_name(one, other):
    assume(one.strip() and other.strip() and one.strip() != other.strip())
    with contextlib.suppress(SystemExit):  # some texts are refused as prompts
        assert name_of(f"--prompt={one}") != name_of(f"--prompt={other}")


def test_two_folders_of_one_name_never_share_a_run_name(tmp_path):
    names = set()
    for parent in ("a", "b"):
        (tmp_path / parent / "checkpoint").mkdir(parents=True)
        names.add(name_of("--model-path", tmp_path / parent / "checkpoint"))
        names.add(name_of("--m-from", tmp_path / parent / "checkpoint" / vpt.PROTO_TOKENS_FILE))
    assert len(names) == 4


def test_a_relative_model_path_in_two_working_folders_gives_two_run_names(tmp_path, monkeypatch):
    names = set()
    for parent in ("a", "b"):
        (tmp_path / parent / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / parent)
        names.add(name_of("--model-path", "model"))
    assert len(names) == 2


@pytest.mark.parametrize("rates", [(2.5, 25), (0.25, 25), (0.1234567, 0.1234568), (1e-05, 1e-06)])
def test_two_rates_never_share_a_name(rates):
    assert name_of("--learning-rate", rates[0]) != name_of("--learning-rate", rates[1])


def test_a_shard_takes_the_pictures_of_its_prompts():
    pictures = [word for name in "abc" for word in ("--image", f"{name}.png")]
    args = vpt.parse_args([*pictures, "--m", "own", "--shard", "2/2"])
    assert [file.name for file in args.images] == ["b.png"] and args.prompts == ["b"]


def test_a_shard_takes_every_nth_prompt_from_its_own_number_on():
    prompts = [word for name in "abcdefg" for word in ("--prompt", name)]
    shards = [vpt.parse_args([*prompts, "--m", "own", "--shard", f"{k}/3"]).prompts for k in (1, 2, 3)]
    assert shards == [["a", "d", "g"], ["b", "e"], ["c", "f"]]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/2/3", "1.5/2"])
def test_an_invalid_shard_is_refused(capsys, text):
    with pytest.raises(SystemExit) as stop:
        vpt.parse_args(["--m", "own", "--shard", text])
    assert stop.value.code == 2 and "--shard" in capsys.readouterr().err


def test_prompts_of_a_file_come_after_those_of_the_command_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("a löwe\n\n  two cats  \n", encoding="utf-8")
    args = vpt.parse_args(["--prompt", "first", "--prompts-file", str(tmp_path / "prompts.txt")])
    assert args.prompts == ["first", "a löwe", "two cats"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "holds no prompt"),
        (b" \n\n", "holds no prompt"),
        ("löwe".encode("latin-1"), "UTF-8"),
        ("a cat\n".encode("utf-16-le"), "null bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_a_file_without_a_readable_prompt_is_refused(tmp_path, capsys, content, why):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        vpt.parse_args(["--prompts-file", str(tmp_path / "prompts.txt")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "prompts.txt" in error and why in error


def test_the_help_states_the_defaults_of_adamws_options():
    text = " ".join(vpt.build_parser().format_help().split())
    stated = dict(re.findall(r"--([a-z-]+) [A-Z0-9,]+ AdamW: .*?\(default: ([\d.,]+)\)", text))
    assert stated == {"warmup-steps": "20", "betas": "0.9,0.9", "grad-clip": "0"}
    args = vpt.parse_args(["--optimizer", "adamw"])
    assert (args.warmup_steps, args.betas, args.grad_clip) == (20, (0.9, 0.9), 0)


@pytest.mark.parametrize("optimizer", [(), ("--optimizer", "lbfgs")])
def test_an_option_of_adamw_beside_lbfgs_is_refused(capsys, optimizer):
    with pytest.raises(SystemExit) as stop:
        vpt.parse_args([*optimizer, "--grad-clip", "1"])
    assert stop.value.code == 2 and "--grad-clip is an option of AdamW" in capsys.readouterr().err


def test_the_name_of_a_sweep_run_ends_with_its_run_id(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert vpt.parse_args([]).wandb_run_name.endswith("_abc123")


def test_demo_changes_only_the_models_and_the_name():
    plain, demo, names = vars(vpt.parse_args([])), vars(vpt.parse_args(["--demo"])), {"wandb_run_name", "name_in_wandb"}
    assert {name for name in plain if plain[name] != demo[name]} == {"demo", "model_path", "vq_model_ckpt"} | names


REFUSED = {
    "--num-steps": ["0", "-1", "1.5", "1e20", "many", ""],
    "--wandb-tags": ["x" * 65],
    "--learning-rate": ["0", "-0.1", "nan", "inf", "1e39", "fast"],
    "--temperature": ["0", "-1", "nan", "inf", "1e-300"],
    "--repetition-penalty": ["0", "-1", "nan", "1e-37"],
    "--top-p": ["0", "1.01", "-0.5", "nan"],
    "--top-k": ["0", "-3", "2.5"],
    "--cfg-scale": ["-1", "nan", "inf", "1e39"],
    "--image-size": ["0", "-256", "big", "16385"],
    "--grad-clip": ["-1", "nan"],
    "--target-accuracy": ["-1", "101", "nan"],
    "--log-every": ["0", "-5"],
    "--save-every": ["0", "-1", "x"],
    "--image-every": ["0", "1.5"],
    "--optimizer": ["best"],
    "--betas": ["0.9", "0.9,1", "-0.1,0.9", "0.9,nan", "a,b", "0.9,0.9,0.9", ""],
    "--warmup-steps": ["-1", "1.5"],
    "--initial-scale": ["-1", "nan", "inf", "1e7"],
    "--gradient-checkpointing": ["maybe"],
    "--resume": ["perhaps"],
    "--demo": ["2", "yes please"],
    "--seed": ["-1", "x"],
    "--prompt": ["", "   ", "\n\t"],
    "--prompts-file": ["nowhere.txt", "/", ""],
    "--control": ["chaos"],
    "--m": ["both"],
    "--num-e-tokens": ["0", "-1", "1.5"],
    "--vocabulary": ["text"],
    "--dtype": ["int8"],
    "--wandb-mode": ["sometimes"],
    "--wandb-run-name": ["../up", "/abs", "a/b", "..", "", "reference_cache", "x" * 200],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in REFUSED for value in REFUSED[option]])
def test_a_value_out_of_range_is_refused_in_one_line_that_names_the_option(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        vpt.parse_args([f"{option}={value}"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and option in lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# What sweep agents write


def parsed(*words: str) -> dict:
    return vars(vpt.parse_args(list(words)))


@pytest.mark.parametrize("option", sorted(vpt.build_parser().options))
def test_an_option_set_to_none_counts_as_not_given(option):
    assert parsed(f"{option}=None") == parsed(f"{option.replace('-', '_').replace('__', '--')}=None") == parsed()


WHOLE = ("top_k", "seed", "num_steps", "num_e_tokens", "warmup_steps", "image_size", "log_every")


@pytest.mark.parametrize("name", (*WHOLE, "save_every", "image_every"))
@pytest.mark.parametrize("text", ["2.0", "2e0", "2"])
def test_a_whole_number_may_be_written_as_a_float(name, text):
    value = parsed("--optimizer=adamw", f"--{name}={text}")[name]
    assert value == 2 and isinstance(value, int)


@pytest.mark.parametrize("name", ["cfg_scale", "learning_rate", "grad_clip", "target_accuracy", "temperature"])
def test_a_float_may_be_written_as_a_whole_number(name):
    values = [parsed("--optimizer=adamw", f"--{name}={text}")[name] for text in ("2", "2.0", "2e0")]
    assert values == [2, 2, 2]


def test_lists_as_sweep_agents_write_them_are_parsed():
    for betas in ("[0.9, 0.99]", "0.9,0.99"):
        assert parsed("--optimizer=adamw", f"--betas={betas}")["betas"] == (0.9, 0.99)
    assert parsed("--prompt=['a red apple', \"it's a [cat]\"]")["prompts"] == ["a red apple", "it's a [cat]"]
    assert parsed("--prompt=[a cat]", "--prompt", "a dog")["prompts"] == ["[a cat]", "a dog"]
    assert parsed("--prompt=[{[]}]")["prompts"] == ["[{[]}]"]  # Python cannot even build this one
    assert [file.name for file in parsed("--image=['a.png', 'b.png']")["images"]] == ["a.png", "b.png"]
    assert parsed("--wandb_tags=['one', 'two']")["wandb_tags"] == ["one", "two"]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("spelled", [str, lambda value: str(value).lower(), lambda value: str(int(value))])
def test_a_switch_accepts_true_false_1_and_0(spelled, value):
    assert parsed(f"--demo={spelled(value)}")["demo"] is value


def test_the_sweep_agents_own_settings_are_ignored():
    assert parsed("--_wandb={'a': {'b': 1}}") == parsed()


def test_an_unknown_sweep_parameter_is_named_in_the_error(capsys):
    with pytest.raises(SystemExit):
        vpt.parse_args(["--batch_size=4"])
    assert "--batch_size=4" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--wandb-project", "--wandb-entity", "--wandb-group", "--wandb-tags"])
def test_a_wandb_option_without_effect_prints_a_note(option, capsys):
    for words, note in (([], f"note: {option} has no effect without --use-wandb\n"), (["--use-wandb"], "")):
        vpt.parse_args([option, "mine", *words])
        assert capsys.readouterr().out == note


def test_wandb_mode_without_use_wandb_prints_a_note_unless_it_is_disabled(capsys):
    vpt.parse_args(["--wandb-mode", "disabled"])
    assert capsys.readouterr().out == ""
    vpt.parse_args(["--wandb-mode", "offline"])
    assert "--wandb-mode has no effect" in capsys.readouterr().out


TEXTS = (
    "--prompt",
    "--image",
    "--save-dir",
    "--model-path",
    "--vq-model-ckpt",
    "--device",
    "--prompts-file",
    "--m-from",
)
TEXTS += (
    "--from-proto-tokens",
    "--wandb-project",
    "--wandb-entity",
    "--wandb-run-name",
    "--wandb-tags",
    "--wandb-group",
)


@pytest.mark.parametrize("option", TEXTS)
def test_bytes_that_are_not_utf_8_are_refused_in_one_line(option, capsys):
    with pytest.raises(SystemExit) as stop:
        vpt.parse_args([option, os.fsdecode(b"caf\xe9")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"{option}: must be " in line and "UTF-8" in line


@pytest.mark.parametrize("option", ["--image", "--save-dir", "--prompts-file", "--m-from", "--from-proto-tokens"])
def test_the_home_of_an_unknown_user_is_refused_in_one_line(option, capsys):
    with pytest.raises(SystemExit) as stop:
        vpt.parse_args([option, "~nosuchuser/x"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and option in line and "~nosuchuser/x" in line


def test_an_option_overrides_the_environment_which_overrides_the_default(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from_environment")
    assert parsed()["wandb_project"] == "from_environment"
    assert parsed("--wandb-project=given")["wandb_project"] == "given"


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--unknown"],
        ["--num-step", "5"],
        ["stray"],
        ["--prompt"],
        ["--demo", "--model-path", "x"],
        ["--from-proto-tokens", "x", "--control", "random"],
        ["--from-proto-tokens", "x", "--m-from", "y"],
        ["--m-from", "x", "--m", "own"],
        ["--control", "random", "--image", "a.png"],
        ["--capacity", "--target-accuracy", "0"],
        ["--capacity", "--image-every", "5"],
        ["--image", "a.png", "--prompt", "a", "--prompt", "b"],
    ],
)
def test_an_unknown_abbreviated_or_contradictory_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        vpt.parse_args(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_demo_without_its_folder_is_refused_with_the_path_of_the_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vpt, "DEMO_FOLDER", tmp_path / "tests" / "demo_model")
    with pytest.raises(SystemExit) as stop:
        vpt.parse_args(["--demo"])
    assert stop.value.code == 2 and "tests/demo_model" in capsys.readouterr().err


def test_help_and_mistakes_do_not_wait_for_the_heavy_imports():
    probe = (
        "import sys, runpy\n"
        "sys.argv = ['verify_proto_tokens.py', sys.argv[1]]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: print('code', stop.code, 'torch' in sys.modules, 'wandb' in sys.modules)\n"
    )
    for argument, code in (("--help", 0), ("--bogus", 2)):
        command = [sys.executable, "-c", probe, argument]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert process.stdout.splitlines()[-1] == f"code {code} False False"


VALUES = st.one_of(st.text(max_size=30), st.integers().map(str), st.floats().map(str))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*sorted(REFUSED), "--use-wandb", "--save-dir", "-x", ""]), VALUES), max_size=4)
)
def test_no_list_of_arguments_ends_in_a_traceback(pairs):
    arguments = [part for option, value in pairs for part in (option, value)]
    try:
        vpt.parse_args(arguments)
    except SystemExit as stop:
        assert stop.code == 2
