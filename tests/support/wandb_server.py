"""Serve W&B's protocol to the real client and its command-line tools, on this machine alone, for the tests.

The server implements only what they need: GraphQL for runs, files, artifacts and sweeps, the file stream for metrics,
PUT for files. It keeps what arrived in plain attributes. A test can make it fail, stop a run, or die.

By hand: `python tests/support/wandb_server.py` prints the environment that points W&B at it, and serves until Ctrl-C.
"""

import argparse
import gzip
import json
import math
import random
import re
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, product
from pathlib import Path
from urllib.parse import quote, unquote

ENTITY = "tester"
API_KEY = "0123456789" * 4  # no secret: it only has a key's form, which the client checks before it connects


@dataclass
class Run:
    """One run, as the client has described it so far."""

    id: str
    entity: str
    project: str
    display_name: str
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    artifacts: list[dict] = field(default_factory=list)
    exit_code: int | None = None
    state: str = "pending"
    sweep: str | None = None
    starts: int = 0  # resuming the run, or a `wandb sync` of it, also counts as a start
    sent_config: str = field(default="{}", repr=False)
    lines: Counter = field(default_factory=Counter, repr=False)


@dataclass
class Sweep:
    """One sweep. `max_runs` limits the methods that draw at random, which have no end of their own."""

    id: str
    entity: str
    project: str
    config: dict
    text: str = field(repr=False)
    state: str = "RUNNING"
    run_ids: list[str] = field(default_factory=list)
    max_runs: int = 4
    source: random.Random = field(default_factory=lambda: random.Random(0), repr=False)

    def next_arguments(self) -> dict | None:
        """Return the arguments of the sweep's next run, or None if it has no more runs."""
        count, parameters = len(self.run_ids), self.config["parameters"]
        if count >= self.config.get("run_cap", math.inf):
            return None
        if self.config["method"] == "grid":
            values = next(islice(product(*map(choices, parameters.values())), count, None), None)
            return values and dict(zip(parameters, values, strict=True))
        return None if count >= self.max_runs else {name: draw(spec, self.source) for name, spec in parameters.items()}


def choices(spec: dict) -> Sequence:
    """Return all values of a parameter. Raises ValueError if they cannot be listed."""
    if "value" in spec:
        return [spec["value"]]
    if "values" in spec:
        return spec["values"]
    if spec.get("distribution") == "int_uniform":
        return range(spec["min"], spec["max"] + 1)
    raise ValueError(f"no list of values in {spec}")


def draw(spec: dict, source: random.Random) -> object:
    """Draw a random value of a parameter; for a bare min and max, the client has filled in the distribution."""
    distribution = spec.get("distribution")
    if distribution == "uniform":
        return source.uniform(spec["min"], spec["max"])
    if distribution == "log_uniform_values":
        return math.exp(source.uniform(math.log(spec["min"]), math.log(spec["max"])))
    return source.choice(choices(spec))


class RequestError(Exception):
    """A request that is answered with this status and message. The client retries neither 400 nor 404."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class WandbServer:
    """The server: a context manager that serves inside its block, or until `stop`."""

    def __init__(self, folder: Path, port: int = 0):
        self.folder = folder
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.received: Counter = Counter()
        self.unknown: list[str] = []
        self.failing: int | None = None
        self._agents: dict[str, Sweep] = {}
        self._stopping: set[str] = set()
        self._artifacts: dict[str, tuple[Run | None, dict]] = {}
        self._committed: set[str] = set()
        self._places: dict[str, tuple[Path, dict[str, Path], str]] = {}
        self._lock = threading.Lock()
        self._http = QuietServer(("127.0.0.1", port), Handler)
        self._http.wandb = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY}

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop serving: from now on the port refuses connections."""
        self._http.shutdown()
        self._http.server_close()

    def stop_run(self, run_id: str) -> None:
        """Make the run's agent end it, which each heartbeat asks for (SIGTERM, after 30 s SIGKILL)."""
        self._stopping.add(run_id)

    # ---- Requests

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        """Return the status and the JSON answer to a request."""
        kinds = {"/graphql": "graphql", "/file_stream": "history", "/storage": "files"}
        with self._lock:
            self.received.update({kind: len(body) for part, kind in kinds.items() if part in path})
            if self.failing:
                return self.failing, {"errors": [{"message": f"failing with {self.failing} on order"}]}
            try:
                return 200, self._route(method, path, body)
            except RequestError as error:
                return error.status, {"errors": [{"message": str(error)}], "data": None}
            except Exception as error:  # a fault in here must show in the test at once, and not be retried for minutes
                self.unknown.append(f"{method} {path}: {error!r}")
                return 400, {"errors": [{"message": repr(error)}], "data": None}

    def _route(self, method: str, path: str, body: bytes) -> dict:
        if body[:2] == b"\x1f\x8b" and method == "POST":
            body = gzip.decompress(body)
        if method == "PUT" and path in self._places:
            return self._store(path, body)
        if method == "POST" and path == "/graphql":
            return {"data": self._graphql(json.loads(body))}
        if method == "POST" and (match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)):
            return self._file_stream(match[1], json.loads(body))
        if path.startswith("/sdk/otel/"):  # the client's telemetry of itself
            return {}
        self.unknown.append(f"{method} {path}")
        raise RequestError(f"nothing at {path}", 404)

    def _graphql(self, request: dict) -> dict:
        match = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
        name = match[1] if match else request["query"]
        if name not in OPERATIONS:
            self.unknown.append(name)
            raise RequestError(f"unknown operation {name}")
        return OPERATIONS[name](self, request.get("variables") or {})

    def _store(self, path: str, body: bytes) -> dict:
        target, known, name = self._places[path]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body)
        known[name] = target
        return {}

    def _place(self, folder: str, name: str, known: dict[str, Path]) -> str:
        """Return an address to upload a file to; `known` contains the file once it has arrived."""
        path = f"/storage/{folder}/{name}"
        self._places[path] = (self.folder / folder / name, known, name)
        return self.url + quote(path)

    def _file_stream(self, run_id: str, body: dict) -> dict:
        """Store a batch of metrics, console lines or a run's end; an empty batch only shows that the run is alive."""
        if run_id not in self.runs:
            raise RequestError(f"no run {run_id}", 404)
        run = self.runs[run_id]
        for name, chunk in body.get("files", {}).items():
            run.lines[name] = max(run.lines[name], chunk["offset"] + len(chunk["content"]))
            rows = [json.loads(line) for line in chunk["content"]] if name.startswith("wandb-") else []
            if name == "wandb-history.jsonl":
                self._add_history(run, rows)
            if name == "wandb-summary.json" and rows:
                run.summary = rows[-1]
        if body.get("preempting"):
            run.state = "preempting"
        if body.get("complete"):
            run.exit_code = body["exitcode"]
            run.state = "failed" if run.exit_code else "finished"
        return {}

    def _add_history(self, run: Run, rows: list[dict]) -> None:
        """Add rows by their step, so that a row that is sent again (by `wandb sync` or a retry) is stored once."""
        places = {row["_step"]: place for place, row in enumerate(run.history)}
        for row in rows:
            place = places.setdefault(row["_step"], len(run.history))
            run.history[place : place + 1] = [row]

    # ---- GraphQL: runs

    def resume_status(self, variables: dict) -> dict:
        """Return what the client needs to resume a run. A run that was only handed to an agent has not begun."""
        run = self.runs.get(variables["name"])
        if run is None or not run.starts:
            return {"model": None}
        bucket = {"id": run.id, "name": run.id, "displayName": run.display_name, "tags": run.tags, "notes": None}
        bucket |= {"config": run.sent_config, "summaryMetrics": json.dumps(run.summary), "wandbConfig": '{"t": {}}'}
        bucket |= {"logLineCount": run.lines["output.log"], "eventsLineCount": run.lines["wandb-events.jsonl"]}
        tail = [json.dumps(row) for row in run.history[-1:]]
        bucket |= {"historyLineCount": len(run.history), "historyTail": json.dumps(tail), "eventsTail": "[]"}
        return {"model": project_of(run) | {"bucket": bucket}}

    def upsert_bucket(self, variables: dict) -> dict:
        """Begin, resume or change a run; values that a request leaves null do not change."""
        name = variables.get("name") or secrets.token_hex(4)
        entity, project = variables.get("entity") or ENTITY, variables.get("project") or "uncategorized"
        run = self.runs.setdefault(name, Run(name, entity, project, name))
        inserted = not run.starts
        sent = json.loads(variables.get("config") or "{}")
        # Only a client's first request describes the whole run and its host, but not yet "e", the environment.
        # A client that is set to send nothing about its machine never sends either of them.
        first = "e" not in sent.get("_wandb", {}).get("value", "e")
        if first and (variables.get("host") or run.state != "running"):
            run.starts, run.state, run.exit_code = run.starts + 1, "running", None
        ours = {"displayName": "display_name", "groupName": "group", "tags": "tags", "sweep": "sweep", "state": "state"}
        ours |= {"jobType": "job_type", "notes": "notes"}
        for key in ours.keys() & {key for key, value in variables.items() if value is not None}:
            setattr(run, ours[key], variables[key])
        if sent:
            run.sent_config = variables["config"]
            run.config = {key: entry["value"] for key, entry in sent.items() if key != "_wandb"}
        bucket = {"id": run.id, "name": run.id, "displayName": run.display_name, "sweepName": run.sweep}
        bucket |= {"config": run.sent_config, "historyLineCount": len(run.history), "project": project_of(run)}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def create_run_files(self, variables: dict) -> dict:
        run = self.runs[variables["run"]]
        files = [{"name": name, "uploadUrl": self._place(run.id, name, run.files)} for name in variables["files"]]
        return {"createRunFiles": {"runID": run.id, "uploadHeaders": [], "files": files}}

    # ---- GraphQL: artifacts

    def create_artifact(self, variables: dict) -> dict:
        """Create an artifact; content that arrived before (`wandb sync` sends the same) is not uploaded again."""
        given = variables["input"]
        artifact = {"name": given["artifactCollectionName"], "type": given["artifactTypeName"], "files": {}}
        artifact["metadata"] = json.loads(given.get("metadata") or "{}")
        artifact["aliases"] = sorted(entry["alias"] for entry in given.get("aliases") or [])
        artifact_id = f"{artifact['name']}-{given['digest']}"
        self._artifacts.setdefault(artifact_id, (self.runs.get(given.get("runName")), artifact))
        state = "COMMITTED" if artifact_id in self._committed else "PENDING"
        created = {"id": artifact_id, "state": state, "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": created}}

    def create_manifest(self, variables: dict) -> dict:
        address = self._place(f"artifacts/{variables['artifactID']}.manifest", variables["name"], {})
        upload = {"id": variables["artifactID"], "uploadUrl": address, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": variables["artifactID"], "file": upload}}}

    def create_artifact_files(self, variables: dict) -> dict:
        nodes = []
        for given in variables["input"]["artifactFiles"]:
            artifact_id, name = given["artifactID"], given["name"]
            address = self._place(f"artifacts/{artifact_id}", name, self._artifacts[artifact_id][1]["files"])
            node = {"storagePath": f"{artifact_id}/{name}", "uploadUrl": address, "uploadHeaders": []}
            nodes.append(node | {"uploadMultipartUrls": None, "artifact": {"id": artifact_id}})
        return {"createArtifactFiles": {"files": edges(nodes)}}

    def commit_artifact(self, variables: dict) -> dict:
        """Mark the artifact as complete, and only now add it to its run."""
        run, artifact = self._artifacts[variables["artifactID"]]
        self._committed.add(variables["artifactID"])
        if run:
            run.artifacts.append(artifact)
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}

    # ---- GraphQL: sweeps

    def upsert_sweep(self, variables: dict) -> dict:
        """Create a sweep, or change the state or configuration of an existing one."""
        sweep = self.sweeps.get(variables.get("id"))
        if variables.get("config"):
            config = parsed_sweep(variables["config"])
            if sweep is None:
                entity, project = variables.get("entityName") or ENTITY, variables.get("projectName") or "uncategorized"
                sweep = Sweep(secrets.token_hex(4), entity, project, {}, "")
                self.sweeps[sweep.id] = sweep
            sweep.config, sweep.text = config, variables["config"]
        if sweep is None:
            raise RequestError(f"no sweep {variables.get('id')}", 404)
        sweep.state = variables.get("state") or sweep.state
        answer = {"id": sweep.id, "name": sweep.id, "project": project_of(sweep)}
        return {"upsertSweep": {"sweep": answer, "configValidationWarnings": []}}

    def sweep_with_runs(self, variables: dict) -> dict:
        if variables["sweep"] not in self.sweeps:
            return {"project": None}
        sweep = self.sweeps[variables["sweep"]]
        runs = [{"name": run_id, "state": self.runs[run_id].state} for run_id in sweep.run_ids]
        answer = {"id": sweep.id, "name": sweep.id, "method": sweep.config["method"], "state": sweep.state}
        return {"project": {"sweep": answer | {"config": sweep.text, "runs": edges(runs)}}}

    def create_agent(self, variables: dict) -> dict:
        if variables["sweep"] not in self.sweeps:
            raise RequestError(f"no sweep {variables['sweep']}", 404)
        agent_id = secrets.token_hex(4)
        self._agents[agent_id] = self.sweeps[variables["sweep"]]
        return {"createAgent": {"agent": {"id": agent_id}}}

    def heartbeat(self, variables: dict) -> dict:
        if variables["id"] not in self._agents:
            raise RequestError(f"no agent {variables['id']}", 404)
        running = [run_id for run_id, alive in json.loads(variables.get("runState") or "{}").items() if alive]
        commands = self._commands(self._agents[variables["id"]], running)
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _commands(self, sweep: Sweep, running: list[str]) -> list[dict]:
        """Return the commands for an agent, which has one run at a time; `exit` would kill a run that it still has."""
        if running or sweep.state == "PAUSED":
            stopping = running if sweep.state == "CANCELED" else [name for name in running if name in self._stopping]
            return [{"type": "stop", "run_id": run_id} for run_id in stopping]
        arguments = sweep.next_arguments() if sweep.state == "RUNNING" else None
        if arguments is None:
            sweep.state = "FINISHED" if sweep.state == "RUNNING" else sweep.state
            return [{"type": "exit"}]
        run_id = secrets.token_hex(4)
        self.runs[run_id] = Run(run_id, sweep.entity, sweep.project, run_id, config=arguments, sweep=sweep.id)
        sweep.run_ids.append(run_id)
        args = {name: {"value": value} for name, value in arguments.items()}
        return [{"type": "run", "run_id": run_id, "program": sweep.config.get("program"), "args": args}]


OPERATIONS = {
    "Viewer": lambda *_: {"viewer": {"id": "VXNlcg==", "entity": ENTITY, "username": ENTITY, "teams": edges([])}},
    # No optional feature: the client then keeps to the plainest form of the protocol.
    "ServerFeaturesQuery": lambda *_: {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": lambda *_: {"entity": {"organization": None}},
    "ArtifactType": lambda *_: {"project": {"artifact": None}},
    "RunResumeStatus": WandbServer.resume_status,
    "UpsertBucket": WandbServer.upsert_bucket,
    "CreateRunFiles": WandbServer.create_run_files,
    "CreateArtifact": WandbServer.create_artifact,
    "CreateArtifactManifest": WandbServer.create_manifest,
    "CreateArtifactFiles": WandbServer.create_artifact_files,
    "CommitArtifact": WandbServer.commit_artifact,
    "UpsertSweep": WandbServer.upsert_sweep,
    "SweepWithRuns": WandbServer.sweep_with_runs,
    "CreateAgent": WandbServer.create_agent,
    "Heartbeat": WandbServer.heartbeat,
}


def edges(nodes: list) -> dict:
    return {"edges": [{"node": node} for node in nodes]}


def project_of(thing: Run | Sweep) -> dict:
    return {"id": thing.project, "name": thing.project, "entity": {"id": thing.entity, "name": thing.entity}}


def parsed_sweep(text: str) -> dict:
    """Parse a sweep's configuration. Raises RequestError if it cannot be scheduled, at the point where W&B does."""
    import yaml  # the command-line tool sends YAML for any kind of file, and depends on this package

    config = yaml.safe_load(text)
    if config.get("method") not in ("grid", "random", "bayes") or not config.get("parameters"):
        raise RequestError("a sweep needs parameters and a method: grid, random or bayes")
    for name, spec in config["parameters"].items():
        try:
            choices(spec) if config["method"] == "grid" else draw(spec, random.Random(0))
        except (ValueError, KeyError) as error:
            raise RequestError(f"parameter {name}: {error}") from error
    return config


class Handler(BaseHTTPRequestHandler):
    """Answer one request, without keep-alive (HTTP 1.0), so that no connection outlives the server's `stop`."""

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer = self.server.wandb.answer(self.command, unquote(self.path), body)
        encoded = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    do_GET = do_POST = do_PUT = respond  # noqa: N815 (the names are the base class's)

    def log_message(self, *_) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    """Print no error when a client is killed while it sends, which tests do on purpose."""

    wandb: WandbServer

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    parser = argparse.ArgumentParser(description="A W&B server for trials: runs go to it instead of to W&B.")
    parser.add_argument("--port", type=int, default=0, help="(default: a free one)")
    parser.add_argument("--folder", type=Path, help="where uploaded files are kept (default: a new temporary folder)")
    args = parser.parse_args()
    with WandbServer(args.folder or Path(tempfile.mkdtemp(prefix="wandb_server_")), args.port) as server:
        for name, value in server.environment.items():
            print(f"export {name}={value}", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
