import itertools

import torch
import torch.nn.functional as F

from molcli.kernels.qkv_conv import short_conv, short_conv_state


def test_ragged_convolution_equals_one_convolution_per_segment():
    torch.manual_seed(0)
    bounds, channels, width = [0, 1, 1, 3, 12], 5, 4
    x = torch.randn(12, channels, dtype=torch.float64)
    weights = torch.randn(4, channels, width, dtype=torch.float64)
    state = torch.randn(4, channels, width - 1, dtype=torch.float64)
    segment = torch.tensor([0, 2, 2, *[3] * 9])
    cu = torch.tensor(bounds, dtype=torch.int32)
    index = torch.arange(12) - cu[segment]
    found = short_conv(x, weights[segment], segment, index, state)
    last = short_conv_state(x, cu, state)
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        history = torch.cat([state[i], x[a:b].T], dim=1)
        assert torch.equal(last[i], history[:, -(width - 1) :])
        if b > a:
            expected = F.conv1d(history[None], weights[i][:, None], groups=channels)[0].T
            torch.testing.assert_close(found[a:b], expected)


def test_without_a_state_the_past_is_zero():
    x, weight = torch.randn(6, 3), torch.randn(1, 3, 4)
    index = torch.arange(6)
    zero = torch.zeros(1, 3, 3)
    start = torch.zeros(6, dtype=torch.long)
    assert torch.equal(
        short_conv(x, weight, start, index, None), short_conv(x, weight, start, index, zero)
    )
