# pyright: basic
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

from sentence_transformers import SentenceTransformer, util

folder, name, asked, found = sys.argv[1:]


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.parts = []

    def handle_data(self, data):
        self.parts.append(data)


def read(path):
    text = path.read_text()
    if path.suffix == ".html":
        parser = Text()
        parser.feed(text)
        text = "".join(parser.parts)
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


corpus = [paragraph for path in sorted(Path(folder).rglob("*.*")) for paragraph in read(path)]
model = SentenceTransformer(name)
passages = model.encode_document(corpus, convert_to_tensor=True)
queries = model.encode_query(json.loads(Path(asked).read_text()), convert_to_tensor=True)
hits = util.semantic_search(queries, passages, top_k=10)
texts = [[corpus[int(hit["corpus_id"])] for hit in ranking] for ranking in hits]
Path(found).write_text(json.dumps(texts))
