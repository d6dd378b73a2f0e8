"""CLIP's tokenizer: lower-case text, byte-level pair encoding, `</w>` at the end of a word.

It needs the `tokenizers` package alone and gives the ids of transformers' `CLIPTokenizer`.

Shapes: b text, l position.
"""

import copy
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from digzsl_jax import files

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_PATTERN = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
            r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


class Tokenizer:
  """Texts to rows of ids: start, text, end, padding."""

  def __init__(self, backend: tokenizers.Tokenizer, *, length: int, bos: str = _START, eos: str = _END,
               pad: str = _END):
    """`backend` must know the tokens `bos`, `eos` and `pad`; `length` counts start and end."""
    # A saved tokenizer.json may pad or cut by itself; here that is done in one place.
    backend.no_padding()
    backend.no_truncation()
    self._backend = backend
    self._learnt = {}  # number of vectors by token
    self.length = length
    self.bos_id, self.eos_id, self.pad_id = (self._special(token) for token in (bos, eos, pad))

  @classmethod
  def from_folder(cls, folder: os.PathLike) -> "Tokenizer":
    """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`, and the two small config files beside them.

    Raises:
      ValueError: the folder holds neither layout, or a file is damaged.
    """
    folder = pathlib.Path(folder)
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
      if (folder / name).is_file():
        config |= _read_json(folder / name)
    token = lambda name, default: _content(config.get(f"{name}_token")) or default
    bos, eos, pad = token("bos", _START), token("eos", _END), token("pad", _END)
    if (folder / "tokenizer.json").is_file():
      backend = _parse(folder / "tokenizer.json", tokenizers.Tokenizer.from_file)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
      vocab, merges = _read_json(folder / "vocab.json"), _parse(folder / "merges.txt", _read_merges)
      backend = _backend(vocab, merges, bos, eos)
    else:
      raise ValueError(f"no tokenizer in {folder}: looked for tokenizer.json, or vocab.json and merges.txt")
    # transformers makes the padding token special, so that `!` in a text of Stable Diffusion 2 is padding.
    backend.add_special_tokens([pad])
    length = config.get("model_max_length", 77)
    # transformers writes 10**30 where no limit is known.
    return cls(backend, length=length if length < 10**6 else 77, bos=bos, eos=eos, pad=pad)

  @property
  def vocab_size(self) -> int:
    """How many ids there are, special and learnt tokens included."""
    return self._backend.get_vocab_size()

  def ids(self, text: str) -> list[int]:
    """Ids of a text of any length, without start and end."""
    found = self._encode(text).tokens if self._learnt else ()
    for token in self._learnt:
      if token in found:
        text = text.replace(token, " ".join(self._parts(token)))
    return self._encode(text).ids

  def _encode(self, text: str) -> tokenizers.Encoding:
    return self._backend.encode(text, add_special_tokens=False)

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """`ids_bl` (int32), every text cut and padded to `length`."""
    rows = [self._frame(self.ids(text)) for text in texts]
    return np.array(rows, np.int32).reshape(-1, self.length)

  def with_tokens(self, tokens: Mapping[str, int]) -> "Tokenizer":
    """A tokenizer that also knows learnt tokens, as `load_textual_inversion` of diffusers leaves transformers' own.

    A learnt token is split off before pair encoding, in any case and inside words too, the longest one first. Where a
    prompt has a token of several vectors, their ids stand side by side. As in diffusers this needs its exact spelling,
    in lower case: "<Bird>" for "<bird>", or a token that has capitals itself, stands for its first vector alone.

    Args:
      tokens: how many vectors each has; their ids follow the vocabulary in this order.

    Raises:
      ValueError: a name is empty or taken; three vectors of "<bird>" are called "<bird>", "<bird>_1" and "<bird>_2".
    """
    more = copy.deepcopy(self)
    more._learnt = self._learnt | tokens
    for token, count in more._learnt.items():
      taken = {f"{token}_{i}" for i in range(1, count + 1)} & more._learnt.keys()  # the next would run on from it
      if token in tokens:
        taken |= {part for part in more._parts(token) if not part or self._backend.token_to_id(part) is not None}
      if taken:
        raise ValueError(f"learnt token {token!r}: the name {min(taken)!r} is taken; rename the token")
    more._backend.add_tokens([part for token in tokens for part in more._parts(token)])
    return more

  def _parts(self, token: str) -> list[str]:
    """The names of a learnt token's vectors."""
    return [token, *(f"{token}_{i}" for i in range(1, self._learnt[token]))]

  def encode_with_slot(self, template: str, name: str, initial: str, vectors: int = 1) -> tuple[np.ndarray, int]:
    """Encodes a prompt in which positions are kept for a learnt class token.

    Args:
      template: as `prompts.check_template` has it, "a photo of {token} {name}".
      name: class name.
      initial: word that keeps the place: its id stands in every position of the token.
      vectors: number of the token's positions.

    Returns:
      `(ids_l, position)`: int32 ids with start, end and padding, and the token's first place among them.

    Raises:
      ValueError: no or several places for the token, an `initial` of several tokens, a token beyond the last position.
    """
    if template.count("{token}") != 1:
      raise ValueError(f"the template {template!r} must contain '{{token}}' exactly once")
    initial_ids = self.ids(initial)
    if len(initial_ids) != 1:
      raise ValueError(f"the initialiser {initial!r} is {len(initial_ids)} tokens; choose a word that is one")
    before, after = (self.ids(part.replace("{name}", name)) for part in template.split("{token}"))
    position = 1 + len(before)
    if position + vectors >= self.length:
      fewer = " or take fewer vectors" if vectors > 1 else ""
      raise ValueError(f"{{token}} of {template!r} with the name {name!r} falls at position {position + vectors - 1}, "
                       f"but a text has only {self.length}: shorten the template{fewer}")
    return np.array(self._frame(before + initial_ids * vectors + after), np.int32), position

  def _frame(self, ids: list[int]) -> list[int]:
    framed = [self.bos_id, *ids[:self.length - 2], self.eos_id]
    return framed + [self.pad_id] * (self.length - len(framed))

  def _special(self, token: str) -> int:
    number = self._backend.token_to_id(token)
    if number is None:
      raise ValueError(f"the tokenizer's vocabulary lacks its special token {token!r}")
    return number


def train_bpe(words: Iterable[str], folder: os.PathLike, *, length: int = 77) -> Tokenizer:
  """Writes a small tokenizer folder in which each word is one token, and any other text still encodes.

  The merges that a word still lacks are appended to the list. Merges are tried in order, so those of
  later words never get a turn inside an earlier word, and each word stays one token.

  Args:
    words: lower-case words, each without spaces, digits or marks beside letters.
    folder: gets both layouts, `vocab.json` + `merges.txt` and `tokenizer.json`, and their configs.
    length: ids per text.

  Returns:
    The tokenizer, as `Tokenizer.from_folder` reads it back.

  Raises:
    ValueError: a word that CLIP's rules would split or change.
  """
  alphabet = _byte_symbols()
  split = _backend({_START: 0, _END: 1}, [], _START, _END)
  merges = {}
  for word in sorted(set(words), key=lambda word: (len(word), word)):
    pieces = split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(word))
    if len(pieces) != 1 or split.normalizer.normalize_str(word) != word:
      raise ValueError(f"{word!r} cannot be one token: give lower-case words of letters alone")
    symbols = _merge([*pieces[0][0][:-1], pieces[0][0][-1] + _WORD_END], merges)
    while len(symbols) > 1:
      merges[symbols[0], symbols[1]] = len(merges)
      symbols = _merge(symbols, merges)
  tokens = [*alphabet, *(symbol + _WORD_END for symbol in alphabet), *map("".join, merges), _START, _END]
  vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
  _write_folder(pathlib.Path(folder), vocab, list(merges), length)
  return Tokenizer.from_folder(folder)


def _merge(symbols: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
  """Pair encoding: the earliest merge that applies, leftmost first, until none does."""
  symbols = list(symbols)
  while ranks := [(merges[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in merges]:
    i = min(ranks)[1]
    symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
  return symbols


def _byte_symbols() -> list[str]:
  """A printable character for each byte in the order of CLIP's vocabulary: printable bytes come first."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  return [*map(chr, printable), *(chr(256 + n) for n in range(256 - len(printable)))]


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]], bos: str,
             eos: str) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=eos, end_of_word_suffix=_WORD_END,
                                            continuing_subword_prefix="", fuse_unk=False))
  backend.normalizer = normalizers.Sequence(
      [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()])
  backend.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(_PATTERN), behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False)])
  backend.add_special_tokens([bos, eos])
  end, start = ((token, backend.token_to_id(token)) for token in (eos, bos))
  backend.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False,
                                                        add_prefix_space=False)
  return backend


def _write_folder(folder: pathlib.Path, vocab: dict[str, int], merges: list[tuple[str, str]],
                  length: int) -> None:
  special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
  config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  texts = {"vocab.json": json.dumps(vocab, ensure_ascii=False),
           "merges.txt": "\n".join(lines) + "\n",
           "special_tokens_map.json": json.dumps(special, indent=2),
           "tokenizer_config.json": json.dumps(config, indent=2),
           "tokenizer.json": _backend(vocab, merges, _START, _END).to_str(pretty=True)}
  for name, text in texts.items():
    files.write_text(folder / name, text)


def _read_merges(path: str) -> list[tuple[str, str]]:
  lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
  return [tuple(line.split()) for line in lines if line and not line.startswith("#version")]


def _parse(path: pathlib.Path, read):
  try:
    return read(str(path))
  except Exception as error:  # the Rust parser raises bare Exception
    raise ValueError(f"{path} is damaged ({error}): download it again") from error


def _read_json(path: pathlib.Path) -> dict:
  return _parse(path, lambda path: json.loads(pathlib.Path(path).read_text(encoding="utf-8")))


def _content(token: str | dict | None) -> str | None:
  """A special token is stored as its text or as an object with the text in it."""
  return token["content"] if isinstance(token, dict) else token
