"""The laws of a detector that is stepped, on its dense outputs; torchvision's files and boxes; bad input."""

import copy
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from tsm_core.arena import SlotError
from tsm_core.checkpoints import import_checkpoint, load_detector, load_recogniser, save_model
from tsm_core.cost import multiply_adds, parameters
from tsm_core.detector import Dense, build_detector
from tsm_core.detector_recipes import COCO_ROWS, DETECTOR_RECIPES, MOVING_SHAPES_TSM
from tsm_core.errors import ShapeError
from tsm_core.model_file import ModelFileError, read_card

MEMORY = {
    "moving_shapes_tsm": 8,
    "ssdlite320_mobilenet_v3_large_uni": 9,
    "fasterrcnn_mobilenet_v3_large_320_fpn_uni": 9,
    "fasterrcnn_mobilenet_v3_large_fpn_uni": 9,
    "fcos_resnet50_fpn_uni": 16,
    "fasterrcnn_resnet50_fpn_v2_uni": 16,
    "retinanet_resnet50_fpn_v2_uni": 16,
    "rfcn_resnet101_vid_uni": 18,
}
NAMES = list(MEMORY)
QUICK = ["moving_shapes_tsm", "ssdlite320_mobilenet_v3_large_uni"]
SIZE = (64, 32)  # deep ones small, to be quick
TOLERANCE = 1e-5  # of the largest value: other batch sizes sum in another order


@pytest.fixture(autouse=True)
def _single() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(name, **changes):
    return replace(DETECTOR_RECIPES[name], **{"input_size": SIZE, "start": "own", **changes})


@pytest.fixture(scope="module")
def detector_of(filled):
    """Filled detectors in eval mode, one of each kind per module."""
    made = {}

    def get(name, device="cpu", **changes):
        key = (name, str(device), *sorted(changes.items()))
        if key not in made:
            model = build_detector(small(name, **changes))
            filled(model.net)
            made[key] = model.to(device).eval()
        return made[key]

    return get


def clip_of(streams, frames, device="cpu", seed=1, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(streams, frames, 3, *size, generator=generator).to(device)


def unrolled(model, clip):
    with torch.no_grad():
        return model(clip)


def run_steps(model, clip):
    """Dense outputs of stepping through a clip, all streams in one batch, in forward's order."""
    arena = model.new_arena(len(clip))
    slots = [arena.allocate() for _ in clip]
    steps = [model.step(clip[:, t], arena, slots) for t in range(clip.shape[1])]
    return joined(steps)


def joined(steps):
    def whole(field, name):
        return torch.stack([getattr(step, field)[name] for step in steps], dim=1).flatten(0, 1)

    return Dense(
        *({name: whole(field, name) for name in getattr(steps[0], field)} for field in ("features", "outputs"))
    )


def differences(got, wanted):
    """For each tensor, the largest difference as a share of the largest wanted value."""
    return {
        f"{field}.{name}": float((getattr(got, field)[name] - tensor).abs().max() / tensor.abs().max())
        for field in ("features", "outputs")
        for name, tensor in getattr(wanted, field).items()
    }


def same(got, wanted, tolerance=TOLERANCE):
    return max(differences(got, wanted).values()) <= tolerance


def exactly(got, wanted):
    return all(
        torch.equal(getattr(got, field)[name], tensor)
        for field in ("features", "outputs")
        for name, tensor in getattr(wanted, field).items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_unroll(detector_of, device, name):
    model = detector_of(name, device)
    clip = clip_of(2, 3, device)
    wanted = unrolled(model, clip)
    assert len(wanted) == 6
    assert same(run_steps(model, clip), wanted)
    # the law says something: every frame differs from the same frame without its past, but the first
    alone = unrolled(model, clip.flatten(0, 1)[:, None])
    assert same(alone.rows([0, 3]), wanted.rows([0, 3]))
    assert min(differences(alone.rows([1, 2, 4, 5]), wanted.rows([1, 2, 4, 5])).values()) > 10 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_isolation(detector_of, device, name):
    """Streams come and go in random company and order; each sees what it would see alone."""
    rng = random.Random(5)
    model = detector_of(name, device)
    clip = clip_of(3, 2, device)
    wanted = unrolled(model, clip)
    arena = model.new_arena(4)
    ghost = arena.allocate()  # rows are no longer the streams' numbers, and one slot was used before
    model.step(clip[:1, 0] * 9, arena, [ghost])
    arena.free(ghost)
    order = rng.sample(range(3), 3)
    slots = dict(zip(order, [arena.allocate() for _ in order], strict=True))
    at = dict.fromkeys(range(3), 0)
    while waiting := [stream for stream in at if at[stream] < 2]:
        batch = rng.sample(waiting, rng.randint(1, len(waiting)))
        dense = model.step(torch.stack([clip[s, at[s]] for s in batch]), arena, [slots[s] for s in batch])
        assert same(dense, wanted.rows([2 * stream + at[stream] for stream in batch]))
        for stream in batch:
            at[stream] += 1


@pytest.mark.parametrize("name", NAMES)
def test_finite_memory(detector_of, device, name):
    """After L frames from a cold start nothing is left of what came before."""
    model, memory = detector_of(name, device), MEMORY[name]
    assert model.memory_frames == memory
    past, recent = 3 * clip_of(1, 2, device, seed=2), clip_of(1, memory + 1, device, seed=3)
    never_interrupted = unrolled(model, torch.cat([past, recent], dim=1))
    arena = model.new_arena(1)
    slots, warmups, cold = [arena.allocate()], [], []
    for t in range(memory + 1):
        cold.append(model.step(recent[:, t], arena, slots))
        warmups.append(model.warmup(arena, slots[0]))
    assert warmups == [(t, memory) for t in range(memory + 1)]
    assert same(cold[memory], never_interrupted.rows([memory + 2]))
    assert min(differences(cold[0], never_interrupted.rows([2])).values()) > 10 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_first_frame_and_still_scene_are_the_still_image_detectors(detector_of, name):
    model, still = detector_of(name), detector_of(name, shift="none")
    assert still.memory_frames == 0
    frame = clip_of(1, 1)[:, 0]
    arena, other = model.new_arena(1), still.new_arena(1)
    slots, others = [arena.allocate()], [other.allocate()]
    wanted = still.step(frame, other, others)
    assert all(exactly(model.step(frame, arena, slots), wanted) for _ in range(3))


def test_zero_start_is_an_option(detector_of):
    own, zeros = detector_of("moving_shapes_tsm"), detector_of("moving_shapes_tsm", start="zeros")
    clip = clip_of(2, 3)
    assert same(run_steps(zeros, clip), unrolled(zeros, clip))
    assert not same(unrolled(zeros, clip).rows([0]), unrolled(own, clip).rows([0]), 10 * TOLERANCE)


@pytest.mark.parametrize("name", QUICK)
def test_half_precision_arena_and_a_move(detector_of, device, name):
    """A float16 arena stays close; export and restore mid-stream change nothing."""
    model = detector_of(name, device)
    clip = clip_of(1, 4, device)
    stayed, old, new = (model.new_arena(2, dtype=torch.float16) for _ in range(3))
    home, before = [stayed.allocate()], [old.allocate()]
    wanted = [model.step(clip[:, t], stayed, home) for t in range(4)]
    assert same(joined(wanted), unrolled(model, clip), 2e-2)
    for t in range(2):
        model.step(clip[:, t], old, before)
    new.allocate()
    after = [new.allocate()]
    new.restore(after[0], old.export(before[0]), old.steps(before[0]))
    assert all(exactly(model.step(clip[:, t], new, after), wanted[t]) for t in (2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_made_for_inference_it_says_the_same(detector_of, device, name):
    model = copy.deepcopy(detector_of(name, device))
    clip = clip_of(1, 2, device)
    before = unrolled(model, clip)
    after = unrolled(model.for_inference(), clip)
    assert not any(isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) for module in model.modules())
    assert same(after, before, 3 * TOLERANCE)
    assert same(run_steps(model, clip), before, 3 * TOLERANCE)


# ---- torchvision's files


def frozen(network):
    """torchvision freezes the norms of its v1 detectors when they have weights; there are none to fetch here."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                constant = FrozenBatchNorm2d(norm.num_features, norm.eps)
                constant.load_state_dict(norm.state_dict())
                setattr(parent, name, constant)
    return network


@pytest.fixture(params=COCO_ROWS, ids=lambda row: row.name)
def published(request, filled, tmp_path):
    """A row, torchvision's own network, and its file."""
    row = request.param
    network = getattr(detection, row.name)(weights=None, weights_backbone=None, num_classes=91)
    filled(network)
    if "v2" not in row.name and "ssd" not in row.name:
        frozen(network)
    torch.save(network.state_dict(), tmp_path / "published.pth")
    return replace(row, input_size=SIZE), network.eval(), tmp_path / "published.pth"


def test_a_file_of_torchvision_loads_strictly_and_says_the_same(published):
    recipe, network, file = published
    model = import_checkpoint(file, recipe)
    assert model.source["layout"] == "torchvision"
    assert "note" not in model.source
    clip = clip_of(2, 1)
    with torch.no_grad():
        features = network.backbone(clip[:, 0])
        if hasattr(network, "rpn"):
            logits, deltas = network.rpn.head(list(features.values()))
            heads = {
                name: torch.cat(
                    [x.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).reshape(2, -1, values) for x in levels], dim=1
                )
                for name, levels, values in (("objectness", logits, 1), ("rpn_deltas", deltas, 4))
            }
        else:
            heads = network.head(list(features.values()))
    assert same(unrolled(model, clip), Dense(features, heads))
    # and with shift: the first frame is the still-image detector's
    shifted = import_checkpoint(file, replace(recipe, shift="uni"))
    assert "not say whether it was trained so" in shifted.source["note"]
    assert same(unrolled(shifted, clip), Dense(features, heads))


def test_boxes_are_torchvisions(published):
    recipe, network, file = published
    model = import_checkpoint(file, recipe)
    clip = clip_of(2, 1, seed=4)
    sizes, frames = [SIZE] * 2, clip[:, 0]
    dense = unrolled(model, clip)
    images = detection.image_list.ImageList(frames, sizes)
    with torch.no_grad():
        if hasattr(network, "rpn"):
            for each in (network, model.net):  # or random weights find all proposals alike
                each.roi_heads.box_predictor.cls_score.weight.mul_(30)
            thresh = network.roi_heads.score_thresh = 0.1
            network.roi_heads.detections_per_img = 10_000
            proposals, _ = network.rpn(images, dense.features)
            wanted, _ = network.roi_heads(dense.features, proposals, sizes)
        else:
            # heads that are sure of some things
            logits = 3 * torch.randn(dense.outputs["cls_logits"].shape, generator=torch.Generator().manual_seed(6))
            dense = Dense(dense.features, {**dense.outputs, "cls_logits": logits})
            levels = list(dense.features.values())
            anchors = network.anchor_generator(images, levels)
            thresh = network.score_thresh = 0.3
            network.nms_thresh, network.detections_per_img, network.topk_candidates = recipe.nms_iou, 10_000, 10_000
            outputs = dense.outputs
            if "ssd" not in recipe.name:
                per_place = len(anchors[0]) // sum(level.shape[2] * level.shape[3] for level in levels)
                counts = [level.shape[2] * level.shape[3] * per_place for level in levels]
                outputs = {name: list(tensor.split(counts, dim=1)) for name, tensor in outputs.items()}
                anchors = [list(each.split(counts)) for each in anchors]
            wanted = network.postprocess_detections(outputs, anchors, sizes)
    found = model.detect(dense, thresh)
    assert sum(map(len, found)) > 5
    for ours, theirs in zip(found, wanted, strict=True):
        named = torch.isin(theirs["labels"], torch.tensor(recipe.label_ids))
        sides = theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]  # they tell boxes without a side, too
        kept = (named & (sides >= 0.01).all(dim=1)).nonzero()[:, 0][: recipe.max_detections]
        # equal scores stand in any order, so both are ordered by label
        rows = table(theirs["labels"][kept], theirs["scores"][kept], theirs["boxes"][kept])
        assert torch.allclose(table(model._output_of[ours.labels], ours.scores, ours.xyxy), rows, atol=5e-2)


def table(labels, scores, boxes):
    """Rows (label, 1000 x score, box), in the order of labels, the better before the worse."""
    rows = torch.cat([labels[:, None].float(), 1000 * scores[:, None], boxes], dim=1)
    return rows[sorted(range(len(rows)), key=lambda row: (int(labels[row]), -float(scores[row])))]


def test_a_file_that_does_not_fit_says_how(published):
    recipe, network, file = published
    weights = network.state_dict()
    left_out = next(key for key in weights if key.endswith("weight"))
    torch.save({**{k: v for k, v in weights.items() if k != left_out}, "ema.decay": torch.zeros(1)}, file)
    with pytest.raises(ModelFileError, match=rf"missing {left_out}; unknown ema.decay"):
        import_checkpoint(file, recipe)
    torch.save({**weights, left_out: torch.zeros(7, 7)}, file)
    with pytest.raises(ModelFileError, match=r" is \(\d+.*, not \(\d+"):
        import_checkpoint(file, recipe)
    torch.save({**weights, left_out: weights[left_out] * float("nan")}, file)
    with pytest.raises(ModelFileError, match="not finite"):
        import_checkpoint(file, recipe)


@pytest.mark.parametrize("row", COCO_ROWS, ids=lambda row: row.name)
def test_published_parameters(row):
    assert parameters(row) == row.published.params
    assert multiply_adds(row) > 10**8
    assert row.shift == "none"
    assert (len(row.labels), row.outputs) == (80, 91)


def test_a_saved_detector_is_the_same(tmp_path, detector_of):
    model = detector_of("moving_shapes_tsm")
    file = tmp_path / "model.safetensors"
    save_model(file, model, {"note": "random"})
    again = load_detector(file)
    assert read_card(file) == (model.recipe, {"note": "random"})
    assert exactly(unrolled(again, clip_of(1, 2)), unrolled(model.to(memory_format=torch.channels_last), clip_of(1, 2)))
    with pytest.raises(ModelFileError, match="is a detector"):
        load_recogniser(file)


# ---- boxes and losses


def dense_of(model, seed=0, scale=1.0, frames=2):
    """Dense outputs of noise, with heads that say `scale` times as much."""
    dense = unrolled(model, clip_of(1, frames, seed=seed))
    return Dense(dense.features, {name: scale * tensor for name, tensor in dense.outputs.items()})


@pytest.mark.parametrize("name", NAMES)
def test_boxes_are_bounded_sorted_and_inside(detector_of, name):
    model = detector_of(name)
    height, width = model.input_size
    dense = dense_of(model, scale=3.0)
    for boxes in model.detect(dense, 0.0):
        assert len(boxes) <= model.recipe.max_detections
        assert (boxes.scores[1:] <= boxes.scores[:-1]).all()
        assert boxes.xyxy.isfinite().all()
        assert ((boxes.labels >= 0) & (boxes.labels < len(model.labels))).all()
        assert (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all()
        assert (boxes.xyxy >= 0).all()
        assert (boxes.xyxy <= torch.tensor([width, height, width, height])).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_is_no_box(detector_of, name):
    model = detector_of(name)
    dense = dense_of(model)
    for key in dense.outputs:
        spoilt = {**dense.outputs, key: dense.outputs[key] * float("nan")}
        assert all(boxes.xyxy.isfinite().all() for boxes in model.detect(Dense(dense.features, spoilt)))


def test_three_hundred_objects_and_none(detector_of):
    model = detector_of("ssdlite320_mobilenet_v3_large_uni")
    dense = dense_of(model)
    logits = torch.full_like(dense.outputs["cls_logits"], -20.0)
    logits[0, :, 1] = 20.0
    apart = Dense(dense.features, {**dense.outputs, "cls_logits": logits})
    many = replace(model.recipe, nms_iou=1.0, max_detections=300)
    crowded = build_detector(many).eval()
    counts = [len(boxes) for boxes in crowded.detect(apart)]
    assert counts == [min(300, logits.shape[1]), 0]


def test_outputs_without_a_label_are_never_told(detector_of):
    model = detector_of("ssdlite320_mobilenet_v3_large_uni")
    dense = dense_of(model)
    logits = torch.full_like(dense.outputs["cls_logits"], -20.0)
    for output, wanted in ((12, None), (0, None), (1, "person"), (13, "stop sign"), (90, "toothbrush")):
        logits[:] = -20.0
        logits[:, 0, output] = 20.0
        (boxes, _) = model.detect(Dense(dense.features, {**dense.outputs, "cls_logits": logits}))
        assert [model.labels[label] for label in boxes.labels] == ([] if wanted is None else [wanted])


def target_of(*boxes, label=0):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.full((len(boxes),), label, dtype=torch.int64),
    }


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_finite_and_every_part_learns(name):
    torch.manual_seed(0)
    model = build_detector(small(name)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    targets = [target_of((3, 3, 28, 40), (2, 10, 20, 60)), target_of()]
    terms = model.losses(clip_of(1, 2), targets)
    assert all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    # what is no box changes nothing
    bad = target_of((float("nan"), 0, 5, 5), (40, 0, 60, 20), (9, 9, 9, 30), (20, 20, 10, 10))
    mixed = [{key: torch.cat([targets[0][key], bad[key]]) for key in bad}, bad]
    torch.manual_seed(1)
    one = model.losses(clip_of(1, 2), targets)
    torch.manual_seed(1)
    other = model.losses(clip_of(1, 2), mixed)
    assert {key: value.item() for key, value in one.items()} == pytest.approx(
        {key: value.item() for key, value in other.items()}
    )


def test_wrong_use_is_named(detector_of):
    model = detector_of("moving_shapes_tsm")
    arena = model.new_arena(1)
    slot = arena.allocate()
    with pytest.raises(ShapeError, match=r"\(1, 3, 64, 32\) for 1 slots, got \(1, 3, 32, 32\)"):
        model.step(torch.zeros(1, 3, 32, 32), arena, [slot])
    with pytest.raises(ShapeError, match=r"\(N, T, 3, 64, 32\)"):
        model(torch.zeros(2, 3, 64, 32))
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        model.losses(clip_of(1, 1), [target_of()])
    arena.free(slot)
    with pytest.raises(SlotError):
        model.step(clip_of(1, 1)[:, 0], arena, [slot])
    training = build_detector(small("moving_shapes_tsm"))
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        training.step(clip_of(1, 1)[:, 0], arena, [slot])
    with pytest.raises(ShapeError, match="1 targets do not fit 2 frames"):
        training.losses(clip_of(1, 2), [target_of()])
    with pytest.raises(ShapeError, match=r"must be in 0\.\.3"):
        training.losses(clip_of(1, 1), [target_of((1, 1, 9, 9), label=4)])
    with pytest.raises(ShapeError, match=r"boxes \(M, 4\)"):
        training.losses(clip_of(1, 1), [{"boxes": torch.zeros(2, 3), "labels": torch.zeros(2, dtype=torch.int64)}])


def test_preprocess_letterboxes_and_normalises(detector_of):
    model = detector_of("moving_shapes_tsm")  # 64 high, 32 wide
    wide = torch.full((3, 90, 120), 255, dtype=torch.uint8)
    tall = torch.zeros((3, 64, 32), dtype=torch.uint8)
    pixels = model.preprocess([wide, tall])
    assert pixels.shape == (2, 3, 64, 32)
    white, black = ([(value - mean) / std for mean, std in zip(*model_spec(model), strict=True)] for value in (1, 0))
    assert pixels[0, :, 32, 5].tolist() == pytest.approx(white, abs=1e-5)
    assert pixels[1, :, 0, 0].tolist() == pytest.approx(black, abs=1e-5)
    assert pixels[0, :, :20].eq(0).all()
    assert pixels[0, :, 20:44].ne(0).all()
    assert MOVING_SHAPES_TSM.input_size == (96, 96)


def model_spec(model):
    return model.recipe.mean, model.recipe.std
