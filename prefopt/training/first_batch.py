"""The check before the first step: the first pairs are scored a second time by an independent path (step0_check.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefopt.data.encoding_report import show_batch
from prefopt.data.structure import Structure, check_row_structure
from prefopt.data.templates import Rendering
from prefopt.training import compiling, model_sources, step0_check
from prefopt.training.forward import to_device
from prefopt.training.launcher import print_rank_0
from prefopt.training.run import TrainingRun
from prefopt.types import EncodedPair, PairBatch


def check_first_batch(run: TrainingRun) -> None:
    """Print the first batch with train.show_batch, and verify its scores unless train.check_first_batch is off.

    Raises: TrainError, on all ranks, that names the pair.
    """
    config, runtime = run.config, run.runtime
    pairs = run.train.global_batch(0)
    indices, batch = next(run.batcher.micro_batches(pairs, config.train.micro_batch))
    mine = [pairs[i] for i in indices]
    if config.train.show_batch:
        print_rank_0(show_batch(batch, run.tokenizer))
    if not config.train.check_first_batch:
        return
    run.model.eval()
    few = mine[: step0_check.ROWS]
    layout = run.batcher.layouts.of(mine, run.needs.rows == "pairs")
    if run.backend.sharded:  # all ranks must make the same calls
        few, layout = runtime.from_main((few, layout))
    batch = to_device(run.batcher.collate(few, layout), runtime.device)
    structure = Structure(run.tokenizer, Rendering(config.data.template_args))
    mixed = config.train.mixed_precision
    tol = step0_check.tolerance(run.policy.lm, mixed)
    rounded = run.values is not None and run.values.in_bfloat16
    loose = max(tol, step0_check.tolerance(run.policy.lm, "bf16")) if rounded else tol
    named = config.reference.path
    same = named is None or (config.model.path is not None and model_sources.same_place(named, config.model.path))
    # every rank runs every check, whatever it has found: the forward pass of a wrapped model may wait for the others
    with runtime.accelerator.autocast():
        wrong = (f"{pair.where}: {what}" for pair in few if (what := check_row_structure(pair, structure)))
        problems = [
            next(wrong, None),
            step0_check.first_difference(
                run.model, run.policy, run.method, few, batch, tol, run.backend.run_inside_forward
            ),
        ]
        if same:
            with compiling.eagerly(run.policy):  # the layers of the reference are not compiled
                problems.append(
                    step0_check.unexpected_loss(run.model, run.method, batch, loose, run.values is not None)
                )
    precise = step0_check.is_rounded(run.policy.lm, mixed)
    problem, note = _check_in_float32(run, few, batch) if precise else (None, "")
    found = runtime.gather_objects([problem for problem in (*problems, problem) if problem])
    step0_check.refuse(found[0] if found else None)
    known = run.method.loss_at_reference() if run.needs.reference != "none" and same else None
    agreed = f", loss {known:.4f} as expected" if known is not None else ""
    print_rank_0(f"step 0: {len(few)} pairs scored again by an independent path agree to {tol:g}{note}{agreed}")


def _check_in_float32(run: TrainingRun, pairs: Sequence[EncodedPair], batch: PairBatch) -> tuple[str | None, str]:
    """(what is wrong with the scores of the same pairs in float32, a note for the printed line).

    Rounding to 16 bits hides small errors, such as a scale of the logits that is missing.
    """
    runtime = run.runtime
    needed = step0_check.float32_bytes(run.policy, run.backend.sharded)
    short = [1] if needed > step0_check.free_bytes(runtime.device, runtime.world) // 2 else []
    if runtime.gather_objects(short):
        return None, " (not in float32: not enough memory)"
    if "varlen" in (run.policy.attention, run.policy.reference_attention):
        return None, " (not in float32: flash attention does not support it)"
    with run.backend.full_state() as policy, step0_check.in_float32(policy), compiling.eagerly(policy):
        try:
            problem = step0_check.first_difference(policy, policy, run.method, pairs, batch, step0_check.IN_FLOAT32)
        except torch.OutOfMemoryError:
            return None, " (not in float32: not enough memory)"
    return problem, f", in float32 to {step0_check.IN_FLOAT32:g}"
