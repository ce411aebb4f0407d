"""Steps of the real trainer on random rows, and what they do: loss and gradients."""

import copy
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from prefopt import registry
from prefopt.settings import EvalConfig, KernelConfig, ModelConfig, OptimConfig, ReferenceConfig, RunConfig, TrainConfig
from prefopt.training.first_batch import check_first_batch
from prefopt.training.forward import PolicyWithReference, Scorer
from prefopt.training.metrics import MetricsFile, read_lines
from prefopt.training.run import TrainingRun
from prefopt.training.trainer import Trainer
from prefopt.types import EncodedPair
from tests.helpers import tiny_llama
from tests.invariant.oracle import scorer_of

VOCAB = 50
BOS, FIRST = 0, 5  # the tokens below FIRST are special ones, as in tests.helpers
# numbers per token that any method reads
TOKEN_COLUMNS = [column for name in registry.names() for column in registry.get(name)().needs.token_columns]
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}  # largest ||a - b|| / ||a||


def random_pairs(columns=(), pairs=8, seed=0):
    """Ragged rows: one completion of a single token, every third row a dialogue whose mask has holes.

    Each has the numbers per token that any method reads.
    """
    draw, per_token = random.Random(seed), random.Random(seed + 1)

    def ids(length):
        return [draw.randrange(FIRST, VOCAB) for _ in range(length)]

    def mask(length, holes):
        marks = [not holes or draw.random() < 0.6 for _ in range(length)]
        return [*marks[:-1], True]

    out = []
    for i in range(pairs):
        chosen, rejected = 1 if i == 1 else draw.randint(2, 12), draw.randint(1, 12)
        values = {c.name: draw.uniform(max(c.low, -9.0), min(c.high, 9.0)) for c in columns}
        out.append(
            EncodedPair(
                prompt_ids=[BOS, *ids(draw.randint(0, 8))],
                chosen_ids=ids(chosen),
                rejected_ids=ids(rejected),
                chosen_mask=mask(chosen, i % 3 == 2),
                rejected_mask=mask(rejected, i % 3 == 2),
                columns=values,
                where=f"rows:{i + 1}",
            )
        )
        masks = out[-1].chosen_mask, out[-1].rejected_mask
        numbers = {
            key: [per_token.uniform(-1.5, 1.5) for _ in range(sum(marks))]
            for column in TOKEN_COLUMNS
            for key, marks in zip(column.keys, masks, strict=True)
        }
        out[-1] = replace(out[-1], token_columns=numbers)
    return out


def two_models(dtype, tied=False):
    """(policy, reference): Llamas of some contrast, the policy a step away from the reference."""
    reference = tiny_llama(VOCAB, tie_word_embeddings=tied)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, other in zip(policy.parameters(), reference.parameters(), strict=True):
            other += 0.1 * torch.randn(other.shape, generator=generator)
            mine.copy_(other + 0.03 * torch.randn(other.shape, generator=generator))
    return policy.to(dtype), reference.to(dtype)


class Bench:
    """The real trainer on copies of two models, whose steps do not move them: any number of steps can be compared.

    Args:
        models: (policy, reference); the reference is left out where the method reads none. It may be one that the
            policy holds itself, as the policy may have an adapter. A method that reads scores is given `scorer_of`
            the policy.
        tiles: of the kernel, (tokens, vocabulary).
        tokenizer: the first batch is checked against it.
        lr: of plain gradient descent; above 0 the steps move the policy after all.
        grouped: the whole training set, if the steps are to be taken as grouped by length.
        layout: of every batch.
        values, reference_head: what is kept of a reference, in place of a live one; then `models` holds None or what
            stands still of the policy.
        reference: how it moves.
        model: settings of the policy, of which the trainer reads some.
        compile: the policy's layers.
    """

    def __init__(
        self,
        runtime,
        method,
        models,
        tiles=(1024, 8192),
        tokenizer=None,
        lr=0.0,
        grouped=None,
        layout="padded",
        values=None,
        reference_head=None,
        reference=ReferenceConfig(),  # noqa: B008 - frozen
        model=ModelConfig(),  # noqa: B008 - frozen
        compile=False,
    ):
        settings = reference
        policy, reference = map(copy.deepcopy, models)  # one by one: they may be the same model
        needs = method.needs
        config = RunConfig(
            method=method,
            method_name="under_test",
            model=model,
            # settings want a rate above 0; this one moves no weight
            optim=OptimConfig(name="sgd", lr=lr or 1e-300, schedule="constant", warmup_steps=0, clip=0),
            train=TrainConfig(max_steps=1, layout=layout, compile=compile),
            kernel=KernelConfig(*tiles),
            reference=settings,
        )
        self.run = TrainingRun(
            config=config,
            runtime=runtime,
            policy=Scorer(scorer_of(policy))
            if needs.output == "scores"
            else PolicyWithReference(
                policy, reference if needs.reference != "none" else None, config.kernel, reference_head
            ),
            tokenizer=tokenizer or SimpleNamespace(pad_token_id=2),
            train=SimpleNamespace(steps_per_epoch=None, fingerprint="rows", grouped=grouped and [(1.0, grouped)]),
            eval_pairs=[],
            output=Path(),
            values=values,
        )
        self.trainer = Trainer(self.run)
        self.trainer.prepare()
        self.gradients = {}
        if not runtime.backend.startswith("zero"):  # whose gradients are no parameters' own
            self.run.optimizer.optimizer.register_step_pre_hook(self._keep)
        # what accelerate keeps of every model it has wrapped would live as long as the tests
        runtime.accelerator._models.clear(), runtime.accelerator._optimizers.clear()

    def _keep(self, *_):
        self.gradients = {name: p.grad.clone() for name, p in self.run.policy.lm.named_parameters() if p.requires_grad}

    def step(self, pairs, micro, counted=None, number=0):
        """(loss, gradient by parameter name) of one optimizer step on `pairs`, `micro` at a time on each process.

        Args: counted: by how many pairs a grouped step is divided; None: by its own. number: of the step.
        """
        train = replace(self.run.config.train, global_batch=len(pairs), micro_batch=micro)
        self.run.config = replace(self.run.config, train=train)
        self.run.train.global_batch = lambda step: list(pairs)
        self.run.train.counted_pairs = lambda step: len(pairs) if counted is None else counted
        known = self.run.runtime.accelerator._optimizers
        known[:] = [self.run.optimizer]  # whose gradients a scaler unscales before they are clipped
        self.trainer.loss_states.load_state_dict(self.run.needs.state)  # every step is a first one
        line = self.trainer._step(number).line()
        known.clear()
        self.line = line
        return line["loss"], self.gradients

    def check_first_batch(self, pairs):
        """What a run does before its first step. Raises: TrainError."""
        self.run.train.global_batch = lambda step: list(pairs)
        check_first_batch(self.run)

    def evaluate(self, pairs, batch, folder):
        """The metrics line of an evaluation on `pairs`; None but on the first process."""
        self.run.config = replace(self.run.config, eval=EvalConfig(batch=batch))
        self.run.eval_pairs, self.run.output = list(pairs), Path(folder)
        self.run.metrics = MetricsFile(Path(folder) / "metrics.jsonl")
        self.trainer.loss_states.load_state_dict(self.run.needs.state)
        self.trainer._evaluate(0)
        return read_lines(self.run.metrics.path)[-1] if self.run.runtime.is_main else None


def gradient_gaps(gradients, others):
    """The relative difference of each gradient tensor.

    One that is nothing but rounding is held against the whole gradient: what is added to all scores of a reward model
    is in no difference of two.
    """
    least = 1e-6 * float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    gaps = {}
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, f"{name}: no gradient, nothing is compared"
        gaps[name] = float((gradient - others[name]).norm() / gradient.norm().clamp(min=least))
    return gaps


def difference(expected, found):
    """The largest relative difference of the loss and of each gradient tensor, and where it is."""
    (loss, gradients), (other, others) = expected[:2], found
    assert gradients.keys() == others.keys()
    gaps = {"loss": abs(loss - other) / abs(loss)} | gradient_gaps(gradients, others)
    worst = max(gaps, key=gaps.__getitem__)
    return gaps[worst], worst
