"""Commands that use an artifact: predict, serve."""

import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.cli.options import Debug, Flag, SkipBadRows, Text, TextPair, finite
from kdexport.errors import SpecError, counted

Writing = partial(Flag, rich_help_panel="Language models")
Batching = partial(Flag, rich_help_panel="Batching")
Vectors = partial(Flag, rich_help_panel="Sentence embeddings")
Limits = partial(Flag, rich_help_panel="Limits")
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6}
_MILLISECONDS = {"ms": 1.0, "s": 1e3}
_IN_SECONDS = ("max_writing_queue", "timeout", "drain_delay", "grace", "load_timeout")


def predict(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT[:VARIANT]", help="An artifact's or a run's folder.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Texts, images or recordings; else stdin's lines.")] = None,
    file: Annotated[str | None, Flag("--file", "-f", help="Rows: a file or folder as in run; or lines.")] = None,
    text: Text = None,
    text_pair: TextPair = None,
    skip_bad_rows: SkipBadRows = False,
    variant: Annotated[str | None, Flag(help="fp32 or int8.", show_default="the recommended one")] = None,
    batch_size: Annotated[int, Flag(min=1, help="Texts that run at once.")] = 32,
    threads: Annotated[int | None, Flag(min=1, help="Threads of the runtime.", show_default="all cores")] = None,
    scores: Annotated[bool, Flag("--scores", help="Print the probability of every label (or word).")] = False,
    words: Annotated[
        Path | None, Flag(help="File: the only words that speech may have, one a line.", show_default="any")
    ] = None,
    max_new_tokens: Annotated[int, Writing(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, Writing(min=0, callback=finite, help="Of sampling; 0: greedy.")] = 0.0,
    top_k: Annotated[int, Writing(min=0, help="Sample among the k best tokens; 0: all.")] = 0,
    top_p: Annotated[float, Writing(max=1, callback=finite, help="Nucleus sampling: total probability.")] = 1.0,
    stop: Annotated[list[str] | None, Writing(help="Stop at this text; repeatable.")] = None,
    seed: Annotated[int | None, Writing(min=0, help="Random seed for sampling.")] = None,
    perplexity: Annotated[bool, Writing("--perplexity", help="Score each text instead of continuing it.")] = False,
    out: Annotated[
        Path | None, Vectors("--out", "-o", help="File to write, .npy, instead of printing.", show_default="none")
    ] = None,
    prompt: Annotated[str | None, Vectors(help="Name of a prompt of the model, for each text.")] = None,
    dimensions: Annotated[int | None, Vectors(min=1, help="First ones of each vector.", show_default="all")] = None,
    dtype: Annotated[Any, Vectors(parser=str, help="Numbers in --out: float (32 bits), int8, binary.")] = "float",
    debug: Debug = False,
) -> None:
    """Print predictions as JSON lines, in the order of the inputs; language models continue each text.

    [bold]Examples[/bold]
      kdexport predict runs/demo "Shares rose after the merger"
      kdexport predict runs/demo --file texts.csv > answers.jsonl
      cat texts.txt | kdexport predict runs/demo
      kdexport predict runs/clothes a.png b.png
      kdexport predict runs/causal-lm "ROMEO:" --max-new-tokens 100 --temperature 0.8
      kdexport predict runs/vectors --file texts.csv --out vectors.npy --dtype int8
    """
    from contextlib import nullcontext

    import msgspec

    from kdexport import spec
    from kdexport.data.read import read_lines, read_stream
    from kdexport.data.sources import read_test, to_answer
    from kdexport.progress import warn
    from kdexport.runtime.artifact import read_columns, split_name
    from kdexport.runtime.generation import Sampling, write
    from kdexport.runtime.predictor import load, row_of
    from kdexport.runtime.vectors import appending
    from kdexport.spec.flags import rows_in

    model = load(artifact, variant, threads, read_lines(words) if words else None)
    columns = read_columns(split_name(artifact)[0])
    reads, generates = model.task.modality, model.task.generates
    if inputs and file:
        raise SpecError("texts and --file were both given", "Give one of them")
    asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    try:
        sampling = msgspec.convert(asked | {"stop": stop or [], "seed": seed}, Sampling)
    except msgspec.ValidationError as error:
        key = str(error).rpartition("$.")[2].partition("[")[0].strip("`")
        raise SpecError(f"--{key.replace('_', '-')}: {str(error).partition(' - at')[0]}") from None
    if not generates and (perplexity or sampling != Sampling()):
        raise SpecError(f"{artifact} is for {model.task.name}, and writes nothing", "Leave out the options of writing")
    if not model.task.embeds and (out or prompt or dimensions or dtype != "float"):
        raise SpecError(
            f"{artifact} is for {model.task.name}, and makes no vectors", "Leave out the options of vectors"
        )
    if dtype != "float" and not out:
        raise SpecError(f"--dtype {dtype} is for a file of vectors", "Name it: --out FILE.npy")
    if out and (out.suffix != ".npy" or out.exists()):
        what = "exists already" if out.suffix == ".npy" else "does not end in .npy"
        raise SpecError(f"--out {out} {what}", "Name another file")
    embed: Any = partial(model.embed, batch_size=batch_size, prompt=prompt, dimensions=dimensions, dtype=dtype)
    given = rows_in(file, text, text_pair, None, skip_bad_rows) or spec.Data(train="stdin")
    if inputs:
        # Invalid UTF-8 comes as lone surrogates, which JSON can't hold.
        clean = [one.encode("utf-8", "replace").decode() if reads == "text" else one for one in inputs]
        rows: Iterator[Any] = ({"asked": one, "row": row_of(model.task, one, i)} for i, one in enumerate(clean))
    else:
        source = read_test(given, ranked=model.task.together) if file else read_stream(sys.stdin.buffer)
        rows = to_answer(source, given, model.task, columns)
    bad = 0
    with appending(out, embed([])) if out else nullcontext() as append:
        while chunk := list(islice(rows, 32 * batch_size)):
            good, bad = [one for one in chunk if one is not None], bad + chunk.count(None)
            if append:
                append(embed([one["row"]["text"] for one in good]))
                continue
            if generates and not perplexity:
                answers: Iterable[Any] = (write(model, one["asked"], sampling) for one in good)
            elif model.task.embeds:
                answers = model.task.decode(embed([one["row"]["text"] for one in good]), [])
            else:
                answers = model.answer([one["row"] for one in good], batch_size)
            for one, answer in zip(good, answers, strict=True):
                named: dict[str, Any] = {reads: one["id"] if isinstance(one["asked"], bytes) else one["asked"]}
                if "text_pair" in model.task.columns:
                    named = {column: one["row"][column] for column in ("text", "text_pair")}
                sys.stdout.write(msgspec.json.encode(named | answer.to_dict(scores)).decode() + "\n")
            sys.stdout.flush()
    if bad:
        warn(f"predict: {counted(bad, 'bad row')} left out")


def serve(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="[NAME=]ARTIFACT[:VARIANT]...", help="Artifacts or runs; default: the first.")
    ],
    host: Annotated[str, Flag(help="Address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, Flag(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    admin_host: Annotated[str, Flag(help="Address of metrics and reloads.")] = "127.0.0.1",
    admin_port: Annotated[int, Flag(min=-1, max=65535, help="Port of metrics and reloads; -1: none.")] = 8081,
    grpc_port: Annotated[int | None, Flag(min=0, max=65535, help="Port of gRPC.", show_default="none")] = None,
    api_keys: Annotated[
        Path | None,
        Flag(help="File: one API key a line, # comments; or $KDEXPORT_API_KEYS, comma-separated.", show_default="none"),
    ] = None,
    allow_host: Annotated[
        list[str] | None, Flag(metavar="NAME", help="Another Host or Origin to accept on loopback; *: any; repeatable.")
    ] = None,
    threads: Annotated[int | None, Batching(min=1, help="Batches that run at once.", show_default="all cores")] = None,
    max_batch: Annotated[int, Batching(min=1, help="Texts of a batch.")] = 32,
    max_batch_tokens: Annotated[int, Batching(min=1, help="Padded tokens of a batch; longer rows run alone.")] = 2048,
    max_wait: Annotated[str, Batching(help="How long a batch waits for more texts, like 2ms.")] = "0ms",
    max_queue: Annotated[str, Limits(help="Work that would wait longer gets a 429, like 5ms.")] = "100ms",
    max_writing_queue: Annotated[str, Limits(help="The same for prompts to language models.")] = "10s",
    timeout: Annotated[str, Limits(help="Time limit of one request; then 504.")] = "30s",
    max_body: Annotated[
        str | None, Limits(help="Bytes of a body, decompressed.", show_default="2MB, of sound 4MB, of images 10MB")
    ] = None,
    max_rows: Annotated[int, Limits(min=1, help="Texts of a request.")] = 256,
    max_chars: Annotated[int, Limits(min=1, help="Characters of a text.")] = 100_000,
    drain_delay: Annotated[str, Limits(help="How long to accept requests after SIGTERM.")] = "0s",
    grace: Annotated[str, Limits(help="How long accepted requests may take then.")] = "30s",
    load_timeout: Annotated[str, Limits(help="Time limit of loading and checking a model.")] = "300s",
    access_log: Annotated[str, Flag(help="JSON lines on stdout: all, errors or off.")] = "all",
    tracing: Annotated[bool, Flag("--tracing", help="OpenTelemetry spans; $OTEL_… say where to.")] = False,
    debug: Debug = False,
) -> None:
    """Serve artifacts over HTTP: Open Inference Protocol, text-embeddings-inference, Hugging Face, SageMaker, OpenAI.

    SIGTERM drains, SIGHUP reloads the artifacts. / shows a page, /openapi.json the API.

    [bold]Examples[/bold]
      kdexport serve runs/demo
      kdexport serve tickets=runs/tickets:int8 news=runs/demo --port 9000
      kdexport serve runs/demo --host 0.0.0.0 --api-keys keys.txt --max-queue 5ms
    """
    given: dict[str, Any] = locals()
    from kdexport.serve.server import serve as run_server
    from kdexport.serve.settings import Settings
    from kdexport.spec.flags import SECONDS, quantity

    if access_log not in ("all", "errors", "off"):
        raise SpecError(f"--access-log {access_log!r} is none of all, errors, off")
    given |= {name: quantity(given[name], f"--{name.replace('_', '-')}", SECONDS) for name in _IN_SECONDS}
    given |= {
        "admin_port": None if admin_port < 0 else admin_port,
        "max_wait_ms": quantity(max_wait, "--max-wait", _MILLISECONDS),
        "max_queue_ms": quantity(max_queue, "--max-queue", _MILLISECONDS),
        "max_body": int(quantity(max_body, "--max-body", _BYTES)) if max_body else None,
        "api_keys": _keys(api_keys),
        "allow_host": tuple(allow_host or ()),
    }
    settings = Settings(**{name: value for name, value in given.items() if name in Settings.__struct_fields__})
    raise typer.Exit(run_server(artifacts, settings))


def _keys(file: Path | None) -> tuple[str, ...]:
    variable, source = os.environ.get("KDEXPORT_API_KEYS"), "KDEXPORT_API_KEYS"
    given = None if variable is None else variable.split(",")
    if file is not None:
        source = f"--api-keys {file}"
        try:
            lines = file.read_bytes().decode("utf-8-sig").split("\n")  # splitlines also ends lines within a key
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{source} can't be read: {getattr(error, 'strerror', error)}") from None
        given = [line for line in lines if not line.lstrip().startswith("#")]
    if given is None:
        return ()
    keys = tuple(key for one in given if (key := one.strip(" \t\r\n")))
    if not keys:  # fail closed
        raise SpecError(f"{source} holds no key", "Write one a line in a file, or between commas in the environment")
    return keys
