"""Metrics against their definitions, written out in NumPy."""

from __future__ import annotations

import numpy
import pytest
import torch

from fuseline.models.metrics import ROWS, compare, log_perplexity
from fuseline.models.text import calibration_text, evaluation_text, windows
from fuseline.models.tokens import ByteTokenizer


def test_metrics_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    length, vocabulary = ROWS + 9, 50  # more than one chunk, and a last one that is not full
    ids = [torch.randint(vocabulary, (1, length), generator=generator) for _ in range(2)]
    before = [torch.randn(1, length, vocabulary, generator=generator) * 4 for _ in ids]
    after = [b + 0.3 * torch.randn(b.shape, generator=generator) for b in before]
    index = {id(window): i for i, window in enumerate(ids)}
    found = compare(lambda w: before[index[id(w)]], lambda w: after[index[id(w)]], ids)

    p = numpy.concatenate([b[0].double().softmax(-1).numpy() for b in before])
    q = numpy.concatenate([a[0].double().softmax(-1).numpy() for a in after])
    assert found.kl == pytest.approx((p * numpy.log(p / q)).sum(1).mean(), rel=1e-12)
    assert found.top1 == (p.argmax(1) == q.argmax(1)).mean()
    assert 0.5 < found.top1 < 1
    rows = numpy.concatenate([numpy.arange(length - 1) + i * length for i in range(2)])
    targets = numpy.concatenate([window[0, 1:].numpy() for window in ids])
    for probabilities, perplexity in ((p, found.perplexity_before), (q, found.perplexity_after)):
        assert perplexity == pytest.approx(numpy.exp(-numpy.log(probabilities[rows, targets]).mean()), rel=1e-12)
    assert found.tokens == 2 * length
    mean = log_perplexity(lambda w: before[index[id(w)]], ids)
    assert mean == pytest.approx(numpy.log(found.perplexity_before), rel=1e-12)


def test_the_same_model_has_no_divergence() -> None:
    logits = torch.randn(1, 20, 30)
    found = compare(lambda w: logits, lambda w: logits, [torch.arange(20).unsqueeze(0)])
    assert (found.kl, found.top1) == (0.0, 1.0)
    assert found.perplexity_before == found.perplexity_after


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    logits = torch.full((1, 4, 3), 0.0)
    logits[..., 0] = 1e4
    found = compare(lambda w: logits, lambda w: logits, [torch.ones(1, 4, dtype=torch.int64)])
    assert found.perplexity_after == float("inf")


def test_mismatched_logits_are_an_error() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        compare(lambda w: torch.ones(1, 4, 3), lambda w: torch.ones(1, 4, 2), [torch.ones(1, 4, dtype=torch.int64)])


def test_calibration_and_evaluation_share_no_topic() -> None:
    from pydoc_data.topics import topics

    calibration, evaluation = calibration_text(), evaluation_text()
    in_calibration = {name for name, text in topics.items() if text.strip() in calibration}
    in_evaluation = {name for name, text in topics.items() if text.strip() in evaluation}
    assert in_calibration | in_evaluation == set(topics)
    # A few topics are the same text under two names, or contained in another; nothing else is shared.
    assert len(in_calibration & in_evaluation) <= 0.2 * len(topics)
    assert min(len(calibration), len(evaluation)) > 100_000


def test_windows_are_spread_and_do_not_overlap() -> None:
    text = evaluation_text()
    found = windows(text, ByteTokenizer().encode, 128, 5)
    assert [w.shape for w in found] == [(1, 128)] * 5
    data = text.encode()
    starts = [data.find(bytes(w[0].tolist())) for w in found]
    assert starts == sorted(starts) and min(b - a for a, b in zip(starts, starts[1:], strict=False)) >= 128
    assert starts[-1] > len(data) / 2
    assert windows("short", ByteTokenizer().encode, 128, 5) == []
