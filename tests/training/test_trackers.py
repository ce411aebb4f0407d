"""Trackers see what metrics.jsonl has, under the same names, and no key."""

import dataclasses
import http.server
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prefopt.cli import train
from prefopt.redaction import printable
from prefopt.settings import parse
from prefopt.training.metrics import read_lines
from prefopt.training.runtime import Runtime
from prefopt.training.tracking import Trackers

ROOT = Path(__file__).resolve().parents[2]
KEY, LOGIN, TOKEN = "sk-of-the-server-4711", "anna:open-sesame", "hf_of_the_hub_0815"
TRACKERS = [name for name in ("wandb", "tensorboard", "trackio") if importlib.util.find_spec(name)]


def environment(task, folder, **more):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PREFOPT_CACHE": str(task.folder / "cache"), "HF_HUB_OFFLINE": "1"}
    here = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env |= {"PYTHONPATH": here, "TRACKIO_DIR": str(folder / "trackio"), "NETRC": str(folder / "netrc")}
    for name in [name for name in env if name.startswith("WANDB_")]:
        del env[name]
    return env | {"WANDB_CONFIG_DIR": str(folder / "wandb"), "HOME": str(folder)} | more


def command_line(flags, env, **more):
    words = [sys.executable, ROOT / "scripts/train.py", *flags]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, **more)


@pytest.fixture(scope="module")
def run(command, task, tmp_path_factory):
    """The output of a short run that logged to all trackers that are installed, with keys around."""
    folder = tmp_path_factory.mktemp("tracked")
    settings = {"eval__generate": 2, "generate__max_tokens": 8, "track__to": ",".join(TRACKERS)}
    flags = command("dpo", folder / "run", train__max_steps=4, eval__every=4, **settings)
    flags += ["--model.revision", f"https://{LOGIN}@host/x?api_key={KEY}"]  # of a model on disk it means nothing
    env = environment(task, folder, OPENAI_API_KEY=KEY, HF_TOKEN=TOKEN)
    done = command_line(flags, env)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def board(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (run / "prefopt").glob("events.out.tfevents*")  # the folder is the project's name
    board = EventAccumulator(str(events))
    board.Reload()
    return board


def numbers(run):
    """What metrics.jsonl has: (name in trackers, step) -> value."""
    return {
        (("eval/" if line["split"] == "eval" else "") + name, line["step"]): value
        for line in read_lines(run / "metrics.jsonl")
        for name, value in line.items()
        if name not in ("step", "split")
    }


def test_tensorboard_when_named_then_it_has_every_number_of_the_metrics_file(run, board):
    logged = {(tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    assert logged.keys() == numbers(run).keys()
    for key, value in numbers(run).items():
        assert logged[key] == pytest.approx(value, rel=1e-6, abs=1e-30), key
    assert ("eval/samples/kl", 4) in logged


def test_tensorboard_when_named_then_it_has_samples_and_run_card_as_texts(run, board):
    texts = {
        tag: {event.step: event.tensor_proto.string_val[0].decode() for event in board.Tensors(tag)}
        for tag in board.Tags()["tensors"]
    }
    table = texts["samples/text_summary"]
    assert sorted(table) == [0, 4]
    lines = table[4].splitlines()
    assert lines[0] == "| prompt | reference | policy | tokens | ended | kl |"
    assert len(lines) == 4
    assert lines[2].startswith("| Human: name colour")
    assert json.loads((run / "run_card.json").read_text())["data"]["train"] in texts["run_card/text_summary"][0]


def shown(value):
    """A value of the table: text that steers a terminal is escaped on its way out."""
    return printable(value, lines=True, joiners=True) if isinstance(value, str) else value


def test_wandb_when_named_then_it_writes_offline_into_the_output_folder(run):
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    (table,) = (offline / "files/media/table").glob("samples_4_*.json")
    found = json.loads(table.read_text())
    assert found["columns"] == ["prompt", "reference", "policy", "tokens", "ended", "kl"]
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [dict(zip(found["columns"], row, strict=True)) for row in found["data"]] == [
        {name: shown(row[name]) for name in found["columns"]} for row in rows if row["step"] == 4
    ]


@pytest.mark.skipif("trackio" not in TRACKERS, reason="trackio is not installed")
def test_trackio_when_named_then_its_database_has_every_number_and_the_samples(run):
    with sqlite3.connect(run.parent / "trackio/prefopt.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    database.close()
    found = {(name, step): value for step, text in rows for name, value in json.loads(text).items()}
    plain = {key: value for key, value in found.items() if not isinstance(value, dict)}
    assert plain == numbers(run)
    table = found["samples", 4]["_value"]
    assert [row["policy"] for row in table] == [
        shown(row["policy"])
        for row in map(json.loads, (run / "samples.jsonl").read_text().splitlines())
        if row["step"] == 4
    ]
    assert "fingerprint" in found["run_card", 0]["_value"] or "sha256" in found["run_card", 0]["_value"]


def test_no_tracker_has_a_key_a_token_or_a_login(run):
    places = [run / "prefopt", run / "wandb", run.parent / "trackio"]
    files = [path for place in places if place.exists() for path in place.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        for secret in (KEY, TOKEN, "open-sesame", LOGIN):
            assert secret.encode() not in content, path
    hparams = next(path for path in files if path.name == "hparams.yml").read_text()
    assert "model.revision: https://***@host/x?api_key=***" in hparams
    assert "generate.api_key_env: OPENAI_API_KEY" in hparams, "the variable's name is no secret"


def test_value_of_a_setting_with_a_secret_name_is_in_no_tracker(tmp_path, monkeypatch):
    from accelerate import Accelerator

    secret = "what-only-the-engine-may-know"
    config = parse(["--method", "dpo", "--track.to", "wandb,tensorboard"])
    config = dataclasses.replace(config, generate=dataclasses.replace(config.generate, args={"hf_token": secret}))
    (tmp_path / "run_card.json").write_text(json.dumps({"config": config.to_dict()}))
    monkeypatch.setattr(sys, "argv", ["train.py", "--generate.args.hf_token", secret])
    runtime = Runtime(Accelerator(cpu=True, log_with=["wandb", "tensorboard"], project_dir=str(tmp_path)))
    trackers = Trackers(runtime, config, tmp_path, tmp_path / "run_card.json")
    trackers.start()
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    files = [path for name in ("wandb", "prefopt") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_wandb_online_without_a_key_then_goes_on_offline_and_says_so_once(command, task, tmp_path):
    flags = command("dpo", tmp_path / "run", train__max_steps=1, track__to="wandb", track__wandb_mode="online")
    done = command_line(flags, environment(task, tmp_path))
    assert done.returncode == 0, done.stderr
    line = "track.to wandb: offline, because no API key (wandb login, or WANDB_API_KEY); `wandb sync` uploads the run"
    assert done.stdout.count(line) == 1
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))) == 1


class _Refuses(http.server.BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_GET(self):
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("server", ["refuses the key", "is not there"])
def test_wandb_online_without_a_server_then_goes_on_offline_and_says_so_once(server, command, task, tmp_path):
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    if server == "refuses the key":
        threading.Thread(target=listener.serve_forever, daemon=True).start()
    else:
        listener.server_close()
    try:
        flags = command("dpo", tmp_path / "run", train__max_steps=1, track__to="wandb", track__wandb_mode="online")
        url = f"http://127.0.0.1:{listener.server_port}"
        env = environment(task, tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY="0123456789" * 4)
        done = command_line(flags, {k: v for k, v in env.items() if not k.lower().endswith("_proxy")})
    finally:
        if server == "refuses the key":
            listener.shutdown()
            listener.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("track.to wandb: offline, because ") == 1
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))) == 1


def test_tracker_when_it_is_not_installed_then_one_line_says_so(command, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    assert train(command("dpo", tmp_path / "o", track__to="trackio")) == 2
    said = capsys.readouterr().err
    assert said == "error: track.to: 'trackio' is not installed; pip install 'trackio', or leave it out\n"
    assert not (tmp_path / "o").exists()
