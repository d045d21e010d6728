"""Capture, rewrite and compare the models of torchvision and timm, and write down what came of it.

    python tools/zoo_sweep.py 'torchvision:*' families
    python tools/zoo_sweep.py 'timm:mobilenetv3*' family:regnet --passes fold_conv_bn --onnx

Every model runs in a process of its own with a time limit. A line of JSON per model goes to
``--out``; models that are in it already are not run again, so a sweep that was stopped goes on
where it was (``--again`` repeats those that did not end well). A table is printed at the end, and
``--markdown`` writes the page ``docs/coverage.md``. Weights are seeded, nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import click
from sweep import page
from sweep.examine import Questions
from sweep.selection import choose
from sweep.workers import examine_all
from tqdm import tqdm

warnings.simplefilter("ignore")


@click.command(help=__doc__, context_settings={"max_content_width": 100})
@click.argument("models", nargs=-1, required=True)
@click.option("--passes", default="fold_conv_bn", show_default=True, help="Pipeline; '' for none.")
@click.option("--onnx", is_flag=True, help="Also export what the passes made, and run the file.")
@click.option("--no-peers", is_flag=True, help="Leave out torch.fx and torch.export.")
@click.option("--jobs", default=2, show_default=True, help="Models at a time.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds for one model.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/sweep.jsonl"),
              show_default=True, help="Records, one line of JSON a model.")  # fmt: skip
@click.option("--again", is_flag=True, help="Run models anew whose record shows a failure.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the coverage page here.")
def main(
    models: tuple[str, ...],
    passes: str,
    onnx: bool,
    no_peers: bool,
    jobs: int,
    limit: float,
    out: Path,
    again: bool,
    markdown: Path | None,
) -> None:
    choices = choose(models)
    records = read(out)
    done = {spec for spec, record in records.items() if not (again and page.failed(record))}
    left = [choice for choice in choices if choice.spec not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    questions = Questions(passes, onnx, peers=not no_peers)
    with out.open("a") as lines, tqdm(total=len(left), file=sys.stderr) as bar:
        for record in examine_all(left, questions, jobs=jobs, limit=limit):
            print(json.dumps(record), file=lines, flush=True)
            records[record["model"]] = record
            bar.set_postfix_str(record["model"])
            bar.update()
    swept = [records[choice.spec] for choice in choices if choice.spec in records]
    click.echo(page.summary(swept))
    if markdown is not None:
        command = " ".join(["python tools/zoo_sweep.py", *map(_quoted, sys.argv[1:])])
        markdown.write_text(page.coverage(swept, command))


def read(path: Path) -> dict[str, dict[str, object]]:
    """The last record of every model in the file; nothing if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["model"]: record for record in map(json.loads, lines)}


def _quoted(argument: str) -> str:
    return f"'{argument}'" if set(argument) & set("*:? ") else argument


if __name__ == "__main__":
    main()
