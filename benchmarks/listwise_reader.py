"""Does a language model that reads the first 20 passages as vectors rank them better than the student?

    python benchmarks/listwise_reader.py --rows text text+lora    two rows, half an hour of a core after the lists
    python benchmarks/listwise_reader.py --rows text text+lora --lists 600 800    the same after a short training

PE-Rank (Liu et al., "Leveraging Passage Embeddings for Efficient Listwise Reranking with Large Language Models", 2024,
arXiv 2406.14848): the model reads the query's text and, for each of the student's first passages, one vector, which a
small network makes from the student's. The next passage of the ranking is the one whose vector has the largest inner
product with the last state; its vector is then read too. Here the first steps alone are trained (ListMLE with weights
1 / rank, as in the authors' code), on train queries of three sets: relevant passages first, then the others in the
student's order; half of the lists are read in the student's order, half shuffled. First the network alone, then with
LoRA. Not done: reconstruction of texts from vectors before ranking, and the second loss of the paper, for which the
model reads the texts too; both take many times as long. Rows: the query as text (text), its vector beside it
(text-and-vector), all layers of the model (deep).

Measured on dev: nDCG@10 of the student's full score (as a search ranks: interaction, words, tokens), of the first
step's scores, of the decoded order, and of the student's score plus the first step's, whose weight is chosen on one
half of the queries and measured on the other, both ways.

Lists and trained weights are kept in the folder --work and rows in the JSON file, so that a run that was interrupted
continues. Licences: qnli and squad-sent CC BY-SA 4.0, banking77 CC BY 4.0; nothing that was trained here is shipped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from scaling.corpus import write_json
from scaling.data_sets import DATA, require
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from d2llm import Index, Student, read_beir
from d2llm.core.recipe import BackboneConfig
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.models.backbone import Backbone
from d2llm.ops.measures import per_query_measures
from d2llm.ops.significance import holm, paired_randomisation
from d2llm.training.mining.choose import key_of

SETS: dict[str, Task] = {"qnli": "asymmetric", "squad-sent": "asymmetric", "banking77": "symmetric"}
SPLITS = ("train", "dev")
STUDENT = "d2llm-minilm"
DEPTH, STEPS = 20, 10  # passages of a list, and how many of them are drawn: nDCG@10 counts no more
BATCH_LISTS = 8
RATES = {"projection": 1e-3, "lora": 5e-4}
WEIGHTS = (0.0, *(round(float(weight), 4) for weight in np.geomspace(0.01, 10, 25)))


@dataclass(frozen=True)
class Row:
    """A reader: its layers, and whether it also reads the query's vector."""

    layers: int | None
    query_vector: bool


ROWS = {
    "text": Row(8, False),
    "text-and-vector": Row(8, True),
    "deep": Row(None, False),
}


@dataclass(frozen=True)
class RankedList:
    """A query with its first passages in the student's order; ``grades`` are 0 or the judged ones."""

    data_set: str
    query_id: str
    query: str
    query_vector: NDArray[np.float32]
    ids: tuple[str, ...]
    vectors: NDArray[np.float32]
    scores: NDArray[np.float64]
    anchors: NDArray[np.float64]
    grades: NDArray[np.int64]

    def reordered(self, order: Sequence[int]) -> RankedList:
        """The same list with its passages in another order."""
        rows = list(order)
        parts = {name: getattr(self, name)[rows] for name in ("vectors", "scores", "anchors", "grades")}
        return replace(self, **parts, ids=tuple(self.ids[row] for row in rows))


_ARRAYS = {
    "query_vector": np.float32,
    "vectors": np.float32,
    "scores": np.float64,
    "anchors": np.float64,
    "grades": np.int64,
}


def train_ids(data: Dataset, number: int, *, exclude_shared: bool) -> list[str]:
    """Train queries without the relevant passages of dev and test, the last ones in the order of the miner.

    The shipped student was trained on the first ones of this order, so these are new to it where there are enough.
    """
    held_out = data.relevant_passages(["dev", "test"]) if exclude_shared else set[str]()
    positives = data.positives("train")
    kept = [each for each, relevant in positives.items() if relevant and not held_out.intersection(relevant)]
    return sorted(kept, key=lambda query_id: key_of(0, query_id))[-number:]


def collect(name: str, student: Student, num_train: int, num_dev: int) -> dict[str, Any]:
    """Train and dev lists of one set, ranked by the student's full score, and the judgements of dev."""
    data = read_beir(DATA / name)
    ids = {
        "train": train_ids(data, num_train, exclude_shared=SETS[name] == "asymmetric"),
        "dev": random.Random(0).sample(sorted(data.qrels["dev"]), min(num_dev, len(data.qrels["dev"]))),
    }
    lists: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "index", student, task=SETS[name])
        index.upsert(data.passages.values())
        for split, query_ids in ids.items():
            queries = [data.queries[query_id] for query_id in query_ids]
            vectors = student.encode_queries([query.text for query in queries]).vectors
            lists[split] = []
            for ranking, vector in zip(index.search(queries, top_k=DEPTH), vectors, strict=True):
                passages = ranking.passages
                own = tuple(each.passage.id for each in passages)
                judged = data.qrels[split][ranking.query.id]
                lists[split].append(
                    RankedList(
                        data_set=name,
                        query_id=ranking.query.id,
                        query=ranking.query.text,
                        query_vector=vector,
                        ids=own,
                        vectors=index.view.vectors(index.view.rows(own)),
                        scores=np.array([each.score for each in passages]),
                        anchors=np.array([each.anchor_score for each in passages], np.float64),
                        grades=np.array([judged.get(each, 0) for each in own]),
                    )
                )
    return lists | {"qrels": {each: data.qrels["dev"][each] for each in ids["dev"]}}


class ListwiseReader(nn.Module):
    """A causal language model that reads vectors of passages between tokens, and ranks by its states."""

    def __init__(self, backbone: Backbone, vector_dim: int, *, query_vector: bool, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.query_vector = query_vector
        embeddings: Any = backbone.model.get_input_embeddings().weight
        dim = embeddings.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            last = nn.Linear(dim, dim)
            self.projection = nn.Sequential(nn.Linear(vector_dim, dim), nn.GELU(), last)
        with torch.no_grad():  # to the size of the tokens' own vectors, which the model can read
            made = self.projection(unit_rows(torch.randn(1_000, vector_dim, generator=torch.manual_seed(seed))))
            last.weight *= embeddings.std() / made.std()
            last.bias.zero_()
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def prompt(self, query: str) -> tuple[list[int], list[int], list[int]]:
        """Tokens before the query's vector, between it and the passages, and after the passages."""
        tokenizer = self.backbone.tokenizer
        parts = (f"Query: {query}", "\nPassages:", "\nBest first:")
        first, middle, last = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        return first[:64], middle, last

    def read(self, ranked: RankedList) -> tuple[Tensor, Tensor]:
        """What is read before the first step [tokens, dim], and the passages' own vectors [passages, dim] in it."""
        first, middle, last = (self._tokens(ids) for ids in self.prompt(ranked.query))
        passages = self._project(ranked.vectors)
        own = [self._project(ranked.query_vector[None])] if self.query_vector else []
        return torch.cat([first, *own, middle, passages, last]), passages

    def step_logits(self, lists: Sequence[RankedList], orders: Sequence[Sequence[int]]) -> Tensor:
        """Logits [lists, steps, passages] of each step, after the passages before it in the given orders were read."""
        parts = [self.read(each) for each in lists]
        steps = len(orders[0])
        drawn = [passages[[*order[:-1]]] for (_, passages), order in zip(parts, orders, strict=True)]
        rows = [torch.cat([start, own]) for (start, _), own in zip(parts, drawn, strict=True)]
        # Padding comes last, and no token attends to later ones, so no mask is needed.
        states = self.backbone.model(inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True)).last_hidden_state
        last = torch.stack([states[row, len(each) - steps : len(each)] for row, each in enumerate(rows)])
        return self._logits(last, torch.stack([passages for _, passages in parts]))

    @torch.no_grad()
    def decode(self, lists: Sequence[RankedList], steps: int = STEPS) -> tuple[Tensor, list[list[int]]]:
        """The first step's logits [lists, passages] and the drawn order, for lists whose prompts are of one length."""
        parts = [self.read(each) for each in lists]
        passages = torch.stack([own for _, own in parts])
        inputs, cache = torch.stack([start for start, _ in parts]), DynamicCache()
        first: Tensor | None = None
        drawn = torch.zeros(passages.shape[:2], dtype=torch.bool)
        orders: list[Tensor] = []
        rows = torch.arange(len(lists))
        for _ in range(steps):
            output = self.backbone.model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
            logits = self._logits(output.last_hidden_state[:, -1:], passages)[:, 0]
            first = logits if first is None else first
            orders.append(logits.masked_fill(drawn, -torch.inf).argmax(dim=1))
            drawn[rows, orders[-1]] = True
            inputs = passages[rows, orders[-1]][:, None]
        assert first is not None
        return first, torch.stack(orders, dim=1).tolist()

    def trained_state(self) -> dict[str, Tensor]:
        """The projection, the scale and the adapter."""
        kept = {name: value for name, value in self.state_dict().items() if "lora_" in name or "backbone" not in name}
        return {name: value.clone() for name, value in kept.items()}

    def _tokens(self, ids: Sequence[int]) -> Tensor:
        return self.backbone.model.get_input_embeddings()(torch.tensor(ids))

    def _project(self, vectors: NDArray[np.float32]) -> Tensor:
        return self.projection(unit_rows(torch.from_numpy(vectors)))

    def _logits(self, states: Tensor, passages: Tensor) -> Tensor:
        """[lists, steps, passages]: inner products of normalised states with the passages' vectors, as published."""
        return self.log_scale.exp() * nn.functional.normalize(states, dim=-1) @ passages.transpose(1, 2)


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows of mean square 1."""
    return nn.functional.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5


def drawing_loss(logits: Tensor, orders: Tensor) -> Tensor:
    """-log probability of drawing the passages in these orders, step r weighted by 1 / r and the weights summing to 1.

    ``logits`` [lists, steps, passages] are those of each step, ``orders`` [lists, steps] the passages to draw. A step
    draws from those that were not drawn before it. ListMLE (Xia et al. 2008), except that each step has its own scores.
    """
    steps = orders.shape[1]
    is_drawn = nn.functional.one_hot(orders, logits.shape[-1]).cumsum(dim=1)
    before = torch.cat([torch.zeros_like(is_drawn[:, :1]), is_drawn[:, :-1]], dim=1) > 0
    log_shares = logits.masked_fill(before, -torch.inf).log_softmax(dim=-1)
    losses = -log_shares.gather(2, orders[:, :, None])[:, :, 0]
    weights = 1 / torch.arange(1, steps + 1)
    return (losses @ (weights / weights.sum())).mean()


def training_lists(lists: Sequence[RankedList], seed: int) -> Iterator[RankedList]:
    """Those with a relevant passage, mixed anew in each round; every other one has its passages in random order."""
    usable = [each for each in lists if each.grades.any()]
    rng = random.Random(seed)
    while True:
        for number, each in enumerate(rng.sample(usable, len(usable))):
            yield each if number % 2 else each.reordered(rng.sample(range(len(each.ids)), len(each.ids)))


def target_of(ranked: RankedList) -> list[int]:
    """The first steps of the order to learn: higher grades first, then the student's higher scores."""
    by_score = sorted(range(len(ranked.ids)), key=lambda place: (-ranked.grades[place], -ranked.scores[place]))
    return by_score[:STEPS]


def train(reader: ListwiseReader, lists: Sequence[RankedList], rates: dict[str, float]) -> dict[str, Any]:
    """One pass over the lists; rates rise in the first tenth of the steps and fall to zero from there."""
    started = time.process_time()
    groups = {
        "lora": [p for name, p in reader.named_parameters() if "lora_" in name],
        "projection": [*reader.projection.parameters(), reader.log_scale],
    }
    optimizer = torch.optim.AdamW(
        [{"params": groups[name], "lr": rate} for name, rate in rates.items() if groups[name]], weight_decay=0.01
    )
    batches = [lists[start : start + BATCH_LISTS] for start in range(0, len(lists), BATCH_LISTS)]
    warmup = max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup + 1))
    )
    losses: list[float] = []
    for number, batch in enumerate(batches, 1):
        orders = [target_of(each) for each in batch]
        loss = drawing_loss(reader.step_logits(batch, orders), torch.tensor(orders))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups.values() for p in group if p.grad is not None], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if number % 10 == 0:
            seconds = time.process_time() - started
            print(f"  {number} of {len(batches)} steps, loss {np.mean(losses[-10:]):.3f}, {seconds:.0f} s", flush=True)
    tenth = max(1, len(losses) // 10)
    return {
        "lists": len(lists),
        "loss": [round(float(np.mean(part)), 3) for part in (losses[:tenth], losses[-tenth:])],
        "processor_seconds": round(time.process_time() - started),
    }


def read_all(reader: ListwiseReader, lists: Sequence[RankedList]) -> list[tuple[NDArray[np.float64], list[int]]]:
    """The first step's scores and the decoded order of each list, in batches of prompts of one length."""
    by_length: dict[int, list[int]] = {}
    for place, each in enumerate(lists):
        by_length.setdefault(len(reader.prompt(each.query)[0]), []).append(place)
    results: dict[int, tuple[NDArray[np.float64], list[int]]] = {}
    for places in by_length.values():
        for start in range(0, len(places), 2 * BATCH_LISTS):
            batch = places[start : start + 2 * BATCH_LISTS]
            scores, orders = reader.decode([lists[place] for place in batch])
            results |= dict(zip(batch, zip(scores.double().numpy(), orders, strict=True), strict=True))
    return [results[place] for place in range(len(lists))]


def milliseconds(reader: ListwiseReader, lists: Sequence[RankedList]) -> dict[str, float]:
    """Median processor time of one query alone: one step, and the whole order."""
    times: dict[str, list[float]] = {"one step": [], "decoded": []}
    for each in lists:
        for name, steps in (("one step", 1), ("decoded", STEPS)):
            started = time.process_time()
            reader.decode([each], steps)
            times[name].append(1e3 * (time.process_time() - started))
    return {name: round(float(np.median(values)), 1) for name, values in times.items()}


def ndcg(lists: Sequence[RankedList], orders: Sequence[Sequence[int]], qrels: Any) -> NDArray[np.float64]:
    """nDCG@10 of each query, its passages at these places."""
    rankings = {
        each.query_id: [each.ids[place] for place in order[:10]] for each, order in zip(lists, orders, strict=True)
    }
    values = per_query_measures(rankings, qrels)["nDCG@10"]
    return np.array([values[each.query_id] for each in lists])


def by_scores(scores: Sequence[NDArray[np.float64]]) -> list[list[int]]:
    return [np.argsort(-row, kind="stable").tolist() for row in scores]


def fitted_sum(
    lists: Sequence[RankedList], added: Sequence[NDArray[np.float64]], qrels: Any
) -> tuple[NDArray[np.float64], list[float]]:
    """nDCG@10 of the sum of both scores, with the weight that is best on the other half, and the two weights.

    Added scores are relative to the mean of their list and to their spread within lists, in units of the spread of the
    student's scores. Of equally good weights the smallest is taken.
    """
    student = [each.scores - each.scores.mean() for each in lists]
    other = [scores - scores.mean() for scores in added]
    ratio = float(np.std(np.concatenate(student)) / max(np.std(np.concatenate(other)), 1e-12))
    values = np.array(
        [
            ndcg(lists, by_scores([a + weight * ratio * b for a, b in zip(student, other, strict=True)]), qrels)
            for weight in WEIGHTS
        ]
    )  # [weights, queries]
    halves = (slice(0, None, 2), slice(1, None, 2))
    best = [int(values[:, half].mean(axis=1).round(9).argmax()) for half in halves]
    summed = np.empty(len(lists))
    summed[halves[0]], summed[halves[1]] = values[best[1], halves[0]], values[best[0], halves[1]]
    return summed, [WEIGHTS[place] for place in best]


def compared(values: NDArray[np.float64], student: NDArray[np.float64]) -> dict[str, Any]:
    """The mean, and the difference from the student with its standard error and p."""
    difference = values - student
    return {
        "nDCG@10": round(float(values.mean()), 4),
        "difference": round(float(difference.mean()), 4),
        "standard_error": round(float(difference.std(ddof=1) / len(values) ** 0.5), 4),
        "p": round(paired_randomisation(values, student), 4),
    }


def measure(reader: ListwiseReader, dev: dict[str, list[RankedList]], qrels: dict[str, Any]) -> dict[str, Any]:
    """All figures of a reader on dev."""
    figures: dict[str, Any] = {}
    for name, lists in dev.items():
        student = ndcg(lists, [range(DEPTH)] * len(lists), qrels[name])
        results = read_all(reader, lists)
        first = [scores for scores, _ in results]
        summed, weights = fitted_sum(lists, first, qrels[name])
        figures[name] = {
            "queries": len(lists),
            "student": round(float(student.mean()), 4),
            "standard_error": round(float(student.std(ddof=1) / len(student) ** 0.5), 4),
            "one step": compared(ndcg(lists, by_scores(first), qrels[name]), student),
            "decoded": compared(ndcg(lists, [order for _, order in results], qrels[name]), student),
            "sum": compared(summed, student) | {"weights": weights},
        }
    for name, p in zip(figures, holm([each["sum"]["p"] for each in figures.values()]), strict=True):
        figures[name]["sum"]["p_holm"] = round(p, 4)
    return figures


def describe(lists: dict[str, Any]) -> dict[str, Any]:
    """What the lists of a set hold; the student's nDCG@10 on train lists says how much better it knows those."""
    train, dev = lists["train"], lists["dev"]
    qrels = {each.query_id: dict(zip(each.ids, each.grades.tolist(), strict=True)) for each in train}
    on_train = ndcg(train, [range(DEPTH)] * len(train), qrels)
    anchors = ndcg(dev, by_scores([each.anchors for each in dev]), lists["qrels"])
    best = ndcg(dev, [target_of(each) for each in dev], lists["qrels"])
    rng = random.Random(0)
    mixed = [ndcg(dev, [rng.sample(range(DEPTH), DEPTH) for _ in dev], lists["qrels"]).mean() for _ in range(5)]
    return {
        "train lists": len(train),
        "train lists with a relevant passage": sum(bool(each.grades.any()) for each in train),
        "train nDCG@10 of the student, within lists": round(float(on_train.mean()), 4),
        "dev nDCG@10 of the student's inner products, within lists": round(float(anchors.mean()), 4),
        "dev nDCG@10 of the best order": round(float(best.mean()), 4),
        "dev nDCG@10 of a random order": round(float(np.mean(mixed)), 4),
    }


def kept_lists(work: Path, num_train: int, num_dev: int) -> dict[str, dict[str, Any]]:
    """The lists of all sets, from the folder or made anew."""
    file = work / "lists.json"
    if not file.is_file():
        student = Student.load(STUDENT, device="cpu", dtype="float32")
        made = {name: collect(name, student, num_train, num_dev) for name in SETS}
        plain = {name: lists | {split: [*map(vars, lists[split])] for split in SPLITS} for name, lists in made.items()}
        file.write_text(json.dumps(plain, default=np.ndarray.tolist), encoding="utf-8")
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: lists | {split: [_as_list(each) for each in lists[split]] for split in SPLITS}
        for name, lists in kept.items()
    }


def _as_list(values: dict[str, Any]) -> RankedList:
    fields: dict[str, Any] = {**values, "ids": tuple(values["ids"])}
    fields.update((name, np.array(values[name], dtype)) for name, dtype in _ARRAYS.items())
    return RankedList(**fields)


def trained_reader(
    name: str, lists: Sequence[RankedList], num_first: int, work: Path
) -> tuple[ListwiseReader, dict[str, Any]]:
    """The reader of a row, from the folder or trained now, and the figures of its training.

    The network alone is trained on the first lists. LoRA continues from there with the others.
    """
    first_stage, is_lora = name.removesuffix("+lora"), name.endswith("+lora")
    row = ROWS[first_stage]
    if is_lora:
        reader, _ = trained_reader(first_stage, lists, num_first, work)
        reader.backbone.prepare_training()
    else:
        backbone = Backbone.load(BackboneConfig(model="smollm2", layers=row.layers), device="cpu", dtype="float32")
        reader = ListwiseReader(backbone, lists[0].vectors.shape[1], query_vector=row.query_vector)
    chosen = lists[num_first:] if is_lora else lists[:num_first]
    file = work / f"{name}-{len(chosen)}.pt"
    if file.is_file():
        kept = torch.load(file)
        reader.load_state_dict(kept["state"], strict=False)
        return reader.eval(), kept["training"]
    names = ("lora", "projection") if is_lora else ("projection",)
    trained = train(reader.train(), chosen, {each: RATES["lora" if is_lora else each] for each in names})
    torch.save({"state": reader.trained_state(), "training": trained}, file)
    return reader.eval(), trained


def kept_rows(file: Path | None) -> dict[str, Any]:
    """The rows that are in the file already."""
    return {} if file is None or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name + stage for name in ROWS for stage in ("", "+lora")]
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--train", type=int, default=1_500, help="train queries of each set")
    parser.add_argument("--dev", type=int, default=300, help="dev queries of each set")
    parser.add_argument("--lists", type=int, nargs=2, default=(2_000, 4_000), metavar="N", help="of the two stages")
    parser.add_argument("--work", type=Path, default=Path("listwise-reader"), help="folder for lists and weights")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    require(*(DATA / name for name in SETS))
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    sets = kept_lists(arguments.work, arguments.train, arguments.dev)
    content: dict[str, Any] = {
        "settings": {"student": STUDENT, "model": "smollm2", "depth": DEPTH, "steps": STEPS, "rates": RATES},
        "lists": {name: describe(lists) for name, lists in sets.items()},
        "rows": {},
    }
    print(json.dumps(content["lists"], indent=1), flush=True)
    num_first = arguments.lists[0]
    train_lists = [each for lists in sets.values() for each in lists["train"]]
    mixed = [*islice(training_lists(train_lists, 0), sum(arguments.lists))]
    dev = {name: lists["dev"] for name, lists in sets.items()}
    qrels = {name: lists["qrels"] for name, lists in sets.items()}
    for name in [name for name in arguments.rows if name not in kept_rows(arguments.json)]:
        print(name, flush=True)
        reader, trained = trained_reader(name, mixed, num_first, arguments.work)
        figures = {
            "layers": reader.backbone.num_layers,
            "training": trained,
            "ms": milliseconds(reader, dev["qnli"][:20]),
            "dev": measure(reader, dev, qrels),
        }
        print(json.dumps(figures, indent=1), flush=True)
        if arguments.json is not None:
            rows = kept_rows(arguments.json) | {name: figures}  # read again: another process may have added some
            content["rows"] = {each: rows[each] for each in names if each in rows}
            write_json(arguments.json, content)


if __name__ == "__main__":
    main()
