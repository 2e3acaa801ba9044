"""Writes a page that shows text with its tokens' experts: all layers, and all weights on hover."""

import html
import json
import pathlib
import string
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colors

from moe import outputs
from moe.tasks.text_pictures import colour_experts, opacity

SHOWN = 8  # experts of a token in a layer, the heaviest first


def write_page(
    path: pathlib.Path,
    title: str,
    texts: Sequence[Sequence[str]],
    weights: Sequence[Mapping[int, np.ndarray]],
) -> None:
    """Writes the page; it needs nothing but itself, and fetches nothing.

    Args:
      title: of the page.
      texts: the tokens' text, of each row.
      weights: of each row, for each layer [T, E].
    """
    layers = list(weights[0])
    experts = max(weights[0][layer].shape[-1] for layer in layers)
    data = {
        "layers": layers,
        "colours": [colors.to_hex(colour) for colour in colour_experts(experts)],
        "texts": [list(pieces) for pieces in texts],
        "opacity": [[opacity(row[i]).round(3).tolist() for i in layers] for row in weights],
        "experts": [[[_heaviest(w) for w in row[i]] for i in layers] for row in weights],
    }
    # In a script element, "<" alone can end the data; no text of a token is ever read as HTML.
    told = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = string.Template(_PAGE).substitute(title=html.escape(title), data=told)
    outputs.write(path, lambda fresh: fresh.write_text(page, encoding="utf-8"))


def _heaviest(weight_E: np.ndarray) -> list[float]:
    """Returns [expert, weight, expert, weight, ...] of the experts that a token has."""
    order = np.argsort(-weight_E, kind="stable")[:SHOWN]
    return [n for e in order if weight_E[e] > 0 for n in (int(e), round(float(weight_E[e]), 3))]


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
body { font: 14px sans-serif; margin: 1.5em; max-width: 75em; color: #000; background: #fff; }
pre { font: 14px/1.5 monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span:hover { outline: 2px solid #000; }
.faint { background: none !important; color: #bbb; }
button { font: inherit; margin: 0 .2em .4em 0; padding: .1em .6em; border: 1px solid #999;
  border-radius: .3em; background: #fff; cursor: pointer; }
button[aria-pressed=true] { border-color: #000; box-shadow: inset 0 0 0 1px #000; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
#hint { position: fixed; display: none; padding: .5em .7em; background: #fff; font-size: 12px;
  border: 1px solid #555; box-shadow: 0 2px 8px #0005; pointer-events: none; }
#hint td { padding: 0 .5em 0 0; white-space: nowrap; }
</style>
</head>
<body>
<h1 style="font-size: 1.2em">$title</h1>
<p>Each token has the colour of its heaviest expert in a layer, the heavier the fuller; point at one
for its experts in all layers. The keys left and right change the layer.</p>
<noscript><p>This page needs JavaScript; it fetches nothing.</p></noscript>
<div id="layers">block </div>
<div id="legend">expert </div>
<main></main>
<div id="hint"></div>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main"), hint = document.getElementById("hint");
let layer = 0, only = null;

function add(parent, name, text = "") {
  const made = parent.appendChild(document.createElement(name));
  made.textContent = text;
  return made;
}
function swatch(parent, expert) {
  const made = document.createElement("i");
  made.className = "swatch";
  made.style.background = data.colours[expert];
  parent.prepend(made);
}
function button(parent, text, press) {
  const made = add(parent, "button", text);
  made.type = "button";
  made.onclick = press;
  return made;
}
const layers = data.layers.map((number, i) => button(
  document.getElementById("layers"), number, () => { layer = i; paint(); }));
const legend = data.colours.map((_, e) => button(
  document.getElementById("legend"), e, () => { only = only === e ? null : e; paint(); }));
legend.forEach(swatch);
const spans = data.texts.map((pieces, row) => {
  const block = add(main, "pre");
  return pieces.map((piece, token) => {
    const made = add(block, "span", piece);
    made.onmousemove = event => show(event, row, token);
    made.onmouseleave = () => { hint.style.display = "none"; };
    return made;
  });
});

function paint() {
  layers.forEach((made, i) => made.setAttribute("aria-pressed", i === layer));
  legend.forEach((made, e) => made.setAttribute("aria-pressed", e === only));
  spans.forEach((row, r) => row.forEach((span, token) => {
    const chosen = data.experts[r][layer][token];
    const share = Math.round(204 * data.opacity[r][layer][token]).toString(16).padStart(2, "0");
    span.style.background = chosen.length ? data.colours[chosen[0]] + share : "none";
    const other = only !== null && !chosen.some((e, i) => i % 2 === 0 && e === only);
    span.className = other ? "faint" : "";
  }));
}
function show(event, row, token) {
  hint.replaceChildren();
  add(hint, "b", JSON.stringify(data.texts[row][token]) + ", token " + token);
  const table = add(hint, "table");
  data.layers.forEach((number, i) => {
    const line = add(table, "tr"), chosen = data.experts[row][i][token];
    add(line, "td", "block " + number).style.fontWeight = i === layer ? "bold" : "";
    if (!chosen.length) add(line, "td", "no expert");
    for (let k = 0; k < chosen.length; k += 2)
      swatch(add(line, "td", chosen[k] + ": " + chosen[k + 1].toFixed(3)), chosen[k]);
  });
  hint.style.display = "block";
  hint.style.left = Math.min(event.clientX + 14, innerWidth - hint.offsetWidth - 8) + "px";
  const below = event.clientY + 18, fits = below + hint.offsetHeight < innerHeight;
  hint.style.top = Math.max(0, fits ? below : event.clientY - hint.offsetHeight - 12) + "px";
}
document.onkeydown = event => {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0;
  layer = Math.min(Math.max(layer + move, 0), layers.length - 1);
  if (move) paint();
};
paint();
</script>
</body>
</html>
"""
