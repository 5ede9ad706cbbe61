# syntax=docker/dockerfile:1
# NVIDIA's PyTorch image (CUDA, cuDNN, NCCL, NVIDIA's apex) with TransformerEngine, Megatron-Core and this package.
#
#   docker build --tag megatron-hyperp .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 --volume "$PWD/runs:/workspace/runs" megatron-hyperp \
#     torchrun --nproc-per-node gpu examples/pretrain_gpt.py --config examples/configs/dense_d8.yaml ...
#
# The image comes with NVIDIA's apex, built. The "apex" on PyPI is something else. Image and TransformerEngine are those
# that Megatron-LM's branch of release 0.19 builds and tests with (docs/versions.md).
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Built against the image's own PyTorch, whose constraint on this one package is lifted for it.
ARG TRANSFORMER_ENGINE=2.17.1
ENV NVTE_FRAMEWORK=pytorch
RUN sed -i -E '/^transformer[-_]engine/Id' /etc/pip/constraint.txt \
 && pip install --no-cache-dir --no-build-isolation "transformer-engine[core_cu13,pytorch]==${TRANSFORMER_ENGINE}"

# Dependencies first: they change less often than the sources. The image's PyTorch, NumPy and the like stay.
ARG MEGATRON_CORE=0.19.2
# hadolint ignore=DL3013  (what has no version here is pinned by the image's own constraints, or hardly matters)
RUN pip install --no-cache-dir \
      "megatron-core==${MEGATRON_CORE}" psutil scipy "sentencepiece==0.2.3" tokenizers pyyaml rich matplotlib \
      pyarrow zstandard tensorboard "wandb==0.31.0" pytest pytest-timeout pytest-xdist

WORKDIR /workspace/megatron-hyperp
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
 && python -c "import apex, fused_weight_gradient_mlp_cuda" \
 && useradd --create-home --shell /bin/bash trainer \
 && mkdir -p /workspace/runs \
 && chown -R trainer:trainer /workspace

USER trainer
ENV PYTHONUNBUFFERED=1

# Two steps of training on a tiny corpus, on whatever device the container sees.
HEALTHCHECK --interval=1h --timeout=5m --start-period=5m --retries=1 CMD ["python", "tools/check_installation.py"]
CMD ["python", "tools/check_installation.py"]
