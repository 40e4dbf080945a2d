"""VolSDF's density and its parameter against the release's (fixture 05a)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scaledreamer.field.density import released_beta, volsdf_density

DATA = load_file(Path(__file__).parent / "parity" / "05a_volsdf.safetensors")


@pytest.mark.parametrize("i", range(3))
def test_density(i):
    "The third parameter is sharper than 80, and clamped; the fixture has it before clamping."
    beta = released_beta(DATA["learned_variance_p"][i])
    torch.testing.assert_close(
        1 / beta, DATA[f"p{i}/inv_std"].clamp(max=80).view(()), rtol=1e-5, atol=0
    )
    lost = (
        2**-24 / beta.item()
    )  # the release forms 0.5 - 0.5 in front of the surface: half a unit of rounding, times s
    torch.testing.assert_close(
        volsdf_density(DATA["sdf"], beta), DATA[f"p{i}/density"], rtol=1e-5, atol=lost
    )
