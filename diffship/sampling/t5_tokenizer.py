"""T5's tokenizer (Raffel et al. 2020; unigrams: Kudo 2018) through `tokenizers`, from tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tokenizers

from diffship.core.errors import SourceError
from diffship.sampling.tokenizer import Tokens, tokens_of, unseen

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
LENGTH = 256  # diffusers' `max_sequence_length` for Stable Diffusion 3
FILE = "tokenizer.json"


class T5Tokenizer:
    """At most `length` - 1 tokens of text, the end token, padding up to `length`; no start token."""

    def __init__(self, backend: tokenizers.Tokenizer, length: int = LENGTH) -> None:
        self._backend = backend
        self._backend.no_padding()
        self._backend.no_truncation()
        self.length = length
        self._end, self._pad = self._id(END), self._id(PAD)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str = "tokenizer", length: int = LENGTH) -> T5Tokenizer:
        """Of the contents of a tokenizer folder by file name.

        Raises:
            SourceError: there is no tokenizer.json, as in folders with a slow tokenizer alone, or it is not T5's.
        """
        require_fast(files, where)
        try:
            return cls(tokenizers.Tokenizer.from_str(files[FILE].decode("utf-8")), length)
        except SourceError:
            raise
        except Exception as fault:  # tokenizers raises bare Exception
            raise SourceError(f"{where}: is not a T5 tokenizer: {str(fault)[:200]}") from None

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids of each prompt, int64 (prompts, length), and what was cut off.

        Raises:
            ConfigError: a prompt is no string, or longer than the limit.
        """
        return tokens_of(prompts, self.length, self._row)

    def _row(self, prompt: str) -> tuple[list[int], str]:
        encoding = self._backend.encode(prompt, add_special_tokens=False)
        ids = [*encoding.ids[: self.length - 1], self._end]
        return ids + [self._pad] * (self.length - len(ids)), unseen(prompt, encoding, self.length - 1)

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise SourceError(f"the tokenizer has no token {token!r}, so it is not T5's")
        return int(found)


def require_fast(files: Mapping[str, bytes], where: str) -> None:
    """Raises SourceError, with the remedy, for a folder without tokenizer.json (SentencePiece's spiece.model alone)."""
    if FILE not in files:
        raise SourceError(
            f"{where}: has no {FILE}; a slow tokenizer (spiece.model) is not read. Convert it once with transformers: "
            f"T5TokenizerFast.from_pretrained(DIR).save_pretrained(DIR)"
        )
