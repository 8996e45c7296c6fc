import pytest
import torch

from tsm_core.errors import ShapeError
from tsm_core.shift import ClipPass, StepPass, shift_clip, shift_step


def counting_clip() -> torch.Tensor:
    """x[t, c] = 10 t + c with 3 frames, 8 channels and one pixel."""
    return (10 * torch.arange(3.0)[:, None] + torch.arange(8.0)).view(1, 3, 8, 1, 1)


@pytest.mark.parametrize(
    ("mode", "start", "first_channels"),
    [
        ("bi", "zeros", [[10, 0], [20, 1], [0, 11]]),
        ("uni", "zeros", [[0, 1], [0, 11], [10, 21]]),
        ("bi", "own", [[10, 1], [20, 1], [20, 11]]),
        ("uni", "own", [[0, 1], [0, 11], [10, 21]]),
    ],
)
def test_vector_of_the_definition(mode, start, first_channels):
    out = shift_clip(counting_clip(), fold_div=8, mode=mode, start=start).view(3, 8)
    assert out[:, :2].tolist() == first_channels
    assert torch.equal(out[:, 2:], counting_clip().view(3, 8)[:, 2:])


def test_own_start_reads_the_first_frame_itself():
    clip = counting_clip() + 100
    assert shift_clip(clip, mode="uni", start="own")[0, 0, 0].item() == 100
    assert shift_clip(clip, mode="uni", start="zeros")[0, 0, 0].item() == 0


def test_remainder_of_the_channels_stays():
    clip = torch.randn(2, 4, 27, 2, 2)  # fold 3: six channels move, one group each way
    out = shift_clip(clip, fold_div=8, mode="bi")
    assert torch.equal(out[:, :, 6:], clip[:, :, 6:])
    assert torch.equal(out[:, :-1, :3], clip[:, 1:, :3])
    assert torch.equal(out[:, 1:, 3:6], clip[:, :-1, 3:6])


def test_bi_and_uni_share_one_definition_up_to_the_group():
    clip = torch.randn(1, 5, 16, 2, 2)
    past_of_bi = shift_clip(clip, mode="bi")[:, :, 2:4]
    past_of_uni = shift_clip(torch.cat([clip[:, :, 2:4], clip[:, :, 4:], clip[:, :, :2]], 2), mode="uni")[:, :, :2]
    assert torch.equal(past_of_bi, past_of_uni)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stepping_equals_the_clip(layout):
    clip = torch.randn(2, 6, 16, 3, 5)
    wanted = shift_clip(clip, mode="uni")
    held = torch.zeros(2, 2, 3, 5)
    for t in range(6):
        frame = clip[:, t].contiguous(memory_format=layout)
        shifted, held = shift_step(frame, held)
        assert torch.equal(shifted, wanted[:, t])
        assert shifted.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["bi", "uni"])
def test_pass_over_clips_keeps_the_layout(mode, layout):
    frames = torch.randn(6, 16, 3, 5).contiguous(memory_format=layout)
    out = ClipPass(3, mode).shift(0, frames, 8)
    assert torch.equal(out, shift_clip(frames.reshape(2, 3, 16, 3, 5), mode=mode).flatten(0, 1))
    assert out.is_contiguous(memory_format=layout)


def test_fresh_frames_of_a_step_read_themselves():
    x, held = torch.randn(3, 8, 2, 2), torch.randn(3, 1, 2, 2)
    how = StepPass([held], fresh=torch.tensor([False, True, False]))
    out = how.shift(0, x, 8)
    assert torch.equal(out[1], x[1])
    assert torch.equal(out[::2, :1], held[::2])
    assert torch.equal(how.next_held[0], x[:, :1])


@pytest.mark.parametrize("start", ["zeros", "own"])
@pytest.mark.parametrize("mode", ["bi", "uni"])
def test_gradient(mode, start):
    clip = torch.randn(1, 4, 8, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift_clip(x, 4, mode, start), clip)


def test_wrong_shapes_are_named():
    with pytest.raises(ShapeError, match=r"\(2, 8, 4, 4\)"):
        shift_clip(torch.zeros(2, 8, 4, 4))
    with pytest.raises(ShapeError, match="fold_div 8"):
        shift_clip(torch.zeros(1, 2, 4, 4, 4), fold_div=8)
    with pytest.raises(ShapeError, match="does not fit"):
        shift_step(torch.zeros(2, 8, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ShapeError, match="does not fit"):
        shift_step(torch.zeros(2, 8, 4, 4), torch.zeros(2, 1, 4, 5))
