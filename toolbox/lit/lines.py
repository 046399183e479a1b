"""The shapes of rows with images that the commands read, and of the lines they write. No numpy, no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from toolbox.shell.records import Identifier, SharedTurn, Text
from toolbox.training.events import ResumeEvent


class ImageLink(msgspec.Struct):
    """An image as OpenAI's parts name it: a file name or a data URI, never an address."""

    url: str


class Part(msgspec.Struct, kw_only=True):
    """A piece of a message: text, or an image (its own, or the next of the row's ``images``)."""

    type: Literal["text", "image", "image_url"]
    text: str | None = None
    image: str | None = None
    image_url: ImageLink | str | None = None


class Turn(msgspec.Struct):
    """One turn; in a string ``<image>`` stands for the next image."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


Weight = Annotated[float, msgspec.Meta(gt=0)] | None


class Pictured(msgspec.Struct, kw_only=True):
    """What every row may carry beside its turns."""

    id: Identifier = None
    image: str | list[str] | None = None
    images: list[str] | None = None
    weight: Weight = None


class PicturedMessages(Pictured, kw_only=True):
    """Turns with roles."""

    needs: ClassVar[tuple[str, ...]] = ("messages",)
    messages: Annotated[list[Turn], msgspec.Meta(min_length=1)]


class PicturedConversation(Pictured, kw_only=True):
    """Turns with speakers, as in LLaVA."""

    needs: ClassVar[tuple[str, ...]] = ("conversations",)
    conversations: Annotated[list[SharedTurn], msgspec.Meta(min_length=1)]


class PicturedPair(Pictured, kw_only=True):
    """A prompt and its completion."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    prompt: Text
    completion: Text


class Captions(msgspec.Struct, kw_only=True):
    """An image with its captions, and perhaps the objects that are known to be in it."""

    needs: ClassVar[tuple[str, ...]] = ("image", "captions")
    image: Text
    captions: Annotated[list[Text], msgspec.Meta(min_length=1)]
    objects: list[str] | None = None
    id: Identifier = None
    weight: Weight = None


class Caption(msgspec.Struct, kw_only=True):
    """An image with one caption."""

    needs: ClassVar[tuple[str, ...]] = ("image", "caption")
    image: Text
    caption: Text
    objects: list[str] | None = None
    id: Identifier = None
    weight: Weight = None


TURNS: tuple[type[msgspec.Struct], ...] = (PicturedMessages, PicturedConversation, PicturedPair)
"""Conversations about images."""

CAPTIONS: tuple[type[msgspec.Struct], ...] = (Captions, Caption)
"""Images with captions."""


class Sentence(msgspec.Struct, kw_only=True):
    """A sentence of user turns and how often it occurs; ``template`` may be edited."""

    sentence: str
    count: int
    share_turns: float
    share_rows: float
    position: Literal["only", "first", "middle", "last"]
    neighbours: Annotated[int, msgspec.Meta(description="distinct sentences in the same turns")]
    template: bool
    example: Annotated[str, msgspec.Meta(description="id of the first row that has it")]


class ListedSentence(msgspec.Struct, kw_only=True):
    """A line of an edited list."""

    needs: ClassVar[tuple[str, ...]] = ("sentence",)
    sentence: Text
    template: bool = True


class Plan(msgspec.Struct, tag="plan", tag_field="event"):
    """``--dry-run``: what would be done."""

    command: str
    settings: dict[str, Any]


class Watched(msgspec.Struct):
    """Held-out rows: token means of −log p on either side."""

    n: int
    loss_response: float | None
    loss_instruction: float | None


class TuneStart(msgspec.Struct, tag="start", tag_field="event"):
    """First event: settings in force and counts."""

    command: str
    settings: dict[str, Any]
    rows: dict[str, int]
    supervised: dict[str, int]
    parameters: int
    trainable: int
    lr: float
    steps: int
    processes: int


class TuneStep(msgspec.Struct, tag="step", tag_field="event"):
    """One step. ``loss`` is what was minimised; the two others are plain token means and compare across modes."""

    step: int
    epoch: int
    lr: float
    loss: float
    loss_response: float | None
    loss_instruction: float | None
    n_response: int
    n_instruction: int
    tokens: int
    grad_norm: float
    seconds: float
    tokens_per_s: int


class TuneEval(msgspec.Struct, tag="eval", tag_field="event"):
    """The held-out rows after ``step`` steps."""

    step: int
    sets: dict[str, Watched]
    seconds: float


class TuneDone(msgspec.Struct, tag="done", tag_field="event"):
    """Last event."""

    model: str
    steps: int
    stopped: str
    loss: float
    loss_response: float | None
    loss_instruction: float | None
    before: dict[str, Watched]
    after: dict[str, Watched]
    seconds: float


EVENTS: tuple[type[msgspec.Struct], ...] = (Plan, TuneStart, TuneStep, TuneEval, ResumeEvent, TuneDone)


class Inspected(msgspec.Struct, kw_only=True):
    """A row and its tokens: how many of each kind, how many are learned from, and which."""

    id: str
    length: int
    counts: dict[str, int]
    supervised: int
    tokens: list[tuple[int, str, str, int]] | None = None


class Built(msgspec.Struct, tag="done", tag_field="event"):
    """The model that was put together: numbers by part, tokens an image."""

    parameters: int
    parts: dict[str, int]
    image_tokens: int


class Objects(msgspec.Struct, kw_only=True):
    """An image with its labelled objects."""

    needs: ClassVar[tuple[str, ...]] = ("image", "objects")
    image: Text
    objects: list[str]
    captions: list[str] | None = None
    id: Identifier = None


LABELLED: tuple[type[msgspec.Struct], ...] = (Objects, *CAPTIONS)
"""Images of which objects are known: as labels, or from captions."""


class Asked(msgspec.Struct, kw_only=True):
    """A question about an object in an image."""

    id: str
    image: str
    messages: list[Turn]
    answer: Literal["yes", "no"]
    object: str
    strategy: str


class Answered(msgspec.Struct, kw_only=True):
    """A question with its answer, or with those of several people."""

    needs: ClassVar[tuple[str, ...]] = ("answer",)
    answer: str | Annotated[list[str], msgspec.Meta(min_length=1)]
    id: Identifier = None


class Prediction(msgspec.Struct, kw_only=True):
    """What a model wrote for a row."""

    needs: ClassVar[tuple[str, ...]] = ("text",)
    text: str
    id: Identifier = None
    turn: int | None = None


class CompletionLine(msgspec.Struct, kw_only=True):
    """The same, as other tools name it."""

    needs: ClassVar[tuple[str, ...]] = ("completion",)
    completion: str
    id: Identifier = None
    turn: int | None = None


PREDICTIONS: tuple[type[msgspec.Struct], ...] = (Prediction, CompletionLine)
REFERENCES: tuple[type[msgspec.Struct], ...] = (Answered, *TURNS, *CAPTIONS)
"""What predictions are compared with."""


class ScoredRow(msgspec.Struct, kw_only=True):
    """What lit-eval --rows-out keeps of a row that a model was judged on: Σ log p of its answers, their tokens, VC."""

    needs: ClassVar[tuple[str, ...]] = ("log_p", "tokens")
    id: str
    log_p: float
    tokens: Annotated[int, msgspec.Meta(ge=1)]
    set: Literal["test", "train"] = "test"
    vc: float | None = None


class Figure(msgspec.Struct, kw_only=True):
    """One figure over ``n`` rows of ``images`` images, with its 95 % interval; what belongs to it stands beside."""

    metric: str
    value: float | None
    n: int
    images: int
    ci: tuple[float | None, float | None]


class Pictures(msgspec.Struct, kw_only=True):
    """An image, or several, with nothing said of them."""

    needs: ClassVar[tuple[str, ...]] = ("image",)
    image: str | Annotated[list[str], msgspec.Meta(min_length=1)]
    id: Identifier = None


class Asking(Pictured, kw_only=True):
    """A question without an answer."""

    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    prompt: Text


ASKABLE: tuple[type[msgspec.Struct], ...] = (*TURNS, *CAPTIONS, Asking, Pictures)
"""What can be answered."""


class Told(msgspec.Struct, kw_only=True):
    """An answer: to which user turn (from 0) of which row, its text, Σ log p and number of tokens (null where an
    endpoint or a stored response does not tell)."""

    id: str
    turn: int
    prompt: str
    text: str
    logprob: float | None
    tokens: int | None
    finish_reason: Literal["stop", "length", "error"]


class Origin(msgspec.Struct, kw_only=True):
    """Where a proposed row is from: the row whose image it is about, which proposal, Σ log p of question and answer."""

    source: str
    sample: int
    logprob_instruction: float | None
    logprob: float | None
    finish_reason: Literal["stop", "length", "error"]


class Proposed(msgspec.Struct, kw_only=True):
    """``--propose``: a conversation about an image, question and answer the model's own."""

    id: str
    image: str | None = None
    images: list[str] | None = None
    messages: list[Turn]
    lit: Origin
