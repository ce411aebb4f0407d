"""The command: what it prints and writes, what it refuses, and that no thought gets out."""

import builtins
import contextlib
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from prefopt import cli
from prefopt.data.rows import RowReader
from prefopt.errors import ConfigError
from prefopt.generation.base import Sampling
from prefopt.inference import policy
from prefopt.inference.prompt_reader import Reader, Refused
from prefopt.inference.test_time_po import seed_of
from prefopt.settings import GenerateConfig
from prefopt.settings.infer import InferConfig
from prefopt.thoughts import ThoughtFormat
from prefopt.training import export
from tests.helpers import tiny_llama
from tests.inference.server import ScriptedServer
from tests.inference.test_restart import read
from tests.inference.test_test_time_po import rising

THOUGHT = ThoughtFormat("Think, then write <R>. {prompt}", response_marker="<R>", thought_marker="THINK:")


@pytest.fixture(scope="module")
def thinker(place, tmp_path_factory):
    """A folder whose generation config says that its model thinks."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(place / "model", folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"thought": THOUGHT.to_dict()}))
    return folder


def thinks(text, number, seed):
    """Two in three completions hold no response, and prompts with a 3 in them never get one."""
    if seed % 3 or "3" in text:
        return f"THINK: secret {seed} and no end of it"
    return f"THINK: secret {seed} <R> an open answer "


@pytest.fixture(scope="module")
def thinking(thinker, tokenizer):
    with ScriptedServer(tokenizer, thinks, name=str(thinker)) as server:
        yield server


def argv(**flags):
    return [word for name, value in flags.items() for word in (f"--{name.replace('__', '.')}", str(value))]


def test_threads_are_the_settings(place, capsys):
    before = torch.get_num_threads()
    try:
        assert cli.infer(argv(model=place / "model", prompt="x", threads=2, generate__max_tokens=1)) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def asking(server, **flags):
    return argv(generate__engine="openai", generate__url=server.url, **{"generate__retries": 0, **flags})


@pytest.fixture
def infer(server, tmp_path):
    """Runs the command in a process of its own; whatever happens, it shows no traceback."""

    def infer(flags, status=0):
        ended = server.train(flags, command="infer", cwd=tmp_path)
        assert "Traceback" not in ended.err
        assert ended.status == status, ended.out + ended.err
        return ended

    return infer


def refusal(infer, **flags):
    """The one line that a command ends with."""
    ended = infer(argv(**flags), status=2)
    last = ended.err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


# Thoughts stay inside -------------------------------------------------------------------------------------------------


def test_only_responses_are_written_and_what_has_none_is_sampled_again_within_a_bound(
    infer, thinking, thinker, place, tmp_path
):
    thinking.requests.clear()
    flags = asking(thinking, model=thinker, prompts=place / "prompts.jsonl", output="answers.jsonl", retries=9)
    ended = infer(flags)
    rows = read(tmp_path / "answers.jsonl")
    assert [row["prompt"] for row in rows] == [f"say {i}" for i in range(6)]
    for row in rows:
        if row["prompt"] == "say 3":
            assert (row["response"], row["tries"]) == (None, 10)
            assert row["reason"] == "no response marker in each of 10 completions"
        else:
            seeds = [seed_of(0, row["key"], "answer", number, 1) for number in range(row["tries"])]
            assert row["response"] == "an open answer"
            assert [seed % 3 == 0 for seed in seeds] == [False] * (len(seeds) - 1) + [True]
    assert "secret" not in (tmp_path / "answers.jsonl").read_text() + ended.out + ended.err
    assert "prompts.jsonl:4: gave up: no response marker in each of 10 completions" in ended.err
    assert "thinks before it answers; its thoughts are hidden" in ended.out
    assert "5 answers, " in ended.out
    assert "1 given up, 0 prompts refused" in ended.out
    asked = thinking.tokenizer.decode(thinking.requests[-1][1]["prompt"], skip_special_tokens=True)
    assert asked == "Think, then write <R>. say 3"


def test_thoughts_are_shown_where_they_are_asked_for(infer, thinking, thinker, place, tmp_path):
    flags = asking(thinking, model=thinker, prompts=place / "prompts.jsonl", output="out", retries=9, thought="show")
    infer(flags)
    rows = [row for row in read(tmp_path / "out" / "answers.jsonl") if row["response"]]
    assert all(row["thought"].startswith("secret ") for row in rows)


def test_one_prompt_prints_its_response_alone(infer, thinking, thinker):
    hidden = infer(asking(thinking, model=thinker, prompt="say 1", retries=20))
    assert hidden.out.splitlines()[1:] == ["an open answer"]
    shown = infer(asking(thinking, model=thinker, prompt="say 1", retries=20, thought="show"))
    assert shown.out.splitlines()[1] == "[thought]"
    assert shown.out.splitlines()[2].startswith("secret ")
    assert shown.out.splitlines()[3:] == ["[response]", "an open answer"]
    none = infer(asking(thinking, model=thinker, prompt="say 3", retries=1), status=1)
    assert none.out.splitlines()[1:] == ["gave up: no response marker in each of 2 completions"]
    assert "secret" not in none.out + none.err


def test_a_prompt_that_holds_a_marker_is_refused_by_itself(infer, thinking, thinker, tmp_path):
    (tmp_path / "p.txt").write_text("say 1\nwhat does <R> mean?\n\nTHINK: hard\nsay 2\n")
    ended = infer(asking(thinking, model=thinker, prompts="p.txt", output="a.jsonl", retries=20))
    lines = [line for line in ended.err.replace("\r", "\n").splitlines() if line.startswith("warning")]
    assert lines == [
        "warning: p.txt:2: 'prompt': contains the marker '<R>', expected one without it (leave it out)",
        "warning: p.txt:4: 'prompt': contains the marker 'THINK:', expected one without it (leave it out)",
    ]
    rows = read(tmp_path / "a.jsonl")
    assert [row["response"] for row in rows] == ["an open answer"] * 2 + [None] * 2
    assert rows[2]["reason"] == lines[0].removeprefix("warning: ")


def test_samples_of_a_model_that_thinks_are_judged_by_their_responses_alone(infer, thinking, thinker, place, tmp_path):
    (tmp_path / "spy.py").write_text(
        "def see(prompt, response):\n    open('seen.txt', 'a').write(f'{prompt}|{response}\\n')\n    return 1.0\n"
    )
    flags = argv(strategy="best_of_n", n=8, judge__kind="function", judge__path="spy:see", output="out")
    infer([*asking(thinking, model=thinker, prompts=place / "prompts.jsonl"), *flags])
    assert {line.partition("|")[2] for line in (tmp_path / "seen.txt").read_text().splitlines()} == {"an open answer"}
    for name in ("traces.jsonl", "traces.html", "answers.jsonl", "pairs.jsonl", "summary.json"):
        assert "secret" not in (tmp_path / "out" / name).read_text(), name
    infer([*asking(thinking, model=thinker, prompts=place / "prompts.jsonl"), *flags, "--thought", "show"])
    assert "secret" in (tmp_path / "out" / "traces.html").read_text()


# Prompts from a terminal ----------------------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch, capsys):
    """Runs the command with lines that are typed, in this process; what it prints."""

    def typed(lines, flags):
        left = iter(lines)

        def read_line(shown):
            with contextlib.suppress(StopIteration):
                return next(left)
            raise EOFError

        monkeypatch.setattr(builtins, "input", read_line)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
        assert cli.infer(flags) == 0
        return capsys.readouterr()

    return typed


def test_typed_prompts_are_answered_one_after_the_other(typed, thinking, thinker):
    said = typed(["say 1", "", "say <R>", "say 2"], asking(thinking, model=thinker, retries=20))
    assert said.out.splitlines()[1:] == ["an open answer"] * 2
    assert said.err.splitlines() == [
        "refused: prompt: 'prompt': contains the marker '<R>', expected one without it (leave it out)"
    ]


def test_typed_prompts_can_be_improved_too(typed, place, tokenizer):
    with ScriptedServer(tokenizer, rising, name=str(place / "model")) as server:
        flags = argv(strategy="test_time_po", n=2, depth=1, judge__kind="length", generate__max_tokens=300)
        said = typed(["say 1"], [*asking(server, model=place / "model"), *flags])
    assert said.out.splitlines() == ["a response worth 0"]  # the shortest, the first of equals


# The policy's own words -----------------------------------------------------------------------------------------------


def find(path):
    return policy.find(str(path), InferConfig(generate=GenerateConfig(stop=("own",))))


def test_stop_strings_and_terminators_of_the_generation_config_end_an_answer(place, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    torch.set_num_threads(1)
    found = find(folder)
    engine = found.open(InferConfig())
    prompt = [0, 5, 6, 7]
    (whole,) = engine.generate([prompt], Sampling(n=1, max_tokens=30), [3])[0]
    middle = whole.text[len(whole.text) // 2]
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"stop_strings": [middle]}))
    found = find(folder)
    assert found.stop == ("own", middle)
    (cut,) = found.open(InferConfig()).generate([prompt], Sampling(n=1, max_tokens=30, stop=found.stop), [3])[0]
    assert cut.text == whole.text.partition(middle)[0]
    token = whole.token_ids[4]
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, token]}))
    (cut,) = find(folder).open(InferConfig()).generate([prompt], Sampling(n=1, max_tokens=30), [3])[0]
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_what_training_exports_is_what_is_read_here(place, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    export.write_generation_config(folder, find(folder).tokenizer, {"thought": THOUGHT.to_dict()}, ("END",))
    found = find(folder)
    assert (found.thought, found.stop) == (THOUGHT, ("own", "END"))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_says_for_itself_how_it_thinks_and_ends(place, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "model")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    own = {"thought": THOUGHT.to_dict(), "eos_token_id": [1, 3], "stop_strings": ["END"]}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    found = find(tmp_path)
    assert found.thought == THOUGHT
    assert found.stop == ("own", "END", find(place / "model").tokenizer.convert_ids_to_tokens(3))
    assert found.parameters > find(place / "model").parameters
    base_weights = find(place / "model").identity.partition("-")[0]  # its generation config is not the one that counts
    assert found.identity.startswith(f"{base_weights}-")


def test_weights_are_counted_from_the_headers(place, tmp_path):
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(place / "model")
    assert find(place / "model").parameters == sum(p.numel() for p in lm.parameters())
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    assert policy._parameters([str(tmp_path)]) is None
    assert policy._parameters(["some/hub-id"]) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("yes", r"generation_config.json: thought: found 'yes', expected an object with template"),
        ({"template": "{prompt}"}, r"expected an object with template, thought_marker, response_marker"),
        ({"template": "{prompt}", "response_marker": ""}, r"expected texts, and a response marker"),
        ({"template": 1, "response_marker": "<R>"}, r"expected texts, and a response marker"),
        (
            {**THOUGHT.to_dict(), "on_repeated_marker": "last"},
            r"on_repeated_marker: found 'last', expected error or first",
        ),
    ],
)
def test_a_thought_format_that_cannot_be_read_is_one_line(place, tmp_path, value, words):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"thought": value}))
    with pytest.raises(ConfigError, match=words) as error:
        find(tmp_path / "model")
    assert "\n" not in str(error.value)


# What is written ------------------------------------------------------------------------------------------------------


def test_in_process_there_are_exactly_as_many_samples_as_there_should_be(infer, place, tmp_path):
    flags = argv(model=place / "model", prompts=place / "prompts.jsonl", output="out", limit=2, judge__kind="length")
    infer([*flags, *argv(strategy="test_time_po", n=2, depth=1, generate__max_tokens=4)])
    for trace in read(tmp_path / "out" / "traces.jsonl"):
        costs = [step["cost"] for step in trace["steps"]]
        assert [cost["samples"] for cost in costs] == [2, 4]
        assert costs[0]["scores"] + costs[1]["scores"] == len(
            {s["text"] for step in trace["steps"] for s in step["samples"] if s["text"] is not None}
        )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["depths"][1]["flops"] == 2 * summary["parameters"] * (
        summary["depths"][1]["prompt_tokens"] + summary["depths"][1]["generated_tokens"]
    )
    again = infer([*flags, *argv(strategy="test_time_po", n=2, depth=1, generate__max_tokens=4)])
    assert "parsed" in again.out


def nasty(text, number, seed):
    return f"<script>alert({number})</script> </pre>&amp; worth {number}"


def test_pages_hold_what_a_model_has_written_as_text_and_pairs_can_be_trained_on(infer, place, tokenizer, tmp_path):
    (tmp_path / "my_judge.py").write_text("def worth(prompt, response):\n    return float(response.split()[-1])\n")
    rows = [{"prompt": "say <b>1</b>"}, {"prompt": "say 2\n"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ScriptedServer(tokenizer, nasty, name=str(place / "model")) as server:
        flags = argv(strategy="best_of_n", n=3, judge__kind="function", judge__path="my_judge:worth", output="out")
        infer([*asking(server, model=place / "model", prompts="p.jsonl"), *flags])
    page = (tmp_path / "out" / "traces.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(2)&lt;/script&gt; &lt;/pre&gt;&amp;amp; worth 2" in page
    assert "say &lt;b&gt;1&lt;/b&gt;" in page
    assert not any(word in page for word in ("http:", "https:", "src=", "@import", "url("))
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    pairs = [*RowReader(tmp_path / "out" / "pairs.jsonl")]
    assert [pair.prompt for pair in pairs] == ["say <b>1</b>", "say 2\n"]
    assert [pair.chosen for pair in pairs] == [" " + nasty("", 2, 0), nasty("", 2, 0)]
    assert [pair.rejected for pair in pairs] == [" " + nasty("", 0, 0), nasty("", 0, 0)]
    answers = read(tmp_path / "out" / "answers.jsonl")
    assert [(row["response"], row["score"]) for row in answers] == [(nasty("", 2, 0), 2.0)] * 2


def test_a_chat_model_is_asked_in_turns_and_its_pairs_are_turns(infer, tokenizer, chat_tokenizer, tmp_path):
    folder = tmp_path / "chat"
    tiny_llama(len(chat_tokenizer), hidden=16, layers=1).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    (tmp_path / "p.txt").write_text("say 1\n")
    with ScriptedServer(chat_tokenizer, nasty, name=str(folder)) as server:
        flags = argv(strategy="best_of_n", n=2, judge__kind="length", output="out", prompts="p.txt")
        infer([*asking(server, model=folder), *flags])
        asked = chat_tokenizer.decode(server.requests[-1][1]["prompt"])
        assert asked == "<s><|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n"
        (tmp_path / "p.jsonl").write_text('{"prompt": "say 1"}\n')
        infer(asking(server, model=folder, prompts="p.jsonl", output="plain.jsonl"))
        assert chat_tokenizer.decode(server.requests[-1][1]["prompt"]) == "<s>say 1"
        infer(asking(server, model=folder, prompts="p.jsonl", output="turns.jsonl", as_chat="true"))
        assert chat_tokenizer.decode(server.requests[-1][1]["prompt"]) == asked


def test_a_prompt_of_a_text_file_is_a_line_without_its_byte_order_mark(tokenizer, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffsay 1\r\n\r\nsay\u20282\x0b\x85!\n".encode())
    found = Reader(tokenizer, ThoughtFormat(None)).file(str(tmp_path / "p.txt"))
    assert [prompt.prompt for prompt in found] == ["say 1", "say\u20282\x0b\x85!"]


def test_a_typed_prompt_of_bytes_that_are_no_utf8_is_refused_in_one_line(tokenizer):
    refused = Reader(tokenizer, ThoughtFormat(None)).typed(b"say \xff".decode(errors="surrogateescape"))
    assert refused == Refused("--prompt", None, "--prompt: is not text, expected UTF-8")


def test_rows_that_cannot_be_asked_are_refused_one_by_one(infer, place, tmp_path):
    rows = ['{"prompt": "say 1"}', "{broken", '{"prompt": [{"role": "user", "content": "hi"}]}', '{"text": "x"}']
    rows += [json.dumps({"prompt": "say 1"}), json.dumps({"prompt": "x " * 5000})]
    (tmp_path / "p.jsonl").write_text("\n".join(rows) + "\n")
    flags = argv(model=place / "model", prompts="p.jsonl", output="a.jsonl", generate__max_tokens=4)
    ended = infer(flags)
    lines = [line for line in ended.err.replace("\r", "\n").splitlines() if line.startswith("warning: p.jsonl")]
    assert [line.split(":")[2] for line in lines] == ["2", "3", "4", "6"]
    assert lines[1].endswith(
        "'prompt': chat messages, and the tokenizer has no chat template, expected one (--chat_template FILE)"
    )
    assert "tokens leave no room for an answer, expected fewer than the model's 4096 positions" in lines[3]
    answered = read(tmp_path / "a.jsonl")
    assert len(answered) == 6
    assert answered[0]["key"] != answered[1]["key"], "asked again, it draws another answer"


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_folder_with_other_answers_is_refused_and_so_is_what_is_not_ours(infer, place, tmp_path):
    flags = {"model": place / "model", "prompts": place / "prompts.jsonl", "generate__max_tokens": 4, "limit": 2}
    infer(argv(**flags, output="out"))
    said = refusal(infer, **flags, output="out", seed=1)
    assert said == (
        "--output out: holds answers made with other settings (seed: 0 -> 1); choose another --output, or use the "
        "settings of that run to resume it"
    )
    infer(argv(**flags, output="out", thought="show"))
    (tmp_path / "mine.jsonl").write_text("precious\n")
    assert refusal(infer, **flags, output="mine.jsonl") == (
        "--output mine.jsonl: exists, and is not this command's; choose another --output"
    )
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run_card.json").write_text("{}")
    assert "holds a training run (run_card.json)" in refusal(infer, **flags, output="run")


def test_prompts_that_have_changed_are_refused(infer, place, tmp_path):
    flags = {"model": place / "model", "prompts": "p.txt", "generate__max_tokens": 4, "output": "out"}
    (tmp_path / "p.txt").write_text("say 1\n")
    infer(argv(**flags))
    (tmp_path / "p.txt").write_text("say 2\n")
    assert "holds answers made with other settings (prompts: " in refusal(infer, **flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt: no such file or directory"),
        ({"prompts": "empty.txt"}, "--prompts: the file holds none"),
        ({"prompts": "binary.txt"}, "binary.txt: is not text, expected one prompt per line in UTF-8"),
        (
            {"prompt": "x", "templates": "nowhere", "strategy": "revision", "judge__kind": "length"},
            "templates: 'nowhere' is no folder",
        ),
        ({"prompt": "x", "generate__engine": "openai"}, "generate.url: found none"),
        ({"prompt": "x", "strategy": "best_of_n", "judge__kind": "reward_model"}, "judge.path: found none"),
        ({"prompt": "x", "model": "./nowhere"}, "model: './nowhere' does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(infer, place, tmp_path, flags, words):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    assert refusal(infer, **{"model": place / "model", **flags}).startswith(words)


# The testbed ----------------------------------------------------------------------------------------------------------


def test_without_a_model_the_testbed_answers_and_says_so(infer, tmp_path):
    ended = infer(argv(strategy="best_of_n", n=8, limit=16))
    assert ended.out.startswith("no model is named (--model DIR): the base policy of the testbed's world 'bandit'")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("infer-bandit-best_of_n-")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["depths"][0]["samples"] == 16 * 8


def test_a_trained_policy_answers_the_testbeds_prompts(infer, worlds, tmp_path):
    from prefopt.testbed import build_world

    base = build_world("bandit", cache_dir=worlds).base_model_path
    infer(argv(strategy="best_of_n", n=3, limit=8, output="one"))
    infer(argv(strategy="best_of_n", n=3, limit=8, output="two", model=base, judge__kind="world"))
    assert read(tmp_path / "one" / "traces.jsonl") == read(tmp_path / "two" / "traces.jsonl")


def test_improving_on_the_testbed_is_skipped_and_says_why(infer):
    ended = infer(argv(strategy="test_time_po", n=2, depth=1, limit=4))
    assert "step 1: skipped for 4 of 4 prompts, such as: loss: " in ended.out
    assert "tokens leave no room in the model's 64 positions" in ended.out


def test_a_world_whose_judge_compares_ranks_by_win_probability(infer, tmp_path):
    infer(argv(strategy="best_of_n", n=4, limit=4, testbed__world="cyclic", output="out"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["depths"][0]["comparisons"] > 0
    assert summary["depths"][0]["scores"] == 0
