import pytest

from prefopt import storage


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "state.json"
    storage.write_sealed(path, {"step": 3, "names": ["a", "b"], "loss": 0.1})
    return path
