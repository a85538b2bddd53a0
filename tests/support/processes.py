"""The script and wandb's own command line as real processes, away from any account and from the network."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tests" / "demo_model"
SCRIPT = ROOT / "verify_proto_tokens.py"

# Runs the script, but waits after one step, so that a test can act when it is surely in the middle. Goes on when the
# file `go_on` is there, and gives up on a dead W&B server sooner.
PAUSING = """
import sys, time
from pathlib import Path
import verify_proto_tokens as vpt

vpt.WANDB_ANSWER_SECONDS, vpt.WANDB_FINISH_SECONDS = 4, 10
pause_after, really_step = int(sys.argv.pop(1)), vpt.Recorder.step

def step(record, row, learning):
    really_step(record, row, learning)
    if learning.step == pause_after:
        Path("paused").touch()
        while not Path("go_on").exists():
            time.sleep(0.01)

vpt.Recorder.step = step
vpt.main(vpt.parse_args(sys.argv[1:]))
"""


def clean_environment(folder: Path) -> dict[str, str]:
    """Away from any W&B or hub account, and from the network; one thread, since the tests' models are tiny."""
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
    """Starts the script as a process in `folder`."""
    return start([sys.executable, SCRIPT, *arguments], folder, env, **options)


def start_pausing(folder: Path, pause_after: int, *arguments, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts the script, and returns when it has done so many steps and waits."""
    for name in ("paused", "go_on"):
        (folder / name).unlink(missing_ok=True)
    process = start([sys.executable, "-c", PAUSING, pause_after, *arguments], folder, env)
    wait_for((folder / "paused").exists, process)
    return process


def let_go_on(folder: Path) -> None:
    (folder / "go_on").touch()


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def ended(process: subprocess.Popen, timeout: float = 240) -> SimpleNamespace:
    """Waits for a process; its exit code and output."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def run_script_in(folder: Path, *arguments, env: dict[str, str] | None = None) -> SimpleNamespace:
    """Runs the script as a process in `folder` to its end."""
    return ended(start_script(folder, *arguments, env=env))


def wait_for(condition: Callable, process: subprocess.Popen | None = None, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def wandb_tool(folder: Path, *arguments, stdout: int = subprocess.PIPE, **env) -> subprocess.Popen:
    """Starts wandb's own command line; `python` is this one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "wandb", *arguments]
    return start(command, folder, {"PATH": path} | env, stdout=stdout, stderr=subprocess.STDOUT)
