"""Pictures of a notebook for every reader: drawn for dense screens, described for who cannot see them.

The words come from the figure itself (titles, axis labels, what each line, bar and image holds), so they say
nothing else than the picture. They travel in the output's own metadata, where the site finds them.
"""

from __future__ import annotations

import sys
from io import BytesIO

import numpy as np

MANY = 6  # lines, bars or panels that are told one by one


def describe(figure) -> str:
    """What a matplotlib figure shows, in a sentence or two for each of its panels."""
    own = _sentence(_line(figure.get_suptitle() or ""))
    if len(figure.axes) > MANY and all(ax.images for ax in figure.axes if ax.has_data()):
        return _line(f"{own} {_sheet([ax for ax in figure.axes if ax.has_data()])}")
    return _line(" ".join(filter(None, [own, *map(_panel, figure.axes)])))


def _sheet(panels: list) -> str:
    names = list(dict.fromkeys(_line(ax.get_title()) for ax in panels if ax.get_title()))
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return f"{len(panels)} images" + (f": {', '.join(names[:MANY])}{more}." if names else ".")


def title_of(figure) -> str:
    """The figure's own title, else the titles of its panels, as far as they are few."""
    if own := (figure.get_suptitle() or "").strip():
        return _line(own)
    titles = list(dict.fromkeys(_line(ax.get_title()) for ax in figure.axes if ax.get_title()))
    return "; ".join(titles) if len(titles) <= MANY else ""


def enable() -> None:
    """In a notebook, have figures shown at twice the pixels and with their description; elsewhere nothing."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        return
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    pyplot.switch_backend(pyplot.get_backend())  # the backend puts its own formatter there when it starts
    shell.display_formatter.formatters["image/png"].for_type(Figure, _png)


def _png(figure) -> tuple[bytes, dict] | None:
    if not figure.axes:
        return None
    content = BytesIO()
    figure.savefig(content, format="png", dpi=2 * figure.dpi, bbox_inches="tight")
    width, height = (int.from_bytes(content.getvalue()[at : at + 4], "big") // 2 for at in (16, 20))
    told = {"width": width, "height": height, "title": title_of(figure), "alt": describe(figure)}
    return content.getvalue(), told


def _panel(ax) -> str:
    if ax.get_label() == "<colorbar>":
        return ""
    x, y = _line(ax.get_xlabel()), _line(ax.get_ylabel())
    axes = f"{y or 'values'} against {x}" if x else y
    parts = [_line(ax.get_title()), axes, *_lines(ax), *_bars(ax), *_images(ax), *_points(ax)]
    return _sentence("; ".join(filter(None, dict.fromkeys(parts))))


def _lines(ax) -> list[str]:
    drawn = [line for line in ax.get_lines() if len(line.get_xydata()) > 2]
    if len(drawn) > MANY:
        return [f"{len(drawn)} lines"]
    told = []
    for line in drawn:
        values = np.asarray(line.get_ydata(), float)
        values = values[np.isfinite(values)]
        if len(values):
            name = _name(line, "a line")
            span = f"goes from {_number(values[0])} to {_number(values[-1])}"
            if min(values) < min(values[0], values[-1]) or max(values) > max(values[0], values[-1]):
                span += f" within {_number(values.min())} to {_number(values.max())}"
            told.append(f"{name} {span}")
    marked = [_name(line, "") for line in ax.get_lines() if len(line.get_xydata()) <= 2]
    return told + [f"marked: {', '.join(filter(None, marked))}"] * any(marked)


def _bars(ax) -> list[str]:
    told = []
    names = {
        "x": [t.get_text() for t in ax.get_xticklabels()],
        "y": [t.get_text() for t in ax.get_yticklabels()],
    }
    for bars in ax.containers:
        if not hasattr(bars, "datavalues"):
            continue
        values = np.asarray(bars.datavalues, float)
        labels = names["y" if bars.orientation == "horizontal" else "x"]
        named = _name(bars, "bars")
        if len(values) <= MANY and len(labels) == len(values):
            pairs = zip(labels, values, strict=True)
            told.append(
                f"{named}: " + ", ".join(f"{_line(label)} {_number(value)}" for label, value in pairs)
            )
        elif len(values):
            told.append(
                f"{named}: {len(values)} bars from {_number(values.min())} to {_number(values.max())}"
            )
    return told


def _images(ax) -> list[str]:
    return ["an image"] * bool(ax.images)


def _points(ax) -> list[str]:
    return [f"{_name(group, 'points')}: {len(group.get_offsets())} points" for group in ax.collections][:MANY]


def _name(artist, otherwise: str) -> str:
    label = str(artist.get_label() or "")
    return otherwise if label.startswith("_") or not label else _line(label)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _line(words: str) -> str:
    return " ".join(str(words).replace("$", "").split())


def _sentence(words: str) -> str:
    return f"{words}." if words and words[-1] not in ".?!" else words
