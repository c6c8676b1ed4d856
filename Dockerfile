# One image for the launcher, for work on GPUs and for Beam's workers: all run the same code.
#
#   build     docker build -t IMAGE .
#   launch    docker run --rm --entrypoint courier -v "$PWD:/shop" -w /shop IMAGE \
#                 refresh --ds 2026-01-06
#   on a GPU  the same with --gpus all; training runs in this image as well
#   workers   courier refresh … -- --runner=DataflowRunner --sdk_container_image=IMAGE \
#                 --sdk_location=container …
#
# It runs as user 10001. To write to a folder of yours, add `--user "$(id -u)" -e HOME=/tmp`.
# GPUs need an NVIDIA driver of version 580 or newer (CUDA 13).

# The launcher and its workers must have the same Python (3.11 or 3.12) and the same Beam, the one
# in requirements.txt.
ARG PYTHON_VERSION=3.11
ARG BEAM_VERSION=2.77.0

FROM apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION} AS beam

FROM python:${PYTHON_VERSION}-slim-bookworm

# Dataflow mounts its GPU driver there; elsewhere the folder is missing, which does no harm.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PYTHONUNBUFFERED=1

# The slow layer comes first and changes with the pins only. It includes the test tools: small
# beside CUDA, and one list of pins serves all. Into the global Python: boot starts workers in
# virtual environments of its own, which see the global packages only.
COPY requirements.txt /src/
RUN pip install --no-cache-dir -r /src/requirements.txt && pip check

# Beam's boot program, with its licences; a worker needs nothing else of Beam's image.
COPY --from=beam /opt/apache/beam /opt/apache/beam

# beam-venv is where boot makes those environments: the path is fixed, and a job fails without it.
RUN useradd --uid 10001 --create-home courier \
    && install -d -o courier -g courier /opt/apache/beam-venv

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && rm -rf build ./*.egg-info

# For a runner whose workers get a staging folder that only root may write: --build-arg RUN_AS=root
ARG RUN_AS=courier
USER ${RUN_AS}
WORKDIR /home/courier
ENTRYPOINT ["/opt/apache/beam/boot"]
