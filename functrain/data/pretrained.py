"""A tokenizer of transformers in the form that `functrain.data` needs, with its chat template."""

from __future__ import annotations

import datetime
import hashlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from functrain.checks import as_path
from functrain.data.tokenizers import utf8
from functrain.errors import DataError

_ASKED = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
_TEXTS = (".json", ".jinja", ".txt")


@attrs.frozen
class PretrainedTokenizer:
    """`inner`, a tokenizer of transformers, without special tokens around every text.

    `directory`: where it came from, for messages. `template_options`: what its chat template is
    given besides the messages, such as `{"enable_thinking": False}`. `today`: the date for
    templates that ask for it (those of Llama 3.2 and gpt-oss do); without it they get the current
    date, and the same records are other data on another day.
    """

    inner: Any = attrs.field(repr=False)
    directory: str = ""
    template_options: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True)
    today: datetime.date | None = attrs.field(default=None, kw_only=True)

    @property
    def vocabulary(self) -> int:
        """The number of token ids, added ones included."""
        return len(self.inner)

    @property
    def end(self) -> int:
        """The id of its `eos_token`; `DataError` where it has none."""
        found = self.inner.eos_token_id
        if found is None:
            raise DataError(
                f"tokenizer: {self.directory or type(self.inner).__name__} has no eos_token, which "
                "ends a document or a completion; set tokenizer.inner.eos_token"
            )
        return int(found)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; a special token that is written in it becomes that token.

        Raises `DataError` for a text with a lone surrogate.
        """
        utf8(text)  # tokenizers say only that it is not a text
        return list(self.inner.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def count_bytes(self, ids: Iterable[int]) -> int:
        """How many bytes of UTF-8 the text of ids has, without special tokens.

        For a byte-level tokenizer this is exact even where ids begin or end within a character;
        `decode` would make U+FFFD, three bytes, of each piece of one.
        """
        given = list(ids)
        rust = getattr(self.inner, "backend_tokenizer", None)
        if type(getattr(rust, "decoder", None)).__name__ != "ByteLevel":
            return len(self.decode(given).encode())
        # A piece has one letter for each of its bytes; added tokens are written as they are.
        added = self.inner.added_tokens_decoder
        said = [added[i].content for i in given if i in added and not added[i].special]
        pieces = self.inner.convert_ids_to_tokens([i for i in given if i not in added])
        return sum(len(text.encode()) for text in said) + sum(map(len, filter(None, pieces)))

    @property
    def template(self) -> str | None:
        """Its chat template (Jinja); the default one where it has several."""
        found = self.inner.chat_template
        if isinstance(found, Mapping):
            found = found.get("default")
        return found if isinstance(found, str) else None

    @property
    def told(self) -> dict[str, Any]:
        """What `apply_chat_template` is given besides the messages, the date included.

        Raises `DataError` for a template that asks for the date in a format that it computes.
        """
        day, template = self.today, self.template or ""
        if day is None or "strftime_now(" not in template:
            return dict(self.template_options)
        # transformers gives a template no functions of ours: the date is written into it.
        dated = _ASKED.sub(lambda asked: repr(day.strftime(asked[2])), template)
        if "strftime_now(" in dated:
            raise DataError(
                "chat template: asks for the day in a form that is not a text; leave out today, or "
                "give the tokenizer a template that does not ask"
            )
        return {**self.template_options, "chat_template": dated}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: bool = False,
    ) -> str:
        """The messages in the chat template; with `prompt`, up to where the assistant would speak.

        Raises `DataError` where there is no template, where the template refuses the messages, and
        for a lone surrogate.
        """
        from jinja2.exceptions import TemplateError

        if self.template is None:
            raise DataError(
                f"tokenizer: {self.directory or type(self.inner).__name__} has no chat template; "
                "set tokenizer.inner.chat_template, or give prompts and completions as texts"
            )
        options = {**self.told, "tokenize": False, "add_generation_prompt": prompt}
        try:
            text = str(self.inner.apply_chat_template(list(messages), tools=tools, **options))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            # Besides what a template refuses itself: an object, such as a tool's arguments, that it
            # adds to a text.
            raise DataError(f"chat template: refuses the messages: {error}") from error
        utf8(text)
        return text

    def generated(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None
    ) -> tuple[list[int], list[int]]:
        """The ids of messages in the template, each with whether `{% generation %}` marks it."""
        found: Any = self.inner.apply_chat_template(
            list(messages),
            tools=tools,
            **self.told,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(found["input_ids"]), list(found["assistant_masks"])

    def spell(self, ids: Sequence[int]) -> str:
        """The text of ids, with special tokens as they are written."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.inner.decode(list(ids), **options))

    def files(self) -> dict[str, str]:
        """Its files by name, to store beside a checkpoint; only UTF-8 text is included."""
        with tempfile.TemporaryDirectory() as directory:
            self.save(Path(directory))
            paths = sorted(path for path in Path(directory).iterdir() if path.suffix in _TEXTS)
            return {path.name: path.read_bytes().decode() for path in paths}

    @property
    def fingerprint(self) -> str:
        """A hash of all its files, which differs where ids do.

        It ignores the truncation and padding that its files may ask for: `encode` does neither, and
        its first call removes them.
        """
        hasher = hashlib.sha256()
        if getattr(self.inner, "split_special_tokens", False):  # in none of its files
            hasher.update(b"split_special_tokens\0")
        with tempfile.TemporaryDirectory() as directory:
            self.inner.save_pretrained(directory)
            rust = getattr(self.inner, "backend_tokenizer", None)
            if getattr(rust, "truncation", None) or getattr(rust, "padding", None):
                _uncut(Path(directory) / "tokenizer.json")
            for path in sorted(Path(directory).rglob("*")):
                if path.is_file():
                    content = hashlib.sha256(path.read_bytes()).hexdigest()
                    hasher.update(f"{path.relative_to(directory)}\0{content}\0".encode())
        return hasher.hexdigest()

    def save(self, directory: Path) -> None:
        """Write its files into a directory, as transformers reads them, without subdirectories."""
        several = isinstance(getattr(self.inner, "chat_template", None), Mapping)
        # In a file each, all chat templates but the default one would be in a subdirectory.
        options = {"save_jinja_files": False} if several else {}
        self.inner.save_pretrained(str(directory), **options)


def _uncut(path: Path) -> None:
    """Take truncation and padding out of a tokenizer.json."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(path))
    found.no_truncation()
    found.no_padding()
    found.save(str(path))


def pretrained_tokenizer(path: str | Path) -> PretrainedTokenizer:
    """The tokenizer in a local directory of Hugging Face's, or in a GGUF file.

    Raises `DataError` where there is none that transformers can read, and where transformers is not
    installed. Nothing is fetched.
    """
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: tokenizers are read with {error.name}, which is not installed: "
            "pip install 'functrain[hf]'"
        ) from error
    given = as_path("path", path)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if given.suffix == ".gguf":
        options["gguf_file"], given = given.name, given.parent
    try:
        inner: Any = AutoTokenizer.from_pretrained(str(given), **options)
    except Exception as error:  # tokenizers raises its own errors as plain Exceptions
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise DataError(
            f"{path}: no tokenizer that transformers reads ({reason[0][:200]}); expected "
            "tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    return PretrainedTokenizer(inner, str(path))
