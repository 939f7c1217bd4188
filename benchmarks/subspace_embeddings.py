"""What a multilingual student keeps whose tokens share the parts of their embeddings, without training.

    python benchmarks/subspace_embeddings.py --json benchmarks/results/subspace-embeddings.json     some five minutes

Jaiswal and Liu, "Lightweight Adaptation of Neural Language Models via Subspace Embedding", CIKM 2023 (arXiv
2308.08688), section 3, with clusters: the embeddings of all tokens are cut into equal parts, the parts at one place are
clustered by k-means, and each is replaced by the nearest centre. A token then is as many numbers of clusters as
there are parts, a byte each for 256 clusters. There, the model is trained on afterwards.

For each set, nDCG@10 of the cosine of the vectors of `d2llm-multilingual` on dev queries among at most 1,000 passages.

Licences: squad-sent CC BY-SA 4.0, cmrc2018 CC BY-SA 4.0; they are only measured on.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scaling.data_sets import DATA, require
from untrained import ndcg, sample, sample_parser

from d2llm.data.beir import read_beir
from d2llm.models.student import Student
from d2llm.ops.clusters import nearest_centres

SETS = ("squad-sent", "cmrc2018")
PARTS = (48, 16)
NUM_CLUSTERS, FITTED = 256, 5_000  # clusters of a part, and tokens to which centres are fitted


def shared(embeddings: NDArray[np.float32], num_parts: int, num_clusters: int = NUM_CLUSTERS) -> NDArray[np.float32]:
    """The embeddings [tokens, dim] with each part replaced by a centre, the nearest."""
    chosen = np.random.default_rng(0).permutation(len(embeddings))[:FITTED]
    parts: list[NDArray[np.float32]] = []
    for part in np.split(embeddings, num_parts, axis=1):
        clusters = nearest_centres(part[chosen], num_clusters)
        centres = np.stack([part[chosen][clusters == cluster].mean(axis=0) for cluster in np.unique(clusters)])
        distances = (centres**2).sum(axis=1) - 2 * part @ centres.T
        parts.append(centres[distances.argmin(axis=1)])
    return np.concatenate(parts, axis=1)


def main() -> None:
    """Measure the student as it is and with shared parts, and print a row for each."""
    parser = sample_parser(__doc__)
    arguments = parser.parse_args()
    require(*(DATA / name for name in SETS))
    student = Student.load("d2llm-multilingual", device="cpu", dtype="float32")
    model: Any = student.backbone.model
    table: torch.Tensor = model.get_input_embeddings().weight
    before: NDArray[np.float32] = table.detach().numpy().copy()
    samples = [sample(read_beir(DATA / name, splits=["dev"]), arguments.queries, arguments.passages) for name in SETS]
    rows: list[dict[str, Any]] = []
    for num_parts in (None, *PARTS):
        row: dict[str, Any] = {"parts": num_parts, "bytes of a token": num_parts or 4 * table.shape[1]}
        if num_parts is not None:
            changed = shared(before, num_parts)
            row["error"] = round(float(((changed - before) ** 2).sum() / (before**2).sum()), 4)
            with torch.no_grad():
                table.copy_(torch.from_numpy(changed))
        for name, (queries, passages, qrels) in zip(SETS, samples, strict=True):
            vectors = student.encode_passages([*passages.values()]).vectors
            asked = student.encode_queries([*queries.values()]).vectors
            row[name] = round(ndcg([*passages], vectors, [*queries], asked, qrels), 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.json is not None:
        settings = {"queries": arguments.queries, "passages": arguments.passages, "tokens": len(table)}
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
