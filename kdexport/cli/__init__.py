"""The commands: parse, call the function of the same name, print. The one place that catches our errors."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdexport import ranks
from kdexport.cli import bench, build, use
from kdexport.cli.options import Flag
from kdexport.errors import ElsewhereError, Interrupted, KdexportError, RunError
from kdexport.files import fault_of
from kdexport.progress import Outlet

app = typer.Typer(
    name="kdexport", help="Distil a teacher into a small ONNX model, verified, measured, and ready to serve.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
)  # fmt: skip
for command in (
    build.run, build.demo, build.init, build.export, use.predict, use.serve,
    bench.bench, bench.report, bench.compare, bench.doctor,
):  # fmt: skip
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, Flag("--version", help="Print the version.")] = False
) -> None:
    if version:
        from kdexport import __version__

        typer.echo(f"kdexport {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; errors end in one line, not a traceback."""
    try:
        if ranks.size() > 1 and not {"run", "demo"} & {*sys.argv[1:2]}:
            if not ranks.leads():
                raise ElsewhereError(2)
            raise RunError("kdexport run and demo alone work in several processes", "Start this one by itself")
        with ranks.joined():
            app()
    except ElsewhereError as error:
        raise SystemExit(error.code) from None
    except KdexportError as error:
        _fail(str(error), 2)
    except Interrupted as error:
        _fail(f"interrupted. {error}", 130)
    except OSError as error:  # a user's file; our own raise a KdexportError
        if isinstance(error, BrokenPipeError):  # `kdexport predict … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        fault = fault_of(error, Path(str(error.filename)) if error.filename else None)
        _fail(str(fault) if fault else f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except Exception as error:
        if not (fault := fault_of(error, None)):
            raise
        _fail(str(fault), 2)


def _fail(line: str, code: int) -> None:
    if "--debug" in sys.argv:
        raise
    last = Outlet(2)  # a stderr that is closed, full or unread changes no exit code
    last.put(f"error: {line}\n".encode(errors="backslashreplace"))
    last.close()
    raise SystemExit(code) from None
