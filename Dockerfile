# The server of `mome serve` with the bundled models. Build and run:
#   docker build -t mome .
#   docker run --read-only --tmpfs /tmp --stop-timeout 30 -v mome-data:/data -e MOME_TOKEN -p 127.0.0.1:8000:8000 mome
# It listens at all addresses of its container, and therefore needs a token. A running job may take 20 s to finish at a
# stop; Docker alone would kill it after 10 s, and a job that is killed twice fails.
FROM python:3.12-slim-bookworm

# Without a GPU, name PyTorch's index of CPU wheels: the image becomes several GB smaller.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.10"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mome ./mome
COPY kernels ./kernels
RUN pip install --no-cache-dir ".[serve,dicom,dicomweb,fast]" && rm -rf /src

# Numbers, because Kubernetes checks by the number that the user is not root.
RUN groupadd --gid 10001 mome && useradd --create-home --uid 10001 --gid 10001 mome \
    && install -d -o mome -g mome -m 0700 /data
USER 10001:10001
WORKDIR /home/mome
# Nothing is loaded from a network at run time.
ENV HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib
VOLUME /data
EXPOSE 8000
# `http.client` asks no proxy of the environment.
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["python", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["mome", "serve", "--host", "0.0.0.0", "--port", "8000", "--data", "/data"]
