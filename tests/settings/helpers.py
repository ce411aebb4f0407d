"""What the tests of settings share: the flags of a run on files, and the error of a command line."""

import pytest

from prefopt.errors import ConfigError
from prefopt.settings import parse

REAL = ["--method", "dpo", "--model.path", "m", "--data.train", "d.jsonl"]


def message(*argv):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return str(caught.value)
