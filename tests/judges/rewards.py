"""Functions as a user would write them, good and bad."""

import math
import os
import re
import signal
import time


def exact(prompt, response, answer):
    return float(response.strip() == answer)


def keywords(prompt, response, **more):
    return len(response) if more == {"answer": "7"} else -1


def many(prompts, responses, answers):
    assert len(prompts) == len(responses) == len(answers)
    return [len(text) for text in responses]


def too_few(prompts, responses):
    return [1.0] * (len(responses) - 1)


def sometimes_nan(prompt, response):
    return math.nan if "7" in response else math.inf if "8" in response else 1.0


def dies(prompt, response):
    if "7" in response:
        raise ValueError("seven")
    return 1.0


def leaves(prompt, response):
    raise SystemExit(3)


def says_nothing(prompt, response):
    return None


def hangs(prompt, response):
    if "7" in response:
        time.sleep(30)
    return 1.0


def says_much(prompts, responses):
    return [1.0, None, 1.0, 1.0, 1.0]


def quits(prompt, response):
    os._exit(0)


def crashes(prompt, response):
    os.kill(os.getpid(), signal.SIGSEGV)


def backtracks(prompt, response):
    return float(re.match(r"(y+)+z$", response + "!") is None) if "y" in response else 1.0


def huge(prompt, response):
    return 10**400


NUMBER = 3
