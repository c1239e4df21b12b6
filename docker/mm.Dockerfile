# OpenMMLab image: segmentation and detection with mmcv's operators for the CPU. Build from the repository root.
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
ARG TORCH_PIP_OPTIONS=""
RUN pip install --constraint constraints.txt ${TORCH_PIP_OPTIONS} torch torchvision \
 && pip install --constraint constraints.txt "setuptools<81" wheel ninja psutil
# No wheel of mmcv fits this torch: it is built from source, about eight minutes on two cores.
RUN MMCV_WITH_OPS=1 pip install --constraint constraints.txt --no-build-isolation mmcv
COPY pyproject.toml setup.py README.md LICENSE ./
COPY mambascope mambascope
RUN pip install --constraint constraints.txt ".[mm]" && cd / && python -c "import mambascope.mm, mmcv.ops, mmdet, mmseg"

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 libgomp1 \
 && rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 1000 user
COPY --from=build /opt/venv /opt/venv
COPY --chown=user tools /home/user/tools
COPY --chown=user mm_configs /home/user/mm_configs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER user
WORKDIR /home/user
CMD ["mim", "--help"]
