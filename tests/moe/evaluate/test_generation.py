"""generate.py: what it writes where, in which order, and what it says of bad input."""

import io
import json

import numpy as np
import pytest

import generate
from moe import config
from moe.data.text.tokenizer import Bytes
from moe.errors import UsageError
from moe.evaluate import generation
from moe.evaluate.generation import Row
from moe.evaluate.sampling import Rows


@pytest.mark.slow
def test_a_file_of_prompts_is_continued(finished_text_run, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"def f("\n\n{"prompt": "# \\u00e9\\n"}\n')
    told = tmp_path / "new" / "told.json"
    flags = [f"--workdir={finished_text_run}", f"--prompts={prompts}", "--num_samples=2"]
    flags += ["--max_tokens=40", "--batch_size=3", "--seed=1"]
    generate.main([*flags, f"--json={told}"])
    screen = capsys.readouterr()
    rows = json.loads(told.read_text())
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        ("def f(", 0), ("def f(", 1), ("# é\n", 0), ("# é\n", 1)
    ]  # fmt: skip
    shown = "".join(
        f"--- prompt {i // 2 + 1}, sample {i % 2 + 1}\n{row['prompt']}{row['text']}\n"
        for i, row in enumerate(rows)
    )
    assert screen.out == shown
    for row in rows:
        room = 32 - len(row["prompt"].encode())  # of 33 tokens, the first of them begins it
        assert len(row["tokens"]) == len(row["log_probs"]) == room
        assert row["end"] == "context" and max(row["log_probs"]) < 0
        assert row["text"] == bytes(t for t in row["tokens"] if t < 256).decode(errors="replace")
    first, last = screen.err.splitlines()
    assert first.startswith("4 of 4 samples ended before --max_tokens=40: a text has at most 32")
    assert f"step 8: {4 * 32 - 6 - 6 - 5 - 5} tokens in " in last and "tokens/s" in last

    generate.main([*flags[:1], "--prompt=def f(", *flags[3:]])
    screen = capsys.readouterr()
    assert screen.out == f"{rows[0]['prompt']}{rows[0]['text']}\n"
    assert screen.err.startswith("it ended before --max_tokens=40")


class Drawn:
    """Stands for a sampler whose rows are known."""

    def __init__(self, *rows: bytes, most=9):
        self.most, self._rows = most, [[*row, 256] for row in rows]

    def draw(self, params, prompts, samples):
        for step in range(max(map(len, self._rows))):
            token = np.array([row[min(step, len(row) - 1)] for row in self._rows])
            yield Rows(token, np.zeros(len(token)), None, token == 256, None)


class Pieces(io.StringIO):
    """Keeps what was written piece by piece."""

    encoding = "utf-8"

    def __init__(self, terminal=False):
        super().__init__()
        self.pieces, self._terminal = [], terminal

    def write(self, text):
        self.pieces += [text] if text else []

    def isatty(self):
        return self._terminal


def written(sampler, prompts, out):
    rows = [Row(i, 0) for i in range(len(prompts))]
    tokens = [list(prompt.encode()) for prompt in prompts]
    screen = generation._Screen(out, prompts, rows)
    generation._continue(sampler, None, tokens, rows, Bytes(), screen)
    return rows, out.pieces


def test_text_streams_and_holds_back_half_a_character():
    rows, pieces = written(Drawn("aé€b".encode()), ["x="], Pieces())
    assert pieces == ["x=", "a", "é", "€", "b", "\n"]
    assert (rows[0].text, rows[0].end, len(rows[0].tokens)) == ("aé€b", "document", 8)
    rows, pieces = written(Drawn("€".encode(), most=2), [""], Pieces())
    assert (rows[0].text, rows[0].end) == ("\ufffd", "max_tokens")


def test_rows_are_shown_one_after_another():
    rows, pieces = written(Drawn(b"abc", b"d", b"efghi"), ["1", "2", "3"], Pieces())
    assert pieces[:5] == ["--- prompt 1\n", "1", "a", "b", "c"]
    assert pieces[5:] == ["\n", "--- prompt 2\n", "2d", "\n", "--- prompt 3\n", "3efg", "h", "i",
                          "\n"]  # fmt: skip
    assert [row.text for row in rows] == ["abc", "d", "efghi"]


def test_a_terminal_obeys_no_model():
    _, pieces = written(Drawn(b"\x1b[2J\ta\n"), [""], Pieces(terminal=True))
    assert "".join(pieces) == "\u241b[2J\ta\n\n"
    out = Pieces()
    out.encoding = "ascii"
    assert "".join(written(Drawn("é".encode()), [""], out)[1]) == "?\n"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--prompt=a\udcff"], r"--prompt is no UTF-8 text: character 1 is '\\udcff'"),
        (["--prompt=" + "a" * 32], r"'aaa.* has 33 tokens.* at most 32 \(config.data.seq_len\)"),
        (["--temperature=-1"], r"--temperature=-1\.0: expected a number, 0 or \[1e-3, 1e3\]"),
        (["--temperature=nan"], "--temperature=nan: expected"),
        (["--top_p=0"], r"--top_p=0\.0: expected a number in \(0, 1\]"),
        (["--top_p=1.5"], "--top_p=1.5: expected"),
        (["--max_tokens=0"], "--max_tokens=0: expected a whole number"),
        (["--max_tokens=x"], "--max_tokens"),
        (["--num_samples=0"], "--num_samples=0: expected"),
        (["--batch_size=-1"], "--batch_size=-1: expected"),
        (["--seed=-1"], "--seed=-1: expected"),
        (["--step=3"], "step"),
        (["--prompt=a", "--prompts=b"], "both given"),
        (["--prompts=nowhere"], "cannot read --prompts=nowhere: No such file"),
        (["--prompts=."], "cannot read --prompts=.: Is a directory"),
        (["--prompts={tmp}/latin.txt"], "latin.txt is no UTF-8 text: byte 0xe9 in line 2"),
        (["--prompts={tmp}/empty.txt"], "empty.txt is empty"),
        (["--prompts={tmp}/bad.jsonl"], r"line 2 of --prompts=.*bad.jsonl is no prompt"),
        (["--prompts={tmp}/half.jsonl"], r"line 1 of --prompts=.* no UTF-8 text: character 0"),
        (["--json={tmp}"], "cannot write --json"),
        (["--workdir={tmp}/none"], "holds no run"),
        (["--workdir={tmp}"], "holds a run of the task 'images'"),
        (["--config.model.width=8"], "cannot be changed"),
        (["--config.data.name=nowhere"], "there is no text set 'nowhere'"),
        (["--bad"], "unknown argument '--bad'"),
    ],
)
def test_bad_input_gets_one_line(flags, line, finished_text_run, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_compile", None)  # not reached
    (tmp_path / "latin.txt").write_bytes(b"a\nb\xe9")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('"a"\n{"text": "b"}\n')
    (tmp_path / "half.jsonl").write_text('"\\ud83d"\n')
    (tmp_path / "config.json").write_text(config.to_json(config.default()))
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    with pytest.raises(UsageError, match=line) as error:
        generate.main([f"--workdir={finished_text_run}", *flags])
    assert "\n" not in str(error.value)
