import random

import pytest
import torch

from tsm_core.arena import Arena, ArenaFull, Slot, SlotError, WindowArena
from tsm_core.errors import ShapeError, WorldError

SPEC = [(3, 4, 4), (2, 2, 2)]  # 56 numbers


def states(values: list[float], device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """Shift states where every number of a row is that row's value."""
    rows = torch.tensor(values, device=device).view(-1, 1, 1, 1)
    return [rows.expand(-1, *shape).clone() for shape in SPEC]


def test_capacity_and_bytes(device):
    arena = Arena(SPEC, slots=2, dtype=torch.float16, device=device)
    assert (arena.slots_total, arena.used, arena.elements, arena.nbytes) == (2, 0, 56, 2 * 56 * 2)
    assert arena.device.type == device.type
    first = arena.allocate()
    arena.allocate()
    assert arena.used == 2
    with pytest.raises(ArenaFull, match="all 2 slots") as caught:
        arena.allocate()
    assert isinstance(caught.value, WorldError)
    assert caught.value.reason == "arena_full"
    arena.free(first)
    assert arena.allocate().index == first.index


def test_stale_and_foreign_slots_are_refused():
    arena = Arena(SPEC, slots=2)
    old = arena.allocate()
    arena.free(old)
    arena.allocate()
    for use in (
        lambda: arena.gather([old]),
        lambda: arena.scatter([old], states([1.0])),
        lambda: arena.free(old),
        lambda: arena.export(old),
        lambda: arena.restore(old, torch.zeros(56), 1),
        lambda: arena.steps(old),
        lambda: arena.gather([Slot(7, 1)]),
    ):
        with pytest.raises(SlotError) as caught:
            use()
        assert caught.value.reason == "stale_slot"


def test_a_row_cannot_step_twice_in_one_batch():
    arena = Arena(SPEC, slots=2)
    slot = arena.allocate()
    with pytest.raises(SlotError, match="twice"):
        arena.gather([slot, slot])


def test_states_of_another_shape_are_refused():
    arena = Arena(SPEC, slots=2)
    slot = arena.allocate()
    with pytest.raises(ShapeError, match="do not fit"):
        arena.scatter([slot], states([1.0, 2.0]))
    with pytest.raises(ShapeError, match=r"\(55,\)"):
        arena.restore(slot, torch.zeros(55), 1)
    assert arena.steps(slot) == 0


def test_nothing_leaks_between_slots_whatever_happens(device):
    """Three thousand moves against a plain dictionary: a slot holds what its owner wrote last, or zeros when fresh."""
    rng = random.Random(3)
    arena = Arena(SPEC, slots=7, device=device)
    truth: dict[Slot, float] = {}
    seen: dict[Slot, int] = {}
    dead: list[Slot] = []
    canary = 0
    for _ in range(3000):
        move = rng.random()
        if move < 0.15:
            if len(truth) == 7:
                with pytest.raises(ArenaFull):
                    arena.allocate()
            else:
                slot = arena.allocate()
                assert slot not in truth
                truth[slot], seen[slot] = 0.0, 0
        elif move < 0.27 and truth:
            slot = rng.choice(list(truth))
            arena.free(slot)
            del truth[slot]
            dead.append(slot)
        elif truth:
            batch = rng.sample(list(truth), rng.randint(1, len(truth)))
            for layer in arena.gather(batch).layers:
                got = [row.unique().tolist() for row in layer]
                assert got == [[truth[slot]] for slot in batch]
            values = []
            for slot in batch:
                canary += 1
                truth[slot] = float(canary)
                seen[slot] += 1
                values.append(truth[slot])
            arena.scatter(batch, states(values, device))
        if dead and move > 0.98:
            with pytest.raises(SlotError):
                arena.gather([rng.choice(dead)])
        assert arena.used == len(truth)
        assert all(arena.steps(slot) == seen[slot] for slot in truth)
    assert canary > 3000


def test_export_and_restore_carry_one_slot_over(device):
    source, target = Arena(SPEC, 3, device=device), Arena(SPEC, 2, dtype=torch.float16, device=device)
    one, two = source.allocate(), source.allocate()
    held = [torch.randn(2, *shape, device=device) for shape in SPEC]
    source.scatter([one, two], held)
    blob = source.export(two)
    assert (blob.dtype, tuple(blob.shape), blob.device.type) == (torch.float16, (56,), "cpu")
    other, slot = target.allocate(), target.allocate()
    target.restore(slot, blob, steps=12)
    assert target.steps(slot) == 12
    assert torch.equal(target.export(slot), blob)
    for layer, wanted in zip(target.gather([slot, other]).layers, held, strict=True):
        assert torch.equal(layer[0], wanted[1].half())
        assert not layer[1].any()


def test_export_is_a_copy_and_fits_float16():
    arena = Arena(SPEC, 1)
    slot = arena.allocate()
    arena.scatter([slot], states([1e9]))
    blob = arena.export(slot)
    arena.scatter([slot], states([2.0]))
    assert blob.unique().tolist() == [65504.0]


def test_own_start_marks_fresh_slots_only():
    arena = Arena(SPEC, 3, start="own")
    old, new = arena.allocate(), arena.allocate()
    arena.scatter([old], states([1.0]))
    fresh = arena.gather([new, old]).fresh
    assert fresh is not None
    assert fresh.tolist() == [True, False]
    arena.scatter([new], states([1.0]))
    assert arena.gather([new, old]).fresh is None
    restored = arena.allocate()
    arena.restore(restored, torch.ones(56), steps=4)
    assert arena.gather([restored]).fresh is None
    assert Arena(SPEC, 1).start == "zeros"


def test_without_shifted_layers_it_only_counts():
    arena = Arena([], slots=1)
    slot = arena.allocate()
    arena.scatter([slot], arena.gather([slot]))
    assert (arena.steps(slot), arena.nbytes, arena.export(slot).numel()) == (1, 0, 0)


def pictures(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()


def ring_of(arena: WindowArena, slot: Slot) -> list[float]:
    return arena.clips([slot])[0, :, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("fps", "window_s", "entered"),
    [
        (4, 2.0, [0, 2, 4, 6, 8]),  # every half second of a camera at 4 fps
        (3, 2.0, [0, 2, 3, 5, 6, 8, 9]),  # frames come late, the rhythm of half a second stays
        (1, 2.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),  # slower than the ring: every frame
    ],
)
def test_ring_takes_frames_in_a_steady_rhythm(fps, window_s, entered):
    arena = WindowArena(frames=4, shape=(3, 2, 2), slots=1, window_s=window_s, stride_s=1.0)
    slot = arena.allocate()
    took = []
    for number in range(10):
        before = arena.steps(slot)
        arena.push([slot], pictures(number), [number / fps])
        if arena.steps(slot) > before:
            took.append(number)
    assert took == entered
    assert ring_of(arena, slot) == entered[-4:]


def test_results_are_due_every_stride_of_each_stream():
    arena = WindowArena(frames=2, shape=(3, 2, 2), slots=2, window_s=1.0, stride_s=1.0)
    slow, fast = arena.allocate(), arena.allocate(stride_s=0.5)
    due = [arena.push([slow, fast], pictures(n, n), [n / 4, n / 4]) for n in range(6)]
    assert due == [[0, 1], [], [1], [], [0, 1], []]


def test_gap_and_step_back_begin_a_new_rhythm():
    arena = WindowArena(frames=2, shape=(3, 2, 2), slots=1, window_s=2.0, stride_s=2.0)
    slot = arena.allocate()
    due = [bool(arena.push([slot], pictures(n), [t])) for n, t in enumerate([0.0, 50.0, 50.5, 51.0, 52.0, 3.0, 4.0])]
    assert due == [True, True, False, False, True, True, False]
    assert arena.steps(slot) == 6  # all but the one at 50.5


def test_young_ring_repeats_its_oldest_and_moves_as_it_is():
    arena = WindowArena(frames=4, shape=(3, 2, 2), slots=2, window_s=4.0, stride_s=1.0)
    slot = arena.allocate()
    for n in range(1, 3):
        arena.push([slot], pictures(n), [float(n)])
    assert ring_of(arena, slot) == [1, 1, 1, 2]
    other = WindowArena(frames=4, shape=(3, 2, 2), slots=3, window_s=4.0, stride_s=1.0)
    other.allocate()
    moved = other.allocate()
    other.restore(moved, arena.export(slot), arena.steps(slot))
    for n in range(3, 8):
        assert ring_of(other, moved) == ring_of(arena, slot)
        assert other.steps(moved) == arena.steps(slot)
        for each, where in ((arena, slot), (other, moved)):
            each.push([where], pictures(n), [float(n)])
    assert ring_of(other, moved) == [4, 5, 6, 7]


def test_window_arena_checks_its_callers():
    arena = WindowArena(frames=4, shape=(3, 2, 2), slots=1, window_s=4.0, stride_s=1.0)
    assert (arena.elements, arena.nbytes) == (48, 192)
    slot = arena.allocate()
    with pytest.raises(ArenaFull):
        arena.allocate()
    with pytest.raises(ShapeError, match="do not fit"):
        arena.push([slot], torch.zeros(1, 3, 3, 2), [0.0])
    with pytest.raises(ShapeError, match="another model"):
        arena.restore(slot, torch.zeros(47), 1)
    arena.free(slot)
    with pytest.raises(SlotError):
        arena.clips([slot])
