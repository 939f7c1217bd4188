"""What a multilingual student keeps when its vocabulary is pruned to one corpus (models.vocabulary).

    python benchmarks/vocabulary.py --json benchmarks/results/vocabulary.json     some five minutes

For each set, `d2llm-multilingual` keeps the tokens of all passages (passages), or of these and the train queries
(queries too). nDCG@10 of the cosine of its vectors on dev queries among at most 1,000 passages, by the student and by
the pruned one; the vectors of 50 passages must be the same. Lost: dev queries with other tokens than before, and tokens
that are unknown.

Licences: squad-sent CC BY-SA 4.0, cmrc2018 CC BY-SA 4.0; they are only measured on.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scaling.data_sets import DATA, require
from untrained import ndcg, sample, sample_parser

from d2llm.core.files import folder_bytes
from d2llm.data.beir import read_beir
from d2llm.models.student import Student
from d2llm.models.vocabulary import lost_tokens, prune_vocabulary

SETS = ("squad-sent", "cmrc2018")


def main() -> None:
    parser = sample_parser(__doc__)
    arguments = parser.parse_args()
    require(*(DATA / name for name in SETS))
    student = Student.load("d2llm-multilingual", device="cpu", dtype="float32")
    rows: list[dict[str, Any]] = []
    for name in SETS:
        data = read_beir(DATA / name, splits=["train", "dev"])
        queries, passages, qrels = sample(data, arguments.queries, arguments.passages)
        corpus = [passage.full_text for passage in data.passages.values()]
        train = [data.queries[query_id].text for query_id in data.qrels["train"]]
        vectors = student.encode_passages([*passages.values()]).vectors
        for kept, texts in (("passages", corpus), ("queries too", [*corpus, *train])):
            pruned = prune_vocabulary(student, texts)
            some = [*passages.values()][:50]
            np.testing.assert_array_equal(pruned.encode_passages(some).vectors, student.encode_passages(some).vectors)
            lost = lost_tokens(student, pruned, queries.values())
            row: dict[str, Any] = {"set": name, "kept": kept, "tokens": len(pruned.backbone.tokenizer)}
            row |= {"of": len(student.backbone.tokenizer), "queries": len(queries), "queries changed": lost.num_changed}
            row |= {"tokens of queries": lost.num_tokens, "unknown": lost.num_unknown}
            for which, model in (("before", student), ("after", pruned)):
                query_vectors = model.encode_queries([*queries.values()]).vectors
                row[f"nDCG@10 {which}"] = round(ndcg([*passages], vectors, [*queries], query_vectors, qrels), 4)
                with TemporaryDirectory() as folder:
                    model.save(Path(folder) / "student", merge=True)
                    row[f"MB {which}"] = round(folder_bytes(Path(folder) / "student") / 1e6, 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json is not None:
        settings = {"queries": arguments.queries, "passages": arguments.passages}
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
