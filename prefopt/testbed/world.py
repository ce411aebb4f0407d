"""What all worlds have in common: a tokenizer of words, a base policy that is trained on first use, and prompts.

This room does not know the trainer: a world hands out prompts and verdicts, and measures any causal language model over
its tokenizer.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.errors import ConfigError
from prefopt.storage import running_hash, text_hash
from prefopt.testbed.cache import built, cache_root
from prefopt.types import Prompt

if TYPE_CHECKING:
    from prefopt.judges.base import Judge

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
Render = Callable[
    [str], Any
]  # a method's `render_prompt`: from the prompt that a judge sees to the one that the policy reads


@dataclass(frozen=True)
class WorldSettings:
    """The settings of every world; another value of any field is another world with its own base policy."""

    seed: int = 0
    """Of the preferences, of the base distribution and of the base policy's initial weights."""
    hidden: int = 48
    """Width of the base policy."""
    layers: int = 2
    """Depth of the base policy."""
    base_steps: int = 300
    """Optimizer steps of the base policy's maximum-likelihood training."""


def make_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """One id per word, split at white space; BOS is prepended as Llama's tokenizers do it, EOS is not appended."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK, model_max_length=64
    )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows a bar per file it opens, which is of no use for a file of 200 kB."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


class World(abc.ABC):
    """A world of words.

    Args:
        settings: which world.
        cache_dir: folder of the cached base policies; None is the user's cache directory.
        words: of prompts, thoughts and responses.
    """

    name: ClassVar[str]
    recipe: ClassVar[int] = 1  # raise it when the code would train another base policy from the same settings

    def __init__(self, settings: WorldSettings, cache_dir: Path | str | None, words: Sequence[str]) -> None:
        self.settings = settings
        self.cache_dir = cache_root() if cache_dir is None else Path(cache_dir)
        self.vocabulary = (PAD, BOS, EOS, UNK, *words)
        self.tokenizer = make_tokenizer(self.vocabulary)
        self._pad, self._bos, self._eos = (self.vocabulary.index(token) for token in (PAD, BOS, EOS))

    @abc.abstractmethod
    def evaluate(self, lm: torch.nn.Module, beta: float) -> dict[str, float]:
        """How good a causal LM over this world's tokenizer is, `exact/...` -> value.

        Args: lm: its modes are left as they were found. beta: of the method, for worlds whose optimum depends on it.
        """

    @abc.abstractmethod
    def judge(self) -> Judge:
        """Who knows the right answers of this world."""

    # ---------------------------------------------------------------------------------------------- base policy

    @functools.cached_property
    def base_model_path(self) -> Path:
        """Folder of the base policy and its tokenizer, as `from_pretrained` opens it; trained on first use."""
        versions = {"recipe": self.recipe, "torch": torch.__version__, "transformers": transformers.__version__}
        world = {"world": self.name, "vocabulary": self.vocabulary, **asdict(self.settings)}
        content = json.dumps(world | versions, sort_keys=True)
        key = f"{self.name}-{text_hash(content)[:16]}"
        return built(self.cache_dir, key, self._train_base)

    @abc.abstractmethod
    def _fit(self, model: LlamaForCausalLM) -> None:
        """Make the base policy of a new model. What is random in it comes from generators of its own."""

    def _train_base(self, folder: Path) -> None:
        """One thread and its own seed make it the same on every call; the caller's threads and state are restored."""
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(self.settings.seed)
                model = LlamaForCausalLM(self._model_config())
                self._fit(model)
        finally:
            torch.set_num_threads(threads)
        with no_progress_bars():
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def _model_config(self, **other: Any) -> LlamaConfig:
        """Of the base policy. Args: other: settings in the place of, or beside, those that all worlds have."""
        hidden = self.settings.hidden
        usual: dict[str, Any] = {
            "vocab_size": len(self.vocabulary),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": self.settings.layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.12,  # about 1 / sqrt(hidden): 0.02 is made for wide models and learns slowly here
            "tie_word_embeddings": False,
            "pad_token_id": self._pad,
            "bos_token_id": self._bos,
            "eos_token_id": self._eos,
            "dtype": "float32",
        }
        return LlamaConfig(**(usual | other))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of what pairs depend on: the settings and the base policy's very weights."""
        digest = running_hash(json.dumps(asdict(self.settings), sort_keys=True).encode())
        digest.update((self.base_model_path / "model.safetensors").read_bytes())
        return digest.hexdigest()[:32]

    # ---------------------------------------------------------------------------------------------- prompts

    @abc.abstractmethod
    def _texts(self, n: int, seed: int) -> list[str]:
        """The first `n` prompts of the list of this seed, as a judge sees them."""

    def prompts(self, n: int, seed: int, render: Render | None = None) -> list[Prompt]:
        """The first `n` of an endless list of prompts, each under a key of its own. Another seed gives other keys.

        Args: render: from a prompt to what the policy reads, such as a method's `render_prompt`; None: as it is.
        Raises: ConfigError for a prompt that holds, so rendered, a word that this world does not have.
        """
        return [
            Prompt(
                prompt=text,
                ids=self._rendered(text, render),
                key=text_hash(f"{self.name}:{seed}:{i}")[:16],
                where=f"{self.name}-{seed}:{i + 1}",
            )
            for i, text in enumerate(self._texts(n, seed))
        ]

    def _rendered(self, text: str, render: Render | None) -> tuple[int, ...]:
        """The tokens that the policy reads."""
        try:
            rendered = text if render is None else render(text)
        except ValueError as error:
            raise ConfigError(f"testbed world '{self.name}': prompt '{text}' cannot be rendered: {error}") from None
        known = {word: i for i, word in enumerate(self.vocabulary)}
        strange = next((word for word in str(rendered).split() if word not in known), None)
        if strange is not None:
            raise ConfigError(
                f"testbed world '{self.name}': the method asks with the word '{strange}', which its policy does not "
                "know, expected the prompt alone (--method.thought_prompt none), or a world whose policy thinks "
                "(--testbed.world scratchpad --method.thought_prompt scratchpad)"
            )
        return (self._bos, *(known[word] for word in str(rendered).split()))
