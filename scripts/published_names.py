"""Published methods by the names of their papers: where each is here, or why it is not (docs/recipes.md).

What a kind measured is said by its class; ``scripts/recipe_tables.py`` makes the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from d2llm.reports.methods import MethodFacts

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

KINDS: Mapping[str, tuple[str, str]] = {
    "PLD (Plackett-Luce distillation)": ("losses", "plackett_luce"),
    "ListMLE, RankDistil": ("losses", "listmle"),
    "ListNet, RocketQAv2": ("losses", "list_imitation"),
    "RankNet, RankT5's pairwise loss": ("losses", "ranknet"),
    "LambdaRank, LambdaLoss": ("losses", "lambdarank"),
    "Margin-MSE": ("losses", "margin_mse"),
    "Distilled Sentence Embedding (DSE)": ("losses", "score_regression"),
    "TCT-ColBERT": ("losses", "in_batch_imitation"),
    "SinKD": ("losses", "sinkhorn"),
    "FerKD": ("losses", "recalibrated_imitation"),
    "DistillWeighted": ("losses", "weighted_imitation"),
    "LELP": ("losses", "subclass_imitation"),
    "SoftQE": ("losses", "soft_expansion"),
    "CoRT's loss": ("losses", "angular_margin"),
    "PAIR": ("losses", "passage_contrast"),
    "Gecko's positives and hard negatives": ("losses", "relabelled_cross_entropy"),
    "Gecko's fused rankings (RRF)": ("teacher", "fused"),
    "UPR (query likelihood)": ("teacher", "likelihood"),
    "KaLM-Embedding-V2: mixed negatives": ("losses", "mixed_negatives"),
    "Matryoshka, 2D Matryoshka": ("losses", "nested_cross_entropy"),
    "SimCSE": ("training.pretraining", "simcse"),
    "Mirror-BERT": ("training.pretraining", "mirror"),
    "RetroMAE": ("training.pretraining", "retromae"),
    "Condenser": ("training.pretraining", "condenser"),
    "coCondenser": ("training.pretraining", "cocondenser"),
    "CoT-MAE": ("training.pretraining", "cot_mae"),
    "DeCLUTR": ("training.pretraining", "declutr"),
    "MEXMA": ("training.pretraining", "mexma"),
    "LLaRA (Llama2Vec)": ("training.pretraining", "words"),
    "LLM2Vec": ("training.pretraining", "masked_next_token"),
    "MiniLM, MiniLMv2": ("training.pretraining", "relations"),
    "TinyBERT": ("training.pretraining", "hidden_states"),
    "MI-alpha (Distiller)": ("training.pretraining", "mutual_information"),
    "HPD": ("training.pretraining", "components"),
    "Well-Read Students": ("training.pretraining", "vectors"),
    "Whitening, whitening-k": ("student.pooling", "whitening"),
    "WhiteningBERT": ("student.pooling", "first_last"),
    "BEBR": ("student.pooling", "binarised"),
    "Multivariate representations (MRL)": ("student.pooling", "multivariate"),
    "SPAR's imitation of words": ("losses", "word_imitation"),
    "SPLADE": ("student.pooling", "splade"),
    "DSR (slices of SPLADE)": ("student.pooling", "splade"),
    "FLOPS regulariser": ("losses", "flops"),
    "Ditto": ("student.pooling", "ditto"),
    "SGPT": ("student.pooling", "weighted_mean"),
    "PMA": ("student.pooling", "pma"),
    "Model2Vec": ("student.backbone", "model2vec"),
    "PE-Rank": ("reranker", "listwise"),
}
"""Names of methods that are a kind of their own: section and kind."""

ELSEWHERE: Mapping[str, tuple[str, str]] = {
    "RankT5's softmax": (
        '`teacher_tuning = { loss = "lists", pair_weight = 0 }`',
        "yes: level with `pair_weight = 0.3` (wikiqa .520 to .501, banking77 .559 to .580; 100 lists, 20 steps)",
    ),
    "MonoT5, RankT5's T5": (
        '`teacher.kind = "seq2seq"`, tuned by `teacher_tuning`',
        "not measured: no weights of a T5 can be had here; a tiny random one learns by RankT5's softmax in a test",
    ),
    "ERNIE-Tiny": (
        "three stages of `training.pretraining` and the distillation (`benchmarks/graded_lists/ernie-tiny.toml`)",
        "yes: wikiqa .677 to .689, .709, .712, .722 (it alone .702), banking77 .607 to .643 (.615); 10 to 18 steps",
    ),
    "DHO": (
        "`training.dual_head`",
        "yes; mixes scores: a mixture of softmaxes is no inner product, and on the same lists no better (.600, .497)",
    ),
    "Contextual document embeddings: clustered batches": ("`training.clustered`", "yes: -.006, one seed"),
    "CoRT's negatives": ("`training.complement_words`", "yes"),
    "Trans-Encoder": (
        "`d2llm run RECIPE --rounds N --beside RECIPE`",
        "yes: stsb .865 alone, beside e5 .865, teachers that go on .865 (start .865), sick .778, .778, .779 (.775)",
    ),
    "PGKD's hard negatives": (
        "`labelling.mistaken_student`",
        "yes: .507, a random sample .505 (wikiqa, banking77; static vectors, one seed; 60 of 240 queries)",
    ),
    "PGKD's loop": (
        "`benchmarks/written_rounds.py`",
        "yes: wikiqa .791 to .789 (at random .788), stackfaq .670 to .692 (.688); static, one seed; so a benchmark",
    ),
    "Robust Active Distillation": (
        "`labelling.unsure_student`",
        "yes: .504, a random sample .505 (wikiqa, banking77; static vectors, one seed; 60 of 240 queries)",
    ),
    "Model soups, KaLM-Embedding-V2's": (
        "`d2llm soup`",
        "yes: .725, five students .713 to .728 (wikiqa, banking77; one run)",
    ),
    "Vocabulary pruning (Load What You Need)": (
        "`d2llm prune-vocabulary`",
        "yes: -.002 on squad-sent, level on cmrc2018, a quarter of the bytes",
    ),
    "Subspace embeddings": (
        "`benchmarks/subspace_embeddings.py`",
        "yes, untrained: 48 bytes a token, not 1,536: squad-sent .758 to .749, cmrc2018 level (60 queries); no verb",
    ),
    "Neuron pruning, ZipLM's": (
        "`d2llm prune-neurons`",
        "yes: half, 1.3 times as fast: -.004, -.001, -.075 untrained, trained -.031, -.056 (log); layers keep as many",
    ),
    "EntroDrop": (
        "`models.layer_choice.entropy_gains`",
        "yes: worse than angles on minilm, than the first layers on smollm2",
    ),
    "Layers left out by angles (Gromov et al.)": ("`d2llm init DATA --layers N`", "yes"),
    "KaLM-Embedding-V2: focal weights": ("`losses.in_batch_cross_entropy.focus`", "yes: -.001, one seed"),
    "Semi-Siamese": ('`backbone.tuning = { adapters = "two" }`', "yes"),
    "QLoRA": (
        '`backbone.tuning = { quantization = "4bit" }`',
        "yes, four steps: wikiqa .167 to .169 (LoRA in float32: .164 to .177), banking77 .343 to .347 (.342 to .347)",
    ),
    "DeepCT, doc2query, TILDE-like expansion": ("`d2llm fit-scores`", "yes"),
    "Late chunking": (
        "`d2llm encode --late`",
        "yes; trained for in `benchmarks/trained_context.py` alone: wikiqa .845 (alone .802), squad-sent .808 (.817)",
    ),
    "Loyalty of labels, probabilities, regression": ("`d2llm evaluate --teacher`", "measures, not methods"),
    "Linear maps between students": (
        "`benchmarks/mapped_vectors.py`",
        "yes: .11 to .15 lost between backbones, so it is no verb",
    ),
    "Instructor, E5-instruct, GritLM, Qwen3-Embedding": (
        "`data.instruction` in training, `instruction` of a search; of passages `backbone.passage_prefix`",
        "no: students not trained so lose .012 to .199 (squad-sent, banking77), trained .016, .009 (wikiqa, banking77)",
    ),
    "Gecko's task descriptions": (
        "a query's `instruction`, written with the writers' prompt `tasks`; `data.instruction` for a set",
        "yes: 100 written queries of wikiqa, static vectors: .342 after tasks, .548 without (one seed, log)",
    ),
    "ColBERT": ("`score_features.maxsim`, `in_training`", "yes"),
    "BERTScore": (
        "`benchmarks/bertscore.py`; MaxSim is its recall",
        "yes: F1 .921 on mrpc (cosine .909), .872 on stsb (.911), so it is no score",
    ),
    "Hypencoder": (
        '`interaction.features = "generated"`',
        "yes: -.009 ±.023, three seeds of static vectors (wikiqa, banking77), a quarter of the IEM's time (log)",
    ),
    "K-NRM": (
        "`benchmarks/token_interaction.py`, kernels",
        "yes: -.001 on six sets not trained on, and 39 ms for 1,000 passages of 197 tokens, so it is no score",
    ),
    "LEALLA": (
        "`vectors` with a `teacher` on both sides of translations, then `score_regression` by a `cosine` teacher",
        "500 translations, six layers of e5: 70 of 100 found, after the first step 92, then 96 (all layers: 98)",
    ),
    "RECOMP's extraction": (
        "`answering` of a context",
        "yes, untrained: 69 % of the answers found; where is none, none given: 49 % (wikiqa-pairs), 91 % (qnli-pairs)",
    ),
    "BTR's finer ranking of what bits find": (
        "`benchmarks/binarised.py`",
        "yes: plain bits gain .004 and .009 (wikiqa, banking77), trained +.011 and -.054, so an index has one format",
    ),
    "AutoDistiller": (
        "`d2llm ablate RECIPE --epochs 1 --halving`",
        "yes: of six losses the second (.5332; best .5346; log), of four one that gains .002 (wikiqa, banking77)",
    ),
    "Conversational queries": (
        "`history` of a search",
        "six questions by hand: SmolLM2-135M rewrites none rightly; no shared set has dialogues to learn from",
    ),
}
"""Names of methods that are settings or verbs: where, and whether they were measured."""

MISSING: Mapping[str, str] = {
    "BTR's reader": "binary states of tokens for a language model that reads passages, of which none here keeps states",
    "FSDP": "7 billion weights with adapters take 27 to 36 GiB, measured on one GPU ([scale.md](scale.md)); over two, "
    "`torchrun` spreads the texts",
    "Contextual document embeddings: the second stage": "measured, and worse: squad-sent .817 -> .753, wikiqa .802 -> "
    ".788 with the vectors of 16 passages before every text (`benchmarks/trained_context.py`)",
    "Dewey": "trains long windows; the shipped encoders read at most 512 tokens",
    "vec2vec": "needs no common passages, but hours of adversarial training; whoever changes a student has passages",
}
"""Names of methods that are not here, and why."""

FILES: Mapping[str, str] = {
    "AutoDistiller": "halving",
    "RankT5's softmax": "rank-t5",
    "Gecko's positives and hard negatives": "gecko",
    "SPAR's imitation of words": "word-imitation",
    "ERNIE-Tiny": "ernie-tiny",
    "PLD (Plackett-Luce distillation)": "methods static-three-seeds static-maps static-maps-sets",
    "ListMLE, RankDistil": "losses methods",
    "ListNet, RocketQAv2": "losses",
    "RankNet, RankT5's pairwise loss": "losses",
    "LambdaRank, LambdaLoss": "losses",
    "Margin-MSE": "losses",
    "Distilled Sentence Embedding (DSE)": "losses",
    "TCT-ColBERT": "in-batch-imitation",
    "SinKD": "methods losses",
    "FerKD": "methods static-three-seeds",
    "DistillWeighted": "unsure-teacher",
    "LELP": "subclasses",
    "SoftQE": "soft-expansion",
    "CoRT's loss": "methods",
    "PAIR": "methods-2 static-three-seeds",
    "KaLM-Embedding-V2: mixed negatives": "methods-2",
    "Matryoshka, 2D Matryoshka": "nested-depths sampled-depths",
    "SimCSE": "pretraining",
    "Mirror-BERT": "pretraining",
    "RetroMAE": "pretraining",
    "Condenser": "pretraining",
    "coCondenser": "pretraining",
    "CoT-MAE": "pretraining",
    "DeCLUTR": "pretraining",
    "MEXMA": "cross-lingual",
    "LLaRA (Llama2Vec)": "pretraining",
    "LLM2Vec": "pretraining",
    "MiniLM, MiniLMv2": "pretraining four-layers",
    "TinyBERT": "pretraining four-layers",
    "MI-alpha (Distiller)": "pretraining four-layers",
    "HPD": "pretraining",
    "Well-Read Students": "pretraining four-layers",
    "Whitening, whitening-k": "untrained",
    "WhiteningBERT": "untrained",
    "BEBR": "binarised",
    "Multivariate representations (MRL)": "methods-3 static-maps static-maps-sets heads-same-lists",
    "SPLADE": "learned-words learned-words-score",
    "DSR (slices of SPLADE)": "learned-words",
    "FLOPS regulariser": "learned-words",
    "Ditto": "untrained",
    "SGPT": "untrained",
    "PMA": "graded-lists/squad-sent-banking77 graded-lists/wikiqa-quora",
    "Model2Vec": "static",
    "PE-Rank": "listwise-reader listwise-reader-recorded listwise-reader-texts",
    "DHO": "two-heads-three-seeds heads-same-lists",
    "Contextual document embeddings: clustered batches": "methods-3",
    "CoRT's negatives": "complement-words complement-words-joint",
    "Trans-Encoder": "rounds rounds-going-on rounds-beside",
    "PGKD's hard negatives": "labelled-queries-static",
    "PGKD's loop": "written-rounds-wikiqa written-rounds-stackfaq",
    "Robust Active Distillation": "labelled-queries-static",
    "Model soups, KaLM-Embedding-V2's": "soup",
    "Vocabulary pruning (Load What You Need)": "vocabulary",
    "Subspace embeddings": "subspace-embeddings",
    "Neuron pruning, ZipLM's": "smaller",
    "EntroDrop": "untrained",
    "Layers left out by angles (Gromov et al.)": "untrained",
    "KaLM-Embedding-V2: focal weights": "methods",
    "Semi-Siamese": "two-adapters",
    "QLoRA": "four-bits four-bits-none",
    "DeepCT, doc2query, TILDE-like expansion": "words-and-pruning passage-expansion",
    "Late chunking": "trained-context",
    "Linear maps between students": "mapped-vectors",
    "Instructor, E5-instruct, GritLM, Qwen3-Embedding": "instructions instructions-trained instructions-trained-none",
    "ColBERT": "score-features-ablation",
    "BERTScore": "bertscore",
    "Gecko's task descriptions": "written-tasks",
    "Hypencoder": "static-generated heads-same-lists",
    "K-NRM": "token-interaction heads-same-lists",
    "FSDP": "gpu",
    "LEALLA": "cross-lingual",
    "RECOMP's extraction": "answering",
    "BTR's finer ranking of what bits find": "binarised-rescored",
    "Contextual document embeddings: the second stage": "trained-context",
}
"""The files of ``benchmarks/results`` with a name's figures; of names without one, figures are in the log, if any."""


def published_names(methods: Mapping[str, Mapping[str, MethodFacts]]) -> list[tuple[str, str, str, str]]:
    """A row for each name: the name, where it is, whether it was measured or why it is not here, and its files."""
    rows: list[tuple[str, str, str]] = []
    for name, (section, kind) in KINDS.items():
        measured = methods[section][kind].measured
        rows.append((name, f"`{section}`: `{kind}`", "not measured" if measured == "not measured" else "yes"))
    rows += [(name, where, measured) for name, (where, measured) in ELSEWHERE.items()]
    rows += [(name, "not here", reason) for name, reason in MISSING.items()]
    strangers = FILES.keys() - {name for name, _, _ in rows}
    files = {file for named in FILES.values() for file in named.split()}
    if missing := [*strangers, *(file for file in files if not (RESULTS / f"{file}.json").is_file())]:
        raise ValueError(f"neither a published name nor a file of results: {', '.join(sorted(missing))}")
    return [(*row, ", ".join(f"`{file}`" for file in FILES.get(row[0], "").split())) for row in rows]
