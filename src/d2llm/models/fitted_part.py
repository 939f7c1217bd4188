"""What is fitted to a student after its training, each part with a file of its own in the student's folder.

A file names the student that it was fitted to, by fingerprint, and is refused beside another one. Vectors do not depend
on these parts, so an index is valid for the student with or without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from d2llm.core.errors import DataFormatError
from d2llm.core.files import write_json
from d2llm.core.json_values import parse_json
from d2llm.core.manifest import check_format_version
from d2llm.core.problems import describe_errors

FORMAT_VERSION = 1
_Part = TypeVar("_Part", bound="FittedPart")


class Widths(NamedTuple):
    """Widths of a student's arrays: of the vectors of texts, and of the backbone's states of tokens."""

    vectors: int
    states: int


class FittedValues(BaseModel):
    """Plain fitted values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FittedPart(FittedValues):
    """A part whose values are kept as JSON, beside its kind, the format, and the fingerprint of the student."""

    kind: ClassVar[str]
    file_name: ClassVar[str]
    without: ClassVar[str]
    """What the student does without it, for errors: "search without score features"."""

    @classmethod
    def read(cls: type[_Part], folder: Path, student: str, widths: Widths | None = None) -> _Part | None:
        """The part in the folder of the student with this fingerprint; None if there is no file.

        Raises:
            DataFormatError: the file is damaged, of another format version, another student's, or does not fit its
                widths.
        """
        path = folder / cls.file_name
        if not path.is_file():
            return None
        remedy = f"restore the student's folder, or delete the file and its name in the manifest to {cls.without}"
        try:
            content: dict[str, Any] = parse_json(path.read_bytes())
            owner, version, kind = (content.pop(name) for name in ("student", "format_version", "kind"))
            if kind != cls.kind:
                raise ValueError(f"its kind is {kind!r}, not {cls.kind!r}")
            check_format_version(path, version, FORMAT_VERSION)
            part = cls.model_validate(content)
        except ValidationError as error:
            raise DataFormatError(path, f"cannot be read ({describe_errors(error, cls)}); {remedy}") from error
        except KeyError as error:
            raise DataFormatError(path, f"cannot be read (it lacks {error}); {remedy}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DataFormatError(path, f"cannot be read ({error}); {remedy}") from error
        if owner != student:
            raise DataFormatError(path, f"was fitted to the student {owner}, but this one is {student}; {remedy}")
        if widths is not None and not part.fits(widths):
            raise DataFormatError(
                path, f"does not fit vectors of width {widths.vectors} and states of width {widths.states}; {remedy}"
            )
        return part

    def write(self, folder: Path, student: str) -> None:
        """Write the part into the folder of the student with this fingerprint, atomically."""
        head = {"format_version": FORMAT_VERSION, "student": student, "kind": self.kind}
        write_json(folder / self.file_name, head | self.model_dump(mode="json"))

    def fits(self, widths: Widths) -> bool:  # noqa: ARG002
        """Whether its arrays have the student's widths."""
        return True


class PassageQuality(FittedPart):
    """How likely a passage is to answer any query at all: w . y / |y| for its vector y; only differences mean anything.

    ``encode`` can leave out the passages of the lowest quality.

    It was fitted on passages of data sets, by name, of which some are relevant to a query. ``auc``: how often a
    relevant passage has a higher quality than another one of its data set, by fits that left both out; 0.5 is chance.
    """

    kind: ClassVar[str] = "quality"
    file_name: ClassVar[str] = "quality.json"
    without: ClassVar[str] = "go without quality"

    weights: tuple[float, ...]
    num_passages: dict[str, int]
    num_relevant: dict[str, int]
    auc: dict[str, float]

    def of(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """[n, dim] -> quality [n]."""
        return directions(vectors) @ np.array(self.weights)

    def fits(self, widths: Widths) -> bool:
        """Whether there is a weight for each number of a vector."""
        return len(self.weights) == widths.vectors


def directions(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Vectors [n, dim] with length 1; 0 stays 0."""
    exact = vectors.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.where(lengths > 0, lengths, 1.0)


class TermWeights(FittedPart):
    """How much each word of a query counts in BM25: max(floor, offset + w . x) for its state x.

    The state is the mean of those of the word's tokens in the query; the factor, the fraction of the relevant passages
    that can be expected to contain the word: one of which they have synonyms counts less than its rarity says. A search
    multiplies the word's idf by it, so exact searches stay exact and indexes stay as they are.

    Source: Dai and Callan, "Context-Aware Sentence/Passage Term Importance Estimation For First Stage Retrieval", 2019
    (arXiv 1910.10687): its DeepCT-Query, here on the states of a student that does not change. Factors of passages'
    words (DeepCT-Index) would need another index, and gained nothing beside vectors (docs/log).

    It was fitted on ``num_words`` words of queries of data sets, by name. ``explained`` is how much of the variance
    of the true fractions of each set the factors explain, by fits that left these queries out.
    """

    kind: ClassVar[str] = "term_weights"
    file_name: ClassVar[str] = "term_weights.json"
    without: ClassVar[str] = "weigh words by their rarity alone"

    weights: tuple[float, ...]
    offset: float
    usual: float
    """The factor of a word without a state, because the query was cut before it: the mean over the words of the fit."""
    floor: float = 0.05
    num_words: dict[str, int]
    explained: dict[str, float]

    def factors(self, states: NDArray[np.float32]) -> NDArray[np.float64]:
        """[n, dim] -> factors [n]."""
        return np.maximum(self.offset + states.astype(np.float64) @ np.array(self.weights), self.floor)

    def fits(self, widths: Widths) -> bool:
        """Whether there is a weight for each number of a state."""
        return len(self.weights) == widths.states
