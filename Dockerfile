# Serves a model over HTTP on the CPU; see docs/deploy.md.
#
#   docker build -t dmdd .                 # .onnx files, without jax
#   docker build -t dmdd --target full .   # also workdirs and StableHLO files
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONPATH=/app PIP_NO_CACHE_DIR=1 XDG_CACHE_HOME=/tmp
WORKDIR /app
RUN useradd --system --uid 10001 --no-create-home dmdd
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE ./
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
  "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["python", "tools/serve.py", "--host=0.0.0.0", "--port=8000"]
CMD ["--workdir=/model.onnx"]

FROM base AS full
COPY dmdd_jax dmdd_jax
COPY configs configs
COPY tools tools
RUN pip install -c constraints.txt '.[serve,onnx]'
USER dmdd

FROM base AS onnx
RUN pip install -c constraints.txt absl-py fastapi ml_collections numpy \
  onnxruntime pillow prometheus_client python-multipart uvicorn
COPY dmdd_jax dmdd_jax
COPY tools/serve.py tools/serve.py
USER dmdd
