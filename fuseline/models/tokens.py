"""A tokenizer for models that have none: one token a byte."""

from __future__ import annotations


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255. Ids of 256 and above, which a model may emit, decode to nothing."""

    vocabulary = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= int(i) < self.vocabulary).decode("utf-8", errors="replace")
