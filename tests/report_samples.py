"""Sample reports like those of ``evaluate``, from random numbers: one for queries, one for pairs, with all parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from d2llm.evaluation.report import (
    AgreementRow,
    Calibration,
    Comparison,
    Cost,
    Details,
    Estimate,
    EvaluationReport,
    EvaluationRow,
    Example,
    Histogram,
    Latency,
    MissingRow,
    ShownPassage,
)
from d2llm.ops.agreement import Agreement
from d2llm.ops.calibration import expected_calibration_error, reliability_bins, score_histogram

HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "</style></svg><img src=x onerror=alert(1)>",
    "]]> --> </title> \"quoted\" 'single' & &lt;b&gt;",
    "\u202eright to left\u202c שלום עולם",
    "a | b\n\n# heading\n* item `code` [link](http://evil.example/) **bold** \\",
    '{{ 7 * 7 }} {% raw %} ${x} javascript:alert(1) "onmouseover="alert(1)',
    "half an emoji \ud83d and a\x00zero",
)
"""Texts that must be escaped."""

_SYSTEMS = (
    # name, kind, approximate nDCG@10, milliseconds, bytes per passage
    ("BM25", "bm25", 0.41, 0.0988, 98.2),
    ("hybrid: BM25 + D2LLM", "hybrid", 0.79, 11.9, 866.2),
    ("cosine, untuned", "cosine_untuned", 0.64, 6.35, 768),
    ("cosine, tuned", "cosine_tuned", 0.795, 6.33, 768),
    ("cosine, D2LLM vectors", "dot", 0.80, 6.32, 768),
    ("paper head", "paper_head", 0.78, 10.8, 768),
    ("D2LLM", "d2llm", 0.817, 11.3, 768),
)
TEACHER = "teacher (reranking BM25 ∪ D2LLM, top 20)"


def retrieval_report(num_queries: int = 300, seed: int = 0) -> EvaluationReport:
    """Seven systems and the teacher on a sample; the untuned cosine is the baseline."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(0, 0.25, num_queries)
    scores = {name: difficulty + quality + generator.normal(0, 0.12, num_queries) for name, _, quality, *_ in _SYSTEMS}
    values = {
        name: {
            "nDCG@10": np.clip(np.round(score, 1), 0, 1),
            "MRR@10": np.clip(np.round(score + 0.08, 1), 0, 1),
            "Recall@100": np.clip(np.round(score + 0.3, 1), 0, 1),
        }
        for name, score in scores.items()
    }
    ids = tuple(f"q{index}" for index in range(num_queries))
    rows = [
        _row(name, kind, values[name], milliseconds, size, slice(None))
        for name, kind, _, milliseconds, size in _SYSTEMS
    ]
    part = slice(0, max(1, num_queries // 3))
    teacher_values = {measure: np.clip(numbers * 0.85, 0, 1) for measure, numbers in values["D2LLM"].items()}
    teacher = _row(TEACHER, "teacher", teacher_values, 1013.0, None, part)
    sample = [_row(name, kind, values[name], ms, size, part) for name, kind, _, ms, size in _SYSTEMS]
    truth = generator.random(4000) < 0.15
    log_odds = np.where(truth, generator.normal(1.5, 1.5, 4000), generator.normal(-3, 1.8, 4000))
    return EvaluationReport(
        kind="retrieval",
        dataset="banking77",
        split="test",
        task="symmetric",
        num_passages=52_345,
        num_items=num_queries,
        num_left_out=3,
        main_measure="nDCG@10",
        subject="D2LLM",
        baseline="cosine, untuned",
        rows=(*rows, teacher),
        missing=(MissingRow("BGE reranker", "external", "no --model was given; add one to see it here"),),
        sample_rows=(*sample, teacher),
        comparisons=_comparisons(values, "cosine, untuned"),
        agreement=tuple(
            AgreementRow(name, Agreement(0.91 - 0.1 * index, 0.8, 0.61 - 0.1 * index, 0.77, 100, 4000, 0.9), overlap)
            for index, (name, overlap) in enumerate([("D2LLM", 0.74), ("cosine, untuned", None)])
        ),
        calibration=tuple(
            _calibration(name, log_odds * factor, truth) for name, factor in (("D2LLM", 1.0), (TEACHER, 2.2))
        ),
        histograms=tuple(
            Histogram(name, score_histogram(numbers, truth))
            for name, numbers in (("D2LLM", log_odds), ("cosine, untuned", np.tanh(log_odds / 5)))
        ),
        settings={"top_k": 100, "num_candidates": 1000, "seed": 0, "teacher_queries": None},
        provenance={
            "student": {
                "name": "d2llm-minilm",
                "fingerprint": "3b1f" * 16,
                "recipe": {"backbone": {"model": "minilm", "lora": {"rank": 8}}, "steps": 2000},
            },
            "packages": {"torch": "2.13.0", "d2llm": "0.1.0"},
            "data": ["banking77", "stackfaq"],
        },
        notes=("cosine, untuned: 12 passages were truncated", "2 judgements of unknown passages do not count"),
        seconds=754.2,
        details=Details(
            item_ids=ids,
            values={
                name: {measure: tuple(numbers.tolist()) for measure, numbers in by_measure.items()}
                for name, by_measure in values.items()
            },
            wins=_examples(values, ids, best=True),
            losses=_examples(values, ids, best=False),
        ),
    )


def pairs_report(num_pairs: int = 200, seed: int = 1) -> EvaluationReport:
    """Three systems on pairs with binary labels, with accuracy for single pairs."""
    generator = np.random.default_rng(seed)
    truth = generator.random(num_pairs) < 0.4
    names = {
        "cosine, untuned": ("cosine_untuned", 0.9),
        "cosine, tuned": ("cosine_tuned", 1.6),
        "D2LLM": ("d2llm", 2.2),
    }
    logits = {name: (2 * truth - 1) * gap + generator.normal(0, 1.8, num_pairs) for name, (_, gap) in names.items()}
    values = {name: {"accuracy": ((logit >= 0) == truth).astype(float)} for name, logit in logits.items()}
    rows = tuple(
        _row(name, kind, values[name], 4.0 + index, 768, slice(None))
        for index, (name, (kind, _)) in enumerate(names.items())
    )
    rows = tuple(replace(row, measures={**row.measures, "Spearman": Estimate(0.5, 0.4, 0.6)}) for row in rows)
    ids = tuple(f"pair-{index}" for index in range(num_pairs))
    shown = ShownPassage("pair-7", "How do I change my card's PIN?", is_relevant=True)
    return replace(
        retrieval_report(9),
        kind="pairs",
        dataset="lcqmc",
        split="dev",
        num_passages=0,
        num_items=num_pairs,
        num_left_out=0,
        main_measure="accuracy",
        rows=rows,
        missing=(MissingRow("BM25", "bm25", "does not score pairs"),),
        sample_rows=(),
        comparisons=_comparisons(values, "cosine, untuned"),
        agreement=(),
        calibration=(_calibration("D2LLM", logits["D2LLM"], truth),),
        histograms=(Histogram("D2LLM", score_histogram(logits["D2LLM"], truth, 20)),),
        details=Details(
            item_ids=ids,
            values={name: {"accuracy": tuple(by_measure["accuracy"].tolist())} for name, by_measure in values.items()},
            wins=(Example("pair-7", "My PIN is to be another one", 1.0, 0.0, (shown,), (), ()),),
        ),
    )


def bare_report() -> EvaluationReport:
    """One system without cost, baseline, texts or anything else that may be missing."""
    full = retrieval_report(12)
    row = replace(full.row("D2LLM"), cost=Cost(None), fingerprint=None)
    return replace(
        full,
        baseline=None,
        rows=(row,),
        missing=(),
        sample_rows=(),
        comparisons=(),
        agreement=(),
        calibration=(),
        histograms=(),
        provenance={},
        notes=(),
        num_left_out=0,
        details=Details(),
    )


def hostile_report() -> EvaluationReport:
    """A report in which all names and texts from data contain markup or code."""
    full = retrieval_report(30)
    names = dict(zip((row.name for row in full.rows), HOSTILE, strict=False))
    passages = tuple(ShownPassage(text, text, index % 2 == 0) for index, text in enumerate(HOSTILE))
    examples = tuple(Example(text, text, 1.0, 0.0, passages, passages, ()) for text in HOSTILE)
    rename = {row.name: names.get(row.name, row.name) for row in full.rows}
    return replace(
        full,
        dataset=HOSTILE[0],
        split=HOSTILE[2],
        subject=rename[full.subject],
        baseline=rename["cosine, untuned"],
        rows=tuple(replace(row, name=rename[row.name], fingerprint=HOSTILE[1]) for row in full.rows),
        missing=tuple(MissingRow(text, "external", text) for text in HOSTILE),
        sample_rows=tuple(replace(row, name=rename[row.name]) for row in full.sample_rows),
        comparisons=tuple(
            replace(one, row=rename[one.row], baseline=rename[one.baseline], test=HOSTILE[1])
            for one in full.comparisons
        ),
        agreement=tuple(replace(row, name=text) for row, text in zip(full.agreement, HOSTILE, strict=False)),
        calibration=tuple(replace(one, name=text) for one, text in zip(full.calibration, HOSTILE, strict=False)),
        histograms=tuple(replace(one, name=text) for one, text in zip(full.histograms, HOSTILE, strict=False)),
        settings={text: text for text in HOSTILE},
        provenance={text: {text: [text, {text: text}]} for text in HOSTILE},
        notes=HOSTILE,
        details=replace(
            full.details,
            item_ids=tuple(f"{HOSTILE[index % len(HOSTILE)]}{index}" for index in range(30)),
            values={rename[name]: by_measure for name, by_measure in full.details.values.items()},
            wins=examples,
            losses=examples,
        ),
    )


def _row(name, kind, values, milliseconds, size, part) -> EvaluationRow:
    count = len(values[next(iter(values))][part])
    cost = Cost(
        total=Latency(milliseconds, milliseconds * 1.4, milliseconds * 1.1),
        encode=None if name == "BM25" else Latency(milliseconds * 0.6, milliseconds, milliseconds * 0.7),
        score=Latency(milliseconds * 0.3, milliseconds * 0.4, milliseconds * 0.3),
        passages_per_second=None if size is None else 512.3,
        pairs_per_second=1e6 / milliseconds,
        bytes_per_passage=size,
        peak_memory_mib=1234.5,
    )
    measures = {measure: _estimate(numbers[part]) for measure, numbers in values.items()}
    return EvaluationRow(name, kind, measures, cost, count, None if kind == "bm25" else "ab12cd34" * 8)


def _estimate(numbers) -> Estimate:
    reach = 1.96 * float(numbers.std()) / len(numbers) ** 0.5
    mean = float(numbers.mean())
    return Estimate(mean, mean - reach, mean + reach)


def _comparisons(values, baseline) -> tuple[Comparison, ...]:
    comparisons = []
    for name, by_measure in values.items():
        if name == baseline:
            continue
        for measure, numbers in by_measure.items():
            difference = _estimate(numbers - values[baseline][measure])
            p_value = 0.0001 if difference.low > 0 or difference.high < 0 else 0.4
            adjusted = min(1.0, 3 * p_value)
            comparisons.append(
                Comparison(
                    measure, name, baseline, difference, p_value, adjusted, len(numbers), "paired randomisation test"
                )
            )
    return tuple(comparisons)


def _calibration(name, log_odds, truth) -> Calibration:
    bins = reliability_bins(log_odds, truth)
    return Calibration(name, tuple(bins), expected_calibration_error(bins), len(truth))


def _examples(values, ids, *, best: bool) -> tuple[Example, ...]:
    change = values["D2LLM"]["nDCG@10"] - values["cosine, untuned"]["nDCG@10"]
    order = np.argsort(-change if best else change, kind="stable")[:4]
    texts = (
        "I was charged a fee when I took money out of an ATM abroad; is that right, and how do I get it back?",
        "Yes. A cash withdrawal in another currency costs 1.5 %, at least two euros, on every plan but the largest. "
        * 4,
        "为什么我的卡在国外取款时被收取手续费？",
        "Your card has not arrived yet",
    )
    passages = tuple(ShownPassage(f"p{index}", text, index == 1) for index, text in enumerate(texts))
    return tuple(
        Example(
            ids[index],
            texts[index % 4] if index % 4 != 1 else "why is there a charge",
            float(values["D2LLM"]["nDCG@10"][index]),
            float(values["cosine, untuned"]["nDCG@10"][index]),
            passages[1:2],
            passages[1:],
            (passages[0], passages[3], passages[2]),
        )
        for index in order.tolist()
    )
