"""``fxopt pack``: buffers of MiniMalloc's files in, sizes and offsets out."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from test_cli import Run, run  # noqa: F401  (fixtures)

from fxopt.analysis.arena import plan_arena
from fxopt.analysis.buffers import load_buffers
from fxopt.analysis.validate import validate_packing

EXAMPLE = "id,lower,upper,size\nb1,0,3,4\nb2,3,9,4\nb3,0,9,4\nb4,9,21,4\nb5,0,21,4\n"


@pytest.fixture
def buffers(tmp_path: Path) -> Path:
    path = tmp_path / "input.12.csv"
    path.write_text(EXAMPLE)
    return path


def test_as_text(run: Run, buffers: Path) -> None:  # noqa: F811
    status, out, err = run("pack", str(buffers), "--capacity", "12")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [
        "size         12 B: no packing needs less",
        "lower bound  12 B",
        "capacity     12 B: fits, 0 B spare",
    ]
    assert lines[3].split() == ["buffer", "offset"]
    assert [line.split()[0] for line in lines[5:]] == ["b1", "b2", "b3", "b4", "b5"]


def test_as_json(run: Run, buffers: Path) -> None:  # noqa: F811
    status, out, _ = run("pack", str(buffers), "--json", "--capacity", "11")
    document = json.loads(out)
    assert status == 1
    assert document["size_bytes"] == document["lower_bound_bytes"] == 12
    assert document["optimal"] is True
    assert document["fits"] is False
    assert sorted(document["offsets"]) == ["b1", "b2", "b3", "b4", "b5"]
    again = run("pack", str(buffers), "--json", "--capacity", "11")[1]
    assert again == out


def test_says_that_no_packing_fits(run: Run, buffers: Path) -> None:  # noqa: F811
    status, out, _ = run("pack", str(buffers), "--capacity", "8")
    assert status == 1
    assert "does not fit, 4 B too much; no packing does" in out


def test_writes_the_buffers_with_offsets(run: Run, buffers: Path, tmp_path: Path) -> None:  # noqa: F811
    target = tmp_path / "out.csv"
    assert run("pack", str(buffers), "-o", str(target))[0] == 0
    rows = list(csv.DictReader(target.open()))
    assert list(rows[0]) == ["id", "lower", "upper", "size", "offset"]
    assert [row["id"] for row in rows] == ["b1", "b2", "b3", "b4", "b5"]
    assert max(int(row["offset"]) + int(row["size"]) for row in rows) == 12
    assert load_buffers(target) == load_buffers(buffers)  # what was written is read again


def test_other_columns_and_alignment(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "b.csv"
    path.write_text("\ufeffsize, upper,id,lower,alignment\n3,2,a,0,1\n8,2,b,0,8\n5,3,c,1,4\n")
    document = json.loads(run("pack", str(path), "--json")[1])
    assert document["offsets"]["b"] % 8 == 0
    assert document["offsets"]["c"] % 4 == 0
    target = tmp_path / "o.csv"
    assert run("pack", str(path), "-o", str(target))[0] == 0
    assert target.read_text().splitlines()[0] == "id,lower,upper,size,alignment,offset"


def test_no_buffers(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "b.csv"
    path.write_text("id,lower,upper,size\n")
    assert json.loads(run("pack", str(path), "--json")[1])["size_bytes"] == 0
    assert run("pack", str(path))[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'id'"),
        ("id,lower,upper\n", "has no column 'size'; the first line names the columns"),
        ("id,lower,upper,size,gaps\na,0,3,4,1-2\n", "has a column 'gaps'; known are"),
        ("id,lower,upper,size\na,0,3\n", "line 2: the row has not as many fields"),
        ("id,lower,upper,size\na,0,3,4,5\n", "line 2: the row has not as many fields"),
        ("id,lower,upper,size\na,0,3,4\nb,0,3,4.5\n", "line 3: size is '4.5', which is no whole"),
        ("id,lower,upper,size\na,0,3,-4\n", "line 2: size is -4; the least is 0"),
        ("id,lower,upper,size\na,3,3,4\n", "line 2: 'a' is there at no step: [3, 3)"),
        ("id,lower,upper,size\na,0,3,4\na,5,6,4\n", "the id 'a' is there twice"),
        ("id,lower,upper,size,alignment\na,0,3,4,0\n", "line 2: alignment is 0; the least is 1"),
        ('id,lower,upper,size\n"a,0,3,4\n', "is no CSV"),
        ("\x00\x01", "has no column"),
    ],
)
def test_refuses(run: Run, tmp_path: Path, text: str, message: str) -> None:  # noqa: F811
    path, target = tmp_path / "b.csv", tmp_path / "o.csv"
    path.write_text(text)
    status, out, err = run("pack", str(path), "-o", str(target))
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not target.exists()


def test_refuses_files(run: Run, buffers: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "binary.csv").write_bytes(b"id,lower,upper,size\n\xff\xfe,0,1,2\n")
    for arguments, message in (
        (["nowhere.csv"], "cannot read 'nowhere.csv'"),
        ([str(tmp_path)], "cannot read"),
        ([str(tmp_path / "binary.csv")], "is no CSV"),
        ([str(buffers), "-o", "no/such/dir.csv"], "cannot write 'no/such/dir.csv'"),
        ([str(buffers), "--capacity", "much"], "'much' is no size"),
        ([str(buffers), "--time-limit", "0"], "0.0 is not in the range"),
    ):
        status, out, err = run("pack", *arguments)
        assert (status, out) == (2, "")
        assert message in err


@pytest.mark.parametrize("seed", range(6))
def test_buffers_that_fit_by_construction(seed: int, tmp_path: Path) -> None:
    """A rectangle (time by address) cut into buffers fits into its height."""
    rng = random.Random(seed)
    pieces, height = [(0, 64, 0, 4096)], 4096
    while len(pieces) < 60:
        left, right, low, high = pieces.pop(rng.randrange(len(pieces)))
        if rng.random() < 0.5 and right - left > 1:
            cut = rng.randint(left + 1, right - 1)
            pieces += [(left, cut, low, high), (cut, right, low, high)]
        elif high - low > 1:
            cut = rng.randint(low + 1, high - 1)
            pieces += [(left, right, low, cut), (left, right, cut, high)]
        else:
            pieces.append((left, right, low, high))
    rows = [f"{n},{a},{b},{d - c}" for n, (a, b, c, d) in enumerate(pieces)]
    path = tmp_path / "b.csv"
    path.write_text("id,lower,upper,size\n" + "\n".join(rows) + "\n")
    buffers = load_buffers(path)
    arena = plan_arena(buffers, 1, time_limit=5)
    validate_packing(buffers, arena)
    assert arena.lower_bound_bytes == height
    assert arena.size_bytes <= 1.05 * height
