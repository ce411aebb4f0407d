"""Self-play where preferences run in circles: a round is the exact step, and the average of rounds is hard to beat."""

import pytest

from prefopt.testbed import build_world
from prefopt.testbed.self_play import self_play

ROUNDS, ETA = 16, 5.0


@pytest.mark.slow  # 16 rounds
@pytest.mark.timeout(1200)
def test_sppo_rounds_follow_exact_multiplicative_weights_and_their_average_nears_the_equilibrium(server, tmp_path):
    flags = {"method": "sppo", "method.beta": 1 / ETA, "rounds.count": ROUNDS, "rounds.eval_prompts": 0}
    flags |= {"output": tmp_path / "run", "testbed.world": "cyclic"}
    ended = server.train([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    assert ended.status == 0, ended.err
    world = build_world("cyclic", cache_dir=server.cache)
    models = [tmp_path / f"run/round_{number:02d}/train/model" for number in range(1, ROUNDS + 1)]
    found = self_play([world.log_ref, *map(world.log_probs_of, models)], world.preference, ETA)
    assert len(world.response_texts) >= 64
    assert found.last[0] >= 0.15
    assert sum(found.step) / ROUNDS <= 0.1
    assert found.average[-1] <= 0.5 * found.last[0]
    assert max(found.last[-4:]) > 2 * found.average[-1], "it is the average that theory promises, the last one cycles"
