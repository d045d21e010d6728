"""The command ``fxopt quantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fxopt.cli_options import model_options, no_verify_option, print_result, progress

if TYPE_CHECKING:
    from fxopt.inputs import InputSpec


def _numbers(context: click.Context, option: click.Parameter, text: str | None) -> Any:
    """``.5`` or ``.485,.456,.406``."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"'{text}' is no number, nor numbers with commas") from None


def _size(context: click.Context, option: click.Parameter, text: str | None) -> Any:
    """``224`` or ``192x256``."""
    if text is None:
        return None
    sides = text.split("x")
    known = all(side.isascii() and side.isdigit() and int(side) for side in sides)
    if len(sides) > 2 or not known:
        raise click.BadParameter(f"'{text}' is no size; write 224, or 192x256 (height, width)")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


@click.command()
@model_options
@click.option("--calibration", metavar="DIR|NPZ", required=True,
              help="Pictures that ranges come from, or an .npz: inputs x, labels y.")  # fmt: skip
@click.option("--test", metavar="DIR|NPZ", help="Pictures to judge on.  [default: the same]")
@click.option("--resize", type=click.IntRange(min=1), help="Pixels of the shorter side.")
@click.option("--crop", metavar="SIZE", callback=_size, help="Of the centre: 224 or 192x256.")
@click.option("--mean", metavar="NUMBERS", callback=_numbers, help="One, or one a channel.")
@click.option("--std", metavar="NUMBERS", callback=_numbers, help="One, or one a channel.")
@click.option("--interpolation", help="bicubic, bilinear, lanczos or nearest.")
@click.option("--observer", help="minmax, moving_average, percentile or mse.")
@click.option("--granularity", type=click.Choice(["channel", "tensor"]), help="Of weights.")
@click.option("--weight-bits", type=int, help="From 2 to 8.")
@click.option("--activation-bits", type=int, help="From 2 to 8.")
@click.option("--bias-correction/--no-bias-correction", default=None,
              help="Biases that make up for rounded weights.  [default: on]")  # fmt: skip
@click.option("--skip", metavar="PATH,...", help="Modules that stay in float.")
@click.option("--onnx", metavar="FILE", help="Write it as integer ONNX.")
@click.option("--activation-type", type=click.Choice(["uint8", "int8"]), default="uint8",
              show_default=True, help="Of the file.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@no_verify_option
def quantize(
    calibration: str,
    test: str | None,
    resize: int | None,
    crop: Any,
    mean: Any,
    std: Any,
    interpolation: str | None,
    onnx: str | None,
    activation_type: Any,
    as_json: bool,
    no_verify: bool,
    inputs: tuple[str, ...],
    **rest: Any,
) -> None:
    """Quantise MODEL to int8, calibrated on pictures, and write it as integer ONNX.

    How pictures are made inputs is by default as timm or torchvision say of the model. Labels are
    the last part of file names (cat_281.jpg) or the folders that pictures lie in.
    """
    from fxopt.files import check_path
    from fxopt.inputs import parse_dtype, parse_input
    from fxopt.model_preprocessing import preprocessing_for
    from fxopt.passes import FakeQuantization
    from fxopt.pictures import load_pictures
    from fxopt.quantize import quantize as quantized
    from fxopt.quantize_report import quantize_json, quantize_text
    from fxopt.zoo import load_model

    if onnx is not None:
        check_path(onnx)
    options = {name: rest.pop(name) for name in _OPTIONS}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        FakeQuantization(**options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    shape = _picture_shape([parse_input(text) for text in inputs])
    if rest["dtype"] not in (None, "float32"):
        raise click.UsageError("integers are simulated in float32; leave --dtype out")
    dtype = rest["dtype"] and parse_dtype(rest["dtype"])
    with progress("load", "capture", "calibrate", "export", "judge") as begin:
        begin()
        spec = rest["model"]
        model = load_model(spec, weights=rest["weights"], seed=rest["seed"], dtype=dtype,
                           trust_pickle=rest["trust_pickle"])  # fmt: skip
        preprocessing = preprocessing_for(
            model, spec, input_shape=shape, resize=resize, crop=crop, mean=mean, std=std,
            interpolation=interpolation,
        )  # fmt: skip
        found = quantized(
            model,
            load_pictures(calibration, preprocessing),
            test=None if test is None else load_pictures(test, preprocessing),
            options=options, onnx=onnx, activation_type=activation_type, verify=not no_verify,
            begin=begin,
        )  # fmt: skip
    print_result((quantize_json if as_json else quantize_text)(found))


_OPTIONS = (
    "observer", "granularity", "weight_bits", "activation_bits", "bias_correction", "skip",
)  # fmt: skip


def _picture_shape(specs: list[InputSpec]) -> tuple[int, int, int] | None:
    """``(C, H, W)`` of the one input, if it is given."""
    if not specs:
        return None
    if len(specs) > 1 or len(specs[0].shape) != 4:
        raise click.UsageError("--input is one shape NxCxHxW: pictures are the only input")
    _, channels, height, width = specs[0].shape
    return channels, height, width
