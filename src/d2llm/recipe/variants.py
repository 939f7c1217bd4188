"""Named variants of a recipe: the baselines for a student, and the ablations.

Source of the ablations in the group ``published``: Liao et al., "D2LLM", ACL 2024, section 4.4. Those in the group
``losses`` replace a recipe's imitation by one loss that others published (``ops.losses`` names the papers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from d2llm.core.errors import RecipeError
from d2llm.core.names import suggestion
from d2llm.recipe import ChangedPooling, Pooling, Recipe
from d2llm.recipe.recipe import parse_recipe

VariantGroup = Literal["baseline", "published", "losses", "own"]
_Group = Mapping[str, tuple[str, Mapping[str, Any]]]  # name -> title and settings
_Change = Mapping[str, Any] | Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """One named change of a recipe: ``settings`` override the recipe's own, section by section.

    A function in their place makes a section from the recipe's own.
    ``imitation``, if any, replaces all that imitates a teacher; of labelled pairs too, if it is empty. ``before`` has
    the changes that come first.
    """

    name: str
    group: VariantGroup
    title: str
    settings: Mapping[str, Any]
    imitation: Mapping[str, Any] | None = None
    before: Variant | None = None

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with this change, named after both.

        Raises:
            RecipeError: the changed recipe is not valid.
        """
        name = f"{recipe.name}-{self.name}"
        if self.before is not None:
            recipe = self.before.apply(recipe)
        losses = recipe.losses
        if self.imitation is not None:
            losses = losses.with_imitation(self.imitation, of_pairs=not self.imitation)
        losses = losses.with_losses(self.settings.get("losses", {}))
        others = {section: value for section, value in self.settings.items() if section != "losses"}
        changed = _overlaid(recipe.model_dump(), others) | {"losses": losses}
        return parse_recipe(changed | {"name": name}, where=f"variant '{self.name}'")


def find_variant(name: str) -> Variant:
    """The variant of this name; ``a+b`` has the change of ``a``, and then that of ``b``.

    Raises:
        RecipeError: there is no such variant (the closest name is suggested).
    """
    first, _, last = name.rpartition("+")
    if last not in VARIANTS:
        raise RecipeError(f"no variant '{last}'; {suggestion(last, VARIANTS, 'there are')}")
    if not first:
        return VARIANTS[last]
    before = find_variant(first)
    return replace(VARIANTS[last], name=name, title=f"{before.title}; {VARIANTS[last].title}", before=before)


def _overlaid(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values with these changes. Another kind replaces a section; settings that its own kind lacks are left out."""
    if changes.get("kind", values.get("kind")) != values.get("kind"):
        return dict(changes)
    result = dict(values)
    for key, change in changes.items():
        if "kind" in values and key not in values:
            continue
        before = result[key]
        if callable(change):
            result[key] = change(before)
            continue
        are_sections = isinstance(change, Mapping) and isinstance(before, Mapping)
        result[key] = _overlaid(before, change) if are_sections else change
    return result


def _weightless(pooling: Any) -> Pooling:
    """The pooling without PMA, and without what changes its vectors."""
    return Pooling.of(pooling).weightless


def _narrow(pooling: Any) -> Pooling:
    """Vectors of 128 dimensions by a projection of the pooling without PMA."""
    return Pooling.of({"kind": "projection", "dim": 128, "pooling": _weightless(pooling)})


def _with_weightless(pooling: Any, kind: str) -> Pooling:
    """The pooling with another one in place of the backbone's own."""
    pooling = Pooling.of(pooling)
    if not isinstance(pooling, ChangedPooling):
        return Pooling.of(kind)
    return pooling.model_copy(update={"pooling": _with_weightless(pooling.pooling, kind)})


def _with_pma(pooling: Any, /, **changes: Any) -> Pooling:
    """The pooling with these settings of PMA, if it has PMA."""
    pooling = Pooling.of(pooling)
    if pooling.kind == "pma":
        return pooling.model_copy(update=changes)
    if not isinstance(pooling, ChangedPooling):
        return pooling
    return pooling.model_copy(update={"pooling": _with_pma(pooling.pooling, **changes)})


def _pma_beside(pooling: Any, weightless: Pooling) -> Pooling:
    """Its PMA beside another pooling; that pooling alone if there is no PMA."""
    pma = next((stage for stage in Pooling.of(pooling).stages if stage.kind == "pma"), None)
    return weightless if pma is None else pma.model_copy(update={"pooling": weightless, "warm_start": True})


def _whitened(pooling: Any) -> Pooling:
    return Pooling.of({"kind": "whitening", "pooling": _weightless(pooling)})


_COSINE = {"interaction": {"head": "cosine"}}
_FOUR_LAYERS = {"backbone": {"layers": (0, 1, 4, 5)}}
_NO_PMA = {"pooling": _weightless}
_NARROW = {"pooling": _narrow}
_NO_SCORE_FEATURES = {
    "bm25": False,
    "window_bm25": False,
    "window_vectors": False,
    "maxsim": False,
    "in_training": False,
}
_NOT_NESTED = {"nested_cross_entropy": 0.0}  # the head 'paper' has no inner product, and two heads have two
_PLAIN_LOSSES = {
    "in_batch_cross_entropy": 1.0,
    "dot_cross_entropy": 0.0,
    "token_cross_entropy": 0.0,
    "pair_cross_entropy": {"weight": 1.0, "dot": 0.0},
    "soft_expansion": 0.0,
}


def _student(**sections: _Change) -> dict[str, Any]:
    return {"student": sections}


def _pretrained(*stages: Any, **student: Any) -> dict[str, Any]:
    backbone = {"tuning": {"adapters": "one"}, **student.pop("backbone", {})}
    return {"training": {"pretraining": stages, "start": None}} | _student(backbone=backbone, **student)


def _without(*losses: str) -> dict[str, Any]:
    return {"losses": dict.fromkeys(losses, 0.0)}


def _only(**losses: Any) -> dict[str, Any]:
    """Imitation by these losses alone; labelled pairs, for which none of them is, keep the teacher's weight."""
    return {"imitation": losses}


_BASELINES: _Group = {
    "cosine": (
        "tuned cosine: the plain bi-encoder",
        _student(**_COSINE, **_NO_PMA)
        | {"imitation": {}, "losses": _PLAIN_LOSSES, "score_features": _NO_SCORE_FEATURES},
    ),
    "paper": (
        "the published head: concatenated vectors, no inner product",
        # Five times the rate of the dot head: that one starts as a cosine, this one from random weights.
        _student(interaction={"head": "paper", "features": "concat"})
        | {"training": {"head_learning_rate": 1e-3}, "score_features": _NO_SCORE_FEATURES, "losses": _NOT_NESTED},
    ),
}
_PUBLISHED: _Group = {
    "without-ci": ("without contrastive imitation", _without("contrastive_imitation")),
    "without-ph": ("without rank imitation, positives and hard", _without("rank_imitation_positive_hard")),
    "without-hi": ("without rank imitation, hard over easy", _without("rank_imitation_hard_easy")),
    "without-fi": ("without feature imitation", _without("feature_imitation")),
    "mean-pooling": ("mean of the tokens instead of PMA", _student(pooling={"kind": "mean"})),
    "last-pooling": ("last token instead of PMA", _student(pooling={"kind": "last"})),
    "cosine-for-iem": (
        "cosine instead of the IEM, same losses",
        _student(**_COSINE) | {"losses": {"subclass_imitation": 0.0}},  # it has no features of pairs
    ),
    "one-branch": ("one branch of the IEM for both tasks", _student(interaction={"branches": "shared"})),
}
_LOSSES: _Group = {
    "list-imitation": ("imitation: the teacher's distribution over the list", _only(list_imitation=0.5)),
    "recalibrated-imitation": (
        "imitation: the same, replaced by the judgements where the teacher is unsure (FerKD)",
        _only(recalibrated_imitation=0.5),
    ),
    "weighted-imitation": (
        "imitation: the same, weighted by how far the teacher agrees with the data (DistillWeighted)",
        _only(weighted_imitation=0.5),
    ),
    "score-regression": ("imitation: the teacher's scores (DSE)", _only(score_regression=0.02)),
    "margin-mse": ("imitation: the teacher's margins (Margin-MSE)", _only(margin_mse=0.02)),
    "listmle": ("imitation: the teacher's order, one after the other (ListMLE)", _only(listmle=0.5)),
    "plackett-luce": (
        "imitation: the relevant first, then the teacher's order, weighted by the teacher (PLD)",
        _only(plackett_luce=0.5),
    ),
    "ranknet": ("imitation: the teacher's order, two at a time (RankNet)", _only(ranknet=1.0)),
    "lambdarank": ("imitation: the same, weighted by nDCG (LambdaRank)", _only(lambdarank=1.0)),
    "sinkhorn": ("imitation: transport distance to the teacher's distribution (SinKD)", _only(sinkhorn=0.5)),
    "in-batch-imitation": (
        "imitation: a live student's scores of all pairs of a batch (TCT-ColBERT)",
        _only(in_batch_imitation={"weight": 0.5, "teacher": "d2llm-minilm"}),
    ),
}
_OWN: _Group = {
    "weighted-mean-pooling": (
        "mean of the tokens, later ones counting more (SGPT), instead of PMA",
        _student(pooling={"kind": "weighted_mean"}),
    ),
    "nested-dims": (
        "head `dot`, the first components of the vectors trained as vectors (Matryoshka)",
        _student(interaction={"head": "dot"})
        | {"losses": {"nested_cross_entropy": {"dims": (64, 128, 256)}}, "training": {"dual_head": False}},
    ),
    "nested-depths": (
        "head `dot`, the vectors after 2 and 4 layers trained as vectors (2D Matryoshka)",
        _student(interaction={"head": "dot"})
        | {"losses": {"nested_cross_entropy": {"layers": (2, 4)}}, "training": {"dual_head": False}},
    ),
    "sampled-depths": (
        "the same, one depth a step, aligned with the last layer (2D Matryoshka as published)",
        _student(interaction={"head": "dot"})
        | {
            "losses": {"nested_cross_entropy": {"layers": (1, 2, 3, 4, 5), "sampled": True, "alignment": 1.0}},
            "training": {"dual_head": False},
        },
    ),
    "relabelled": (
        "no judgements: the teacher chooses each query's positive and its hard negative, the worst (Gecko)",
        _only(relabelled_cross_entropy=1.0) | {"losses": {"in_batch_cross_entropy": 0.0}},
    ),
    "relabelled-others": (
        "the same, the hard negative drawn among all others",
        _only(relabelled_cross_entropy={"weight": 1.0, "negatives": "others"})
        | {"losses": {"in_batch_cross_entropy": 0.0}},
    ),
    "subclass-imitation": (
        "imitation: the teacher's distribution, and finer classes from its features (LELP)",
        _only(list_imitation=0.5, subclass_imitation=1.0),
    ),
    "dual-head": (
        "judgements and teacher learnt by heads of their own, combined at the end (DHO)",
        _student(interaction={"head": "dot"})
        | _only(list_imitation=0.5)
        | {"losses": _NOT_NESTED, "training": {"dual_head": True}},
    ),
    "two-adapters": (
        "queries and passages read with adapters of their own (Semi-Siamese)",
        _student(backbone={"tuning": {"kind": "lora", "adapters": "two"}}) | {"training": {"pretraining": ()}},
    ),
    "angular-margin": (
        "positives above the rest by an angle alone (CoRT's loss)",
        _student(**_COSINE)
        | {"imitation": {}, "losses": {**_PLAIN_LOSSES, "in_batch_cross_entropy": 0.0, "angular_margin": 1.0}},
    ),
    "passage-contrast": (
        "judgements alone, and positives away from hard negatives (PAIR)",
        _student(**_COSINE)
        | {"imitation": {}, "losses": {**_PLAIN_LOSSES, "in_batch_cross_entropy": 0.9, "passage_contrast": 0.1}},
    ),
    "word-imitation": (
        "half judgements, half imitation of BM25 (SPAR)",
        _student(**_COSINE)
        | {"imitation": {}, "losses": {**_PLAIN_LOSSES, "in_batch_cross_entropy": 0.5, "word_imitation": 0.5}},
    ),
    "mixed-negatives": (
        "judgements alone, with negatives mixed from two hard ones (KaLM-Embedding-V2)",
        _student(**_COSINE)
        | {"imitation": {}, "losses": {**_PLAIN_LOSSES, "in_batch_cross_entropy": 0.0, "mixed_negatives": 1.0}},
    ),
    "focal": (
        "judgements alone, those that are not learnt yet counting more (KaLM-Embedding-V2)",
        {"imitation": {}, "losses": {"in_batch_cross_entropy": {"focus": 0.5}}},
    ),
    "clustered": (
        "batches of queries that are alike (Contextual Document Embeddings)",
        {"training": {"clustered": True}},
    ),
    "complement-words": (
        "trained on what BM25 gets wrong among its first 20 (CoRT)",
        {"training": {"complement_words": 20, "remine": False}, "mining": {"sources": ("bm25", "encoder")}},
    ),
    "soft-expansion": (
        "vectors of queries near those with hypothetical passages (SoftQE)",
        {"losses": {"soft_expansion": {"passages": "expansions.jsonl"}}},
    ),
    "simcse": ("the backbone first told texts apart by dropout (SimCSE)", _pretrained("simcse")),
    "mirror": ("the same, with a span of one side masked (Mirror-BERT)", _pretrained("mirror")),
    "retromae": ("the backbone first taught to reconstruct a text from its vector (RetroMAE)", _pretrained("retromae")),
    "condenser": (
        "the backbone first taught to make up for its tokens' later layers (Condenser)",
        _pretrained("condenser"),
    ),
    "cocondenser": ("the same of halves of texts, which find each other (coCondenser)", _pretrained("cocondenser")),
    "cot-mae": ("the backbone first taught to reconstruct a half from the other (CoT-MAE)", _pretrained("cot_mae")),
    "declutr": ("the backbone first taught to find spans near each other (DeCLUTR)", _pretrained("declutr")),
    "words": ("the backbone first taught to say from a text's vector which words it has (LLaRA)", _pretrained("words")),
    "bidirectional": (
        "a decoder that first learnt to read in both directions, then to tell texts apart (LLM2Vec)",
        _pretrained(
            *("masked_next_token", "simcse"),
            backbone={"bidirectional": True},
            pooling=partial(_with_weightless, kind="mean"),
        ),
    ),
    "four-layers": ("layers 0, 1, 4 and 5 of the backbone alone", _student(**_FOUR_LAYERS)),
    "four-layers-vectors": (
        "the same, first taught vectors by all layers (Well-Read Students)",
        _pretrained("vectors", **_FOUR_LAYERS),
    ),
    "four-layers-hidden-states": (
        "the same, first taught states of tokens by all layers",
        _pretrained("hidden_states", **_FOUR_LAYERS),
    ),
    "four-layers-mutual-information": (
        "the same, first taught what tells tokens' states apart by all layers (MI-alpha)",
        _pretrained("mutual_information", **_FOUR_LAYERS),
    ),
    "four-layers-attention": (
        "the same, first taught attention and relations of values by all layers (MiniLM)",
        _pretrained({"kind": "relations", "version": 1}, **_FOUR_LAYERS),
    ),
    "four-layers-relations": (
        "the same, first taught attention by all layers (MiniLMv2)",
        _pretrained("relations", **_FOUR_LAYERS),
    ),
    "four-layers-128": ("these layers alone, with vectors of 128 dimensions", _student(**_FOUR_LAYERS, **_NARROW)),
    "four-layers-components": (
        "the same, first taught the principal components of all layers' vectors (HPD)",
        _pretrained("components", **_FOUR_LAYERS, **_NARROW),
    ),
    "whitening": (
        "the backbone's pooling whitened on passages before training",
        _student(pooling=lambda pooling: _pma_beside(pooling, _whitened(pooling))),
    ),
    "projection-128": (
        "vectors of 128 dimensions by a trained projection, which starts as principal components",
        _student(
            pooling=lambda pooling: Pooling.of(
                {"kind": "projection", "dim": 128, "pooling": _with_pma(pooling, pooling=_weightless(pooling))}
            )
        ),
    ),
    "multivariate": (
        "a mean and a variance of each dimension, without PMA, compared by their divergence (MRL)",
        _student(
            pooling=lambda pooling: Pooling.of({"kind": "multivariate", "pooling": _weightless(pooling)}),
            interaction={"head": "divergence"},
        )
        | {"losses": {"subclass_imitation": 0.0}},
    ),
    "splade": (
        "weights of the vocabulary's tokens instead of a vector (SPLADE)",
        _student(pooling={"kind": "splade"}, interaction={"head": "product"})
        | {"losses": {"subclass_imitation": 0.0, "flops": 0.01}},
    ),
    "binarised": (
        "one trained bit a dimension, without PMA (BEBR)",
        _student(pooling=lambda pooling: Pooling.of({"kind": "binarised", "pooling": _weightless(pooling)})),
    ),
    "whitened-mean-pooling": (
        "the backbone's pooling instead of PMA, whitened",
        _student(pooling=_whitened),
    ),
    "without-words": ("without words (BM25) as score features", {"score_features": _NO_SCORE_FEATURES}),
    "without-li": ("without list imitation: cross-entropy alone", _without("list_imitation")),
    "paper-head": (
        "head `paper` instead of `dot`, same features",
        _student(interaction={"head": "paper"}) | {"losses": _NOT_NESTED},
    ),
    "inner-product": ("head `dot` without its interaction", _student(interaction={"head": "dot", "tasks": ()})),
    "dot-head": ("head `dot` instead of `paper`, same features", _student(interaction={"head": "dot"})),
    "concat": ("features: the vectors alone", _student(interaction={"features": "concat"})),
    "product": ("features: the vectors and their product", _student(interaction={"features": "product"})),
    "difference": ("features: the vectors and their difference", _student(interaction={"features": "difference"})),
    "rich": ("features: the vectors, product and difference", _student(interaction={"features": "rich"})),
    "generated": (
        "the query generates the weights of an IEM of width 16 that reads the passage alone (Hypencoder)",
        _student(interaction={"features": "generated", "hidden_dim": 16, "feature_dim": 16}),
    ),
    "width-128": ("IEM of width 128", _student(interaction={"hidden_dim": 128, "feature_dim": 128})),
    "width-512": ("IEM of width 512", _student(interaction={"hidden_dim": 512, "feature_dim": 512})),
    "width-1024": ("IEM of width 1,024", _student(interaction={"hidden_dim": 1024, "feature_dim": 1024})),
    "cold-start": (
        "PMA alone, no warm start",
        _student(pooling=lambda pooling: _with_pma(pooling, warm_start=False, pooling=_weightless(pooling))),
    ),
    "warm-start": (
        "PMA beside the backbone's pooling",
        _student(pooling=partial(_with_pma, warm_start=True)),
    ),
    "one-stage": ("vectors and interaction trained together", {"training": {"residual": {"epochs": 0}}}),
    "not-quiet": ("no penalty on changes elsewhere", {"training": {"residual": {"off_task_penalty": 0.0}}}),
    "two-stages": ("first the vectors, then the interaction", {"training": {"residual": {"epochs": 4}}}),
    "leave-out": ("neighbours that the teacher has not scored are left out", {"training": {"unjudged": "leave_out"}}),
    "ask-teacher": ("the teacher scores every neighbour first", {"training": {"unjudged": "ask_teacher"}}),
    "in-batch-labels": (
        "the teacher scores each query of a batch with every passage of it",
        {"training": {"in_batch_labels": True}},
    ),
    "remine": (
        "hard negatives mined again from the second epoch on",
        {"training": {"remine": True, "complement_words": None}},
    ),
    "gates": ("gates of query and passage on the bound", _student(interaction={"gates": True})),
    "no-gates": ("one bound for every pair", _student(interaction={"gates": False})),
    "no-imitation": ("data sets' judgements only, no teacher", _only()),
}
_GROUPS: dict[VariantGroup, _Group] = {"baseline": _BASELINES, "published": _PUBLISHED, "losses": _LOSSES, "own": _OWN}
VARIANTS: Mapping[str, Variant] = {
    name: Variant(
        name,
        group,
        title,
        {section: value for section, value in settings.items() if section != "imitation"},
        settings.get("imitation"),
    )
    for group, variants in _GROUPS.items()
    for name, (title, settings) in variants.items()
}
"""All variants by name, baselines first."""
