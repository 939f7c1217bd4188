"""The remote writer: an LLM behind any OpenAI-compatible endpoint, which writes all queries of a passage at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.recipe import RemoteWriterConfig, WriterConfig
from d2llm.models.length_limit import TextLengths
from d2llm.models.remote.completions import TOKENS_ARE_ESTIMATED, Completion, read_completion, read_content_refusal
from d2llm.models.remote.endpoint import CompletionEndpoint
from d2llm.models.writers.answers import describe_problem, parse_answer
from d2llm.models.writers.prompts import WriterPrompts, cut_assignments
from d2llm.models.writers.writer import DEFAULT_TEMPERATURE, Assignment, LastingWriter, PartlyWritten, WrittenQueries

_log = logging.getLogger(__name__)

_TRIAL = Assignment("Cows drink water.", "keywords")


class RemoteWriter(LastingWriter):
    """A writer at a remote endpoint.

    ``fingerprint`` depends on the model's name and declared revision, the prompts and the sampling, but not on the
    address, the key or the pace. Most endpoints cannot promise the same answer for the same seed.

    Raises:
        InputError: there is no section ``remote``, no such prompt set, or the key's variable is not set.
        ModelNotFoundError: the tokenizer cannot be loaded.
        MissingExtraError: the extra ``remote`` is not installed.
    """

    def __init__(self, config: WriterConfig) -> None:
        self.config = config
        self.remote = _section(config)
        self.prompts = WriterPrompts(config.prompt_set)
        self.endpoint = CompletionEndpoint(
            config.model,
            self.remote,
            read_completion,
            answer_type=Completion,
            section="writer",
            shorten=(
                "lower writer.max_passage_tokens (or characters_per_token, or set the tokenizer in writer.remote), or "
                "use fewer or shorter examples"
            ),
            read_refusal=read_content_refusal,
        )
        self._lengths = TextLengths.of_endpoint(self.remote)
        self._reported = False

    @classmethod
    def load(cls, config: WriterConfig, *, device: Any = None, dtype: Any = None) -> RemoteWriter:
        """Create a writer and send one short request, so that a wrong address, key or model is reported at once.

        ``device`` and ``dtype`` do not apply to a remote writer and are ignored.

        Raises:
            ModelNotFoundError: the endpoint has no such model, or the address does not exist.
            ModelError: the endpoint is unreachable, or refuses the key or a field of the request.
        """
        del device, dtype
        writer = cls(config)
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
        self, assignments: Sequence[Assignment], *, advance: Callable[[int], None] | None = None
    ) -> PartlyWritten:
        """Carry assignments out, one request each, until the first error (``LastingWriter``).

        A passage that the endpoint refuses for its content is a result with a ``problem``. ``advance`` is called from
        another thread. The errors are:

        - InputError: a prompt is longer than the endpoint can read.
        - ModelError: the endpoint failed for longer than ``remote.patience_minutes``, or refuses requests.
        """
        kept, cut = cut_assignments(assignments, self._lengths, max_tokens=self.config.max_passage_tokens)
        prompts = [self.prompts[assignment.kind].fill(assignment) for assignment in kept]
        settings = [self._settings(assignment) for assignment in kept]
        answers, error = self.endpoint.complete_until_error(prompts, settings, advance=advance)
        results = {
            place: self._result(kept[place], prompts[place], answer, cut[place])
            for place, answer in sorted(answers.items())
        }
        num_estimated = sum(result.tokens_are_estimated for result in results.values())
        if num_estimated and not self._reported:
            self._reported = True
            _log.warning(
                TOKENS_ARE_ESTIMATED,
                *(self.remote.url, self.remote.characters_per_token),
            )
        return results, error

    def _settings(self, assignment: Assignment) -> dict[str, Any]:
        """The fields of a request besides model and prompt."""
        return self.remote.body(
            max_tokens=self.config.max_new_tokens * assignment.num_lengths,
            temperature=self.temperature,
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
        num_prompt, num_written = answer.num_prompt_tokens, answer.num_written_tokens
        return WrittenQueries(
            queries,
            self._lengths.estimate(prompt) if num_prompt is None else num_prompt,
            self._lengths.estimate(answer.text) if num_written is None else num_written,
            num_dropped=num_dropped,
            truncated=was_cut,
            tokens_are_estimated=num_prompt is None or num_written is None,
            problem=problem,
        )


def _section(config: WriterConfig) -> RemoteWriterConfig:
    if config.remote is None:
        raise InputError(f"the remote writer '{config.model}' has no address; add [writer.remote] with url = ...")
    return config.remote
