"""Qwen's tokenizer (byte pairs; Bai et al. 2023, arXiv 2309.16609) through `tokenizers`, around a prompt as a message.

Qwen3 is a model of conversations: a prompt is put to it as what a user says, and the answer, without thinking, begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers

from diffship.core.errors import SourceError
from diffship.sampling.tokenizer import Tokens, check_prompt, special_token, tokenizer_table, unseen

FILE = "tokenizer.json"
LENGTH = 512  # diffusers' `max_sequence_length` for FLUX.2
START, STOP, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
BEFORE = f"{START}user\n"
AFTER = f"{STOP}\n{START}assistant\n<think>\n\n</think>\n\n"


class QwenTokenizer:
    """A prompt in its message, at most `length` tokens of it, padding up to `length`, and which of them are padding.

    What a prompt says of special tokens (`<|im_end|>`) is read as these tokens, as transformers reads it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, pad: str = PAD, length: int = LENGTH) -> None:
        self._backend = backend
        self._backend.no_padding()
        self._backend.no_truncation()
        self.length = length
        self._pad = self._id(pad)
        for mark in (START, STOP):
            self._id(mark)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str = "tokenizer", length: int = LENGTH) -> QwenTokenizer:
        """Of the contents of a tokenizer folder by file name.

        Raises:
            SourceError: there is no tokenizer.json, it is not Qwen's, or it pads on the left.
        """
        require_fast(files, where)
        side = tokenizer_table(files, "tokenizer_config.json").get("padding_side", "right")
        if side != "right":
            raise SourceError(f"{where}: padding_side is {str(side)[:20]!r}; legal is 'right'")
        try:
            pad, _ = special_token(files, "pad_token", PAD)
            return cls(tokenizers.Tokenizer.from_str(files[FILE].decode("utf-8")), pad, length)
        except SourceError:
            raise
        except Exception as fault:  # tokenizers raises bare Exception
            raise SourceError(f"{where}: is not a Qwen tokenizer: {str(fault)[:200]}") from None

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids of each prompt and their mask, int64 (prompts, length), and what was cut off.

        Raises:
            ConfigError: a prompt is no string, or longer than the limit.
        """
        shape = (len(prompts), self.length)
        ids, mask, told = np.full(shape, self._pad, np.int64), np.zeros(shape, np.int64), []
        for row, prompt in enumerate(map(check_prompt, prompts)):
            encoding = self._backend.encode(f"{BEFORE}{prompt}{AFTER}", add_special_tokens=False)
            count = min(len(encoding.ids), self.length)
            ids[row, :count], mask[row, :count] = encoding.ids[:count], 1
            told.append(unseen(f"{BEFORE}{prompt}{AFTER}", encoding, self.length))
        return Tokens(ids, tuple(dict.fromkeys(filter(None, told))), mask)

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise SourceError(f"the tokenizer has no token {token!r}, so it is not that of Qwen3")
        return int(found)


def require_fast(files: Mapping[str, bytes], where: str) -> None:
    """Raises SourceError, with the remedy, for a folder without tokenizer.json."""
    if FILE not in files:
        raise SourceError(
            f"{where}: has no {FILE}; vocab.json with merges.txt alone are not read. Convert them once with "
            "transformers: Qwen2TokenizerFast.from_pretrained(DIR).save_pretrained(DIR)"
        )
