"""The pictures of a text's experts: which token has which colour, and a page that stands alone."""

import dataclasses
import html.parser
import json
import re
import shutil

import numpy as np
import pytest
from matplotlib import pyplot as plt

from moe.evaluate.evaluation import evaluate_run
from moe.tasks import text_pictures
from moe.tasks.text_page import write_page
from moe.tasks.text_pictures import BEGIN, HELD, colour_experts, draw_text, split_pieces
from tests.moe.data.text.sources import make_source

ODD = ["$a$ \\$", "\u2400", "</script><b>&", "漢", "\ufffd", "é\u21b5\n", "\u2192", "x" * 250, "\n"]


def random_weights(tokens, experts, layers=(1, 3), k=2):
    rng = np.random.default_rng(0)
    weights = {}
    for layer in layers:
        weights[layer] = np.zeros((tokens, experts))
        for row in weights[layer][1:]:  # the first has none
            few = min(k, experts)
            row[rng.choice(experts, few, replace=False)] = rng.uniform(0.1, 1, few)
    return weights


def test_pieces_are_the_text_of_each_token():
    text = "a\té\n€\x00e\u0301".encode()
    tokens = [256, *text, 256, 0x80, 256, 0xE2]
    source = make_source([list(text)])
    assert split_pieces(source, tokens) == [
        *(BEGIN, "a", "\u2192", HELD, "é", "\u21b5\n", HELD, HELD, "€", "\u2400", "e", HELD),
        *("\ufffd", BEGIN, "\ufffd", BEGIN, HELD),
    ]
    unknown = dataclasses.replace(source, tokenizer=b"")
    assert split_pieces(unknown, [256, 7]) == ["256 ", "7 "]


def test_lines_break_where_the_text_does_and_where_they_are_full():
    lines = text_pictures._wrap(["ab\n", "c" * 150, "d"])
    assert ["".join(c for c, _ in line) for line in lines] == ["ab", "c" * 100, "c" * 50 + "d"]
    assert [token for _, token in lines[2]] == [1] * 50 + [2]


def test_a_token_has_the_colour_of_its_heaviest_expert():
    weights = np.array([[0.2, 0.7, 0.1], [0.0, 0.0, 0.0], [0.0, 0.0, 0.175]])
    figure, axis = plt.subplots()
    text_pictures._draw_layer(axis, text_pictures._wrap(["ab", "c", "d"]), weights)
    cells = np.asarray(axis.images[0].get_array())[0]
    np.testing.assert_allclose(cells[:4, 3], [0.8, 0.8, 0, 0.4])
    np.testing.assert_allclose(cells[[0, 1, 3], :3], colour_experts(3)[[1, 1, 2]])
    assert (cells[4:, 3] == 0).all()
    plt.close(figure)


@pytest.mark.parametrize("number", [1, 8, 20, 64, 300])
def test_experts_have_colours_of_their_own(number):
    table = colour_experts(number)
    assert table.shape == (number, 3) and table.min() >= 0 and table.max() <= 1
    assert len(np.unique(table.round(9), axis=0)) == number


@pytest.mark.parametrize(("experts", "layers"), [(1, (0,)), (8, (1, 3)), (64, range(24))])
def test_any_text_is_drawn(experts, layers, tmp_path):
    weights = random_weights(len(ODD), experts, layers)
    draw_text(tmp_path / "text.png", ODD, weights)
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["text.png"]


class Page(html.parser.HTMLParser):
    """Reads a page; remembers its elements, and the data inside."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.data = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.seen and self.seen[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += data


def test_the_page_stands_alone_and_holds_the_text_as_it_is(tmp_path):
    weights = random_weights(len(ODD), 8)
    write_page(tmp_path / "x.html", "$data <i>&", [ODD, ODD], [weights, weights])
    text = (tmp_path / "x.html").read_text()
    page = Page(text)
    assert not page.open and not re.search("https?:|url\\(|@import|fetch\\(", text)
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.seen)
    assert not {"b", "i"} & {tag for tag, _ in page.seen}
    assert text.count("$data &lt;i&gt;&amp;") == 2
    data = json.loads(page.data)
    assert data["texts"] == [ODD, ODD] and data["layers"] == [1, 3]
    assert len(data["colours"]) == 8 and data["experts"][0][0][0] == []
    for layer, rows in zip((1, 3), data["experts"][1], strict=True):
        for told, weight in zip(rows[1:], weights[layer][1:], strict=True):
            assert told[::2] == np.argsort(-weight)[:2].tolist()
            np.testing.assert_allclose(told[1::2], -np.sort(-weight)[:2], atol=5e-4)
    assert np.max(data["opacity"]) == 1


@pytest.mark.slow
def test_an_evaluation_shows_its_text(finished_text_run, tmp_path):
    workdir = shutil.copytree(finished_text_run, tmp_path / "run")
    result = evaluate_run(workdir, step=None, split=None, overrides={})
    assert set(result["layers"]) == {0, 1}
    folder = workdir / "pictures"
    assert {file.name for file in folder.iterdir()} == {"load.png", "text.png", "text.html"}
    data = json.loads(Page((folder / "text.html").read_text()).data)
    assert data["layers"] == [0, 1] and len(data["texts"]) == 4
    for row in range(4):
        assert len(data["texts"][row]) == 32
        for layer in data["experts"][row]:
            assert all(len(chosen) == 4 for chosen in layer)  # K = 2
    assert data["texts"][0][0] == BEGIN
