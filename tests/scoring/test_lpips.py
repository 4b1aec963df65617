"""LPIPS: stated values, the reference package where it imports, and what is said where weights are missing."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kitbench.errors import InputError
from kitbench.scoring import lpips
from kitbench.scoring.lpips import ENVIRONMENT, LPIPS, available

DATA = Path(os.environ.get("KITBENCH_DATA") or Path(__file__).parents[3] / "shared" / "data")
SQUEEZE = DATA / "weights" / "squeezenet1_1.pth"

needs_heads = pytest.mark.skipif(importlib.util.find_spec("lpips") is None, reason="package lpips is not installed")
needs_weights = pytest.mark.skipif(not SQUEEZE.is_file(), reason=f"{SQUEEZE} is not there")


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch, tmp_path):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def stated_pair():
    generator = torch.Generator().manual_seed(42)
    return [torch.rand(2, 3, 100, 100, generator=generator) for _ in range(2)]  # x -> 2x - 1 is inside LPIPS


def random_backbone(net, folder):
    torch.manual_seed(0)
    features = {"squeeze": "_squeezenet", "alex": "_alexnet", "vgg": "_vgg"}[net]
    state = {f"features.{k}": v for k, v in getattr(lpips, features)().state_dict().items()}
    file = folder / f"{lpips._FILES[net].rsplit('-', 1)[0]}.pth"  # without a hash in its name
    torch.save(state, file)
    return file


@needs_heads
@needs_weights
def test_stated_values_of_squeeze():
    a, b = stated_pair()
    assert LPIPS("squeeze", SQUEEZE)(a, b).tolist() == pytest.approx([0.1024, 0.0938], abs=5e-5)


@needs_heads
@needs_weights
def test_equal_images_are_at_distance_zero_and_batching_changes_nothing():
    model = LPIPS("squeeze", SQUEEZE)
    a, b = stated_pair()
    assert model(a, a).tolist() == [0, 0]
    assert torch.cat([model(a[:1], b[:1]), model(a[1:], b[1:])]).tolist() == pytest.approx(model(a, b).tolist())


@needs_heads
@pytest.mark.parametrize("net", ["squeeze", "alex", "vgg"])
def test_agrees_with_the_published_formula_layer_by_layer(net, tmp_path):
    """The formula of the paper, written out for one image with the backbone's layers taken by hand."""
    model = LPIPS(net, random_backbone(net, tmp_path))
    a, b = (x[:1, :, :40, :48] for x in stated_pair())
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    f, g = (((2 * x - 1).permute(0, 2, 3, 1) - shift).div(scale).permute(0, 3, 1, 2) for x in (a, b))
    total = 0.0
    for number, layer in enumerate(model.features):
        f, g = layer(f), layer(g)
        if number in model.taps:
            head = getattr(model, f"head{model.taps.index(number)}")
            unit = F.normalize(f, dim=1) - F.normalize(g, dim=1)
            total += F.conv2d(unit**2, head).mean().item()
    assert model(a, b).item() == pytest.approx(total, rel=1e-4)


def lpips_imports():
    try:
        importlib.import_module("lpips")
    except (ImportError, RuntimeError):  # a torchvision that does not fit torch raises RuntimeError
        return False
    return True


@needs_heads
@needs_weights
def test_agrees_with_the_reference_package(monkeypatch):
    if not lpips_imports():
        pytest.skip("package lpips does not import here (its torchvision is missing or does not fit torch)")
    import lpips

    reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    ours = LPIPS("squeeze", SQUEEZE)
    state = torch.load(SQUEEZE, weights_only=True)
    for name, parameter in reference.net.named_parameters():
        parameter.data.copy_(state["features." + name.split(".", 1)[1]])
    a, b = stated_pair()
    with torch.no_grad():
        assert ours(a, b).tolist() == pytest.approx(reference(a, b, normalize=True).flatten().tolist(), abs=1e-6)


@needs_heads
def test_missing_weights_are_named_with_their_address_and_three_ways(tmp_path):
    reason = available("alex")
    assert reason is not None
    for part in ("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/", ENVIRONMENT, "checkpoints"):
        assert part in reason
    assert "\n" not in reason
    assert available("alex", tmp_path / "nowhere.pth") is not None


@needs_heads
@needs_weights
def test_weights_come_from_the_environment_as_file_or_folder_and_from_the_hub_cache(monkeypatch, tmp_path):
    assert available("squeeze") is not None
    monkeypatch.setenv(ENVIRONMENT, str(SQUEEZE))
    assert available("squeeze") is None
    monkeypatch.setenv(ENVIRONMENT, str(SQUEEZE.parent))
    assert available("squeeze") is None
    monkeypatch.delenv(ENVIRONMENT)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    digest = hashlib.sha256(SQUEEZE.read_bytes()).hexdigest()[:8]
    (cache / f"squeezenet1_1-{digest}.pth").write_bytes(SQUEEZE.read_bytes())
    assert available("squeeze") is None


@needs_heads
@needs_weights
def test_damaged_or_foreign_files_are_refused(tmp_path):
    wrong_hash = tmp_path / "squeezenet1_1-b8a52dc0.pth"
    wrong_hash.write_bytes(SQUEEZE.read_bytes())
    assert "its name says b8a52dc0" in (available("squeeze", wrong_hash) or "")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(SQUEEZE.read_bytes()[:1000])
    assert "cannot be read" in (available("squeeze", truncated) or "")
    foreign = tmp_path / "foreign.pth"
    torch.save(nn.Linear(2, 2).state_dict(), foreign)
    assert "is not torchvision's squeezenet1_1" in (available("squeeze", foreign) or "")
    assert "is not torchvision's vgg16" in (available("vgg", SQUEEZE) or "")
    torch.save([1], foreign)
    assert "contains a list" in (available("squeeze", foreign) or "")


@needs_heads
def test_files_that_would_run_code_are_not_loaded(tmp_path):
    file = tmp_path / "squeezenet1_1.pth"
    torch.save(Path, file)
    assert "which is never run" in (available("squeeze", file) or "")


def test_an_absent_package_and_an_unknown_backbone_are_told(monkeypatch):
    assert "did you mean 'squeeze'" in (available("squeez") or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in (available("squeeze") or "")


@needs_heads
def test_images_of_a_wrong_shape_or_type_are_refused(tmp_path):
    model = LPIPS("alex", random_backbone("alex", tmp_path))
    a = torch.rand(1, 3, 64, 64)
    for x, y in ((a, a[..., :63]), (a[:, :1], a[:, :1]), (a[0], a[0]), (a[..., :31], a[..., :31])):
        with pytest.raises(InputError, match="colour batches"):
            model(x, y)
    with pytest.raises(InputError, match="divide by 255"):
        model((a * 255).byte(), (a * 255).byte())
    assert model(a[..., :32, :32], a[..., :32, :32]).item() == 0
