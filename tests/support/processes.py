"""Start the script and wandb's command line as real processes, without any account or network."""

import atexit
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tests" / "demo_model"
SCRIPT = ROOT / "verify_proto_tokens.py"

# Runs the script, but pauses after a given step, so that a test can act at a known moment. The script continues once
# the file `go_on` exists. To save time, it gives up on a dead W&B server sooner, and draws blank figures.
PAUSING = """
import sys, time
from pathlib import Path
from PIL import Image
import verify_proto_tokens as vpt

vpt.WANDB_ANSWER_SECONDS, vpt.WANDB_FINISH_SECONDS = 4, 10
vpt.render = lambda figure: Image.new("RGB", (8, 8), "white")
pause_after, really_step = int(sys.argv.pop(1)), vpt.Recorder.keep_step

def step(record, row, learning):
    really_step(record, row, learning)
    if learning.step == pause_after:
        Path("paused").touch()
        while not Path("go_on").exists():
            time.sleep(0.01)

vpt.Recorder.keep_step = step
vpt.main(vpt.parse_args(sys.argv[1:]))
"""


def clean_environment(folder: Path) -> dict[str, str]:
    """Return variables without any W&B or hub account, and offline; one thread, since the tests' models are tiny."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HF_"))}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def start(command: list[object], folder: Path, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = clean_environment(folder) | (env or {})
    return subprocess.Popen([str(word) for word in command], cwd=folder, env=environment, text=True, **pipes | options)


def start_script(folder: Path, *arguments, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """Start the script as a process in `folder`."""
    return start([sys.executable, SCRIPT, *arguments], folder, env, **options)


# A process that has imported the script, and from which others are forked: this saves each five seconds of imports.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["verify_proto_tokens"])


class Forked:
    """A process of the fork server, used like subprocess.Popen."""

    def __init__(self, process: multiprocessing.Process, outputs: list[Path]):
        self.process, self.outputs, self.pid = process, outputs, process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float | None = None) -> list[str]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("the script", timeout)
        return [output.read_text() for output in self.outputs]


def run_code(code: str, arguments: list[str], folder: Path, env: dict[str, str], outputs: list[Path]) -> None:
    """Run `code` in the forked process as `python -c code arguments` would."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not run them


def start_code(code: str, folder: Path, *arguments, env: dict[str, str] | None = None) -> Forked:
    """Start a process in `folder` that runs code which imports the script."""
    outputs = [folder / "stdout", folder / "stderr"]
    words, environment = [str(word) for word in arguments], clean_environment(folder) | (env or {})
    process = FORK_SERVER.Process(target=run_code, args=(code, words, folder, environment, outputs))
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # for the fork server, which the first call starts
        process.start()
    return Forked(process, outputs)


def start_pausing(folder: Path, pause_after: int, *arguments, env: dict | None = None, seconds: float = 60) -> Forked:
    """Start the script; return when it pauses after step `pause_after`; kill it if that takes more than `seconds`."""
    for name in ("paused", "go_on"):
        (folder / name).unlink(missing_ok=True)
    process = start_code(PAUSING, folder, pause_after, *arguments, env=env)
    try:
        wait_for((folder / "paused").exists, process, seconds)
    except BaseException:
        process.kill()
        raise
    return process


def let_go_on(folder: Path) -> None:
    (folder / "go_on").touch()


def kill(process: subprocess.Popen | Forked) -> None:
    process.kill()
    process.communicate()


def ended(process: subprocess.Popen | Forked, timeout: float = 240) -> SimpleNamespace:
    """Wait for a process to end; return its exit code and output."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def run_script_in(folder: Path, *arguments, env: dict[str, str] | None = None) -> SimpleNamespace:
    """Run the script as a process in `folder` to its end; return its exit code and output."""
    return ended(start_script(folder, *arguments, env=env))


def wait_for(condition: Callable, process: subprocess.Popen | Forked | None = None, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            if process is not None:
                process.kill()
            raise AssertionError(f"the awaited condition did not hold within {seconds} s")
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def wandb_tool(folder: Path, *arguments, stdout: int = subprocess.PIPE, **env) -> subprocess.Popen:
    """Start wandb's command line, with this interpreter as the `python` that its agents run."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "wandb", *arguments]
    return start(command, folder, {"PATH": path} | env, stdout=stdout, stderr=subprocess.STDOUT)
