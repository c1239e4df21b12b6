# CUDA image: torch, causal-conv1d and mamba-ssm with the Mamba-1 scan really built. Build from the repository root.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch torchvision "setuptools<81" wheel ninja packaging
# Without FORCE_BUILD the setup scripts fetch a wheel, or leave the kernels out where they find none. Releases of
# mamba-ssm after 2.3.2 build no Mamba-1 scan unless KEEP_CUDA_BUILD is set, and fail at the first call, not here:
# so the extensions themselves are imported.
ARG MAX_JOBS=4
ENV MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
RUN MAX_JOBS=${MAX_JOBS} pip install --constraint constraints.txt --no-build-isolation causal-conv1d \
 && MAX_JOBS=${MAX_JOBS} pip install --constraint constraints.txt --no-build-isolation mamba-ssm \
 && python -c "import torch, causal_conv1d_cuda, selective_scan_cuda"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY mambascope mambascope
RUN pip install --constraint constraints.txt ".[export]"

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
# A compiler stays: Triton builds its launcher when a kernel first runs.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 python3 python3-dev \
 && rm -rf /var/lib/apt/lists/* && userdel --remove ubuntu && useradd --create-home --uid 1000 user
COPY --from=build /opt/venv /opt/venv
COPY --chown=user tools /home/user/tools
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER user
WORKDIR /home/user
CMD ["python", "-c", "import mambascope.ops as ops; print(ops.report())"]
