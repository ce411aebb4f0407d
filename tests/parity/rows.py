"""50 plain and 50 chat rows, with all that makes encoders differ; the tokenizers to read them with."""

from tests.helpers import CHATML, byte_bpe_tokenizer

QUESTIONS = [
    "What is the colour of the sky?",
    "Name a fruit, please.",
    "How many legs has a spider?",
    "Wie heißt die Hauptstadt von Österreich?",
    "日本の首都はどこですか？",
    "Write a line of code.\n\tIndent it.",
    "Is 12 more than 34?",
    "Tell me a joke 🙂",
]
GOOD = [
    "The sky is blue.",
    "An apple is a fruit.",
    "Eight legs.",
    "Wien.",
    "東京です。",
    "\tprint(1)",
    "No.",
    "Why not? 🙂",
]
BAD = [
    "The sky is green.",
    "An apple tree.",
    "Six legs.",
    "Graz, glaube ich.",
    "大阪です。",
    "print",
    "Yes.",
    "No, sorry.",
]
TURN = "\n\nHuman: {}\n\nAssistant:"


def plain():
    """30 rows with a prompt and 20 whole dialogues, as they would stand in a file."""
    rows = [
        {"prompt": TURN.format(QUESTIONS[i % 8]), "chosen": f" {GOOD[i % 8]}", "rejected": f" {BAD[(i + i // 8) % 8]}"}
        for i in range(16)
    ]
    rows += [{"prompt": f"Question {i}: what? Answer: ", "chosen": word, "rejected": "Six"} for i, word in WHITE_SPACE]
    rows += [{"prompt": "The answer is gr", "chosen": "een.", "rejected": "ey."}]
    rows += [{"prompt": f"<s>{TURN.format(QUESTIONS[0])}", "chosen": " Blue.", "rejected": " Green."}] * 2
    rows += [{"prompt": "Say yes.", "chosen": " Yes.</s>", "rejected": " No.</s>"}] * 2
    rows += [{"prompt": "Say yes.", "chosen": " Yes.</s> And no.", "rejected": " No."}]
    rows += [{"prompt": "", "chosen": "The sky is blue.", "rejected": "The sky is green."}]
    rows += [{"prompt": "Say yes.", "chosen": " Yes.", "rejected": " "}]
    rows += [{"prompt": "Say yes.", "chosen": " Yes.", "rejected": " Yes."}]
    dialogues = [
        TURN.format(QUESTIONS[i % 8]) + f" {GOOD[i % 8]}" + TURN.format(QUESTIONS[(i + 3) % 8]) for i in range(20)
    ]
    for i, head in enumerate(dialogues):
        begin = " I think that it is " if i % 2 else " "  # what both answers begin with
        rows.append({"chosen": f"{head}{begin}{GOOD[i % 8]}", "rejected": f"{head}{begin}{BAD[i % 8]}"})
    return rows


WHITE_SPACE = [(1, "The sky"), (2, "The apple"), (3, "Eight"), (4, "zebra"), (5, "quartz")]


def chat():
    """30 rows with a prompt and 20 whole conversations."""
    rows = []
    for i in range(12):
        system = [{"role": "system", "content": "Be brief."}] if i % 3 == 0 else []
        before = [_user(QUESTIONS[i % 8]), _answer(GOOD[i % 8])] if i % 4 == 0 else []
        rows.append(_row([*system, *before, _user(QUESTIONS[(i + 1) % 8])], [GOOD[(i + 1) % 8]], [BAD[(i + 1) % 8]]))
    for text in ("  two spaces before", "two after  ", "a line break\n", "\n", ".", " "):
        rows.append(_row([_user(text)], [f" {GOOD[1]}"], [f"{BAD[1]} "]))
    for i in range(8):
        rows.append(_row([_user(QUESTIONS[i])], [GOOD[i], QUESTIONS[1], GOOD[1]], [BAD[i], QUESTIONS[2], BAD[2]]))
    rows.append(_row([_user("Say yes.")], ["Yes."], [" "]))
    rows.append(_row([_user("Say yes.")], ["Yes."], ["Yes."]))
    rows.append(_row([_user("Say yes."), _answer("Yes.")], ["And yes."], ["And no."]))
    rows.append(_row([_user("Say yes.")], ["Yes.<|im_end|> And no."], ["No."]))
    for i in range(20):
        shared = [_user(QUESTIONS[i % 8])]
        if i % 2:
            shared += [_answer(GOOD[i % 8]), _user(QUESTIONS[(i + 5) % 8])]
        begin = "I think that it is " if i % 3 else ""
        rows.append(
            {
                "chosen": [*shared, _answer(f"{begin}{GOOD[(i + 5) % 8]}")],
                "rejected": [*shared, _answer(f"{begin}{BAD[(i + 5) % 8]}")],
            }
        )
    return rows


def _user(text):
    return {"role": "user", "content": text}


def _answer(text):
    return {"role": "assistant", "content": text}


def _row(prompt, chosen, rejected):
    """Completions are lists of texts, by the assistant and the user in turn."""
    sides = [[(_user if i % 2 else _answer)(text) for i, text in enumerate(side)] for side in (chosen, rejected)]
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}


MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}",
)
NO_BREAK = CHATML.replace("<|im_end|>\n", "<|im_end|>")


def tokenizer(bos=True, eos=False, template=None):
    """A byte-level BPE tokenizer trained on the rows; `bos` and `eos`: what it adds to a text by itself."""
    from tokenizers import processors

    made = byte_bpe_tokenizer(
        [f" {text}" for text in (*QUESTIONS, *GOOD, *BAD, TURN)] * 2, vocab_size=450, bos=bos, chat_template=template
    )
    if eos:
        ids = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=ids
        )
    return made


PLAIN_TOKENIZERS = {
    "no BOS": {"bos": False},
    "adds BOS": {},
    "adds BOS and EOS": {"eos": True},
}
CHAT_TOKENIZERS = {
    "ChatML": {"bos": False, "template": CHATML},
    "with generation marks": {"bos": False, "template": MARKED},
    "without line breaks": {"bos": False, "template": NO_BREAK},
    "writes BOS": {"template": "{{ bos_token }}" + CHATML},
    "writes no BOS": {"template": CHATML},
}
