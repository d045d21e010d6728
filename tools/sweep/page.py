"""The tables of a sweep: one on the screen, and the page ``docs/coverage.md``."""

from __future__ import annotations

import datetime
import math
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

from tabulate import tabulate

Record = dict[str, Any]

EQUAL = 1e-5
"""Of the largest output in float32; the same operators in the same order usually give 0."""
GRADIENTS_EQUAL = 1e-4
"""Autograd sums the readers of a value in an order of its own, over the depth of the network."""


def failed(record: Record) -> bool:
    """Whether a model did not come through all that was asked of it."""
    return any(key in record for key in ("refused", "crashed", "timeout"))


def captured(record: Record) -> bool:
    return "capture_s" in record


def _is(key: str, bound: float = EQUAL) -> Callable[[Record], bool]:
    def holds(record: Record) -> bool:
        value = record.get(key)
        return isinstance(value, (int, float)) and (math.isnan(value) or value <= bound)

    return holds


def _asked(key: str) -> Callable[[Record], bool]:
    """Whether the question applies: the model itself takes what it would be given."""

    def applies(record: Record) -> bool:
        value = record.get(key)
        return key in record and not str(value).startswith(("the model itself", "no image"))

    return applies


def _trains(record: Record) -> bool:
    return captured(record) and not record["eval_only"] and _asked("train")(record)


def _size_is_right(record: Record) -> bool:
    return _is("size")(record) or str(record.get("size")).startswith("guard")


def _folded(record: Record) -> bool:
    return bool(record.get("passes"))


_COLUMNS: tuple[tuple[str, Callable[[Record], bool], Callable[[Record], bool]], ...] = (
    ("captured", lambda r: True, captured),
    ("eval equal", lambda r: True, _is("eval")),
    ("train equal", _trains, _is("train")),
    ("gradients equal", _trains, _is("gradients", GRADIENTS_EQUAL)),
    ("buffers equal", _trains, _is("buffers")),
    ("other batch equal", _asked("batch"), _is("batch")),
    ("other size equal or refused", _asked("size"), _size_is_right),
    ("passes verified", captured, _folded),
    ("ONNX equal", _asked("onnx"), lambda r: isinstance(r.get("onnx"), float)),
    ("plain fx: eval", _asked("fx_eval"), _is("fx_eval")),
    ("plain fx: train", _asked("fx_train"), _is("fx_train")),
    ("plain fx: batch", _asked("fx_batch"), _is("fx_batch")),
    ("torch.export: eval", _asked("export_eval"), _is("export_eval")),
)
"""Name, whether a model counts, whether it passes."""


def _counts(records: Sequence[Record]) -> list[str]:
    cells = []
    for _, counts, passes in _COLUMNS:
        asked = [record for record in records if counts(record)]
        cells.append(f"{sum(map(passes, asked))}/{len(asked)}" if asked else "")
    return cells


def summary(records: Sequence[Record]) -> str:
    """How many models pass each question, the times, and what failed by name."""
    rows = list(zip([name for name, _, _ in _COLUMNS], _counts(records), strict=True))
    parts = [tabulate(rows, ("", "models"), colalign=("left", "right")), _times(records)]
    return "\n\n".join([*parts, *(f"{model}: {why}" for model, why in _failures(records))])


def _times(records: Sequence[Record]) -> str:
    both = [r for r in records if "capture_s" in r and "export_s" in r]
    lines = []
    if both:
        ratio = statistics.median(r["capture_s"] / r["export_s"] for r in both)
        lines.append(f"capture time / torch.export time, median of {len(both)}: {ratio:.2f}")
    slowest = sorted((r for r in records if captured(r)), key=lambda r: -r["capture_s"])[:3]
    named = ", ".join(f"{r['model']} {r['capture_s']:.1f} s" for r in slowest)
    return "\n".join([*lines, f"slowest captures: {named}"])


def _failures(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Every answer that is not what is wanted, with its reason."""
    found = []
    for record in records:
        reasons = [f"{kind} in {record['stage']}: {record[kind]}"
                   for kind in ("refused", "crashed") if kind in record]  # fmt: skip
        if "timeout" in record:
            reasons.append(f"stopped after {record['timeout']:.0f} s in {record.get('stage')}")
        if captured(record):
            reasons += [
                f"{name}: {record[key]}"
                for name, key, right in (
                    ("eval", "eval", _is("eval")),
                    ("train", "train", _is("train")),
                    ("gradients", "gradients", _is("gradients", GRADIENTS_EQUAL)),
                    ("buffers", "buffers", _is("buffers")),
                    ("other batch", "batch", _is("batch")),
                    ("other size", "size", _size_is_right),
                )
                if _asked(key)(record) and not right(record)
            ]
        found += [(record["model"], reason) for reason in reasons]
    return found


def coverage(records: Sequence[Record], command: str) -> str:
    """The page: totals, the table by family, failures by name, how it was made."""
    names = [name for name, _, _ in _COLUMNS]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm"))
    totals = [(group, len(members), *_counts(members)) for group, members in _groups(records)]
    families = [(f, len(m), *_counts(m)) for f, m in _by_family(records).items()]
    eval_only = [(r["model"], r["eval_only"]) for r in records if r.get("eval_only")]
    opaque = [(r["model"], ", ".join(r["opaque"])) for r in records if r.get("opaque")]
    norms = [r for r in records if r.get("norms_left")]
    declined = [(r["model"], f"{r['norms_left']} of {r['norms']}", _reasons(r)) for r in norms]
    foldable = [r for r in records if r.get("norms")]
    errors = [p["error"] for r in foldable for p in r.get("passes", ()) if p["error"] is not None]
    shipped = [p["shipped"] for r in foldable for p in r.get("passes", ()) if p["shipped"]]
    worst = f"{max(errors):.1e} in float64, {max(shipped):.1e} as shipped" if shipped else "none"
    return "\n\n".join([
        "# Coverage",
        f"Made {datetime.date.today()} by\n\n```\n{command}\n```",
        f"with {packages}, Python {platform.python_version()}, weights seeded, every model at the "
        "smallest square input that it takes (its own size where that is fixed). Equal means: "
        f"within {EQUAL:.0e} of the largest output ({GRADIENTS_EQUAL:.0e} for gradients), "
        "relative to each tensor's own largest value. *Train* is one step in train mode under one "
        "seed; the columns for training leave out evaluation-only programs, which are listed "
        "below, and models whose own training fails on random images. *Other size* is 32 columns "
        "more: the captured module gives the model's result or its guards refuse. Peers are given "
        "the same model and inputs; `torch.export` keeps one mode and is compared in that.",
        "## Totals\n\n" + _table(("", "models", *names), totals),
        "## Times\n\nBoth in one process after a warm-up, one thread, "
        "`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456`, "
        "verification apart.\n\n" + "- " + _times(records).replace("\n", "\n- "),
        "## What is not as wanted, by name\n\n" + _table(("model", "reason"), _failures(records)),
        "## Evaluation only\n\n" + _table(("model", "because its training"), eval_only),
        "## Submodules run as they are\n\n" + _table(("model", "submodules"), opaque),
        f"## BatchNorms folded\n\n{len(foldable)} models have BatchNorms; in "
        f"{len(foldable) - len(norms)} none is left. Worst verified error: {worst}.\n\n"
        + _table(("model", "left", "why"), declined),
        "## By family\n\n" + _table(("family", "models", *names), families),
    ]) + "\n"  # fmt: skip


def _groups(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    def is_classic(record: Record) -> bool:
        return record["family"] in ("torchvision classification", "torchvision segmentation")

    groups = {
        "torchvision classification and segmentation": [r for r in records if is_classic(r)],
        "other torchvision": [
            r for r in records if r["family"].startswith("torchvision") and not is_classic(r)
        ],
        "timm": [r for r in records if r["family"].startswith("timm")],
    }
    return [(name, members) for name, members in groups.items() if members]


def _by_family(records: Sequence[Record]) -> dict[str, list[Record]]:
    families: dict[str, list[Record]] = {}
    for record in records:
        families.setdefault(record["family"], []).append(record)
    return families


def _reasons(record: Record) -> str:
    """The commonest kinds of reason; names and numbers differ from site to site."""
    kinds = Counter(
        reason.partition(": ")[2] for done in record["passes"] for reason in done["declined"]
    )
    first, count = kinds.most_common(1)[0] if kinds else ("", 0)
    others = sum(kinds.values()) - count
    return first + (f" (and {others} like it)" if others else "")


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "None."
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return tabulate(cells, headers, "pipe", disable_numparse=True)
