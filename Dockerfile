# A server in a container. It is set up by `make setup`, as a checkout is, with the server's packages instead of the developers'.
#   docker build -t d2llm .          for CUDA: --build-arg TORCH=torch==2.13.0
#   docker compose up                compose.yaml has what it is run with; docs/how-to/deploy.md explains it
FROM python:3.11-slim

RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
# A new volume takes over the owner of its folder. The cache has compiled loops, exported graphs and what comes from the Hub.
RUN useradd --create-home --uid 1000 d2llm && install --directory --owner=d2llm --group=d2llm /data /home/d2llm/.cache

WORKDIR /app
COPY Makefile constraints.txt pyproject.toml README.md LICENSE ./
COPY scripts scripts
COPY src src
COPY packages packages
ARG TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
ENV PIP_NO_CACHE_DIR=1
RUN make setup EXTRAS=mcp,export TORCH="$TORCH"

USER d2llm
WORKDIR /data
VOLUME /data
# Settings, not options of CMD: options would win over what `docker run --env` or compose.yaml says.
ENV PATH=/app/.venv/bin:$PATH D2LLM_SERVE_INDEX=docs.index D2LLM_SERVE_HOST=0.0.0.0 \
    D2LLM_SERVE_PORT=8000
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=15s --timeout=5s \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$D2LLM_SERVE_PORT/health', timeout=4)"
CMD ["d2llm", "serve"]
