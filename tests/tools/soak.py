"""Give many short runs of one sweep to two agents, kill an agent with SIGKILL now and then, and check what is lost.

    python tests/tools/soak.py                        # 50 runs on a tiny model, about five minutes on two cores
    python tests/tools/soak.py --runs 6 --kills 1     # a short one, as in the tests

Every other kill hits only the agent, and its run goes on without it; the other kills hit its run, too. Afterwards,
every run is looked up on the local W&B server and on disk. Linux only: memory is read from /proc.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from support.contract import FILES, SUMMARY  # noqa: E402
from support.processes import wandb_tool  # noqa: E402
from support.tiny_model import save_tiny_models  # noqa: E402
from support.wandb_server import Run, WandbServer  # noqa: E402

import verify_proto_tokens as vpt  # noqa: E402

NUM_STEPS = 60


@dataclass
class Outcome:
    """What a soak leaves behind. `complete` runs are whole on disk and on the server; `problems` says what is not."""

    handed_out: int = 0
    complete: int = 0
    killed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    run_memory: list[int] = field(default_factory=list)  # peak of each run's process in kB, in their order
    agent_memory: dict[int, list[int]] = field(default_factory=dict)  # of each agent's process, over time, in kB


def write_sweep(folder: Path, runs: int) -> None:
    values = {"model_path": str(folder / "generator"), "vq_model_ckpt": str(folder / "vq"), "device": "cpu"}
    values |= {"image_size": 16, "num_steps": NUM_STEPS, "target_accuracy": 0, "save_every": 20}
    parameters = {"seed": {"values": list(range(runs))}} | {name: {"value": value} for name, value in values.items()}
    sweep = {"program": str(vpt.__file__), "method": "grid", "parameters": parameters}
    (folder / "soak.yaml").write_text(json.dumps(sweep))


class Agents:
    """Two `wandb agent` processes."""

    def __init__(self, folder: Path, server: WandbServer):
        self.folder, self.server, self.sweep = folder, server, None
        self.processes: list[subprocess.Popen] = []

    def tool(self, *arguments: str) -> subprocess.Popen:
        return wandb_tool(self.folder, *arguments, stdout=subprocess.DEVNULL, **self.server.environment)

    def start(self) -> None:
        self.processes.append(self.tool("agent", self.sweep))

    def kill_one(self, with_its_run: bool) -> list[str]:
        """Kill the agent that was started last, as if its machine were taken away, and start another.

        Return the ids of the runs that died with it.
        """
        victim = self.processes.pop()
        runs = [pid for pid in script_processes() if status_of(pid).get("PPid") == str(victim.pid)]
        victim.kill()
        victim.wait()
        died = []
        for pid in runs if with_its_run else ():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                os.kill(pid, signal.SIGKILL)
                died += [v.decode().partition("=")[2] for v in variables if v.startswith(b"WANDB_RUN_ID=")]
        self.start()
        return died


def status_of(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (row.partition(":") for row in rows)}
    return {}


def script_processes() -> list[int]:
    """Return the ids of the processes that run the script, from /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(vpt.__file__).encode() in words:
                found.append(int(folder.name))
    return found


def watch_memory(outcome: Outcome, agents: Agents, ended: threading.Event) -> None:
    """Sample the peak memory of all runs and the present memory of all agents until `ended`."""
    peaks: dict[int, int] = {}
    while not ended.wait(0.2):
        for pid in script_processes():
            peak = int(status_of(pid).get("VmHWM", "0 kB").split()[0])
            peaks[pid] = max(peaks.get(pid, 0), peak)
        for agent in agents.processes:
            if size := int(status_of(agent.pid).get("VmRSS", "0 kB").split()[0]):
                outcome.agent_memory.setdefault(agent.pid, []).append(size)
    outcome.run_memory = list(peaks.values())


def problems_of(run: Run, folder: Path) -> list[str]:
    """Return what a successful run lacks on the server or in its folder."""
    found = []
    if [row["_step"] for row in run.history if "train/loss" in row] != list(range(1, NUM_STEPS + 1)):
        found.append("steps are missing on the server")
    if not run.summary.keys() >= SUMMARY:
        found.append("the summary is not whole on the server")
    if [artifact["type"] for artifact in run.artifacts].count("proto-tokens") != 1:
        found.append("no artifact on the server")
    if {file.name for file in folder.iterdir()} != FILES:
        return [*found, f"the folder holds {sorted(file.name for file in folder.iterdir())}"]
    with (folder / "history.csv").open() as stream:
        if [int(row["step"]) for row in csv.DictReader(stream)] != list(range(1, NUM_STEPS + 1)):
            found.append("history.csv lacks steps")
    if json.loads((folder / "summary.json").read_text())["best_accuracy"] != run.summary["best_accuracy"]:
        found.append("disk and server disagree")
    with safe_open(folder / "proto_tokens.safetensors", "pt") as stored:
        if not stored.get_tensor("e_t").isfinite().all():
            found.append("e_t is not finite")
    return found


def look_up(outcome: Outcome, server: WandbServer, save_dir: Path) -> None:
    outcome.handed_out = len(server.runs)
    for run in server.runs.values():
        folders = list(save_dir.glob(f"*_{run.id}"))
        on_disk = any((folder / "summary.json").exists() for folder in folders)
        if run.exit_code == 0 and on_disk:
            problems = problems_of(run, *folders)
            outcome.complete += not problems
            outcome.problems += [f"{run.id}: {problem}" for problem in problems]
        elif run.id not in outcome.killed:
            outcome.problems.append(f"{run.id}: exit code {run.exit_code}, summary on disk: {on_disk}")
    left_behind = list(save_dir.rglob("*.partial"))
    if len(left_behind) > len(outcome.killed):  # a killed run leaves the file that it was writing
        outcome.problems.append(f"left behind: {left_behind}")
    outcome.problems += [f"not known to the server: {request}" for request in server.unknown]


def soak(folder: Path, runs: int, kills: int, seed: int = 0) -> Outcome:
    """Hand out `runs` runs to two agents, and kill one of the agents `kills` times, at random moments."""
    save_tiny_models(folder)
    write_sweep(folder, runs)
    outcome, moments, ended = Outcome(), random.Random(seed), threading.Event()
    with WandbServer(folder / "server") as server:
        agents = Agents(folder, server)
        if agents.tool("sweep", "--project", "soak", "soak.yaml").wait(60):
            raise RuntimeError("the sweep was not accepted")
        agents.sweep = f"tester/soak/{next(iter(server.sweeps))}"
        watch = threading.Thread(target=watch_memory, args=(outcome, agents, ended))
        watch.start()
        agents.start()
        agents.start()
        # Kills fall between the second run and the last but two, so that there is always one to kill.
        due = sorted(moments.sample(range(2, max(kills + 2, runs - 2)), kills))
        while any(agent.poll() is None for agent in agents.processes):
            if due and len(server.runs) > due[0]:
                time.sleep(moments.uniform(0, 6))
                outcome.killed.update(agents.kill_one(with_its_run=len(due) % 2 == 1))
                due.pop(0)
                print(f"killed an agent after {len(server.runs)} runs were handed out", flush=True)
            time.sleep(0.1)
        while script_processes():  # runs that outlived their agents
            time.sleep(0.2)
        time.sleep(1)
        ended.set()
        watch.join()
        look_up(outcome, server, folder / "proto_tokens_exp")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--kills", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: %(default)s)")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = soak(Path(folder), args.runs, args.kills, args.seed)
    print(f"{outcome.handed_out} runs handed out, {outcome.complete} complete on disk and on the server, ", end="")
    print(f"{len(outcome.killed)} killed with their agents, in {time.monotonic() - started:.0f} s")
    third = max(1, len(outcome.run_memory) // 3)
    first, last = (sorted(part)[len(part) // 2] for part in (outcome.run_memory[:third], outcome.run_memory[-third:]))
    print(f"peak memory of a run, median: first third {first / 1024:.0f} MiB, last third {last / 1024:.0f} MiB")
    for pid, sizes in outcome.agent_memory.items():
        middle = sizes[len(sizes) // 2]
        print(f"agent {pid}: {middle / 1024:.0f} MiB half-way, {sizes[-1] / 1024:.0f} MiB at its end")
    for problem, count in Counter(outcome.problems).items():
        print(f"PROBLEM {problem}" + (f" ({count} times)" if count > 1 else ""))
    print("lost: nothing" if not outcome.problems else f"{len(outcome.problems)} problems")
    sys.exit(bool(outcome.problems))


if __name__ == "__main__":
    main()
