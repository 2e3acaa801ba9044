"""Continues prompts with a trained run of text: the work behind generate.py."""

import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from moe import cli, outputs
from moe.data.text import Tokenizer, open_tokenizer
from moe.errors import UsageError
from moe.evaluate import evaluation
from moe.evaluate.sampling import Sampler, Sampling
from moe.ranges import Key, contains
from moe.store import tokens
from moe.store.workdir import saved_config

# What the flags may be. Below a temperature of 0.001 logits may leave float32.
FLAGS = {
    "max_tokens": Key(200, "[1, 1e7]"),
    "temperature": Key(1.0, "0 or [1e-3, 1e3]"),
    "top_p": Key(1.0, "(0, 1]"),
    "seed": Key(0, "[0, 2^63)"),
    "num_samples": Key(1, "[1, 1e6]"),
    "batch_size": Key(8, "[1, 1e6]"),
}


@dataclasses.dataclass
class Row:
    """Holds one sample of one prompt.

    Attributes:
      prompt: its number, from 0.
      sample: number of the sample, from 0.
      tokens: that were drawn, the one that ended it included.
      log_probs: of these, as `sampling.Rows` has them.
      text: of these, as far as their characters are whole.
      end: why it ended: "document", "max_tokens" or "context"; "" before it has.
    """

    prompt: int
    sample: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    text: str = ""
    end: str = ""


def generate_run(
    workdir: pathlib.Path,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    max_tokens: int = FLAGS["max_tokens"].default,
    num_samples: int = FLAGS["num_samples"].default,
    batch_size: int = FLAGS["batch_size"].default,
    step: int | None = None,
    overrides: dict[str, str] | None = None,
    json_file: pathlib.Path | None = None,
    screen: TextIO | None = None,
) -> list[Row]:
    """Continues each prompt `num_samples` times; writes the text to `screen` as it comes.

    The tokenizer is the run's own, of its directory; runs of before have none there, which take
    that of their data, as does a run for which another text is named.

    Args:
      workdir: directory of a run of text.
      prompts: each the beginning of a document; "" for none yet.
      sampling: how tokens are drawn.
      max_tokens: to draw for a sample; fewer where it ends, or fills the context, before.
      num_samples: of each prompt.
      batch_size: samples that are computed together.
      step: of the checkpoint; None for the newest.
      overrides: config keys that an evaluation may change.
      json_file: gets all samples, as JSON; None for none.
      screen: None for the standard output. What is no text of a prompt or of the model, but for the
        samples' titles, goes to the standard error.

    Raises:
      UsageError: no run of text or no readable checkpoint there, a prompt that the model cannot
        read, overrides that do not fit it.
    """
    saved = saved_config(workdir)
    if saved is not None and saved.task != "text":
        raise UsageError(
            f"{workdir} holds a run of the task {saved.task!r}; text comes from 'text'"
        )
    # Against a cache, "splash" cannot; what it computes is the same.
    overrides = {"model.attention": "auto"} | (overrides or {})
    tokenizer = None if "data.name" in overrides else tokens.read(workdir)
    run, source = evaluation.prepare(workdir, None, overrides, reads_data=tokenizer is None)
    tokenizer = tokenizer or open_tokenizer(source)
    encoded = [_encode(tokenizer, text, run.config.data.seq_len) for text in prompts]
    if json_file is not None:
        outputs.check(json_file, "--json")
    params, _, step, damaged = evaluation.restore(workdir, run, step)
    for bad in damaged:
        _say(f"checkpoint {bad} is damaged; using step {step}")

    rows = [Row(i, s) for i in range(len(prompts)) for s in range(num_samples)]
    sampler = Sampler(
        run,
        sampling,
        rows=min(batch_size, len(rows)),
        longest=max(map(len, encoded)),
        most=max_tokens,
        vocabulary=tokenizer.vocabulary,
        stops=(tokenizer.end, tokenizer.begin),
    )
    start = time.perf_counter()
    _compile(sampler, params, encoded[0])
    compiled = time.perf_counter()
    written = _Screen(screen or sys.stdout, prompts, rows)
    for number in range(0, len(rows), batch_size):
        _continue(sampler, params, encoded, rows[number : number + batch_size], tokenizer, written)
    seconds = time.perf_counter() - compiled
    _report(rows, seconds, compiled - start, sampler, f"{workdir}, step {step}")
    if json_file is not None:
        told = [dataclasses.asdict(row) | {"prompt": prompts[row.prompt]} for row in rows]
        outputs.write_json(json_file, told)
    return rows


def read_flags(prompt: str | None, file: str | None) -> list[str]:
    """Returns the prompts that --prompt and --prompts ask for; one that is empty if neither does.

    Raises:
      UsageError: both do, or what they name is no text.
    """
    if file is None:
        check_text(prompt or "", "--prompt")
        return [prompt or ""]
    if prompt is not None:
        raise UsageError("--prompt and --prompts were both given: put all prompts into the file")
    return read_prompts(cli.local_path(file, "--prompts"))


def read_prompts(file: pathlib.Path) -> list[str]:
    """Reads one prompt a line; of a .jsonl file a JSON string, or an object with a "prompt".

    Raises:
      UsageError: the file cannot be read, is no UTF-8, holds no prompt, or has a line of no JSON.
    """
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"cannot read --prompts={file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts={file} is no UTF-8 text: {_where(error)}") from None
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), 1)]
    lines = [(n, line) for n, line in lines if line.strip()]
    if not lines:
        raise UsageError(f"--prompts={file} is empty: expected one prompt a line")
    if file.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_read_json(line, f"line {n} of --prompts={file}") for n, line in lines]


def check_flags(flags: dict[str, float]) -> None:
    """Raises UsageError where one of `FLAGS` is outside its range."""
    for name, key in FLAGS.items():
        if not contains(key.within, flags[name]):
            said = format(str(flags[name]), ".60")
            raise UsageError(f"--{name}={said}: expected {key.expected}")


def check_text(prompt: str, name: str) -> None:
    """Raises UsageError where a prompt holds what is no UTF-8: bytes of a shell, half a pair."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is no UTF-8 text: character {error.start} is {prompt[error.start]!a}; "
            "expected text in UTF-8 (iconv -t utf-8 converts other)"
        ) from None


def _read_json(line: str, name: str) -> str:
    try:
        value = json.loads(line)
        prompt = value["prompt"] if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(
            f'{name} is no prompt: expected a JSON string, or an object such as {{"prompt": "a"}}'
        ) from None
    check_text(prompt, name)
    return prompt


def _where(error: UnicodeDecodeError) -> str:
    line = error.object[: error.start].count(b"\n") + 1
    return f"byte {error.object[error.start]:#04x} in line {line}"


def _encode(tokenizer: Tokenizer, prompt: str, context: int) -> list[int]:
    """Returns the tokens of a document that begins with a prompt."""
    check_text(prompt, f"the prompt {format(ascii(prompt), '.60')}")
    tokens = [tokenizer.begin, *tokenizer.encode(prompt)]
    if len(tokens) > context:
        raise UsageError(
            f"the prompt {format(repr(prompt), '.40')}... has {len(tokens)} tokens, with the one "
            f"that begins a document; the model reads at most {context} (config.data.seq_len): "
            "shorten it"
        )
    return tokens


def _compile(sampler: Sampler, params, prompt: list[int]) -> None:
    """Runs what later runs: the prefill, and steps after it and after one another."""
    for _ in itertools.islice(sampler.draw(params, [prompt], [0]), 3):
        pass


def _continue(
    sampler: Sampler,
    params,
    encoded: Sequence[list[int]],
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    screen: "_Screen",
) -> None:
    """Draws the tokens of some rows and shows them."""
    prompts = [encoded[row.prompt] for row in rows]
    streams = [tokenizer.stream() for _ in rows]
    for row, prompt, stream in zip(rows, prompts, streams, strict=True):
        screen.add(row, "".join(stream.push(token) for token in prompt))
    for drawn in sampler.draw(params, prompts, [row.sample for row in rows]):
        for i, row in enumerate(rows):
            if row.end:
                continue
            token = int(drawn.token_B[i])
            row.tokens.append(token)
            row.log_probs.append(float(drawn.log_prob_B[i]))
            if token in (tokenizer.end, tokenizer.begin):
                row.end = "document"
            elif len(row.tokens) == sampler.most:
                row.end = "max_tokens"
            elif drawn.done_B[i]:
                row.end = "context"
            text = "" if row.end == "document" else streams[i].push(token)
            text += streams[i].finish() if row.end else ""
            row.text += text
            screen.add(row, text)


class _Screen:
    """Writes rows of text one after another; the first that has not ended grows as it comes."""

    def __init__(self, out: TextIO, prompts: Sequence[str], rows: Sequence[Row]):
        self._out, self._rows, self._titled = out, rows, len(rows) > 1
        self._many = len(prompts) > 1, rows[-1].sample > 0
        self._waiting = {(row.prompt, row.sample): "" for row in rows}
        self._current, self._new = 0, True
        self._is_terminal = out.isatty()

    def add(self, row: Row, text: str) -> None:
        """Takes the next piece of a row's text, and shows what can be shown."""
        self._waiting[row.prompt, row.sample] += text
        while self._current < len(self._rows):
            row = self._rows[self._current]
            if self._new and self._titled:
                self._write(self._title(row))
            self._new = False
            self._write(self._waiting[row.prompt, row.sample])
            self._waiting[row.prompt, row.sample] = ""
            if not row.end:
                break
            self._write("\n")
            self._current, self._new = self._current + 1, True
            if not self._has_begun():
                break
        self._out.flush()

    def _has_begun(self) -> bool:
        if self._current == len(self._rows):
            return False
        row = self._rows[self._current]
        return bool(row.end or row.tokens or self._waiting[row.prompt, row.sample])

    def _title(self, row: Row) -> str:
        names = (f"prompt {row.prompt + 1}", f"sample {row.sample + 1}")
        return f"--- {', '.join(itertools.compress(names, self._many))}\n"

    def _write(self, text: str) -> None:
        if self._is_terminal:  # which obeys some of what a model may write
            text = text.translate(_PICTURES)
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        self._out.write(text.encode(encoding, "replace").decode(encoding))


# Control characters, but tab and newline, as Unicode shows them.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def _report(rows: Sequence[Row], seconds, compilation, sampler: Sampler, what: str) -> None:
    """Says how fast it was, and which rows ended before they were asked to."""
    full = sum(row.end == "context" for row in rows)
    if full:
        whose = f"{full} of {len(rows)} samples" if len(rows) > 1 else "it"
        _say(
            f"{whose} ended before --max_tokens={sampler.most}: a text has at most "
            f"{sampler.context} tokens (config.data.seq_len)"
        )
    tokens = sum(len(row.tokens) for row in rows)
    _say(
        f"{what}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s "
        f"(before that {compilation:.1f} s of compilation)"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
