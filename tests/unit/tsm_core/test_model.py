"""The laws of a model that is stepped: unroll, isolation, finite memory, and moving house."""

import copy
import random
import threading

import pytest
import torch
from torch import nn

from tsm_core.arena import SlotError
from tsm_core.errors import CallerError, ShapeError
from tsm_core.model import NotSteppable, WindowTSM, build

MEMORY = {"resnet_small": 7, "mobilenet_v2": 10, "resnet50": 16, "resnet101": 18}
PX = {"resnet_small": 64, "mobilenet_v2": 64, "resnet50": 32, "resnet101": 32}  # deep ones small, to be quick
WITH_START = [(name, "zeros") for name in MEMORY] + [(name, "own") for name in ("resnet_small", "mobilenet_v2")]
TOLERANCE = 1e-5  # of the largest logit: other batch sizes sum in another order


def relative(got, wanted):
    """Largest difference, as a share of the largest wanted value."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def clip_of(streams, frames, px=64, device="cpu", seed=1):
    """Noise around a picture of its own for each stream and frame."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(streams, frames, 3, px, px, generator=generator).to(device)


def run_steps(model, clip, arena=None, slots=None):
    """Logits (N, T, K) of stepping through a clip, all streams in one batch."""
    arena = arena or model.new_arena(len(clip))
    slots = slots or [arena.allocate() for _ in clip]
    return torch.stack([model.step(clip[:, t], arena, slots) for t in range(clip.shape[1])], dim=1)


def unrolled(model, clip):
    with torch.no_grad():
        return model.forward_frames(clip)


@pytest.mark.parametrize(("backbone", "start"), WITH_START)
def test_unroll(model_of, device, backbone, start):
    model = model_of(backbone, px=PX[backbone], device=device, start=start)
    clip = clip_of(2, 4, px=PX[backbone], device=device)
    wanted = unrolled(model, clip)
    assert relative(run_steps(model, clip), wanted) < TOLERANCE
    # the law says something: every frame differs from the same frame without its past
    alone = unrolled(model, clip.flatten(0, 1)[:, None]).view_as(wanted)
    assert relative(alone[:, 1:], wanted[:, 1:]) > 100 * TOLERANCE
    assert relative(alone[:, 0], wanted[:, 0]) < TOLERANCE


@pytest.mark.parametrize("backbone", ["resnet_small", "mobilenet_v2"])
def test_unroll_at_full_size(model_of, device, backbone):
    model = model_of(backbone, px=224, device=device)
    clip = clip_of(1, 3, px=224, device=device)
    assert relative(run_steps(model, clip), unrolled(model, clip)) < TOLERANCE


def test_unroll_in_channels_last(model_of, recipe_of, device):
    model = build(recipe_of("mobilenet_v2"))
    model.load_state_dict(model_of("mobilenet_v2").state_dict())
    model.to(device, memory_format=torch.channels_last).eval()
    clip = clip_of(2, 4, device=device)
    arena = model.new_arena(2)
    slots = [arena.allocate(), arena.allocate()]
    frames = [clip[:, t].contiguous(memory_format=torch.channels_last) for t in range(4)]
    got = torch.stack([model.step(frame, arena, slots) for frame in frames], dim=1)
    assert relative(got, unrolled(model_of("mobilenet_v2", device=device), clip)) < TOLERANCE


@pytest.mark.parametrize("backbone", MEMORY)
def test_isolation(model_of, device, backbone):
    """Streams come and go in random company and order; each hears what it would hear alone."""
    rng = random.Random(5)
    model = model_of(backbone, px=PX[backbone], device=device, start="zeros")
    frames = 3
    clip = clip_of(4, frames, px=PX[backbone], device=device)
    wanted = unrolled(model, clip)
    arena = model.new_arena(5)
    ghost = arena.allocate()  # rows are no longer the streams' numbers, and one slot was used before
    model.step(clip[:1, 0] * 9, arena, [ghost])
    arena.free(ghost)
    order = rng.sample(range(4), 4)
    slots = dict(zip(order, [arena.allocate() for _ in order], strict=True))
    at = dict.fromkeys(range(4), 0)
    while waiting := [stream for stream in at if at[stream] < frames]:
        batch = rng.sample(waiting, rng.randint(1, len(waiting)))
        rows = model.step(torch.stack([clip[s, at[s]] for s in batch]), arena, [slots[s] for s in batch])
        for stream, row in zip(batch, rows, strict=True):
            assert relative(row, wanted[stream, at[stream]]) < TOLERANCE
            at[stream] += 1


@pytest.mark.parametrize(("backbone", "start"), WITH_START)
def test_finite_memory(model_of, device, backbone, start):
    """After L frames from a cold start nothing is left of what came before."""
    model, memory, px = model_of(backbone, px=PX[backbone], device=device, start=start), MEMORY[backbone], PX[backbone]
    assert model.memory_frames == memory
    past, recent = 3 * clip_of(1, 3, px, device, seed=2), clip_of(1, memory + 2, px, device, seed=3)
    never_interrupted = unrolled(model, torch.cat([past, recent], dim=1))[:, 3:]
    cold_arena = model.new_arena(1)
    cold_slots = [cold_arena.allocate()]
    warmups, cold = [], []
    for t in range(memory + 2):
        cold.append(model.step(recent[:, t], cold_arena, cold_slots))
        warmups.append(model.warmup(cold_arena, cold_slots[0]))
    assert warmups == [(min(t, memory), memory) for t in range(memory + 2)]
    cold_logits = torch.stack(cold, dim=1)
    assert relative(cold_logits[:, memory:], never_interrupted[:, memory:]) < TOLERANCE
    assert relative(cold_logits[:, 0], never_interrupted[:, 0]) > 100 * TOLERANCE


@pytest.mark.parametrize("backbone", ["resnet_small", "mobilenet_v2", "resnet50"])
def test_moving_to_another_arena_changes_nothing(model_of, device, backbone):
    """Export and restore mid-stream: exact from a float16 arena, within 2 thousandths from a float32 one."""
    model = model_of(backbone, px=PX[backbone], device=device, start="zeros")
    clip = clip_of(1, 6, px=PX[backbone], device=device)
    for dtype, tolerance in ((torch.float16, 0.0), (torch.float32, 2e-3)):
        stayed, old, new = (model.new_arena(2, dtype=dtype) for _ in range(3))
        home = [stayed.allocate()]
        wanted = run_steps(model, clip, stayed, home)[:, 3:]
        before = [old.allocate()]
        run_steps(model, clip[:, :3], old, before)
        new.allocate()
        after = [new.allocate()]
        new.restore(after[0], old.export(before[0]), old.steps(before[0]))
        old.free(before[0])
        got = run_steps(model, clip[:, 3:], new, after)
        assert relative(got, wanted) <= tolerance
        assert new.steps(after[0]) == stayed.steps(home[0]) == 6


def test_still_scene_with_own_start_equals_the_plain_network(model_of, device):
    uni, plain = (model_of("resnet_small", shift, device=device, start="own") for shift in ("uni", "none"))
    plain.load_state_dict(uni.state_dict())
    still = clip_of(2, 1, device=device).expand(-1, 4, -1, -1, -1)
    assert relative(run_steps(uni, still), unrolled(plain, still)) < TOLERANCE


def test_half_precision_arena_stays_close(model_of, device):
    model = model_of("resnet_small", device=device)
    clip = clip_of(1, 6, device=device)
    arena = model.new_arena(1, dtype=torch.bfloat16)
    assert relative(run_steps(model, clip, arena, [arena.allocate()]), unrolled(model, clip)) < 2e-2


def test_consensus_is_the_mean_over_frames(model_of):
    model = model_of("resnet_small", "bi")
    clip = clip_of(2, 4)
    with torch.no_grad():
        assert torch.allclose(model(clip), model.forward_frames(clip).mean(dim=1))
        assert model(clip).shape == (2, 7)


def test_without_shift_time_does_not_matter(model_of):
    model = model_of("resnet_small", "none")
    clip = clip_of(2, 5)
    with torch.no_grad():
        assert relative(model(clip.flip(1)), model(clip)) < TOLERANCE
    assert model.memory_frames == 0
    assert relative(run_steps(model, clip), unrolled(model, clip)) < TOLERANCE


def test_two_threads_do_not_hear_each_other(model_of):
    """One network, at once over clips of two lengths and stepped: the running pass is each call's own."""
    model = model_of("resnet_small")
    jobs = [lambda t=t: unrolled(model, clip_of(1, t)) for t in (2, 5)] + [lambda: run_steps(model, clip_of(1, 4))]
    wanted = [job() for job in jobs]
    wrong = []

    def work(job, result):
        wrong.extend(1 for _ in range(12) if relative(job(), result) > TOLERANCE)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_weight_learns(recipe_of):
    model = build(recipe_of("resnet_small"))
    torch.nn.functional.cross_entropy(model(clip_of(2, 4)), torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


CLIPS_ONLY = [
    ({"shift": "bi"}, "shifts both ways and cannot be stepped; use its _uni twin or mode=window"),
    (
        {"shift": "none", "non_local": "gaussian"},
        "has non-local blocks, which look at all frames of a clip, and cannot",
    ),
    ({"shift": "none", "temporal_pool": True}, "tsm_r50_none pools over time and cannot be stepped; use mode=window"),
    ({"shift": "bi", "temporal_pool": True}, "shifts both ways and pools over time and cannot be stepped; use mode="),
]


@pytest.mark.parametrize(("network", "why"), CLIPS_ONLY)
def test_a_model_that_needs_the_future_says_so(recipe_of, network, why):
    model = build(recipe_of("resnet50", **network)).eval()
    assert model.mode == "window"
    for use in (lambda: model.new_arena(1), lambda: model.step(clip_of(1, 1)[:, 0], None, [None])):
        with pytest.raises(NotSteppable, match=why):
            use()
    assert issubclass(NotSteppable, CallerError)


def test_behind_a_temporal_pool_the_mean_is_over_what_is_left(model_of):
    model = model_of("resnet_small", "bi", temporal_pool=True)
    clip = clip_of(2, 6)
    with torch.no_grad():
        frames = model.forward_frames(clip)
        assert frames.shape == (2, 3, 7)
        assert torch.equal(model(clip), frames.mean(dim=1))
        assert relative(model(clip.flip(1)), model(clip)) > 100 * TOLERANCE
        with pytest.raises(ShapeError, match="even number of frames, got 5"):
            model(clip[:, :5])


@pytest.mark.parametrize("network", [{"non_local": "embedded_gaussian"}, {"temporal_pool": True}])
def test_a_batch_of_clips_equals_each_alone(model_of, device, network):
    model = copy.deepcopy(model_of("resnet50", "bi", device=device, **network)).double()
    clips = clip_of(3, 4, device=device).double()
    with torch.no_grad():
        assert relative(torch.cat([model(clip[None]) for clip in clips]), model(clips)) < TOLERANCE


def test_wrong_use_is_named(model_of, recipe_of):
    model = model_of("resnet_small")
    arena = model.new_arena(1)
    slot = arena.allocate()
    with pytest.raises(ShapeError, match=r"\(1, 3, 64, 64\) for 1 slots, got \(1, 3, 32, 64\)"):
        model.step(torch.zeros(1, 3, 32, 64), arena, [slot])
    with pytest.raises(ShapeError, match="for 1 slots"):
        model.step(torch.zeros(2, 3, 64, 64), arena, [slot])
    with pytest.raises(ShapeError, match=r"\(N, T, 3, H, W\)"):
        model(torch.zeros(2, 3, 64, 64))
    arena.free(slot)
    with pytest.raises(SlotError):
        model.step(torch.zeros(1, 3, 64, 64), arena, [slot])
    training = build(recipe_of("resnet_small"))
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        training.step(torch.zeros(1, 3, 64, 64), arena, [slot])


def test_window_equals_forward_of_its_last_frames(model_of, device):
    """Two cameras, one late and slower: each result is the clip of its own ring, in order; other rows are NaN."""
    model = WindowTSM(model_of("resnet_small", "bi", device=device, frames=4), window_s=2.0, stride_s=1.0).eval()
    clip = clip_of(2, 12, device=device)
    arena = model.new_arena(3)
    quick, slow = arena.allocate(), arena.allocate()
    results = 0
    for n in range(12):  # frames every half second, as the ring wants them; the slow camera sends every second one
        slots, rows = ([quick, slow], [0, 1]) if n % 2 else ([quick], [0])
        logits = model.step(clip[rows, n], arena, slots, [n / 2] * len(rows))
        for slot, row, got in zip(slots, rows, logits, strict=True):
            sent = [n - k * (row + 1) for k in (3, 2, 1, 0)]
            assert got.isnan().all() or not got.isnan().any()
            if not got.isnan().any() and model.warmup(arena, slot) == (4, 4):
                results += 1
                with torch.no_grad():
                    assert relative(got, model(clip[row, sent][None])[0]) < TOLERANCE
    assert results >= 6


def test_window_has_its_defaults_and_needs_times(model_of):
    model = WindowTSM(model_of("resnet_small", "bi", frames=4, window_s=6.0)).eval()
    assert (model.mode, model.window_s, model.stride_s, model.memory_frames) == ("window", 6.0, 1.5, 4)
    assert (model.labels, model.input_px) == (tuple("abcdefg"), 64)
    arena = model.new_arena(1)
    slot = arena.allocate()
    with pytest.raises(ShapeError, match="times_s"):
        model.step(torch.zeros(1, 3, 64, 64), arena, [slot])
    first = model.step(torch.zeros(1, 3, 64, 64), arena, [slot], [0.0])
    assert not first.isnan().any()
    assert model.warmup(arena, slot) == (1, 4)


def test_preprocess_is_the_recipes(model_of):
    pixels = model_of("resnet_small").preprocess([torch.zeros(3, 90, 120, dtype=torch.uint8)] * 2)
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian", "dot_product"])
def test_made_for_inference_a_non_local_network_says_the_same(mode, model_of, device):
    # in double precision, as random weights make attention a knife's edge
    model = copy.deepcopy(model_of("resnet50", "bi", device=device, non_local=mode)).double()
    clip = clip_of(2, 4, device=device).double()
    with torch.no_grad():
        before = model(clip)
        after = model.for_inference()(clip)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert relative(after, before) <= TOLERANCE


@pytest.mark.parametrize("backbone", MEMORY)
def test_made_for_inference_it_says_the_same(backbone, model_of, device):
    model = copy.deepcopy(model_of(backbone, px=PX[backbone], device=device))
    clip = clip_of(2, 3, PX[backbone], device)
    with torch.no_grad():
        before = model.forward_frames(clip)
        after = model.for_inference().forward_frames(clip)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert relative(after, before) <= TOLERANCE
    assert relative(run_steps(model, clip), before) <= TOLERANCE
