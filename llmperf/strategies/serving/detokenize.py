"""Token ids → text, a piece at a time, never cutting a character in two."""

from __future__ import annotations

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character
PATIENCE = 8  # ids to wait for a character's end; UTF-8 needs 4 bytes at most, so this is no text


class Detokenizer:
    """Feed it ids, get the text that has become certain.

    A token may hold a part of a character, and what a token reads like may depend on the one before
    it (a leading space). So a few earlier ids are decoded along and their text is cut off again, as
    vLLM and text-generation-inference do.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # ids whose text is already out
        self._pending: list[int] = []  # ids whose text is not

    def add(self, id: int) -> str:
        """The text that this id completes; empty while a character is still open."""
        self._pending.append(id)
        text = self._text()
        if not text or (text.endswith(REPLACEMENT) and len(self._pending) < PATIENCE):
            return ""
        return self._out(text)

    def flush(self) -> str:
        """What is left at the end; an unfinished character shows as the replacement character."""
        return self._out(self._text()) if self._pending else ""

    def _text(self) -> str:
        known = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(known) :]

    def _out(self, text: str) -> str:
        self._context, self._pending = self._pending, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
