"""The documents of one source as ids, tokenised some ahead, because a tokenizer is faster at many texts than at one.

What was read ahead is never part of a state: a run that resumes reads it again. An error met ahead is raised when its document's turn
has come, so that whatever stands before it is still trained on. Records whose text the tokenizer makes nothing of are bad ones, and are
left out or refused as such (--on-bad-record).
"""

import logging
from collections import deque
from typing import NamedTuple

from tasks.encoding import Encoded, Encoder
from tasks.examples import BadRecordError
from tasks.readers import Document, Documents
from user_error import UserError

AHEAD_DOCUMENTS = 64
AHEAD_CHARS = 2**17

logger = logging.getLogger(__name__)


class EncodedDocument(NamedTuple):
    """A document's ids and where it stood, at or after the place asked for; num_skipped as in tasks/readers.py."""

    pass_index: int
    position: int
    encoded: Encoded
    num_skipped: int


class EncodedDocuments:
    """What tasks/packing.py takes documents from. Used by one thread at a time."""

    def __init__(self, documents: Documents, encoder: Encoder) -> None:
        self.name = documents.name
        self._documents, self._encoder = documents, encoder
        self._ahead: deque[tuple[tuple[int, int], Document, Encoded | BadRecordError]] = deque()  # by the place that was asked for
        self._num_apart, self._is_apart_said, self._apart_pass = 0, False, 0

    def next_good(self, pass_index: int, position: int) -> EncodedDocument:
        """The first good document at or after this place, in a later pass if need be. Raises UserError as Documents.next_good does."""
        asked, num_skipped, num_bad = (pass_index, position), 0, 0
        while True:
            document, encoded = self._at(*asked)
            num_skipped += document.num_skipped
            if isinstance(encoded, Encoded):
                self._count_apart(document.pass_index, encoded)
                return EncodedDocument(document.pass_index, document.position, encoded, num_skipped)
            self._documents.leave_out(document.where, encoded)
            num_skipped, num_bad = num_skipped + 1, num_bad + 1
            if document.pass_index > pass_index + 1:
                raise UserError(
                    f"A data file must hold at least one record that is good; {self.name}: {num_bad} in a row are not; the last one, "
                    f"{document.where}: {encoded}. Look at its records, or take it off the list."
                )
            asked = (document.pass_index, document.position + 1)

    def _at(self, pass_index: int, position: int) -> tuple[Document, Encoded | BadRecordError]:
        asked = (pass_index, position)
        if not self._ahead or self._ahead[0][0] != asked:
            self._read_ahead(asked)
        _, document, encoded = self._ahead.popleft()
        return document, encoded

    def _read_ahead(self, asked: tuple[int, int]) -> None:
        self._ahead.clear()
        places: list[tuple[int, int]] = []
        documents: list[Document] = []
        num_chars = 0
        while len(documents) < AHEAD_DOCUMENTS and num_chars < AHEAD_CHARS:
            try:
                document = self._documents.next_good(*asked)
            except UserError:
                if not documents:
                    raise
                break  # met again when its turn has come
            places.append(asked)
            documents.append(document)
            for piece in document.example.pieces:
                num_chars += len(piece.text)
            asked = (document.pass_index, document.position + 1)
        self._ahead.extend(zip(places, documents, self._encoder.encode([document.example for document in documents]), strict=True))

    def _count_apart(self, pass_index: int, encoded: Encoded) -> None:
        """Says once that there are such documents, and at the end of the pass how many."""
        if pass_index != self._apart_pass and self._num_apart > 1 and not self._is_apart_said:
            logger.info("%s: %d documents of pass %d were tokenised piece by piece", self.name, self._num_apart, self._apart_pass + 1)
            self._is_apart_said = True
        if not encoded.is_apart:
            return
        self._apart_pass = pass_index
        self._num_apart += 1
        if self._num_apart == 1:
            logger.warning(
                "%s: the tokenizer merges across the boundary of prompt and completion; such documents are tokenised piece by piece, so "
                "that exactly the completion is learnt",
                self.name,
            )
