# docker build -t tokbench .
# docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work" tokbench run --models ssdd,klvae --res 256
# Without a GPU: no --gpus. Loading processes hand images over in shared memory, of which containers have 64 MB without --ipc.
FROM python:3.11-slim
# torch.compile and Triton call a compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch torchvision
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY tokbench tokbench
COPY baselines baselines
COPY ssdd_models ssdd_models
RUN pip install --no-cache-dir ".[hf]"
WORKDIR /work
# In the mounted folder, which whoever runs it may write to.
ENV XDG_CACHE_HOME=/work/.cache XDG_CONFIG_HOME=/work/.cache
ENTRYPOINT ["tokbench"]
