"""A W&B server on loopback: what the real client and the real `wandb agent` need of one to run sweeps, no more.

It draws trials with W&B's own library, keeps what arrives, and can do what a server does to a sweep: stop a run,
go away for a while, come back.
"""

import base64
import gzip
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import sweeps
import yaml

ENTITY, PROJECT = "edge-team", "edge-project"


class WandbServer:
    """`sweeps` and `runs` hold what arrived; `change` and `stop_after` say what is to happen to the n-th run of a sweep."""

    def __init__(
        self,
        change: dict[int, dict] | None = None,
        stop_after: dict[int, int] | None = None,
        host: str = "127.0.0.1",  # the name of this machine's loopback for those who ask
    ):
        self.host = host
        self.change = change or {}  # n-th run -> parameters in place of what was drawn
        self.stop_after = stop_after or {}  # n-th run -> epochs seen, after which a stop command is sent
        self.on_run: Callable[[dict], None] = lambda run: None
        self.sweeps: dict[str, dict] = {}
        self.runs: dict[str, dict] = {}
        self.agents: dict[str, str] = {}
        self.keys: set[str] = set()
        self.files: dict[str, bytes] = {}  # of all runs, by name
        self.lock = threading.RLock()
        self.is_away, self.times_away = False, 0
        self.fault: str | None = (
            None  # what every request gets: `error 500`, `hang`, or `close` in the middle of the answer
        )
        self.closed = threading.Event()
        self.port = 0
        self._listen()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def _listen(self) -> None:
        self.http = _HTTP(("127.0.0.1", self.port), _Handler)
        self.http.wandb = self
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def go_away(self) -> None:
        """Refuse new connections and break the open ones."""
        self.is_away = True
        self.times_away += 1
        self.close()

    def come_back(self) -> None:
        self.is_away = False
        self._listen()

    def close(self) -> None:
        self.closed.set()
        self.http.shutdown()
        self.http.server_close()

    # GraphQL operations, by the name that the client gives them

    def viewer(self, _: dict) -> dict:
        person = {"id": "u", "entity": ENTITY, "username": "tester", "name": "tester", "email": "tester@localhost"}
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {
            "viewer": person
            | {"admin": False, "flags": "{}", "deletedAt": None, "apiKeys": {"edges": []}, "teams": teams}
        }

    def server_features_query(self, _: dict) -> dict:
        return {"serverInfo": {"features": []}}

    def upsert_sweep(self, asked: dict) -> dict:
        config = yaml.safe_load(asked["config"])
        name = f"sweep{len(self.sweeps) + 1}"
        project = {"id": "p", "name": asked["projectName"], "entity": {"id": "e", "name": asked["entityName"]}}
        self.sweeps[name] = {"config": config, "project": project, "runs": []}
        violations = sweeps.schema_violations_from_proposed_config(config)
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": violations}}

    def get_sweep(self, asked: dict) -> dict:
        return self._sweep(asked["name"])

    def sweep_with_runs(self, asked: dict) -> dict:
        return self._sweep(asked["sweep"])

    def _sweep(self, name: str) -> dict:
        if name not in self.sweeps:
            return {"project": {"sweep": None}}
        sweep = self.sweeps[name]
        answer = {
            "id": name,
            "name": name,
            "method": "random",
            "state": "RUNNING",
            "config": json.dumps(sweep["config"]),
        }
        empty = ["description", "createdAt", "heartbeatAt", "updatedAt", "bestLoss", "controller", "scheduler"]
        empty += ["displayName", "runCountExpected"]
        answer |= dict.fromkeys(empty) | {"earlyStopJobRunning": False, "runCount": 0, "runs": {"edges": []}}
        return {"project": {"sweep": answer}}

    def create_agent(self, asked: dict) -> dict:
        agent = f"agent{len(self.agents) + 1}"
        self.agents[agent] = asked["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def heartbeat(self, asked: dict) -> dict:
        sweep = self.sweeps[self.agents[asked["id"]]]
        running = json.loads(asked["runState"])
        if running:
            commands = [{"type": "stop", "run_id": name} for name in running if self._is_to_stop(name)]
        elif len(sweep["runs"]) < sweep["config"]["run_cap"]:
            commands = [self._next_run(sweep)]
        else:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": asked["id"]}, "commands": json.dumps(commands)}}

    def _next_run(self, sweep: dict) -> dict:
        n = len(sweep["runs"])
        sent = {name: drawn["value"] for name, drawn in sweeps.next_run(sweep["config"], []).config.items()}
        sent |= self.change.get(n, {})
        run = self._run(f"run{len(self.runs) + 1}")
        run |= {"n": n, "sent": sent}
        sweep["runs"].append(run["name"])
        self.on_run(run)
        args = {name: {"value": value} for name, value in sent.items()}
        return {"type": "run", "run_id": run["name"], "program": sweep["config"]["program"], "args": args}

    def _is_to_stop(self, name: str) -> bool:
        run = self.runs[name]
        return len(run["history"]) >= self.stop_after.get(run["n"], 10**9)

    def _run(self, name: str) -> dict:
        new = {"name": name, "config": {}, "history": [], "summary": {}, "exit": None, "sweep": None}
        new |= {"displayName": None, "groupName": None, "jobType": None, "tags": []}
        return self.runs.setdefault(name, new)

    def upsert_bucket(self, asked: dict) -> dict:
        run = self._run(asked["name"])
        run["config"] |= {name: item["value"] for name, item in json.loads(asked.get("config") or "{}").items()}
        run["sweep"] = asked.get("sweep") or run["sweep"]
        run |= {key: asked[key] for key in ("displayName", "groupName", "jobType", "tags") if asked.get(key)}
        entity = {"id": "e", "name": asked["entity"] or ENTITY}  # who names none gets that of the key
        run["project"] = {"id": "p", "name": asked["project"], "entity": entity}
        bucket = {"id": run["name"], "name": run["name"], "displayName": run["displayName"], "description": None}
        bucket |= {"config": "{}", "sweepName": run["sweep"], "project": run["project"], "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def run_resume_status(self, asked: dict) -> dict:
        run = self.runs.get(asked["name"])
        bucket = None
        if run and run.get("project"):
            bucket = {"id": run["name"], "name": run["name"], "summaryMetrics": json.dumps(run["summary"])}
            bucket |= {"displayName": run["name"], "logLineCount": 0, "historyLineCount": len(run["history"])}
            bucket |= {"eventsLineCount": 0, "eventsTail": "[]", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}
            bucket["historyTail"] = json.dumps([json.dumps(row) for row in run["history"][-1:]])
        return {"model": {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}}

    def create_run_files(self, asked: dict) -> dict:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def file_stream(self, name: str, body: dict) -> dict:
        run = self._run(name)
        for file, chunk in (body.get("files") or {}).items():
            if file == "wandb-history.jsonl":  # a chunk may arrive twice, when its first answer was lost
                run["history"][chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
            elif file == "wandb-summary.json":
                run["summary"] |= json.loads(chunk["content"][-1])
        if body.get("complete"):
            run["exit"] = body["exitcode"]
        return {"exitcode": None, "limits": {}}


class _HTTP(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that goes away is none
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server: WandbServer = self.server.wandb
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if server.is_away:
            self.close_connection = True
            return
        if server.fault:
            return self._fail(server)
        if self.headers.get("Content-Encoding") == "gzip":
            raw = gzip.decompress(raw)
        with server.lock:
            if self.path.rstrip("/") == "/graphql":
                scheme, _, credentials = self.headers.get("Authorization", "").partition(" ")
                server.keys.add(base64.b64decode(credentials).decode().removeprefix("api:") if credentials else scheme)
                self._answer(self._graphql(server, json.loads(raw)))
            elif found := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                self._answer(server.file_stream(found[1], json.loads(raw)))
            elif self.path.startswith("/upload/"):
                server.files[self.path.removeprefix("/upload/")] = raw
                self._answer({})
            else:
                self._answer({})

    def _fail(self, server: WandbServer) -> None:
        self.close_connection = True
        if server.fault == "hang":
            server.closed.wait(300)
        elif server.fault == "error 500":
            self.send_error(500)
        else:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"data": {')

    def _graphql(self, server: WandbServer, asked: dict) -> dict:
        operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
        method = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).lower()
        if not hasattr(server, method):
            return {"errors": [{"message": f"unknown operation {operation}"}]}
        return {"data": getattr(server, method)(asked.get("variables") or {})}

    def _answer(self, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_PATCH = do_POST


if __name__ == "__main__":  # to try the launchers by hand: export WANDB_BASE_URL=... WANDB_API_KEY=forty characters
    print(WandbServer().url, flush=True)
    time.sleep(3600)
