"""The README's example prints what the README says that it prints."""

import contextlib
import io
import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parent.parent / "README.md"
NUMBER = re.compile(r"-?\d+\.\d*(?:e-?\d+)?")


def test_the_example_prints_what_stands_below_it():
    code, printed = re.search(
        r"```python\n(.*?)```\n```\n(.*?)```", README.read_text(), re.S
    ).groups()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "README.md", "exec"), {})
    actual = output.getvalue()
    assert NUMBER.sub("#", actual).split() == NUMBER.sub("#", printed).split()
    # The last digits are the platform's.
    np.testing.assert_allclose(
        *([float(number) for number in NUMBER.findall(text)] for text in (actual, printed)),
        rtol=1e-6,
        atol=1e-6,
    )
