"""Faults that a collator or an encoder could have: each gives a batch that trains without a murmur on wrong numbers."""

from dataclasses import replace

import torch

from prefopt.data.collate import collate


def states_shifted(pairs, **settings):
    """Each token is scored from the hidden state of the token itself, one too late."""
    batch = collate(pairs, **settings)
    return replace(batch, loss_index=batch.loss_index + 1)


def mask_shifted(pairs, **settings):
    """The boundary lies one token too early: the prompt's last token is scored, the completion's last is not."""
    batch = collate(pairs, **settings)
    labels = batch.input_ids.flatten()[batch.loss_index]
    return replace(batch, loss_index=(batch.loss_index - 1).clamp(min=0), labels=labels)


def position_leaked(pairs, **settings):
    """The rejected completions begin one position too late, as if behind a token of another row."""
    batch = collate(pairs, **settings)
    positions = batch.position_ids.clone()
    for row, pair in enumerate(pairs, start=len(pairs)):
        positions[row, len(pair.prompt_ids) :] += 1
    return replace(batch, position_ids=positions)


def chosen_leaked(pairs, **settings):
    """The rejected completions see the chosen ones, which stand between them and their prompt."""
    batch = collate(pairs, **settings)
    behind = [
        replace(p, prompt_ids=p.prompt_ids + p.chosen_ids, chosen_ids=p.rejected_ids, chosen_mask=p.rejected_mask)
        for p in pairs
    ]
    length = max(len(p.prompt_ids) + len(p.chosen_ids) for p in behind) - batch.input_ids.shape[1]
    batch = collate(pairs, **settings, extra_padding=max(length, 0))
    width = batch.input_ids.shape[1]
    leaky = collate(behind, **{**settings, "need_rejected": False}, pad_to_multiple_of=width)
    positions = leaky.position_ids.clone()
    for row, pair in enumerate(pairs):
        positions[row, len(pair.prompt_ids) + len(pair.chosen_ids) :] -= len(pair.chosen_ids)
    clean = batch.sequence_index < len(pairs)
    return replace(
        batch,
        input_ids=torch.cat((batch.input_ids[: len(pairs)], leaky.input_ids)),
        attention_mask=torch.cat((batch.attention_mask[: len(pairs)], leaky.attention_mask)),
        position_ids=torch.cat((batch.position_ids[: len(pairs)], positions)),
        loss_index=torch.cat((batch.loss_index[clean], leaky.loss_index + len(pairs) * width)),
    )


def token_hidden(pairs, **settings):
    """A token of the rejected rows' prompts cannot be seen."""
    batch = collate(pairs, **settings)
    visible = batch.attention_mask.clone()
    for row, pair in enumerate(pairs, start=len(pairs)):
        visible[row, 1] = int(len(pair.prompt_ids) < 3)
    return replace(batch, attention_mask=visible)


def bos_doubled(pairs, **settings):
    """The collator puts a BOS before rows that have one."""
    return collate([replace(p, prompt_ids=[p.prompt_ids[0], *p.prompt_ids]) for p in pairs], **settings)


COLLATOR_FAULTS = (states_shifted, mask_shifted, position_leaked, chosen_leaked, token_hidden, bos_doubled)
