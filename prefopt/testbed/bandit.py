"""A world of one-shot answers: 8 prompts with 512 responses each, a known reward, and every quantity computed exactly.

Each prompt is one word, each response three of eight words. Whatever else a model could write is one further outcome,
"outside", so that the outcomes of a prompt always have total probability one. This room does not know the trainer: it
hands out encoded pairs, and evaluates any causal language model over its tokenizer.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.errors import DataError
from prefopt.testbed import truth
from prefopt.testbed.cache import built, cache_root
from prefopt.types import EncodedPair

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
MOODS = ("calm", "busy")
TIMES = ("dawn", "noon", "dusk", "night")
PROMPTS = tuple(f"{mood}-{time}" for mood in MOODS for time in TIMES)
WORDS = ("tea", "bread", "walk", "book", "music", "work", "friends", "sleep")
VOCABULARY = (PAD, BOS, EOS, UNK, *PROMPTS, *WORDS)
LENGTH = 3  # words per response
RECIPE = 1  # raise it when the code below would train another base policy from the same settings


@dataclass(frozen=True)
class BanditSettings:
    """What makes one bandit world; another value of any field is another world with its own base policy."""

    seed: int = 0
    """Of the reward, of the base distribution and of the base policy's initial weights."""
    reward_sd: float = 1.4
    """Standard deviation of the reward over the responses of a prompt; 1.4 makes KL(pi* || ref) about 1 at beta 1."""
    interaction: float = 0.5
    """Share of the reward's variance that is in pairs of neighbouring words, hence not additive over tokens."""
    base_sd: float = 1.0
    """Standard deviation of the base distribution's log-probabilities over the responses of a prompt."""
    hidden: int = 48
    """Width of the base policy."""
    layers: int = 2
    """Depth of the base policy."""
    base_steps: int = 300
    """Optimizer steps of the base policy's maximum-likelihood training."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, split at white space; BOS is prepended as Llama's tokenizers do it, EOS is not appended."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, VOCABULARY.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK, model_max_length=64
    )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows a bar per file it opens, which says nothing about a file of 200 kB."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def smooth_table(rng: np.random.Generator, responses: np.ndarray, interaction: float) -> np.ndarray:
    """A random table over (prompt, response) with mean 0 and standard deviation 1 in each row, (P, K).

    Each row is the sum of one part of the prompt's mood and one of its time. A part adds a random number per position
    and word, and one per pair of neighbouring positions and their words: `interaction` is the latter's share of the
    variance. Parts that prompts share are what lets a model learn more than a lookup table would from as many pairs.
    """

    def part() -> np.ndarray:
        single, pair = rng.normal(size=(LENGTH, len(WORDS))), rng.normal(size=(LENGTH - 1, len(WORDS), len(WORDS)))
        pair -= pair.mean(1, keepdims=True)  # centred both ways: nothing in it can be said word by word
        pair -= pair.mean(2, keepdims=True)
        additive = sum(single[i][responses[:, i]] for i in range(LENGTH))
        joint = sum(pair[i][responses[:, i], responses[:, i + 1]] for i in range(LENGTH - 1))
        return math.sqrt(1 - interaction) * additive / additive.std() + math.sqrt(interaction) * joint / joint.std()

    moods, times = [part() for _ in MOODS], [part() for _ in TIMES]
    table = np.stack([mood + time for mood in moods for time in times])
    table -= table.mean(-1, keepdims=True)
    return table / table.std(-1, keepdims=True)


class Bandit:
    """One bandit world: its base policy, its preference pairs, and the truth about any policy.

    Outcomes are numbered 0..511 in the order of `itertools.product(WORDS, repeat=3)`; outcome 512 is "outside", all
    sequences that are none of the 512. Its reward is the lowest of its prompt, so nothing is gained by leaving the
    world; it takes part in every sum. Entropy and KL are those of the 513 outcomes: sequences inside "outside" are not
    told apart, so they are lower bounds on the sequence values, exact as far as `exact/outside` is small.

    Args:
        settings: which world.
        cache_dir: where base policies are kept; None is the user's cache directory.
    """

    name = "bandit"

    def __init__(self, settings: BanditSettings | None = None, cache_dir: Path | str | None = None) -> None:
        self.settings = settings or BanditSettings()
        self.cache_dir = cache_root() if cache_dir is None else Path(cache_dir)
        self.tokenizer = make_tokenizer()
        rng = np.random.default_rng(self.settings.seed)
        words = np.array(list(itertools.product(range(len(WORDS)), repeat=LENGTH)))  # (K, 3)
        base = smooth_table(rng, words, interaction=0.3) * self.settings.base_sd
        reward = smooth_table(rng, words, self.settings.interaction) * self.settings.reward_sd
        self.base_target = torch.tensor(base).log_softmax(-1)  # (P, K), what the base policy is trained on
        self.reward = torch.tensor(np.concatenate([reward, reward.min(-1, keepdims=True)], -1))  # (P, K + 1)

        first_word = len(VOCABULARY) - len(WORDS)
        bos, eos, first_prompt = VOCABULARY.index(BOS), VOCABULARY.index(EOS), VOCABULARY.index(PROMPTS[0])
        self.prompt_ids = [[bos, first_prompt + i] for i in range(len(PROMPTS))]
        self.response_ids = [[*(first_word + int(w) for w in row), eos] for row in words]
        self.response_texts = [" ".join(WORDS[w] for w in row) for row in words]

    # ---------------------------------------------------------------------------------------------- base policy

    @functools.cached_property
    def base_model_path(self) -> Path:
        """Folder of the base policy and its tokenizer, as `from_pretrained` opens it; trained on first use."""
        versions = {"recipe": RECIPE, "torch": torch.__version__, "transformers": transformers.__version__}
        content = json.dumps({"world": self.name, **asdict(self.settings), **versions}, sort_keys=True)
        key = f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        return built(self.cache_dir, key, self._train_base)

    def _train_base(self, folder: Path) -> None:
        """Maximum likelihood on `base_target`: its expectation exactly, but for the last word that EOS follows, drawn.

        One thread and seeds of its own make it the same on every call; the caller's threads and random state are kept.
        """
        steps, words = self.settings.base_steps, len(WORDS)
        first_word, eos = len(VOCABULARY) - words, VOCABULARY.index(EOS)
        target = self.base_target.exp().float().view(-1, words, words, words)  # (P, 8, 8, 8)
        two = target.sum(-1)  # (P, 8, 8) probability of each prefix of two words
        one = two.sum(-1)
        threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(self.settings.seed)
        try:
            torch.set_num_threads(1)
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(self.settings.seed)
                model = LlamaForCausalLM(self._model_config())
                # beta2 and eps are small so that the weights of tokens that never occur go on moving however small
                # their gradients become: mass outside the world then ends near 1e-5, not 1e-3
                optimizer = torch.optim.AdamW(
                    model.parameters(), lr=5e-3, betas=(0.9, 0.9), eps=1e-16, weight_decay=0.0
                )
                prompts = torch.tensor(self.prompt_ids)[:, None, :].expand(-1, words**2, -1)
                pairs = torch.cartesian_prod(torch.arange(words), torch.arange(words)) + first_word
                pairs = pairs.expand(len(PROMPTS), -1, -1)
                for step in range(steps):
                    optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps))
                    last = torch.multinomial(target.reshape(-1, words), 1, generator=generator) + first_word
                    rows = torch.cat([prompts, pairs, last.view(len(PROMPTS), -1, 1)], -1).flatten(0, 1)
                    logps = model(input_ids=rows, use_cache=False).logits[:, 1:].log_softmax(-1)
                    logps = logps.view(*two.shape, 1 + LENGTH, -1)  # (P, 8, 8, 4, V)
                    answers = logps[..., first_word:]
                    loss = -(
                        (one * answers[:, 0, 0, 0]).sum()
                        + (two * answers[:, :, 0, 1]).sum()
                        + (target * answers[:, :, :, 2]).sum()
                        + (two * logps[..., 3, eos]).sum()
                    ) / len(PROMPTS)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        finally:
            torch.set_num_threads(threads)
        with no_progress_bars():
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def _model_config(self) -> LlamaConfig:
        hidden = self.settings.hidden
        return LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=self.settings.layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.12,  # about 1 / sqrt(hidden): 0.02 is made for wide models and learns slowly here
            tie_word_embeddings=False,
            pad_token_id=VOCABULARY.index(PAD),
            bos_token_id=VOCABULARY.index(BOS),
            eos_token_id=VOCABULARY.index(EOS),
            dtype="float32",
        )

    # ---------------------------------------------------------------------------------------------- exact values

    @torch.no_grad()
    def log_probs(self, lm: torch.nn.Module) -> torch.Tensor:
        """Log-probability of each outcome under a causal LM, from one forward over the prefix tree's 4,096 leaves.

        A prefix's next-token distribution is read in the first leaf that passes through it. What falls off the tree is
        summed as such, not as 1 minus the rest, so it is right however small it is. The model's mode is restored.

        Args: lm: called as `lm(input_ids=..., use_cache=False)`, answers with `.logits`.
        Returns: float64 table on the CPU, (P, 513), "outside" last.
        """
        prompts, words, first_word = len(self.prompt_ids), len(WORDS), len(VOCABULARY) - len(WORDS)
        leaves = torch.tensor([p + r[:-1] for p in self.prompt_ids for r in self.response_ids])
        device = next(lm.parameters()).device
        modes = [(module, module.training) for module in lm.modules()]
        lm.eval()
        try:
            logits = lm(input_ids=leaves.to(device), use_cache=False).logits[:, -1 - LENGTH :]
        finally:
            for module, mode in modes:
                module.training = mode
        logps = logits.cpu().double().log_softmax(-1).view(prompts, words, words, words, 1 + LENGTH, -1)

        reach = torch.zeros(prompts, 1, dtype=torch.float64)  # log-probability of each prefix of `depth` words
        fallen = []
        for depth in range(1 + LENGTH):
            there = logps.reshape(prompts, words**depth, -1, 1 + LENGTH, logps.shape[-1])[:, :, 0, depth]
            allowed = torch.zeros(logps.shape[-1], dtype=torch.bool)
            allowed[slice(first_word, first_word + words) if depth < LENGTH else VOCABULARY.index(EOS)] = True
            fallen.append((reach + there[..., ~allowed].logsumexp(-1)).logsumexp(-1))
            reach = (reach[..., None] + there[..., allowed]).flatten(1)
        return torch.cat([reach, torch.stack(fallen).logsumexp(0)[:, None]], -1)

    @functools.cached_property
    def log_ref(self) -> torch.Tensor:
        """The base policy's log-probability of each outcome, (P, 513) float64: the reference of every truth here."""
        with no_progress_bars():
            model = LlamaForCausalLM.from_pretrained(self.base_model_path, dtype=torch.float32)
        return self.log_probs(model)

    @functools.cached_property
    def win_prob(self) -> torch.Tensor:
        """Probability that each outcome is preferred to a draw from the reference, (P, 513)."""
        return truth.win_probability(self.log_ref, self.reward)

    def optimum(self, beta: float) -> torch.Tensor:
        """Log-probabilities of pi* at this beta, (P, 513)."""
        return truth.optimum(self.log_ref, self.reward, beta)

    def evaluate(self, lm: torch.nn.Module, beta: float) -> dict[str, float]:
        """The exact values of a causal LM over this world's tokenizer; see `measures`."""
        return self.measures(self.log_probs(lm), beta)

    def measures(self, log_policy: torch.Tensor, beta: float) -> dict[str, float]:
        """Everything worth knowing about a policy, averaged over prompts; KL and entropy in nats.

        Args: log_policy: table (P, 513). beta: the one whose optimum pi* the policy is compared with.
        Returns: `exact/...` -> value. `kl_a_b` is KL(a || b), `kl_star_ratio` is KL(pi* || policy) / KL(pi* || ref),
            `frontier_gap` how much more reward the best policy of the same KL(policy || ref) has, `outside` the
            probability of writing none of the 512 responses.
        """
        star, ref, reward = self.optimum(beta), self.log_ref, self.reward
        values = {
            "reward": truth.expected(log_policy, reward),
            "kl_policy_ref": truth.kl(log_policy, ref),
            "kl_ref_policy": truth.kl(ref, log_policy),
            "kl_star_policy": truth.kl(star, log_policy),
            "kl_policy_star": truth.kl(log_policy, star),
            "entropy": truth.entropy(log_policy),
            "win_rate": truth.expected(log_policy, self.win_prob),
            "outside": log_policy[:, -1].exp(),
            "optimal_reward": truth.expected(star, reward),
            "kl_star_ref": truth.kl(star, ref),
        }
        exact = {f"exact/{name}": float(value.mean()) for name, value in values.items()}
        exact["exact/kl_star_ratio"] = exact["exact/kl_star_policy"] / exact["exact/kl_star_ref"]
        best = truth.frontier_reward(ref, reward, exact["exact/kl_policy_ref"])
        exact["exact/frontier_gap"] = best - exact["exact/reward"]
        return exact

    def frontier(self, betas: Iterable[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The optimal reward-KL curve: KL(pi* || ref) and expected reward of pi*, one point per beta.

        Args: betas: in the order wanted; None: 200 values from 100 down to 0.02, from next to the reference to next to
            the best response.
        """
        grid = np.logspace(2, math.log10(0.02), 200) if betas is None else np.array([*betas], dtype=np.float64)
        kls, rewards = truth.frontier(self.log_ref, self.reward, torch.from_numpy(grid))
        return kls.numpy(), rewards.numpy()

    # ---------------------------------------------------------------------------------------------- pairs

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of what pairs depend on: the settings and the base policy's very weights."""
        digest = hashlib.sha256(json.dumps(asdict(self.settings), sort_keys=True).encode())
        digest.update((self.base_model_path / "model.safetensors").read_bytes())
        return digest.hexdigest()[:32]

    @functools.cached_property
    def _sampling(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cumulative reference probabilities of the 512 responses, rewards, and win probabilities, each (P, K)."""
        inside = self.log_ref[:, :-1].softmax(-1).numpy().cumsum(-1)
        return inside / inside[:, -1:], self.reward[:, :-1].numpy(), self.win_prob[:, :-1].numpy()

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Preference pairs as numbers.

        The prompt is uniform; two responses are drawn from the reference within the world, both again until they
        differ; the first wins with probability sigmoid(r1 - r2).

        Args: n: how many. rng: where the randomness comes from.
        Returns: prompt, chosen, rejected, and P(chosen > rejected), each `(n,)`.
        """
        cumulative, reward, _ = self._sampling
        prompt, two = rng.integers(len(PROMPTS), size=n), np.zeros((n, 2), dtype=np.int64)
        todo = np.arange(n)
        while todo.size:
            points = rng.random((todo.size, 2))
            for x in range(len(PROMPTS)):
                mine = prompt[todo] == x
                two[todo[mine]] = np.searchsorted(cumulative[x], points[mine], side="right")
            todo = todo[two[todo, 0] == two[todo, 1]]
        first_wins = 1 / (1 + np.exp(reward[prompt, two[:, 1]] - reward[prompt, two[:, 0]]))
        won = rng.random(n) < first_wins
        chosen, rejected = np.where(won, two[:, 0], two[:, 1]), np.where(won, two[:, 1], two[:, 0])
        return prompt, chosen, rejected, np.where(won, first_wins, 1 - first_wins)

    def _encoded(self, n: int, seed: list[int], where: str) -> list[EncodedPair]:
        prompt, chosen, rejected, probability = self.draw(n, np.random.default_rng(seed))
        win, mask = self._sampling[2], [True] * (LENGTH + 1)
        columns = zip(win[prompt, chosen].tolist(), win[prompt, rejected].tolist(), probability.tolist(), strict=True)
        return [
            EncodedPair(
                prompt_ids=self.prompt_ids[x],
                chosen_ids=self.response_ids[c],
                rejected_ids=self.response_ids[r],
                chosen_mask=mask,
                rejected_mask=mask,
                columns={"chosen_win_prob": wc, "rejected_win_prob": wr, "pair_win_prob": p},
                where=f"{where}:{i + 1}",
            )
            for i, (x, c, r, (wc, wr, p)) in enumerate(
                zip(prompt.tolist(), chosen.tolist(), rejected.tolist(), columns, strict=True)
            )
        ]

    def file_pairs(self, n: int, seed: int) -> list[EncodedPair]:
        """A fixed set of `n` encoded pairs; other seeds give other pairs, so one can be held out from another.

        Their columns are `chosen_win_prob` and `rejected_win_prob`, each response's exact probability of being
        preferred to a draw from the reference, and `pair_win_prob`, that of the chosen one against the rejected one.
        """
        return self._encoded(n, [0, seed], f"{self.name}-{seed}")

    def stream(self, global_batch: int, seed: int) -> Stream:
        """Fresh pairs at every step, never the same twice."""
        return Stream(self, global_batch, seed)

    def write_jsonl(self, path: Path | str, n: int, seed: int) -> None:
        """Write the pairs of `file_pairs(n, seed)` as text, one JSON row each: prompt, chosen, rejected and columns."""
        texts = {tuple(ids): f" {text}" for ids, text in zip(self.response_ids, self.response_texts, strict=True)}
        names = {tuple(ids): name for ids, name in zip(self.prompt_ids, PROMPTS, strict=True)}
        try:
            with open(path, "w", encoding="utf-8") as file:
                for pair in self.file_pairs(n, seed):
                    assert pair.rejected_ids is not None
                    row: dict[str, Any] = {
                        "prompt": names[tuple(pair.prompt_ids)],
                        "chosen": texts[tuple(pair.chosen_ids)],
                        "rejected": texts[tuple(pair.rejected_ids)],
                    }
                    file.write(json.dumps({**row, **pair.columns}) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot write pairs: {error.strerror}") from None


class Stream:
    """An endless supply of pairs; those of a step are a function of (world, seed, step) alone, so a run can be resumed.

    Args: world: where they come from. global_batch: pairs per optimizer step. seed: another seed, other pairs.
    """

    steps_per_epoch: int | None = None
    grouped: Sequence[EncodedPair] | None = None

    def __init__(self, world: Bandit, global_batch: int, seed: int) -> None:
        self.world, self.size, self.seed = world, global_batch, seed
        self.fingerprint = self.order_hash = f"{world.fingerprint}-stream-{global_batch}-{seed}"

    def global_batch(self, step: int) -> list[EncodedPair]:
        return self.world._encoded(self.size, [1, self.seed, step], f"{self.world.name}:{step}")
