"""The `infer` command: prompts in, answers out, with a cache of all that was computed between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from prefopt import generation, judges, storage
from prefopt.inference import trace_report
from prefopt.inference.output_place import Place
from prefopt.inference.prompt_reader import check_file
from prefopt.inference.prompt_templates import read_templates
from prefopt.inference.terminal import print_answered, print_best, progress_bar, typed_lines, warn
from prefopt.settings.infer import InferConfig
from prefopt.storage import text_hash
from prefopt.testbed.cache import cache_root
from prefopt.training import output_folder, signals, versions, weight_files
from prefopt.training import runtime as rt
from prefopt.training.launcher import print_rank_0

if TYPE_CHECKING:
    from prefopt.data.encoder import Encoder
    from prefopt.generation.base import Engine, Sampling
    from prefopt.inference.answer_cache import AnswerCache
    from prefopt.inference.answers import Answered
    from prefopt.inference.policy import UnloadedPolicy
    from prefopt.inference.prompt_reader import Reader, Refused
    from prefopt.inference.test_time_po import Progress, TestTimeSettings
    from prefopt.inference.trace import Trace
    from prefopt.judges.base import Judge
    from prefopt.types import Prompt

_FILES = ("traces.jsonl", "traces.html", "pairs.jsonl", "answers.jsonl")  # beside the summary of a judged run


def run(config: InferConfig) -> int:
    """Answer the prompts of these settings. Returns the exit status.

    Raises: PrefoptError, of one line.
    """
    generation.check(config.generate)
    if config.judged:
        judges.check(config.judge)
    templates = read_templates(config.templates)
    if config.model.path is not None:
        weight_files.check_path("model", config.model.path)
    if config.prompts is not None:
        check_file(config.prompts)
    stop = signals.Stop()
    if not config.typed:
        stop.install(1)
    with ExitStack() as stack:
        place = None
        if config.output:
            place = Place.of(config.output)
            place.refuse_what_is_not_ours()
            output_folder.prepare_output(place.folder)
            lock = output_folder.OutputLock(place.folder)
            lock.acquire()
            stack.callback(lock.release)
        return _InferRun(config, templates, place, stop, stack).run()


class _InferRun:
    """One run of the command, put together from its settings."""

    def __init__(
        self, config: InferConfig, templates: Any, place: Place | None, stop: signals.Stop, stack: ExitStack
    ) -> None:
        self.config, self.templates, self.place, self.stop, self.stack = config, templates, place, stop, stack

    def run(self) -> int:
        from prefopt.data.templates import Rendering
        from prefopt.inference import policy
        from prefopt.inference.prompt_reader import split

        config = self.config
        self.world = self._world()
        path = str(config.model.path or self.world.base_model_path)
        self.policy: UnloadedPolicy = policy.find(path, config)
        if self.policy.note:
            print_rank_0(self.policy.note)
        if self.policy.thought.template is not None:
            print_rank_0(
                f"{path} thinks before it answers; its thoughts are {'shown' if config.thought == 'show' else 'hidden'}"
            )
        self.rendering = Rendering.of(config, self.policy.tokenizer, None if self.place is None else self.place.day())
        for line in self.rendering.lines(self.policy.tokenizer):
            print_rank_0(line)
        if config.typed:
            return self._typed(self._reader(None))
        refused: Sequence[Refused] = ()
        if self.world is not None:
            prompts = self.world.prompts(config.limit or 64, config.seed)
        else:
            reader = self._reader(self._positions())
            found = iter([reader.typed(str(config.prompt))]) if config.prompts is None else reader.file(config.prompts)
            prompts, refused = split(found, config.limit)
        for one in refused:
            warn(f"warning: {one.message}")
        judges.check_prompts(config.judge, (prompt.prompt for prompt in prompts))
        if self.place is not None:
            self.place.hold(self._card(prompts, refused))
        self.stop.exit_at_once()
        if config.judged:
            return self._judged(prompts, refused)
        return self._answered(prompts, refused)

    # One answer to each -----------------------------------------------------------------------------------------------

    def _answered(self, prompts: Sequence[Prompt], refused: Sequence[Refused]) -> int:
        from prefopt.inference.answer_cache import write_text

        config, shows = self.config, self.config.thought == "show"
        with progress_bar(len(prompts), "prompt", shown=self.place is not None) as progress:
            answered = self._answer_all(self._engine(), prompts, progress)
        if self.place is None:
            for number, one in enumerate(answered):
                if number:
                    print()
                print_answered(one, shows, name=len(answered) > 1)
        else:
            rows = [one.to_dict(thoughts=shows) for one in answered] + [_refused(one) for one in refused]
            write_text(self.place.answers, trace_report.jsonl(rows))
        gave_up = [one for one in answered if one.answer is None]
        for one in gave_up:
            warn(f"warning: {one.prompt.where}: gave up: {one.gave_up}")
        if self.place is not None:
            again = sum(one.tries > 1 and one.answer is not None for one in answered)
            print_rank_0(
                f"{self.place.answers}: {len(answered) - len(gave_up):,} answers, {again:,} of them sampled again, "
                f"{len(gave_up):,} given up, {len(refused):,} prompts refused"
            )
        return 1 if config.prompt is not None and gave_up else 0

    def _answer_all(self, engine: Engine, prompts: Sequence[Prompt], progress: Progress) -> list[Answered]:
        from prefopt.inference.answers import answer_all

        return answer_all(
            prompts,
            engine,
            thought=self.policy.thought,
            sampling=self._sampling(),
            retries=self.config.retries,
            seed=self.config.seed,
            progress=progress,
        )

    def _typed(self, reader: Reader) -> int:
        """Prompts from the terminal, one per line, until it ends."""
        engine = self._engine()
        reader.context = engine.context
        judge = self._judge(engine) if self.config.judged else None
        try:
            self._answer_typed(reader, engine, judge)
        except KeyboardInterrupt:
            print()
        return 0

    def _answer_typed(self, reader: Reader, engine: Engine, judge: Judge | None) -> None:
        from prefopt.types import Prompt

        for line in typed_lines():
            prompt = reader.typed(line, "prompt")
            if not isinstance(prompt, Prompt):
                warn(f"refused: {prompt.message}")
                continue
            if judge is None:
                (one,) = self._answer_all(engine, [prompt], lambda phase, samples: None)
                print_answered(one, self.config.thought == "show")
            else:
                (trace,) = self._optimize_all(engine, judge, [prompt], lambda phase, samples: None)
                print_best(trace, self.config.thought == "show")

    # Samples that a judge scores --------------------------------------------------------------------------------------

    def _judged(self, prompts: Sequence[Prompt], refused: Sequence[Refused]) -> int:
        config, place = self.config, self.place
        assert place is not None
        assert config.n is not None
        assert config.depth is not None
        summary = self._finished()
        if summary is None:
            engine = self._engine()
            judge = self._judge(engine)
            samples = len(prompts) * (config.n + config.depth * (2 + config.n))
            with progress_bar(samples, "sample") as progress:
                traces = self._optimize_all(engine, judge, prompts, progress)
            summary = self._write(traces, refused, engine, judge)
            if config.prompt is not None:
                print_best(traces[0], config.thought == "show")
                print()
        print_rank_0(trace_report.table(summary["depths"], summary["prompts"]))
        for line in trace_report.remarks(summary["depths"], summary["prompts"]):
            print_rank_0(line)
        dropped = "".join(f", {number:,} {reason}" for reason, number in summary["no_pair"].items())
        print_rank_0(
            f"\n{place.folder}: traces.html, traces.jsonl, answers.jsonl, summary.json; "
            f"pairs.jsonl: {summary['pairs']:,} pairs to train on{dropped}"
        )
        return 0

    def _finished(self) -> dict[str, Any] | None:
        """The summary of a finished run that shows thoughts as this one does."""
        assert self.place is not None
        try:
            summary = storage.read_sealed(self.place.folder / "summary.json")
        except storage.Damaged:  # it is made again from the cached answers and scores
            return None
        files = {} if summary is None else summary.get("files", {})
        whole = all(storage.is_there(self.place.folder / name) for name in files)
        return summary if summary is not None and whole and summary.get("thought") == self.config.thought else None

    def _optimize_all(self, engine: Engine, judge: Judge, prompts: Sequence[Prompt], progress: Progress) -> list[Trace]:
        from prefopt.inference.test_time_po import TestTimeSettings, optimize_all

        config = self.config
        how: TestTimeSettings = TestTimeSettings.of(
            config.strategy,
            n=config.n,
            depth=config.depth,
            sampling=self._sampling(),
            critique_tokens=config.critique_tokens,
            quoted_tokens=config.quoted_tokens,
            seed=config.seed,
            thought=self.policy.thought,
            templates=self.templates,
            rendering=self.rendering,
        )
        return optimize_all(prompts, engine, judge, self.policy.tokenizer, how, progress=progress)

    def _write(
        self, traces: Sequence[Trace], refused: Sequence[Refused], engine: Engine, judge: Judge
    ) -> dict[str, Any]:
        """All files; the summary last, since it lists the others."""
        from prefopt.inference.answer_cache import write_text, writing

        config, place = self.config, self.place
        assert place is not None
        shows = config.thought == "show"
        depths = [row.to_dict(self.policy.parameters) for row in trace_report.by_depth(traces)]
        pairs, none = trace_report.pairs(traces)
        problems: dict[str, int] = {}
        for trace in traces:
            for step in trace.steps:
                for name, number in step.problems.items():
                    problems[name] = problems.get(name, 0) + number
        summary = {
            "strategy": config.strategy,
            "n": config.n,
            "depth": config.depth,
            "prompts": len(traces),
            "refused": len(refused),
            "depths": depths,
            "pairs": len(pairs),
            "no_pair": none,
            "problems": problems,
            "parameters": self.policy.parameters,
            "thought": config.thought,
            "engine": engine.describe(),
            "judge": judge.describe(),
        }
        title = f"{config.strategy}, n {config.n}, depth {config.depth}: {len(traces)} prompts"
        answers = [_best_row(trace, shows) for trace in traces] + [_refused(one) for one in refused]
        write_text(place.folder / "traces.jsonl", trace_report.jsonl(trace.to_dict(thoughts=shows) for trace in traces))
        write_text(place.folder / "traces.html", trace_report.page(traces, depths, title, thoughts=shows))
        write_text(place.folder / "pairs.jsonl", trace_report.jsonl(pairs))
        write_text(place.answers, trace_report.jsonl(answers))
        with writing(place.folder / "summary.json"):
            storage.write_sealed(place.folder / "summary.json", summary | {"files": [*_FILES]})
        return summary

    # What a run is made of --------------------------------------------------------------------------------------------

    def _world(self) -> Any:
        if not self.config.on_testbed:
            return None
        from prefopt.testbed import build_world

        test = self.config.testbed
        if self.config.model.path is None:
            print_rank_0(
                f"no model is named (--model DIR): the base policy of the testbed's world '{test.world}' answers the "
                "world's prompts"
            )
        return build_world(test.world, seed=test.seed, cache_dir=cache_root())

    def _reader(self, context: int | None) -> Reader:
        from prefopt.inference.prompt_reader import Reader

        policy = self.policy
        return Reader(policy.tokenizer, policy.thought, context, self.config.as_chat, self.rendering)

    def _encoder(self) -> Encoder:
        from prefopt.data.encoder import Encoder

        return Encoder(self.policy.tokenizer, 2**31, rendering=self.rendering)

    def _positions(self) -> int | None:
        from prefopt.generation.ends import positions_of

        return positions_of(self.policy.weights, self.config.model)

    def _sampling(self) -> Sampling:
        from prefopt.generation.base import Sampling

        return Sampling.of(self.config.generate, stop=self.policy.stop, logprobs=False)

    def _engine(self) -> Engine:
        from prefopt.inference.answer_cache import CachedEngine

        rt.set_threads(self.config.threads, self.policy.parameters or 10**9)
        engine = self.policy.open(self.config)
        self.stack.callback(engine.close)
        cache = self._cache("answers")
        if cache is None:
            return engine
        how = self.config.generate
        identity = {"weights": self.policy.identity, "engine": how.engine, "dtype": self.config.model.dtype}
        return CachedEngine(engine, cache, identity | {"served_model": how.served_model})

    def _judge(self, engine: Engine) -> Judge:
        from prefopt.inference.answer_cache import CachedJudge
        from prefopt.inference.policy import device_here

        judge = judges.make(
            self.config.judge,
            device=device_here(),
            policy=lambda: (engine, self._encoder()),
            world=None if self.world is None else self.world.judge(),
            cache=None if self.place is None else self.place.folder / "verdicts",
        )
        self.stack.callback(judge.close)
        cache = self._cache("scores")
        return judge if cache is None else CachedJudge(judge, cache, self._judge_identity())

    def _judge_identity(self) -> dict[str, Any]:
        config = self.config
        free = ("url", "api_key_env", "concurrency", "retries", "timeout", "batch")
        named = {key: value for key, value in config.to_dict()["judge"].items() if key not in free}
        if not named["args"]:
            del named["args"]  # as in files of older versions
        if config.on_testbed:
            named["testbed"] = config.to_dict()["testbed"]
        return named | {"content": judges.identity(config.judge) if config.judged else None}

    def _cache(self, name: str) -> AnswerCache | None:
        from prefopt.inference.answer_cache import AnswerCache

        if self.place is None:
            return None
        cache = AnswerCache(self.place.folder / name)
        cache.sweep()
        return cache

    def _card(self, prompts: Sequence[Prompt], refused: Sequence[Refused]) -> dict[str, Any]:
        asked = [[prompt.key, list(prompt.ids)] for prompt in prompts] + [one.message for one in refused]
        return {
            "config": self.config.to_dict(),
            "model": self.policy.identity,
            "template_date": None if self.rendering.date is None else self.rendering.date.isoformat(),
            "prompts": text_hash(json.dumps(asked))[:16],
            "judge": json.dumps(self._judge_identity(), sort_keys=True) if self.config.judged else None,
            "templates": self.templates.digest() if self.config.judged else None,
            "versions": versions.versions(),
        }


def _best_row(trace: Trace, shows: bool) -> dict[str, Any]:
    best = trace.best
    row: dict[str, Any] = {"key": trace.prompt.key, "where": trace.prompt.where, "prompt": trace.prompt.prompt}
    if best is None:
        reasons = [step.skipped for step in trace.steps if step.skipped] or ["no response with a score"]
        return row | {"response": None, "reason": reasons[0]}
    row |= {"response": best.text, "score": trace.score(best)}
    return row | ({"thought": best.thought} if shows else {})


def _refused(one: Refused) -> dict[str, Any]:
    return {"where": one.where, "prompt": one.prompt, "response": None, "reason": one.message}
