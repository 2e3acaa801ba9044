"""Draws text whose tokens have the colour of their experts."""

import pathlib
import unicodedata
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import colors, font_manager, ft2font
from matplotlib import pyplot as plt
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath

from moe.data.text import Mixture, TextSource, open_tokenizer
from moe.errors import UsageError
from moe.tasks.pictures import save

COLUMNS = 100  # characters of a line
LAYERS = 8  # at most, spread over all
LINES = 48  # of all layers together, but 4 to 12 of each
BEGIN, HELD = "\u25b8", "\u00b7"  # a document's begin or end; a part of a character
FULL = 0.8  # opacity of the heaviest weight: text is to be read on it
# Of DejaVu Sans Mono, which matplotlib brings, in em.
WIDE, HIGH = 0.602, 1.25


def split_pieces(source: TextSource | Mixture, tokens: Sequence[int]) -> list[str]:
    """Returns the text of each token; of a character of several tokens, the last one has it.

    Where the text's tokenizer cannot be had, a token is its number.
    """
    try:
        tokenizer = open_tokenizer(source)
    except UsageError:
        return [f"{token} " for token in tokens]
    pieces, stream = [], tokenizer.stream()
    for token in tokens:
        if token in (tokenizer.begin, tokenizer.end):
            stream = tokenizer.stream()
            pieces.append(BEGIN)
        else:
            pieces.append("".join(map(_visible, stream.push(int(token)))) or HELD)
    return pieces


def colour_experts(number: int) -> np.ndarray:
    """Returns a colour for each expert, [E, 3] in [0, 1]: as different as so many can be."""
    if number <= 20:
        table = plt.get_cmap("tab10" if number <= 10 else "tab20").colors
        return np.array(table[:number])
    i = np.arange(number)
    hsv = [i * 0.618034 % 1, 0.5 + 0.5 * (i % 3 / 2), 0.95 - 0.15 * (i % 2)]
    return colors.hsv_to_rgb(np.stack(hsv, 1))


def opacity(weights: np.ndarray) -> np.ndarray:
    """Returns each token's heaviest weight's share of the layer's largest, as an opacity."""
    heaviest = weights.max(-1)
    return np.sqrt(heaviest / max(heaviest.max(), 1e-30))


def fullest(texts: Sequence[Sequence[str]], layers: int) -> int:
    """Returns which text fills most of the lines that are drawn of it."""
    return int(np.argmax([sum(map(len, _wrap(pieces)[: _room(layers)])) for pieces in texts]))


def draw_text(path: pathlib.Path, pieces: Sequence[str], weights: Mapping[int, np.ndarray]) -> None:
    """Draws the first lines of a text once for every layer, each token on its expert's colour.

    Args:
      pieces: the text of each token.
      weights: for each layer [T, E]; a token shows its heaviest expert, with the weight as opacity;
        one that no expert took stays white.
    """
    layers = list(weights)
    if len(layers) > LAYERS:
        layers = [layers[i] for i in np.linspace(0, len(layers) - 1, LAYERS).round().astype(int)]
    lines = _wrap(pieces)[: _room(len(layers))]
    height, experts = len(lines) * HIGH, max(w.shape[-1] for w in weights.values())
    width = max(40, *map(len, lines)) * WIDE
    shape = (width / 8 + 1.2, len(layers) * (height / 8 + 0.2))
    figure, axes = plt.subplots(len(layers), figsize=shape, squeeze=False, layout="constrained")
    for axis, layer in zip(axes[:, 0], layers, strict=True):
        _draw_layer(axis, lines, weights[layer])
        axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
        axis.set_frame_on(False)
        axis.set_ylabel(f"block {layer}", fontsize=8)
    shown = np.arange(experts)
    if experts > 20:  # those that the text uses most
        used = sum(np.bincount(weights[i].argmax(-1), minlength=experts) for i in layers)
        shown = np.sort(np.argsort(-used, kind="stable")[:20])
    table = colour_experts(experts)
    handles = [plt.Rectangle((0, 0), 1, 1, color=table[e], alpha=FULL) for e in shown]
    names = [str(e) for e in shown]
    figure.legend(handles, names, title="expert", loc="outside right center", fontsize=8)
    save(figure, path)


def _draw_layer(axis, lines: Sequence[str], weights_TE: np.ndarray) -> None:
    """Draws lines of cells (character, token) on the colours of the tokens' experts."""
    rgb = colour_experts(weights_TE.shape[-1])[weights_TE.argmax(-1)]
    rgba = np.concatenate([rgb, FULL * opacity(weights_TE)[:, None]], 1)
    picture = np.zeros((len(lines), COLUMNS, 4))
    font = font_manager.FontProperties(family="DejaVu Sans Mono")
    known = ft2font.FT2Font(font_manager.findfont(font)).get_charmap()
    for number, line in enumerate(lines):
        for column, (_, token) in enumerate(line):
            picture[number, column] = rgba[token]
        text = "".join(c if ord(c) in known else "\u25a1" for c, _ in line)
        with plt.rc_context({"text.parse_math": False}):
            glyphs = TextPath((0, 0), text, size=1, prop=font) if text.strip() else None
        if glyphs is not None:
            down = matplotlib.transforms.Affine2D().scale(1, -1).translate(0, (number + 0.8) * HIGH)
            axis.add_patch(PathPatch(glyphs.transformed(down), color="black", linewidth=0))
    extent = (0, COLUMNS * WIDE, len(lines) * HIGH, 0)
    axis.imshow(picture, extent=extent, interpolation="nearest")


def _room(layers: int) -> int:
    """Returns how many lines are drawn of each layer."""
    return int(np.clip(LINES // layers, 4, 12))


def _wrap(pieces: Sequence[str]) -> list[list[tuple[str, int]]]:
    """Returns lines of cells (character, token): broken after a newline, and where one is full."""
    lines: list[list[tuple[str, int]]] = [[]]
    for token, piece in enumerate(pieces):
        for character in piece:
            if len(lines[-1]) == COLUMNS:
                lines.append([])
            if character != "\n":
                lines[-1].append((character, token))
            else:
                lines.append([])
    return lines


def _visible(character: str) -> str:
    """Returns a character as it is shown: one in a cell, a newline after its mark."""
    if character == "\n":
        return "\u21b5\n"
    if character == "\t":
        return "\u2192"
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    # Accents that stand over the character before, marks of direction, and the like.
    return "\ufffd" if unicodedata.category(character) in ("Cc", "Cf", "Mn", "Me") else character
