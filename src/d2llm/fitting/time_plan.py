"""Divides the time for a fit among its stages, from the speeds that were measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass

TRAINING_PASSES = 4
"""What training on a text costs, in passes of plain encoding: two forward and one backward pass."""
WRITING_SHARE = 0.55
"""Share of the time for writing and training that goes to writing."""
MIN_TRAINING_SECONDS = 60.0
"""With less time for training than this, nothing is trained: the weights of the score are fitted only."""
MIN_WRITING_SECONDS = 30.0
TEACHER_SHARE = 0.3
"""Share of the time for training that goes to a teacher's judgements, if there is a teacher."""
_OVERHEAD_SECONDS = 60.0  # loading models, fitting weights, writing reports
_CORPUS_PASSES = 3  # mining; the indexes of the untuned and the trained student
_EVALUATED_PASSAGES = 2_000  # encoded in each evaluation on dev, and for fitting weights
_NUM_EVALUATIONS = 8


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Seconds for each stage that is still to come.

    ``training`` includes mining and, if there is a teacher, its labels; 0 if there is no time for it. ``measuring``
    covers the report and the index of the student that is kept. ``max_queries`` can be trained on in that time.
    """

    writing: float
    training: float
    measuring: float
    max_queries: int

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return self.writing + self.training + self.measuring


def plan_time(
    seconds_left: float,
    *,
    num_passages: int,
    passages_per_second: float,
    corpus_passages_per_second: float | None = None,
    num_negatives: int,
    is_written: bool = False,
    has_teacher: bool = False,
) -> TimePlan:
    """Plan the stages after the index has been built.

    Args:
        seconds_left: for all of them.
        num_passages: size of the corpus.
        passages_per_second: how fast the student encodes passages in this process, where it is trained.
        corpus_passages_per_second: how fast the whole corpus is encoded, by workers of a cluster if there are any; by
            default as fast as in this process.
        num_negatives: hard negatives of a query in each step of training.
        is_written: the queries have been written already.
        has_teacher: whether a teacher labels the training queries.
    """
    one_pass = num_passages / (corpus_passages_per_second or passages_per_second)
    evaluations = _NUM_EVALUATIONS * min(num_passages, _EVALUATED_PASSAGES) / passages_per_second
    fixed = _OVERHEAD_SECONDS + _CORPUS_PASSES * one_pass + evaluations
    free = seconds_left - fixed
    writing = 0.0 if is_written else max(MIN_WRITING_SECONDS, free * WRITING_SHARE)
    training = max(0.0, free - writing)
    if training < MIN_TRAINING_SECONDS:
        without = _OVERHEAD_SECONDS + 2 * one_pass
        writing = 0.0 if is_written else max(MIN_WRITING_SECONDS, seconds_left - without)
        return TimePlan(writing, 0.0, without, 0)
    steps = training * (1 - TEACHER_SHARE if has_teacher else 1)
    per_query = (2 + num_negatives) * TRAINING_PASSES / passages_per_second
    return TimePlan(writing, training, fixed, max(1, int(steps / per_query)))
