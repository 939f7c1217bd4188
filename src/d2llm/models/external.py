"""Third-party models as baselines: bi-encoders and cross-encoders that sentence-transformers can load.

Weights are read only from safetensors, and code that comes with a model is never run. The default is float32, so that
a baseline loses no quality to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError, ModelNotFoundError
from d2llm.core.extras import require
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.json_values import read_model_json
from d2llm.core.manifest import FILE_NAME
from d2llm.core.progress import Advance
from d2llm.core.types import Task
from d2llm.models.backbone import Backbone
from d2llm.models.device import choose_device, choose_dtype
from d2llm.models.protocols import PlainStudent
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.sources import find_model, fingerprint_model, first_sentence, hub_snapshot, quiet_transformers
from d2llm.models.student import Student
from d2llm.models.student_files import MODULES_FILE, read_student_manifest
from d2llm.models.teachers.pair_teacher import TeacherScores
from d2llm.models.tokens import EncodedTexts
from d2llm.recipe import AutoPooling, BackboneConfig, Frozen, InteractionConfig, Pooling, StudentConfig

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


_BLOCK = 256  # texts between progress reports
_BATCH = 32
_EXTRA = "sentence-transformers"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5")
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Similarities that an inner-product index can search by.
_SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True, slots=True)
class ExternalConfig:
    """The configuration of a third-party model."""

    model: str
    similarity: str

    def model_dump(self, *, mode: str = "json") -> dict[str, Any]:
        """The configuration as plain values."""
        return {"model": self.model, "similarity": self.similarity}


class ExternalBiEncoder(PlainStudent):
    """A sentence-transformers bi-encoder used like a student: the score is the inner product of its vectors.

    If the model's similarity is the cosine, its vectors are normalised to length 1. The model's own prompts for queries
    and passages are used.
    """

    has_dot = True

    def __init__(self, model: Any, *, name: str, fingerprint: str) -> None:
        """Wrap a loaded ``SentenceTransformer``; ``load_external`` loads one from a folder.

        Raises:
            ModelError: its similarity is neither the cosine nor the inner product.
        """
        similarity = str(model.similarity_fn_name)
        if similarity not in _SIMILARITIES:
            raise ModelError(
                f"model '{name}' compares vectors by '{similarity}', which no index here supports; use a model with "
                f"{' or '.join(_SIMILARITIES)}"
            )
        self._model = model
        self.name = name
        self.fingerprint = fingerprint
        self.config = ExternalConfig(name, similarity)
        self.vector_dim = int(model.get_embedding_dimension())
        self.prompts = (_prompt(model, ("query",)) or "", _prompt(model, ("document", "passage", "corpus")) or "")
        """What is put before queries and passages."""

    def encode_queries(
        self, texts: Sequence[str], *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        """Encode with the model's prompt for queries, or with an instruction in its place.

        ``advance`` is called with the number of texts finished.
        """
        prompt = self.prompts[0] if instruction is None else instruction
        return self._encode(self._model.encode_query, "query", prompt, texts, advance)

    def encode_passages(self, texts: Sequence[str], *, advance: Advance | None = None) -> EncodedTexts:
        """Encode with the model's prompt for passages (title and text as one string)."""
        return self._encode(self._model.encode_document, "document", self.prompts[1], texts, advance)

    @property
    def max_tokens(self) -> int | None:
        """How many tokens of a text it reads; None if there is no limit."""
        return self._model.get_max_seq_length()

    def query_vectors(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        """The query vectors, unchanged."""
        return query_vectors

    def score(
        self, query_vector: NDArray[np.float32], passage_vectors: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        """[dim], [n, dim] -> inner products [n]; ``task`` is ignored."""
        return passage_vectors @ query_vector

    def _encode(
        self, encode: Callable[..., Any], route: str, prompt: str | None, texts: Sequence[str], advance: Advance | None
    ) -> EncodedTexts:
        blocks = [np.empty((0, self.vector_dim), np.float32)]
        truncated: list[int] = []
        num_tokens = 0
        for start in range(0, len(texts), _BLOCK):
            block = list(texts[start : start + _BLOCK])
            cut, tokens = _count_tokens(self._model, block, prompt, task=route)
            truncated += [start + index for index in cut]
            num_tokens += tokens
            vectors = encode(
                block,
                prompt=prompt,
                batch_size=_BATCH,
                show_progress_bar=False,
                normalize_embeddings=self.config.similarity == "cosine",
            )
            blocks.append(np.asarray(vectors, np.float32))
            if advance is not None:
                advance(len(block))
        return EncodedTexts(np.concatenate(blocks), tuple(truncated), num_tokens)


class ExternalCrossEncoder:
    """A sentence-transformers cross-encoder, used like a teacher.

    The log-odds are the logit itself for one output, the logit of "1" minus that of "0" for two outputs, and those of
    "entailment" against all other classes for more.
    """

    def __init__(self, model: Any, *, name: str, fingerprint: str) -> None:
        """Wrap a loaded ``CrossEncoder``; ``load_external`` loads one from a folder.

        Raises:
            ModelError: it has three or more outputs, and none of them is called "entailment".
        """
        self._model = model
        self._entailment = _entailment_output(model, name)
        self.name = name
        self.fingerprint = fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """The same for every task, because the model has no prompt."""
        return "none"

    def score_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        task: Task,
        *,
        with_features: bool = False,
        advance: Advance | None = None,
    ) -> TeacherScores:
        """Score (query text, passage full text) pairs; ``advance`` is called with the number of pairs finished."""
        blocks = [np.empty(0, np.float32)]
        num_truncated = num_tokens = 0
        prompt = _prompt(self._model, ())
        for start in range(0, len(pairs), _BLOCK):
            block = [list(pair) for pair in pairs[start : start + _BLOCK]]
            cut, tokens = _count_tokens(self._model, block, prompt)
            num_truncated, num_tokens = num_truncated + len(cut), num_tokens + tokens
            logits = self._model.predict(
                block, batch_size=_BATCH, show_progress_bar=False, activation_fn=torch.nn.Identity()
            )
            blocks.append(self._log_odds(np.asarray(logits, np.float32)))
            if advance is not None:
                advance(len(block))
        return TeacherScores(np.concatenate(blocks), None, num_truncated, num_tokens)

    def _log_odds(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n] or [n, outputs] -> [n]."""
        if self._entailment is None:
            return logits.reshape(-1)
        others = np.delete(logits, self._entailment, axis=1)
        return logits[:, self._entailment] - np.logaddexp.reduce(others, axis=1)


def load_external(
    name: str | Path, *, device: str | torch.device | None = None, dtype: str = "float32"
) -> ExternalBiEncoder | ExternalCrossEncoder:
    """Load a model that sentence-transformers supports; its kind is detected from its files.

    A cross-encoder is declared as such in ``config_sentence_transformers.json`` or is a
    ``...ForSequenceClassification``; a bi-encoder has a ``modules.json``.

    Args:
        name: a folder, a Hub name (owner/model), or ``minilm``.
        device: device to run on; by default the fastest.
        dtype: number format of the weights.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        ModelNotFoundError: there is no such model, or it has no safetensors weights.
        ModelError: the model is of neither kind, needs custom code, or cannot be used (see the classes).
    """
    library = require("sentence_transformers", extra=_EXTRA, purpose="a sentence-transformers model")
    folder = _folder(str(name))
    kind = _kind(folder)
    classes = {"SentenceTransformer": library.SentenceTransformer, "CrossEncoder": library.CrossEncoder}
    if kind not in classes:
        raise ModelError(f"model '{name}' is {kind}; only a bi-encoder or a cross-encoder can be measured here")
    _refuse_pickles(folder)
    chosen = choose_device(device)
    try:
        with quiet_transformers():
            model = classes[kind](
                str(folder),
                device=str(chosen),
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": choose_dtype(chosen, dtype)},
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(
            f"model '{name}' cannot be loaded: {first_sentence(error)}. Custom code is never run; use a model that "
            "sentence-transformers loads without it"
        ) from error
    model.eval()
    wrapper = ExternalCrossEncoder if kind == "CrossEncoder" else ExternalBiEncoder
    return wrapper(model, name=str(name), fingerprint=_fingerprint(folder))


def _folder(name: str) -> Path:
    """The folder of a model, downloaded from the Hub (without pickled weights) if it is not local."""
    location = Path(name).expanduser()
    if location.is_dir():
        return location
    located = find_model(name)
    if Path(located).is_dir():
        return Path(located)
    return hub_snapshot(located, _PATTERNS)


def _kind(folder: Path) -> str:
    declared = _read_json(folder / "config_sentence_transformers.json").get("model_type")
    if declared is not None:
        return str(declared)
    architectures: list[str] = _read_json(folder / "config.json").get("architectures") or []
    if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        return "CrossEncoder"
    if (folder / "modules.json").is_file():
        return "SentenceTransformer"
    return f"not a sentence-transformers model (no modules.json; architectures: {', '.join(architectures) or 'none'})"


def _read_json(path: Path) -> dict[str, Any]:
    return read_model_json(path) if path.is_file() else {}


def _refuse_pickles(folder: Path) -> None:
    """Refuse a model if any part of it has only pickled weights."""
    safe = {path.parent for path in folder.rglob("*.safetensors")}
    pickled = sorted(
        path for path in folder.rglob("*") if path.suffix in _PICKLED and path.parent not in safe and path.is_file()
    )
    # Exports for other backends are in separate folders, which are not read.
    pickled = [path for path in pickled if path.relative_to(folder).parts[0] not in ("onnx", "openvino")]
    if pickled or not safe:
        examples = f" Found {', '.join(str(path.relative_to(folder)) for path in pickled[:3])}:" if pickled else ""
        raise ModelNotFoundError(
            f"{folder}: no safetensors weights in this model or a part of it.{examples} pickled weights are never "
            "loaded; convert them to safetensors first"
        )


def _fingerprint(folder: Path) -> str:
    """Fingerprint of the weights (``fingerprint_model``) and the settings (prompts, pooling, lengths, vocabulary)."""
    weights = {
        path.relative_to(folder).as_posix(): fingerprint_model(str(path))
        for path in sorted({path.parent for path in folder.rglob("*.safetensors")})
    }
    settings = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.json"))
    }
    return fingerprint_json(["sentence-transformers", weights, settings])


def _prompt(model: Any, names: tuple[str, ...]) -> str | None:
    """The model's first prompt among ``names`` that is not empty, or else its default prompt.

    The library gives every model prompts for queries and documents, which are empty if the model has none.
    """
    prompts: dict[str, str] = model.prompts
    named = [prompts[name] for name in names if name in prompts]
    return next(filter(None, named), "" if named else prompts.get(model.default_prompt_name))


def _count_tokens(model: Any, inputs: list[Any], prompt: str | None, **route: str) -> tuple[list[int], int]:
    """The indices of the ``inputs`` that will be cut, and the total number of tokens that are kept."""
    uncut = {"truncation": False, "verbose": False}  # texts that are too long are counted here, so no warning is needed
    features = model.preprocess(inputs, prompt=prompt, processing_kwargs={"text": uncut}, **route)
    if "attention_mask" not in features:  # static embeddings, which read any length
        return [], int(features["input_ids"].numel())
    lengths: NDArray[np.int64] = features["attention_mask"].sum(dim=1).cpu().numpy()
    limit = model.get_max_seq_length()
    if limit is None:
        return [], int(lengths.sum())
    return np.flatnonzero(lengths > limit).tolist(), int(np.minimum(lengths, limit).sum())


def _entailment_output(model: Any, name: str) -> int | None:
    """The index of the output that means yes; None if there is only one output."""
    if model.num_labels == 1:
        return None
    outputs = {str(label).lower(): int(index) for index, label in model.config.id2label.items()}
    if model.num_labels == 2 and "entailment" not in outputs:
        return 1
    if "entailment" not in outputs:
        raise ModelError(
            f"model '{name}' has the outputs {', '.join(outputs)}, none of which means yes; use a model with one or "
            "two outputs, or an NLI model with 'entailment'"
        )
    return outputs["entailment"]


# A bi-encoder as a student that was not trained: the cosine of its vectors, and words ---------------------------------

WORDS_WEIGHT = 0.7
"""Weight of the BM25 of a passage's best window, as a fraction of the most that its query allows, beside cosines.

Measured (docs/log, 2026-11-29): level from .5 to 1.5 for a model whose unrelated texts have cosines of 0.
"""
_TEXTS = (
    "Green tea needs water of 80 degrees.",
    "The parliament passed a law on fishing.",
    "How do I sort a list in Python?",
    "Her brother plays the violin.",
    "symptoms of a vitamin D deficiency",
    "The train to Vienna leaves at noon.",
    "Shares fell after the bank's report.",
    "a good recipe for tomato soup " * 400,
)
"""About different things; the last is longer than most models read."""
_TOLERANCE = 1e-4  # of cosines
_USUAL_TOKENS = 512  # for a model without a limit
_UNNAMED = "sentence-transformers"  # what a student says of a model that was not in a folder


def is_bi_encoder(model: object) -> bool:
    """Whether this is a ``SentenceTransformer``, or the folder of one that is no student of d2llm."""
    if isinstance(model, str | Path):
        folder = Path(model)
        return (folder / MODULES_FILE).is_file() and not (folder / FILE_NAME).is_file()
    return any(kind.__name__ == "SentenceTransformer" for kind in type(model).__mro__)


def write_untrained(model: SentenceTransformer | str | Path, folder: Path) -> Path:
    """Write a student with the vectors of a ``SentenceTransformer``, or of the folder of one; return its folder.

    Its score is 20 times the cosine, and in asymmetric search BM25 with a default weight: the closer the model puts
    unrelated texts, the less. A model that does more than a student (dense layers, other routes for queries) is refused
    rather than approximated. ``d2llm fit-scores`` fits the weight to judged queries, and training changes the
    vectors. A student that the same model made before is kept as it is.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        InputError: the model has no cosine, or does more than a student can; or another student is in the folder.
        ModelError: it cannot be read.

    Example::

        student = Student.load(write_untrained("models/all-MiniLM-L6-v2", Path("my-student")))
    """
    with TemporaryDirectory() as temporary:
        source, name = str(model), str(Path(model).resolve()) if isinstance(model, str | Path) else _UNNAMED
        if not isinstance(model, str | Path):
            source = temporary
            model.save(temporary, create_model_card=False)
        external = load_external(source, device="cpu")
        if not isinstance(external, ExternalBiEncoder) or external.config.similarity != "cosine":
            raise InputError(f"{name}: a student that is not trained scores by cosines, and this model does not")
        student = _with_backbone_of(source, name, external)
        words = TaskFeatureWeights(
            weights={"window_bm25_fraction": _check(student, external, name)}, dev={}, num_queries={}
        )
        student.score_features = ScoreFeatures(tasks={"asymmetric": words})
        if not (folder / FILE_NAME).is_file():
            student.save(folder, merge=True)
        elif read_student_manifest(folder)[0]["fingerprint"] != student.fingerprint:
            raise InputError(f"{folder}: holds another student than this model makes; remove it, or take another name")
    return folder


@contextmanager
def untrained_beside(model: SentenceTransformer | str | Path, folder: Path) -> Generator[Path]:
    """``write_untrained`` for what a block makes of it; if the block fails, a student that was written goes again."""
    is_new = not folder.exists()
    try:
        yield write_untrained(model, folder)
    except BaseException:
        if is_new:
            rmtree(folder, ignore_errors=True)
        raise


def _with_backbone_of(folder: str, name: str, external: ExternalBiEncoder) -> Student:
    limit = external.max_tokens or _USUAL_TOKENS
    query_prompt, passage_prompt = external.prompts
    config = BackboneConfig(
        model=folder,
        tuning=Frozen(),
        max_query_tokens=limit,
        max_passage_tokens=limit,
        query_prefix=query_prompt,
        passage_prefix=passage_prompt,
    )
    backbone = Backbone.load(config, AutoPooling(), device="cpu", dtype="float32")
    # The fingerprint must not depend on a folder that may be temporary, but on the pooling that the folder names.
    lasting, pooling = config.model_copy(update={"model": name}), Pooling.of(backbone.own_pooling.kind)
    interaction = InteractionConfig(head="cosine")
    return Student(StudentConfig(backbone=lasting, pooling=pooling, interaction=interaction), backbone)


def _check(student: Student, external: ExternalBiEncoder, name: str) -> float:
    """Check that a student has a model's vectors; return the weight of words."""
    length = student.vector_dim**0.5  # of this head's vectors; those of a model with a cosine have length 1
    passages = student.encode_passages(_TEXTS).vectors / length
    queries = student.encode_queries(_TEXTS).vectors / length
    theirs = external.encode_passages(_TEXTS).vectors, external.encode_queries(_TEXTS).vectors
    for vectors, expected in zip((passages, queries), theirs, strict=True):
        if vectors.shape != expected.shape or (1 - (vectors * expected).sum(axis=1) > _TOLERANCE).any():
            raise InputError(
                f"{name}: a student cannot have this model's vectors, because it does more than to pool the states of "
                "a transformer (dense layers, other routes for queries, ...); use it as a baseline (d2llm evaluate)"
            )
    unrelated = (passages @ passages.T)[np.triu_indices(len(passages), 1)].mean()
    (scale,) = np.exp([parameter.item() for parameter in student.interaction.parameters()])  # of the cosine
    return float(WORDS_WEIGHT * scale * (1 - unrelated))
