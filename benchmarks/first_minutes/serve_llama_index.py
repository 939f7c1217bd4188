# pyright: basic, reportMissingImports=false
import asyncio
import sys

from llama_agents.server import WorkflowServer
from llama_index.core import StorageContext, load_index_from_storage
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.tools.mcp.utils import workflow_as_mcp
from workflows import Workflow, step
from workflows.events import StartEvent, StopEvent

name, kind, port = sys.argv[1:]
storage = StorageContext.from_defaults(persist_dir="documentation")
index = load_index_from_storage(storage, embed_model=HuggingFaceEmbedding(model_name=name))
retriever = index.as_retriever(similarity_top_k=10)


class Question(StartEvent):
    query: str


class Search(Workflow):
    @step
    async def search(self, event: Question) -> StopEvent:
        return StopEvent(result=[scored.text for scored in await retriever.aretrieve(event.query)])


if kind == "agent":
    workflow_as_mcp(Search(), start_event_model=Question).run(transport="streamable-http", port=int(port))
else:
    server = WorkflowServer()
    server.add_workflow("search", Search())
    asyncio.run(server.serve("127.0.0.1", int(port)))
