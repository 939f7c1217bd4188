"""The remote writer: an LLM behind any OpenAI-compatible endpoint, which writes all queries of a passage at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import Advance
from d2llm.models.remote.completions import (
    Completion,
    Completions,
    read_completion,
    read_content_refusal,
)
from d2llm.models.remote.endpoint import Answers
from d2llm.models.remote.kept_answers import using
from d2llm.models.writers.answers import describe_problem, parse_answer
from d2llm.models.writers.prompts import WriterPrompts, cut_assignments
from d2llm.models.writers.writer import DEFAULT_TEMPERATURE, Assignment, LastingWriter, WrittenQueries
from d2llm.recipe import RemoteWriterConfig

_TRIAL = Assignment("Cows drink water.", "keywords")


class RemoteWriter(LastingWriter):
    """A writer at a remote endpoint.

    ``fingerprint`` depends on the model's name and declared revision, the prompts and the sampling, but not on the
    address, the key or the pace. Most endpoints cannot promise the same answer for the same seed.

    Raises:
        InputError: there is no such prompt set, or the key's variable is not set.
        ModelNotFoundError: the tokenizer cannot be loaded.
        MissingExtraError: the extra ``remote`` is not installed.
    """

    def __init__(self, config: RemoteWriterConfig) -> None:
        self.config = config
        self.remote = config.remote
        self.prompts = WriterPrompts(config.prompt)
        self.endpoint = Completions(
            config.model,
            self.remote,
            read_completion,
            kept_as=Completion,
            section="writer",
            shorten=(
                "lower writer.max_passage_tokens (or characters_per_token, or set the tokenizer in writer.remote), or "
                "use fewer or shorter examples"
            ),
            read_refusal=read_content_refusal,
        )

    @classmethod
    def load(cls, config: RemoteWriterConfig) -> RemoteWriter:
        """Create a writer and send one short request, so that a wrong address, key or model is reported at once.

        Raises:
            ModelNotFoundError: the endpoint has no such model, or the address does not exist.
            ModelError: the endpoint is unreachable, or refuses the key or a field of the request.
        """
        writer = cls(config)
        with using(None):
            writer.write([_TRIAL])
        return writer

    @property
    def temperature(self) -> float:
        """The temperature of its sampling."""
        return DEFAULT_TEMPERATURE if self.config.temperature is None else self.config.temperature

    @property
    def fingerprint(self) -> str:
        """Identity of everything that affects what is written."""
        config, remote = self.config, self.remote
        sampling = [config.max_new_tokens, self.temperature, config.top_p, remote.extra_body, list(remote.leave_out)]
        reading = [config.max_passage_tokens, remote.tokenizer or remote.characters_per_token, remote.api]
        prompts = self.prompts.fingerprints
        return fingerprint_json(["remote", config.model, remote.revision, prompts, reading, sampling])

    def write_until_error(
        self, assignments: Sequence[Assignment], *, advance: Advance | None = None
    ) -> Answers[WrittenQueries]:
        """Carry assignments out, one request each, until the first error (``LastingWriter``).

        A passage that the endpoint refuses for its content is a result with a ``problem``. ``advance`` is called from
        another thread. The errors are:

        - InputError: a prompt is longer than the endpoint can read.
        - ModelError: the endpoint failed for longer than ``remote.patience_minutes``, or refuses requests.
        """
        kept, cut = cut_assignments(assignments, self.endpoint.lengths, max_tokens=self.config.max_passage_tokens)
        prompts = [self.prompts[assignment.kind].fill(assignment) for assignment in kept]
        settings = [self._settings(assignment) for assignment in kept]
        answers = self.endpoint.complete(prompts, settings, advance=advance)
        written = {
            index: self._result(kept[index], prompts[index], answer, cut[index])
            for index, answer in answers.by_index.items()
        }
        return Answers(written, answers.error)

    def _settings(self, assignment: Assignment) -> dict[str, Any]:
        """The fields of a request besides model and prompt."""
        # A query that stands alone has one right form.
        steady = assignment.kind == "standalone" and self.config.temperature is None
        return self.remote.body(
            max_tokens=self.config.max_new_tokens * assignment.num_lengths,
            temperature=0.0 if steady else self.temperature,
            top_p=self.config.top_p,
            seed=assignment.seed,
        )

    def _result(self, assignment: Assignment, prompt: str, answer: Completion, was_cut: bool) -> WrittenQueries:
        is_passage = assignment.kind == "answer"
        queries, num_dropped = parse_answer(
            answer.text,
            prompt=self.prompts[assignment.kind].known_text(assignment),
            num_queries=assignment.num_queries,
            is_complete=answer.is_complete,
            is_passage=is_passage,
        )
        problem = None
        if not queries:
            problem = answer.refusal or describe_problem(
                answer.text, is_complete=answer.is_complete, is_passage=is_passage
            )
        num_read, num_written, is_estimated = self.endpoint.count_tokens(prompt, answer)
        return WrittenQueries(
            queries,
            num_read,
            num_written,
            num_dropped=num_dropped,
            truncated=was_cut,
            tokens_are_estimated=is_estimated,
            problem=problem,
        )
