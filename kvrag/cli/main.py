"""The `kvrag` command: options of all commands, the commands, and what becomes of errors.

Exit codes: 0 done, 1 a failure, 2 bad input or settings, 3 done but something was skipped,
4 verified and found wrong, 130 interrupted (`serve`, which is stopped that way, ends with 0), 141
the reader of stdout went away. An error is one line on stderr; `--verbose` adds the traceback.

Heavy imports stand inside the commands, so that help and completion are quick.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrag import __version__
from kvrag.cli import config, corpus, documents, model, store
from kvrag.cli.arguments import moved_to_front
from kvrag.cli.ask import ask
from kvrag.cli.common import Globals, globals_of, one_line, parse_setting, settings_of
from kvrag.cli.precompute import precompute
from kvrag.cli.verify import verify

__all__ = ["app", "main", "run"]

_INTERRUPTED = 130
_BROKEN_PIPE = 141

#: A command that another module's Typer app defines, with its own help and options.
_FORWARDED = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}

app = typer.Typer(
    help=(
        "Answers over a corpus whose KV caches were computed beforehand. The options below may "
        "stand behind the command, too."
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("precompute")(precompute)
app.command("ask")(ask)
app.command("verify")(verify)


@app.command("serve", context_settings=_FORWARDED)
def _serve(context: typer.Context) -> None:
    """Answer questions over HTTP."""

    def serve_app() -> typer.Typer:
        from kvrag.cli.serve import serve

        serving = typer.Typer(rich_markup_mode=None, add_completion=False)
        serving.command()(serve)
        return serving

    _forward(context, serve_app)


app.add_typer(documents.app, name="documents")
app.add_typer(corpus.app, name="corpus")
app.add_typer(model.app, name="model")
app.add_typer(store.app, name="store")
app.add_typer(config.app, name="config")


@app.command("bench", context_settings=_FORWARDED)
def _bench(context: typer.Context) -> None:
    """Measure speed and fidelity on this machine."""

    def bench_app() -> typer.Typer:
        from kvrag.bench.cli import app as benchmarks

        return benchmarks

    _forward(context, bench_app)


def _forward(context: typer.Context, load: Callable[[], typer.Typer]) -> None:
    """Hand the rest of the command line to an app that is imported only now.

    Its commands find the settings in `context.obj`.
    """
    settings = settings_of(context)
    command = typer.main.get_command(load())
    with command.make_context(
        context.info_name, list(context.args), parent=context.parent, obj=settings
    ) as inner:
        command.invoke(inner)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvrag {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Packaged model, Hugging Face folder or .gguf file.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Folder of stored KV, catalog and index.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weights and stored KV: bfloat16, float32 or float64.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="Folder of evaluation data for `kvrag bench`.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting; may be repeated."),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="Settings file instead of ./kvrag.toml."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log more, and show tracebacks.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    given = globals_of(context)
    given.verbose = verbose
    values = {
        "model": model,
        "home": home,
        "dtype": dtype,
        "threads": threads,
        "eval_data": eval_data,
    }
    given.overrides = dict(parse_setting(text) for text in assignments or ())
    given.overrides |= {name: value for name, value in values.items() if value is not None}
    _log_to_stderr(verbose=verbose)
    if config_file is not None:
        if not config_file.expanduser().is_file():
            raise typer.BadParameter(f"{config_file} is no file", param_hint="--config")
        # `kvrag.config` looks for the file under this name; settings are built nowhere else.
        os.environ["KVRAG_CONFIG"] = str(config_file.expanduser())


def main() -> None:
    """The entry point: run the command line of this process and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line in this process; the exit code."""
    given = Globals()
    try:
        try:
            command = typer.main.get_command(app)
            ordered = _ordered(command.params, arguments)
            result = command(ordered, prog_name="kvrag", obj=given, standalone_mode=False)
            sys.stdout.flush()
        except SystemExit as exc:
            # Typer leaves no other way out when stdout's reader is gone.
            _drop_stdout()
            return _BROKEN_PIPE if exc.code else 0
    except BrokenPipeError:
        _drop_stdout()
        return _BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except Exception as exc:
        return _report(exc, verbose=given.verbose)
    return result if isinstance(result, int) else 0


def _ordered(options: Sequence[Any], arguments: Sequence[str]) -> list[str]:
    """The arguments with the settings among these options first, wherever they were given."""
    names: dict[bool, list[str]] = {True: [], False: []}
    for option in options:
        if option.expose_value and not option.is_eager:
            names[option.is_flag] += option.opts
    return moved_to_front(arguments, with_value=names[False], flags=names[True])


def _report(exc: Exception, *, verbose: bool) -> int:
    """Tell of an error in one line; the exit code that belongs to it."""
    if verbose:
        import traceback

        traceback.print_exception(exc)
    usage = getattr(exc, "format_message", None)
    if type(exc).__name__ == "NoArgsIsHelpError":
        exc.show()  # type: ignore[attr-defined]  # its "message" is the help text
        return 2
    if usage is not None:
        context = getattr(exc, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        sentence, code = f"{usage().rstrip('.')}{hint}", int(getattr(exc, "exit_code", 2))
    elif _is_one_of(exc, _BAD_INPUT) or (_is_one_of(exc, _OURS) and _is_wrong_place(exc)):
        sentence, code = str(exc), 2
    elif _is_one_of(exc, _OURS):
        sentence, code = str(exc), 1
    elif isinstance(exc, OSError):
        where = f"{exc.filename}: " if exc.filename else ""
        sentence, code = f"{where}{exc.strerror or exc}", 1
    else:
        sentence = f"unexpected {type(exc).__name__}: {exc} (--verbose shows the traceback)"
        code = 1
    sys.stderr.write(f"error: {one_line(sentence)}\n")
    return code


#: The roots of our errors, by module; and those that whoever typed the command can put right.
_OURS = {
    "kvrag.errors": ("KvragError",),
    "kvrag.store.errors": ("StoreError",),
    "kvrag.retrieval.errors": ("RetrievalError",),
}
_BAD_INPUT = {
    "kvrag.errors": (
        "InputError",
        "ModelNotFoundError",
        "SettingsError",
        "UnsupportedModelError",
    ),
    "kvrag.store.errors": ("EncryptionKeyError", "UnknownCodecError"),
    "kvrag.retrieval.errors": ("DocumentError",),
}


def _is_one_of(exc: Exception, classes: Mapping[str, Sequence[str]]) -> bool:
    """Whether `exc` is of a class named by module. What was never imported raised nothing."""
    return any(
        isinstance(exc, getattr(sys.modules[module], name))
        for module, names in classes.items()
        if module in sys.modules
        for name in names
    )


#: What the system says of a path that was given and can never serve. A full disk is a failure.
_WRONG_PLACE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP}
)


def _is_wrong_place(exc: Exception) -> bool:
    """Whether an error of ours came of a folder that is not writable, or is none."""
    return isinstance(exc.__cause__, OSError) and exc.__cause__.errno in _WRONG_PLACE


def _drop_stdout() -> None:
    """Nobody reads stdout any more: what is still buffered must not fail at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.close(devnull)


def _log_to_stderr(*, verbose: bool) -> None:
    import logging

    class Lines(logging.Handler):
        """One line a record, to whatever stderr is by then: a progress bar replaces it."""

        def emit(self, record: logging.LogRecord) -> None:
            level, text = record.levelname.lower(), one_line(record.getMessage())
            sys.stderr.write(f"{level}: {text}\n")

    logger = logging.getLogger("kvrag")
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logger.handlers = [Lines()]
