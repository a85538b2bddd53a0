"""Test unusual environments: settings of libraries, file systems, outputs and schedulers."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import types

import matplotlib
import pytest
from PIL import Image
from support.contract import FILES
from support.processes import SCRIPT, ended, run_script_in, start, start_script
from support.results import refused, results_of, summary_in
from support.tiny_model import tiny_arguments

import verify_proto_tokens as vpt

RUN = ("--num-steps", 6, "--target-accuracy", 0, "--save-dir", "out", "--wandb-run-name", "run")


# ----------------------------------------------------------------------------------------------------------------------
# Matplotlib's settings, letters and outputs

HOSTILE = """
backend: no_such_backend
text.usetex: True
font.family: No Such Font
no.such.key: 1
"""


@pytest.fixture(scope="module")
def hostile(tiny_folder, tmp_path_factory):
    """Run with a broken matplotlibrc, a notebook's backend, an output of few letters, and a trap for wandb."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "matplotlibrc").write_text(HOSTILE)
    (folder / "trap").mkdir()
    (folder / "trap" / "wandb.py").write_text("raise SystemExit('wandb was imported')")
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "cp1252"}
    env |= {"PYTHONPATH": str(folder / "trap"), "PYTORCH_JIT": "0"}
    arguments = (
        *tiny_arguments(tiny_folder),
        "--prompt",
        "löwe 猫 \U0001f34e",
        "--save-dir",
        "猫",
        "--wandb-run-name",
        "狗",
    )
    return run_script_in(folder, *arguments, env=env), folder / "猫" / "狗"


def test_without_use_wandb_wandb_is_not_even_imported(hostile):
    result, folder = hostile
    trap = {"PYTHONPATH": str(folder.parents[1] / "trap")}
    assert subprocess.run([sys.executable, "-c", "import wandb"], env=trap, capture_output=True).returncode == 1
    assert result.code == 0, result.err


def test_a_broken_matplotlibrc_does_not_disturb_a_run(hostile):
    result, folder = hostile
    assert result.code == 0, result.err
    assert {file.name for file in folder.iterdir()} == FILES
    assert not any(word in result.err for word in ("matplotlibrc", "findfont", "No Such Font"))


def test_letters_that_an_output_cannot_encode_are_escaped(hostile):
    result, _ = hostile
    assert r"\u732b/\u72d7/" in result.out


def test_figures_are_the_same_under_any_matplotlib_settings():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    target = {"prompt": "a", "reference": red, "reconstruction": blue}
    summary = {"num_tokens": 16, "num_errors": 1, "num_e_tokens": 1, "psnr": 20.0}
    plain = vpt.draw_comparison(target, summary)
    with matplotlib.rc_context({"text.usetex": True, "font.family": "No Such Font", "axes.labelsize": 40}):
        assert vpt.draw_comparison(target, summary).tobytes() == plain.tobytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here that is always full")
def test_a_closed_or_full_output_does_not_end_a_run(tiny_folder, tmp_path):
    """Close stdout, as `| head` does; send stderr to a full device, like a log file on a full disk."""
    with open("/dev/full", "w") as full:
        process = start_script(tmp_path, *tiny_arguments(tiny_folder), *RUN, stderr=full)
        process.stdout.close()
        assert process.wait(60) == 0
    assert {file.name for file in (tmp_path / "out" / "run").iterdir()} == FILES


# ----------------------------------------------------------------------------------------------------------------------
# File systems and homes


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_run_needs_no_locks_of_the_file_system(call_tiny, tmp_path, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(vpt.fcntl, "flock", no_locks)
    assert call_tiny(*RUN).code == 0
    assert (tmp_path / "out" / "run" / "summary.json").exists()


def test_a_model_path_in_the_home_of_an_unknown_user_is_refused_in_one_line(call_tiny):
    for option in ("--model-path", "--vq-model-ckpt"):
        result = call_tiny(option, "~nosuchuser/x")
        (line,) = result.err.splitlines()
        assert result.code == 2 and f"{option} ~nosuchuser/x" in line


# ----------------------------------------------------------------------------------------------------------------------
# Signals


def stopping(number: int, at_step: int):
    """Return a `Recorder.keep_step` that sends this process a signal after a step, as a scheduler would."""
    really_step = vpt.Recorder.keep_step

    def step(record, row, learning):
        really_step(record, row, learning)
        if learning.step == at_step:
            os.kill(os.getpid(), number)

    return step


@pytest.fixture
def default_handlers():
    """Set the default handlers of these signals: under nohup, the tests themselves would ignore SIGHUP."""
    numbers = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
@pytest.mark.usefixtures("default_handlers")
def test_a_lost_terminal_or_a_schedulers_warning_saves_the_state_and_stops(call_tiny, tmp_path, monkeypatch, name):
    number, folder = getattr(signal, name), tmp_path / "out" / "run"
    assert call_tiny(*RUN).code == 0
    whole = results_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(vpt.Recorder, "keep_step", stopping(number, at_step=4))
        result = call_tiny(*RUN)
    assert result.code == 128 + number and name in result.err.splitlines()[-1]
    assert vpt.read_state(folder)["learning"]["step"] == 4
    assert call_tiny(*RUN, "--resume").code == 0
    assert results_of(folder) == whole
    assert signal.getsignal(number) == signal.SIG_DFL  # the handler is restored


@pytest.mark.usefixtures("default_handlers")
def test_an_ignored_sighup_stays_ignored(call_tiny, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    monkeypatch.setattr(vpt.Recorder, "keep_step", stopping(signal.SIGHUP, at_step=4))
    assert call_tiny(*RUN).code == 0
    assert summary_in(tmp_path / "out" / "run")["steps"] == 6


# ----------------------------------------------------------------------------------------------------------------------
# Slow machines


@pytest.mark.parametrize(("seconds_a_pass", "passes"), [(0.0, 6), (0.9, 3), (60.0, 1)])
def test_a_slow_pass_is_timed_with_fewer_repetitions(tiny_models, make_args, monkeypatch, seconds_a_pass, passes):
    clock, really_pass, count = [0.0], vpt.one_pass, []

    def slow(*arguments):
        clock[0] += seconds_a_pass
        count.append(1)
        return really_pass(*arguments)

    monkeypatch.setattr(vpt, "one_pass", slow)
    monkeypatch.setattr(vpt, "synchronised_time", lambda device: clock[0])
    proto_tokens = vpt.initial_proto_tokens(tiny_models, 1, make_args())
    assert vpt.timed_pass(tiny_models, proto_tokens, num_tokens=16) == pytest.approx(seconds_a_pass)
    assert len(count) == passes


# ----------------------------------------------------------------------------------------------------------------------
# What libraries refuse


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TQDM_MININTERVAL", "slow"),
        ("TQDM_NCOLS", "auto"),
        ("HF_HUB_ETAG_TIMEOUT", "30s"),
        ("TORCH_LOGS", "bogus"),
        ("MATPLOTLIBRC", "latin-1"),
        ("PYTHONPATH", "shadow"),
    ],
)
def test_an_error_while_importing_a_library_is_reported_in_one_line(run_script, tmp_path, name, value):
    (tmp_path / "latin-1").write_bytes(b"# \xe9\n")
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "numpy.py").write_text("")
    refused(run_script("--demo", env={name: value}), "import ", "fails", "fix")
    assert run_script("--help", env={name: value}).code == 0


def test_a_deleted_working_folder_is_reported_in_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && exec {sys.executable} {SCRIPT} --demo --save-dir {tmp_path}"
    end = ended(start(["bash", "-c", command], tmp_path))
    refused(end, "the working folder cannot be used", "go to another one")


def test_another_module_named_wandb_is_refused(call_tiny, monkeypatch):
    shadow = types.ModuleType("wandb")
    shadow.teardown = lambda: None
    monkeypatch.setitem(sys.modules, "wandb", shadow)
    refused(call_tiny("--use-wandb"), "--use-wandb", "cannot import name 'Settings'")


def test_a_model_folder_with_a_name_that_is_not_utf_8_works(call_script, tiny_folder, tmp_path):
    folder = os.fsencode(tmp_path) + b"/models\xe9"
    shutil.copytree(tiny_folder, os.fsdecode(folder))
    (tmp_path / "models").symlink_to(os.fsdecode(folder))
    assert call_script(*tiny_arguments(tmp_path / "models")).code == 0


def test_a_save_dir_that_is_a_dangling_link_is_made_at_the_links_target(call_tiny, tmp_path):
    (tmp_path / "link").symlink_to("disk")
    assert call_tiny("--save-dir", "link", "--wandb-run-name", "run").code == 0
    assert (tmp_path / "disk" / "run" / "summary.json").exists()


@pytest.mark.parametrize("option", ["--from-proto-tokens", "--m-from", "--prompts-file", "--image"])
def test_a_link_to_itself_is_refused_in_one_line(call_tiny, tmp_path, option):
    (tmp_path / "loop").symlink_to("loop")
    refused(call_tiny(option, "loop"), option)


def test_byte_order_marks_are_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\ufeff\n\ufeffa dog\n", encoding="utf-8")
    assert vpt.read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]


def test_a_run_in_a_thread_of_another_program_works(tiny_folder, tmp_path):
    args = vpt.parse_args([*tiny_arguments(tiny_folder), "--save-dir", str(tmp_path), "--wandb-run-name", "run"])
    thread = threading.Thread(target=vpt.main, args=[args])
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "summary.json").exists()
