"""The demo's workload: conversations about long documents, served turn by turn. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import final

from jaxkv.serving import LLMEngine, RequestMetrics, SamplingParams

_DOCUMENTS = {"Apache-2.0": "apache-2.0.txt", "GPL-3": "gpl-3.txt", "MPL-2.0": "mpl-2.0.txt"}
_QUESTIONS = (
    ("What does this license say about patents?", "And what happens if someone starts patent litigation?"),
    ("May I sell software under this license?", "What must I hand out together with the binaries?"),
)


Encode = Callable[[str], list[int]]
"""Token ids of a text, the model's start token first."""


@final
@dataclass(frozen=True, slots=True)
class Conversation:
    """One person's questions about one document. ``opening`` are the ids of the document."""

    name: str
    opening: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]


@final
@dataclass(frozen=True, slots=True)
class Turn:
    """One served request."""

    conversation: str
    number: int
    metrics: RequestMetrics
    output_ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """How tables and plots call it."""
        return f"{self.conversation}, turn {self.number}"


def make_conversations(encode: Encode, document_tokens: int) -> list[Conversation]:
    """Two people asking about each document; the documents cut to ``document_tokens`` tokens."""
    conversations = []
    for person, questions in zip("AB", _QUESTIONS, strict=True):
        for title, file in _DOCUMENTS.items():
            text = resources.files("jaxkv.cli").joinpath("documents", file).read_text()
            opening = tuple(encode(text)[:document_tokens])
            asked = tuple(tuple(_question_ids(encode, question)) for question in questions)
            conversations.append(Conversation(f"{title} {person}", opening, asked))
    return conversations


def _question_ids(encode: Encode, question: str) -> list[int]:
    return encode(f"\n\nQuestion: {question}\nAnswer:")[1:]


def longest_request(conversations: Sequence[Conversation], reply_tokens: int) -> int:
    """Tokens of the longest last turn, its reply included."""
    return max(
        len(talk.opening) + sum(len(question) + reply_tokens for question in talk.questions)
        for talk in conversations
    )


def num_turns(conversations: Sequence[Conversation]) -> int:
    """Requests the workload makes."""
    return sum(len(talk.questions) for talk in conversations)


def serve_turns(
    engine: LLMEngine, conversations: Sequence[Conversation], reply_tokens: int
) -> Iterator[Turn]:
    """Serve the first turn of every conversation, then the second of every one, and so on.

    A turn's prompt is the conversation so far: the document, the questions and the model's own replies.
    """
    params = SamplingParams(max_new_tokens=reply_tokens, ignore_eos=True)
    history = {talk.name: list(talk.opening) for talk in conversations}
    for index in range(max(len(talk.questions) for talk in conversations)):
        for talk in conversations:
            prompt = history[talk.name]
            prompt.extend(talk.questions[index])
            (output,) = engine.generate([prompt], params)
            prompt.extend(output.output_ids)
            yield Turn(talk.name, index + 1, output.metrics, output.output_ids)
