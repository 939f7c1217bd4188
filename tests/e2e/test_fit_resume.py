"""A fit that is killed in every stage: the next call continues, and nothing is written or asked for twice."""

from __future__ import annotations

import json
import signal

from d2llm.models.student import Student
from d2llm.retrieval.index import Index
from local_endpoint import local_endpoint
from prepared_process import PreparedProcess, script
from tiny_fit import NUM_DOCUMENTS, ask_about_passage, write_documents
from tiny_models import tiny_student_config, write_tiny_model

BATCH = 8
KILLED_IN = {
    "reading": "fit.Fit, 'plan'",
    "writing": "write_queries.DraftStore, 'add', after=2",
    "reviewing": "fit, 'write_written_data'",
    "training": "distill, '_write'",
    "comparing": "served_index.ServedIndex, 'serve'",
    "the last line": "served_index.FitFolder, 'write_manifest', after=2",
}
"""When -> which function never returns from its call number ``after``."""
RUN = f"""
import os, signal, sys
from pathlib import Path
from d2llm.fitting import fit, served_index, write_queries
from d2llm.fitting.fit import Fit
from d2llm.training import distill
from tiny_fit import settings_for

write_queries._ASSIGNMENTS_AT_ONCE = {BATCH}
documents, student, url, where = sys.argv[1:]

def kill_in(owner, name, after=1):
    function, calls = getattr(owner, name), []
    def killed(*args, **options):
        calls.append(1)
        result = function(*args, **options) if len(calls) < after or after > 1 else None
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, killed)

if where:
    exec(f"kill_in({{where}})")
Fit([Path(documents)], None, settings_for(Path(student), url), device="cpu", dtype="float32").finish()
"""


def test_a_fit_killed_in_each_stage_ends_like_one_that_was_not(tmp_path):
    model = write_tiny_model(tmp_path / "model", "bert")
    student = tmp_path / "student"
    Student.create(tiny_student_config(model), device="cpu", dtype="float32").save(student)
    reports = []
    for name, kills in (("killed", [*KILLED_IN.values()]), ("undisturbed", [])):
        documents = write_documents(tmp_path / name / "docs")
        with local_endpoint(ask_about_passage) as endpoint:
            for where in [*kills, ""]:
                with PreparedProcess(script, RUN, str(documents), str(student), endpoint.url, where) as process:
                    status = process.wait()
                    assert status == (-signal.SIGKILL if where else 0), process.errors
            questions = [request for request in endpoint.requests if "zorb" in request.prompt]
        assert len(questions) == NUM_DOCUMENTS
        result = json.loads((tmp_path / name / "docs.search" / "report.json").read_text())
        reports.append(
            {key: result[key] for key in ("num_passages", "num_kept", "rejected", "data", "kept", "verdict")}
        )
        assert len(Index.open(tmp_path / name / "docs.search")) == NUM_DOCUMENTS
    assert reports[0] == reports[1]
