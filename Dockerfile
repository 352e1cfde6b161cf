# Two images. The server, which is what `docker build .` makes: no torch, no pip, no compiler, not root.
#
#   docker build -t kdexport-serve .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --stop-timeout 40 \
#     -v "$PWD/runs/demo/artifact:/models/demo:ro" -p 8080:8080 kdexport-serve /models/demo
#
# The whole toolkit:
#
#   docker build --target distill -t kdexport .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" kdexport run --teacher ./my-bert --data tickets.csv

FROM python:3.11-slim-bookworm AS source
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kdexport ./kdexport


FROM source AS distill
# PyPI's torch for x86-64 brings CUDA, some gigabytes. `--build-arg PIP_EXTRA_INDEX_URL=…` with the address of
# PyTorch's wheels for CPUs takes theirs: of one version, pip prefers the one marked `+cpu`.
ARG PIP_EXTRA_INDEX_URL=""
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt torch \
    && pip install -c constraints.txt '.[all]'
# The base comes without bytecode, and its user can't write it. In /cache any user may keep things:
# `-v kdexport-cache:/cache`. torch asks for a name, which a bare number hasn't.
RUN python -m compileall -q -x site-packages /usr/local/lib/python3.11 \
    && install -d -m 1777 /cache
ENV HOME=/cache USER=kdexport ORT_DISABLE_TELEMETRY=1
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["kdexport"]
CMD ["--help"]


FROM source AS packages
# `--build-arg EXTRAS=cpu,serve,grpc,otel` for gRPC and traces.
ARG EXTRAS=cpu,serve
# The base's pip installs from outside, so the environment has no pip, no setuptools and nothing to install with.
# The packages' own tests, stubs and C sources go. Bytecode is made below, of what the server loads.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/kdexport \
    && pip --python /opt/kdexport/bin/python install --no-compile -c constraints.txt ".[$EXTRAS]" \
    && find /opt/kdexport \( -type d -name tests -o -type f -name '*.py[ix]' -o -type f -name '*.pxd' -o -type f -name '*.[ch]' \) \
       -prune -exec rm -r {} +


FROM python:3.11-slim-bookworm AS serve
LABEL org.opencontainers.image.title="kdexport-serve" \
      org.opencontainers.image.description="Serves text classifiers that kdexport distilled, by ONNX Runtime" \
      org.opencontainers.image.licenses="Apache-2.0"
# A server installs nothing; and scanners have less to report.
RUN rm -rf /usr/local/lib/python3.11/site-packages/* /usr/local/lib/python3.11/ensurepip /usr/local/bin/pip*
COPY --from=packages /opt/kdexport /opt/kdexport
ENV PATH=/opt/kdexport/bin:$PATH
# The base comes without bytecode, and a read-only image can't keep any: what a server loads is compiled here, once.
# All there is would be five times as much.
RUN kdexport serve --help \
    && python -c 'import kdexport.spec.flags, kdexport.serve.server, jinja2, markdown_it, onnxruntime, tokenizers, uvicorn.lifespan.off; from kdexport.tasks import names, task_class; [task_class(name) for name in names()]'
# A batch takes one core, and OpenBLAS, which nothing here calls, would start a thread for every core of the host.
# The linter takes TOKENIZERS for a secret.
# hadolint ignore=DL3064
ENV HF_HUB_OFFLINE=1 \
    OPENBLAS_NUM_THREADS=1 \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TOKENIZERS_PARALLELISM=false
USER 10001:10001
# Empty, so that nothing is found by a relative path, which a model's external data may hold.
WORKDIR /nowhere
EXPOSE 8080
STOPSIGNAL SIGTERM
# Of the port above: publish another by -p, rather than changing it. Kubernetes ignores this and asks by its own probes.
# Not by urllib, which would ask a proxy.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-ISc", "\
import http.client; \
server = http.client.HTTPConnection('127.0.0.1', 8080, timeout=2); \
server.request('GET', '/v2/health/ready'); \
raise SystemExit(server.getresponse().status != 200)"]
# What is given to `docker run` replaces the CMD alone: other folders, and flags, which win over these here.
# Metrics and reloads stay on 127.0.0.1:8081 of the container; `--admin-host 0.0.0.0` lets others in, to reloads with an
# API key only.
ENTRYPOINT ["kdexport", "serve", "--host", "0.0.0.0", "--port", "8080"]
CMD ["/models/model"]
