"""The tests of gradients of weights, on Triton's kernels where there is no GPU."""

import pytest
from test_wgrad import test_gradients_in_codes, test_products, test_quantize_weight, test_wgrad_in_codes  # noqa: F401

pytestmark = pytest.mark.kernels
