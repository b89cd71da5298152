"""`python -m agentrt`, run as a user runs it: real processes, the real model."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentrt import __version__
from agentrt.__main__ import main
from agentrt.config import default_cache_dir

TOOLS = '''
def look_up(reservation_id: str) -> str:
    """Look up a reservation by its id."""
    return f"Reservation {reservation_id} flies from Denver to Miami on May 20."
'''


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agentrt", *arguments]


@pytest.fixture(scope="module", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The commands' own cache folder: the models of the user's, and an empty disk tier."""
    models, folder = default_cache_dir() / "models", tmp_path_factory.mktemp("cache")
    models.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTRT_CACHE_DIR", str(folder))
        yield folder


def run(*arguments: str, cwd: Path | None = None, stdin: str = "") -> tuple[str, str]:
    """stdout and stderr of a command that succeeds."""
    done = subprocess.run(
        command(*arguments), input=stdin, cwd=cwd, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def table(text: str) -> dict[str, str]:
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines())


# ---- the commands


def test_run_answers_a_prompt():
    out, err = run("run", "What is the capital of France?", "--max-tokens", "24")
    assert "Paris" in out
    assert out.endswith("\n")
    assert err == ""  # no terminal, no progress


def test_chat_reads_a_pipe_keeps_the_conversation_and_calls_tools(tmp_path):
    (tmp_path / "desk.py").write_text(TOOLS)
    options = ["--tools", "desk:look_up", "--tool-choice", "once", "--max-tokens", "48"]
    messages = "Please look up reservation ZX12AB.\n\nPlease look up reservation 4BMN53.\n/quit\nno"
    _, err = run("chat", *options, cwd=tmp_path, stdin=messages)
    called = re.findall(r'^\[call\] look_up {"reservation_id": "(\w+)"}$', err, re.MULTILINE)
    assert called == ["ZX12AB", "4BMN53"]
    for reservation_id in called:
        assert f"[result] Reservation {reservation_id} flies" in err


def test_bench_replays_the_built_in_workload():
    out, err = run("bench", "--agents", "2", "--wait-scale", "0", "--progress")
    rows = table(out)
    assert rows["agents"].startswith("2, 0 cut")
    assert rows["turns"] == "8"
    prompt, cached, computed, output = (
        int(rows[name].split()[0].replace(",", ""))
        for name in ("prompt tokens", "of them from the cache", "of them computed", "output tokens")
    )
    assert prompt == cached + computed
    assert cached > prompt / 2
    assert output == 2 * 4 * 24
    assert "loading 100 %" in err


def test_info_says_how_the_model_runs():
    rows = table(run("info", "--max-context", "2048")[0])
    assert rows["model"].startswith("SmolLM2-135M")
    assert "30 layers" in rows["architecture"]
    assert rows["context"] == "2,048 tokens (model: 8,192)"


def test_cache_shows_verifies_and_clears_what_runs_left_on_disk(cache_dir):
    assert "no disk tier" in run("cache", "--cache-dir", str(cache_dir / "elsewhere"))[0]
    question = " ".join(["Is it far from Rome to Oslo?"] * 60)  # whole blocks of KV
    assert run("run", question, "--max-tokens", "2")[0]
    shown = run("cache")[0]
    assert re.search(r"namespace '': [1-9]\d* records", shown), shown
    assert re.search(r"^verified [1-9]\d* records: 0 damaged$", run("cache", "--check")[0], re.M)
    assert "records" not in run("cache", "--clear")[0]


def hear_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_at_once_and_cleanly():
    story = command("run", "Tell me a very long story.", "--max-tokens", "4000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell starts what it runs in the background deaf to Ctrl-C: so may these tests be.
    with subprocess.Popen(story, **pipes, preexec_fn=hear_interrupts) as child:
        assert child.stdout is not None
        assert os.read(child.stdout.fileno(), 1)  # it has begun to write
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.strip() == b""
    assert len(out) < 4000  # nobody waited for the end


# ---- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["sing"], "sing"),
        (["run"], "PROMPT"),
        (["run", "Hi", "--max-tokens", "many"], "--max-tokens"),
        (["run", "Hi", "--temperature"], "--temperature"),
        (["chat", "--tool-choice", "never"], "--tool-choice"),
        (["bench", "--agents", "1.5"], "--agents"),
        (["info", "--colour"], "--colour"),
        (["cache", "--check", "--clear"], "--clear"),
    ],
)
def test_arguments_that_do_not_parse_exit_with_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "Hi", "--model", "nowhere/at/all.gguf"], "nowhere/at/all.gguf"),
        (["run", "Hi", "--tools", "desk"], "module:function"),
        (["chat", "--tools", "no.such.module:look_up"], "no.such.module"),
        (["info", "--max-context", "0"], "max_context_tokens"),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_one_line(arguments, named, capsys):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("agentrt: error: ")
    assert named in line


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"agentrt {__version__}\n"
