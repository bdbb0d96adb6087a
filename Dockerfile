# The commands in a container, on a CPU or on an NVIDIA GPU (which needs the NVIDIA Container Toolkit):
#   docker build -t ecore .                          docker run --rm -it -v "$PWD:/work" ecore demo
#   docker build -t ecore --build-arg DEVICE=cuda .  docker run --rm -it -v "$PWD:/work" --gpus all ecore demo
ARG DEVICE=cpu

FROM ubuntu:24.04 AS compiler-cpu
ENV ECORE_CUDA=OFF

FROM nvidia/cuda:12.9.1-devel-ubuntu24.04 AS compiler-cuda
ENV ECORE_CUDA=ON

FROM compiler-${DEVICE} AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps -w /wheels /src

FROM ubuntu:24.04
ARG DEVICE
# Triton compiles the launchers of its kernels at run time.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
COPY constraints.txt /
# PyTorch's own index has builds for the CPU alone, gigabytes smaller; those of PyPI bring CUDA.
RUN python3 -m venv /opt/ecore \
    && if [ "$DEVICE" = cpu ]; then export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; fi \
    && /opt/ecore/bin/pip install --no-cache-dir -c /constraints.txt "$(echo /wheels/*.whl)[figures]"
ENV PATH=/opt/ecore/bin:$PATH
USER ubuntu
WORKDIR /work
ENTRYPOINT ["ecore"]
CMD ["info"]
