# docker build -t tokbench . && docker run --gpus all -v $PWD:/work tokbench run --models ssdd,klvae --res 256
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY tokbench tokbench
COPY baselines baselines
COPY ssdd_models ssdd_models
RUN pip install --no-cache-dir torch torchvision && pip install --no-cache-dir ".[hf]"
WORKDIR /work
ENV XDG_CACHE_HOME=/work/.cache
ENTRYPOINT ["tokbench"]
