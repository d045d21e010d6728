"""Losses of outputs, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fxopt.quantizing.fidelity import OutputLoss


def test_counts_samples_whose_largest_class_stays() -> None:
    loss = OutputLoss()
    loss.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
    loss.add(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    assert loss.top1 == pytest.approx(2 / 3)
    assert loss.sqnr_db == pytest.approx(10 * math.log10(6 / 9))


def test_an_output_of_no_classes_has_no_agreement() -> None:
    loss = OutputLoss()
    loss.add(torch.ones(2, 1), torch.ones(2, 1))
    loss.add(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    assert (loss.top1, loss.sqnr_db) == (None, None)


def test_what_is_not_finite_is_no_agreement() -> None:
    loss = OutputLoss()
    loss.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[math.nan, 2.0]]))
    assert loss.sqnr_db is not None
    assert math.isnan(loss.sqnr_db)
