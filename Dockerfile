# The whole toolkit: docker build -t kdexport . && docker run --rm -v "$PWD:/data" kdexport run --help
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kdexport ./kdexport
RUN pip install -c constraints.txt torch \
    && pip install -c constraints.txt '.[all]'

RUN useradd --create-home kdexport
USER kdexport
WORKDIR /data
ENTRYPOINT ["kdexport"]
CMD ["--help"]
