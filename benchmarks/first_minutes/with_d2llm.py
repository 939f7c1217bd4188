import json
import sys
from pathlib import Path

from d2llm import Index, find_documents

folder, _, asked, found = sys.argv[1:]
index = Index.create("documentation.index", "d2llm-minilm")
index.upsert_documents(find_documents([folder]), lenient_metadata=True)
rankings = index.search(json.loads(Path(asked).read_text()), top_k=10)
texts = [[scored.passage.text for scored in ranking.passages] for ranking in rankings]
Path(found).write_text(json.dumps(texts))
