"""Tuning of teachers, writers and listwise readers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from d2llm.recipe.sections import InputPath, LoraConfig, Quantization, Section, StudentName
from d2llm.recipe.teacher import LocalTeacherConfig, TeacherConfig


class TeacherTuningConfig(Section):
    """Tuning of the teacher on labelled pairs."""

    loss: Literal["pairs", "lists"] = "pairs"
    """``pairs``: yes/no cross-entropy of each pair. ``lists``: cross-entropy of a softmax over each query's passages,
    plus ``pair_weight`` times the pair loss; usually better for rankings."""
    pair_weight: float = Field(default=0.3, ge=0)
    """With ``lists``, the weight of the pair loss, which keeps the scale of the log-odds. 0: the softmax alone, as in
    RankT5; P(yes) then means nothing."""
    tuning: Literal["lora", "full"] = "lora"
    """``full`` tunes every weight (and needs a much lower learning rate); the tuned teacher is then a complete model.
    """
    lora: LoraConfig = LoraConfig(rank=16, alpha=32)
    quantization: Quantization | None = None
    """Tune adapters on weights that are stored in 8 or 4 bits (QLoRA). By default as ``teacher.quantization``."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass and compute the rest again: less memory for a long
    pair, about a third more time, the same result."""
    learning_rate: float = Field(default=5e-4, gt=0)
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    epochs: int = Field(default=1, ge=0)
    """0: do not tune the teacher."""
    batch_pairs: int = Field(default=32, ge=1)
    part_tokens: int | None = Field(default=None, ge=1)
    """Tokens, including padding, in one pass through the model; gradients are accumulated over passes. By default 512
    on a CPU, and 2,048 to 32,768 elsewhere: the more, the smaller the model and the larger the memory."""
    graph_gib: float | None = Field(default=None, gt=0)
    """Memory for the intermediate results of a query's passages that exceed ``part_tokens``, in GiB; by default a third
    of what is free when the run starts. What does not fit is computed twice, with the same result."""
    num_negatives: int = Field(default=4, ge=1)
    """Negatives per positive, drawn from the plan's hard and easy negatives."""
    students: tuple[StudentName, ...] = ()
    """Students, folders or names, the mean of whose scores of the pairs the teacher learns instead of the data sets'
    judgements (Trans-Encoder)."""
    labels: InputPath | None = None
    """A folder of labels that another teacher made, as ``labels`` of a run folder: its P(yes) are the targets of the
    pairs that it has scored, so that what a large language model said about some lists becomes a teacher that scores
    any. Other pairs keep the data sets' judgements."""
    max_queries: int | None = Field(default=None, ge=1)
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on held-out queries; the best state is kept. By default there are no evaluations, and
    the last state is kept."""
    patience: int = Field(default=5, ge=1)
    """Stop after this many evaluations without improvement."""
    dev_queries: int = Field(default=100, ge=1)
    """Queries of each data set's plan to hold out for these evaluations, at most a fifth. Their positives are never
    used as positives in training."""
    dev_measure: Literal["cross_entropy", "mrr"] = "cross_entropy"
    """How to choose the best state: by the lowest yes/no cross-entropy of the held-out pairs, or by the highest mean
    reciprocal rank of the first positive in the held-out lists."""

    @model_validator(mode="after")
    def _check_quantization(self) -> TeacherTuningConfig:
        if self.tuning == "full" and self.quantization not in (None, "none"):
            raise ValueError('quantised weights cannot be trained: set tuning = "lora", or quantization = "none"')
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> TeacherTuningConfig:
        given = [name for name in ("students", "labels") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError("a teacher learns from students or from labels: leave one of them out")
        for name in given:
            if self.epochs == 0:
                raise ValueError(
                    f"a teacher can learn from {name} only if it is tuned: set epochs above 0, or no {name}"
                )
            if self.dev_measure == "mrr":
                raise ValueError(
                    f"dev_measure mrr needs the data sets' judgements, which {name} replaces: set it to cross_entropy"
                )
        return self

    def base_quantization(self, teacher: TeacherConfig) -> Quantization:
        """How the weights are stored that adapters of ``teacher`` are tuned on."""
        if self.quantization is not None:
            return self.quantization
        return teacher.quantization if isinstance(teacher, LocalTeacherConfig) else "none"


class WriterTuningConfig(Section):
    """Tuning of a local writer on the judged queries of data sets."""

    lora: LoraConfig = LoraConfig(rank=16, alpha=32, dropout=0.0)
    """Without dropout, which takes a tenth of a step on a CPU: in one epoch, no example comes twice."""
    learning_rate: float = Field(default=5e-4, gt=0)
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    epochs: int = Field(default=1, ge=1)
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens, including padding, in one step."""
    part_tokens: int | None = Field(default=None, ge=1)
    """Tokens, including padding, in one pass through the model; gradients are accumulated over passes. By default 512
    on a CPU, and 2,048 to 32,768 elsewhere: the more, the smaller the model and the larger the memory."""
    max_queries: int | None = Field(default=None, ge=1)
    """Train on a random sample of this many queries of each data set."""
    dev_queries: int = Field(default=100, ge=0)
    """Dev queries of each data set on which the loss is measured before and after training."""
    keywords_fraction: float = Field(default=0.25, ge=0, le=1)
    """Fraction of the English questions to turn into keyword queries, by leaving out function words: data sets have
    hardly any."""
    exclude_shared_passages: bool = True
    """Leave out training queries that share a positive with a dev or test query."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)


class ReaderTuningConfig(Section):
    """Tuning of a causal language model that reads passages as vectors (``models.listwise_reader``)."""

    model: str = "smollm2"
    """A causal language model: local folder, Hub name or GGUF file."""
    layers: int | None = Field(default=8, ge=1)
    """Use only this many of its first layers. None: all."""
    lora: LoraConfig = LoraConfig()
    depth: int = Field(default=20, ge=2)
    """Passages of a list: the student's first ones, with ``labels`` of those that have one."""
    steps: int = Field(default=10, ge=1)
    """How many of them are drawn, and no more than there are: nDCG@10 counts ten."""
    alignment: int = Field(default=0, ge=0)
    """Passages from whose vector the model is to repeat the text, before it ranks: the network alone learns it."""
    lists: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]] = (2_000, 4_000)
    """Lists to read in the two stages: for the network alone, then with LoRA. Queries come again if there are fewer."""
    labels: InputPath | None = None
    """A folder of labels that a teacher made, as ``labels`` of a run folder: a list is what it has labelled of a train
    query, and its order is learnt instead of the judgements'."""
    max_queries: int = Field(default=1_500, ge=1)
    """Train queries of each data set."""
    dev_queries: int = Field(default=300, ge=0)
    """Dev queries of each data set on which the ranking is measured."""
    exclude_shared_passages: bool = True
    """Leave out training queries that share a relevant passage with a dev or test query."""
    batch_lists: int = Field(default=8, ge=1)
    """Lists of one step; passages, where they are repeated."""
    network_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the network alone."""
    lora_rate: float = Field(default=5e-4, gt=0)
    """Learning rate with LoRA, for the network too."""
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    checkpoint_minutes: float = Field(default=5.0, gt=0)
