# pyright: basic, reportMissingImports=false
import json
import sys
from pathlib import Path

from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

folder, name, asked, found = sys.argv[1:]
documents = SimpleDirectoryReader(folder, recursive=True).load_data()
index = VectorStoreIndex.from_documents(documents, embed_model=HuggingFaceEmbedding(model_name=name))
index.storage_context.persist("documentation")
retriever = index.as_retriever(similarity_top_k=10)
questions = json.loads(Path(asked).read_text())
texts = [[scored.text for scored in retriever.retrieve(question)] for question in questions]
Path(found).write_text(json.dumps(texts))
