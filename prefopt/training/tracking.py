"""wandb, tensorboard and trackio, through accelerate: the same metrics, tables, pages and images in each of them."""

from __future__ import annotations

import html
import json
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.figures import readable
from prefopt.redaction import escaped, hidden, names_a_secret, printable
from prefopt.settings import RunConfig
from prefopt.storage import text_hash
from prefopt.training.callbacks import Callback, EvaluationEvent, StartEvent, StepEvent
from prefopt.training.launcher import print_rank_0
from prefopt.training.runtime import Runtime

_CONNECT_SECONDS = 5.0  # to reach wandb's server
_INIT_SECONDS = 30.0  # for its response


class Trackers(Callback):
    """The trackers that `track.to` names, for the run in one output folder; a resumed run continues in the same ones.

    Without `track.to` all methods do nothing; on other ranks than 0 they log nothing.

    Args: card: the file of the run card, which is logged too.
    """

    def __init__(self, runtime: Runtime, config: RunConfig, output: Path, card: Path | None = None) -> None:
        self.runtime, self.config, self.output, self.card = runtime, config, output, card
        self._secret = (config.generate.api_key_env, config.judge.api_key_env)

    def start(self) -> None:
        """Open them and log the settings, without secrets."""
        track, accelerator = self.config.track, self.runtime.accelerator
        if not track.to:
            return
        path = str(self.output.resolve())
        run_id = text_hash(path)[:16]  # the same when the run resumes, unique to it
        in_round = self.output.parent.name.startswith("round_")
        name = f"{self.output.parent.parent.name}-{self.output.parent.name}" if in_round else self.output.name
        settings = self._hidden(json.loads(json.dumps(self.config.to_dict(), default=str)))
        flat = {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in _dotted(settings).items()}
        kwargs: dict[str, Any] = {}
        if "wandb" in track.to:
            kwargs["wandb"] = {"name": name, "id": run_id, "resume": "allow", "dir": path, "config": settings}
            kwargs["wandb"] |= self._wandb_mode()
        if "trackio" in track.to:  # which identifies runs by name
            kwargs["trackio"] = {"name": f"{name}-{run_id[:6]}", "resume": "allow", "config": flat, "embed": False}
        accelerator.log_with.sort(key=lambda kind: str(kind) != "wandb")  # wandb first, because it may fail
        try:
            accelerator.init_trackers(track.project, init_kwargs=kwargs)
        except Exception as error:
            accelerator.trackers = []
            if kwargs.get("wandb", {}).get("mode") != "online" or not type(error).__module__.startswith("wandb"):
                raise
            import wandb

            wandb.teardown()  # its process still uses the run's id
            _print_offline(str(error).splitlines()[0] if str(error) else type(error).__name__)
            kwargs["wandb"]["mode"] = "offline"
            accelerator.init_trackers(track.project, init_kwargs=kwargs)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.store_init_configuration(flat)
        if self.card is not None and self.runtime.is_main and self.card.is_file():
            card = self._hidden(json.loads(self.card.read_text()))
            self.page("run_card", f"```json\n{json.dumps(card, indent=1)}\n```", 0)

    def _wandb_mode(self) -> dict[str, Any]:
        """wandb's mode and settings: offline if its server cannot be used, with the reason printed."""
        if not self.runtime.is_main:
            return {"mode": "offline"}
        import wandb

        # wandb would store the command line, which may hold secrets
        typed = self._hidden(sys.argv) != sys.argv or any(names_a_secret(word.partition("=")[0]) for word in sys.argv)
        settings = wandb.Settings(init_timeout=_INIT_SECONDS, quiet=True, x_disable_meta=typed)
        if self.config.track.wandb_mode == "offline":
            return {"mode": "offline", "settings": settings}
        reason = _no_server(wandb)
        if reason is not None:
            _print_offline(reason)
        return {"mode": "online" if reason is None else "offline", "settings": settings}

    def _hidden(self, value: Any) -> Any:
        return hidden(value, self._secret)

    # Hooks ------------------------------------------------------------------------------------------------------------

    def on_start(self, event: StartEvent) -> None:
        self.start()

    def on_step(self, event: StepEvent) -> None:
        self.log(_without_position(event.line), event.step)

    def on_evaluation(self, event: EvaluationEvent) -> None:
        for name, rows in event.tables.items():
            texts = [{key: value for key, value in row.items() if not key.endswith("_ids")} for row in rows]
            self.table(name, texts, event.step)
        self.log({f"eval/{name}": value for name, value in _without_position(event.line).items()}, event.step)

    # What is logged ---------------------------------------------------------------------------------------------------

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log numbers by name."""
        if self.runtime.accelerator.trackers and self.runtime.is_main:
            self.runtime.accelerator.log(dict(values), step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log a table of text and numbers; its columns are the keys of the first row."""
        if not rows:
            return
        columns = list(rows[0])
        data = [["" if row.get(column) is None else _cleaned(row[column]) for column in columns] for row in rows]
        for tracker in self._here():
            if tracker.name == "tensorboard":
                tracker.writer.add_text(name, _markdown(columns, data), global_step=step)
                tracker.writer.flush()
            elif tracker.name == "wandb":
                tracker.log_table(name, columns=columns, data=data, step=step)
            else:
                import trackio

                tracker.log({name: trackio.Table(columns=columns, data=data)}, step=step)

    def page(self, name: str, text: str, step: int) -> None:
        """Log a text in Markdown, such as the run card."""
        text = escaped(self._hidden(text), lines=True)
        for tracker in self._here():
            if tracker.name == "tensorboard":
                tracker.writer.add_text(name, text, global_step=step)
                tracker.writer.flush()
            elif tracker.name == "wandb":
                import wandb

                # with the step that is logged next: wandb's steps cannot decrease when a run resumes
                tracker.run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, commit=False)
            else:
                import trackio

                tracker.log({name: trackio.Markdown(text)}, step=step)

    def image(self, name: str, file: Path, step: int) -> None:
        """Log a PNG file, if it exists."""
        if not file.is_file():
            return
        for tracker in self._here():
            if tracker.name == "tensorboard":
                import numpy
                from PIL import Image

                with Image.open(file) as opened:
                    pixels = numpy.asarray(opened.convert("RGB"))
                tracker.writer.add_image(name, pixels, global_step=step, dataformats="HWC")
                tracker.writer.flush()
            elif tracker.name == "wandb":
                import wandb

                tracker.run.log({name: wandb.Image(str(file))}, commit=False)
            else:
                import trackio

                tracker.log({name: trackio.Image(str(file))}, step=step)

    def finish(self, failed: bool = False) -> None:
        """Close them. `Accelerator.end_training` would also end the process group, which a next round needs."""
        for tracker in self.runtime.accelerator.trackers:
            if failed and tracker.name == "wandb" and self.runtime.is_main:
                tracker.run.finish(exit_code=1)
            else:
                tracker.finish()
        self.runtime.accelerator.trackers = []

    def _here(self) -> list[Any]:
        return list(self.runtime.accelerator.trackers) if self.runtime.is_main else []


def _no_server(wandb: Any) -> str | None:
    """Why wandb's server cannot be used, as far as that can be found out without prompting; None if it can."""
    import netrc
    import os

    settings = wandb.setup().settings
    url = urllib.parse.urlsplit(settings.base_url)
    if not (settings.api_key or settings.identity_token_file):
        files = [Path(os.environ.get("NETRC", "~/.netrc")).expanduser(), Path("~/_netrc").expanduser()]
        try:
            found = [netrc.netrc(str(file)).authenticators(url.hostname or "") for file in files if file.is_file()]
        except (OSError, netrc.NetrcParseError):
            found = []
        if not any(found):
            return "no API key (wandb login, or WANDB_API_KEY)"
    if urllib.request.getproxies().get(url.scheme) is not None:
        return None  # the proxy connects
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        with socket.create_connection((url.hostname or "", port), timeout=_CONNECT_SECONDS):
            return None
    except OSError as error:
        return f"{url.hostname} cannot be reached ({error.strerror or error})"


def _print_offline(reason: str) -> None:
    print_rank_0(f"track.to wandb: offline, because {reason}; `wandb sync` uploads the run later")


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping, under the names of their flags."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _without_position(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("step", "split")}


def _markdown(columns: Sequence[str], data: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, each cell on one line."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_cell(cell) for cell in cells) + " |"

    return "\n".join([line(columns), "|" + " --- |" * len(columns), *map(line, data)])


def _cleaned(value: Any) -> Any:
    """A table's value with control characters escaped."""
    return printable(value, lines=True, joiners=True) if isinstance(value, str) else value


def _cell(value: Any) -> str:
    text = readable(value) if isinstance(value, float) else str(value)
    line = html.escape(printable(" ⏎ ".join(text.split("\n")), joiners=True), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line) or " "
