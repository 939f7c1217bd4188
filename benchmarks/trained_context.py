"""Does a backbone that is trained to read passages with a context find them better than one trained on them alone?

    python benchmarks/trained_context.py

Untuned minilm, mean of the tokens, trained for the same steps on the same batches: windows of
neighbouring sentences of squad-sent or wikiqa, in which a train query's answer is told from all other sentences of the
batch (cross-entropy of the cosine, temperature .05). How passages are read, in training and on dev:

- `alone`: each by itself.
- `late`: a window whole, each sentence the mean of its own tokens (Günther et al. 2024, arXiv 2409.04701; their
  training with spans).
- `corpus`: each by itself, behind vectors of 16 passages, as are queries (the second stage of Morris and Rush 2024,
  arXiv 2410.02525). The vectors are those of the untuned backbone, mapped by a linear layer that is trained too. They
  are drawn from the data set, anew in each batch and once for dev: a sample that an index could keep, so that it can
  still add one passage alone.

nDCG@10 of the cosine, dev queries among the sentences of the windows that hold their answers. Licences: squad-sent CC
BY-SA 4.0, wikiqa for research only; nothing that was trained here is shipped.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scaling.corpus import write_json
from scaling.data_sets import DATA, require
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from untrained import make_student, ndcg

from d2llm.data.beir import Dataset, read_beir
from d2llm.ops.significance import paired_randomisation
from d2llm.recipe import Pooling

SETS = ("squad-sent", "wikiqa")
ROWS = ("nothing-alone", "nothing-late", "alone-alone", "alone-late", "late-late", "corpus-corpus")
STEPS, BATCH_WINDOWS, RATE, MAP_RATE, TEMPERATURE = 40, 4, 1e-4, 1e-3, 0.05
LAYERS = 6
WINDOW, MAX_TOKENS, CONTEXT, DEV_QUERIES = 8, 48, 16, 120
RESULT = Path(__file__).parent / "results" / "trained-context.json"


@dataclass(frozen=True)
class Windows:
    """A data set's sentences, in windows of neighbours, and its queries by the window that holds their answer."""

    data: Dataset
    windows: list[list[str]]
    queries: dict[str, dict[int, list[tuple[str, str]]]]
    """By split: window -> (query, passage that answers it)."""

    @classmethod
    def read(cls, name: str) -> Windows:
        data = read_beir(DATA / name, splits=["train", "dev"])
        ids = list(data.passages)
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        window_of = {passage: index for index, window in enumerate(windows) for passage in window}
        queries: dict[str, dict[int, list[tuple[str, str]]]] = {}
        for split in ("train", "dev"):
            by_window = queries.setdefault(split, {})
            for query, judged in data.qrels[split].items():
                for passage in [key for key, grade in judged.items() if grade > 0][:1]:
                    by_window.setdefault(window_of[passage], []).append((query, passage))
        return cls(data, windows, queries)

    def batches(self, seed: str) -> Iterator[list[int]]:
        """Windows with train queries and without a dev query's answer."""
        chosen = sorted({*self.queries["train"]} - {*self.queries["dev"]})
        random.Random(seed).shuffle(chosen)
        for start in range(0, len(chosen) - BATCH_WINDOWS, BATCH_WINDOWS):
            yield chosen[start : start + BATCH_WINDOWS]


class Reader(nn.Module):
    """The backbone, and a map from vectors of the context to the states of tokens before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = make_student("minilm", Pooling.of("mean"), LAYERS).backbone.float()
        self.model: Any = self.backbone.model
        self.context = nn.Linear(self.backbone.dim, self.backbone.dim)
        nn.init.eye_(self.context.weight).data.mul_(0.1)
        nn.init.zeros_(self.context.bias)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, without special tokens."""
        return [ids[1:-1][:MAX_TOKENS] for ids in self.backbone.tokenize(texts, "passage").ids]

    def states(self, ids: Sequence[Sequence[int]], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States [texts, tokens, dim] of ids with special tokens around them, and which are tokens [texts, tokens]."""
        first, last = self.backbone.tokenize([""], "passage").ids[0]
        padded, mask = self.backbone.pad([[first, *text, last] for text in ids])
        states, seen = self.model.embeddings(input_ids=padded), mask
        if context is not None:
            vectors = self.context(context).expand(len(states), -1, -1)
            states = torch.cat([vectors, states], dim=1)
            seen = torch.cat([torch.ones(vectors.shape[:2], dtype=mask.dtype), mask], dim=1)
        outside = torch.where(seen[:, None, None].bool(), 0.0, torch.finfo(torch.float32).min)
        states = self.model.encoder(states, attention_mask=outside).last_hidden_state
        return states[:, states.shape[1] - padded.shape[1] :], mask

    def alone(self, texts: Sequence[str], context: Tensor | None = None) -> Tensor:
        """The unit vectors of texts."""
        states, mask = self.states(self.tokens(texts), context)
        return normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)

    def late(self, windows: Sequence[Sequence[str]]) -> Tensor:
        """The unit vectors of the sentences of windows that are read whole."""
        ids = [self.tokens(window) for window in windows]
        states, _ = self.states([[token for text in window for token in text] for window in ids])
        pooled: list[Tensor] = []
        for row, window in zip(states, ids, strict=True):
            ends = np.cumsum([1, *map(len, window)])
            pooled += [row[start : max(end, start + 1)].mean(0) for start, end in pairwise(ends)]
        return normalize(torch.stack(pooled), dim=1)

    def passages(self, windows: Sequence[Sequence[str]], reading: str, context: Tensor | None) -> Tensor:
        """The unit vectors of all sentences of windows."""
        if reading == "late":
            return self.late(windows)
        return self.alone([text for window in windows for text in window], context)


def context_of(first: Reader, source: Windows, seed: str) -> Tensor:
    """Vectors of the untuned backbone for a sample of the data set's passages, with norm sqrt(dim) [16, dim]."""
    chosen = random.Random(seed).sample(list(source.data.passages.values()), CONTEXT)
    with torch.inference_mode():
        vectors = first.alone([passage.full_text for passage in chosen])
    return vectors.clone() * vectors.shape[1] ** 0.5


def texts_of(source: Windows, indices: Sequence[int]) -> list[list[str]]:
    return [[source.data.passages[name].full_text for name in source.windows[index]] for index in indices]


def train(first: Reader, sources: Sequence[Windows], reading: str, seed: int) -> Reader:
    """A copy of the untuned reader, trained to tell answers from other sentences of a batch by one way of reading."""
    torch.manual_seed(seed)
    reader = deepcopy(first).train()
    layers = reader.model.encoder
    for parameter in layers.parameters():
        parameter.requires_grad_(True)
    groups = [
        {"params": layers.parameters(), "lr": RATE},
        {"params": reader.context.parameters(), "lr": MAP_RATE},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (STEPS // 10), (STEPS - step) / STEPS)
    )
    batches = [iter(source.batches(f"{seed}")) for source in sources]
    rng = random.Random(seed)
    for step in range(STEPS):
        source = sources[step % len(sources)]
        indices = next(batches[step % len(sources)])
        context = context_of(first, source, f"{seed}:{step}") if reading == "corpus" else None
        names = [name for index in indices for name in source.windows[index]]
        pairs = [rng.choice(source.queries["train"][index]) for index in indices for _ in range(2)]
        passages = reader.passages(texts_of(source, indices), reading, context)
        queries = reader.alone([source.data.queries[query].text for query, _ in pairs], context)
        targets = torch.tensor([names.index(passage) for _, passage in pairs])
        loss = cross_entropy(queries @ passages.T / TEMPERATURE, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return reader.eval()


def measure(reader: Reader, first: Reader, source: Windows, reading: str) -> list[float]:
    """nDCG@10 of each dev query."""
    indices = list(source.queries["dev"])
    pairs = [pair for index in indices for pair in source.queries["dev"][index]][:DEV_QUERIES]
    indices = [index for index in indices if any(pair in pairs for pair in source.queries["dev"][index])]
    context = context_of(first, source, "dev") if reading == "corpus" else None
    with torch.inference_mode():
        starts = range(0, len(indices), BATCH_WINDOWS)
        windows = [texts_of(source, indices[start : start + BATCH_WINDOWS]) for start in starts]
        passages = torch.cat([reader.passages(some, reading, context) for some in windows]).numpy()
        queries = [source.data.queries[query].text for query, _ in pairs]
        vectors = torch.cat(
            [reader.alone(queries[start : start + 32], context) for start in range(0, len(queries), 32)]
        )
    names = [name for index in indices for name in source.windows[index]]
    return [
        ndcg(names, passages, [query], vector[None], {query: source.data.qrels["dev"][query]})
        for (query, _), vector in zip(pairs, vectors.numpy(), strict=True)
    ]


def main() -> None:
    """Train and measure ways of reading; rows that the file has and that are not named stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="TRAINED-READ", help=", ".join(ROWS))
    require(*(DATA / name for name in SETS))
    torch.set_num_threads(1)
    sources = [Windows.read(name) for name in SETS]
    first = Reader().eval()
    trained: dict[str, Reader] = {"nothing": first}
    for name in parser.parse_args().rows:
        taught, reading = name.split("-")
        started = time.process_time()
        if taught not in trained:
            trained = {"nothing": first, taught: train(first, sources, taught, seed=0)}
        row: dict[str, Any] = {}
        for source in sources:
            values = measure(trained[taught], first, source, reading)
            row[source.data.name] = {
                "nDCG@10": round(float(np.mean(values)), 4),
                "queries": [round(v, 4) for v in values],
            }
        rows: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else {}
        rows[name] = row | {"processor_seconds": round(time.process_time() - started)}
        for other in rows.values():
            for source in SETS if "alone-alone" in rows else ():
                base = rows["alone-alone"][source]["queries"]
                other[source]["p"] = round(paired_randomisation(other[source]["queries"], base), 4)
        print(name, {source: row[source]["nDCG@10"] for source in SETS}, flush=True)
        setting = {
            "layers": LAYERS,
            "steps": STEPS,
            "batch_windows": BATCH_WINDOWS,
            "window": WINDOW,
            "context": CONTEXT,
        }
        write_json(RESULT, {**setting, "rows": {name: rows[name] for name in ROWS if name in rows}})


if __name__ == "__main__":
    main()
