"""Response bodies are read by attributes from the results that they show."""

from __future__ import annotations

import json
import math
from datetime import datetime

from d2llm.core.types import Certificate, Excerpt, MissingShard, Passage, Query, RankedDocument, RankedPassage, Ranking
from d2llm.server.response_schemas import FastJSONResponse, search_response

BREAD = Passage(
    "bread", "Flour and water.", "Bread", "food", 1, {"day": datetime(2021, 5, 1), "year": 2021, "ok": True}
)
SALT = Passage("salt", "Salt is white.", document_id="food")
ORIGIN = {"index": {"name": "kitchen", "version": 3, "student": "s", "fingerprint": "f"}, "request_id": "r"}


def test_a_ranking_is_its_own_answer():
    ranked = RankedPassage(1, BREAD, 2.5, document=RankedDocument("food", 2.5, 2, ((SALT, 0.5),)), before=(SALT,))
    certificate = Certificate(1, 0, -math.inf, 2.5, 1)
    missing = (MissingShard(7, "s3://shards/7", "no answer"),)
    ranking = Ranking(
        Query("q1", "bread"), (ranked,), 1, {"score": 0.1}, certificate, missing_shards=missing, num_shards=8
    )
    excerpts = [Excerpt((ranked,), (SALT, BREAD), "Salt is white. Flour and water.")]
    response = json.loads(bytes(FastJSONResponse(search_response(ranking, excerpts, [0.25], **ORIGIN)).body))
    assert response["query"] == "bread"
    assert (response["missing_shards"], response["shards"]) == ([7], "7/8")
    assert response["certificate"]["highest_bound_left"] is None
    assert response["certificate"]["kth_score"] == 2.5
    (first,) = response["passages"]
    assert (first["id"], first["title"], first["rank"], first["score"], first["probability"]) == (
        *("bread", "Bread", 1, 2.5),
        0.25,
    )
    assert first["metadata"] == {"day": "2021-05-01T00:00:00", "year": 2021, "ok": True}
    assert first["document"]["others"] == [{"id": "salt", "title": "", "text": "Salt is white.", "score": 0.5}]
    assert first["before"] == [{"id": "salt", "title": "", "text": "Salt is white.", "score": None}]
    assert response["excerpts"] == [
        {"document_id": "food", "passage_ids": ["salt", "bread"], "ranks": [1], "text": excerpts[0].text}
    ]
    assert {name: response[name] for name in ORIGIN} == ORIGIN
