"""Settings of the verb ``fit-scores``: the same in Python and on the command line."""

from __future__ import annotations

from typing import ClassVar

from d2llm.core.settings import Settings, Shown, setting

LISTED_PASSAGES = 2_000
"""Passages of each data set that the weights of a score are fitted on, if they are not said."""


class FitScoresSettings(Settings):
    """What to fit, on how much.

    Example:
        >>> from d2llm.training.settings import FitScoresSettings
        >>> FitScoresSettings(quality=True)
        FitScoresSettings(quality=True)
    """

    noun: ClassVar[str] = "setting of fit-scores"

    num_queries: int = setting(200, "Dev queries of each data set, at most.", Shown(option="queries"), ge=1)
    words: bool = setting(
        True, "Also fit the weight of words (BM25) in the score of an index.", Shown(option="words/--no-words")
    )
    words_factor: bool | None = setting(
        None,
        "With --words: their weight depends on how many words a query has, how rare they are, and how near the nearest "
        "passage is.",
        Shown(option="words-factor/--no-words-factor", default="if that is better on dev"),
    )
    window_vectors: bool = setting(
        True,
        "With --words: also fit the weight of vectors of each two sentences; indexing then takes longer.",
        Shown(option="window-vectors/--no-window-vectors"),
    )
    token_vectors: bool | None = setting(
        None,
        "With --words: also fit the weight of the token embeddings.",
        Shown(option="token-vectors/--no-token-vectors", default="if the student has them"),
    )
    quality: bool = setting(
        False, "Also fit which passages answer queries at all, on train judgements, for encode --prune."
    )
    term_weights: bool = setting(False, "First fit how much each word of a query counts in BM25, on train judgements.")
    document_expansion: bool = setting(
        False,
        "First fit, on train judgements, which words passages lack that queries for them have; new indexes add the "
        "likeliest ones to each passage, for BM25 alone.",
    )
    learned_words: str | None = setting(
        None,
        "A student with the pooling splade, whose words new indexes have beside those of texts.",
        Shown(metavar="STUDENT"),
    )
    num_passages: int = setting(
        LISTED_PASSAGES, "Passages of each data set to encode, at least.", Shown(python_only=True), ge=1
    )
    seed: int = setting(0, "Seed of the choice of queries and passages.", ge=0)

    @property
    def needs_train(self) -> bool:
        """Whether something is fitted on the train split."""
        return self.quality or self.term_weights or self.document_expansion
