"""The network as an ONNX file: the same answers in another runtime."""

from __future__ import annotations

import pytest
import torch

from msunet_core import StudyError, apply_opt_level, evaluate
from msunet_core.files import ROOT
from msunet_core.measure.evaluation import accuracy, class_scores
from msunet_core.measure.export import OnnxNetwork, export_onnx, milliseconds, plain_network
from msunet_core.measure.pack import pack
from msunet_core.measure.unpack import unpack
from msunet_core.model.ternary import ternary_layers


@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
def test_the_plain_network_computes_the_same(new_network, images, tmp_path, weights):
    model = unpack(pack(new_network(weights=weights), tmp_path / "net.safetensors"), "O0")
    plain = plain_network(model)
    assert not ternary_layers(plain)
    before, after = (class_scores(network, images.test_images) for network in (model, plain))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)  # FP32 sums in another order


def test_a_network_at_another_level_is_refused(new_network, tmp_path):
    with pytest.raises(StudyError, match="the network is at O3, not FP32; export the one of opt level O0"):
        export_onnx(apply_opt_level(new_network(), "O3"), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_onnxruntime_gives_the_same_answers_for_any_number_of_images(new_network, images, tmp_path):
    model = unpack(pack(new_network(), tmp_path / "net.safetensors"), "O0")
    network = OnnxNetwork(export_onnx(model, tmp_path / "net.onnx"))
    assert str(ROOT).encode() not in (tmp_path / "net.onnx").read_bytes(), "published with the site"
    scores = network.class_scores(images.test_images)
    torch.testing.assert_close(scores, class_scores(model, images.test_images), rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.argmax(1), class_scores(model, images.test_images).argmax(1))
    assert (
        accuracy(scores, images.test_labels)["top1"]
        == evaluate(model, images.test_images, images.test_labels)["top1"]
    )
    torch.testing.assert_close(network.class_scores(images.test_images[:1]), scores[:1], rtol=1e-4, atol=1e-5)
    assert milliseconds(network, 1, repeats=2) > 0


def test_the_time_is_that_of_the_calls(monkeypatch):
    clock = iter([0.0, 9.0, 9.0, 18.0, 18.0, 18.002, 19.0, 19.004, 20.0, 20.9])
    monkeypatch.setattr("msunet_core.measure.export.time.perf_counter", lambda: next(clock))
    seen = []
    assert milliseconds(lambda x: seen.append(x.shape), 4, repeats=3) == pytest.approx(4.0)
    assert seen == [(4, 3, 32, 32)] * 5
