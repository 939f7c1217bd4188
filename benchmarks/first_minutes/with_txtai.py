# pyright: basic, reportMissingImports=false
import json
import sys
from pathlib import Path

from txtai import Embeddings
from txtai.pipeline import Textractor

folder, name, asked, found = sys.argv[1:]
textractor = Textractor(paragraphs=True, backend=None)
embeddings = Embeddings(path=name, content=True, hybrid=True)
embeddings.index(text for path in sorted(Path(folder).rglob("*.*")) for text in textractor(str(path)))
embeddings.save("documentation")
results = embeddings.batchsearch(json.loads(Path(asked).read_text()), 10)
Path(found).write_text(json.dumps([[scored["text"] for scored in ranking] for ranking in results]))
