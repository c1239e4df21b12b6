# CPU image: training, evaluation, prediction and export, with the compiled CPU kernels. Build from the repository root.
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
# Options for pip where torch's CPU build comes from another index; without them the larger CUDA build is installed.
ARG TORCH_PIP_OPTIONS=""
RUN pip install --constraint constraints.txt ${TORCH_PIP_OPTIONS} torch torchvision
COPY pyproject.toml setup.py README.md LICENSE ./
COPY mambascope mambascope
RUN pip install --constraint constraints.txt ".[export]"
# elsewhere than beside the sources, which would be imported instead of what was installed
RUN cd / && python -c "from mambascope.ops import native; print(native.info())"

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 user
COPY --from=build /opt/venv /opt/venv
COPY --chown=user tools /home/user/tools
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER user
WORKDIR /home/user
CMD ["python", "-c", "import mambascope.ops as ops; print(ops.report())"]
