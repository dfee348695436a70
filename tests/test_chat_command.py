"""`hfopt chat`: lines in, answers out; its commands; Ctrl-C in a terminal."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import hfopt
from hfopt.cli import chat as command
from hfopt.cli import main
from hfopt.console import output
from tests.generation_cases import llama, one_thread
from tests.test_chat import QUESTIONS, answer_of, tokenizer

__all__ = ["tokenizer"]  # a fixture

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

ROOT = Path(__file__).parents[1]
USER, ASSISTANT = ({"role": role} for role in ("user", "assistant"))
Talk = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that never ends an answer by itself."""
    path = tmp_path_factory.mktemp("checkpoint")
    llama(max_position_embeddings=100_000).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Runs the command with lines on standard input: what it prints, and its errors."""

    def run(lines: Iterable[str], *arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", *arguments]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def test_lines_are_answered(talk: Talk, folder: str, tokenizer: Any) -> None:
    arguments = ["-m", folder, "--dtype", "float32", "--max-new-tokens", "8", "--system", "w100"]
    found, errors = talk([QUESTIONS[0], "", f"  {QUESTIONS[1]} ", "/quit", QUESTIONS[2]], *arguments)
    stock, messages = llama(), [{"role": "system", "content": "w100"}]
    for question in QUESTIONS[:2]:
        messages.append({**USER, "content": question})
        messages.append({**ASSISTANT, "content": answer_of(stock, tokenizer, messages)})
    assert found.splitlines() == [each["content"] for each in messages if each["role"] == "assistant"]
    assert "hfopt: " not in errors


def test_the_embedded_model_is_the_default(talk: Talk) -> None:
    found, _ = talk(["Return a list of", "Return True if"], "--greedy", "--dtype", "float32")
    assert found.splitlines() == [" the given file.", " the file is not a string."]


def test_weights_and_keys_of_few_bits(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    load = hfopt.load

    def kept(*args: Any, **kwargs: Any) -> Any:
        made.append(load(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(hfopt, "load", kept)
    found, _ = talk(["Return a list of"], "--quantization", "int8", "--kv-cache", "int8")
    assert made[0].hfopt.quantized and made[0].dtype == torch.bfloat16
    assert found.startswith(" ")


def test_messages_are_saved_loaded_and_cleared(talk: Talk, folder: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a file.json", tmp_path / "second.json"
    arguments = ["-m", folder, "--dtype", "float32", "--max-new-tokens", "4", "--system", "w100"]
    lines = [QUESTIONS[0], f"/save {first}", "/clear", QUESTIONS[1], f"/save {second}", f"/load {first}"]
    found, errors = talk([*lines, QUESTIONS[1], f"/save {first}"], *arguments)
    assert "hfopt: " not in errors
    before, after = json.loads(second.read_text()), json.loads(first.read_text())
    assert [each["role"] for each in before] == ["system", "user", "assistant"]
    assert [each["role"] for each in after] == ["system", *["user", "assistant"] * 2]
    assert [after[2]["content"], before[2]["content"], after[4]["content"]] == found.splitlines()
    assert before[2]["content"] != after[4]["content"]


def test_what_is_wrong_gets_one_line_and_the_chat_goes_on(
    talk: Talk, folder: str, tmp_path: Path, tokenizer: Any
) -> None:
    files = {"no.json": "{", "text.json": '"w1"', "bare.json": '[{"content": "w1"}]', "bytes.json": "\udcff"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    lines = ["/nothing", "/save", f"/save {tmp_path}", "/load", f"/load {tmp_path}/none"]
    lines += [f"/load {tmp_path}/{name}" for name in files]
    (tmp_path / "odd.json").write_text('[{"role": "user"}]')  # the template asks for more
    lines += [f"/load {tmp_path}/odd.json", "w1", "/clear", "/help", QUESTIONS[0]]
    found, errors = talk(lines, "-m", folder, "--dtype", "float32", "--max-new-tokens", "8")
    *helped, answer = found.splitlines()[-6:]
    assert [line.split()[0] for line in helped] == ["/save", "/load", "/clear", "/help", "/quit"]
    assert answer == answer_of(llama(), tokenizer, [{**USER, "content": QUESTIONS[0]}])
    told = [line for line in errors.splitlines() if line.startswith("hfopt: ")]
    assert len(told) >= 9 and "Traceback" not in errors


@pytest.mark.parametrize("flags", [("--max-new-tokens", "0"), ("--quantization", "int3")])
def test_wrong_flags_are_refused(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chat", *flags])
    assert flags[0] in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["chat", "-m", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("hfopt: ")


def test_no_chat_template(talk: Talk, folder: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    monkeypatch.setattr(command, "load_text_tokenizer", lambda args: tokenizer)
    found, errors = talk([QUESTIONS[0]], "-m", folder)
    assert not found and "chat_template" in errors.splitlines()[-1]


# ---- the terminal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a\nb", ("", "a\nb")),
        ("a\n\nb\n\nc", ("a\n\nb\n\n", "c")),
        ("a\n\n```\nb\n\nc", ("", "a\n\n```\nb\n\nc")),
        ("a\n\n```\nb\n\nc\n```\n\n", ("a\n\n```\nb\n\nc\n```\n\n", "")),
    ],
)
def test_paragraphs_are_shown_once_they_are_complete(text: str, parts: tuple[str, str]) -> None:
    assert output._paragraphs(text) == parts


def test_markdown_is_rendered_and_a_long_block_shows_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "Console", lambda: Console(force_terminal=True, width=40, height=10))
    output.stream(["# Ti", "tle\n", "\nsome **bo", "ld** text\n\n```\na\n\n", "b\n```\n"])
    shown = capsys.readouterr().out
    assert "\x1b[1mbold\x1b[0m" in shown and "**" not in shown and "```" not in shown
    console = output.Console()
    lines = "".join(segment.text for segment in output._end("\n\n".join("abcdefghij"), console).segments)
    assert lines.split() == ["f", "g", "h", "i", "j"]


def test_what_has_come_is_shown_when_the_rest_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pieces() -> Iterator[str]:
        yield "half an "
        yield "answer"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output.stream(pieces())
    assert capsys.readouterr().out == "half an answer\n"
    monkeypatch.setattr(output, "Console", lambda: Console(force_terminal=True, width=40, height=10))
    with pytest.raises(KeyboardInterrupt):
        output.stream(pieces())
    assert capsys.readouterr().out.rstrip().endswith("half an answer")


class Terminal:
    """A process with a terminal."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        code = f"import sys; from hfopt.cli import main; sys.exit(main({['chat', *arguments]!r}))"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "60"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """What comes up to the end of this pattern."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.text, re.DOTALL)) is None:
            ready, _, _ = select.select([self._ours], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{pattern!r} has not come: {self.text!r}"
            self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(self._ours, 65536).decode())
        self.text = self.text[found.end() :]
        return found[0]

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for each in opened:
        each.close()


@pytest.mark.parametrize("flags", [(), ("--plain",)], ids=["markdown", "plain"])
def test_control_c_stops_an_answer_and_keeps_what_was_said(
    flags: tuple[str, ...], terminals: list[Terminal], folder: str, tmp_path: Path, tokenizer: Any
) -> None:
    file = tmp_path / "said.json"
    options = ("--dtype", "float32", "--max-new-tokens", "90000")
    terminal = Terminal("-m", folder, *options, *flags)
    terminals.append(terminal)
    terminal.wait_for("Ctrl-C stops.*> ")
    terminal.type(f"{QUESTIONS[0]}\n")
    terminal.wait_for(r"(w\d+\s+){20}")
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type(f"/save {file}\n")
    terminal.wait_for("> ")
    question, answer = json.loads(file.read_text())
    assert question == {**USER, "content": QUESTIONS[0]}
    n_words = len(answer["content"].split())
    assert 5 < n_words < 80_000
    expected = answer_of(llama(), tokenizer, [question], max_new_tokens=6)
    assert answer["content"].split()[:6] == expected.split()[:6]

    terminal.type("\x03")  # where nothing is being said
    terminal.wait_for("> ")
    terminal.type("\x1b[A\x1b[A\n")  # the line before the last one: the question again
    terminal.wait_for(r"(w\d+\s+){20}")
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(60) == 0
