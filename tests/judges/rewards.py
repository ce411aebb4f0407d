"""Functions as a user would write them, good and bad."""

import math
import time

calls = []


def exact(prompt, response, answer):
    return float(response.strip() == answer)


def keywords(prompt, response, **more):
    calls.append(more)
    return len(response)


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


NUMBER = 3
