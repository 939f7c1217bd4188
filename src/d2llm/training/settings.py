"""Settings of the verbs ``fit-scores`` and ``ablate``: the same in Python and on the command line."""

from __future__ import annotations

from typing import ClassVar

from d2llm.core.settings import Settings, Shown, setting

DEV_QUERIES = 500
"""Maximum number of dev queries of each data set that every run of an ablation is measured on."""
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


class AblationSettings(Settings):
    """What to train beside a recipe, and for how long.

    Example:
        >>> from d2llm.training.settings import AblationSettings
        >>> AblationSettings(variants="cosine", num_seeds=1).variants
        ('cosine',)
    """

    noun: ClassVar[str] = "setting of an ablation"

    variants: tuple[str, ...] | None = setting(
        None,
        "Names of variants to train; without, all that the recipe can have.",
        Shown(python_only=True),
        strict=False,
    )
    num_seeds: int = setting(
        3, "Number of seeds, counting up from the recipe's, for intervals.", Shown(option="seeds"), ge=1
    )
    max_queries: int | None = setting(
        None, "Train on a random sample of so many queries of each plan.", Shown(default="all"), ge=1
    )
    epochs: int | None = setting(None, "Epochs of each run.", Shown(default="the recipe's, or 1 with halving"), ge=1)
    halving: bool = setting(False, "Train the better half again with twice the epochs, until one is left.")
    budget_minutes: float | None = setting(
        None,
        "Start no run after this many minutes; the same call continues later. 0 shows the results so far.",
        Shown(default="no limit"),
        ge=0,
    )
    dev_queries: int = setting(
        DEV_QUERIES, "Measure on so many dev queries of each data set, a fixed sample.", Shown(python_only=True), ge=1
    )
