"""TRL's DPOTrainer: its steps, recorded as `trajectory.ours` records ours. The only file that imports TRL."""

import copy

import torch
from datasets import Dataset, disable_progress_bars
from trl import DPOConfig, DPOTrainer

from tests.helpers import tiny_llama
from tests.parity.trajectory import BATCH, Trajectory, row

disable_progress_bars()


def make(policy, reference, tokenizer, folder, rows, lr=0.1, **settings):
    """A DPOTrainer over `rows` (text or messages) that takes plain gradient steps in the order of the rows."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    args = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        **{"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2} | settings,
    )
    return DPOTrainer(
        policy,
        reference,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )


def trajectory(models, steps, lr, tokenizer, folder, **settings):
    """What DPOTrainer does on `steps`, a list of batches of encoded pairs."""
    policy, reference = map(copy.deepcopy, models)
    text = [{"prompt": "a", "chosen": "b", "rejected": "c"}]  # it wants text to be made; the ids are put in its place
    trainer = make(policy, reference, tokenizer, folder, text, lr, max_steps=len(steps), **settings)
    pairs = [pair for batch in steps for pair in batch]
    trainer.train_dataset = Dataset.from_list(
        [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in pairs]
    )
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    gradients, seen = [], {"policy": [], "reference": []}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.clone() for name, p in policy.named_parameters()})
    )
    for name, model in (("policy", policy), ("reference", reference)):
        model.register_forward_pre_hook(lambda _, __, kw, seen=seen[name]: seen.extend(_rows(kw)), with_kwargs=True)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    update = {name: p.detach() - before[name] for name, p in policy.named_parameters()}
    return Trajectory(losses, gradients, update, seen)


def _rows(inputs):
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    return [row(i[r].tolist(), (s[r] != -100).tolist()) for i, r, s in zip(ids, real, inputs["labels"], strict=True)]


def encoded(rows, tokenizer, folder, **settings):
    """Per row: {side: (ids, which are scored)} as TRL's collator hands them to the model; None for a row it drops."""
    out = [None] * len(rows)
    for group in (
        [i for i, r in enumerate(rows) if "prompt" in r],
        [i for i, r in enumerate(rows) if "prompt" not in r],
    ):
        if not group:
            continue
        models = [tiny_llama(len(tokenizer), hidden=16, layers=1) for _ in range(2)]
        trainer = make(*models, tokenizer, folder, [{**rows[i], "place": i} for i in group], **settings)
        for example in trainer.train_dataset:
            batch = trainer.data_collator([example])
            sides = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"], strict=True)
            chosen, rejected = (row(ids[real].tolist(), mask[real].bool().tolist()) for ids, real, mask in sides)
            out[example["place"]] = {"chosen": chosen, "rejected": rejected}
    return out
