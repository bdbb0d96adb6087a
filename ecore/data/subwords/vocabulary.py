"""A tokenizer's subwords as a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ecore.data.vocabulary import SPECIAL_WORDS, Vocabulary
from ecore.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OFFSET = len(SPECIAL_WORDS)
"""Id of the tokenizer's token 0: our special words come first, so that PAD, EOS and the others mean the same
in every batch. The tokenizer's end-of-text token is EOS."""


class SubwordVocabulary:
    """A tokenizer's subwords with our special words before them; the emotions and words of the prepared data.

    Raises:
        InputError: a tokenizer that does not give its tokens' places in the text, or has no end-of-text token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Vocabulary) -> None:
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise InputError(
                f"{tokenizer.name_or_path}: expected GPT-2's tokenizer, with an end-of-text token"
            )
        self.tokenizer = tokenizer
        self.words = words
        self.emotions = words.emotions
        self.fingerprint = words.fingerprint
        """The words' fingerprint: it identifies the data that a model was trained on."""
        self.eos_token: int = tokenizer.eos_token_id

    def __len__(self) -> int:
        return OFFSET + len(self.tokenizer)

    def clean(self, text: str) -> str:
        """``text`` as written, with single spaces and without the end-of-text token's name."""
        return " ".join(text.replace(self.tokenizer.eos_token, " ").split())

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of each text's subwords, and where in the text each begins and ends."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return [
            ([OFFSET + token for token in tokens], spans)
            for tokens, spans in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def blank(self, tokens: int) -> list[int]:
        """Ids of the first ``tokens`` tokens that have no text: white space, special tokens, places without a token."""
        texts = self.tokenizer.batch_decode([[i] for i in range(tokens)], skip_special_tokens=True)
        return [OFFSET + token for token, text in enumerate(texts) if not text.strip()]

    def piece(self, word: int) -> str:
        """The text of one id; where it has none, the tokenizer's own name of it."""
        token = self.eos_token if word < OFFSET else word - OFFSET
        return self.text([word]) or str(self.tokenizer.convert_ids_to_tokens(token))

    def text(self, ids: Iterable[int]) -> str:
        """Readable text of ``ids``, the special ones dropped."""
        tokens = [i - OFFSET for i in ids if i >= OFFSET]
        decoded = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return " ".join(decoded.split())
