"""CLIP's byte-pair tokenizer (Radford et al. 2021) through `tokenizers`, padded as the model's own config says."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, models, normalizers, pre_tokenizers

from diffship.core.errors import ConfigError, SourceError
from diffship.core.limits import LIMITS

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)
_FILE_BYTES = 32 << 20
_EXPANDED = 64  # times the characters of a prompt
_NO_LENGTH = 1_000_000  # transformers writes 10**30 where a tokenizer has no limit of its own
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True)
class Tokens:
    """`ids` int64 (prompts, tokens); `warnings` names what was cut off. `mask`, as `ids`, is 1 for tokens that are read
    and 0 for padding; None if a model reads its padding, too."""

    ids: NDArray[np.int64]
    warnings: tuple[str, ...] = ()
    mask: NDArray[np.int64] | None = None

    def feeds(self) -> dict[str, NDArray[np.int64]]:
        """What a text encoder takes, by name."""
        return {"input_ids": self.ids, **({} if self.mask is None else {"attention_mask": self.mask})}


class Tokenizer(Protocol):
    """Prompts to token ids."""

    def __call__(self, prompts: Sequence[str]) -> Tokens: ...


class ClipTokenizer:
    """Start token, at most 75 tokens of text, end token, padding up to 77.

    SD1.x pads with the end token; SD2's and SDXL's second tokenizer pad with "!" (id 0). `added` are the words of
    textual inversions; one of three vectors has the words `<toy>`, `<toy>_1`, `<toy>_2`, and its prompt says `<toy>`.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, pad_token: str = END, length: int = LENGTH, added: Sequence[str] = ()
    ) -> None:
        self._backend = backend
        self._backend.no_padding()
        self._backend.no_truncation()
        self.length = length
        self._start, self._end = self._id(START), self._id(END)
        self._pad = self._id(pad_token)
        self._added = added
        # as transformers: a special token counts wherever it stands in a prompt, "!" as SD2's padding included
        self._backend.add_special_tokens([START, END, pad_token])

    @classmethod
    def from_folder(cls, folder: str | Path) -> ClipTokenizer:
        """From a tokenizer folder: tokenizer.json, or vocab.json and merges.txt, and its config.

        Raises:
            SourceError: files are missing, too large or not a CLIP tokenizer.
        """
        return cls.from_files({n: _read(Path(folder) / n) for n in FILES if (Path(folder) / n).is_file()}, str(folder))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str = "tokenizer") -> ClipTokenizer:
        """As `from_folder`, from contents in memory by file name."""
        try:
            if "vocab.json" in files and "merges.txt" in files:
                backend = byte_pairs(json.loads(files["vocab.json"]), _pairs(files["merges.txt"].decode("utf-8")))
            elif "tokenizer.json" in files:
                backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
            else:
                raise SourceError(f"{where}: has neither tokenizer.json nor vocab.json with merges.txt")
            require_marks(files, where)
            added = added_tokens(files)
            add_tokens(backend, added)
            return cls(backend, pad_token(files), _length(files), [token.content for token in added])
        except SourceError:
            raise
        except Exception as fault:  # tokenizers raises bare Exception
            raise SourceError(f"{where}: is not a CLIP tokenizer: {str(fault)[:200]}") from None

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids of each prompt.

        Raises:
            ConfigError: a prompt is no string, or longer than the limit.
        """
        return tokens_of(prompts, self.length, self._row)

    def _row(self, prompt: str) -> tuple[list[int], str]:
        prompt = self.expanded(prompt)
        encoding = self._backend.encode(prompt, add_special_tokens=False)
        return self.framed(encoding.ids), unseen(prompt, encoding, self.length - 2)

    def framed(self, ids: Sequence[int]) -> list[int]:
        """At most 75 tokens of text with start, end and padding, 77 in all."""
        row = [self._start, *ids[: self.length - 2], self._end]
        return row + [self._pad] * (self.length - len(row))

    def groups(self, text: str) -> list[tuple[int, ...]]:
        """All tokens of a text, however many, without start, end and padding; the vectors of one textual inversion are
        one group, every other token stands alone.

        Raises:
            ConfigError: as `expanded`.
        """
        encoding = self._backend.encode(self.expanded(text), add_special_tokens=False)
        ids, words, found, place = encoding.ids, encoding.tokens, list[tuple[int, ...]](), 0
        while place < len(ids):
            further = self._further(words[place]) if words[place] in self._added else []
            end = place + 1 + (len(further) if words[place + 1 : place + 1 + len(further)] == further else 0)
            found.append(tuple(ids[place:end]))
            place = end
        return found

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, such as `cat</w>`; None if there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def token_of(self, number: int) -> str:
        """The token of an id, such as `cat</w>`; an empty text if there is none."""
        return self._backend.id_to_token(number) or ""

    def expanded(self, prompt: str) -> str:
        """`prompt` with each word of a textual inversion followed by the words of its further vectors, as diffusers'
        `maybe_convert_prompt` replaces them: wherever the word's letters stand, in those further words too.

        Raises:
            ConfigError: it gets longer than any prompt can be, for words that lie in each other.
        """
        if not self._added:
            return prompt
        for token in dict.fromkeys(self._backend.encode(prompt, add_special_tokens=False).tokens):
            if token in self._added:
                prompt = prompt.replace(token, " ".join([token, *self._further(token)]))
            if len(prompt) > _EXPANDED * LIMITS.prompt_chars:
                raise ConfigError(
                    f"the prompt gets {len(prompt)} characters from the words of textual inversions in it"
                )
        return prompt

    def _further(self, token: str) -> list[str]:
        names = itertools.takewhile(self._added.__contains__, (f"{token}_{i}" for i in itertools.count(1)))
        return list(names)

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise SourceError(f"the tokenizer has no token {token!r}")
        return int(found)


def tokens_of(prompts: Sequence[str], length: int, row: Callable[[str], tuple[list[int], str]]) -> Tokens:
    """Ids of all prompts, int64 (prompts, length), each warning once. `row` gives `length` ids of one prompt and what
    was cut off, an empty text if nothing was.

    Raises:
        ConfigError: a prompt is no string, or longer than the limit.
    """
    made = [row(check_prompt(prompt)) for prompt in prompts]
    told = tuple(dict.fromkeys(lost for _, lost in made if lost))
    return Tokens(np.array([ids for ids, _ in made], np.int64).reshape(len(made), length), told)


def unseen(prompt: str, encoding: tokenizers.Encoding, room: int) -> str:
    """A warning that names what of a prompt is beyond its first `room` tokens; empty if all of it fits."""
    if len(encoding.ids) <= room:
        return ""
    cut = prompt[encoding.offsets[room][0] :].strip()
    shown = cut if len(cut) <= 60 else cut[:57] + "..."
    return f"the prompt has {len(encoding.ids)} tokens, {room} are used; not seen by the model: {shown!r}"


def check_prompt(prompt: object, name: str = "prompt") -> str:
    """The prompt in NFC, lone surrogates replaced; at most `LIMITS.prompt_chars` characters.

    Raises:
        ConfigError: not a string, or too long.
    """
    if not isinstance(prompt, str):
        raise ConfigError(f"the {name} is a {type(prompt).__name__}; it must be text")
    if len(prompt) > LIMITS.prompt_chars:
        raise ConfigError(f"the {name} has {len(prompt)} characters; at most {LIMITS.prompt_chars} are allowed")
    legible = prompt.encode("utf-8", "replace").decode("utf-8")
    return unicodedata.normalize("NFC", legible)[: LIMITS.prompt_chars]


def _pairs(merges: str) -> list[tuple[str, str]]:
    lines = [line.split() for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
    return [(first, second) for first, second in lines]


def byte_pairs(vocab: Mapping[str, int], pairs: Iterable[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's normalisation, splitting and byte pairs, with no special tokens yet."""
    bpe: Any = models.BPE(
        vocab=dict(vocab), merges=list(pairs), continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
    )
    backend = tokenizers.Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


@dataclass(frozen=True)
class Added:
    """A token beyond the byte pairs, such as the word of a textual inversion. It is looked for in the text before that
    is split; in the lowercase text if `normalized`."""

    content: str
    id: int
    normalized: bool = True
    special: bool = False


def added_tokens(files: Mapping[str, bytes]) -> tuple[Added, ...]:
    """Those that a tokenizer has beyond its vocabulary, by id, from wherever transformers keeps them.

    Raises:
        SourceError: two of them have one id.
    """
    config = tokenizer_table(files, "tokenizer_config.json")
    fast = tokenizer_table(files, "tokenizer.json")
    plain = [] if "added_tokens_decoder" in config else list(tokenizer_table(files, "added_tokens.json").items())
    tables = [
        *({"content": content, "id": number} for content, number in plain),
        *fast.get("added_tokens", []),
        *({**token, "id": number} for number, token in config.get("added_tokens_decoder", {}).items()),
    ]
    vocabulary = tokenizer_table(files, "vocab.json") or fast.get("model", {}).get("vocab", {})
    found: dict[str, Added] = {}
    for table in tables:
        content, number = str(table["content"]), int(table["id"])
        if content not in vocabulary and content not in (START, END):
            special = bool(table.get("special", False))
            found[content] = Added(content, number, bool(table.get("normalized", not special)), special)
    if len({token.id for token in found.values()}) != len(found):
        raise SourceError(f"the tokenizer gives one id to several of its added tokens {', '.join(found)!r:.120}")
    return tuple(sorted(found.values(), key=lambda token: token.id))


def add_tokens(backend: tokenizers.Tokenizer, added: Sequence[Added]) -> None:
    """Give `backend` the tokens under the ids that they are to have.

    Raises:
        SourceError: an id is not the next free one, so a token of the model would be another one here.
    """
    for token in added:
        made = tokenizers.AddedToken(token.content, normalized=token.normalized, special=token.special)
        (backend.add_special_tokens if token.special else backend.add_tokens)([made])
        given = backend.token_to_id(token.content)
        if given != token.id:
            raise SourceError(f"the tokenizer's added token {token.content!r} has id {token.id}; here it gets {given}")


def pad_token(files: Mapping[str, bytes]) -> str:
    """What prompts are filled up with. The files of Stable Diffusion 2 differ: special_tokens_map.json says "!", as the
    model was trained, and tokenizer_config.json says END."""
    return special_token(files, "pad_token", END)[0]


def require_marks(files: Mapping[str, bytes], where: str) -> None:
    """Raises SourceError if prompts begin or end with other tokens than CLIP's."""
    for key, legal in (("bos_token", START), ("eos_token", END)):
        token, file = special_token(files, key, legal)
        if token != legal:
            raise SourceError(f"{where}: {key} of {file} is {token[:80]!r}; prompts are run with {legal!r}")


def special_token(files: Mapping[str, bytes], key: str, default: str) -> tuple[str, str]:
    """(token `key`, file that says so), as transformers reads it: special_tokens_map.json wins, but where
    tokenizer_config.json lists its added tokens."""
    config, table = "tokenizer_config.json", "special_tokens_map.json"
    names = (config,) if "added_tokens_decoder" in tokenizer_table(files, config) else (table, config)
    for name in names:
        token = tokenizer_table(files, name).get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token, name
    return default, config


def tokenizer_table(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in the file `name`; an empty one if there is no such file.

    Raises:
        SourceError: it holds something else.
    """
    found = json.loads(files.get(name, b"{}"))
    if not isinstance(found, dict):
        raise SourceError(f"{name} of the tokenizer is no JSON object")
    return found


def _length(files: Mapping[str, bytes]) -> int:
    length = tokenizer_table(files, "tokenizer_config.json").get("model_max_length", LENGTH)
    if not isinstance(length, int) or length < 3 or length > _NO_LENGTH:
        return LENGTH
    if length > LENGTH:
        raise SourceError(f"the tokenizer takes prompts of {length} tokens; text encoders of {LENGTH} are run here")
    return length


def _read(path: Path) -> bytes:
    if path.stat().st_size > _FILE_BYTES:
        raise SourceError(f"{path}: has {path.stat().st_size} bytes; at most {_FILE_BYTES} are read")
    return path.read_bytes()
