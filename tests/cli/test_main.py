"""The command as a whole: help, versions, options that all take, errors and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import typer

from kvrag import __version__
from tests.cli.conftest import execute, start

#: What only the commands that need it may import.
#: (Typer imports pydantic by itself where it is installed.)
HEAVY = ("torch", "numpy", "pydantic_settings", "rich", "fastapi", "faiss", "tokenizers", "jinja2")


def test_help_names_every_command(environment):
    result = execute("--help")
    assert result.code == 0
    for command in ("precompute", "ask", "serve", "model", "store", "config", "bench"):
        assert f"  {command} " in result.out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["ask", "--help"], ["store"]])
def test_nothing_heavy_is_imported(environment, arguments):
    code = (
        "import sys\n"
        "from kvrag.cli.main import run\n"
        f"run({arguments!r})\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_version(kvrag):
    result = kvrag("--version")
    assert (result.code, result.out, result.err) == (0, f"kvrag {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["model"], ["store"], ["config"]])
def test_no_command_shows_help(kvrag, arguments):
    result = kvrag(*arguments)
    assert result.code == 2
    assert "Commands" in result.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "No such command 'nope'"),
        (["ask"], "Missing argument 'question' (see kvrag ask --help)"),
        (["ask", "x", "--nope"], "No such option: --nope"),
        (["ask", "x", "--k", "many"], "--k"),
        (["--threads", "0", "config", "show"], "setting 'threads' is 0"),
        (["--dtype", "int4", "config", "show"], "setting 'dtype' is 'int4'"),
        (["--config", "gone.toml", "config", "show"], "gone.toml is no file"),
        (["--set", "k", "config", "show"], "'k' is not of the form name=value"),
        (["--set", "=3", "config", "show"], "'=3' is not of the form name=value"),
        (["--set", "nope=3", "config", "show"], "unknown setting 'nope'; known are model, home"),
        (["--set", "_env_file=x", "config", "show"], "unknown setting '_env_file'"),
        (["--set", "self=x", "config", "show"], "unknown setting 'self'"),
        (["--set", "k=0", "config", "show"], "setting 'k' is 0"),
        (["--set", "k=many", "config", "show"], "setting 'k' is 'many'"),
        (["--set", "k=[4]", "config", "show"], "setting 'k' is [4]"),
        (["--set", "k=1\nratio=0.5", "config", "show"], "setting 'k' is '1\\nratio=0.5'"),
        (["--set", "port=99999", "serve"], "setting 'port' is 99999"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(kvrag, arguments, says):
    result = kvrag(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert says in result.error


def test_unknown_settings_are_named(kvrag, tmp_path, monkeypatch):
    settings = tmp_path / "mine.toml"
    settings.write_text('modle = "x"\n')
    result = kvrag("--config", settings, "config", "show")
    assert result.code == 2
    assert "unknown setting 'modle'" in result.error
    settings.write_text("model = \n")
    assert "cannot be read as TOML" in kvrag("--config", settings, "config", "show").error
    monkeypatch.delenv("KVRAG_CONFIG")
    monkeypatch.setenv("KVRAG_RATOI", "0.5")
    result = kvrag("config", "show")
    assert result.code == 2
    assert "KVRAG_RATOI is no setting" in result.error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--home", "/x y", "--set", "k=7", "config", "show", "--json"],
        ["config", "--set=k=7", "show", "--home=/x y", "--json"],
        ["config", "show", "--set", "k=3", "--json", "--home", "/x y", "--set", "k=7"],
        ["--home", "/z", "config", "show", "--set", "k=7", "--json", "--home", "/x y"],
    ],
)
def test_settings_may_stand_anywhere(kvrag, arguments):
    """Behind the command they were "No such option", with no word of where they belong."""
    shown = kvrag(*arguments).json
    assert (shown["home"]["value"], shown["k"]["value"]) == ("/x y", 7)


def test_a_setting_without_its_value_is_said_to_lack_it(kvrag):
    assert "'--home' requires an argument" in kvrag("config", "show", "--home").error
    assert "unexpected extra argument" in kvrag("config", "show", "--", "--home").error


def test_an_error_has_a_traceback_only_when_asked(kvrag):
    quiet = kvrag("--model", "/nowhere", "ask", "x")
    assert quiet.code == 2
    assert "no model '/nowhere'" in quiet.error
    loud = kvrag("--verbose", "--model", "/nowhere", "ask", "x")
    assert loud.code == 2
    assert "Traceback" in loud.err
    assert loud.err.splitlines()[-1] == quiet.error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (
            ZeroDivisionError("two\nlines\x1b[31m"),
            1,
            "unexpected ZeroDivisionError: two lines\ufffd",
        ),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied"),
    ],
)
def test_what_a_command_may_raise(kvrag, monkeypatch, error, code, line):
    monkeypatch.setattr(os, "dup2", lambda *args: None)  # the descriptors here are pytest's
    stdout = sys.stdout

    def fail(*args, **options):
        raise error

    monkeypatch.setattr("kvrag.config.Settings.__init__", fail)
    try:
        result = kvrag("config", "show")
    finally:
        sys.stdout = stdout  # Typer wraps it when a pipe breaks
    assert result.code == code
    assert line in result.err
    assert "Traceback" not in result.err


def test_errors_of_every_room_have_a_code(kvrag, monkeypatch):
    from kvrag.errors import BusyError, ModelError, UnsupportedModelError
    from kvrag.retrieval.errors import CatalogError, DocumentError
    from kvrag.store.errors import TierError, UnknownCodecError

    expected = {
        UnsupportedModelError("m"): 2,
        DocumentError("d"): 2,
        UnknownCodecError("c"): 2,
        ModelError("m"): 1,
        BusyError("b"): 1,
        CatalogError("c"): 1,
        TierError("disk", "gone"): 1,
    }
    for error, code in expected.items():

        def fail(context, error=error, **overrides):
            raise error

        monkeypatch.setattr("kvrag.cli.config.settings_of", fail)
        result = kvrag("config", "show")
        assert (result.code, result.error) == (code, f"error: {error}")


def test_kernels_that_cannot_run_are_a_wrong_setting(kvrag, monkeypatch):
    """Regression: it was a failure, 1, although whoever typed it can put it right."""
    monkeypatch.setitem(sys.modules, "triton", None)
    result = kvrag("--set", "kernels=triton", "ask", "Who?")
    assert result.code == 2
    assert "kernels 'triton' are not possible here" in result.error


def test_a_models_dir_that_can_never_serve_is_a_wrong_setting(kvrag, tmp_path):
    """Regression: it was a failure, 1."""
    model, file = tmp_path / "some.gguf", tmp_path / "file"
    model.write_bytes(b"GGUF")
    file.write_bytes(b"")
    result = kvrag("--model", model, "--set", f"models_dir={file}/models", "model", "info")
    assert result.code == 2
    assert f"cannot be converted into {file}/models: Not a directory" in result.error


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EIO, 1)],
    ids=errno.errorcode.get,
)
def test_a_folder_that_is_not_writable_is_2_and_a_full_disk_1(kvrag, monkeypatch, number, code):
    from kvrag.errors import ModelError

    def fail(context, **overrides):
        raise ModelError("m") from OSError(number, os.strerror(number))

    monkeypatch.setattr("kvrag.cli.config.settings_of", fail)
    result = kvrag("config", "show")
    assert (result.code, result.error) == (code, "error: m")


def test_warnings_of_our_loggers_are_lines_on_stderr(kvrag, monkeypatch):
    import logging

    def warn(context):
        logging.getLogger("kvrag.store.slot").warning("tier %s:\n gone", "disk")
        logging.getLogger("kvrag.store.slot").info("not shown")

    monkeypatch.setattr("kvrag.cli.config.settings_of", warn)
    assert "warning: tier disk: gone\n" in kvrag("config", "show").err
    assert "info: not shown\n" in kvrag("-v", "config", "show").err


def test_a_reader_that_goes_away_is_no_error(environment):
    process = start("config", "show")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert err == ""


def test_interrupt_is_quiet(environment):
    process = start("ask", "-", stdin=subprocess.PIPE)
    time.sleep(3)  # by then it waits for the question
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_serve_and_bench_get_the_options_that_all_take(kvrag, monkeypatch):
    """Both live in apps of their own that are imported when they run."""
    seen = {}
    benchmarks = typer.Typer()

    def serve(context: typer.Context, port: int = 0) -> None:
        seen["serve"] = (context.obj.threads, port)

    @benchmarks.command()
    def first(context: typer.Context) -> None:
        seen["bench"] = context.obj.threads

    benchmarks.command("second")(lambda: None)
    monkeypatch.setattr("kvrag.cli.serve.serve", serve)
    monkeypatch.setattr("kvrag.bench.cli.app", benchmarks)
    assert kvrag("--threads", "2", "serve", "--port", "7").code == 0
    assert kvrag("--threads", "2", "bench", "first").code == 0
    assert seen == {"serve": (2, 7), "bench": 2}
    assert kvrag("serve", "--port", "8", "--threads", "3").code == 0
    assert kvrag("bench", "--threads", "3", "first").code == 0
    assert seen == {"serve": (3, 8), "bench": 3}
    assert "No such option" in kvrag("serve", "--nope").error


def test_serve_puts_its_own_options_over_the_settings(kvrag, environment, monkeypatch):
    pytest.importorskip("uvicorn", reason="serving needs the extra kvrag[serve]")
    served = []
    monkeypatch.setattr("kvrag.serving.run.run", lambda settings, announce: served.append(settings))
    monkeypatch.setenv("KVRAG_QUEUE_SIZE", "5")
    before = dict(os.environ)
    assert kvrag("--threads", 2, "--set", "port=7", "--set", "k=9", "serve", "--port", 8).code == 0
    assert dict(os.environ) == before
    (settings,) = served
    assert (settings.threads, settings.k, settings.port, settings.queue_size) == (2, 9, 8, 5)
    assert str(settings.home) == environment["KVRAG_HOME"]
    assert kvrag("serve", "--host", "").code == 0
    assert served[-1].host == ""
